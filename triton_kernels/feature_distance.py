"""``feature_distance`` in Triton. efficientad_fast/ops/feature_distance.py is the contract.

A program sums both convolutions of some outputs for a tile of pixels, one behind the other, in the same registers, as
implicit_gemm.py explains it, and squares and adds them there. Outputs are divided among programs, for there are few
tiles of pixels in one image: each writes its sums, and the last of a tile to be done adds them all, in order, so that
who comes when changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientad_fast.ops import feature_distance as contract
from efficientad_fast.ops import packing

from . import implicit_gemm
from .implicit_gemm import (
    BY_LINE,
    BY_POINTERS,
    BY_ROWS,
    Operand,
    add_products,
    chosen_tile,
    facts,
    no_products,
    operand,
    pixels_of_tile,
    require_products,
    tiles_of,
    ways_to_load,
)
from .launching import launch, require_runnable, tiles
from .models import ModelSize, channels_last, last_channels

HEAVY = {"_feature_distance"}
"""Kernels that must run on tensor cores."""

candidates = implicit_gemm.candidates


@triton.jit
def _squares(sums, scale_ptr, bias_ptr, output, OUTPUTS_IN_ALL: tl.constexpr):
    """Of negative differences, added over a tile's outputs."""
    is_output = output < OUTPUTS_IN_ALL
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + output, mask=is_output, other=0.0)[None, :]
    if bias_ptr is not None:
        sums -= tl.load(bias_ptr + output, mask=is_output, other=0.0)[None, :]
    return tl.sum(tl.where(is_output[None, :], sums * sums, 0.0), 1)


@triton.jit
def _write(out_ptr, sums_ptr, squares, y, x, height, width, part, part_of, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """A tile's pixels of the map or, where there are several parts, of the part's sums."""
    place = y.to(tl.int64) * width + x
    taken = (y < height) & (x < width)
    if PARTS == 1:
        tl.store(out_ptr + place, squares / COUNT, mask=taken)
    else:
        # Past the first cache, which the multiprocessors do not share.
        tl.store(sums_ptr + part * part_of + place, squares, mask=taken, cache_modifier=".cg")


@triton.jit
def _write_total(out_ptr, sums_ptr, y, x, height, width, part_of, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """A tile's pixels of the map, from all parts' sums."""
    place = y.to(tl.int64) * width + x
    taken = (y < height) & (x < width)
    total = tl.load(sums_ptr + place, mask=taken, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        total += tl.load(sums_ptr + part * part_of + place, mask=taken, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + place, total / COUNT, mask=taken)


@triton.jit(
    do_not_specialize=[
        *("first_height", "first_width", "second_height", "second_width", "out_height", "out_width"),
        *("padding_first", "padding_second", "row_tiles", "column_tiles", "pixels"),
    ],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def _feature_distance(
    first,  # (N, H, W, C): descriptor, or pointer
    first_weights,  # (OUTPUTS_IN_ALL, k * k * C): descriptor, or pointer
    second,  # likewise; or None
    second_weights,
    scale_ptr,  # (OUTPUTS_IN_ALL,) float32; or None
    bias_ptr,  # (OUTPUTS_IN_ALL,) float32; or None
    out_ptr,  # (N, 1, h, w) float32, contiguous
    sums_ptr,  # (PARTS, N * h * w) float32
    counts_ptr,  # a tile's programs that are done, int32: zeros before and after
    first_height,
    first_width,
    second_height,
    second_width,
    out_height,
    out_width,
    padding_first,
    padding_second,
    row_tiles,
    column_tiles,
    pixels,  # N * h * w
    first_stride_n,
    first_stride_h,
    first_stride_w,
    second_stride_n,
    second_stride_h,
    second_stride_w,
    OUTPUTS_IN_ALL: tl.constexpr,
    PARTS: tl.constexpr,  # programs among which a tile's outputs are divided
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIRST_CHANNELS: tl.constexpr,
    FIRST_KERNEL: tl.constexpr,
    FIRST_DEPTH: tl.constexpr,
    FIRST_LOADS: tl.constexpr,
    FIRST_PACKED: tl.constexpr,
    SECOND_CHANNELS: tl.constexpr,
    SECOND_KERNEL: tl.constexpr,
    SECOND_DEPTH: tl.constexpr,
    SECOND_LOADS: tl.constexpr,
    SECOND_PACKED: tl.constexpr,
    PRECISE: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % PARTS
    tile = program // PARTS
    column_tile = tile % column_tiles
    row_tile = (tile // column_tiles) % row_tiles
    image = tile // (column_tiles * row_tiles)
    row = row_tile * ROWS
    column = column_tile * (ROWS * COLUMNS if FIRST_LOADS == 1 else COLUMNS)
    # Sums of two rows are apart only where both are loaded by rows.
    sums, sums_below = no_products(ROWS, COLUMNS, OUTPUTS, FIRST_LOADS)
    sums, sums_below = add_products(
        sums,
        sums_below,
        first,
        first_weights,
        image,
        row - padding_first,
        column - padding_first,
        0,
        part * OUTPUTS,
        OUTPUTS_IN_ALL,
        first_height,
        first_width,
        first_stride_n,
        first_stride_h,
        first_stride_w,
        FIRST_CHANNELS,
        FIRST_KERNEL,
        ROWS,
        COLUMNS,
        OUTPUTS,
        FIRST_DEPTH,
        FIRST_LOADS,
        FIRST_PACKED,
        PRECISE,
    )
    # The difference turned round, whose square is the same.
    sums, sums_below = -sums, -sums_below
    if second is not None:
        sums, sums_below = add_products(
            sums,
            sums_below,
            second,
            second_weights,
            image,
            row - padding_second,
            column - padding_second,
            0,
            part * OUTPUTS,
            OUTPUTS_IN_ALL,
            second_height,
            second_width,
            second_stride_n,
            second_stride_h,
            second_stride_w,
            SECOND_CHANNELS,
            SECOND_KERNEL,
            ROWS,
            COLUMNS,
            OUTPUTS,
            SECOND_DEPTH,
            SECOND_LOADS,
            SECOND_PACKED,
            PRECISE,
        )
    output = part * OUTPUTS + tl.arange(0, OUTPUTS)
    squares = _squares(sums, scale_ptr, bias_ptr, output, OUTPUTS_IN_ALL)
    out_ptr += image.to(tl.int64) * out_height * out_width
    sums_ptr += image.to(tl.int64) * out_height * out_width
    y, x = pixels_of_tile(row, column, first_width, ROWS, COLUMNS, FIRST_LOADS)
    # By 64 bits, for all parts' sums may be more than 32 can count.
    part_of = tl.full((), pixels, tl.int64)
    _write(out_ptr, sums_ptr, squares, y, x, out_height, out_width, part, part_of, OUTPUTS_IN_ALL, PARTS)
    TWO: tl.constexpr = FIRST_LOADS == 0 and ROWS == 2
    if TWO:
        squares = _squares(sums_below, scale_ptr, bias_ptr, output, OUTPUTS_IN_ALL)
        _write(out_ptr, sums_ptr, squares, y + 1, x, out_height, out_width, part, part_of, OUTPUTS_IN_ALL, PARTS)
    if PARTS > 1:
        # All threads have written before one of them says so; who hears it from the others reads what they wrote.
        tl.debug_barrier()
        done = tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if done == PARTS - 1:
            _write_total(out_ptr, sums_ptr, y, x, out_height, out_width, part_of, OUTPUTS_IN_ALL, PARTS)
            if TWO:
                _write_total(out_ptr, sums_ptr, y + 1, x, out_height, out_width, part_of, OUTPUTS_IN_ALL, PARTS)
            tl.store(counts_ptr + tile, 0)


def feature_distance_mixed(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """``feature_distance.mixed`` of the catalogue."""
    given = (first, weight_first, second, weight_second, scale, bias)
    contract.check_mixed(*given, padding_first, padding_second, out, workspace)
    require_runnable("feature_distance", "first", first)
    require_products("feature_distance", "first", first)
    outputs, pixels = weight_first.shape[0], out.numel()
    images, _, height, width = out.shape
    first = packing.mixed(first)
    paddings, pair = (padding_first, padding_second), [first]
    if second is not None:
        second = packing.mixed(second)
        pair.append(second)
    line = paddings == (0, 0) and len({images_of.shape[3] for images_of in pair}) == 1
    stated = facts(first, weight_first, 1, height, width, line=line)
    if weight_second is not None:
        stated |= {"channels": weight_second.shape[1], "kernel": weight_second.shape[2]}
    tile = chosen_tile("feature_distance", stated)
    if tile["outputs"] < outputs:
        tile["outputs"] = max(tile["outputs"], contract.FEWEST_OUTPUTS)
    ways = [ways_to_load(images_of, 1, tile, line=line) for images_of in pair]
    if BY_LINE in ways and len(set(ways)) > 1:
        ways = [ways_to_load(images_of, 1, tile, line=False) for images_of in pair]
    if BY_ROWS in ways and len(set(ways)) > 1 and tile["rows"] > 1:
        ways = [BY_POINTERS if way == BY_ROWS else way for way in ways]
    one = operand(first, weight_first, 1, tile, ways[0])
    other = Operand(None, None, (0, 0, 0), one.constants)
    if second is not None and weight_second is not None:
        other = operand(second, weight_second, 1, tile, ways[1])
    parts = tiles(outputs, tile["outputs"])
    counts = tiles_of(ways[0], tile, height, width, first.shape[3])
    tiled = images * counts[0] * counts[1]
    known = {
        f"{name}_{constant}": value
        for name, operand_ in (("FIRST", one), ("SECOND", other))
        for constant, value in operand_.constants.items()
        if constant != "PRECISE"
    }
    launch(
        _feature_distance,
        tiled * parts,
        first.device,
        [
            *(one.images, one.weights, other.images, other.weights, scale, bias, out),
            # From the end, in a part where no call that shares the workspace writes sums.
            *(workspace, workspace.view(torch.int32)[-tiled:] if tiled else workspace.view(torch.int32)),
            *(*first.shape[2:], *(first if second is None else second).shape[2:], height, width),
            *(padding_first, padding_second, *counts, pixels, *one.strides, *other.strides),
        ],
        **known,
        OUTPUTS_IN_ALL=outputs,
        PARTS=parts,
        ROWS=tile["rows"],
        COLUMNS=tile["columns"],
        OUTPUTS=tile["outputs"],
        PRECISE=one.constants["PRECISE"],
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )


def feature_distance(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    bias: Tensor | None = None,
    **paddings: int,
) -> Tensor:
    """``feature_distance`` of the catalogue, with its other arguments in ``paddings``."""
    out = contract.fake(first, weight_first, second, weight_second, bias, **paddings)
    numbers = contract.mixed_workspace_size(out.shape[0], out.shape[2], out.shape[3], weight_first.shape[0])
    workspace = out.new_zeros(numbers)
    feature_distance_mixed(
        first, weight_first, second, weight_second, None, bias, out=out, workspace=workspace, **paddings
    )
    return out


def model_calls(model_size: ModelSize, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What EfficientAD-S and -M ask for at 256 x 256, in batches of 1 and 32, for the kernel report."""
    (of_teacher, of_student), kernel = last_channels(model_size)
    last, features = 384, 56
    side = features + kernel - 1

    def features_of(images: int, count: int, side: int) -> Tensor:
        return channels_last(torch.empty(images, count, side, side, dtype=dtype, device="meta"))

    def weight_of(count: int, side: int) -> Tensor:
        return channels_last(torch.empty(last, count, side, side, dtype=dtype, device="meta"))

    def call(layer: str, images: int) -> None:
        if of_teacher == of_student:  # written together
            teacher, student = features_of(images, of_teacher + of_student, side).chunk(2, 1)
        else:
            teacher, student = features_of(images, of_teacher, side), features_of(images, of_student, side)
        first, weight_first, padding = teacher, weight_of(of_teacher, kernel), 0
        if layer == "map_ae":
            first, weight_first, padding = features_of(images, 64, features), weight_of(64, 3), 1
        scale, bias = (torch.empty(last, device="meta") for _ in range(2))
        feature_distance_mixed(
            first,
            weight_first,
            student,
            weight_of(of_student, kernel),
            scale,
            bias,
            padding_first=padding,
            out=torch.empty(images, 1, features, features, device="meta"),
            workspace=torch.empty(contract.mixed_workspace_size(images, features, features, last), device="meta"),
        )

    return {
        f"{layer}, batch {images}": partial(call, layer, images) for layer in ("map_st", "map_ae") for images in (1, 32)
    }


def representative_calls() -> dict[str, Callable[[], object]]:
    """What the kernel report compiles, with meta tensors inside `launching.recorded`."""
    return {
        f"{name} of {model_size.upper()}": call
        for model_size in get_args(ModelSize)
        for name, call in model_calls(model_size, torch.float16).items()
    }


overloads = {"default": feature_distance, "mixed": feature_distance_mixed}
