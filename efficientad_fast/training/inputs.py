"""What is looked at before the first step, so that a long run does not fail in the middle or at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from efficientad_fast.errors import ImageError, InputError


def check_images(
    paths: Sequence[Path], decode: Callable[[Path], Tensor], progress: Callable[[int, int], None] | None = None
) -> None:
    """Decode every file once, in a few threads, and report all that cannot be read together.

    Args:
        decode: as the run will do it; its tensors are dropped.
        progress: called with the number of files done and their total.

    Raises:
        ImageError: with the name of and the reason for each bad file.
    """
    files = list(dict.fromkeys(paths))

    def reason(path: Path) -> str | None:
        try:
            decode(path)
        except ImageError as error:
            return str(error) if str(path) in str(error) else f"{path}: {error}"
        return None

    found: list[str] = []
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="efficientad_fast-check")
    try:
        for index, bad in enumerate(pool.map(reason, files)):
            if bad is not None:
                found.append(bad)
            if progress:
                progress(index + 1, len(files))
    finally:
        pool.shutdown(cancel_futures=True)
    if found:
        raise ImageError(f"{len(found)} of {len(files)} images cannot be used:\n" + "\n".join(found))


def check_output(out: Path) -> None:
    """Make the folder that ``out`` goes to.

    Raises:
        InputError: ``out`` is a folder, or no file can be made beside it.
        OSError: its folder cannot be made.
    """
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the path of the file to write.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"{out.parent} cannot be written to; allow this user to, or give another place.")


def check_space(folder: Path, size: int) -> None:
    """Refuse, with an :class:`InputError`, a cache of ``size`` bytes that the disk of ``folder`` has no room for.

    A file that is mapped into memory would end the process without a word where the disk is full.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{folder} needs {size / 1e9:.1f} GB for what is computed once and kept, but {free / 1e9:.1f} GB are free "
            "on its disk. Make room, or give a place on another one."
        )
