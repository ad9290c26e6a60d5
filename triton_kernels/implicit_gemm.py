"""Convolutions as products of matrices, for `conv_pool` and `feature_distance`: a tile of pixels by a tile of outputs.

The rows of the left matrix are never written: for every tap of the kernel a tile of pixels, shifted by the tap, is a
block of the image as it lies in memory. Channels are next to each other, so that a block is as deep as a tile of them.
Weights are channels-last: ``(outputs, k, k, C)``, a row of which is all that an output is summed of.

Three ways to load, by `LOADS`:

- descriptors: both tiles by TMA, from compute capability 9.0 on; what lies outside of the image it fills with zeros;
- pointers: by masked loads, which become ``cp.async``; for older GPUs, and for layouts that TMA does not take;
- flat: for images of few channels, where a tile is as deep as several taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from efficientad_fast.ops import packing
from efficientad_fast.ops.overload import require

from . import tiles
from .launching import TENSOR_DESCRIPTORS_SINCE, capability

DESCRIPTORS, POINTERS, FLAT = 0, 1, 2

FLOAT8_SINCE = 8.9
"""Compute capability from which on there are products of e4m3."""

BYTES_OF_ALIGNMENT = 16


@triton.jit
def add_products(
    sums,  # (ROWS * COLUMNS, OUTPUTS), float32
    images,  # (N, H, W, channels): descriptor, or pointer to the first channel that is read
    weights,  # (outputs, KERNEL * KERNEL * CHANNELS): descriptor, or pointer
    image,
    row,  # of the tile's first pixel in the image, before it in the padding
    column,
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
    if LOADS == 0:
        BLOCKS: tl.constexpr = CHANNELS // DEPTH
        for step in tl.range(0, KERNEL * KERNEL * BLOCKS):
            tap = step // BLOCKS
            channel = first_channel + (step % BLOCKS) * DEPTH
            left = images.load([image, row + tap // KERNEL, column + tap % KERNEL, channel])
            right = weights.load([first_output, step * DEPTH])
            sums = _add(sums, left.reshape(ROWS * COLUMNS, DEPTH), right, DEPTH, PRECISE)
    else:
        pixel = tl.arange(0, ROWS * COLUMNS)
        rows = row + pixel // COLUMNS
        columns = column + pixel % COLUMNS
        output = first_output + tl.arange(0, OUTPUTS)
        right_ptr = weights + output.to(tl.int64)[:, None] * TOTAL
        is_output = (output < last_output)[:, None]
        images += image.to(tl.int64) * stride_n
        if LOADS == 1:
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
    return sums


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


def operand(images: Tensor, weight: Tensor, groups: int, tile: Mapping[str, int], outputs: int) -> Operand:
    """Of a convolution with square kernel, in a ``tile`` of ``rows``, ``columns`` and ``depth``, with ``outputs``."""
    images = packing.mixed(images)
    weight = weight.contiguous(memory_format=torch.channels_last)
    channels, kernel = images.shape[1] // groups, weight.shape[2]
    _, _, height, width = images.shape
    strides = (images.stride(0), images.stride(2), images.stride(3))
    size = images.element_size()
    fewest = 32 // size  # that tensor cores take at once; Triton's least is 16
    depth = min(tile["depth"], channels & -channels)
    if channels < fewest:
        loads, depth = FLAT, max(min(tile["depth"], triton.next_power_of_2(kernel * kernel * channels)), 16, fewest)
    elif depth >= max(fewest, 16) and capability(images.device) >= TENSOR_DESCRIPTORS_SINCE and _tma_takes(images):
        loads = DESCRIPTORS
    else:
        loads = POINTERS
        if depth < max(fewest, 16):
            depth = max(min(tile["depth"], triton.next_power_of_2(channels)), 16, fewest)
    constants = {"CHANNELS": channels, "KERNEL": kernel, "DEPTH": depth, "LOADS": loads}
    constants["PACKED"] = int(loads == FLAT and strides[2] == channels)
    constants["PRECISE"] = int(size == 1)
    if loads != DESCRIPTORS:
        return Operand(images, weight, strides, constants)
    images_of, height_of, width_of = (
        stride if side > 1 else channels * groups * BYTES_OF_ALIGNMENT
        for stride, side in zip(strides, (images.shape[0], height, width), strict=True)
    )
    total = kernel * kernel * channels
    return Operand(
        TensorDescriptor(
            images,
            [images.shape[0], height, width, channels * groups],
            [images_of, height_of, width_of, 1],
            [1, tile["rows"], tile["columns"], depth],
        ),
        TensorDescriptor(weight, [weight.shape[0], total], [total, 1], [outputs, depth]),
        (0, 0, 0),  # by whose divisibility Triton would compile it again
        constants,
    )


def _tma_takes(images: Tensor) -> bool:
    """Whether base and strides are multiples of 16 bytes, and there is something."""
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


def facts(images: Tensor, weight: Tensor, groups: int, height: int, width: int) -> dict[str, int | float | bool | str]:
    """What the rules for tiles may ask of a convolution.

    ``capability``, ``dtype`` and its ``bits``, ``kernel``, ``channels`` and ``outputs`` of a group, ``groups``,
    ``images``, ``height`` and ``width`` of what the convolution makes, ``pixels`` of all images of that.
    """
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
        "pixels": images.shape[0] * height * width,
    }


def fitting_outputs(tile: Mapping[str, int], outputs: int) -> int:
    """Of a tile: not many more than there are."""
    return int(min(tile["outputs"], max(triton.next_power_of_2(outputs), 16)))


def candidates(stated: Mapping[str, Any]) -> list[dict[str, int]]:
    """Tiles worth timing for a convolution of which :func:`facts` says that."""
    depths = {32: (16, 32), 16: (32, 64, 128), 8: (64, 128)}[stated["bits"]]
    found = []
    for rows, columns in ((8, 8), (8, 16), (16, 8), (16, 16)):
        for outputs in (32, 64, 128, 256):
            if outputs > max(2 * stated["outputs"], 32) or rows * columns * outputs > 256 * 256 // 2:
                continue
            for depth in depths:
                for warps in (4, 8):
                    for stages in (2, 3, 4, 5):
                        held = (rows * columns + outputs) * depth * stated["bits"] // 8 * stages
                        sums = rows * columns * outputs // (32 * warps)
                        if held <= 200 * 1024 and 8 <= sums <= 128:
                            found.append(
                                {
                                    "rows": rows,
                                    "columns": columns,
                                    "outputs": outputs,
                                    "depth": depth,
                                    "warps": warps,
                                    "stages": stages,
                                }
                            )
    return found


def chosen_tile(kernel: str, stated: Mapping[str, int | float | bool | str]) -> dict[str, int]:
    """The tile of the table's rules, in which ``outputs`` is not many more than there are."""
    tile = tiles.choose(kernel, stated)
    tile["outputs"] = fitting_outputs(tile, int(stated["outputs"]))
    return tile
