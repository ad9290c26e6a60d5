"""Many predictions in one process: its memory, open files and threads must stay as they are.

``python -m tests.soak --count 20000`` predicts through every entry point, with images of mixed sizes and kinds, and bad
ones among them. Resident memory is looked at when the process is warm (after the first 500 predictions) and at the end:
it may have grown by 5 %. Open files and threads may not have grown at all. Every result must be what it was the first
time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

import efficientad_fast
from efficientad_fast import Detector, cli, native
from efficientad_fast.errors import ImageError
from tests.small_detector import small_detector

GROWTH = 1.05


def resident() -> int:
    """Bytes of this process in memory, when what is free has been given back."""
    gc.collect()
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def make_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Good and bad files, in one folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    good, bad = [], []
    sizes = [(1, 1), (30, 40), (256, 256), (300, 280), (7, 900), (1000, 700)]
    kinds = [("png", "RGB"), ("jpg", "L"), ("bmp", "RGB"), ("tif", "L"), ("gif", "P"), ("png", "RGBA"), ("webp", "RGB")]
    for index, ((height, width), (suffix, mode)) in enumerate(
        itertools.islice(zip(itertools.cycle(sizes), kinds * 2), 14)
    ):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / f"good{index:02d}.{suffix}"
        Image.fromarray(pixels).convert(mode).save(path)
        good.append(path)
    deep = folder / "deep.png"
    Image.fromarray(rng.integers(0, 65536, (50, 60), dtype=np.uint16)).save(deep)
    pages = folder / "pages.tif"
    frames = [Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(pages, save_all=True, append_images=frames[1:])
    good += [deep, pages]
    whole = good[2].read_bytes(), good[3].read_bytes()
    for index, content in enumerate([b"", b"no image", whole[0][:500], whole[1][:-100], whole[0][:30] + bytes(4000)]):
        path = folder / f"bad{index}.png"
        path.write_bytes(content)
        bad.append(path)
    return good, bad


class Soak:
    """Entry points by name; each predicts some images and returns their number and a digest of what came out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = small_detector().save(folder / "model.safetensors")
        self.detector = Detector.load(self.model)
        self.good, self.bad = make_images(folder / "images")
        self.files = sorted(self.good + self.bad)
        self.arrays = [np.asarray(Image.open(path).convert("RGB")) for path in self.good]
        self.arrays.append(np.full((20, 30, 3), 255.0))

    def entry_points(self) -> dict[str, Callable[[], tuple[int, Any]]]:
        return {
            # First: as many workspaces as threads that met in a prediction stay until others have taken their place.
            "threads": self.in_threads,
            "one file": self.one_file,
            "a folder": lambda: self.several(self.detector.predict(self.folder / "images", batch_size=4)),
            "files": lambda: self.several(self.detector.predict(self.files, batch_size=3, map_size="original")),
            "arrays": lambda: self.several(self.detector.predict(self.arrays)),
            "tensors": lambda: self.several(
                self.detector.predict([torch.tensor(one).permute(2, 0, 1) for one in self.arrays], batch_size=8)
            ),
            "PIL images": lambda: self.several(self.detector.predict([Image.open(path) for path in self.good])),
            "a stream": lambda: self.several(self.detector.stream(iter(self.files), batch_size=2)),
            "a stream left early": self.left_early,
            "the drop-in": self.drop_in,
            "the command": self.command,
            "the command with overlays": self.command_out,
            "a new detector": self.new_detector,
        }

    @staticmethod
    def several(predictions: Any) -> tuple[int, Any]:
        found = [(round(one.score, 5), bool(one.error)) if not one.error else one.error for one in predictions]
        return len(found), found

    def one_file(self) -> tuple[int, Any]:
        found = []
        for path in self.files:
            try:
                found.append(self.several([self.detector.predict(path)]))
            except ImageError as error:
                found.append((1, str(error)))
        return len(found), found

    def left_early(self) -> tuple[int, Any]:
        stream = self.detector.stream(self.good, batch_size=2)
        found = [next(stream) for _ in range(3)]
        stream.close()
        return self.several(found)

    def in_threads(self) -> tuple[int, Any]:
        results: list[Any] = [None] * 4

        def work(number: int) -> None:
            results[number] = self.several(self.detector.predict(self.arrays[:6]))

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(result[0] for result in results), results

    def drop_in(self) -> tuple[int, Any]:
        detector = self.detector
        found = []
        for array in self.arrays[:3]:
            image = detector.preprocessing(detector.preprocessing.decode(array)).unsqueeze(0)
            shape = (1, -1, 1, 1)
            statistics = detector.teacher_mean.view(shape), detector.teacher_std.view(shape)
            maps = efficientad_fast.predict(
                image, detector.teacher, detector.student, detector.autoencoder, *statistics
            )
            found.append([round(float(one.max()), 4) for one in maps])
        return len(found), found

    def _command(self, *arguments: object) -> tuple[int, Any]:
        words = ["predict", self.model, self.folder / "images", *arguments]
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
        assert result.exit_code == 1, result.output
        return len(self.files), [line.split("\t")[1:] for line in result.stdout.splitlines()]

    def command(self) -> tuple[int, Any]:
        return self._command("--batch-size", 4)

    def command_out(self) -> tuple[int, Any]:
        return self._command("--out", self.folder / "out", "--restart")

    def new_detector(self) -> tuple[int, Any]:
        return self.several(Detector.load(self.model).predict([*self.bad[:2], *self.good[:3]]))


def rounds(soak: Soak) -> Iterator[int]:
    """Numbers of predictions made; an entry point at a time, for ever."""
    expected: dict[str, Any] = {}
    while True:
        for name, entry in soak.entry_points().items():
            count, found = entry()
            assert found == expected.setdefault(name, found), f"{name}: {found} was {expected[name]}"
            yield count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="predictions in all")
    parser.add_argument("--warm", type=int, default=500, help="predictions before memory is looked at")
    options = parser.parse_args()
    native.keep_memory_together()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        done, told = 0, 0.0
        started = time.monotonic()
        warm: tuple[int, int, int] | None = None
        # Whole turns through all entry points, so that each look finds the process in the same place.
        turn = len(soak.entry_points())
        for index, count in enumerate(rounds(soak), 1):
            done += count
            if index % turn:
                continue
            if warm is None and done >= options.warm:
                warm = resident(), open_files(), threads()
            if time.monotonic() - told > 20 or done >= options.count:
                told = time.monotonic()
                seconds = told - started
                print(
                    f"{done} predictions, {seconds:.0f} s: {resident() / 2**20:.1f} MiB, {open_files()} open files, "
                    f"{threads()} threads",
                    flush=True,
                )
            if warm is not None and done >= options.count:
                break
        now = resident(), open_files(), threads()
    print(
        f"after {options.warm}: {warm[0] / 2**20:.1f} MiB, {warm[1]} files, {warm[2]} threads; at the end: "
        f"{now[0] / 2**20:.1f} MiB ({now[0] / warm[0] - 1:+.1%}), {now[1]} files, {now[2]} threads"
    )
    if now[0] > GROWTH * warm[0] or now[1] > warm[1] or now[2] > warm[2]:
        sys.exit("something grows")


if __name__ == "__main__":
    main()
