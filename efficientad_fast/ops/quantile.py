"""``quantile``: exact quantiles over all elements of a tensor, or of a stream of them.

Source: SPEC "Maps and score"; paper, section 3.4. Rank and interpolation are in float64; the result is rounded once:
``float32(numpy.quantile(values in float64, fractions))``, for any number of values. Three overloads:

``quantile(values, fractions) -> quantiles``

- values: float32 of any shape and strides, with at least one element. A NaN anywhere makes every quantile NaN;
  infinities are the largest and smallest of numbers, and what lies between a number and an infinity is not finite.
- fractions: any number of numbers in [0, 1].

quantiles is ``(len(fractions),)`` on the device of values. There is no gradient.

``quantile.out(values, fractions, *, out, workspace)``

The same, written into ``out``, contiguous. workspace is int64 ``(WORKSPACE,)``, contiguous; what it holds before and
after means nothing. Waits for nothing and allocates nothing on a device, where values are contiguous.

``quantile.count(values, prefixes, *, counts)``

For streams, by :func:`streamed`: adds to histograms. The 32 bits of a float32, all flipped where it is negative and the
sign alone where not, are a number with the same order; NaN counts as the largest, 2^32 - 1. values may be empty.

- prefixes: none, to count the upper 16 bits of these numbers, or different ones in [0, 65535], to count for each the
  lower 16 bits of those whose upper ones it is.
- counts: int64, contiguous, ``(65536,)`` where there are no prefixes, else ``(len(prefixes), 65536)``. NaN is in the
  last place of the first kind, and no number is.

Errors, in one sentence with argument, expected, got: `InputError` of the reference, RuntimeError of compiled kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops.overload import Overload, require, require_one_device
from efficientad_fast.reference.quantile import from_sortable, interpolate, ranks_between, sortable
from efficientad_fast.reference.quantile import quantile as exact_quantile

BUCKETS = 1 << 16
WORKSPACE = 3 * 4 * 2048 + 4 * 4
"""Elements of the workspace: a GPU takes two fractions at a time, hence four ranks, by digits of 11 bits."""


def check(values: Tensor, fractions: Sequence[float]) -> None:
    """What every implementation in Python refuses; csrc/quantile.h says the same for the compiled ones."""
    require(values.dtype == torch.float32, "quantile", "values", "float32", values.dtype)
    require(values.numel() >= 1, "quantile", "values", "at least one number", f"shape {tuple(values.shape)}")
    check_fractions(fractions)


def check_fractions(fractions: Sequence[float]) -> None:
    given = list(fractions)
    require(all(0 <= one <= 1 for one in given), "quantile", "fractions", "numbers in [0, 1]", given)


def check_outputs(values: Tensor, fractions: Sequence[float], out: Tensor, workspace: Tensor) -> None:
    """What :func:`check` does not know of the overload that writes into given outputs."""
    for name, given, shape, dtype in (
        ("out", out, (len(fractions),), torch.float32),
        ("workspace", workspace, (WORKSPACE,), torch.int64),
    ):
        _check_written(values, name, given, shape, dtype)


def check_count(values: Tensor, prefixes: Sequence[int], counts: Tensor) -> None:
    require(values.dtype == torch.float32, "quantile", "values", "float32", values.dtype)
    given = list(prefixes)
    different = len(set(given)) == len(given) and all(0 <= one < BUCKETS for one in given)
    require(different, "quantile", "prefixes", "different numbers in [0, 65535]", given)
    shape = (len(given), BUCKETS) if given else (BUCKETS,)
    _check_written(values, "counts", counts, shape, torch.int64)


def _check_written(values: Tensor, name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    require(given.shape == shape, "quantile", name, str(shape), tuple(given.shape))
    require(given.dtype == dtype, "quantile", name, str(dtype), given.dtype)
    require(given.is_contiguous(), "quantile", name, "contiguous", f"strides {given.stride()}")
    require_one_device("quantile", "values", values.device, {name: given})


def reference(values: Tensor, fractions: Sequence[float]) -> Tensor:
    check(values, fractions)
    return exact_quantile(values, fractions)


def fake(values: Tensor, fractions: Sequence[float]) -> Tensor:
    check(values, fractions)
    return values.new_empty(len(fractions))


def reference_out(values: Tensor, fractions: Sequence[float], *, out: Tensor, workspace: Tensor) -> None:
    fake_out(values, fractions, out=out, workspace=workspace)
    out.copy_(exact_quantile(values, fractions))


def fake_out(values: Tensor, fractions: Sequence[float], *, out: Tensor, workspace: Tensor) -> None:
    check(values, fractions)
    check_outputs(values, fractions, out, workspace)


def reference_count(values: Tensor, prefixes: Sequence[int], *, counts: Tensor) -> None:
    fake_count(values, prefixes, counts=counts)
    flat = values.reshape(-1)
    keys = torch.where(torch.isnan(flat), (1 << 32) - 1, sortable(flat))
    if not prefixes:
        counts += torch.bincount(keys >> 16, minlength=BUCKETS)
    for index, prefix in enumerate(prefixes):
        counts[index] += torch.bincount(keys[keys >> 16 == prefix] & 0xFFFF, minlength=BUCKETS)


def fake_count(values: Tensor, prefixes: Sequence[int], *, counts: Tensor) -> None:
    check_count(values, prefixes, counts)


def streamed(chunks: Callable[[], Iterable[Tensor]], fractions: Sequence[float]) -> list[float]:
    """Quantiles over all elements of a stream, which is read twice and never held: those of the default overload.

    Args:
        chunks: called twice; yields the same float32 tensors each time, of any shapes, on one device.
        fractions: numbers in [0, 1].

    Returns:
        One float per fraction; all NaN where there is a NaN in the stream.

    Raises:
        InputError, RuntimeError: an empty stream, another dtype, a fraction outside [0, 1].
    """
    check_fractions(fractions)
    coarse = _counted(chunks, [])
    total = int(coarse.sum())
    require(total >= 1, "quantile", "chunks", "at least one number", "none")
    if coarse[-1] > 0:
        return [math.nan] * len(fractions)
    ranks = ranks_between(fractions, total)
    ends = coarse.cumsum(0)
    wanted = sorted({rank for low, high, _ in ranks for rank in (low, high)})
    prefix_at = {rank: int(torch.searchsorted(ends, rank, right=True)) for rank in wanted}
    prefixes = sorted(set(prefix_at.values()))
    if not prefixes:
        return []
    fine_ends = dict(zip(prefixes, _counted(chunks, prefixes).cumsum(1), strict=True))

    def value_at(rank: int) -> float:
        prefix = prefix_at[rank]
        before = int(ends[prefix] - coarse[prefix])
        lower_bits = int(torch.searchsorted(fine_ends[prefix], rank - before, right=True))
        return from_sortable(prefix << 16 | lower_bits)

    exact = [interpolate(value_at(low), value_at(high), along) for low, high, along in ranks]
    rounded: list[float] = torch.tensor(exact, dtype=torch.float64).float().tolist()
    return rounded


def _counted(chunks: Callable[[], Iterable[Tensor]], prefixes: list[int]) -> Tensor:
    """The histograms of ``quantile.count`` over a stream, on the CPU."""
    ops.load()
    shape = (len(prefixes), BUCKETS) if prefixes else (BUCKETS,)
    counts: Tensor | None = None
    for chunk in chunks():
        if counts is None:
            counts = torch.zeros(shape, dtype=torch.int64, device=chunk.device)
        torch.ops.efficientad_fast.quantile.count(chunk.detach(), prefixes, counts=counts)
    return torch.zeros(shape, dtype=torch.int64) if counts is None else counts.cpu()


overloads = {
    "default": Overload(reference, fake),
    "out": Overload(reference_out, fake_out),
    "count": Overload(reference_count, fake_count),
}
