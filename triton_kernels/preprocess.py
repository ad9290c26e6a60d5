"""``preprocess`` in Triton. efficientad_fast/ops/preprocess.py is the contract.

Both resizes make every output from the image itself: between the passes nothing is written, and an input pixel is read
for the two outputs a side that its triangle reaches, mostly from the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientad_fast.ops import preprocess as contract
from efficientad_fast.reference.preprocess import IMAGENET_MEAN, IMAGENET_STD

from .launching import launch, require_runnable, tiles

TILE = 1024  # input pixels that a program reads at a time, some of them for several outputs
PILLOW_TILE = 512  # likewise; its weights are in float64, and with more pixels registers are spilled
MOST_TAPS = 8  # of them a side, for one output

# Knowing that one of these is 1 or a multiple of 16 is worth no compilation of its own: pixels are gathered one by one.
# Knowing that channels are beside each other is: it takes a quarter fewer registers.
ANY_SIZES = [
    *("height", "width", "out_height", "out_width", "row_taps", "column_taps", "column_tiles"),
    *("stride_n", "stride_h", "stride_w", "out_stride_n", "out_stride_c", "out_stride_h", "out_stride_w"),
]


@triton.jit
def _antialias_start(position, length, target, widest):
    """The first input under the triangle of an output, and how far it is from its centre, in half widths."""
    # In units of half an input divided by target everything is an integer; the half width is 2 * widest.
    centre = (2 * position + 1) * length
    first = tl.maximum(centre - 2 * widest + target, 0) // (2 * target)
    return first, ((2 * first + 1) * target - centre).to(tl.float32) / (2 * widest).to(tl.float32)


@triton.jit(do_not_specialize=ANY_SIZES, do_not_specialize_on_alignment=["stride_c"])
def _antialias(
    image_ptr,  # (N, H, W, 3), strided, uint8 or float32
    out_ptr,  # (N, 3, h, w), strided, floating
    height,
    width,
    out_height,
    out_width,
    row_taps,
    column_taps,
    column_tiles,
    stride_n,
    stride_h,
    stride_w,
    stride_c,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    BLOCK_ROW_TAPS: tl.constexpr,
    BLOCK_COLUMN_TAPS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % (out_height * column_tiles)
    image = (program // (out_height * column_tiles)).to(tl.int64)
    y = (tile // column_tiles).to(tl.int64)
    x = ((tile % column_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    rows, columns = tl.full((), height, tl.int64), tl.full((), width, tl.int64)
    out_rows, out_columns = tl.full((), out_height, tl.int64), tl.full((), out_width, tl.int64)
    highest, widest = tl.maximum(rows, out_rows), tl.maximum(columns, out_columns)
    first_row, above = _antialias_start(y, rows, out_rows, highest)
    first_column, before = _antialias_start(tl.minimum(x, out_columns - 1)[None, :, None], columns, out_columns, widest)
    row_step = out_rows.to(tl.float32) / highest.to(tl.float32)
    column_step = out_columns.to(tl.float32) / widest.to(tl.float32)
    image_ptr += image * stride_n

    # Sums over rows, outputs and columns; added up over the first and the last at the end.
    red = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.float32)
    green = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.float32)
    blue = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.float32)
    row_total = tl.zeros((BLOCK_ROW_TAPS, 1, 1), tl.float32)
    column_total = tl.zeros((1, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.float32)
    above_tap = 0
    while above_tap < row_taps:  # range() takes no argument of a kernel in Triton 3.6's interpreter with NumPy 2.4
        row_tap = above_tap + tl.arange(0, BLOCK_ROW_TAPS)[:, None, None]
        row = first_row + row_tap
        row_weight = tl.where(row < rows, tl.maximum(1 - tl.abs(above + row_tap * row_step), 0), 0)
        row_total += row_weight
        row_ptr = image_ptr + row * stride_h
        column_total = tl.zeros((1, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.float32)
        before_tap = 0
        while before_tap < column_taps:
            column_tap = before_tap + tl.arange(0, BLOCK_COLUMN_TAPS)[None, None, :]
            column = first_column + column_tap
            share = tl.maximum(1 - tl.abs(before + column_tap * column_step), 0)
            column_weight = tl.where(column < columns, share, 0)
            column_total += column_weight
            weight = row_weight * column_weight
            taken = weight > 0
            pixel_ptr = row_ptr + column * stride_w
            red += weight * tl.load(pixel_ptr, mask=taken, other=0).to(tl.float32)
            pixel_ptr += stride_c
            green += weight * tl.load(pixel_ptr, mask=taken, other=0).to(tl.float32)
            pixel_ptr += stride_c
            blue += weight * tl.load(pixel_ptr, mask=taken, other=0).to(tl.float32)
            before_tap += BLOCK_COLUMN_TAPS
        above_tap += BLOCK_ROW_TAPS

    total = tl.sum(row_total) * tl.sum(tl.sum(column_total, axis=2), axis=0)
    result_ptr = out_ptr + image * out_stride_n + y * out_stride_h + x * out_stride_w
    taken = x < out_width
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    red_mean = tl.sum(tl.sum(red, axis=0), axis=1) / total
    tl.store(result_ptr, (red_mean * red_scale + red_shift).to(dtype), mask=taken)
    result_ptr += out_stride_c
    green_mean = tl.sum(tl.sum(green, axis=0), axis=1) / total
    tl.store(result_ptr, (green_mean * green_scale + green_shift).to(dtype), mask=taken)
    result_ptr += out_stride_c
    blue_mean = tl.sum(tl.sum(blue, axis=0), axis=1) / total
    tl.store(result_ptr, (blue_mean * blue_scale + blue_shift).to(dtype), mask=taken)


@triton.jit
def _pillow_taps(position, scale, stretch, length):
    """Of an output: the centre of its triangle, its first input and that behind its last, as Pillow rounds them."""
    centre = (position.to(tl.float64) + 0.5) * scale
    first = tl.maximum(centre - stretch + 0.5, 0.0).to(tl.int64)
    end = tl.minimum((centre + stretch + 0.5).to(tl.int64), length)
    return centre, first, end


@triton.jit
def _pillow_share(tap, centre, end, inverse_stretch):
    """The height of the triangle above an input, float64."""
    distance = (tap.to(tl.float64) - centre + 0.5) * inverse_stretch
    return tl.where(tap < end, tl.maximum(1.0 - tl.abs(distance), 0.0), 0.0)


@triton.jit
def _pillow_total(centre, first, end, inverse_stretch, taps):
    """The sum of the heights, tap by tap in Pillow's order."""
    total = _pillow_share(first, centre, end, inverse_stretch)
    tap = 1
    while tap < taps:
        total += _pillow_share(first + tap, centre, end, inverse_stretch)
        tap += 1
    return total


@triton.jit
def _pillow_weight(tap, centre, end, inverse_stretch, total):
    """In units of 2^-22."""
    return (_pillow_share(tap, centre, end, inverse_stretch) / total * 4194304.0 + 0.5).to(tl.int32)


@triton.jit
def _load_level(ptr, taken):
    """One of 256 levels, int32."""
    value = tl.load(ptr, mask=taken, other=0)
    if value.dtype == tl.uint8:
        return value.to(tl.int32)
    else:
        # Exact in float64; of float32's numbers only 0.5 lies between two levels, and 127.5 goes to the even 128 too.
        scaled = tl.minimum(tl.maximum(value.to(tl.float64) * 255.0, 0.0), 255.0)
        return (scaled + 0.5).to(tl.int32)


@triton.jit
def _to_level(sum):
    """From units of 2^-22 to the nearest level."""
    return tl.minimum((sum + 2097152) >> 22, 255)


@triton.jit
def _normalised(sum, mean, std):
    """In the operations of the reference, each rounded."""
    unit = tl.div_rn(_to_level(sum).to(tl.float32), tl.full(sum.shape, 255.0, tl.float32))
    return tl.div_rn(unit - mean, tl.full(sum.shape, std, tl.float32))


@triton.jit(do_not_specialize=ANY_SIZES, do_not_specialize_on_alignment=["stride_c"])
def _pillow(
    image_ptr,  # (N, H, W, 3), strided, uint8 or float32
    out_ptr,  # (N, 3, h, w), strided, floating
    height,
    width,
    out_height,
    out_width,
    row_taps,
    column_taps,
    column_tiles,
    stride_n,
    stride_h,
    stride_w,
    stride_c,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    row_scale: tl.float64,
    row_stretch: tl.float64,
    row_inverse_stretch: tl.float64,
    column_scale: tl.float64,
    column_stretch: tl.float64,
    column_inverse_stretch: tl.float64,
    red_mean,
    green_mean,
    blue_mean,
    red_std,
    green_std,
    blue_std,
    BLOCK_ROW_TAPS: tl.constexpr,
    BLOCK_COLUMN_TAPS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % (out_height * column_tiles)
    image = (program // (out_height * column_tiles)).to(tl.int64)
    y = (tile // column_tiles).to(tl.int64)
    x = ((tile % column_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    row_centre, first_row, end_row = _pillow_taps(y, row_scale, row_stretch, height)
    column_centre, first_column, end_column = _pillow_taps(
        tl.minimum(x, out_width - 1), column_scale, column_stretch, width
    )
    row_total = _pillow_total(row_centre, first_row, end_row, row_inverse_stretch, row_taps)
    column_total = _pillow_total(column_centre, first_column, end_column, column_inverse_stretch, column_taps)
    image_ptr += image * stride_n

    # A pass that keeps its side's length has one weight, 2^22, and changes nothing.
    column_centre, end_column = column_centre[None, :, None], end_column[None, :, None]
    column_total = column_total[None, :, None]
    most_columns = tl.max(end_column - first_column[None, :, None])
    red = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS), tl.int32)
    green = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS), tl.int32)
    blue = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS), tl.int32)
    top = first_row
    while top < end_row:
        row = top + tl.arange(0, BLOCK_ROW_TAPS).to(tl.int64)
        row_weight = _pillow_weight(row, row_centre, end_row, row_inverse_stretch, row_total)[:, None]
        row_ptr = image_ptr + row[:, None, None] * stride_h
        row_red = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.int32)
        row_green = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.int32)
        row_blue = tl.zeros((BLOCK_ROW_TAPS, BLOCK_COLUMNS, BLOCK_COLUMN_TAPS), tl.int32)
        tap = 0
        while tap < most_columns:
            column = first_column[None, :, None] + tap + tl.arange(0, BLOCK_COLUMN_TAPS)[None, None, :]
            weight = _pillow_weight(column, column_centre, end_column, column_inverse_stretch, column_total)
            pixel_ptr = row_ptr + column * stride_w
            taken = (row_weight[:, :, None] > 0) & (weight > 0)
            row_red += weight * _load_level(pixel_ptr, taken)
            pixel_ptr += stride_c
            row_green += weight * _load_level(pixel_ptr, taken)
            pixel_ptr += stride_c
            row_blue += weight * _load_level(pixel_ptr, taken)
            tap += BLOCK_COLUMN_TAPS
        red += row_weight * _to_level(tl.sum(row_red, axis=2))
        green += row_weight * _to_level(tl.sum(row_green, axis=2))
        blue += row_weight * _to_level(tl.sum(row_blue, axis=2))
        top += BLOCK_ROW_TAPS

    result_ptr = out_ptr + image * out_stride_n + y * out_stride_h + x * out_stride_w
    taken = x < out_width
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(result_ptr, _normalised(tl.sum(red, axis=0), red_mean, red_std).to(dtype), mask=taken)
    result_ptr += out_stride_c
    tl.store(result_ptr, _normalised(tl.sum(green, axis=0), green_mean, green_std).to(dtype), mask=taken)
    result_ptr += out_stride_c
    tl.store(result_ptr, _normalised(tl.sum(blue, axis=0), blue_mean, blue_std).to(dtype), mask=taken)


def _blocks(tile: int, row_taps: int, column_taps: int) -> dict[str, int]:
    """The tile of input pixels: rows and columns for one output, and outputs beside each other."""
    row_block, column_block = (min(triton.next_power_of_2(taps), MOST_TAPS) for taps in (row_taps, column_taps))
    columns = tile // (row_block * column_block)
    return {"BLOCK_ROW_TAPS": row_block, "BLOCK_COLUMN_TAPS": column_block, "BLOCK_COLUMNS": columns}


def _launch_antialias(image: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    images, height, width, _ = image.shape
    out_height, out_width = out.shape[-2:]
    # Inputs strictly within a triangle twice as wide as one of them, or as one output where that is wider.
    row_taps, column_taps = (tiles(2 * max(scale), scale[1]) for scale in ((height, out_height), (width, out_width)))
    blocks = _blocks(TILE, row_taps, column_taps)
    column_tiles = tiles(out_width, blocks["BLOCK_COLUMNS"])
    unit = 255.0 if image.dtype == torch.uint8 else 1.0
    launch(
        _antialias,
        images * out_height * column_tiles,
        image.device,
        [
            *(image, out, height, width, out_height, out_width, row_taps, column_taps, column_tiles),
            *(*image.stride(), *out.stride()),
            # (x / 255 - mean) / std as one multiplication and addition.
            *(1.0 / (unit * one) for one in std),
            *(-shift / one for shift, one in zip(mean, std, strict=True)),
        ],
        **blocks,
        num_warps=4,
    )


def _launch_pillow(image: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    images, height, width, _ = image.shape
    out_height, out_width = out.shape[-2:]
    scales = (height / out_height, width / out_width)
    stretches = [max(scale, 1.0) for scale in scales]
    blocks = _blocks(PILLOW_TILE, *(math.ceil(2 * stretch) for stretch in stretches))
    column_tiles = tiles(out_width, blocks["BLOCK_COLUMNS"])
    launch(
        _pillow,
        images * out_height * column_tiles,
        image.device,
        [
            *(image, out, height, width, out_height, out_width),
            *(2 * math.ceil(stretch) + 1 for stretch in stretches),
            *(column_tiles, *image.stride(), *out.stride()),
            *(scales[0], stretches[0], 1.0 / stretches[0], scales[1], stretches[1], 1.0 / stretches[1]),
            *mean,
            *std,
        ],
        **blocks,
        num_warps=4,
        enable_fp_fusion=False,  # Pillow's weights are rounded after every operation
    )


def _preprocess_into(image: Tensor, resize: str, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    require_runnable("preprocess", "image", image)
    (_launch_pillow if resize == "pillow" else _launch_antialias)(image, mean, std, out)


def preprocess(
    image: Tensor,
    size: Sequence[int],
    *,
    resize: str = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``preprocess`` of the catalogue."""
    out = contract.fake(image, size, resize=resize, mean=mean, std=std, channels_last=channels_last, dtype=dtype)
    _preprocess_into(image, resize, mean, std, out)
    return out


def preprocess_out(
    image: Tensor,
    *,
    resize: str = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out: Tensor,
) -> None:
    """``preprocess.out`` of the catalogue."""
    contract.fake_out(image, resize=resize, mean=mean, std=std, out=out)
    _preprocess_into(image, resize, mean, std, out)


def representative_calls() -> dict[str, Callable[[], object]]:
    """What the kernel report compiles, with meta tensors inside `launching.recorded`."""

    def call(side: int, source: torch.dtype, resize: str, channels_last: bool, dtype: torch.dtype) -> None:
        image = torch.empty(1, side, side, 3, dtype=source, device="meta")
        preprocess(image, [256, 256], resize=resize, channels_last=channels_last, dtype=dtype)

    return {
        "uint8 to float32": lambda: call(1024, torch.uint8, "antialias", False, torch.float32),
        "uint8 to float16, channels last": lambda: call(1024, torch.uint8, "antialias", True, torch.float16),
        "float32 enlarged": lambda: call(200, torch.float32, "antialias", False, torch.float32),
        "pillow, uint8 to float32": lambda: call(1024, torch.uint8, "pillow", False, torch.float32),
        "pillow, float32 enlarged": lambda: call(200, torch.float32, "pillow", False, torch.float32),
    }


overloads = {"default": preprocess, "out": preprocess_out}
