"""Exact quantiles of any number of values, at once or from a stream that is read twice.

The rank and the interpolation are computed in float64 and the result is rounded once to the values' dtype.
``torch.quantile`` interpolates in their dtype, and in some releases (2.13) refuses more than 2^24 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from efficientad_fast.errors import InputError


def ranks_between(quantiles: Sequence[float], count: int) -> list[tuple[int, int, float]]:
    """For each quantile: the two ranks it lies between and how far along, as ``numpy.quantile`` defines it."""
    if count == 0:
        raise InputError("A quantile needs at least one value, got none.")
    ranks = []
    for fraction in quantiles:
        if not 0 <= fraction <= 1:
            raise InputError(f"A quantile lies between 0 and 1, got {fraction}.")
        position = float(fraction) * (count - 1)
        lower = math.floor(position)
        ranks.append((lower, min(lower + 1, count - 1), position - lower))
    return ranks


def interpolate(lower: float, upper: float, along: float) -> float:
    # An infinite neighbour must not make a NaN of a rank that does not reach it.
    if along == 0 or lower == upper:
        return lower
    # From the nearer end, so that both ends are exact and the result never leaves [lower, upper].
    difference = upper - lower
    return lower + difference * along if along < 0.5 else upper - difference * (1 - along)


def quantile(values: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Quantiles over all elements of ``values``, ranks interpolated linearly.

    Args:
        values: a floating tensor of any shape with at least one element.
        quantiles: numbers in [0, 1].

    Returns:
        ``(len(quantiles),)``, dtype and device of ``values``; half precision is rounded to by way of float32. NaN where
        ``values`` holds a NaN; between a number and an infinity, not finite.

    Raises:
        InputError: no elements, or a quantile outside [0, 1].
    """
    flat = values.reshape(-1)
    ranks = ranks_between(quantiles, flat.numel())
    if bool(torch.isnan(flat).any()):
        return flat.new_full((len(ranks),), math.nan)
    ordered = torch.sort(flat).values
    results = [interpolate(ordered[low].item(), ordered[high].item(), along) for low, high, along in ranks]
    return torch.tensor(results, dtype=torch.float64).to(device=values.device, dtype=values.dtype)


_BUCKETS = 1 << 16


def sortable(values: Tensor) -> Tensor:
    """Float32 to int64 in [0, 2^32) with the same order: flip all bits of negatives, the sign bit of others."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


def from_sortable(key: int) -> float:
    bits = key - (1 << 31) if key >= 1 << 31 else 0xFFFFFFFF - key
    signed = bits - (1 << 32) if bits >= 1 << 31 else bits
    return float(torch.tensor(signed, dtype=torch.int32).view(torch.float32))


def streamed_quantiles(chunks: Callable[[], Iterable[Tensor]], quantiles: Sequence[float]) -> list[float]:
    """Quantiles over all elements of a stream of float32 tensors, which is read twice and never held.

    The first pass counts the upper 16 bits of every value, the second the lower 16 of those that share a bucket
    with a wanted rank: the values at the ranks come out exactly, in memory that does not depend on their number.

    Args:
        chunks: called twice; yields the same float32 tensors, of any shapes, each time.
        quantiles: numbers in [0, 1].

    Returns:
        One float per quantile, exactly ``float32(numpy.quantile(all values in float64))`` for finite values; all NaN
        where there is a NaN in the stream.

    Raises:
        InputError: an empty stream, another dtype, or a quantile outside [0, 1].
    """
    coarse = torch.zeros(_BUCKETS, dtype=torch.int64)
    for chunk in chunks():
        if chunk.dtype != torch.float32:
            raise InputError(f"Streamed quantiles take float32 values, got {chunk.dtype}.")
        flat = chunk.detach().cpu().reshape(-1)
        if bool(torch.isnan(flat).any()):
            return [math.nan] * len(quantiles)
        coarse += torch.bincount(sortable(flat) >> 16, minlength=_BUCKETS)
    ranks = ranks_between(quantiles, int(coarse.sum()))

    ends = torch.cumsum(coarse, 0)
    wanted = sorted({rank for low, high, _ in ranks for rank in (low, high)})
    buckets = [int(torch.searchsorted(ends, rank, right=True)) for rank in wanted]
    fine = {bucket: torch.zeros(_BUCKETS, dtype=torch.int64) for bucket in buckets}
    for chunk in chunks():
        keys = sortable(chunk.detach().cpu().reshape(-1))
        for bucket, counts in fine.items():
            counts += torch.bincount(keys[keys >> 16 == bucket] & 0xFFFF, minlength=_BUCKETS)

    value_at: dict[int, float] = {}
    for rank, bucket in zip(wanted, buckets, strict=True):
        before = int(ends[bucket] - coarse[bucket])
        lower_bits = int(torch.searchsorted(torch.cumsum(fine[bucket], 0), rank - before, right=True))
        value_at[rank] = from_sortable((bucket << 16) | lower_bits)
    results = [interpolate(value_at[low], value_at[high], along) for low, high, along in ranks]
    return [float(torch.tensor(result, dtype=torch.float64).to(torch.float32)) for result in results]
