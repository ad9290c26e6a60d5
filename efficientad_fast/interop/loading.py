"""A detector from whatever holds one: finds out what a path is, and supplies what it does not hold."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientad_fast.data.folders import open_dataset
from efficientad_fast.detector import Detector
from efficientad_fast.errors import DetectorFileError, InputError
from efficientad_fast.files import is_folder
from efficientad_fast.interop import anomalib, fork
from efficientad_fast.interop.networks import HOW_GIVEN, QUANTILES, STATISTICS, Parts, network
from efficientad_fast.interop.reading import TensorRecord, is_torch_file, open_torch_file
from efficientad_fast.interop.unpickling import shown
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import FEATURE_CHANNELS, PatchDescriptionNetwork
from efficientad_fast.training.calibrate import (
    THRESHOLD_RULE,
    ChannelStatistics,
    calibrate,
    threshold_from_scores,
)

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_CHECKPOINTS = ("model.ckpt", "weights/lightning/model.ckpt", "latest/weights/lightning/model.ckpt")
"""Where anomalib puts its checkpoint, from a folder of its results."""

_COMPUTED = (STATISTICS, QUANTILES)

_QUANTILES = ("q_st_start", "q_st_end", "q_ae_start", "q_ae_end")

_MOST_NUMBERS = 2**16


@dataclass(frozen=True)
class Supplied:
    """What a file made elsewhere may lack, given by whoever loads it; ``None`` leaves it to the file.

    Attributes:
        images: a folder of good images, or a data set, to compute what is missing from.
        teacher_mean, teacher_std: of ``channels`` numbers, in any shape.
    """

    images: str | os.PathLike[str] | None = None
    teacher_mean: Tensor | None = None
    teacher_std: Tensor | None = None
    quantiles: Quantiles | None = None
    threshold: float | None = None
    size: tuple[int, int] | None = None
    padding: bool | None = None
    pad_maps: bool | None = None

    def __post_init__(self) -> None:
        for name in ("teacher_mean", "teacher_std"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise InputError(f"{name} must be a tensor with a number for each channel, got {type(value).__name__}.")

    def given(self) -> list[str]:
        """Names of what is not ``None``."""
        return [one.name for one in fields(self) if getattr(self, one.name) is not None]


@dataclass(frozen=True)
class Loaded:
    """A detector, and sentences for people on what was understood and what it lacks."""

    detector: Detector
    notes: tuple[str, ...]


def load_elsewhere(
    source: Source, supplied: Supplied, progress: Callable[[str, int, int], None] | None = None
) -> Loaded:
    """A detector from files that another implementation wrote.

    Args:
        source: a folder, a file, or three.
        progress: called with what is being done, images done, and images in all.

    Raises:
        DetectorFileError: it cannot be read, or a detector needs what neither it nor ``supplied`` has.
    """
    paths = detector_files(source)
    parts = _read(paths, supplied)
    mean = parts.teacher_mean if supplied.teacher_mean is None else supplied.teacher_mean.detach().flatten().float()
    std = parts.teacher_std if supplied.teacher_std is None else supplied.teacher_std.detach().flatten().float()
    quantiles = parts.quantiles if supplied.quantiles is None else supplied.quantiles
    threshold = parts.threshold if supplied.threshold is None else supplied.threshold
    has_statistics = mean is not None and std is not None
    there = {STATISTICS: has_statistics, QUANTILES: quantiles is not None}
    missing = [name for name in HOW_GIVEN if name in parts.required and not there.get(name, False)]
    if supplied.images is not None:
        missing = [name for name in missing if name not in _COMPUTED]
    if missing:
        raise _missing(paths, missing, parts)
    channels = parts.teacher.out_channels
    provenance = {**parts.provenance, "files": ", ".join(f"{path.name} (sha256 {_digest(path)})" for path in paths)}
    detector = Detector(
        parts.teacher,
        parts.student,
        parts.autoencoder,
        torch.zeros(channels) if mean is None or not has_statistics else mean,
        torch.ones(channels) if std is None or not has_statistics else std,
        quantiles,
        math.inf if threshold is None else threshold,
        parts.preprocessing or Preprocessing(),
        parts.map_convention,
        parts.pad_maps,
        provenance,
    )
    notes = list(parts.notes)
    if supplied.images is not None:
        dataset = open_dataset(supplied.images)
        trained, validation = (
            (list(dataset.train), list(dataset.validation)) if dataset.validation else fork.split(dataset.train)
        )
        computed: dict[str, str] = {}
        if not has_statistics:
            mean, std = _statistics(detector, trained, progress)
            detector = replace(detector, teacher_mean=mean, teacher_std=std)
            computed["statistics"] = f"computed on {len(trained)} images of {dataset.name}"
        of_validation = f"computed on {len(validation)} images of {dataset.name}"
        if quantiles is None:
            told = None if progress is None else lambda done, total: progress("quantiles", done, total)
            quantiles, scores = calibrate(detector, validation, progress=told)
            detector = replace(detector, quantiles=quantiles)
            computed["quantiles"] = of_validation
        elif threshold is None:
            scores = [one.score for one in detector.stream(validation)]
        if threshold is None:
            detector = replace(detector, threshold=threshold_from_scores(scores))
            computed["threshold_rule"] = f"{THRESHOLD_RULE}; {of_validation}"
            threshold = detector.threshold
        detector = replace(detector, provenance={**provenance, **computed})
        if not computed:
            notes.append("it has all that images are for, so that those given were not used.")
    if detector.quantiles is None:
        notes.append("it has no quantiles, so that maps are left as they are.")
    if threshold is None:
        notes.append(
            "it has no threshold, so that no image is called anomalous. Give threshold= (--threshold), or good images "
            "as images= (--images)."
        )
    return Loaded(detector, tuple(f"{paths[0]}: {note}" for note in notes))


def read_teacher(path: Path, *, padding: bool) -> tuple[PatchDescriptionNetwork, dict[str, Any]]:
    """A teacher from a file of the fork's or anomalib's, alone or in a checkpoint, and where it is from.

    Raises:
        DetectorFileError: the file cannot be read, or holds no teacher.
    """
    with open_torch_file(path) as file:
        state = anomalib.state_of(file)
        inside = (
            None if state is None else {name[8:]: one for name, one in state.items() if name.startswith("teacher.")}
        )
        found = network(file, file.value if inside is None else inside, padding=padding)
    if isinstance(found, torch.nn.Sequential):
        found = fork.recognised_teacher(path, found, padding=padding)
    if not isinstance(found, PatchDescriptionNetwork):
        raise DetectorFileError(f"{path} holds an autoencoder, and a teacher is needed.")
    if found.out_channels == 2 * FEATURE_CHANNELS:
        raise DetectorFileError(
            f"{path} holds a student: {found.out_channels} channels, twice a teacher's. Give the teacher's file."
        )
    return found, {"made_by": f"elsewhere: {path.name} (sha256 {_digest(path)})"}


def read_supplied(path: Path) -> Supplied:
    """Statistics, quantiles and threshold from a file.

    Args:
        path: JSON, or a dictionary that ``torch.save`` wrote, with numbers, lists or tensors under the names
            ``teacher_mean``, ``teacher_std``, ``q_st_start``, ``q_st_end``, ``q_ae_start``, ``q_ae_end``,
            ``threshold``, of which some may be missing.

    Raises:
        DetectorFileError: it cannot be read; InputError: other names or values.
    """
    known = ("teacher_mean", "teacher_std", *_QUANTILES, "threshold")
    if is_torch_file(path):
        with open_torch_file(path) as file:
            held = file.value if isinstance(file.value, dict) else {}
            values = {name: file.tensor(one) if isinstance(one, TensorRecord) else one for name, one in held.items()}
    else:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DetectorFileError(f"{path} cannot be read ({error.strerror or error}). Check the path.") from error
        except (RecursionError, ValueError) as error:
            raise DetectorFileError(f"{path} is neither JSON nor written by torch.save ({error}).") from error
    if not isinstance(values, dict) or not values or not set(values) <= set(known):
        raise InputError(f"{path} must hold some of {', '.join(known)}, and nothing else.")
    try:
        numbers = {name: _numbers(value) for name, value in values.items()}
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} must hold numbers, lists of numbers or tensors: {error}") from error
    present = [name in numbers for name in _QUANTILES]
    if any(present) and not all(present):
        raise InputError(f"{path} must hold all of {', '.join(_QUANTILES)}, or none.")
    single = {name: float(value) for name, value in numbers.items() if value.numel() == 1}
    if not {*_QUANTILES, "threshold"} & set(numbers) <= set(single):
        raise InputError(f"{path} must hold one number each for {', '.join(_QUANTILES)} and threshold.")
    return Supplied(
        teacher_mean=numbers.get("teacher_mean"),
        teacher_std=numbers.get("teacher_std"),
        quantiles=Quantiles(*(single[name] for name in _QUANTILES)) if all(present) else None,
        threshold=single.get("threshold"),
    )


def _numbers(value: Any) -> Tensor:
    """A tensor, a number, or lists of numbers, as a vector. A file may have the same list in a list many times over."""
    if isinstance(value, Tensor):
        return value.double().flatten()
    flat: list[float] = []
    waiting = [value]
    for _ in range(_MOST_NUMBERS):
        if not waiting:
            return torch.tensor(flat, dtype=torch.float64)
        one = waiting.pop()
        if isinstance(one, int | float):
            flat.append(float(one))
        elif not isinstance(one, list | tuple):
            raise TypeError(f"{shown(one)} is none")
        elif len(waiting) + len(one) > _MOST_NUMBERS:
            break
        else:
            waiting.extend(reversed(one))
    raise ValueError(f"more than {_MOST_NUMBERS} of them")


def detector_files(source: Source) -> list[Path]:
    """The files that a detector is loaded from: ``source`` itself, or of a folder those that hold one.

    Raises:
        DetectorFileError: there are none in the folder, or those of several detectors.
    """
    if not isinstance(source, str | os.PathLike):
        return [Path(one) for one in source]
    path = Path(source)
    if not is_folder(path):
        return [path]
    networks = fork.find_files(path)
    checkpoints = [path / one for one in _CHECKPOINTS if (path / one).is_file()] or sorted(path.glob("*.ckpt"))
    if networks and not checkpoints:
        return networks
    if not checkpoints:
        own = ", ".join(str(one) for one in sorted(path.glob("*.safetensors"))[:9])
        raise DetectorFileError(
            f"{path} holds no detector that was made elsewhere: neither the files "
            f"{', '.join(f'{role}_*.pth' for role in fork.ROLES)} of the widely used PyTorch implementation, nor a "
            f"checkpoint (.ckpt) of anomalib. Give the file itself{': ' + own if own else ''}."
        )
    if len(checkpoints) > 1 or networks:
        several = ", ".join(map(str, [*networks, *checkpoints]))
        raise DetectorFileError(f"{path} holds several detectors: {several}. Give the files of one.")
    return checkpoints[:1]


def _read(paths: list[Path], supplied: Supplied) -> Parts:
    if len(paths) == 3:
        return fork.read_parts(paths, supplied.size, padding=supplied.padding)
    if len(paths) != 1:
        raise InputError(f"A detector comes from a folder, one file or three, got {len(paths)} files.")
    with open_torch_file(paths[0]) as file:
        state = anomalib.state_of(file)
        if state is not None:
            return anomalib.read_parts(file, state, supplied.size, padding=supplied.padding, pad_maps=supplied.pad_maps)
        if isinstance(file.value, dict) and "model" in file.value and "state_dict" not in file.value:
            raise DetectorFileError(
                f"{file.source} looks like a model that anomalib exported. Give the checkpoint that it was exported "
                "from: results/EfficientAd/.../weights/lightning/model.ckpt."
            )
        network(file, file.value, padding=False)
    raise DetectorFileError(
        f"{paths[0]} holds one network, and a detector has three. Give the folder of "
        f"{', '.join(f'{role}_*.pth' for role in fork.ROLES)}, or all three files."
    )


def _missing(paths: list[Path], missing: list[str], parts: Parts) -> DetectorFileError:
    where = paths[0] if len(paths) == 1 else paths[0].parent
    in_python, by_command = (", ".join(dict.fromkeys(HOW_GIVEN[name][which] for name in missing)) for which in range(2))
    images = "a folder of good images as images= (--images) to compute them, or " if missing[0] in _COMPUTED else ""
    return DetectorFileError(
        " ".join(
            [
                f"{where} does not say: {', '.join(missing)}.",
                *parts.notes,
                f"Give {images}{in_python} (efficientad-fast convert: {by_command}).",
            ]
        )
    )


def _statistics(
    detector: Detector, images: Sequence[Path], progress: Callable[[str, int, int], None] | None
) -> tuple[Tensor, Tensor]:
    kept = ChannelStatistics()
    for index, path in enumerate(images):
        image = detector.preprocessing(detector.preprocessing.decode(path)).unsqueeze(0)
        with torch.inference_mode():
            kept.add(detector.teacher(image.contiguous(memory_format=torch.channels_last)))
        if progress is not None:
            progress("teacher statistics", index + 1, len(images))
    return kept.result()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
