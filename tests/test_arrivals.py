"""data/arrivals.py and `predict --follow`: each file once, when nobody writes to it any more."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientad_fast.data import arrivals as module
from efficientad_fast.data.arrivals import Arrival, Arrivals, FileVersion, file_version
from efficientad_fast.errors import DatasetError, InputError
from tests.small_detector import small_detector

watchfiles = pytest.importorskip("watchfiles", reason="following a folder needs watchfiles")

ROOT = Path(__file__).resolve().parents[1]
SETTLE = 0.2


def next_ready(found: Iterator[list[Arrival]], seconds: float = 20.0) -> list[Arrival]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ready := next(found):
            return ready
    return []


def names(ready: list[Arrival]) -> list[str]:
    return [arrival.path.name for arrival in ready]


def test_files_that_are_there_come_first_by_time(tmp_path: Path) -> None:
    for index, name in enumerate(["b.png", "sub/c.jpg", "a.png", "notes.txt", ".hidden.png", ".git/d.png"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, ns=(index, index))
    found = iter(Arrivals(tmp_path, settle=SETTLE))
    ready = next_ready(found)
    assert names(ready) == ["b.png", "c.jpg", "a.png"]
    assert ready[1] == Arrival(tmp_path / "sub" / "c.jpg", FileVersion(1, 1))


@pytest.mark.parametrize("form", ["absolute", "relative", "link"])
def test_files_arrive_under_the_names_of_a_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_SCAN_SECONDS", 1000.0)
    folder = {"absolute": tmp_path / "in", "relative": Path("in"), "link": Path("link")}[form]
    arrivals = Arrivals(folder, settle=SETTLE)
    found = iter(arrivals)
    assert next(found) == []
    for name in ("a.png", "sub/b.png", ".sub/c.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    seen: list[Path] = []
    while len(seen) < 2:
        ready = next_ready(found)
        assert ready, f"only {seen}"
        seen.extend(arrival.path for arrival in ready)
    assert sorted(seen) == [folder / "a.png", folder / "sub" / "b.png"]


def test_a_file_is_ready_once_it_stays_as_it_is(tmp_path: Path) -> None:
    found = iter(Arrivals(tmp_path, settle=0.6))
    assert next(found) == []
    path = tmp_path / "slow.png"
    last = 0.0
    with path.open("wb") as file:
        for _ in range(6):
            file.write(b"x" * 100)
            file.flush()
            last = time.monotonic()
            while time.monotonic() < last + 0.15:
                assert next(found) == []
    (arrival,) = next_ready(found)
    assert arrival.version.size == 600 and time.monotonic() - last >= 0.6


def test_each_version_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    arrivals = Arrivals(tmp_path, settle=SETTLE)
    found = iter(arrivals)
    (arrival,) = next_ready(found)
    arrivals.done(arrival)
    path.touch()
    path.write_bytes(b"xy")
    (second,) = next_ready(found)
    assert second.path == path and second.version != arrival.version
    arrivals.done(second)
    arrivals._next_scan = 0
    assert next_ready(found, 3 * SETTLE) == []


def test_what_cannot_be_read_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    arrivals = Arrivals(tmp_path, settle=SETTLE, patience=3 * SETTLE)
    found = iter(arrivals)
    (first,) = next_ready(found)
    assert arrivals.may_be_unfinished(first)
    arrivals.again(first)
    (second,) = next_ready(found)
    assert second == first
    time.sleep(3 * SETTLE)
    assert not arrivals.may_be_unfinished(second)
    path.write_bytes(b"xy")
    arrivals.again(second)
    (third,) = next_ready(found)
    assert third.version.size == 2


def test_what_is_ignored_and_what_has_gone_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    asked: list[str] = []

    def ignored(path: Path, version: FileVersion) -> bool:
        assert version == file_version(path)
        asked.append(path.name)
        return path.name == "a.png"

    arrivals = Arrivals(tmp_path, ignored, settle=1.0)
    found = iter(arrivals)
    assert next(found) == []
    (tmp_path / "b.png").unlink()
    arrivals._next_scan = 0
    assert names(next_ready(found)) == ["c.png"]
    assert sorted(asked) == ["a.png", "b.png", "c.png"]


def test_many_files_come_in_lists_of_bounded_length(tmp_path: Path) -> None:
    for index in range(25):
        (tmp_path / f"{index:02d}.png").write_bytes(b"x")
    found = iter(Arrivals(tmp_path, settle=SETTLE, most=10))
    assert [len(next_ready(found)) for _ in range(3)] == [10, 10, 5]


def test_without_events_looking_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(watchfiles, "watch", none_left)
    found = iter(Arrivals(tmp_path, settle=SETTLE))
    assert next(found) == []
    (tmp_path / "a.png").write_bytes(b"x")
    assert names(next_ready(found)) == ["a.png"]


def test_names_that_events_cannot_tell_are_found_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCAN_SECONDS", 0.3)
    found = iter(Arrivals(tmp_path, settle=SETTLE))
    assert next(found) == []
    (tmp_path / "\udcff.png").write_bytes(b"x")
    assert names(next_ready(found)) == ["\udcff.png"]


def test_a_folder_that_is_none_or_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        Arrivals(tmp_path / "missing")
    monkeypatch.setattr(module, "_SCAN_SECONDS", 0.1)
    folder = tmp_path / "in"
    folder.mkdir()
    found = iter(Arrivals(folder))
    assert next(found) == []
    folder.rmdir()
    with pytest.raises(DatasetError, match="no such folder"):
        next_ready(found)


def test_without_watchfiles_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(InputError, match="pip install watchfiles"):
        Arrivals(tmp_path)


# The command


class Following:
    """`efficientad-fast predict --follow` in another process."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-c", "from efficientad_fast.cli import main; main()", "predict", *arguments]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self.told: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.told))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(pipe: Any, lines: list[str]) -> None:
        for line in pipe:
            lines.append(line)

    def wait(self, condition: Callable[[], object], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, (self.lines, self.told)
            time.sleep(0.05)

    def end(self, by: int = signal.SIGINT) -> int:
        self.process.send_signal(by)
        code = self.process.wait(timeout=60)
        for thread in self._threads:
            thread.join()
        return code


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def paths(folder: Path) -> set[str]:
    """A file that took long to come may have a row as it was before."""
    return {row["path"] for row in table(folder)}


def test_following_a_folder(tmp_path: Path) -> None:
    model = small_detector().save(tmp_path / "model.safetensors")
    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def image(name: str) -> Path:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "new.png")
        return (tmp_path / "new.png").rename(folder / name)

    image("0.png")
    following = Following(model, "--follow", folder, "--out", out)
    following.wait(lambda: len(following.lines) == 1)
    # One comes whole, one in parts, and one never ends.
    image("1.png")
    whole = image(".2").read_bytes()
    (folder / ".2").unlink()
    with (folder / "2.png").open("wb") as file:
        # The last part is no small one: without a few bytes at its end, a PNG file is read.
        part = -(-len(whole) // 4)
        for start in range(0, len(whole), part):
            file.write(whole[start : start + part])
            file.flush()
            time.sleep(0.7)
    (folder / "cut.png").write_bytes(whole[:100])
    following.wait(lambda: any("cut.png: truncated" in line for line in following.told))
    following.wait(lambda: len(paths(out)) == 4)
    assert following.end() == 1
    assert "stopped; 3 images were predicted" in "".join(following.told)
    assert "Traceback" not in "".join(following.told)
    assert sorted(line.split("\t")[2].strip() for line in following.lines) == [
        str(folder / f"{number}.png") for number in range(3)
    ]
    assert sorted(Path(row["path"]).name for row in table(out) if not row["error"]) == ["0.png", "1.png", "2.png"]

    # A restart that is ended at once leaves the failure as it is. A folder that arrives is none.
    following = Following(model, "--follow", folder, "--out", out)
    following.wait(lambda: any("following" in line for line in following.told))
    (folder / "folder.png").mkdir()
    time.sleep(1)
    following.end()
    assert [Path(row["path"]).name for row in table(out) if row["error"]] == ["cut.png"]

    # A restart does what is new, and what had failed.
    (folder / "cut.png").write_bytes(whole)
    image("3.png")
    following = Following(model, "--follow", folder, "--out", out)
    following.wait(lambda: len(following.lines) == 2)
    following.wait(lambda: len(paths(out)) == 5 and not any(row["error"] for row in table(out)))
    assert following.end(signal.SIGTERM) == 0
    rows = [Path(row["path"]).name for row in table(out)]
    assert sorted(rows) == ["0.png", "1.png", "2.png", "3.png", "cut.png"]
    assert not any(row["error"] for row in table(out))
    assert len(list(out.glob("*.png"))) == 5
