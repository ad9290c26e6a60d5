"""Files that are written whole or not at all, and tensors in them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from efficientad_fast.errors import DetectorFileError, OutputError

_MOST_BYTES = 2**32
"""Of a file of tensors: a hundred times what a detector has. It is read as a whole."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextlib.contextmanager
def told_of_disk(target: Path) -> Iterator[None]:
    """Turns a disk that is full, or cannot be written to, into an :class:`OutputError` that names ``target``."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OutputError(
            f"{target} could not be written: {os.strerror(error.errno)}. What was there before is as it was; make room "
            f"on its disk, or give another place."
        ) from error


def sync_folder(folder: Path) -> None:
    """Bring the names of files in ``folder`` to the disk, where its file system does that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def printable(text: str) -> str:
    """With escapes for control characters, and for bytes of a file name that are not UTF-8; no two become one."""
    return _escaped(text, lambda one: one.isprintable() and one != "\\")


def without_controls(text: str) -> str:
    """With escapes for control characters but line ends: what comes from a file must not steer a terminal."""
    return _escaped(text, lambda one: one.isprintable() or one == "\n")


def _escaped(text: str, is_kept: Callable[[str], bool]) -> str:
    return "".join(one if is_kept(one) else one.encode("unicode_escape").decode() for one in text)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """As ``Path.is_dir``, but not raising where that cannot be known: no right to search a folder, too long a name."""
    return os.path.isdir(path)  # noqa: PTH112  Path's raises


def is_file(path: str | os.PathLike[str]) -> bool:
    """As ``Path.is_file``, but not raising, as :func:`is_folder`."""
    return os.path.isfile(path)  # noqa: PTH113  Path's raises


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success sync it and rename it to ``target``.

    The suffix of the temporary path is that of ``target``, since some writers choose the format by it. Where the
    block raises, the temporary file is removed and ``target`` is left as it was. A process killed in between
    leaves ``target`` whole and at most a hidden ``.NAME.*.partial*`` file beside it.

    Raises:
        OutputError: the disk is full, or the like.
        OSError: the folder cannot be created or written to.
    """
    target = Path(target)
    with told_of_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target) as temporary:
            yield temporary


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial{target.suffix}")
    # Made here, so that its mode is what the umask of the process and the folder give to a new file.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    try:
        yield temporary
        # A writer may have put a file of its own in the place of this one.
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; tensors are brought to the CPU, their dtype is kept."""
    # Copies, since the format refuses tensors that share memory.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = save(plain, metadata=dict(metadata))
    # Not by safetensors, which admits no names that are not UTF-8 and has errors of its own for a full disk.
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; no pickle is involved.

    The file is read as a whole: one that is mapped into memory would end the process where it is cut short meanwhile.

    Raises:
        DetectorFileError: the file is missing, truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise DetectorFileError(f"There is no file {path}. Check the path.")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES:
                raise DetectorFileError(f"{path} has {size / 2**30:.1f} GiB, which no file of this package has.")
            content = file.read(_MOST_BYTES)
        tensors = load(content)
        # Of what has been read, the header is known to be sound.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return {name: tensor.clone() for name, tensor in tensors.items()}, header.get("__metadata__") or {}
    except (SafetensorError, OSError, KeyError) as error:
        raise DetectorFileError(
            f"{path} is not a safetensors file, or it is damaged ({error}). Copy it again, or make it again."
        ) from error


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A ``.npy`` file of that shape, mapped into memory, whose place on the disk is taken at once.

    Otherwise, writing to the array would end the process without a word where the disk is full.

    Raises:
        OutputError: there is no room.
    """
    with told_of_disk(path):
        array = open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            try:
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                # Some file systems cannot; then it is as it would be without.
                if error.errno in _DISK_ERRORS:
                    path.unlink(missing_ok=True)
                    raise
        return array
