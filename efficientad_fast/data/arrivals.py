"""Images that arrive in a folder: each once, when nobody writes to it any more."""

from __future__ import annotations

import math
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from efficientad_fast.data.folders import check_folder, find_images, is_image_name
from efficientad_fast.errors import InputError

_TICK_SECONDS = 0.1
_SCAN_SECONDS = 10.0
"""Between two looks at the whole folder, which find what no event told of: on network drives, behind links."""

_SCAN_SHARE = 0.02
"""Of the time that such looks may take, where folders are large."""


class FileVersion(NamedTuple):
    """What tells a file from what it was before: its size in bytes, and its time in nanoseconds since 1970."""

    size: int
    modified: int


def file_version(path: str | os.PathLike[str]) -> FileVersion | None:
    """The version of the file that is there now; ``None`` where there is none, a folder, or no right to look at it."""
    try:
        status = os.stat(path)  # noqa: PTH116  a Path made from each name takes half of the time
    except (OSError, ValueError):
        return None
    return None if stat.S_ISDIR(status.st_mode) else FileVersion(status.st_size, status.st_mtime_ns)


class Arrival(NamedTuple):
    """A file that is ready to be read, and its version."""

    path: Path
    version: FileVersion


@dataclass
class _Pending:
    """A file that is looked at until it stays as it is; ``since`` when it does, and when to look again."""

    version: FileVersion
    since: float
    next_look: float


class Arrivals:
    """Image files in a folder and below, those there and those to come, as :func:`data.folders.list_images` finds them.

    A file is ready once its size and time have stayed the same for ``settle`` seconds. Whoever takes it says that it is
    :meth:`done`, or wants it :meth:`again`: what could not be read may not be finished, see :meth:`may_be_unfinished`.
    A file that is written anew is another arrival.

    Args:
        folder: watched by the system's events, and looked at as a whole now and then.
        ignored: asked once for each version of a file, whether it is none to wait for.
        settle: seconds.
        patience: seconds for which a file that stays as it is, but cannot be read, may still be in the making.
        most: files in a list.

    Raises:
        DatasetError: ``folder`` is missing or no folder.
        InputError: the package ``watchfiles`` is not installed.
    """

    def __init__(
        self,
        folder: Path,
        ignored: Callable[[Path, FileVersion], bool] = lambda path, version: False,
        *,
        settle: float = 0.5,
        patience: float = 10.0,
        most: int = 256,
    ) -> None:
        try:
            import watchfiles  # noqa: F401
        except ImportError as error:
            raise InputError("Following a folder needs the package watchfiles: pip install watchfiles") from error
        check_folder(folder)
        self._folder, self._ignored = folder, ignored
        self._settle, self._patience, self._most = settle, patience, most
        self._pending: dict[Path, _Pending] = {}
        self._known: dict[Path, FileVersion] = {}
        self._ready: deque[Arrival] = deque()
        self._next_scan, self._scan_seconds = 0.0, _SCAN_SECONDS

    def __iter__(self) -> Iterator[list[Arrival]]:
        """Lists of what is ready, the oldest first; empty ones several times a second. Never ends by itself.

        Raises:
            DatasetError: the folder has gone. KeyboardInterrupt: Ctrl-C.
        """
        for changed in self._events():
            for path in changed:
                self._look_at(path)
            # The first time, too: what came before there were events.
            if time.monotonic() >= self._next_scan:
                self._scan()
            self._settled()
            yield [self._ready.popleft() for _ in range(min(self._most, len(self._ready)))]

    def done(self, arrival: Arrival) -> None:
        """The file needs no more looking at, unless it changes."""
        self._pending.pop(arrival.path, None)
        self._known[arrival.path] = arrival.version

    def again(self, arrival: Arrival) -> None:
        """Have a file once more: after ``settle`` seconds as it is, or when it has changed."""
        pending = self._pending.get(arrival.path)
        if pending is not None:
            pending.next_look = time.monotonic() + self._settle

    def may_be_unfinished(self, arrival: Arrival) -> bool:
        """Whether the file has stayed as it is so shortly that what cannot be read now may be read later."""
        pending = self._pending.get(arrival.path)
        return pending is not None and time.monotonic() - pending.since < self._patience

    def _scan(self) -> None:
        started = time.monotonic()
        found = find_images(self._folder, skip_unreadable=True)
        for path in found:
            self._look_at(path)
        # Nothing is kept of files that have gone.
        present = set(found)
        self._known = {path: version for path, version in self._known.items() if path in present}
        now = time.monotonic()
        self._next_scan = now + max(self._scan_seconds, (now - started) / _SCAN_SHARE)

    def _look_at(self, path: Path) -> None:
        version = file_version(path)
        if version is None or version == self._known.get(path) or path in self._pending:
            return
        if self._ignored(path, version):
            self._known[path] = version
            return
        now = time.monotonic()
        self._pending[path] = _Pending(version, now, now + self._settle)

    def _settled(self) -> None:
        """Move what is ready to its queue."""
        now = time.monotonic()
        found = []
        for path, pending in [item for item in self._pending.items() if item[1].next_look <= now]:
            version = file_version(path)
            if version is None:
                del self._pending[path]
            elif version != pending.version:
                self._pending[path] = _Pending(version, now, now + self._settle)
            else:
                pending.next_look = math.inf
                found.append(Arrival(path, version))
        self._ready.extend(sorted(found, key=lambda arrival: (arrival.version.modified, arrival.path)))

    def _events(self) -> Iterator[list[Path]]:
        from watchfiles import watch

        # Of what is behind a link, there are no events.
        root = self._folder.resolve()
        try:
            for changes in watch(
                root,
                watch_filter=lambda change, path: is_image_name(os.path.basename(path)),  # noqa: PTH119
                debounce=50,
                step=25,
                rust_timeout=int(1000 * _TICK_SECONDS),
                yield_on_timeout=True,
                ignore_permission_denied=True,
            ):
                parts = (Path(path).relative_to(root).parts for _, path in changes)
                # Under the names that a look at the folder gives to files, and without those in hidden folders.
                yield [self._folder.joinpath(*one) for one in parts if not any(name.startswith(".") for name in one)]
        except (OSError, RuntimeError, ValueError):
            # The system has no events left to give, or none for this kind of disk or name: looking must do.
            self._next_scan, self._scan_seconds = 0.0, 10 * _TICK_SECONDS
            while True:
                yield []
                time.sleep(_TICK_SECONDS)
