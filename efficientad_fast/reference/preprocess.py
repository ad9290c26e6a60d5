"""From an RGB image to the networks' input: resize, scale to [0, 1], normalise. Source: SPEC "Input"."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad_fast.errors import InputError
from efficientad_fast.reference.networks import SMALLEST_SIDE

Resize = Literal["antialias", "pillow"]
"""How an image is brought to the network size, see :func:`preprocess`."""

LARGEST_SIDE = 8192
"""Of a network's input, in pixels: what a file asks for must not take all memory."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow multiplies 8-bit values with coefficients of this many fractional bits, so that a sum fits 32 bits.
_FRACTION_BITS = 32 - 8 - 2


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (None if isinstance(side, bool) else operator.index(side) for side in size)
    except (TypeError, ValueError):
        height = width = None
    if height is None or width is None:
        raise InputError(f"size is {size!r}; expected two integers, (height, width) in pixels, such as (256, 256)")
    if height < 1 or width < 1:
        raise InputError(f"size is {height} x {width}; expected a height and a width of at least 1 pixel")
    return height, width


def check_network_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return ``size``, (height, width) in pixels, as plain integers where the networks admit it.

    Raises:
        InputError: ``size`` is not a pair of positive integers, or a side is below 256 or above 8192. The message
            names the smallest admissible size.
    """
    height, width = _checked_size(size)
    if max(height, width) > LARGEST_SIDE:
        raise InputError(f"network size {height} x {width}: each side may be {LARGEST_SIDE} at most")
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(
            f"network size {height} x {width} (height x width) is too small: each side must be at least "
            f"{SMALLEST_SIDE}; the nearest admissible size is "
            f"{max(height, SMALLEST_SIDE)} x {max(width, SMALLEST_SIDE)}"
        )
    return height, width


def check_image(image: Tensor) -> None:
    """Refuses, with an :class:`InputError`, what is not ``(3, H, W)`` of uint8 or a floating-point dtype."""
    if not isinstance(image, Tensor):
        raise InputError(f"image is a {type(image).__name__}; expected a torch.Tensor, which decode_image returns")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise InputError(f"image has shape {tuple(image.shape)}; expected (3, H, W) with H and W of at least 1")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise InputError(f"image has dtype {image.dtype}; expected uint8, or floating point in [0, 1]")


def _to_unit_range(image: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 to ``dtype`` in [0, 1]; a floating-point image is only cast."""
    return image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)


def _to_uint8(image: Tensor) -> Tensor:
    """Floating point in [0, 1] to the nearest of 256 levels, halves to the even one; uint8 is returned as it is."""
    if image.dtype == torch.uint8:
        return image
    return (image.to(torch.float64) * 255).round().clamp(0, 255).to(torch.uint8)


def _bilinear_taps(length: int, target: int) -> list[tuple[Tensor, Tensor]]:
    """The taps of Pillow's bilinear filter from ``length`` to ``target`` samples, each ``(positions, weights)``.

    Output ``i`` is the sum over taps of ``input[positions[i]] * weights[i]``, in units of ``2**-22``. Positions are
    int64 and weights int32, both ``(target,)``. The filter is a triangle whose half width is one input sample, or
    one output sample where that is wider; weights are normalised in float64.
    """
    scale = length / target
    stretch = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    # Positive arguments: truncation and floor are the same.
    first = (centre - stretch + 0.5).clamp(min=0).to(torch.int64)
    end = (centre + stretch + 0.5).to(torch.int64).clamp(max=length)
    raw = []
    # Tap by tap, so that the sums are taken in the order in which Pillow takes them.
    for tap in range(2 * math.ceil(stretch) + 1):
        distance = ((first + tap).to(torch.float64) - centre + 0.5) * (1.0 / stretch)
        raw.append(torch.where(first + tap < end, (1.0 - distance.abs()).clamp(min=0), 0.0))
    total = torch.zeros_like(centre)
    for weight in raw:
        total = total + weight
    return [
        ((first + tap).clamp(max=length - 1), (weight / total * 2**_FRACTION_BITS + 0.5).to(torch.int32))
        for tap, weight in enumerate(raw)
    ]


def _resize_rows(image: Tensor, target: int) -> Tensor:
    """Resize the second axis of ``(3, length, any)`` uint8 to ``target`` samples; no pass where it has them."""
    length = image.shape[1]
    if length == target:
        return image
    source = image.contiguous().to(torch.int32)
    total = torch.full((3, target, image.shape[2]), 1 << (_FRACTION_BITS - 1), dtype=torch.int32, device=image.device)
    for positions, weights in _bilinear_taps(length, target):
        total += source.index_select(1, positions.to(image.device)) * weights.to(image.device).view(-1, 1)
    return (total >> _FRACTION_BITS).clamp(0, 255).to(torch.uint8)


def resize_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bilinear resize of 8-bit images, bit for bit, in integer arithmetic.

    The horizontal pass comes first and is rounded to 8 bits before the vertical one; a pass that would keep its
    side's length is left out. Pillow 3.3 to 12 do this for every size. Pillow 13 takes the vertical pass first for
    some sizes that shrink the height, which moves some values by one level; here the order stays, so that a
    detector's scores do not hang on the installed Pillow.

    Args:
        image: ``(3, H, W)`` uint8, or floating point in [0, 1], which is rounded to 8 bits first.
        size: (height, width) of the result in pixels.

    Returns:
        ``(3, height, width)`` uint8, contiguous; ``image`` itself where it is so already.

    Raises:
        InputError: ``image`` has another shape or dtype, or ``size`` is not a pair of positive integers.
    """
    check_image(image)
    height, width = _checked_size(size)
    columns = _to_uint8(image).transpose(1, 2)
    rows = _resize_rows(columns, width).transpose(1, 2)
    return _resize_rows(rows, height).contiguous()


def resize_antialias(image: Tensor, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Antialiased bilinear resize on floats, ``align_corners=False``.

    Args:
        image: ``(3, H, W)`` uint8, or floating point in [0, 1].
        size: (height, width) of the result in pixels.
        dtype: floating-point type of the arithmetic and of the result.

    Returns:
        ``(3, height, width)`` of ``dtype`` in [0, 1].

    Raises:
        InputError: ``image`` has another shape or dtype, or ``size`` is not a pair of positive integers.
    """
    check_image(image)
    height, width = _checked_size(size)
    unit = _to_unit_range(image, dtype).unsqueeze(0)
    if width == 1:
        # PyTorch 2.13 on the CPU repeats a row for all others in results one pixel wide.
        return _antialiased(unit.mT, (width, height)).mT.squeeze(0)
    return _antialiased(unit, (height, width)).squeeze(0)


def _antialiased(image: Tensor, size: tuple[int, int]) -> Tensor:
    resize = partial(F.interpolate, size=size, mode="bilinear", antialias=True, align_corners=False)
    try:
        return resize(image)
    except RuntimeError as error:
        # PyTorch 2.11 on a GPU, of an image some hundred times larger than the result in float64.
        if not image.is_cuda or "shared memory" not in str(error):
            raise
        return resize(image.cpu()).to(image.device)


def normalise(image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """``(x - mean) / std`` per channel: ``(..., 3, H, W)`` in [0, 1] to the same shape, dtype and device."""
    shift, scale = (
        torch.tensor(tuple(values), dtype=image.dtype, device=image.device).view(3, 1, 1) for values in (mean, std)
    )
    return (image - shift) / scale


def preprocess(
    image: Tensor,
    size: tuple[int, int],
    *,
    resize: Resize = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What the networks see of an image: resized, scaled to [0, 1], ``(x - mean) / std`` per channel.

    Args:
        image: ``(3, H, W)`` RGB, uint8 or floating point in [0, 1].
        size: (height, width) of the result in pixels. Any positive size is taken; what the networks admit is
            :func:`check_network_size`'s to say.
        resize: ``"antialias"``, bilinear on floats with antialiasing, or ``"pillow"``, Pillow's bilinear on 8-bit
            values (a floating-point image is rounded to them first).
        mean, std: one number per channel, in units of [0, 1].
        dtype: of the result. The arithmetic is in float64 for float64, else in float32, rounded once.

    Returns:
        ``(3, height, width)`` of ``dtype``, contiguous, on the image's device.

    Raises:
        InputError: an argument has another type, shape, dtype or value.
    """
    if not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype}; expected a floating-point type such as torch.float32")
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise InputError(f"mean is {mean!r} and std is {std!r}; expected three numbers each, those of std not zero")
    working = torch.float64 if dtype == torch.float64 else torch.float32
    if resize == "antialias":
        resized = resize_antialias(image, size, working)
    elif resize == "pillow":
        resized = _to_unit_range(resize_pillow(image, size), working)
    else:
        raise InputError(f"resize is {resize!r}; expected {' or '.join(map(repr, get_args(Resize)))}")
    return normalise(resized, mean, std).to(dtype).contiguous()
