"""``anomaly_map`` in Triton. efficientad_fast/ops/anomaly_map.py is the contract.

Two neighbouring feature rows are expanded to the output's width once, and all output rows between them are blends of
the two: with 64 rows resized to 256, 4 of them for the 8 loads of a column. Resizing is linear, so that the sum of both
maps is resized, not each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientad_fast.ops import anomaly_map as contract

from .launching import launch, require_runnable, tiles

BLOCK_PAIRS, BLOCK_COLUMNS = 4, 128  # of the tile that a program expands
BLOCK = 1024  # elements of a program of drop_in


@triton.jit
def _combined(
    map_st_ptr,  # (w,) a row of map_st, strided
    map_ae_ptr,  # (w,) a row of map_ae, strided
    column,  # columns of the map, outside of it in the border
    within,  # whether there is such a row, and such a column
    st_stride_w,
    ae_stride_w,
    st,
    ae,
    inside,
    DTYPE: tl.constexpr,
):
    """st * map_st + ae * map_ae + inside, and zero in the border."""
    map_st = tl.load(map_st_ptr + column * st_stride_w, mask=within, other=0).to(DTYPE)
    map_ae = tl.load(map_ae_ptr + column * ae_stride_w, mask=within, other=0).to(DTYPE)
    return tl.where(within, st * map_st + ae * map_ae + inside, 0)


@triton.jit
def _expanded_row(
    map_st_ptr,  # (h, w), strided: one image of map_st
    map_ae_ptr,  # (h, w), strided: one image of map_ae
    row,  # of the map, outside of it in the border
    left,  # columns of the map between which an output is
    right,
    across,  # the part of the right one
    height,
    width,
    st_stride_h,
    st_stride_w,
    ae_stride_h,
    ae_stride_w,
    st,
    ae,
    inside,
    DTYPE: tl.constexpr,
):
    """A row of the padded, combined map, interpolated to the output's columns."""
    st_ptr = map_st_ptr + row * st_stride_h
    ae_ptr = map_ae_ptr + row * ae_stride_h
    within = (row >= 0) & (row < height)
    taken = within & (left >= 0) & (left < width)
    on_left = _combined(st_ptr, ae_ptr, left, taken, st_stride_w, ae_stride_w, st, ae, inside, DTYPE)
    taken = within & (right >= 0) & (right < width)
    on_right = _combined(st_ptr, ae_ptr, right, taken, st_stride_w, ae_stride_w, st, ae, inside, DTYPE)
    return (1 - across) * on_left + across * on_right


@triton.jit
def _first_output(row, length, target):
    """Of a resize from ``length`` to ``target``: the first output whose position is not before input ``row``."""
    # (y + 1/2) length / target - 1/2 >= row, in integers.
    return tl.where(row < 0, 0, (target * (2 * tl.maximum(row, 0) + 1) + length - 1) // (2 * length))


@triton.jit(
    do_not_specialize=[
        *("height", "width", "out_height", "border", "samples", "pair_tiles", "column_tiles"),
        *("st_stride_n", "st_stride_h", "ae_stride_n", "ae_stride_h"),
    ],
    do_not_specialize_on_alignment=["st_stride_w", "ae_stride_w"],  # only on being 1
)
def _resize_and_score(
    map_st_ptr,  # (N, 1, h, w), strided, floating
    map_ae_ptr,  # (N, 1, h, w), strided, floating
    anomaly_map_ptr,  # (N, 1, H, W), contiguous, DTYPE
    score_ptr,  # (N,), contiguous, DTYPE, -inf
    height,
    width,
    out_height,
    out_width,  # by it Triton knows whether 16 bytes can be stored at once
    border,
    samples,  # most output rows between two feature rows
    pair_tiles,
    column_tiles,
    st_stride_n,
    st_stride_h,
    st_stride_w,
    ae_stride_n,
    ae_stride_h,
    ae_stride_w,
    st: tl.float64,  # as Coefficients in csrc/anomaly_map.h
    ae: tl.float64,
    inside: tl.float64,
    outside: tl.float64,
    DTYPE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # The programs of an image meet in its score by an atomic maximum, which gives the same in any order. Therefore
    # it must start at -inf, which no program can see to without waiting for the others: a fill before the launch does.
    program = tl.program_id(0)
    tile = program % (pair_tiles * column_tiles)
    image = (program // (pair_tiles * column_tiles)).to(tl.int64)
    pair = ((tile // column_tiles) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)).to(tl.int64)[:, None] - 1
    x = ((tile % column_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)[None, :]
    padded_height = tl.full((), height, tl.int64) + 2 * border
    padded_width = tl.full((), width, tl.int64) + 2 * border
    rows = tl.full((), out_height, tl.int64)
    columns = tl.full((), out_width, tl.int64)
    st = tl.full((), st, DTYPE)
    ae = tl.full((), ae, DTYPE)
    inside = tl.full((), inside, DTYPE)
    outside = tl.full((), outside, DTYPE)

    # Position (x + 1/2) w / W - 1/2 as an integer and a remainder, both exact, and not before the first column.
    position = tl.maximum((2 * x + 1) * padded_width - columns, 0)
    left = tl.minimum(position // (2 * columns), padded_width - 1)
    # A side that keeps its length is copied: its neighbours count nothing, not zero times what may be inf.
    right = tl.where(padded_width == columns, -1, tl.minimum(left + 1, padded_width - 1))
    across = (position - left * 2 * columns).to(DTYPE) / (2 * columns).to(DTYPE)

    # Pair -1 is in front of the first row: the outputs there are the first row, blended with none of the second.
    upper = tl.minimum(tl.maximum(pair, 0), padded_height - 1)
    lower = tl.where(padded_height == rows, -1, tl.minimum(upper + 1, padded_height - 1))
    map_st_ptr += image * st_stride_n
    map_ae_ptr += image * ae_stride_n
    upper_row = _expanded_row(
        map_st_ptr,
        map_ae_ptr,
        upper - border,
        left - border,
        right - border,
        across,
        height,
        width,
        st_stride_h,
        st_stride_w,
        ae_stride_h,
        ae_stride_w,
        st,
        ae,
        inside,
        DTYPE,
    )
    lower_row = _expanded_row(
        map_st_ptr,
        map_ae_ptr,
        lower - border,
        left - border,
        right - border,
        across,
        height,
        width,
        st_stride_h,
        st_stride_w,
        ae_stride_h,
        ae_stride_w,
        st,
        ae,
        inside,
        DTYPE,
    )

    first = _first_output(pair, padded_height, rows)
    end = tl.minimum(_first_output(pair + 1, padded_height, rows), rows)
    largest = tl.full((BLOCK_PAIRS, BLOCK_COLUMNS), float("-inf"), DTYPE)
    sample = 0
    while sample < samples:  # range() takes no argument of a kernel in Triton 3.6's interpreter with NumPy 2.4
        y = first + sample
        beyond = tl.maximum((2 * y + 1) * padded_height - rows, 0) - upper * 2 * rows
        down = beyond.to(DTYPE) / (2 * rows).to(DTYPE)
        value = (1 - down) * upper_row + down * lower_row + outside
        taken = (y < end) & (x < columns)
        tl.store(anomaly_map_ptr + (image * rows + y) * columns + x, value, mask=taken)
        largest = tl.maximum(largest, tl.where(taken, value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
        sample += 1

    # tl.max may drop a NaN. This one is positive: for the atomic maximum, which compares bits, larger than inf.
    poisoned = largest != largest
    score = tl.max(tl.where(poisoned, float("-inf"), largest))
    score = tl.where(tl.max(poisoned.to(tl.int32)) > 0, float("nan"), score)
    tl.atomic_max(score_ptr + image, score, sem="relaxed")


@triton.jit
def _normalise_element(value, quantiles_ptr, stride, DTYPE: tl.constexpr):
    """0.1 (value - start) / (end - start)."""
    if quantiles_ptr is not None:
        start = tl.load(quantiles_ptr).to(tl.float64)
        end = tl.load(quantiles_ptr + stride).to(tl.float64)
        value = 0.1 * (value - start.to(DTYPE)) / (end - start).to(DTYPE)
    return value


@triton.jit(do_not_specialize=["st_quantiles_stride", "ae_quantiles_stride"])
def _normalise_and_combine(
    map_st_ptr,  # count elements, contiguous, floating
    map_ae_ptr,  # count elements, contiguous, floating
    st_quantiles_ptr,  # (2,): start and end, strided, floating; or None
    ae_quantiles_ptr,  # (2,), likewise
    combined_ptr,  # count elements, contiguous, the dtype both maps promote to
    st_result_ptr,  # count elements, contiguous, map_st's dtype
    ae_result_ptr,  # count elements, contiguous, map_ae's dtype
    count,
    st_quantiles_stride,
    ae_quantiles_stride,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    taken = index < count
    st = _normalise_element(
        tl.load(map_st_ptr + index, mask=taken).to(DTYPE), st_quantiles_ptr, st_quantiles_stride, DTYPE
    )
    ae = _normalise_element(
        tl.load(map_ae_ptr + index, mask=taken).to(DTYPE), ae_quantiles_ptr, ae_quantiles_stride, DTYPE
    )
    combined = 0.5 * st + 0.5 * ae
    tl.store(combined_ptr + index, combined.to(combined_ptr.dtype.element_ty), mask=taken)
    tl.store(st_result_ptr + index, st.to(st_result_ptr.dtype.element_ty), mask=taken)
    tl.store(ae_result_ptr + index, ae.to(ae_result_ptr.dtype.element_ty), mask=taken)


def _coefficients(quantiles: Sequence[float] | None, convention: str) -> tuple[float, float, float, float]:
    """st, ae, inside, outside as csrc/anomaly_map.h explains them."""
    if quantiles is None:
        return 0.5, 0.5, 0.0, 0.0
    st_start, st_end, ae_start, ae_end = quantiles
    st, ae = 0.05 / (st_end - st_start), 0.05 / (ae_end - ae_start)
    offset = -(st * st_start + ae * ae_start)
    return (st, ae, offset, 0.0) if convention == "native" else (st, ae, 0.0, offset)


def _resize_into(
    map_st: Tensor,
    map_ae: Tensor,
    quantiles: Sequence[float] | None,
    border: int,
    convention: str,
    anomaly_map: Tensor,
    score: Tensor,
) -> None:
    require_runnable("anomaly_map", "map_st", map_st)
    images, _, height, width = map_st.shape
    out_height, out_width = anomaly_map.shape[-2:]
    pair_tiles = tiles(height + 2 * border + 1, BLOCK_PAIRS)
    column_tiles = tiles(out_width, BLOCK_COLUMNS)
    score.fill_(-math.inf)
    launch(
        _resize_and_score,
        images * pair_tiles * column_tiles,
        map_st.device,
        [
            *(map_st, map_ae, anomaly_map, score),
            *(height, width, out_height, out_width, border, tiles(out_height, height + 2 * border)),
            *(pair_tiles, column_tiles),
            *(map_st.stride(0), map_st.stride(2), map_st.stride(3)),
            *(map_ae.stride(0), map_ae.stride(2), map_ae.stride(3)),
            *_coefficients(quantiles, convention),
        ],
        DTYPE=tl.float64 if anomaly_map.dtype == torch.float64 else tl.float32,
        BLOCK_PAIRS=BLOCK_PAIRS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
    )


def anomaly_map(
    map_st: Tensor,
    map_ae: Tensor,
    size: Sequence[int],
    quantiles: Sequence[float] | None = None,
    *,
    border: int = 0,
    convention: str = "resized",
) -> tuple[Tensor, Tensor]:
    """``anomaly_map`` of the catalogue."""
    results = contract.fake(map_st, map_ae, size, quantiles, border=border, convention=convention)
    _resize_into(map_st, map_ae, quantiles, border, convention, *results)
    return results


def anomaly_map_out(
    map_st: Tensor,
    map_ae: Tensor,
    quantiles: Sequence[float] | None = None,
    *,
    border: int = 0,
    convention: str = "resized",
    anomaly_map: Tensor,
    score: Tensor,
) -> None:
    """``anomaly_map.out`` of the catalogue."""
    contract.fake_out(
        map_st, map_ae, quantiles, border=border, convention=convention, anomaly_map=anomaly_map, score=score
    )
    _resize_into(map_st, map_ae, quantiles, border, convention, anomaly_map, score)


def anomaly_map_drop_in(
    map_st: Tensor, map_ae: Tensor, st_quantiles: Tensor | None = None, ae_quantiles: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``anomaly_map.drop_in`` of the catalogue."""
    results = contract.fake_drop_in(map_st, map_ae, st_quantiles, ae_quantiles)
    require_runnable("anomaly_map", "map_st", map_st)
    launch(
        _normalise_and_combine,
        tiles(map_st.numel(), BLOCK),
        map_st.device,
        [
            *(map_st.contiguous(), map_ae.contiguous(), st_quantiles, ae_quantiles, *results),
            map_st.numel(),
            *(0 if pair is None else pair.stride(0) for pair in (st_quantiles, ae_quantiles)),
        ],
        DTYPE=tl.float64 if results[0].dtype == torch.float64 else tl.float32,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return results


def representative_calls() -> dict[str, Callable[[], object]]:
    """What the kernel report compiles, with meta tensors inside `launching.recorded`."""

    def resize(dtype: torch.dtype) -> None:
        maps = [torch.empty(1, 1, 56, 56, dtype=dtype, device="meta") for _ in range(2)]
        anomaly_map(maps[0], maps[1], [256, 256], [0.0, 1.0, 0.0, 1.0], border=4)

    def drop_in() -> None:
        maps, pairs = ([torch.empty(shape, device="meta") for _ in range(2)] for shape in ((1, 1, 56, 56), (2,)))
        anomaly_map_drop_in(*maps, *pairs)

    return {
        "float32": lambda: resize(torch.float32),
        "float16": lambda: resize(torch.float16),
        "float64": lambda: resize(torch.float64),
        "drop-in": drop_in,
    }


overloads = {"default": anomaly_map, "out": anomaly_map_out, "drop_in": anomaly_map_drop_in}
