"""``quantile`` in Triton. efficientad_fast/ops/quantile.py is the contract.

Selection by digits, as csrc/cuda/quantile_kernel.h explains it, with the same workspace: for two fractions at a time,
hence four ranks, histograms of three digits, the ranks among what is left, and the keys' digits up to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientad_fast.ops import quantile as contract

from .launching import launch, require_runnable, tiles

BLOCK = 4096  # numbers of a round of a program that counts digits
MOST_PROGRAMS = 1024  # of these, for a slot
COUNT_BLOCK = 1024  # numbers of a program of count
PAIR, SLOTS, BINS = 2, 4, 2048
DIGITS = ((21, 11), (10, 11), (0, 10))  # lowest bit, and number of bits

SIZES = {"SLOTS": SLOTS, "BINS": BINS}


@triton.jit
def _keys(numbers):
    """The bits of float32 as integers of the same order; NaN as the largest."""
    bits = numbers.to(tl.uint32, bitcast=True)
    keys = bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000)
    return tl.where(numbers != numbers, 0xFFFFFFFF, keys).to(tl.uint32)


@triton.jit
def _number(key):
    """Of a key, in float64."""
    bits = key ^ tl.where((key >> 31) != 0, 0x80000000, 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _prefix_ptr(workspace_ptr, digit, SLOTS: tl.constexpr, BINS: tl.constexpr):
    """(SLOTS,): the digits up to one. The ranks stand before those of digit 0."""
    return workspace_ptr + 3 * SLOTS * BINS + SLOTS + digit * SLOTS


@triton.jit
def _owner(workspace_ptr, slot, DIGIT: tl.constexpr, SLOTS: tl.constexpr, BINS: tl.constexpr):
    """The digits known before this one, and the first slot that has the same, which counts for both."""
    if DIGIT == 0:
        prefix = tl.full((), 0, tl.int64)
        owner = tl.full((), 0, tl.int32)
    else:
        slots = tl.arange(0, SLOTS)
        prefix_ptr = _prefix_ptr(workspace_ptr, DIGIT - 1, SLOTS, BINS)
        prefix = tl.load(prefix_ptr + slot)
        owner = tl.min(tl.where(tl.load(prefix_ptr + slots) == prefix, slots, SLOTS))
    return prefix, owner


@triton.jit
def _share(workspace_ptr, DIGIT: tl.constexpr, SLOTS: tl.constexpr, BINS: tl.constexpr):
    """Of a program that counts digits: slot, part of the numbers, digits known before, and whether its slot counts."""
    # Before the first digit all slots are one, and only its programs are started.
    slot = tl.program_id(0) % SLOTS if DIGIT > 0 else 0
    part = tl.program_id(0) // SLOTS if DIGIT > 0 else tl.program_id(0)
    prefix, owner = _owner(workspace_ptr, slot, DIGIT, SLOTS, BINS)
    return slot, part, prefix, owner == slot


@triton.jit
def _histogram(keys, taken, prefix, DIGIT: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr):
    """Of a digit of the keys that begin with the prefix."""
    if DIGIT > 0:
        taken = taken & ((keys >> (SHIFT + BITS)).to(tl.int64) == prefix)
    digits = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    return tl.histogram(digits, BINS, mask=taken)


@triton.jit
def _add_counts(workspace_ptr, slot, counts, DIGIT: tl.constexpr, SLOTS: tl.constexpr, BINS: tl.constexpr):
    bins = tl.arange(0, BINS)
    into = workspace_ptr + (DIGIT * SLOTS + slot) * BINS + bins
    tl.atomic_add(into, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _count_digits(
    values_ptr,  # count numbers, contiguous, float32
    workspace_ptr,  # of the contract
    count,
    rounds_step,  # numbers that all programs of a slot read in a round
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,  # lowest bit of this digit
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, part, prefix, counting = _share(workspace_ptr, DIGIT, SLOTS, BINS)
    if counting:
        counts = tl.zeros((BINS,), tl.int32)
        first = part.to(tl.int64) * BLOCK
        while first < count:
            index = first + tl.arange(0, BLOCK)
            taken = index < count
            keys = _keys(tl.load(values_ptr + index, mask=taken, other=0))
            counts += _histogram(keys, taken, prefix, DIGIT, SHIFT, BITS, BINS)
            first += rounds_step
        _add_counts(workspace_ptr, slot, counts, DIGIT, SLOTS, BINS)


@triton.jit
def _position(first, second, index, count):
    """Of one of two fractions: the lower of the ranks that it lies between, and how far along."""
    fraction = tl.where(index == 0, tl.full((), first, tl.float64), tl.full((), second, tl.float64))
    position = fraction * (tl.full((), count, tl.int64) - 1).to(tl.float64)
    low = position.to(tl.int64)
    return low, position - low.to(tl.float64)


@triton.jit(do_not_specialize=["count"])
def _select_digit(
    workspace_ptr,  # of the contract
    count,
    first: tl.float64,  # fractions
    second: tl.float64,
    DIGIT: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BINS: tl.constexpr,
):
    slot = tl.program_id(0)
    rank_ptr = workspace_ptr + 3 * SLOTS * BINS + slot
    prefix, owner = _owner(workspace_ptr, slot, DIGIT, SLOTS, BINS)
    if DIGIT == 0:
        low, _ = _position(first, second, slot // 2, count)
        rank = tl.minimum(low + slot % 2, tl.full((), count, tl.int64) - 1)
    else:
        rank = tl.load(rank_ptr)
    bins = tl.arange(0, BINS)
    counts = tl.load(workspace_ptr + (DIGIT * SLOTS + owner) * BINS + bins)
    digit = tl.sum((tl.cumsum(counts) <= rank).to(tl.int32))
    before = tl.sum(tl.where(bins < digit, counts, 0))
    tl.store(rank_ptr, rank - before)
    tl.store(_prefix_ptr(workspace_ptr, DIGIT, SLOTS, BINS) + slot, (prefix << BITS) | digit)


@triton.jit(do_not_specialize=["count", "fractions"], do_not_specialize_on_alignment=["out_ptr"])
def _interpolate(
    workspace_ptr,  # of the contract
    out_ptr,  # fractions numbers, float32
    count,
    fractions,  # 1 or 2
    first: tl.float64,
    second: tl.float64,
    SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    PAIR: tl.constexpr,
):
    index = tl.arange(0, PAIR)
    _, along = _position(first, second, index, count)
    key_ptr = _prefix_ptr(workspace_ptr, 2, SLOTS, BINS)
    lower = _number(tl.load(key_ptr + 2 * index).to(tl.uint32))
    upper = _number(tl.load(key_ptr + 2 * index + 1).to(tl.uint32))
    difference = upper - lower
    between = tl.where(along < 0.5, lower + difference * along, upper - difference * (1 - along))
    exact = tl.where((along == 0) | (lower == upper), lower, between)
    nan = tl.load(workspace_ptr + BINS - 1) > 0
    tl.store(out_ptr + index, tl.where(nan, float("nan"), exact).to(tl.float32), mask=index < fractions)


@triton.jit(do_not_specialize=["prefix"])
def _count(
    values_ptr,  # count numbers, contiguous, float32
    counts_ptr,  # (65536,), int64
    count,
    prefix,
    UPPER: tl.constexpr,  # the upper 16 bits of all, else the lower ones of those with the prefix
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    taken = index < count
    keys = _keys(tl.load(values_ptr + index, mask=taken, other=0))
    bins = (keys >> 16).to(tl.int32)
    if not UPPER:
        taken = taken & (bins == prefix)
        bins = (keys & 0xFFFF).to(tl.int32)
    tl.atomic_add(counts_ptr + bins, tl.full((BLOCK,), 1, tl.int64), mask=taken, sem="relaxed")


def select(
    pair: Sequence[float],
    count: int,
    out: Tensor,
    workspace: Tensor,
    count_digits: Callable[..., None],
) -> None:
    """Quantiles of ``count`` numbers that only ``count_digits`` knows.

    Args:
        pair: one or two fractions.
        out: as many quantiles.
        count_digits: given as ``slots`` how many slots have programs, and the constexprs of one digit: launches a
            kernel that adds the histograms of that digit to the workspace, as :func:`_count_digits` does.
    """
    device, both = workspace.device, (pair[0], pair[-1])
    workspace.zero_()
    for digit, (shift, bits) in enumerate(DIGITS):
        count_digits(slots=SLOTS if digit > 0 else 1, **SIZES, DIGIT=digit, SHIFT=shift, BITS=bits)
        # A product and a difference are not to be rounded as one.
        launch(
            _select_digit,
            SLOTS,
            device,
            [workspace, count, *both],
            **SIZES,
            DIGIT=digit,
            BITS=bits,
            num_warps=4,
            enable_fp_fusion=False,
        )
    launch(
        _interpolate,
        1,
        device,
        [workspace, out, count, len(pair), *both],
        **SIZES,
        PAIR=PAIR,
        num_warps=1,
        enable_fp_fusion=False,
    )


def _quantiles_into(values: Tensor, fractions: Sequence[float], out: Tensor, workspace: Tensor) -> None:
    require_runnable("quantile", "values", values)
    dense, count, device = values.contiguous(), values.numel(), values.device
    parts = min(tiles(count, BLOCK), MOST_PROGRAMS)

    def count_digits(slots: int, **constants: int) -> None:
        arguments = [dense, workspace, count, parts * BLOCK]
        launch(_count_digits, parts * slots, device, arguments, **constants, BLOCK=BLOCK, num_warps=8)

    for start in range(0, len(fractions), PAIR):
        pair = list(fractions[start : start + PAIR])
        select(pair, count, out[start:], workspace, count_digits)


def quantile(values: Tensor, fractions: Sequence[float]) -> Tensor:
    """``quantile`` of the catalogue."""
    out = contract.fake(values, fractions)
    workspace = torch.empty(contract.WORKSPACE, dtype=torch.int64, device=values.device)
    _quantiles_into(values, fractions, out, workspace)
    return out


def quantile_out(values: Tensor, fractions: Sequence[float], *, out: Tensor, workspace: Tensor) -> None:
    """``quantile.out`` of the catalogue."""
    contract.fake_out(values, fractions, out=out, workspace=workspace)
    _quantiles_into(values, fractions, out, workspace)


def quantile_count(values: Tensor, prefixes: Sequence[int], *, counts: Tensor) -> None:
    """``quantile.count`` of the catalogue."""
    contract.fake_count(values, prefixes, counts=counts)
    require_runnable("quantile", "values", values)
    dense, count = values.contiguous(), values.numel()
    for prefix, row in zip(prefixes or [0], counts if prefixes else [counts], strict=True):
        launch(
            _count,
            tiles(count, COUNT_BLOCK),
            values.device,
            [dense, row, count, prefix],
            UPPER=not prefixes,
            BLOCK=COUNT_BLOCK,
            num_warps=4,
        )


def representative_calls() -> dict[str, Callable[[], object]]:
    """What the kernel report compiles, with meta tensors inside `launching.recorded`."""
    values = torch.empty(32, 256, 256, device="meta")

    def count(prefixes: list[int]) -> None:
        shape = (len(prefixes), contract.BUCKETS) if prefixes else (contract.BUCKETS,)
        quantile_count(values, prefixes, counts=torch.empty(shape, dtype=torch.int64, device="meta"))

    return {
        "two fractions": lambda: quantile(values, [0.9, 0.995]),
        "upper bits": lambda: count([]),
        "lower bits": lambda: count([1]),
    }


overloads = {"default": quantile, "out": quantile_out, "count": quantile_count}
