"""Kills what writes files, at random moments, and looks at what is left.

``python -m tests.killed save|train|predict FOLDER KILLS`` prints a line of JSON for each kill and raises where a file
is not whole. Everything that computes runs in children, for a process whose threads of arithmetic have begun cannot be
forked.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from efficientad_fast import Detector, cli
from efficientad_fast.data import open_dataset
from efficientad_fast.training.student import kept_steps, train
from tests.small_detector import small_detector
from tests.test_training import SETTINGS, _teacher

IMAGES = 24


def forked(work: Callable[[], Any], *, silent: bool = True) -> int:
    child = os.fork()
    if child == 0:
        try:
            if silent:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return child


def finished(work: Callable[[], Any], *, silent: bool = True) -> float:
    """Run it to its end in a child; seconds that it took."""
    started = time.monotonic()
    _, status = os.waitpid(forked(work, silent=silent), 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"{work.__name__}: {status}"
    return time.monotonic() - started


def killed(
    work: Callable[[], Any], check: Callable[[], Any], kills: int, progress: Callable[[], Any], seconds: float
) -> None:
    """Kill ``work`` that often, each time a few steps further, and ``check`` what is left.

    Moments follow what was written, not the clock: on a busy machine all would hit the beginning.

    Args:
        progress: changes with each step of the work that reached the disk.
        seconds: that a step takes.
    """
    moments = random.Random(0)
    for _ in range(kills):
        child = forked(work)
        running = all(_goes_on(child, progress) for _ in range(moments.randrange(MOST_STEPS)))
        if running:
            time.sleep(moments.random() * seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        finished(check, silent=False)


MOST_STEPS, LONGEST_STEP = 5, 60.0


def _goes_on(child: int, progress: Callable[[], Any]) -> bool:
    """Waits for a step; False where the child has ended."""
    before, started = progress(), time.monotonic()
    while progress() == before and time.monotonic() - started < LONGEST_STEP:
        if os.waitpid(child, os.WNOHANG)[0] != 0:
            return False
        time.sleep(0.001)
    return True


def _changes(*paths: Path) -> list[tuple[int, int]]:
    """What differs when a file was written or another one renamed to it."""
    return [(found.st_ino, found.st_size) for path in paths if path.exists() for found in [path.stat()]]


def save(folder: Path, kills: int) -> None:
    path = folder / "model.safetensors"

    def work() -> None:
        detectors = [small_detector(threshold=float(number)) for number in range(2)]
        while True:
            for detector in detectors:
                detector.save(path)

    def first() -> None:
        small_detector(threshold=2.0).save(path)

    def check() -> None:
        threshold = Detector.load(path).threshold
        assert threshold in (0.0, 1.0, 2.0)
        partial = list(folder.glob(".*.partial*"))
        assert len(partial) <= 1
        for one in partial:
            one.unlink()
        print(json.dumps({"threshold": threshold, "partial": len(partial)}), flush=True)

    killed(work, check, kills, lambda: _changes(path), finished(first))


def _make_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    return folder


class _Silent:
    def progress(self, stage: str, done: int, total: int) -> None: ...

    def losses(self, step: int, losses: Any) -> None: ...


def training(folder: Path, kills: int) -> None:
    data = _make_images(folder / "images", 6)
    settings = dataclasses.replace(SETTINGS, steps=8, save_every=1)
    reference, out = folder / "reference.safetensors", folder / "model.safetensors"

    def run(path: Path) -> None:
        train(
            open_dataset(data),
            path,
            settings,
            teacher=_teacher(),
            teacher_provenance={},
            resume=kept_steps(path) > 0,
            observer=_Silent(),
        )

    def undisturbed() -> None:
        run(reference)

    def work() -> None:
        run(out)

    def check() -> None:
        steps = kept_steps(out)
        print(json.dumps({"steps": steps, "out": out.exists()}), flush=True)
        if out.exists():
            same()
            out.unlink()
            shutil.rmtree(folder / "model.safetensors.training", ignore_errors=True)

    def same() -> None:
        ours, expected = Detector.load(out), Detector.load(reference)
        weights = expected.student.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in ours.student.state_dict().items())
        assert ours.quantiles == expected.quantiles and ours.threshold == expected.threshold

    state = folder / "model.safetensors.training" / "state.safetensors"
    seconds = finished(undisturbed) / settings.steps
    killed(work, check, kills, lambda: _changes(out, state), seconds)
    finished(work)
    finished(same)


def predicting(folder: Path, kills: int) -> None:
    data, model = _make_images(folder / "images", IMAGES), folder / "model.safetensors"
    reference, out = folder / "reference", folder / "out"

    def first() -> None:
        small_detector().save(model)

    def run(path: Path) -> None:
        cli.app(["predict", str(model), str(data), "--out", str(path)])

    def undisturbed() -> None:
        run(reference)

    def work() -> None:
        run(out)

    def rows(path: Path) -> list[dict[str, str]]:
        content = (path / "predictions.csv").read_bytes()
        assert content.endswith(b"\r\n")
        found = list(csv.DictReader(content.decode().splitlines(), strict=True))
        for row in found:
            assert None not in row and None not in row.values() and row["score"]
            with Image.open(path / row["overlay"]) as image:
                image.load()
        return found

    def check() -> None:
        found = rows(out) if (out / "predictions.csv").exists() else []
        assert len({row["path"] for row in found}) == len(found)
        print(json.dumps({"rows": len(found)}), flush=True)
        if len(found) == IMAGES:
            same()
            shutil.rmtree(out)

    def same() -> None:
        figures = [sorted((row["path"], row["score"]) for row in rows(path)) for path in (out, reference)]
        assert figures[0] == figures[1]

    finished(first)
    killed(work, check, kills, lambda: _changes(out / "predictions.csv"), finished(undisturbed) / IMAGES)
    finished(work)
    finished(same)


if __name__ == "__main__":
    {"save": save, "train": training, "predict": predicting}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
