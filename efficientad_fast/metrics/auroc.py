"""Area under the receiver operating characteristic, over images and over pixels.

Everything here rests on one observation. The curve "share of positives found" against "share of negatives flagged"
is the mean of the curves of the single positives, and the curve of one positive needs two numbers: the share of
negatives strictly above it and the share at or above it. So an area is a mean over positives of a closed form, exact
for any number of ties, and costs one sort of the negatives and one binary search for each positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from efficientad_fast.errors import InputError


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that an anomalous image scores above a good one, ties counting half.

    This equals the Mann-Whitney statistic with midranks.

    Args:
        scores: ``(N,)`` real numbers, higher is more anomalous; infinities are ranked, NaN is refused.
        labels: ``(N,)`` booleans, or 0 and 1; true is anomalous.

    Returns:
        The area, in [0, 1].

    Raises:
        InputError: the shapes differ, a score is NaN, a label is neither 0 nor 1, or one of the two classes is
            absent: the area does not exist then, and a made-up number or a NaN would travel on unnoticed.
    """
    values, positive = _scores_and_labels(scores, labels)
    return float(areas_per_positive(np.sort(values[~positive]), values[positive]).mean())


def roc_curve(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Points of the ROC curve, one for each distinct score, from strict to lax.

    Point ``i`` is what flagging every score >= ``thresholds[i]`` gives. The first threshold is infinity and flags
    nothing; a score of infinity is flagged from the second point on. Joined by straight lines, the points enclose
    :func:`image_auroc`.

    Args:
        scores: ``(N,)`` real numbers, as in :func:`image_auroc`.
        labels: ``(N,)`` booleans, or 0 and 1; true is anomalous.

    Returns:
        ``(fpr, tpr, thresholds)``: float64 arrays of one length; the rates rise from 0 to 1, the thresholds fall.

    Raises:
        InputError: as :func:`image_auroc`.
    """
    values, positive = _scores_and_labels(scores, labels)
    order = np.argsort(-values, kind="stable")
    values, positive = values[order], positive[order]
    last_of_tie = np.append(np.flatnonzero(values[1:] != values[:-1]), values.size - 1)
    found = np.cumsum(positive)[last_of_tie]
    flagged = last_of_tie + 1
    fpr = (flagged - found) / (flagged[-1] - found[-1])
    tpr = found / found[-1]
    return np.append(0.0, fpr), np.append(0.0, tpr), np.append(np.inf, values[last_of_tie])


def pixel_auroc(maps: Sequence[ArrayLike], masks: Sequence[ArrayLike]) -> float:
    """Area under the ROC curve over all pixels of all images.

    Holds one copy of the maps while it runs: 4 bytes a pixel for float32 maps.

    Args:
        maps: anomaly maps, each ``(H, W)`` in its own size, higher is more anomalous, without NaN.
        masks: for each map its ground truth in the same shape, nonzero where defective; all zero for a good image.

    Returns:
        The area, in [0, 1].

    Raises:
        InputError: the sequences differ in length or shape, a map holds NaN, or the masks have no defective or no
            good pixel.
    """
    pairs = check_maps(maps, masks)
    defective = np.concatenate([values[mask] for values, mask in pairs])
    if defective.size == 0:
        raise InputError("Pixel AUROC needs at least one defective pixel, and all masks are empty.")
    return float(areas_per_positive(sorted_good_pixels(pairs), defective).mean())


def areas_per_positive(
    negatives: NDArray[np.floating], positives: NDArray[np.floating], limit: float = 1.0
) -> NDArray[np.float64]:
    """Area under each positive's own ROC curve, up to a false-positive rate of ``limit``.

    A threshold sinking from above passes the negatives above the positive first (the curve is 0), then those tied
    with it (the curve rises in a straight line from 0 to 1), then the rest (the curve is 1).

    Args:
        negatives: ``(N,)`` scores in ascending order, N >= 1.
        positives: ``(P,)`` scores.
        limit: false-positive rate at which the area ends, in (0, 1].

    Returns:
        ``(P,)`` areas in [0, ``limit``].
    """
    count = negatives.size
    # In ascending order the searches walk the negatives once instead of missing the cache at every step.
    order = np.argsort(positives)
    rise, top = np.empty(positives.size), np.empty(positives.size)
    rise[order] = (count - np.searchsorted(negatives, positives[order], side="right")) / count
    top[order] = (count - np.searchsorted(negatives, positives[order], side="left")) / count
    end = np.clip(limit, rise, top)
    height = np.divide(end - rise, top - rise, out=np.zeros_like(rise), where=top > rise)
    areas: NDArray[np.float64] = 0.5 * (end - rise) * height + np.maximum(limit - top, 0.0)
    return areas


def check_maps(
    maps: Sequence[ArrayLike], masks: Sequence[ArrayLike]
) -> list[tuple[NDArray[np.floating], NDArray[np.bool_]]]:
    """Pair each map, in floating point of at least 32 bits, with its mask as booleans.

    Raises:
        InputError: the sequences differ in length, a map and its mask differ in shape, or a map holds NaN.
    """
    if len(maps) != len(masks):
        raise InputError(f"Each anomaly map needs its mask, got {len(maps)} maps and {len(masks)} masks.")
    pairs = []
    for index, (raw_map, raw_mask) in enumerate(zip(maps, masks, strict=True)):
        values = np.asarray(raw_map)
        values = values.astype(np.result_type(values.dtype, np.float32), copy=False)
        mask = np.asarray(raw_mask).astype(bool, copy=False)
        if values.ndim != 2 or values.shape != mask.shape:
            raise InputError(
                f"Map {index} and its mask must be two-dimensional and of one shape, "
                f"got {values.shape} and {mask.shape}. Resize one to the other."
            )
        if np.isnan(values).any():
            raise InputError(f"Map {index} holds NaN, which has no rank. Leave that image out.")
        pairs.append((values, mask))
    return pairs


def sorted_good_pixels(pairs: list[tuple[NDArray[np.floating], NDArray[np.bool_]]]) -> NDArray[np.floating]:
    """All values outside the masks, in ascending order.

    Raises:
        InputError: there are none.
    """
    counts = [mask.size - int(np.count_nonzero(mask)) for _, mask in pairs]
    if sum(counts) == 0:
        raise InputError("Pixel metrics need at least one good pixel, and the masks leave none.")
    good = np.empty(sum(counts), dtype=np.result_type(*{values.dtype for values, _ in pairs}))
    for (values, mask), stop, count in zip(pairs, np.cumsum(counts), counts, strict=True):
        good[stop - count : stop] = values[~mask]
    good.sort()
    return good


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values = np.asarray(scores, dtype=np.float64)
    flags = np.asarray(labels)
    if values.ndim != 1 or values.shape != flags.shape:
        raise InputError(f"scores and labels must be two vectors of one length, got {values.shape} and {flags.shape}.")
    if np.isnan(values).any():
        index = int(np.flatnonzero(np.isnan(values))[0])
        raise InputError(f"Score {index} is NaN, which has no rank. Leave that image out.")
    positive = flags.astype(bool)
    if not np.array_equal(positive, flags):
        raise InputError("labels must be booleans, or 0 (good) and 1 (anomalous).")
    if positive.all() or not positive.any():
        raise InputError(
            f"AUROC compares anomalous images with good ones, got {int(positive.sum())} anomalous "
            f"and {int((~positive).sum())} good."
        )
    return values, positive
