"""Quantiles and threshold from good validation images. Source: paper, section 3.4; SPEC "Maps and score"."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from efficientad_fast.detector import Detector
from efficientad_fast.errors import InputError
from efficientad_fast.ops.quantile import streamed
from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import Quantiles

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
    validation: Sequence[Path],
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Quantiles, list[float]]:
    """Exact quantiles of both maps over all pixels of ``validation``, and the images' scores with those quantiles.

    Each image goes through the networks once. Its raw maps at feature resolution (25 kB) are kept in a temporary file
    and resized again for each of the passes that exact quantiles and scores take, so memory does not grow with the
    number of images.

    Raises:
        InputError: no images, or a map whose quantiles are equal.
        ImageError: an image cannot be decoded.
    """
    if not validation:
        raise InputError("Calibration needs at least one validation image, got none.")
    plan = detector.plan(device)
    convention, size, pad_maps = detector.map_convention, detector.size, detector.pad_maps
    original_sizes = []
    # A file and no map of one into memory, whose pages would count as this process's.
    with tempfile.TemporaryFile(prefix="efficientad_fast-") as spool:
        shape: tuple[int, ...] = ()
        for index, path in enumerate(validation):
            image = detector.preprocessing.decode(path)
            original_sizes.append((image.shape[-2], image.shape[-1]))
            raw = plan.raw_maps(detector.preprocessing(image).unsqueeze(0))
            pair = torch.cat(raw).float().cpu().numpy()
            shape = pair.shape
            spool.write(pair.tobytes())
            if progress:
                progress(index + 1, len(validation))

        def raw_maps(index: int) -> tuple[Tensor, Tensor]:
            bytes_of_pair = math.prod(shape) * np.dtype(np.float32).itemsize
            spool.seek(index * bytes_of_pair)
            pair = torch.frombuffer(bytearray(spool.read(bytes_of_pair)), dtype=torch.float32).reshape(shape)
            return pair[:1], pair[1:]

        def one_map(which: int) -> Iterator[Tensor]:
            for index in range(len(validation)):
                raw = raw_maps(index)[which]
                yield maps.resized_raw_map(raw, size, pad_maps=pad_maps) if convention == "resized" else raw

        st = _checked("map_st", streamed(lambda: one_map(0), (START, END)))
        ae = _checked("map_ae", streamed(lambda: one_map(1), (START, END)))
        quantiles = Quantiles(st[0], st[1], ae[0], ae[1])
        scores = []
        for index, original_size in enumerate(original_sizes):
            # As predicting does it, bit for bit: an image must not be above the threshold that it set.
            scores.append(plan.scored_maps(*raw_maps(index), quantiles, [original_size])[0].item())
    return quantiles, scores


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
