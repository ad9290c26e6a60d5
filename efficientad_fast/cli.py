"""The command ``efficientad-fast``. Exit codes: 0 all good, 1 something failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich import markup
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from efficientad_fast.errors import EfficientADError, InputError

_MOST_OVERLAY_PIXELS = 2**23
"""Of an overlay; larger images are shown at a half, a third and so on. Drawing takes many times the image's memory."""

if TYPE_CHECKING:
    import torch

    from efficientad_fast.detector import Detector, Prediction
    from efficientad_fast.evaluation import Evaluation
    from efficientad_fast.preprocessing import DecodeOptions
    from efficientad_fast.reference.networks import ModelSize, PatchDescriptionNetwork
    from efficientad_fast.results import Draw, Results
    from efficientad_fast.training.student import PenaltyImages

app = typer.Typer(
    help="Visual anomaly detection with EfficientAD: train on good images, predict, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

DeviceOption = Annotated[str, typer.Option(help="'cpu', 'cuda' or 'cuda:N'.")]
ModelArgument = Annotated[
    Path, typer.Argument(help="A detector made by `efficientad-fast train` or `convert`, or a model made elsewhere.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images that go through the networks together.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Of the networks: 'auto' (float32 on a CPU, float16 on a GPU), 'float32', 'float16', 'bfloat16', 'float8' "
        "(see `efficientad-fast calibrate`) or 'float64'."
    ),
]


class _Watch:
    """Shows progress: bars with time left on a terminal, now and then a line elsewhere."""

    _LINE_SECONDS = 20.0

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._losses = ""
        self._printed = 0.0

    def __enter__(self) -> _Watch:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, losses="")
            self._started[stage] = (time.monotonic(), done)
        losses = self._losses if stage == "steps" else ""
        self._bars.update(self._tasks[stage], completed=done, total=total, losses=losses)
        if console.is_terminal:
            return
        now = time.monotonic()
        if done == total or now - self._printed > self._LINE_SECONDS:
            self._printed = now
            since, first = self._started[stage]
            left = (now - since) / (done - first) * (total - done) if done > first else math.nan
            remaining = "" if done == total or math.isnan(left) else f", {left:.0f} s left"
            console.print(f"{stage}: {done} of {total}{remaining} {losses}".rstrip())

    def losses(self, step: int, losses: Mapping[str, float]) -> None:
        self._losses = " ".join(f"{name} {value:.3f}" for name, value in losses.items())


def escape(text: str) -> str:
    """As rich prints it, letter for letter; without what steers a terminal, for names come from files."""
    from efficientad_fast.files import without_controls

    return markup.escape(without_controls(text))


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Errors and warnings made for people are printed as a sentence; Ctrl-C says how to go on."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: errors.print(f"note: {escape(str(message))}", soft_wrap=True)
            yield
    except EfficientADError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except BrokenPipeError:
        # Whoever read has had enough, such as `head`; nothing must be written when Python closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except OSError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _network_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"--size must be a number or HEIGHTxWIDTH such as 256 or 256x512, got {text!r}.")
    return int(parts[0]), int(parts[-1])


def _dtype(text: str) -> str | None:
    return None if text == "auto" else text


def _model_size(text: str) -> ModelSize:
    from efficientad_fast.reference.networks import ModelSize

    if text in get_args(ModelSize):
        return cast("ModelSize", text)
    raise InputError(f"--model-size must be 's' or 'm', got {text!r}.")


@app.callback()
def _start() -> None:
    # Names of files may hold bytes that are no UTF-8; printing one must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Folder of good images, or of an MVTec-AD-style data set.")],
    out: Annotated[Path, typer.Option(help="Where the detector goes, a .safetensors file.")],
    preset: Annotated[str, typer.Option(help="'paper' (70,000 steps) or 'quick' (minutes on two cores).")] = "paper",
    steps: Annotated[int | None, typer.Option(min=1, help="In place of the preset's.")] = None,
    size: Annotated[str, typer.Option(help="Network size: N or HEIGHTxWIDTH, each side at least 256.")] = "256",
    teacher: Annotated[
        str,
        typer.Option(
            help="'default', 'random', or a file: made by `efficientad-fast distill`, or a teacher of anomalib's or of "
            "the widely used PyTorch implementation (.pth)."
        ),
    ] = "default",
    penalty: Annotated[
        str,
        typer.Option(help="Images for the pretraining penalty: a folder, 'generated', or 'none'."),
    ] = "none",
    padding: Annotated[bool, typer.Option("--padding", help="Pad the networks' convolutions.")] = False,
    max_value: Annotated[
        int | None, typer.Option(help="Value of white in 16-bit files, such as 4095 for 12 bits (default 65535).")
    ] = None,
    apply_exif: Annotated[bool, typer.Option("--apply-exif", help="Turn photographs upright.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an interrupted training and start anew.")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Train a detector on good images."""
    from efficientad_fast.data.folders import open_dataset
    from efficientad_fast.training.student import TrainSettings, kept_steps, quick_training
    from efficientad_fast.training.student import train as run

    with _told_plainly():
        if preset not in ("paper", "quick"):
            raise InputError(f"--preset must be 'paper' or 'quick', got {preset!r}.")
        if out.suffix != ".safetensors":
            raise InputError(f"--out must end in .safetensors, got {str(out)!r}.")
        settings = quick_training() if preset == "quick" else TrainSettings()
        settings = dataclasses.replace(
            settings,
            steps=steps or settings.steps,
            size=_network_size(size),
            padding=padding,
            seed=seed,
            crop=None if padding else settings.crop,
            max_value=max_value,
            apply_exif=apply_exif,
        )
        network, provenance = _teacher(teacher, padding)
        console.print(f"teacher: {escape(_teacher_line(provenance))}", soft_wrap=True)
        images = _penalty_images(penalty)
        console.print(f"pretraining penalty: {escape(images.name) if images else 'none'}")
        try:
            with _Watch() as watch:
                detector = run(
                    open_dataset(data),
                    out,
                    settings,
                    teacher=network,
                    teacher_provenance=provenance,
                    penalty=images,
                    resume=resume,
                    restart=restart,
                    device=device,
                    observer=watch,
                )
        except KeyboardInterrupt:
            _tell_stopped(kept_steps(out), settings.steps)
            raise typer.Exit(130) from None
        console.print(f"saved {escape(str(out))}, threshold {detector.threshold:.4f}", soft_wrap=True)


def _tell_stopped(kept: int, steps: int, targets: int = 0) -> None:
    if kept or targets:
        what = f"{kept} of {steps} steps" if kept else f"{targets} targets"
        errors.print(f"stopped; {what} are kept. Give the same command with --resume to go on.", soft_wrap=True)
    else:
        errors.print("stopped before the first step; nothing is kept. Give the same command to start anew.")


def _teacher(choice: str, padding: bool) -> tuple[PatchDescriptionNetwork, dict[str, Any]]:
    from efficientad_fast.weights import load_teacher, random_teacher

    if choice == "random":
        return random_teacher(padding=padding)
    return load_teacher(None if choice == "default" else Path(choice), padding=padding)


def _teacher_line(provenance: Mapping[str, Any]) -> str:
    from efficientad_fast.weights import describe_teacher

    return describe_teacher(provenance)


def _penalty_images(choice: str) -> PenaltyImages | None:
    from efficientad_fast.data.folders import list_images
    from efficientad_fast.training.student import PenaltyImages

    if choice == "none":
        return None
    if choice == "generated":
        return PenaltyImages()
    return PenaltyImages(tuple(list_images(Path(choice))), Path(choice).name)


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path] | None, typer.Argument(help="Images and folders of images.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for predictions.csv and overlays. What it has already is not done again."),
    ] = None,
    follow: Annotated[
        Path | None, typer.Option(help="Predict what is in this folder, and what arrives there, until Ctrl-C.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop the predictions that --out has.")] = False,
    batch_size: BatchOption = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    max_value: Annotated[
        int | None, typer.Option(help="Value of white in 16-bit files, in place of the detector's own.")
    ] = None,
    apply_exif: Annotated[
        bool | None,
        typer.Option("--apply-exif/--ignore-exif", help="Turn photographs upright, in place of the detector's own."),
    ] = None,
) -> None:
    """Predict images: score, and whether it is above the detector's threshold.

    One line an image goes to standard output: score, verdict, path, separated by tabs; what cannot be printed of a
    path is escaped. A file that cannot be read is reported on standard error and the exit code is 1; the others are
    predicted.

    The same command with the same --out goes on where it was stopped: it predicts what is new, has changed or had
    failed. With --follow each file is predicted once, when nobody writes to it any more; with --out, also after a
    restart.
    """
    from efficientad_fast import native
    from efficientad_fast.detector import Detector, dtype_name
    from efficientad_fast.files import is_folder
    from efficientad_fast.preprocessing import DecodeOptions

    with _told_plainly():
        if (follow is None) == (not images):
            raise InputError("Give images and folders to predict, or --follow FOLDER: one of the two.")
        if restart and out is None:
            raise InputError("--restart drops the predictions in a folder: give it with --out.")
        folders = [one if is_folder(one) else one.parent for one in [*(images or ()), *([follow] if follow else ())]]
        if out is not None and any(_same_folder(out, one) for one in folders):
            raise InputError(f"--out {out} is a folder of images; give another, such as {out / 'results'}.")
        native.keep_memory_together()
        detector = Detector.load(model)
        options = DecodeOptions(max_value=max_value, apply_exif=apply_exif)
        computed = detector.dtype_on(device, _dtype(dtype))
        detector.plan(device, computed)
        threshold = detector.precision(computed).threshold
        if threshold == math.inf and model.suffix == ".safetensors":  # of others, loading says it
            errors.print(
                f"note: {escape(str(model))} has no threshold: no image is called anomalous. Set one with "
                "detector.replaced(threshold=...).save(path), or when it is converted.",
                soft_wrap=True,
            )

        def stream(paths: list[Path]) -> Iterator[Prediction]:
            return detector.stream(paths, batch_size=batch_size, device=device, dtype=computed, decode=options)

        def draw(path: Path, prediction: Prediction) -> None:
            _write_overlay(path, prediction, detector, threshold, options)

        counts = _Counts()
        try:
            with _results(
                out,
                lambda: {
                    "detector": _digest(model),
                    "dtype": dtype_name(computed),
                    "max_value": max_value,
                    "apply_exif": apply_exif,
                },
                draw,
                restart=restart,
                most=2 * batch_size,
            ) as results:
                if follow is not None:
                    _follow(follow, stream, results, counts)
                else:
                    _predict_all(images or [], out, stream, results, counts)
        except KeyboardInterrupt:
            kept = "" if out is None else " and are kept. Give the same command to go on"
            errors.print(f"stopped; {counts.predicted} images were predicted{kept}.")
            raise typer.Exit(130) from None
        if counts.failed:
            errors.print(f"{counts.failed} of {counts.failed + counts.predicted} images failed.")
            raise typer.Exit(1)


@dataclasses.dataclass
class _Counts:
    predicted: int = 0
    failed: int = 0

    def tell(self, prediction: Prediction) -> None:
        from efficientad_fast.files import printable

        if prediction.note is not None:
            errors.print(f"note: {escape(printable(prediction.note))}", soft_wrap=True)
        if prediction.error is not None:
            self.failed += 1
            errors.print(f"[red]failed:[/red] {escape(printable(prediction.error))}", soft_wrap=True)
            return
        self.predicted += 1
        verdict = "anomalous" if prediction.label else "good"
        sys.stdout.write(f"{prediction.score:.6f}\t{verdict}\t{printable(prediction.source)}\n")
        sys.stdout.flush()


def _predict_all(
    images: Sequence[Path],
    out: Path | None,
    stream: Callable[[list[Path]], Iterator[Prediction]],
    results: Results | None,
    counts: _Counts,
) -> None:
    from efficientad_fast.data.arrivals import file_version
    from efficientad_fast.data.folders import list_images
    from efficientad_fast.files import is_folder

    paths = [found for path in images for found in (list_images(path) if is_folder(path) else [path])]
    if results is None or out is None:
        for prediction in stream(paths):
            counts.tell(prediction)
        return
    found = [(path, file_version(path)) for path in paths if not results.is_overlay(path)]
    todo = [(path, version) for path, version in found if not results.is_done(path, version)]
    if len(todo) < len(found):
        errors.print(
            f"{len(found) - len(todo)} of {len(found)} images are in {escape(str(out))} already.", soft_wrap=True
        )
    results.forget(path for path, _ in todo)
    for (_, version), prediction in zip(todo, stream([path for path, _ in todo]), strict=True):
        try:
            counts.tell(prediction)
        finally:
            # Interrupted meanwhile, too: whoever is told of it finds it in the table.
            results.add(prediction, version)


def _follow(
    folder: Path,
    stream: Callable[[list[Path]], Iterator[Prediction]],
    results: Results | None,
    counts: _Counts,
) -> None:
    from efficientad_fast.data.arrivals import Arrivals, FileVersion, file_version

    def ignored(path: Path, version: FileVersion) -> bool:
        return results is not None and (results.is_overlay(path) or results.is_done(path, version))

    arrivals = Arrivals(folder, ignored)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        errors.print(f"following {escape(str(folder))}; Ctrl-C ends it.", soft_wrap=True)
        for ready in arrivals:
            predictions = stream([one.path for one in ready]) if ready else ()
            for arrival, prediction in zip(ready, predictions, strict=True):
                version = file_version(arrival.path)
                unfinished = prediction.error is not None and arrivals.may_be_unfinished(arrival)
                if version != arrival.version or unfinished:
                    arrivals.again(arrival)
                    continue
                arrivals.done(arrival)
                try:
                    counts.tell(prediction)
                finally:
                    if results is not None:
                        results.forget([arrival.path])
                        results.add(prediction, version)
            if results is not None and not ready:
                results.write()
    except KeyboardInterrupt:
        errors.print(f"stopped; {counts.predicted} images were predicted.")
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _results(
    out: Path | None, run: Callable[[], Mapping[str, Any]], draw: Draw, *, restart: bool, most: int
) -> Iterator[Results | None]:
    from efficientad_fast.results import Results

    if out is None:
        yield None
        return
    with Results(out, run(), draw=draw, restart=restart, most=most) as results:
        yield results


def _same_folder(first: Path, second: Path) -> bool:
    from efficientad_fast.files import is_folder

    return is_folder(first) and is_folder(second) and first.samefile(second)


def _digest(model: Path) -> str:
    """Of the files that a detector is loaded from."""
    from efficientad_fast.interop.loading import detector_files

    digest = hashlib.blake2b(digest_size=16)
    for file in detector_files(model):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def _write_overlay(
    path: Path, prediction: Prediction, detector: Detector, threshold: float, options: DecodeOptions
) -> None:
    import numpy as np

    from efficientad_fast.report.overlays import colour_range, displayable, save_overlay

    if prediction.anomaly_map is None:
        return
    # Decoded a second time: keeping every original in the stream would cost more memory than this costs time.
    image = detector.preprocessing.decode(prediction.source, options).numpy()
    step = math.ceil(math.sqrt(image[0].size / _MOST_OVERLAY_PIXELS))
    low, high = colour_range(np.array([]), threshold)
    save_overlay(path, displayable(image[:, ::step, ::step]), prediction.anomaly_map, low, high)


@app.command()
def evaluate(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(help="Data set in MVTec AD or MVTec LOCO layout.")],
    report: Annotated[Path | None, typer.Option(help="Where the HTML report goes.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Where the figures go, as JSON.")] = None,
    batch_size: BatchOption = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
) -> None:
    """Evaluate a detector on a data set's test images; optionally write an HTML report."""
    from efficientad_fast.data.folders import open_dataset
    from efficientad_fast.detector import Detector
    from efficientad_fast.evaluation import evaluate as run
    from efficientad_fast.report import write_report

    with _told_plainly():
        detector = Detector.load(model)
        computed = detector.dtype_on(device, _dtype(dtype))
        _tell_emulated(computed, device)
        with _Watch() as watch:
            evaluation = run(
                detector,
                open_dataset(data),
                batch_size=batch_size,
                device=device,
                dtype=computed,
                progress=lambda done, total: watch.progress("evaluating", done, total),
            )
        if json_out is not None:
            evaluation.write_json(json_out)
        _print_evaluation(evaluation)
        if report is not None:
            write_report(evaluation, report, detector_summary=detector.summary())
            console.print(f"report: {escape(str(report.resolve()))}", soft_wrap=True)
        if evaluation.failed:
            for row in evaluation.failed:
                errors.print(f"[red]failed:[/red] {escape(str(row.error))}", soft_wrap=True)
            raise typer.Exit(1)


def _tell_emulated(dtype: torch.dtype, device: str) -> None:
    from efficientad_fast.detector import is_emulated

    if is_emulated(dtype, device):
        console.print("float8 is emulated on a CPU, whose time says nothing of a GPU's.", soft_wrap=True)


@app.command()
def calibrate(
    model: ModelArgument,
    images: Annotated[Path, typer.Argument(help="Folder of good images that it was not trained on, or its data set.")],
    dtype: Annotated[str, typer.Option(help="'float8', 'float16' or 'bfloat16'.")],
    out: Annotated[Path | None, typer.Option(help="Where the detector goes, in place of its own file.")] = None,
    batch_size: BatchOption = 1,
    device: DeviceOption = "cpu",
) -> None:
    """Estimate a detector's quantiles and threshold in another precision; float8 cannot do without.

    Of a data set, its validation images are taken, or those that training held back. On a CPU, float8 is emulated,
    with the same numbers as on a GPU but for the order of sums.
    """
    from efficientad_fast.detector import Detector, dtype_name
    from efficientad_fast.training.calibrate import calibration_dtype, images_for
    from efficientad_fast.training.inputs import check_images, check_output

    with _told_plainly():
        target = out or model
        if target.suffix != ".safetensors":
            raise InputError(f"--out must end in .safetensors, got {str(target)!r}.")
        detector = Detector.load(model)
        name = dtype_name(calibration_dtype(dtype))
        check_output(target)
        chosen, which = images_for(detector, images)
        console.print(f"calibrating {name} on {escape(which)}", soft_wrap=True)
        _tell_emulated(calibration_dtype(dtype), device)
        try:
            with _Watch() as watch:
                check_images(
                    chosen,
                    detector.preprocessing.decode,
                    lambda done, total: watch.progress("checking images", done, total),
                )
                calibrated = detector.calibrated(
                    chosen, dtype, device=device, batch_size=batch_size, progress=watch.progress
                )
        except KeyboardInterrupt:
            errors.print(f"stopped; {escape(str(target))} is as it was.", soft_wrap=True)
            raise typer.Exit(130) from None
        calibrated.save(target)
        console.print(
            f"saved {escape(str(target))}, threshold in {name} {calibrated.precisions[name].threshold:.4f} "
            f"(float32: {calibrated.threshold:.4f})",
            soft_wrap=True,
        )


@app.command()
def convert(
    source: Annotated[
        list[Path],
        typer.Argument(
            help="anomalib's checkpoint (.ckpt), or the files teacher_*.pth, student_*.pth, autoencoder_*.pth of the "
            "widely used PyTorch implementation; or the folder of either."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the detector goes, a .safetensors file.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of good images, or data set, to compute what is missing from.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="What is missing: JSON or a torch.save'd dictionary with teacher_mean, teacher_std, q_st_start, "
            "q_st_end, q_ae_start, q_ae_end, threshold, or some of them."
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="In place of the one in the file.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Network size, in place of the one in the file: N or HEIGHTxWIDTH.")
    ] = None,
    padding: Annotated[
        bool | None, typer.Option("--padding/--no-padding", help="Where the file does not say whether networks pad.")
    ] = None,
) -> None:
    """Make a detector of a model that was trained elsewhere. No code in its files is executed."""
    from efficientad_fast.interop.loading import Supplied, load_elsewhere, read_supplied
    from efficientad_fast.training.inputs import check_output

    with _told_plainly():
        if out.suffix != ".safetensors":
            raise InputError(f"--out must end in .safetensors, got {str(out)!r}.")
        given = Supplied() if statistics is None else read_supplied(statistics)
        given = dataclasses.replace(
            given,
            images=images,
            threshold=given.threshold if threshold is None else threshold,
            padding=padding,
            size=None if size is None else _network_size(size),
        )
        check_output(out)
        with _Watch() as watch:
            loaded = load_elsewhere(source[0] if len(source) == 1 else source, given, watch.progress)
        loaded.detector.save(out)
        for note in loaded.notes:
            console.print(escape(note), soft_wrap=True)
        facts = loaded.detector.summary()
        console.print(
            f"saved {escape(str(out))}: {facts['model']}, {facts['network size']}, threshold "
            f"{loaded.detector.threshold:.4f}",
            soft_wrap=True,
        )


def _print_evaluation(evaluation: Evaluation) -> None:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    table = Table("test images", "scored", "flagged", "image AUROC")
    table.add_row("good", str(evaluation.good.images), str(evaluation.good.flagged), "")
    for name, kind in (*evaluation.kinds.items(), *((f"all {name}", kind) for name, kind in evaluation.groups.items())):
        table.add_row(escape(name), str(kind.images), str(kind.flagged), figure(kind.auroc))
    table.add_row("all", str(len(evaluation.images) - len(evaluation.failed)), "", figure(evaluation.auroc))
    console.print(table)
    console.print(f"pixel AUROC {figure(evaluation.pixel_auroc)}, AU-PRO (0.3) {figure(evaluation.au_pro)}")
    settings = evaluation.settings
    console.print(f"{settings['dtype']} on {settings['device']}, {evaluation.images_per_second:.1f} images/s")
    for note in evaluation.notes:
        console.print(escape(note), soft_wrap=True)


@app.command()
def distill(
    out: Annotated[Path, typer.Option(help="Where the teacher goes, a .safetensors file.")],
    images: Annotated[list[Path] | None, typer.Option(help="Folder of images to learn from; may be repeated.")] = None,
    synthetic: Annotated[int, typer.Option(min=0, help="Images the code generates, added to them.")] = 0,
    backbone: Annotated[
        str, typer.Option(help="'wide_resnet101_2' (extra 'timm') or 'efficientnet-lite0|1|2' (extra 'distill').")
    ] = "efficientnet-lite0",
    preset: Annotated[
        str, typer.Option(help="'paper' (60,000 steps) or 'quick' (about an hour on two cores).")
    ] = "paper",
    steps: Annotated[int | None, typer.Option(min=1, help="In place of the preset's.")] = None,
    model_size: Annotated[str, typer.Option(help="'s' or 'm'.")] = "s",
    holdout: Annotated[
        Path | None, typer.Option(help="Folder of other images to measure the explained variance on.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for cached targets (3 MB an image) and state.")] = None,
    data_name: Annotated[str, typer.Option(help="What the images are, stored in the file.")] = "not stated",
    terms: Annotated[str, typer.Option(help="Terms of use of the weights, stored in the file.")] = "not stated",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted distillation.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop an interrupted distillation, and targets of other images.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.")] = 0,
) -> None:
    """Distill a teacher from a pretrained backbone."""
    from efficientad_fast.data.folders import list_images
    from efficientad_fast.training.distill import (
        DistillImages,
        DistillSettings,
        kept_steps,
        kept_targets,
        quick_distillation,
    )
    from efficientad_fast.training.distill import distill as run

    with _told_plainly():
        if preset not in ("paper", "quick"):
            raise InputError(f"--preset must be 'paper' or 'quick', got {preset!r}.")
        if out.suffix != ".safetensors":
            raise InputError(f"--out must end in .safetensors, got {str(out)!r}.")
        settings = quick_distillation() if preset == "quick" else DistillSettings()
        settings = dataclasses.replace(
            settings, backbone=backbone, model_size=_model_size(model_size), steps=steps or settings.steps, seed=seed
        )
        files = tuple(path for folder in images or [] for path in list_images(folder))
        work = work or out.with_name(out.name + ".distillation")
        try:
            with _Watch() as watch:
                provenance = run(
                    DistillImages(files, synthetic, seed),
                    out,
                    settings,
                    work=work,
                    holdout=list_images(holdout) if holdout else (),
                    resume=resume,
                    restart=restart,
                    terms=terms,
                    data=data_name,
                    progress=watch.progress,
                    report_loss=lambda value: watch.losses(0, {"loss": value}),
                )
        except KeyboardInterrupt:
            _tell_stopped(kept_steps(work), settings.steps, kept_targets(work))
            raise typer.Exit(130) from None
        console.print(f"saved {escape(str(out))}: {escape(_teacher_line(provenance))}", soft_wrap=True)


@app.command()
def tune(
    model: Annotated[
        Path | None,
        typer.Option(help="A detector, in place of --model-size and --size."),
    ] = None,
    model_size: Annotated[str, typer.Option(help="'s' or 'm', with random weights.")] = "s",
    size: Annotated[str, typer.Option(help="Network size: N or HEIGHTxWIDTH, each side at least 256.")] = "256",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated (default: 1, 32).")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="'float16', 'bfloat16' or 'float8'; may be repeated (default: float16).")
    ] = None,
    device: Annotated[str, typer.Option(help="'cuda' or 'cuda:N'.")] = "cuda",
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Time every tile, not those alone that may be faster by the last ones.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Tune what was tuned before, too.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="At most, of each kernel in each shape.")] = 300.0,
) -> None:
    """Find the fastest tiles of the kernels for this GPU; predictions take them from then on.

    They are kept in a file of the user's, and hold for just the sizes that were timed: give the batch sizes and the
    detector that predictions will have. Ctrl-C keeps what was found; the same command goes on there.
    """
    import torch

    from efficientad_fast import tuning
    from efficientad_fast.detector import Detector
    from efficientad_fast.plan import parse_dtype
    from efficientad_fast.reference.preprocess import check_network_size

    with _told_plainly():
        chosen = tuning.parse_gpu(device)
        if model is None:
            source = tuning.random_source(_model_size(model_size), check_network_size(_network_size(size)))
        else:
            detector = Detector.load(model)
            source = detector.plan_input(detector.size)
        dtypes = [parse_dtype(one) for one in dict.fromkeys(dtype or ["float16"])]
        plans = tuning.plans_of(source, list(dict.fromkeys(batch or [1, 32])), dtypes, chosen)
        path = tuning.table_path()
        try:
            with torch.cuda.device(chosen):
                tuning.tune(
                    plans,
                    device_name=torch.cuda.get_device_name(chosen),
                    thorough=thorough,
                    again=again,
                    seconds=seconds,
                    tell=lambda line: console.print(escape(line), soft_wrap=True),
                )
        except KeyboardInterrupt:
            kept = escape(str(path))
            errors.print(f"stopped; what was found is in {kept}. Give the same command to go on.", soft_wrap=True)
            raise typer.Exit(130) from None
        console.print(f"tiles: {escape(str(path))}", soft_wrap=True)


@app.command()
def samples(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    seed: Annotated[int, typer.Option(help="Another seed, another set.")] = 0,
) -> None:
    """Generate a sample data set: rendered parts with structural and logical defects, MVTec AD layout."""
    from efficientad_fast.data.samples import generate_sample_set

    with _told_plainly():
        generate_sample_set(out, seed=seed)
        console.print(f"sample set: {escape(str(out))}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the samples, the detector and the report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the sample set and of training.")] = 0,
) -> None:
    """Generate samples, train, evaluate and write a report: the whole job in minutes."""
    from efficientad_fast.demo import run_demo

    with _told_plainly():
        console.print(f"teacher: {escape(_default_teacher_line())}", soft_wrap=True)
        with _Watch() as watch:
            result = run_demo(out, seed=seed, observer=watch)
        _print_evaluation(result.evaluation)
        console.print(
            f"baseline (best difference from the mean training image): image AUROC {result.baseline_auroc:.4f}"
        )
        console.print(f"report: {escape(str(result.report.resolve()))}", soft_wrap=True)


def _default_teacher_line() -> str:
    from efficientad_fast.weights import default_teacher_info

    return default_teacher_info()


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="A detector, to print what it is in place of the rest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print versions, what was built, and which backends work here; or what a detector is."""
    from efficientad_fast.detector import Detector
    from efficientad_fast.files import without_controls
    from efficientad_fast.info import collect, render, render_summary

    with _told_plainly():
        facts = collect() if model is None else Detector.load(model).summary()
        text = render(facts) if model is None else render_summary(facts)
        sys.stdout.write((json.dumps(facts, indent=2) if as_json else without_controls(text)) + "\n")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
