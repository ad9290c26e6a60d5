"""From features to anomaly maps and scores. Source: SPEC "Maps and score"; paper, section 3.3 and 3.4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad_fast.reference.networks import FEATURE_BORDER, normalise_features, split_student

MapConvention = Literal["resized", "native"]
"""What happens first, see :func:`combine_resized` and :func:`combine_native`."""


@dataclass(frozen=True)
class Quantiles:
    """The two quantiles (0.9 and 0.995 of normal validation pixels) of each map, in squared feature units."""

    st_start: float
    st_end: float
    ae_start: float
    ae_end: float


def feature_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean over channels of the squared difference: two ``(N, C, h, w)`` to ``(N, 1, h, w)``, same dtype."""
    return ((first - second) ** 2).mean(dim=1, keepdim=True)


def raw_maps(
    teacher: Tensor, student: Tensor, autoencoder: Tensor, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(map_st, map_ae)``, each ``(N, 1, h, w)`` and >= 0, from the three networks' outputs.

    Args:
        teacher: ``(N, C, h, w)``, not normalised.
        student: ``(N, 2C, h, w)``.
        autoencoder: ``(N, C, h, w)``.
        mean, std: the teacher's channel statistics, ``(1, C, 1, 1)``; ``None`` leaves the teacher as it is.
    """
    if mean is not None and std is not None:
        teacher = normalise_features(teacher, mean, std)
    student_st, student_ae = split_student(student)
    return feature_distance(teacher, student_st), feature_distance(autoencoder, student_ae)


def normalise_map(raw: Tensor, start: float | Tensor, end: float | Tensor) -> Tensor:
    """Quantile normalisation: ``0.1 (raw - start) / (end - start)``, so that ``start`` is 0 and ``end`` is 0.1."""
    return 0.1 * (raw - start) / (end - start)


def pad_map(raw: Tensor, border: int = FEATURE_BORDER) -> Tensor:
    """Zeros on each side, in place of the features that a network without padding has no patch for."""
    return F.pad(raw, (border,) * 4)


def resize_map(raw: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, pixel areas aligned (``align_corners=False``), no antialiasing; ``(N, 1, h, w)``."""
    if tuple(raw.shape[-2:]) == tuple(size):
        return raw
    return F.interpolate(raw, tuple(size), mode="bilinear", align_corners=False)


def combine(map_st: Tensor, map_ae: Tensor, quantiles: Quantiles | None) -> Tensor:
    """``0.5 map_st' + 0.5 map_ae'``, each normalised by its own quantiles where there are any."""
    if quantiles is not None:
        map_st = normalise_map(map_st, quantiles.st_start, quantiles.st_end)
        map_ae = normalise_map(map_ae, quantiles.ae_start, quantiles.ae_end)
    return 0.5 * map_st + 0.5 * map_ae


def resized_raw_map(raw: Tensor, size: Sequence[int], *, pad_maps: bool) -> Tensor:
    """What the ``resized`` convention takes its quantiles over: the raw map padded and at the network size."""
    return resize_map(pad_map(raw) if pad_maps else raw, size)


def combine_resized(
    map_st: Tensor, map_ae: Tensor, quantiles: Quantiles | None, size: Sequence[int], *, pad_maps: bool
) -> Tensor:
    """The ``resized`` convention: pad and resize the raw maps, then normalise and combine.

    Returns ``(N, 1, *size)``; its maximum is the image score.
    """
    return combine(
        resized_raw_map(map_st, size, pad_maps=pad_maps), resized_raw_map(map_ae, size, pad_maps=pad_maps), quantiles
    )


def combine_native(map_st: Tensor, map_ae: Tensor, quantiles: Quantiles | None, *, pad_maps: bool) -> Tensor:
    """The ``native`` convention: normalise and combine at feature resolution, then pad.

    Returns ``(N, 1, h [+ 8], w [+ 8])``, to be resized to the size of the original image, where the score is taken.
    """
    combined = combine(map_st, map_ae, quantiles)
    return pad_map(combined) if pad_maps else combined


def image_score(anomaly_map: Tensor) -> Tensor:
    """Maximum over the pixels: ``(N, 1, H, W)`` to ``(N,)``. A NaN anywhere in a map makes its score NaN."""
    return torch.amax(anomaly_map, dim=(1, 2, 3))
