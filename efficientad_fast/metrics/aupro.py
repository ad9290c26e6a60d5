"""Area under the per-region overlap curve (AU-PRO).

Source: Bergmann et al., "Uninformed Students", CVPR 2020, and "The MVTec Anomaly Detection Dataset", IJCV 2021:
per-region overlap integrated up to a false-positive rate of 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from efficientad_fast.errors import InputError
from efficientad_fast.metrics.auroc import areas_per_positive, check_maps, sorted_good_pixels


def au_pro(maps: Sequence[ArrayLike], masks: Sequence[ArrayLike], fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap (PRO) curve up to a false-positive rate, divided by that rate.

    At a threshold, the PRO is the share of a defective region that is flagged, averaged over the regions of all
    images: a small region counts as much as a large one. Regions are the 8-connected components of the masks; the
    false-positive rate is over the pixels outside all masks, those of defective images included. Every distinct
    value is a threshold and neighbouring points are joined by straight lines, so the result is exact.

    Holds one copy of the maps while it runs: 4 bytes a pixel for float32 maps.

    Args:
        maps: anomaly maps, each ``(H, W)`` in its own size, higher is more anomalous, without NaN.
        masks: for each map its ground truth in the same shape, nonzero where defective; all zero for a good image.
        fpr_limit: false-positive rate at which the area ends, in (0, 1].

    Returns:
        The normalised area, in [0, 1].

    Raises:
        InputError: as :func:`~efficientad_fast.metrics.pixel_auroc`, or ``fpr_limit`` is outside (0, 1].
    """
    if not 0.0 < fpr_limit <= 1.0:
        raise InputError(f"fpr_limit must be above 0 and at most 1, got {fpr_limit}.")
    pairs = check_maps(maps, masks)
    good = sorted_good_pixels(pairs)
    total, regions = 0.0, 0
    for values, mask in pairs:
        labels, count = label_regions(mask)
        if count == 0:
            continue
        areas = areas_per_positive(good, values[mask], fpr_limit) / fpr_limit
        region = labels[mask] - 1
        total += float((np.bincount(region, weights=areas) / np.bincount(region)).sum())
        regions += count
    if regions == 0:
        raise InputError("AU-PRO needs at least one defective region, and all masks are empty.")
    return total / regions


def label_regions(mask: ArrayLike) -> tuple[NDArray[np.int32], int]:
    """Number the 8-connected regions of a mask.

    Args:
        mask: ``(H, W)``, nonzero inside regions.

    Returns:
        ``(labels, count)``: int32 ``(H, W)``, 0 outside the regions and 1 to ``count`` inside, numbered by the first
        pixel of each in reading order.

    Raises:
        InputError: the mask is not two-dimensional.
    """
    inside = np.asarray(mask).astype(bool, copy=False)
    if inside.ndim != 2:
        raise InputError(f"A mask must be two-dimensional, got shape {inside.shape}.")
    height, width = inside.shape

    # Runs of set pixels along the rows, as flat positions in rows one pixel longer: a run cannot cross a row's end,
    # and "touches, corners included" is one comparison of positions shifted by a row.
    stride = width + 1
    padded = np.zeros(height * stride + 1, dtype=np.int8)
    padded[1:].reshape(height, stride)[:, :width] = inside
    edges = np.diff(padded)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    first_above = np.searchsorted(stops, starts - stride, side="left")
    past_above = np.searchsorted(starts, stops - stride, side="right")

    parent = list(range(starts.size))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    for run, (first, past) in enumerate(zip(first_above.tolist(), past_above.tolist(), strict=True)):
        for above in range(first, past):
            low, high = sorted((root(above), root(run)))
            parent[high] = low

    roots = np.array([root(run) for run in range(starts.size)], dtype=np.int64)
    numbers = np.unique(roots, return_inverse=True)[1] + 1
    labels = np.zeros((height, width), dtype=np.int32)
    labels[inside] = np.repeat(numbers, stops - starts)
    return labels, int(numbers.max(initial=0))
