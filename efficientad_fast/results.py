"""What predictions leave in a folder: a row for each image, and overlays. A later run goes on there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from efficientad_fast.data.arrivals import FileVersion
from efficientad_fast.detector import Prediction
from efficientad_fast.errors import ImageError, InputError
from efficientad_fast.files import atomic_path, printable, sync_folder, told_of_disk

FIELDS = ("path", "score", "anomalous", "error", "note", "overlay", "bytes", "modified")
"""Columns of the table: ``bytes`` and ``modified`` (nanoseconds since 1970) are the file's when it was predicted."""

_TABLE = "predictions.csv"
_DESCRIPTION = "predictions.json"
_FORMAT = "efficientad_fast predictions 1"

_SYNC_SECONDS = 1.0
_OVERLAY = re.compile(r"(\d{5,})_[^/]*\.png")
_LONGEST_STEM = 100
"""Bytes of a file's name in that of its overlay; a file system takes 255 in all."""

_ADVICE = "Give another folder, or --restart to drop them."


Draw = Callable[[Path, Prediction], object]


class Results:
    """The table ``predictions.csv`` and the overlays of a folder.

    A row is added by one write at the end of the file, so that a process killed at any moment leaves whole rows, and
    reaches the disk within about a second. Where one of them cannot be written, the table is as it was before it, and
    it is tried again with the next, and at the end. A row says that its overlay is there: that is written first, to a
    name of its own.

    Used in ``with``, by one process at a time. Not safe to call from several threads.

    Args:
        folder: made where it is missing.
        run: what a later run must share to go on: the detector, how images are read; anything JSON holds.
        draw: makes the overlay of a prediction at the path that it is called with; called in other threads.
        restart: drop what is there.
        most: overlays that are being drawn at a time.

    Raises:
        InputError: the folder holds the predictions of another run, or another process writes to it.
        OutputError: the disk is full, or the like. OSError: it cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        *,
        draw: Draw | None = None,
        restart: bool = False,
        most: int = 2,
    ) -> None:
        self._folder, self._table, self._draw, self._most = folder, folder / _TABLE, draw, most
        self._done: set[tuple[str, FileVersion]] = set()
        self._unfinished: set[str] = set()
        self._waiting: deque[tuple[dict[str, Any], Future[str] | None]] = deque()
        self._next = 0
        with told_of_disk(self._table), contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise InputError(f"{folder} is a file, or in one; predictions need a folder. Give another.") from error
            stack.enter_context(_only_one(folder))
            _prepare(folder, json.loads(json.dumps(dict(run))), restart=restart)
            for row in _rows(self._table):
                self._look_at(row)
            self._file = os.open(self._table, os.O_WRONLY | os.O_APPEND)
            stack.callback(lambda: os.close(self._file))
            self._unsynced, self._synced = False, time.monotonic()
            self._pool = stack.enter_context(ThreadPoolExecutor(min(2, os.cpu_count() or 1)))
            self._stack = stack.pop_all()

    def _look_at(self, row: Mapping[str, str]) -> None:
        version = self._finished(row)
        if version is None:
            self._unfinished.add(row["path"])
        else:
            self._done.add((row["path"], version))
        number = _OVERLAY.fullmatch(row["overlay"])
        self._next = max(self._next + 1, int(number[1]) + 1 if number else 0)

    def _finished(self, row: Mapping[str, str]) -> FileVersion | None:
        """The version of the row's file, if there is nothing left to do for it."""
        if row["error"] or not (row["bytes"].isdecimal() and row["modified"].lstrip("-").isdecimal()):
            return None
        has_overlay = _OVERLAY.fullmatch(row["overlay"]) and (self._folder / row["overlay"]).is_file()
        if self._draw is not None and not has_overlay:
            return None
        return FileVersion(int(row["bytes"]), int(row["modified"]))

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            # What has been predicted is not lost, whatever ended it.
            try:
                self.write(0)
            finally:
                with told_of_disk(self._table):
                    os.fsync(self._file)

    def is_done(self, path: str | os.PathLike[str], version: FileVersion | None) -> bool:
        """Whether the table had the file, in this version and without an error, when it was opened."""
        return version is not None and (printable(os.fspath(path)), version) in self._done

    def is_overlay(self, path: Path) -> bool:
        """Whether the file is one of this folder's overlays, which may lie among images."""
        return _OVERLAY.fullmatch(path.name) is not None and path.parent.resolve() == self._folder.resolve()

    def forget(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Drop the rows of these files that have an error, or lack their overlays: they are to be predicted again."""
        again = self._unfinished.intersection(printable(os.fspath(path)) for path in paths)
        if not again:
            return
        with atomic_path(self._table) as temporary, temporary.open("wb") as file:
            file.write(_HEADER)
            for row in _rows(self._table):
                if row["path"] not in again or self._finished(row) is not None:
                    file.write(_line(row))
        self._unfinished -= again
        os.close(self._file)
        self._file = os.open(self._table, os.O_WRONLY | os.O_APPEND)

    def add(self, prediction: Prediction, version: FileVersion | None) -> None:
        """Add a row once its overlay is there, which may be as late as the end.

        Args:
            version: of the file, before it was read.

        Raises:
            OutputError: a row, or an overlay begun earlier, could not be written. Others: as ``draw`` does.
        """
        failed = prediction.error is not None
        row = {
            "path": printable(prediction.source),
            "score": "" if failed else prediction.score,
            "anomalous": "" if failed else prediction.label,
            "error": printable(prediction.error or ""),
            "note": printable(prediction.note or ""),
            "overlay": "",
            "bytes": version.size if version else "",
            "modified": version.modified if version else "",
        }
        name = f"{self._next:05d}_{_shortened(Path(prediction.source).stem)}.png"
        self._next += 1
        drawing = None
        if self._draw is not None and not failed:
            drawing = self._pool.submit(_drawn, self._draw, self._folder / name, prediction)
        self._waiting.append((row, drawing))
        self.write(self._most)

    def write(self, most: int = 2**63) -> None:
        """Add the rows whose overlays are there, and bring rows to the disk; wait for all overlays but ``most``.

        Raises:
            As :meth:`add` does.
        """
        failure: BaseException | None = None
        while self._waiting and (len(self._waiting) > most or _is_done(self._waiting[0][1])):
            # Interrupted while it waits, the row stays where it is.
            row, drawing = self._waiting[0]
            if drawing is not None:
                try:
                    row["overlay"] = drawing.result()
                except ImageError as error:
                    # The file has gone, or is another one by now.
                    row["note"] = "; ".join(filter(None, (row["note"], f"no overlay: {printable(str(error))}")))
                except Exception as error:
                    failure = failure or error
            self._append_first()
        self._sync()
        if failure is not None:
            raise failure

    def _append_first(self) -> None:
        """Write the first row that waits; interrupted at any moment, it is either in the table or waits as before."""
        content = _line(self._waiting[0][0])
        with told_of_disk(self._table):
            size = os.fstat(self._file).st_size
            try:
                while content:
                    content = content[os.write(self._file, content) :]
                self._unsynced = True
                # No call, after which Python looks for signals.
                del self._waiting[0]
            except BaseException:
                os.ftruncate(self._file, size)
                raise

    def _sync(self) -> None:
        if self._unsynced and time.monotonic() - self._synced > _SYNC_SECONDS:
            with told_of_disk(self._table):
                os.fsync(self._file)
            self._unsynced, self._synced = False, time.monotonic()


def _is_done(drawing: Future[str] | None) -> bool:
    return drawing is None or drawing.done()


def _drawn(draw: Draw, path: Path, prediction: Prediction) -> str:
    draw(path, prediction)
    return path.name


def _shortened(stem: str) -> str:
    return printable(stem).encode()[:_LONGEST_STEM].decode(errors="ignore")


def _line(row: Mapping[str, Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow([row[field] for field in FIELDS])
    return text.getvalue().encode()


_HEADER = _line(dict(zip(FIELDS, FIELDS, strict=True)))


def _prepare(folder: Path, run: Mapping[str, Any], *, restart: bool) -> None:
    """There is a table afterwards, of this run or an earlier one of the same kind."""
    table, description = folder / _TABLE, folder / _DESCRIPTION
    if restart:
        with contextlib.suppress(InputError):
            for row in _rows(table):
                # Names from a file, which may not be ours: none but those of overlays in this folder.
                if _OVERLAY.fullmatch(row["overlay"]):
                    (folder / row["overlay"]).unlink(missing_ok=True)
        table.unlink(missing_ok=True)
        sync_folder(folder)
    if table.exists():
        _check_run(folder, run)
        _cut_half_row(table)
        if table.stat().st_size > 0:
            return
    with atomic_path(description) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "run": run}, indent=1) + "\n", encoding="utf-8")
    with atomic_path(table) as temporary:
        temporary.write_bytes(_HEADER)


def _check_run(folder: Path, run: Mapping[str, Any]) -> None:
    try:
        content = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        stored = dict(content["run"]) if content["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        stored = {}
    if not stored:
        raise InputError(f"{folder} holds predictions, but not what made them in {_DESCRIPTION}. {_ADVICE}")
    for key in sorted(stored.keys() | run.keys()):
        if stored.get(key) != run.get(key):
            raise InputError(
                f"{folder} holds predictions with {key} = {stored.get(key)!r}, but this run has {run.get(key)!r}. "
                f"{_ADVICE}"
            )


def _cut_half_row(table: Path) -> None:
    """A full disk, or a power failure, may have left one at the end."""
    with table.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(end - 2**16, 0)
        file.seek(start)
        tail = file.read()
        whole = start + tail.rfind(b"\n") + 1
        if whole < end:
            file.truncate(whole)


def _rows(table: Path) -> Iterator[dict[str, str]]:
    if not table.exists():
        return
    try:
        with table.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file, strict=True)
            for number, line in enumerate(lines):
                if len(line) != len(FIELDS) or (number == 0 and tuple(line) != FIELDS):
                    expected = f"the columns {', '.join(FIELDS)}"
                    raise InputError(f"{table}, line {number + 1}: expected {expected}. {_ADVICE}")
                if number:
                    yield dict(zip(FIELDS, line, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{table} is damaged ({error}). {_ADVICE}") from error


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing predictions to the folder, where the system can."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"Another process writes predictions to {folder}. Give another folder.") from error
        except OSError:
            # A file system without locks.
            pass
        yield
    finally:
        os.close(descriptor)
