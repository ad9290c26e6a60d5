"""``conv_pool`` in Triton. efficientad_fast/ops/conv_pool.py is the contract.

A program makes a tile of outputs for a tile of pixels, as implicit_gemm.py explains it; the sums stay in registers
until they are scaled, rectified and averaged over 2x2 pixels, so that only what is left is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientad_fast.ops import conv_pool as contract
from efficientad_fast.ops import packing

from . import implicit_gemm
from .implicit_gemm import (
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
from .models import Convolution, ModelSize, channels_last, convolutions

LARGEST_E4M3 = tl.constexpr(packing.LARGEST_E4M3)

HEAVY = {"_conv_pool"}
"""Kernels that must run on tensor cores, but for images of few channels."""

candidates = implicit_gemm.candidates


@triton.jit
def narrowed(numbers, DTYPE: tl.constexpr):
    """Rounded to ``DTYPE``, in e4m3 to its largest number where they are larger."""
    if tl.float8e4nv == DTYPE:
        numbers = tl.clamp(numbers, -LARGEST_E4M3, LARGEST_E4M3, propagate_nan=tl.PropagateNan.ALL)
    return numbers.to(DTYPE)


@triton.jit
def _made(
    sums, scale_ptr, bias_ptr, output, is_output, y, x, height, width, RELU: tl.constexpr, POOL_PADDING: tl.constexpr
):
    """What the convolution makes of its products; zeros outside of it, for who averages them."""
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + output, mask=is_output, other=0.0)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + output, mask=is_output, other=0.0)[None, :]
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if POOL_PADDING > 0:
        made = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        sums = tl.where(made[:, None], sums, 0.0)
    return sums


@triton.jit
def _write(out_ptr, numbers, output, is_output, y, x, height, width, CHANNELS: tl.constexpr):
    """Into one image, ``(height, width, CHANNELS)``, what lies in it."""
    places = (y.to(tl.int64) * width + x) * CHANNELS
    written = ((y < height) & (x < width))[:, None] & is_output[None, :]
    tl.store(out_ptr + places[:, None] + output[None, :], narrowed(numbers, out_ptr.dtype.element_ty), mask=written)


@triton.jit(
    do_not_specialize=[
        *("height", "width", "made_height", "made_width", "out_height", "out_width", "padding"),
        *("row_tiles", "column_tiles", "output_tiles"),
    ]
)
def _conv_pool(
    images,  # (N, H, W, C * groups): descriptor, or pointer
    weights,  # (O * groups, k * k * C): descriptor, or pointer
    scale_ptr,  # (O * groups,) float32; or None
    bias_ptr,  # (O * groups,) float32; or None
    out_ptr,  # (N, h, w, O * groups), contiguous
    height,
    width,
    made_height,  # by the convolution, before pooling
    made_width,
    out_height,
    out_width,
    padding,
    row_tiles,
    column_tiles,
    output_tiles,  # of a group
    stride_n,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,  # of a group, as the next
    GROUP_OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    POOL_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISE: tl.constexpr,
):
    # Programs beside each other read the same pixels.
    program = tl.program_id(0)
    output_tile = program % output_tiles
    rest = program // output_tiles
    group = rest % GROUPS
    rest = rest // GROUPS
    column_tile = rest % column_tiles
    rest = rest // column_tiles
    row_tile = rest % row_tiles
    image = rest // row_tiles

    # Of what the convolution makes, of which pooling may begin one pixel before the first. By line it does not pool.
    row = row_tile * ROWS - POOL_PADDING
    column = column_tile * (ROWS * COLUMNS if LOADS == 1 else COLUMNS) - POOL_PADDING
    first_output = group * GROUP_OUTPUTS + output_tile * OUTPUTS
    last_output = (group + 1) * GROUP_OUTPUTS
    if LOADS > 1:
        images += group * CHANNELS
    sums, sums_below = no_products(ROWS, COLUMNS, OUTPUTS, LOADS)
    sums, sums_below = add_products(
        sums,
        sums_below,
        images,
        weights,
        image,
        row - padding,
        column - padding,
        group * CHANNELS,
        first_output,
        last_output,
        height,
        width,
        stride_n,
        stride_h,
        stride_w,
        CHANNELS,
        KERNEL,
        ROWS,
        COLUMNS,
        OUTPUTS,
        DEPTH,
        LOADS,
        PACKED,
        PRECISE,
    )

    output = first_output + tl.arange(0, OUTPUTS)
    is_output = output < last_output
    y, x = pixels_of_tile(row, column, width, ROWS, COLUMNS, LOADS)
    sums = _made(sums, scale_ptr, bias_ptr, output, is_output, y, x, made_height, made_width, RELU, POOL_PADDING)
    if LOADS == 0 and ROWS == 2:
        y_below = y + 1
        sums_below = _made(
            sums_below, scale_ptr, bias_ptr, output, is_output, y_below, x, made_height, made_width, RELU, POOL_PADDING
        )
    out_ptr += image.to(tl.int64) * out_height * out_width * (GROUPS * GROUP_OUTPUTS)
    if POOL:
        # A quad's sums are in one thread or in neighbours, where a tile has two rows or eight columns.
        if LOADS == 0:
            pairs = (sums + sums_below).reshape(COLUMNS // 2, 2, OUTPUTS)
            sums = tl.sum(pairs, 1) * 0.25
            y, x = pixels_of_tile(row_tile, column_tile * (COLUMNS // 2), 1, 1, COLUMNS // 2, 0)
        else:
            quads = sums.reshape(ROWS // 2, 2, COLUMNS // 2, 2, OUTPUTS)
            sums = tl.sum(tl.sum(quads, 1), 2).reshape(ROWS * COLUMNS // 4, OUTPUTS) * 0.25
            first_row = row_tile * (ROWS // 2)
            y, x = pixels_of_tile(first_row, column_tile * (COLUMNS // 2), 1, ROWS // 2, COLUMNS // 2, 2)
        _write(out_ptr, sums, output, is_output, y, x, out_height, out_width, GROUPS * GROUP_OUTPUTS)
    else:
        _write(out_ptr, sums, output, is_output, y, x, out_height, out_width, GROUPS * GROUP_OUTPUTS)
        if LOADS == 0 and ROWS == 2:
            _write(out_ptr, sums_below, output, is_output, y_below, x, out_height, out_width, GROUPS * GROUP_OUTPUTS)


def conv_pool_mixed(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
    out: Tensor,
) -> None:
    """``conv_pool.mixed`` of the catalogue."""
    contract.check_mixed(input, weight, scale, bias, padding, pool, pool_padding, groups, out)
    require_runnable("conv_pool", "input", input)
    require_products("conv_pool", "input", input)
    require_products("conv_pool", "out", out)
    images, outputs, out_height, out_width = out.shape
    made_height, made_width = (side + 2 * padding - weight.shape[2] + 1 for side in input.shape[2:])
    line = padding == 0 and not pool
    stated = facts(input, weight, groups, made_height, made_width, line=line) | {"pool": pool}
    tile = chosen_tile("conv_pool", stated)
    input = packing.mixed(input)
    loads = ways_to_load(input, groups, tile, line=line)
    given = operand(input, weight, groups, tile, loads)
    of_group = outputs // groups
    # Of what is pooled, an odd last row or column is left out.
    covered = (2 * out_height, 2 * out_width) if pool else (out_height, out_width)
    counts = (*tiles_of(loads, tile, *covered, input.shape[3]), tiles(of_group, tile["outputs"]))
    launch(
        _conv_pool,
        images * counts[0] * counts[1] * groups * counts[2],
        input.device,
        [
            *(given.images, given.weights, scale, bias, out),
            *(*input.shape[2:], made_height, made_width, out_height, out_width, padding, *counts, *given.strides),
        ],
        **given.constants,
        GROUP_OUTPUTS=of_group,
        GROUPS=groups,
        RELU=relu,
        POOL=pool,
        POOL_PADDING=pool_padding,
        ROWS=tile["rows"],
        COLUMNS=tile["columns"],
        OUTPUTS=tile["outputs"],
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )


def conv_pool(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """``conv_pool`` of the catalogue, with its other arguments in ``options``."""
    out = contract.fake(input, weight, bias, **options)
    conv_pool_mixed(input, weight, None, bias, **options, out=out)
    return out


def model_calls(model_size: ModelSize, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What EfficientAD-S and -M ask for at 256 x 256, in batches of 1 and 32, for the kernel report."""

    def call(one: Convolution, images: int) -> None:
        narrow = torch.float16 if one.channels < 16 and dtype == torch.float8_e4m3fn else dtype
        input = torch.empty(images, one.channels * one.groups, one.side, one.side, dtype=narrow, device="meta")
        weight = torch.empty(
            one.outputs * one.groups, one.channels, one.kernel, one.kernel, dtype=narrow, device="meta"
        )
        scale, bias = (torch.empty(one.outputs * one.groups, device="meta") for _ in range(2))
        out = torch.empty(images, one.outputs * one.groups, one.out_side, one.out_side, dtype=dtype, device="meta")
        conv_pool_mixed(
            channels_last(input),
            channels_last(weight),
            scale if dtype == torch.float8_e4m3fn else None,
            bias,
            padding=one.padding,
            pool=one.pool,
            pool_padding=one.pool_padding,
            groups=one.groups,
            out=channels_last(out),
        )

    return {
        f"{one.name}{', padded' if padded else ''}, batch {images}": partial(call, one, images)
        for padded in (False, True)
        for one in convolutions(model_size, padded=padded)
        for images in (1, 32)
    }


def representative_calls() -> dict[str, Callable[[], object]]:
    """What the kernel report compiles, with meta tensors inside `launching.recorded`."""
    return {
        f"{name} of {model_size.upper()}": call
        for model_size in get_args(ModelSize)
        for name, call in model_calls(model_size, torch.float16).items()
        if "padded" not in name
    }


overloads = {"default": conv_pool, "mixed": conv_pool_mixed}
