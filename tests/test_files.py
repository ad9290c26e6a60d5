"""Files are written whole or not at all, also where the writer is killed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientad_fast.errors import DetectorFileError, OutputError
from efficientad_fast.files import atomic_path, new_array, printable, read_tensors, write_tensors


def test_the_file_appears_at_the_end_of_the_block_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".html"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_exception_before_the_first_file_leaves_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), atomic_path(tmp_path / "model"):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_made(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model.safetensors"
    with atomic_path(os.fspath(target)) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("replaced", [False, True])
def test_permissions_are_those_that_the_umask_gives_a_new_file(tmp_path: Path, umask: int, replaced: bool) -> None:
    target = tmp_path / "model"
    before = os.umask(umask)
    try:
        with atomic_path(target) as temporary:
            if replaced:
                temporary.unlink()
                temporary.touch(mode=0o600)
            temporary.write_text("new")
    finally:
        assert os.umask(before) == umask
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(self: Path, other: Path) -> Path:
        happened.append("renamed")
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert happened == ["file", "renamed", "folder"]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_path(target) as first, atomic_path(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from efficientad_fast.files import atomic_path

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
target = folder / "model.bin"
versions = [bytes([digit]) * 40_000 for digit in b"AB"]
with atomic_path(target) as temporary:
    temporary.write_bytes(versions[0])

def save_for_ever():
    turn = 0
    while True:
        turn += 1
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            for start in range(0, 40_000, 4_000):
                file.write(versions[turn % 2][start:start + 4_000])
                file.flush()
                time.sleep(0.001)

moments = random.Random(0)
found = []
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        save_for_ever()
    time.sleep(moments.uniform(0.02, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    partial = [path for path in folder.iterdir() if path != target]
    found.append({"whole": target.read_bytes() in versions, "partial": len(partial)})
    for path in partial:
        path.unlink()
print(json.dumps(found))
"""


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "8"], capture_output=True, text=True, timeout=60, check=True
    )
    found = json.loads(run.stdout)
    assert len(found) == 8
    assert all(round["whole"] for round in found)
    # The kills did fall into saving, and left no more than the one file that was being written.
    assert any(round["partial"] for round in found)
    assert all(round["partial"] <= 1 for round in found)


def test_tensors_and_metadata_come_back_with_dtype_shape_and_bits(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    tensors = {
        "channels last": weight.contiguous(memory_format=torch.channels_last),
        "half": weight.half()[:, 1],
        "parameter": torch.nn.Parameter(weight.double()),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    write_tensors(path, tensors, {"text": "größer\n"})
    loaded, metadata = read_tensors(path)
    assert metadata == {"text": "größer\n"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].nan_to_num(7.0), tensor.detach().nan_to_num(7.0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_or_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(DetectorFileError, match=path.name):
            read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04" + b"pickle" * 40])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(DetectorFileError, match=r"other\.pth is not a safetensors file, or it is damaged"):
        read_tensors(path)


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_truncated_anywhere_is_refused(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    write_tensors(folder / "model.safetensors", {"a": torch.arange(20.0), "b": torch.ones(3, 3)}, {"step": "1"})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DetectorFileError, match="damaged"):
        read_tensors(folder / "model.safetensors")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if shutil.which("mount") is None or (made := subprocess.run(mount, capture_output=True, text=True)).returncode:
        reason = "there is no mount command" if shutil.which("mount") is None else made.stderr.strip()
        pytest.skip(f"no file system can be mounted here: {reason}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_in_a_sentence_and_leaves_what_was_there(full_disk: Path) -> None:
    path = full_disk / "model.safetensors"
    small = {"a": torch.zeros(10)}
    write_tensors(path, small, {"version": "1"})
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"model\.safetensors could not be written: No space left.*as it was; make"):
        write_tensors(path, {"a": torch.zeros(2**20)}, {"version": "2"})
    with pytest.raises(OutputError, match="No space left"), atomic_path(path) as temporary:
        temporary.write_bytes(bytes(2**21))
    assert path.read_bytes() == before
    assert [one.name for one in full_disk.iterdir()] == ["model.safetensors"]
    with pytest.raises(OutputError, match=r"features\.npy could not be written: No space left"):
        new_array(full_disk / "features.npy", np.float16, (1000, 1000))
    assert [one.name for one in full_disk.iterdir()] == ["model.safetensors"]
    new_array(full_disk / "features.npy", np.float16, (100, 1000))[:] = 1
    assert (np.load(full_disk / "features.npy") == 1).all()
    # The place of an array that has not been written to is taken all the same.
    new_array(full_disk / "zeros.npy", np.float16, (300, 1000))
    with pytest.raises(OutputError):
        write_tensors(full_disk / "other", {"a": torch.zeros(75_000)}, {})


LIMITED = """
import resource, sys
import torch
from efficientad_fast.files import write_tensors

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_tensors(sys.argv[1], {"a": torch.zeros(100_000)}, {})
except OSError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("old")
    run = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, timeout=60, check=True)
    assert "model could not be written: File too large" in run.stdout
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_other_errors_of_what_writes_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "model"):
        (tmp_path / "missing").read_bytes()


@pytest.mark.parametrize("name", ["\udcff.safetensors", "a\nb.safetensors", "ä"])
def test_tensors_go_to_files_of_any_name(tmp_path: Path, name: str) -> None:
    write_tensors(tmp_path / name, {"a": torch.arange(3)}, {"b": "c"})
    tensors, metadata = read_tensors(tmp_path / name)
    assert tensors["a"].tolist() == [0, 1, 2] and metadata == {"b": "c"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_larger_than_any_of_ours_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DetectorFileError, match=r"model\.safetensors has 1024\.0 GiB, which no file"):
        read_tensors(path)


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=12), st.text(max_size=12))
def test_names_are_printable_and_stay_apart(first: str, second: str) -> None:
    assert printable(first).isprintable()
    printable(first).encode("utf-8")
    assert (printable(first) == printable(second)) == (first == second)
