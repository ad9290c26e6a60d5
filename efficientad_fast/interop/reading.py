"""Files of ``torch.save``, read without running what is in them: `unpickling` makes records of them, and this tensors.

Nothing is allocated that a file only declares: a storage's bytes must be in the file, once, before they are read.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from efficientad_fast.errors import DetectorFileError
from efficientad_fast.files import is_file
from efficientad_fast.interop.unpickling import Name, Rebuild, read_pickle, shown

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
"""How files begin."""

_TAR = slice(257, 262), b"ustar"
"""Where tar files say what they are. Nothing else is looked at: they may be compressed, and declare any size."""

_MOST_AT_ONCE = 4 * 2**20
"""Bytes that are read at once of what is not a tensor; a zip file's table of contents comes so."""

_MOST_SHARING = 8
"""Tensors that may show the same numbers, each of which has memory of its own once it is read."""

_DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


@dataclass(frozen=True, slots=True, eq=False)
class StorageRecord:
    """The numbers of one or more tensors, in the file."""

    key: str
    dtype: torch.dtype | None
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRecord:
    """A tensor of a file that is not read yet; what it says of itself is not checked yet either."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class TorchFile:
    """An open file of ``torch.save``.

    Attributes:
        source: what it is called in errors.
        value: what was saved, with dictionaries for ordered ones, :class:`TensorRecord` for tensors and parameters, and
            :class:`unpickling.Record` for everything else that is not plain data.
    """

    def __init__(
        self, source: str, value: Any, read_storage: Callable[[StorageRecord], bytearray], file_bytes: int
    ) -> None:
        self.source = source
        self.value = value
        self._read_storage = read_storage
        self._left = _MOST_SHARING * file_bytes
        self._storages: dict[tuple[str, torch.dtype, int], bytearray] = {}

    def tensor(self, record: TensorRecord) -> Tensor:
        """The tensor, contiguous, in memory of its own.

        Raises:
            DetectorFileError: its numbers are not in the file, its memory layout is none that weights have, or too
                many tensors show the same numbers.
        """
        storage, size, stride = record.storage, record.size, record.stride
        what = f"{self.source}: a tensor of size {size} and stride {stride}"
        if storage.dtype is None:
            raise DetectorFileError(f"{what} has numbers of an unknown type. Save it as float32.")
        if not _is_dense(size, stride):
            raise DetectorFileError(f"{what} is not laid out as weights are. Save it after .contiguous().")
        numel = math.prod(size)
        last = record.offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if numel and last >= storage.numel:
            raise DetectorFileError(f"{what} is larger than its storage of {storage.numel} numbers: it is damaged.")
        if numel == 0:
            return torch.empty(0, dtype=storage.dtype).reshape(size)
        self._left -= numel * storage.dtype.itemsize
        if self._left < 0:
            raise DetectorFileError(
                f"{self.source} has too many tensors that show the same numbers. Save clones of them."
            )
        key = (storage.key, storage.dtype, storage.numel)
        if key not in self._storages:
            self._storages[key] = self._read_storage(storage)
        numbers = torch.frombuffer(self._storages[key], dtype=storage.dtype)
        return numbers.as_strided(size, stride, record.offset).clone(memory_format=torch.contiguous_format)


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of ``torch.save`` by its first bytes, or by its name if it is no safetensors file."""
    path = Path(path)
    if not is_file(path):
        return False
    with path.open("rb") as file:
        start = file.read(9)
    is_stream = start[:1] == _PICKLE and start[2:3] in (b"\x8a", b"\x95")
    is_named_so = path.suffix in (".pth", ".pt", ".ckpt") and start[8:] != b"{"
    return start[:4] == _ZIP or is_stream or is_named_so


@contextlib.contextmanager
def open_torch_file(path: str | os.PathLike[str]) -> Iterator[TorchFile]:
    """Open what ``torch.save`` wrote: a zip file, or the stream of PyTorch before 1.6.

    Raises:
        DetectorFileError: the file is missing, damaged, or something else.
    """
    path = Path(path)
    if not is_file(path):
        raise DetectorFileError(f"There is no file {path}. Check the path.")
    with path.open("rb") as file:
        start = file.read(512)
        file.seek(0)
        if start[:4] == _ZIP:
            yield _open_zip(file, str(path))
        elif start[:1] == _PICKLE:
            yield _open_stream(file, str(path))
        elif start[_TAR[0]] == _TAR[1]:
            raise DetectorFileError(
                f"{path} is a file of PyTorch before 0.2, which is not read here. Load it with that PyTorch, and save "
                "the state dict with a new one."
            )
        elif start[8:9] == b"{":
            raise DetectorFileError(
                f"{path} is a safetensors file, and one of torch.save is needed here. A detector of this package needs "
                "no converting."
            )
        else:
            raise DetectorFileError(f"{path} was not written by torch.save. Check the path, or copy it again.")


# Zip files, of PyTorch 1.6 and later


_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, struct.error)


class _Bounded:
    """A file that gives no more than some megabytes at once, whatever it declares."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > _MOST_AT_ONCE:
            raise zipfile.BadZipFile(f"{size} bytes at once")
        return self._file.read(_MOST_AT_ONCE if size < 0 else size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _open_zip(file: BinaryIO, source: str) -> TorchFile:
    try:
        archive = zipfile.ZipFile(cast(BinaryIO, _Bounded(file)))
    except _ZIP_ERRORS as error:
        raise _damaged(source, error) from error
    names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        held = "several" if names else "no"
        raise DetectorFileError(f"{source} is a zip file, but not of torch.save: there is {held} data.pkl in it.")
    prefix = names[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in archive.NameToInfo:
        raise DetectorFileError(
            f"{source} is a TorchScript program, which is not read here. Give the checkpoint or the state dict."
        )
    file_bytes = file.seek(0, os.SEEK_END)
    left = file_bytes

    def data(name: str) -> bytearray:
        nonlocal left
        entry = archive.NameToInfo.get(name)
        if entry is None:
            raise _damaged(source, f"{name} is not in it")
        # Nothing that torch.save writes is compressed, and nothing is there twice.
        left -= entry.file_size
        is_stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not is_stored or entry.header_offset + entry.file_size > file_bytes or left < 0:
            raise DetectorFileError(
                f"{source} is not as torch.save writes files: {shown(name)}, of {entry.file_size} bytes, is "
                "compressed, or larger than the file."
            )
        found = bytearray(entry.file_size)
        try:
            with archive.open(entry) as opened:
                for start in range(0, len(found), _MOST_AT_ONCE):
                    piece = memoryview(found)[start : start + _MOST_AT_ONCE]
                    if cast(io.BufferedIOBase, opened).readinto(piece) != len(piece):
                        raise EOFError("it ends early")
        except _ZIP_ERRORS as error:
            raise _damaged(source, error) from error
        return found

    order_name = f"{prefix}byteorder"
    order = bytes(data(order_name)).decode("ascii", "replace") if order_name in archive.NameToInfo else "little"
    _require_byte_order(source, order)
    value = read_pickle(io.BytesIO(data(names[0])), source, _REBUILD, _persistent)

    def read_storage(storage: StorageRecord) -> bytearray:
        numbers = data(f"{prefix}data/{storage.key}")
        _require_bytes(source, storage, len(numbers))
        return numbers

    return TorchFile(source, value, read_storage, file_bytes)


# Streams, of PyTorch before 1.6, and of torch.save(..., _use_new_zipfile_serialization=False)


def _open_stream(file: BinaryIO, source: str) -> TorchFile:
    storages: dict[str, StorageRecord] = {}

    def persistent(identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class, with its source beside it
        if isinstance(identity, tuple) and len(identity) == 6 and identity[-1] is not None:
            raise DetectorFileError("a view of a storage, which is not read here. Save the state dict again.")
        storage = _persistent(identity)
        return storages.setdefault(storage.key, storage)

    def following() -> Any:
        return read_pickle(file, source, _REBUILD, persistent)

    if (following(), following()) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise DetectorFileError(f"{source} is a pickle, but not of torch.save. Check the path.")
    system = following()
    is_little = not isinstance(system, dict) or system.get("little_endian", True) is True
    _require_byte_order(source, "little" if is_little else "big")
    value, keys = following(), following()
    file_bytes = os.fstat(file.fileno()).st_size
    places: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.dtype is None:
            raise DetectorFileError(f"{source} is damaged, or has numbers of an unknown type. Save it again.")
        numel = int.from_bytes(file.read(8), "little", signed=True)
        places[key] = file.tell()
        if numel != storage.numel or places[key] + numel * storage.dtype.itemsize > file_bytes:
            raise _damaged(source, f"{numel} numbers where there should be {storage.numel}")
        file.seek(places[key] + numel * storage.dtype.itemsize)

    def read_storage(storage: StorageRecord) -> bytearray:
        if storage.key not in places or storage.dtype is None:
            raise _damaged(source, f"no storage {storage.key}")
        numbers = bytearray(storage.numel * storage.dtype.itemsize)
        file.seek(places[storage.key])
        _require_bytes(source, storage, file.readinto(numbers))  # type: ignore[attr-defined]
        return numbers

    return TorchFile(source, value, read_storage, file_bytes)


# Names that stand for something


def _storage(value: Any) -> StorageRecord:
    if not isinstance(value, StorageRecord):
        raise ValueError(f"a {type(value).__name__} for a storage")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > 8 or not all(map(_is_count, values)):
        raise ValueError("a size that is none")
    return tuple(values)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _persistent(identity: Any) -> StorageRecord:
    tag, kind, key, _, numel = identity[:5]
    if tag != "storage" or not isinstance(key, str) or not _is_count(numel):
        raise ValueError("a persistent id that is no storage")
    dtype = _DTYPES.get(kind.name) if isinstance(kind, Name) else None
    return StorageRecord(key, dtype, numel)


def _tensor(arguments: tuple[Any, ...]) -> TensorRecord:
    storage, offset, size, stride = arguments[:4]
    return TensorRecord(_storage(storage), _integers((offset,))[0], _integers(size), _integers(stride))


def _parameter(arguments: tuple[Any, ...]) -> Any:
    return arguments[0]


def _with_attributes(arguments: tuple[Any, ...]) -> Any:
    """A tensor or parameter that was given attributes, which do not come along."""
    function, _, inner = arguments[:3]
    if not isinstance(function, Name) or function not in _TENSORS or not isinstance(inner, tuple):
        raise ValueError("a tensor of an unknown kind")
    return _TENSORS[function](inner)


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("an ordered dictionary that is not empty from the start")
    return {}


_TENSORS: dict[Name, Rebuild] = {
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}

_REBUILD: dict[Name, Rebuild] = {
    **_TENSORS,
    Name("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    Name("torch", "Size"): _parameter,
    Name("collections", "OrderedDict"): _ordered,
}


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no two elements are in one place, in whatever order the dimensions are: not expanded, not unfolded."""
    if len(size) != len(stride):
        return False
    behind = 0  # the last element's place, of the dimensions that are closer together
    for step, side in sorted(zip(stride, size, strict=True)):
        if side > 1:
            if step <= behind:
                return False
            behind += (side - 1) * step
    return True


def _require_byte_order(source: str, order: str) -> None:
    if order != "little" or sys.byteorder != "little":
        raise DetectorFileError(f"{source} has {shown(order)}-endian numbers, but little-endian ones are read here.")


def _require_bytes(source: str, storage: StorageRecord, found: int) -> None:
    expected = storage.numel * (storage.dtype.itemsize if storage.dtype else 0)
    if found != expected:
        raise _damaged(source, f"storage {storage.key} has {found} bytes where there should be {expected}")


def _damaged(source: str, reason: object) -> DetectorFileError:
    return DetectorFileError(f"{source} is damaged ({shown(str(reason))}). Copy it again, or save it again.")
