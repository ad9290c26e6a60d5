"""Quantiles and threshold from good validation images. Source: paper, section 3.4; SPEC "Maps and score"."""

from __future__ import annotations

import datetime
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from efficientad_fast.data.folders import GOOD, open_dataset, split_validation
from efficientad_fast.detector import PRECISIONS, Detector, Precision, dtype_name
from efficientad_fast.errors import DatasetError, InputError
from efficientad_fast.ops.quantile import streamed
from efficientad_fast.plan import MixedPlan, Plan, parse_device, parse_dtype
from efficientad_fast.preprocessing import ImageSource
from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.version import __version__

START, END = 0.9, 0.995


def _checked(name: str, quantiles: Sequence[float]) -> tuple[float, float]:
    start, end = quantiles
    if not end > start:
        raise InputError(
            f"The {START} and {END} quantiles of {name} over the validation images are {start} and {end}, but must "
            "differ: quantile normalisation would divide by zero. Are the validation images blank or all the same? "
            "Give more varied ones."
        )
    return start, end


def calibrate(
    detector: Detector,
    validation: Sequence[ImageSource],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Quantiles, list[float]]:
    """Exact quantiles of both maps over all pixels of ``validation``, and the images' scores with those quantiles.

    Each image goes through the networks once. Its raw maps at feature resolution (25 kB) are kept in a temporary file
    and resized again for each of the passes that exact quantiles and scores take, so memory does not grow with the
    number of images.

    Args:
        dtype: of the networks.
        batch_size: images that go through them together.
        progress: called with (images done, images in all).

    Raises:
        InputError: no images, or a map whose quantiles are equal.
        ImageError: an image cannot be decoded.
    """
    with tempfile.TemporaryFile(prefix="efficientad_fast-") as spool:
        kept = _RawMaps(detector, detector.plan(device, dtype), spool)
        kept.add(validation, batch_size, progress)
        quantiles = kept.quantiles()
        return quantiles, kept.scores(quantiles)


def calibration_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that a detector may be calibrated in after training; anything else is an :class:`InputError`."""
    parsed = parse_dtype(dtype)
    if dtype_name(parsed) not in PRECISIONS:
        raise InputError(
            f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype_name(parsed)}: a detector's own quantiles and "
            "threshold are those of float32, and hold in float64."
        )
    return parsed


def images_for(detector: Detector, folder: Path) -> tuple[tuple[Path, ...], str]:
    """Good images of a folder or data set to calibrate a trained detector on, and which they are, for people.

    Those that the data set sets apart for validation; else those that training held back, where the folder has the name
    of the one it was given and as many good images; else all, as of a folder of new images.

    Raises:
        DatasetError: no images, or some that may be defective.
    """
    inside = folder.resolve()
    root = next((one for one in (inside.parent, inside.parent.parent) if (one / "train" / GOOD).is_dir()), None)
    if root is not None and inside.relative_to(root).parts[0] in ("test", "ground_truth") and inside.name != GOOD:
        raise DatasetError(
            f"{folder}: belongs to the test images of the data set {root}, which may be defective; give {root} to "
            "calibrate on its good ones"
        )
    dataset = open_dataset(folder)
    if dataset.validation:
        return dataset.validation, f"the {len(dataset.validation)} validation images of {folder}"
    facts = detector.provenance
    settings = facts.get("settings", {})
    seen = (facts.get("training_images", 0), facts.get("validation_images", 0))
    is_known = facts.get("data") == dataset.name and sum(seen) == len(dataset.train)
    if is_known and {"validation_fraction", "seed"} <= settings.keys():
        held_back = split_validation(dataset.train, settings["validation_fraction"], settings["seed"])[1]
        return held_back, f"the {len(held_back)} images of {folder} that training held back"
    count = len(dataset.train)
    return dataset.train, f"all {count} good images of {folder} (training images make the threshold too low)"


def estimate(
    detector: Detector,
    images: Sequence[ImageSource],
    name: str,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Precision:
    """What ``detector`` needs to know in the dtype ``name``: see :meth:`Detector.calibrated`."""

    def told(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else partial(progress, stage)

    target = parse_device(device)
    activations = None
    if name == "float8":
        activations = largest_activations(detector, images, target, batch_size, told("activations"))
    # With the detector's quantiles for now: raw maps do not depend on them.
    uncalibrated = Precision(detector.quantiles, math.inf, activations)
    started = replace(detector, precisions={name: uncalibrated})
    with tempfile.TemporaryFile(prefix="efficientad_fast-") as spool:
        kept = _RawMaps(started, started.plan(target, name), spool)
        kept.add(images, batch_size, told("calibration"))
        # A detector that leaves its maps as they are does so in every precision.
        quantiles = None if detector.quantiles is None else kept.quantiles()
        threshold = threshold_from_scores(kept.scores(quantiles))
    provenance = {
        "images": len(images),
        "threshold_rule": THRESHOLD_RULE,
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"efficientad_fast": __version__, "torch": torch.__version__},
    }
    return Precision(quantiles, threshold, activations, provenance)


def largest_activations(
    detector: Detector,
    images: Sequence[ImageSource],
    device: torch.device,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    """By layer, the largest activation of each channel over ``images``: ``(channels,)`` float32 each."""
    if device.type == "cuda":
        plan = detector.plan(device, "float16", backend="operators")
    else:
        plan = MixedPlan(detector.plan_input(detector.size), device, torch.float16)
    assert isinstance(plan, MixedPlan)
    largest: dict[str, Tensor] = {}
    done = 0
    for batch, sizes in _batches(detector, plan, images, batch_size):
        for layer, found in plan.observe(batch).items():
            largest[layer] = torch.maximum(largest[layer], found) if layer in largest else found
        done += len(sizes)
        if progress:
            progress(done, len(images))
    return largest


class ChannelStatistics:
    """Mean and standard deviation of each of the teacher's channels over all that was added, summed in float64."""

    def __init__(self) -> None:
        self._sum = self._squares = torch.zeros(())
        self._count = self._images = 0

    def add(self, features: Tensor) -> None:
        """Of one or more images: ``(N, C, h, w)``."""
        flat = features.movedim(1, 0).flatten(1).double()
        self._sum = self._sum.to(flat) + flat.sum(1)
        self._squares = self._squares.to(flat) + (flat**2).sum(1)
        self._count += flat.shape[1]
        self._images += len(features)

    def result(self) -> tuple[Tensor, Tensor]:
        """Two ``(C,)`` float32, on the CPU.

        Raises:
            InputError: nothing was added, or a channel that never changes.
        """
        if self._count == 0:
            raise InputError("The teacher's statistics need at least one image, got none.")
        mean = self._sum / self._count
        std = (self._squares / self._count - mean**2).clamp_min(0).sqrt()
        if not bool((std > 0).all()):
            raise InputError(
                f"{int((std <= 0).sum())} of the teacher's {len(std)} channels have the same value everywhere in the "
                f"{self._images} training images, so they cannot be normalised. Are the images blank?"
            )
        return mean.float().cpu(), std.float().cpu()


class _RawMaps:
    """Both raw maps of images, in a file.

    Args:
        spool: a file and no map of one into memory, whose pages would count as this process's.
    """

    def __init__(self, detector: Detector, plan: Plan, spool: IO[bytes]) -> None:
        self._detector = detector
        self._plan = plan
        self._spool = spool
        self._shape: tuple[int, ...] = ()  # of a pair, (2, 1, h, w)
        self._original_sizes: list[tuple[int, int]] = []

    def add(
        self, images: Sequence[ImageSource], batch_size: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        for batch, sizes in _batches(self._detector, self._plan, images, batch_size):
            self._original_sizes += sizes
            pairs = torch.stack(self._plan.raw_maps(batch), dim=1).float().cpu()
            self._shape = tuple(pairs.shape[1:])
            self._spool.write(pairs.numpy().tobytes())
            if progress:
                progress(len(self._original_sizes), len(images))

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        bytes_of_pair = math.prod(self._shape) * np.dtype(np.float32).itemsize
        self._spool.seek(index * bytes_of_pair)
        pair = torch.frombuffer(bytearray(self._spool.read(bytes_of_pair)), dtype=torch.float32).reshape(self._shape)
        pair = pair.to(self._plan.device)
        return pair[:1], pair[1:]

    def _one_map(self, which: int) -> Iterator[Tensor]:
        resized, size, pad_maps = (
            self._detector.map_convention == "resized",
            self._detector.size,
            self._detector.pad_maps,
        )
        for index in range(len(self._original_sizes)):
            raw = self._pair(index)[which]
            yield maps.resized_raw_map(raw, size, pad_maps=pad_maps) if resized else raw

    def quantiles(self) -> Quantiles:
        st = _checked("map_st", streamed(lambda: self._one_map(0), (START, END)))
        ae = _checked("map_ae", streamed(lambda: self._one_map(1), (START, END)))
        return Quantiles(st[0], st[1], ae[0], ae[1])

    def scores(self, quantiles: Quantiles | None) -> list[float]:
        # As predicting does it, bit for bit: an image must not be above the threshold that it set.
        return [
            self._plan.scored_maps(*self._pair(index), quantiles, [size])[0].item()
            for index, size in enumerate(self._original_sizes)
        ]


def _batches(
    detector: Detector, plan: Plan, images: Sequence[ImageSource], batch_size: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Preprocessed batches, and the images' sizes before that. Where the plan preprocesses on a GPU, so does this."""
    if not images:
        raise InputError("Calibration needs at least one validation image, got none.")
    for start in range(0, len(images), batch_size):
        decoded = [detector.preprocessing.decode(one) for one in images[start : start + batch_size]]
        place = plan.device if isinstance(plan, MixedPlan) else torch.device("cpu")
        batch = torch.stack([detector.preprocessing(image.to(place)) for image in decoded])
        yield batch, [(image.shape[-2], image.shape[-1]) for image in decoded]


THRESHOLD_RULE = "the larger of the highest validation score and their mean plus 3 standard deviations"


def threshold_from_scores(scores: Sequence[float]) -> float:
    """:data:`THRESHOLD_RULE`, for scores of good images alone.

    The highest score keeps every image seen so far below; with few images it is low by chance, and three standard
    deviations above the mean leave room for those not seen.

    Raises:
        InputError: no scores, or one that is not finite.
    """
    if not scores or not all(np.isfinite(scores)):
        raise InputError(f"A threshold needs finite scores of good images, got {list(scores)!r}.")
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return max(max(scores), statistics.fmean(scores) + 3 * spread)
