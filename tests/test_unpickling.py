"""Files of ``torch.save`` from somebody who means harm: nothing runs, nothing is imported, grows or hangs."""

from __future__ import annotations

import builtins
import bz2
import copyreg
import functools
import io
import operator
import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib_networks import EfficientAdModel, checkpoint, with_numbers
from fork_networks import pdn_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficientad_fast import Detector
from efficientad_fast.errors import DetectorFileError, InputError
from efficientad_fast.interop import anomalib, reading, unpickling
from efficientad_fast.interop.reading import TensorRecord, open_torch_file
from efficientad_fast.interop.unpickling import Name, Record, read_pickle
from efficientad_fast.weights import load_teacher

MOST_BYTES = 64 * 2**20
"""That reading a hostile file of a few kilobytes may take."""

MOST_SECONDS = 20.0


@contextmanager
def harmless(folder: Path) -> Iterator[None]:
    """Nothing in the folder and nothing imported afterwards that was not there before; little memory, little time."""
    before = (sorted(folder.rglob("*")), dict(os.environ), Path.cwd())
    modules = set(sys.modules)
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (sorted(folder.rglob("*")), dict(os.environ), Path.cwd()) == before
        # What reading itself takes, on its first use.
        ours = ("efficientad_fast.", "encodings.", "torch.")
        assert not {name for name in set(sys.modules) - modules if not name.startswith(ours)}
        assert peak < MOST_BYTES, f"{peak} bytes"
        assert time.monotonic() - began < MOST_SECONDS


class Call:
    """Pickles as a call of a function, which unpickling makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self._how = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._how


Payload = Callable[[Path], Any]


def _nested(marker: Path) -> Any:
    """A call whose function is what a call returns, inside containers."""
    touch = Call(operator.methodcaller, "touch")
    return OrderedDict(a=[(1, {"b": {Call(os.system, f"touch {marker}")}})], c=Call(functools.partial, touch, marker))


def _state_dict(marker: Path) -> Any:
    """A state dict that is right but for one value."""
    return pdn_small(6).state_dict() | {"0.weight": Call(os.system, f"touch {marker}")}


def _sequential(marker: Path) -> Any:
    """A network that is right but for one layer's setting, and with a hook."""
    network = pdn_small(6)
    network[0].stride = Call(os.system, f"touch {marker}")
    network[3].weight._backward_hooks = OrderedDict({1: Call(os.system, f"touch {marker}")})
    return network


PAYLOADS: dict[str, Payload] = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "builtins.eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w').close()"),
    "builtins.exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w').close()"),
    "builtins.open": lambda marker: Call(open, str(marker), "w"),
    "getattr": lambda marker: Call(getattr(builtins, "eval"), f"__import__('pathlib').Path({str(marker)!r}).touch()"),  # noqa: B009
    "subprocess.run": lambda marker: Call(subprocess.run, ["touch", str(marker)]),
    "map": lambda marker: Call(list, Call(map, os.system, [f"touch {marker}"])),
    "nested": _nested,
    "in a state dict": _state_dict,
    "in a Sequential": _sequential,
    "as a key": lambda marker: {Call(os.system, f"touch {marker}"): 1},
    "setstate": lambda marker: Call(OrderedDict, state={"x": Call(os.system, f"touch {marker}")}),
    "torch's own unpickling": lambda marker: Call(
        torch.load, io.BytesIO(pickled_by_torch(Call(os.system, f"touch {marker}"))), None, None
    ),
    "pickle in pickle": lambda marker: Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {marker}"))),
    "rebuilt as a parameter": lambda marker: Call(
        torch._utils._rebuild_parameter, Call(os.system, f"touch {marker}"), True, OrderedDict()
    ),
    "rebuilt from a type": lambda marker: Call(
        torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {marker}",), {}
    ),
}


def pickled_by_torch(payload: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file, **options)
    return file.getvalue()


def _zip_of(data: bytes, **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **entries}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def _tar_of(payload: Any) -> bytes:
    """As PyTorch before 0.2 wrote: four pickles in a tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(payload, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


CONTAINERS: dict[str, Callable[[Any], bytes]] = {
    "zip": pickled_by_torch,
    "zip, protocol 5": lambda payload: pickled_by_torch(payload, pickle_protocol=5),
    "stream": lambda payload: pickled_by_torch(payload, _use_new_zipfile_serialization=False),
    "stream, protocol 4": lambda payload: pickled_by_torch(
        payload, _use_new_zipfile_serialization=False, pickle_protocol=4
    ),
    "pickle": lambda payload: pickle.dumps(payload, 2),
    "pickle, protocol 0, in a zip": lambda payload: _zip_of(pickle.dumps(payload, 0)),
    "tar": _tar_of,
}

SAVING_FAILS = (AttributeError, TypeError, pickle.PicklingError)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_that_a_file_asks_for_is_called(tmp_path: Path, payload: str, container: str) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "model.pth"
    try:
        path.write_bytes(CONTAINERS[container](PAYLOADS[payload](marker)))
    except SAVING_FAILS as error:
        pytest.skip(f"cannot be written so: {error}")
    assert not marker.exists()
    with harmless(tmp_path):
        with pytest.raises(DetectorFileError):
            Detector.load(path)
        with pytest.raises(DetectorFileError):
            load_teacher(path)
        with suppress(DetectorFileError), open_torch_file(path) as file:
            repr(file.value)
    assert not marker.exists()


@pytest.mark.parametrize("payload", ["os.system", "builtins.eval", "nested", "in a Sequential"])
def test_the_same_files_do_harm_where_pickles_are_executed(tmp_path: Path, payload: str) -> None:
    """Else the tests above would show nothing."""
    marker = tmp_path / "marker"
    content = pickled_by_torch(PAYLOADS[payload](marker))
    with suppress(Exception):
        torch.load(io.BytesIO(content), weights_only=False)
    assert marker.exists()


def test_nothing_that_a_file_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "poisoned.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (
        b"cpoisoned\nThing\n.",
        b"cpoisoned\nThing\n)\x81.",
        b"(ipoisoned\nThing\n.",
        b"cpoisoned\nThing\n)R.",
    ):
        path = tmp_path / "model.pth"
        path.write_bytes(_zip_of(name))
        with harmless(tmp_path), open_torch_file(path) as file:
            assert "poisoned" in repr(file.value)
        assert "poisoned" not in sys.modules


def test_registered_extensions_are_not_looked_up(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")  # which fills a cache that unpicklers ask before anything else
        command = f"touch {tmp_path / 'marker'}"
        data = b"\x80\x02\x82\xf0X" + struct.pack("<I", len(command)) + command.encode() + b"\x85R."
        path = tmp_path / "model.pth"
        path.write_bytes(_zip_of(data))
        with harmless(tmp_path), open_torch_file(path) as file:
            assert file.value.made_by == Name("copyreg", "extension 240")
    finally:
        copyreg.remove_extension("os", "system", 240)


def _read(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data), "data", reading._REBUILD, reading._persistent)


def test_plain_data_is_what_pickle_makes_of_it() -> None:
    plain = {"a": [1, 2.5, None, True, -(2**70)], "b": (b"c", "d", ()), 3: {"e": [[]]}, None: 10**30}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if protocol >= 3:  # before, bytes are made by calling a function
            assert _read(pickle.dumps(plain, protocol)) == plain
        simple = {"a": [1, 2.5, None, True, -(2**70)], "e": ([[]], ())}
        assert _read(pickle.dumps(simple, protocol)) == simple


def test_entries_whose_keys_take_time_to_hash_are_left_out() -> None:
    assert _read(pickle.dumps({"a": 1, (1, 2): 2, 2**60: 3, 1.5: 4, float("nan"): 5}, 2)) == {"a": 1, 1.5: 4}


def test_objects_are_records_of_how_they_would_have_been_made() -> None:
    read = _read(pickle.dumps(Path("a/b"), 2))
    assert isinstance(read, Record) and read.kind in ("PosixPath", "Path", "WindowsPath")
    ordered = OrderedDict(a=1)
    ordered._metadata = 3  # type: ignore[attr-defined]
    assert _read(pickle.dumps(ordered, 2)) == {"a": 1}
    assert _read(pickle.dumps({1, 2}, 4)) == [1, 2]


# Growth and time


def _number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _keys_of_one_hash(count: int, form: Callable[[int], bytes]) -> bytes:
    """Python hashes whole numbers by their remainder of this prime."""
    return b"\x80\x02}(" + b"".join(form(index * (2**61 - 1)) for index in range(1, count)) + b"u."


_DOUBLED = b"2\x86" * 60
"""Makes of a tuple one of twice the same tuple of twice the same ..."""

BOMBS: dict[str, bytes] = {
    "a module whose name takes forever to write": b"\x80\x02)" + _DOUBLED + b"X\x01\0\0\0a\x93.",
    "a name that takes forever to write": b"\x80\x02X\x01\0\0\0a)" + _DOUBLED + b"\x93.",
    "a function that takes forever to hash": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n()"
    + _DOUBLED
    + b"N)NtR.",
    "the same arguments of many calls": b"\x80\x04("
    + b"N" * 30_000
    + b"tq\x01cos\nsystem\nq\x020"
    + b"h\x02h\x01N\x92" * 30_000
    + b".",
    "a key that takes forever to hash": b"\x80\x02})" + _DOUBLED + b"K\x01s.",
    "keys of one hash": _keys_of_one_hash(100_000, lambda key: _number(key) + b"N"),
    "places in the memo of one hash": b"\x80\x02N"
    + b"".join(b"p%d\n" % (index * (2**61 - 1)) for index in range(100_000))
    + b".",
    "a persistent id that is too deep to show": b"\x80\x02" + b"(" + b"]" * 100_000 + b"a" * 99_999 + b"NNNNtQ.",
    "a key that is too deep to show": b"\x80\x02}cos\nsystem\n" + b")R" * 100_000 + b"Ns.",
    "a place in the memo that is far away": b"\x80\x02K\x01r\xff\xff\xff\x7fj\xff\xff\xff\x7f.",
    "lists in lists in lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "tuples in tuples in tuples": b"\x80\x02K\x01" + b"\x85" * 300_000 + b".",
    "a text that is not there": b"\x80\x02X\xff\xff\xff\x7f.",
    "8 exabytes that are not there": b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f" + b".",
    "a frame that is not there": b"\x80\x05\x95" + b"\xff" * 7 + b"\x7f" + b"K\x01.",
    "a number of a million digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "more instructions than any checkpoint": b"\x80\x02" + b"N0" * (unpickling.MOST_INSTRUCTIONS // 2 + 9) + b"N.",
    "no end": b"\x80\x02" + b"N" * 1000,
    "nothing": b"",
    "marks alone": b"\x80\x02" + b"(" * 1000 + b".",
    "pops of nothing": b"\x80\x020000.",
    "a call that is called that is called": b"\x80\x02cos\nsystem\n" + b")R" * 100_000 + b".",
    "out of band": b"\x80\x05\x97\x98.",
}


def _peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_grow_or_never_end_are_read_or_refused_at_once(
    tmp_path: Path, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time is of the real limit a test's worth, and tracing memory takes ten times as long.
    monkeypatch.setattr(unpickling, "MOST_INSTRUCTIONS", 650_000)
    path = tmp_path / "model.pth"
    path.write_bytes(_zip_of(BOMBS[bomb]))
    began, peak = time.monotonic(), _peak_bytes()
    with pytest.raises(DetectorFileError):
        Detector.load(path)
    assert time.monotonic() - began < MOST_SECONDS
    assert _peak_bytes() - peak < 2**30


def test_a_pickle_of_more_bytes_than_any_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling, "MOST_BYTES", 1000)
    path = tmp_path / "model.pth"
    path.write_bytes(pickled_by_torch({"a": "b" * 2000}))
    with pytest.raises(DetectorFileError, match="more than 1000 bytes"):
        Detector.load(path)


# Containers


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * (200 * 2**20) + b"N.")
    assert path.stat().st_size < 2**20
    with harmless(tmp_path), pytest.raises(DetectorFileError, match="compressed, or larger"):
        Detector.load(path)


def _long_name(size: bytes, kind: bytes = b"L") -> bytes:
    """A header of a tar file that declares so long a name."""
    header = tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)
    header = header[:124] + size.ljust(12, b"\0") + b" " * 8 + kind + header[157:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


TARS: dict[str, bytes] = {
    "compressed": bz2.compress(_long_name(b"7000000000") + bytes(2**27)),
    "headers of headers": _long_name(b"0", b"x") * 5000,
    "less than nothing": _long_name(b"\xff" * 11 + b"\0") + bytes(2**12),
}


@pytest.mark.parametrize("name", TARS)
def test_tar_files_are_not_looked_into(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(TARS[name])
    with harmless(tmp_path), pytest.raises(DetectorFileError, match=r"PyTorch before 0\.2|not written by torch\.save"):
        Detector.load(path)


def test_errors_do_not_repeat_what_steers_a_terminal_or_is_long(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"\x1b[31mred\x07": 1}, path)
    with pytest.raises(DetectorFileError, match=r"\\x1b\[31mred\\x07"):
        Detector.load(path)
    path.write_bytes(_zip_of(b"N.", byteorder=b"\x1b" * 2**20))
    with pytest.raises(DetectorFileError, match="endian") as caught:
        Detector.load(path)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_tensor_whose_numbers_are_compressed_is_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "model.pth", tmp_path / "packed.pth"
    torch.save(pdn_small(6).state_dict() | {"0.weight": torch.zeros(128, 3, 4, 4)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            kind = zipfile.ZIP_DEFLATED if "/data/" in entry.filename else zipfile.ZIP_STORED
            other.writestr(entry.filename, archive.read(entry), kind)
    with harmless(tmp_path), pytest.raises(DetectorFileError, match="compressed, or larger"):
        load_teacher(packed)


def test_a_table_of_contents_that_is_larger_than_a_checkpoint_s_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(_zip_of(b"N.", **{f"data/{index}": b"" for index in range(3000)}))
    monkeypatch.setattr(reading, "_MOST_AT_ONCE", 2**16)
    with pytest.raises(DetectorFileError, match="damaged"):
        Detector.load(path)


def test_numbers_that_are_counted_twice_are_refused(tmp_path: Path) -> None:
    """Entries that lie over each other, so that a small file declares a large sum."""
    path = tmp_path / "model.pth"
    torch.save({str(index): torch.full((1000,), float(index)) for index in range(50)}, path)
    content = bytearray(path.read_bytes())
    first = None
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                first = entry.header_offset if first is None else first
                # In the table of contents, the place of the entry stands 4 bytes before its name.
                at = content.rfind(entry.filename.encode())
                content[at - 4 : at] = struct.pack("<I", first)
    path.write_bytes(content)
    with open_torch_file(path) as file, pytest.raises(DetectorFileError, match=r"damaged|larger than the file"):
        for record in file.value.values():
            file.tensor(record)


@pytest.mark.parametrize("zipped", [True, False])
def test_many_tensors_of_the_same_numbers_are_refused(tmp_path: Path, zipped: bool) -> None:
    """Each would be read into memory of its own."""
    path = tmp_path / "model.pth"
    numbers = torch.ones(10_000)
    torch.save({str(index): numbers for index in range(50)}, path, _use_new_zipfile_serialization=zipped)
    with open_torch_file(path) as file, pytest.raises(DetectorFileError, match="too many tensors"):
        for record in file.value.values():
            file.tensor(record)


def _tensor_pickle(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A state dict of one tensor with what it says of itself given."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, one: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(one, Storage) else None

    file = io.BytesIO()
    tensor = Call(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, OrderedDict())
    # The class is local, so that nothing of it is pickled: its object is a persistent id.
    Pickler(file, 2).dump({"0.weight": tensor})
    return file.getvalue()


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (2**50, 0, (2**50,), (1,)),
        (4, 0, (2**50,), (1,)),
        (4, 0, (2**31, 2**31), (0, 0)),
        (4, 0, (1000, 1000, 1000), (0, 0, 1)),
        (4, 0, (4, 4), (0, 1)),
        (4, 0, (2, 3), (1, 1)),
        (4, 3, (2,), (1,)),
        (4, -1, (2,), (1,)),
        (4, 0, (2, 2), (-2, 1)),
        (4, 0, (-2, 2), (2, 1)),
        (4, 0, (2,), (2**62,)),
        (4, 0, (2, 2), (2,)),
        (4, 0, (0, 2**62), (1, 1)),
        (4, 0, (1,) * 9, (1,) * 9),
        (8, 0, (8,), (1,)),
        (4, 0, (10**5000,), (1,)),
        (10**5000, 0, (4,), (1,)),
        (4, 0, (1,) * 100_000, (1,) * 100_000),
        (-4, 0, (4,), (1,)),
        (True, 0, (1,), (1,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_shapes_that_the_file_has_no_numbers_for_are_refused(
    tmp_path: Path, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(_zip_of(_tensor_pickle(numel, offset, size, stride), **{"data/0": bytes(16)}))
    with harmless(tmp_path), pytest.raises(DetectorFileError), open_torch_file(path) as file:
        file.tensor(file.value["0.weight"])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4),
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(24.0)[5:9],
        torch.arange(24.0)[::3],
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.arange(5),
        torch.ones(3, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.ones(2, 2)),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_that_torch_loads(tmp_path: Path, tensor: torch.Tensor, zipped: bool) -> None:
    path = tmp_path / "model.pth"
    torch.save([tensor, tensor], path, _use_new_zipfile_serialization=zipped)
    with open_torch_file(path) as file:
        for record in file.value:
            assert isinstance(record, TensorRecord)
            read = file.tensor(record)
            assert read.dtype == tensor.dtype and read.is_contiguous() and torch.equal(read, tensor.data)


def test_expanded_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(torch.ones(1).expand(10**6, 10**6), path)
    with harmless(tmp_path), open_torch_file(path) as file, pytest.raises(DetectorFileError, match="not laid out"):
        file.tensor(file.value)


def test_programs_and_big_endian_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(_zip_of(b"N.", **{"constants.pkl": b"N."}))
    with pytest.raises(DetectorFileError, match="TorchScript"):
        Detector.load(path)
    path.write_bytes(_zip_of(b"N.", byteorder=b"big"))
    with pytest.raises(DetectorFileError, match="big-endian"):
        Detector.load(path)
    path.write_bytes(_zip_of(b"N.")[:-30])
    with pytest.raises(DetectorFileError, match="damaged"):
        Detector.load(path)
    path.write_bytes(_tar_of({}))
    with pytest.raises(DetectorFileError, match=r"before 0\.2"):
        Detector.load(path)
    path.write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    with pytest.raises(DetectorFileError, match=r"not written by torch\.save"):
        Detector.load(path)


@pytest.fixture(scope="module")
def whole_files() -> dict[str, bytes]:
    network = pdn_small(6)
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 4), torch.nn.ReLU())
    return {
        "zip": pickled_by_torch(small),
        "stream": pickled_by_torch(small, _use_new_zipfile_serialization=False),
        "state dict": pickled_by_torch(network.state_dict()),
    }


@pytest.mark.parametrize("kind", ["zip", "stream", "state dict"])
def test_files_that_end_early_are_refused(tmp_path: Path, whole_files: dict[str, bytes], kind: str) -> None:
    content = whole_files[kind]
    path = tmp_path / "model.pth"
    for cut in sorted({0, 1, 3, 4, 5, *range(0, len(content), max(len(content) // 60, 1)), len(content) - 1}):
        path.write_bytes(content[:cut])
        with pytest.raises(DetectorFileError):
            load_teacher(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_refused_or_read(tmp_path: Path, whole_files: dict[str, bytes], data: st.DataObject) -> None:
    content = bytearray(whole_files[data.draw(st.sampled_from(["zip", "stream"]))])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(DetectorFileError):
        load_teacher(path)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": "a" * 1_000_000},
        {"groups": 0},
        {"groups": 10**5000},
        {"padding": 10**5000},
        {"padding": (1,) * 100_000},
        {"padding": {"deep": []}},
        {"padding_mode": "a" * 100_000},
        {"stride": None},
        {"_parameters": None},
        {"_parameters": {"weight": 3}},
        {"dilation": "one"},
    ],
    ids=lambda change: f"{next(iter(change))} {type(next(iter(change.values())))!s}",
)
def test_settings_that_no_layer_has_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    network = pdn_small(6)
    network[3].__dict__.update(change)
    path = tmp_path / "model.pth"
    torch.save(network, path)
    with harmless(tmp_path), pytest.raises(DetectorFileError) as caught:
        load_teacher(path)
    assert len(str(caught.value)) < 1000


def test_more_layers_than_a_network_has_are_not_made(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(3000))), path)
    with harmless(tmp_path), pytest.raises(DetectorFileError, match="no network"):
        load_teacher(path)


_ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(3000, 4000).map(lambda digits: 10**digits),
        st.floats(),
        st.text(max_size=3),
        st.just("x" * 100_000),
        st.builds(lambda: Record(Name("os", "system"), ("touch",))),
        st.builds(lambda: TensorRecord(reading.StorageRecord("0", None, 3), 0, (3,), (1,))),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = with_numbers(checkpoint(EfficientAdModel(2)), _image_threshold=1.5, image_min=1.0, image_max=2.0)
    path = tmp_path_factory.mktemp("calibrated") / "model.ckpt"
    torch.save(content, path)
    return path


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_checkpoints_that_say_odd_things_are_refused_or_read(calibrated: Path, data: st.DataObject) -> None:
    with open_torch_file(calibrated) as file:
        place = file.value
        # Somewhere in what is not a weight.
        names = [name for name in place if name != "state_dict"]
        name = data.draw(st.sampled_from(names))
        while isinstance(place[name], dict | list) and place[name] and data.draw(st.booleans()):
            place = place[name]
            name = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        place[name] = data.draw(_ODD)
        state = anomalib.state_of(file)
        assert state is not None
        with suppress(DetectorFileError, InputError):
            parts = anomalib.read_parts(file, state, None, padding=None, pad_maps=None)
            assert all(len(note) < 1000 for note in parts.notes)


_INSTRUCTIONS = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(_INSTRUCTIONS),
            st.sampled_from(
                [b"cos\nsystem\n", b"K\x01", b"X\x02\x00\x00\x00ab", b"ccollections\nOrderedDict\n", b"\x8c\x01a"]
            ),
            st.binary(max_size=4),
        ),
        max_size=40,
    )
)
def test_whatever_the_instructions_only_records_come_of_them(parts: list[bytes]) -> None:
    with suppress(DetectorFileError):
        repr(_read(b"\x80\x05" + b"".join(parts) + b"."))
