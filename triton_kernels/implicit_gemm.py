"""Convolutions as products of matrices, for `conv_pool` and `feature_distance`: a tile of pixels by a tile of outputs.

The rows of the left matrix are never written: for every tap of the kernel a tile of pixels, shifted by the tap, is a
block of the image as it lies in memory. Channels are next to each other, so that a block is as deep as a tile of them.
Weights are channels-last: ``(outputs, k, k, C)``, a row of which is all that an output is summed of.

Four ways to load, by `LOADS`; the first two are by descriptors (TMA), from compute capability 9.0 on:

- rows: a tile is one or two pieces of rows, and what lies outside of the image is filled with zeros. Each piece is a
  matrix as tensor cores read it from shared memory. A block of several rows is not: Triton would carry it through
  registers, which costs a third of the registers and the overlap of loads and products. Hence two pieces, with sums of
  their own, where pooling needs two rows.
- line: without padding, a tile is a piece of all pixels in a line, which a tap moves by as much everywhere. It wastes
  the ends of rows, where a kernel reaches into the next one, not what tiles stand over.
- pointers: by masked loads, which become ``cp.async``; for older GPUs, and for layouts that descriptors do not take.
- flat: by masked loads, for images of few channels, where a tile is as deep as several taps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from efficientad_fast.ops.overload import require

from . import tiles
from .launching import TENSOR_DESCRIPTORS_SINCE, capability

BY_ROWS, BY_LINE, BY_POINTERS, FLAT = 0, 1, 2, 3

FLOAT8_SINCE = 8.9
"""Compute capability from which on there are products of e4m3."""

BYTES_OF_ALIGNMENT = 16

MOST_SHARED = 200 * 1024
"""Bytes of tiles that wait, of a candidate: what a block of any GPU can have."""

FEWEST_SUMS, MOST_SUMS = 8, 128
"""Of a thread, of a candidate."""


@triton.jit
def no_products(ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, LOADS: tl.constexpr):
    """Sums to begin with: of all pixels of a tile or, by rows, of each of its two."""
    PIXELS: tl.constexpr = COLUMNS if LOADS == 0 else ROWS * COLUMNS
    PIXELS_BELOW: tl.constexpr = COLUMNS if LOADS == 0 and ROWS == 2 else 1
    OUTPUTS_BELOW: tl.constexpr = OUTPUTS if LOADS == 0 and ROWS == 2 else 1
    return tl.zeros((PIXELS, OUTPUTS), tl.float32), tl.zeros((PIXELS_BELOW, OUTPUTS_BELOW), tl.float32)


@triton.jit
def pixels_of_tile(
    tile_row,
    tile_column,
    line_length,  # pixels of a row of the line
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Rows and columns of what a convolution makes that the sums stand for; by rows, those of the tile's first row."""
    if LOADS == 1:
        place = tile_column + tl.arange(0, ROWS * COLUMNS)
        y = place // line_length
        x = place % line_length
    elif LOADS == 0:
        y = tl.zeros((COLUMNS,), tl.int32) + tile_row
        x = tile_column + tl.arange(0, COLUMNS)
    else:
        pixel = tl.arange(0, ROWS * COLUMNS)
        y = tile_row + pixel // COLUMNS
        x = tile_column + pixel % COLUMNS
    return y, x


@triton.jit
def add_products(
    sums,  # of no_products: float32
    sums_below,
    images,  # (N, H, W, channels): descriptor, or pointer to the first channel that is read
    weights,  # (outputs, KERNEL * KERNEL * CHANNELS): descriptor, or pointer
    image,
    row,  # of the tile's first pixel in the image, before it in the padding
    column,  # likewise; by line, the place of the pixel in the image's line
    first_channel,  # for descriptors
    first_output,
    last_output,  # after the last one that is meant
    height,
    width,
    stride_n,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Adds a convolution's products with one tile of outputs, for one tile of pixels."""
    TOTAL: tl.constexpr = KERNEL * KERNEL * CHANNELS
    if LOADS <= 1:
        BLOCKS: tl.constexpr = CHANNELS // DEPTH
        for step in tl.range(0, KERNEL * KERNEL * BLOCKS):
            tap = step // BLOCKS
            channel = first_channel + (step % BLOCKS) * DEPTH
            right = weights.load([first_output, step * DEPTH])
            if LOADS == 1:
                place = image * (height * width) + column + (tap // KERNEL) * width + tap % KERNEL
                sums = _add(sums, images.load([place, channel]), right, DEPTH, PRECISE)
            else:
                y = row + tap // KERNEL
                x = column + tap % KERNEL
                left = images.load([image, y, x, channel]).reshape(COLUMNS, DEPTH)
                sums = _add(sums, left, right, DEPTH, PRECISE)
                if ROWS == 2:
                    left = images.load([image, y + 1, x, channel]).reshape(COLUMNS, DEPTH)
                    sums_below = _add(sums_below, left, right, DEPTH, PRECISE)
    else:
        pixel = tl.arange(0, ROWS * COLUMNS)
        rows = row + pixel // COLUMNS
        columns = column + pixel % COLUMNS
        output = first_output + tl.arange(0, OUTPUTS)
        right_ptr = weights + output.to(tl.int64)[:, None] * TOTAL
        is_output = (output < last_output)[:, None]
        images += image.to(tl.int64) * stride_n
        if LOADS == 2:
            PARTS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
            for step in tl.range(0, KERNEL * KERNEL * PARTS):
                tap = step // PARTS
                channel = (step % PARTS) * DEPTH + tl.arange(0, DEPTH)[None, :]
                y = rows + tap // KERNEL
                x = columns + tap % KERNEL
                taken = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
                is_weight = is_output
                if CHANNELS % DEPTH != 0:
                    taken = taken & (channel < CHANNELS)
                    is_weight = is_weight & (channel < CHANNELS)
                places = (y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w)[:, None] + channel
                left = tl.load(images + places, mask=taken, other=0.0)
                right = tl.load(right_ptr + (tap * CHANNELS + channel), mask=is_weight, other=0.0)
                sums = _add(sums, left, right, DEPTH, PRECISE)
        else:
            for step in tl.range(0, (TOTAL + DEPTH - 1) // DEPTH):
                place = step * DEPTH + tl.arange(0, DEPTH)[None, :]
                ky = place // (KERNEL * CHANNELS)
                across = place % (KERNEL * CHANNELS)
                y = rows[:, None] + ky
                x = columns[:, None] + across // CHANNELS
                taken = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                # All channels of a pixel or none, which Triton does not see: it would load them one by one.
                taken = tl.max_constancy(taken, [1, CHANNELS & -CHANNELS])
                is_weight = is_output
                if TOTAL % DEPTH != 0:
                    taken = taken & (place < TOTAL)
                    is_weight = is_weight & (place < TOTAL)
                if PACKED:
                    # Pixels have no gaps between them: a row of taps lies together, as Triton can see here.
                    pixels = (rows.to(tl.int64) * stride_h + columns.to(tl.int64) * CHANNELS)[:, None]
                    places = pixels + (ky * stride_h + across)
                else:
                    places = y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w + across % CHANNELS
                left = tl.load(images + places, mask=taken, other=0.0)
                right = tl.load(right_ptr + place, mask=is_weight, other=0.0)
                sums = _add(sums, left, right, DEPTH, PRECISE)
    return sums, sums_below


@triton.jit
def _add(sums, left, right, DEPTH: tl.constexpr, PRECISE: tl.constexpr):
    # Hopper adds products of e4m3 with fewer bits than float32 has: they leave its accumulator after every step.
    if PRECISE:
        return tl.dot(left, right.T, sums, max_num_imprecise_acc=DEPTH)
    else:
        return tl.dot(left, right.T, sums, input_precision="ieee")


@dataclass(frozen=True)
class Operand:
    """One convolution's images and weights, as a kernel takes them.

    Attributes:
        images, weights: descriptors, or tensors.
        strides: of images, rows and pixels, in numbers.
        constants: of :func:`add_products`, but the tile's.
    """

    images: Any
    weights: Any
    strides: tuple[int, int, int]
    constants: Mapping[str, int]


def ways_to_load(images: Tensor, groups: int, tile: Mapping[str, int], *, line: bool) -> int:
    """How tiles of a convolution's images are loaded best, of those ways that the layout and the GPU allow.

    Args:
        line: whether a tile may be a piece of all pixels in a line.
    """
    channels, fewest = images.shape[1] // groups, _fewest(images)
    if channels < fewest:
        return FLAT
    if tile["rows"] > 2 or min(tile["depth"], channels & -channels) < fewest or not _descriptors_take(images):
        return BY_POINTERS
    return BY_LINE if line and _is_line(images) else BY_ROWS


def operand(images: Tensor, weight: Tensor, groups: int, tile: Mapping[str, int], loads: int) -> Operand:
    """Of a convolution with square kernel, in a ``tile`` of ``rows``, ``columns``, ``outputs`` and ``depth``."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    channels, kernel = images.shape[1] // groups, weight.shape[2]
    count, _, height, width = images.shape
    total = kernel * kernel * channels
    strides = (images.stride(0), images.stride(2), images.stride(3))
    depth = min(tile["depth"], channels & -channels)
    if depth < _fewest(images):
        deepest = total if loads == FLAT else channels
        depth = max(min(tile["depth"], triton.next_power_of_2(deepest)), _fewest(images))
    constants = {"CHANNELS": channels, "KERNEL": kernel, "DEPTH": depth, "LOADS": loads}
    constants["PACKED"] = int(loads == FLAT and strides[2] == channels)
    constants["PRECISE"] = int(images.element_size() == 1)
    if loads in (BY_POINTERS, FLAT):
        return Operand(images, weight, strides, constants)
    if weight.data_ptr() % BYTES_OF_ALIGNMENT:
        weight = weight.clone(memory_format=torch.channels_last)
    by_weights = TensorDescriptor(weight, [weight.shape[0], total], [total, 1], [tile["outputs"], depth])
    if loads == BY_LINE:
        shape, far = [count * height * width, channels * groups], [strides[2], 1]
        block = [tile["rows"] * tile["columns"], depth]
    else:
        shape = [count, height, width, channels * groups]
        # A side of one is as far from the next as one likes.
        far = [
            stride if side > 1 else BYTES_OF_ALIGNMENT * channels * groups
            for stride, side in zip(strides, shape[:3], strict=True)
        ]
        far, block = [*far, 1], [1, 1, tile["columns"], depth]
    # Strides are in the descriptor; as arguments Triton would compile the kernel again by what divides them.
    return Operand(TensorDescriptor(images, shape, far, block), by_weights, (0, 0, 0), constants)


def _fewest(images: Tensor) -> int:
    """Channels that tensor cores take at once, and Triton."""
    return max(32 // images.element_size(), 16)


def _is_line(images: Tensor) -> bool:
    """Whether all pixels of all images are as far from each other."""
    count, _, height, width = images.shape
    pixel = images.stride(3)
    rows_follow = height == 1 or images.stride(2) == width * pixel
    return width > 1 and rows_follow and (count == 1 or images.stride(0) == height * width * pixel)


def _descriptors_take(images: Tensor) -> bool:
    """Whether the GPU has them, base and strides are multiples of 16 bytes, and there is something."""
    if capability(images.device) < TENSOR_DESCRIPTORS_SINCE:
        return False
    size = images.element_size()
    used = [stride for stride, side in zip(images.stride(), images.shape, strict=True) if side > 1 and stride != 1]
    aligned = all(stride * size % BYTES_OF_ALIGNMENT == 0 for stride in used)
    return images.numel() > 0 and aligned and images.data_ptr() % BYTES_OF_ALIGNMENT == 0


def require_products(operator: str, name: str, given: Tensor) -> None:
    """Refuses e4m3 on a GPU that has no products of it."""
    if given.dtype == torch.float8_e4m3fn:
        have = capability(given.device)
        enough = have >= FLOAT8_SINCE or given.device.type == "cpu"
        expected = f"of another dtype than float8_e4m3fn on a GPU of compute capability below {FLOAT8_SINCE}"
        require(enough, operator, name, expected, f"one of {have}")


def tiles_of(loads: int, tile: Mapping[str, int], height: int, width: int, line_length: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover what a convolution makes of one image, ``height`` by ``width``."""
    if loads == BY_LINE:
        return 1, triton.cdiv((height - 1) * line_length + width, tile["rows"] * tile["columns"])
    return triton.cdiv(height, tile["rows"]), triton.cdiv(width, tile["columns"])


def facts(
    images: Tensor, weight: Tensor, groups: int, height: int, width: int, *, line: bool
) -> dict[str, int | float | bool | str]:
    """What the rules for tiles may ask of a convolution.

    ``capability``, ``dtype`` and its ``bits``, ``kernel``, ``channels`` and ``outputs`` of a group, ``groups``,
    ``images``, ``height`` and ``width`` of what the convolution makes, ``pixels`` of all images of that; ``squares``:
    how many tiles of 128 pixels by 128 outputs of all groups that is; ``line``: whether a tile may be a piece of all
    pixels in a line, of which it does not matter how wide an image is.
    """
    pixels = images.shape[0] * height * width
    return {
        "capability": capability(images.device),
        "dtype": str(images.dtype).removeprefix("torch."),
        "bits": 8 * images.element_size(),
        "kernel": weight.shape[2],
        "channels": weight.shape[1],
        "outputs": weight.shape[0] // groups,
        "groups": groups,
        "images": images.shape[0],
        "height": height,
        "width": width,
        "pixels": pixels,
        "squares": pixels * weight.shape[0] // 128**2,
        "line": line,
    }


def fitting_outputs(tile: Mapping[str, int], outputs: int) -> int:
    """Of a tile: not many more than there are."""
    return int(min(tile["outputs"], max(triton.next_power_of_2(outputs), 16)))


def candidates(stated: Mapping[str, Any]) -> list[dict[str, int]]:
    """Tiles worth timing for a convolution of which :func:`facts` says that."""
    by_descriptors = stated["capability"] >= TENSOR_DESCRIPTORS_SINCE
    pieces = ((1, 64), (1, 128), (2, 64), (2, 128)) if by_descriptors else ((8, 8), (4, 32), (2, 64), (8, 16), (4, 64))
    if stated.get("pool"):
        pieces = tuple(one for one in pieces if one[0] % 2 == 0)
    depths = {32: (16, 32), 16: (32, 64, 128), 8: (64, 128)}[stated["bits"]]
    found = []
    for (rows, columns), outputs, depth, warps, stages in itertools.product(
        pieces, (32, 64, 128, 256), depths, (4, 8), (2, 3, 4, 5)
    ):
        held = (rows * columns + outputs) * depth * stated["bits"] // 8 * stages
        sums = rows * columns * outputs // (32 * warps)
        if outputs <= max(2 * stated["outputs"], 32) and held <= MOST_SHARED and FEWEST_SUMS <= sums <= MOST_SUMS:
            tile = {"rows": rows, "columns": columns, "outputs": outputs}
            found.append(tile | {"depth": depth, "warps": warps, "stages": stages})
    return found


def chosen_tile(kernel: str, stated: Mapping[str, int | float | bool | str]) -> dict[str, int]:
    """The tile of the table's rules, in which ``outputs`` is not many more than there are."""
    tile = tiles.choose(kernel, stated)
    tile["outputs"] = fitting_outputs(tile, int(stated["outputs"]))
    return tile
