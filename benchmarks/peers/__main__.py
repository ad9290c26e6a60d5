"""The command line of `benchmarks.peers`."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import peers
from benchmarks.peers.contest import compete
from benchmarks.peers.contestants import CONTESTANTS, OURS, Task
from benchmarks.peers.networks import Reference, export, preprocessed_images, random_detector
from benchmarks.peers.report import Contest, as_json, machine, remarks, table, write
from efficientad_fast.detector import Detector
from efficientad_fast.errors import EfficientADError
from efficientad_fast.reference.networks import ModelSize
from efficientad_fast.reference.preprocess import check_network_size

CALIBRATION_IMAGES = 8
WIDTH = 120


def image_size(text: str) -> tuple[int, int]:
    height, separator, width = text.lower().partition("x")
    if not (height.strip().isdigit() and (width.strip().isdigit() or not separator)):
        raise argparse.ArgumentTypeError(f"must be a number or HEIGHTxWIDTH such as 256 or 256x512, got {text!r}")
    try:
        return check_network_size((int(height), int(width or height)))
    except EfficientADError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds of at least 0, got {text!r}")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    first, _, rest = (peers.__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=f"{first.partition(': ')[2]}\n\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--size, --batch, --image-size, --threads and --only may be repeated.",
    )
    parser.add_argument("--size", action="append", choices=["s", "m"], help="of the model (default: both)")
    parser.add_argument("--batch", action="append", type=positive, help="images of a batch (default: 1)")
    parser.add_argument(
        "--image-size", action="append", type=image_size, metavar="HxW", help="(default: the detector's, else 256x256)"
    )
    parser.add_argument("--threads", action="append", type=positive, help="(default: as many as PyTorch takes here)")
    parser.add_argument("--only", action="append", choices=list(CONTESTANTS), help="these contestants (default: all)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="of each contestant in a round (default: 2)")
    parser.add_argument(
        "--wait", type=seconds, default=0.0, metavar="SECONDS", help="at most, before each turn, for a quiet machine"
    )
    parser.add_argument("--detector", type=Path, metavar="FILE", help="a trained one, in place of random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and the images (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all that was measured there too")
    chosen = parser.parse_args(arguments)
    if chosen.device != "cpu":
        parser.error(f"--device must be 'cpu', got {chosen.device!r}: rivals on a GPU are not compared yet")
    if chosen.detector is not None and chosen.size:
        parser.error("--size and --detector exclude each other: a detector has its size")
    if chosen.out is not None and chosen.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {str(chosen.out)!r}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables. Returns the exit status: 1 where this package took part and does not count."""
    chosen = parse(arguments)
    console = Console(highlight=False, width=WIDTH)
    try:
        contests = run(chosen, list(sys.argv[1:] if arguments is None else arguments), console)
    except EfficientADError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    ours = [one for contest in contests for one in contest.results if one.name == OURS]
    return 0 if all(one.counts for one in ours) else 1


def run(chosen: argparse.Namespace, given: Sequence[str], console: Console) -> list[Contest]:
    """Every combination of the options, shown and written as soon as it is there."""
    command = shlex.join(["python", "-m", "benchmarks.peers", *given])
    facts: dict[str, Any] = {"command": command, "machine": machine(), "seed": chosen.seed}
    facts["detector"] = None if chosen.detector is None else str(chosen.detector)
    contests: list[Contest] = []
    for detector in detectors(chosen):
        for size in dict.fromkeys(chosen.image_size or [detector.size]):
            batches = list(dict.fromkeys(chosen.batch or [1]))
            images = preprocessed_images(detector, size, max(batches), chosen.seed)
            console.print(f"{detector.teacher.model_size.upper()}, {size[0]} x {size[1]}: float64 reference")
            reference = Reference.of(detector, images)
            threads = dict.fromkeys(chosen.threads or [torch.get_num_threads()])
            for batch, count in itertools.product(batches, threads):
                contest = compete_for(detector, images[:batch], reference.first(batch), count, chosen, console)
                contests.append(contest)
                console.print(table(contest))
                for remark in remarks(contest):
                    console.print(remark, markup=False, soft_wrap=True)
                if chosen.out is not None:
                    write(chosen.out, as_json(facts, contests))
    about = facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    console.print(f"{about['cpu']}, {about['cores']} cores; {versions}; {about['date']}", markup=False, soft_wrap=True)
    return contests


def detectors(chosen: argparse.Namespace) -> list[Detector]:
    if chosen.detector is not None:
        return [Detector.load(chosen.detector)]
    sizes = dict.fromkeys(chosen.size or ["s", "m"])
    return [random_detector(cast("ModelSize", size), chosen.seed) for size in sizes]


def compete_for(
    detector: Detector,
    batch: Tensor,
    reference: Reference,
    threads: int,
    chosen: argparse.Namespace,
    console: Console,
) -> Contest:
    """One table: writes the files that the processes share, and lets them compete."""
    names = list(dict.fromkeys(chosen.only or CONTESTANTS))
    size = (batch.shape[2], batch.shape[3])
    empty = Contest(detector.teacher.model_size, len(batch), size, threads, [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        detector.save(folder / "detector.safetensors")
        np.save(folder / "batch.npy", batch.numpy())
        present = [CONTESTANTS[one] for one in names if not CONTESTANTS[one].missing()]
        if any(one.precision == "int8" for one in present):
            calibration = preprocessed_images(detector, size, CALIBRATION_IMAGES, chosen.seed + 1)
            np.save(folder / "calibration.npy", calibration.numpy())
        if any(one.needs_onnx for one in present):
            console.print(f"{empty.title}: exporting to ONNX")
            try:
                export(detector, batch, folder / "model.onnx")
            except Exception as error:  # those who need the file will say that it is missing; the others go on
                console.print(f"{empty.title}: could not be exported: {error}", markup=False, soft_wrap=True)
        tasks = []
        for one in names:
            (folder / one).mkdir()
            tasks.append(
                Task(
                    contestant=one,
                    detector=str(folder / "detector.safetensors"),
                    batch=str(folder / "batch.npy"),
                    calibration=str(folder / "calibration.npy"),
                    onnx=str(folder / "model.onnx"),
                    outputs=str(folder / one / "maps.npz"),
                    folder=str(folder / one),
                    threads=threads,
                    warm_up_seconds=5 * chosen.seconds,
                )
            )

        def tell(step: str) -> None:
            console.print(f"{empty.title}: {step}")

        results, others = compete(
            tasks, reference, rounds=chosen.rounds, seconds=chosen.seconds, wait=chosen.wait, tell=tell
        )
    return Contest(empty.model_size, empty.batch, empty.image_size, empty.threads, results, others)


if __name__ == "__main__":
    sys.exit(main())
