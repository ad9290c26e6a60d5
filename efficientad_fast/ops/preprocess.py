"""``preprocess``: from an RGB image to the networks' input: resized, scaled to [0, 1], normalised, in one pass.

Source: SPEC "Input". ``(resize(image) / 255 - mean) / std`` per channel. Two overloads:

``preprocess(image, size, *, resize="antialias", mean=[...], std=[...], channels_last=False, dtype=torch.float32)``

- image: ``(N, H, W, 3)`` RGB, H and W at least 1, uint8, or float32 in [0, 1]; any strides. N may be 0.
- size: height and width of the result in pixels, each at least 1. Plain numbers: `torch.compile` and `torch.export` fix
  them.
- resize: ``"antialias"``, bilinear on floats with antialiasing, or ``"pillow"``, Pillow's bilinear on 8-bit values, bit
  for bit (a float32 image is rounded to them first, halves to the even level).
- mean, std: three numbers each, in units of [0, 1], finite, those of std not zero; ImageNet's by default.
- channels_last: lay the result out with its channels next to each other.
- dtype: of the result, float32, float16 or bfloat16. The arithmetic is in float32, rounded once at the end.

Returns ``(N, 3, *size)``, contiguous or channels-last, on the image's device. There is no gradient.

``preprocess.out(image, *, resize="antialias", mean=[...], std=[...], out)``

The same, written into ``out`` ``(N, 3, h, w)``, whose size, layout and dtype decide. It is contiguous, channels-last,
or the first three channels of a tensor with four, channels-last, of which the fourth is left as it is.

Errors, in one sentence with argument, expected, got: `InputError` of the reference, RuntimeError of compiled kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from efficientad_fast.ops.overload import Overload, require, require_one_device, require_positive_size
from efficientad_fast.reference.preprocess import IMAGENET_MEAN, IMAGENET_STD
from efficientad_fast.reference.preprocess import preprocess as preprocess_one

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RESIZES = ("antialias", "pillow")


def check(image: Tensor, size: Sequence[int], resize: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """What every implementation in Python refuses; csrc/preprocess.h says the same for the compiled ones."""
    shape = tuple(image.shape)
    rgb = len(shape) == 4 and shape[3] == 3 and shape[1] >= 1 and shape[2] >= 1
    require(rgb, "preprocess", "image", "(N, H, W, 3) with H and W of at least 1", shape)
    known = image.dtype in (torch.uint8, torch.float32)
    require(known, "preprocess", "image", "uint8, or float32 in [0, 1]", image.dtype)
    require_positive_size("preprocess", size)
    require(resize in RESIZES, "preprocess", "resize", "'antialias' or 'pillow'", repr(resize))
    for name, given in (("mean", list(mean)), ("std", list(std))):
        three = len(given) == 3 and all(map(math.isfinite, given))
        require(three, "preprocess", name, "three finite numbers", given)
    require(0 not in std, "preprocess", "std", "three numbers other than zero", list(std))


def check_dtype(name: str, dtype: torch.dtype) -> None:
    require(dtype in DTYPES, "preprocess", name, "float32, float16 or bfloat16", dtype)


def pixel_stride(out: Tensor) -> int:
    """Numbers from a pixel of ``(N, 3, h, w)`` to the next where its channels are next to each other, else 0.

    3, or 4 where they are the first three of four. Where two layouts are the same bytes, either answer is right.
    """
    images, _, height, width = out.shape
    for stride in (3, 4):
        dense = (stride * width * height, 1, stride * width, stride)
        sides = (images, 3, height, width)
        if all(side == 1 or one == wanted for side, one, wanted in zip(sides, out.stride(), dense, strict=True)):
            return stride
    return 0


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def reference(
    image: Tensor,
    size: Sequence[int],
    *,
    resize: str = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    result = fake(image, size, resize=resize, mean=mean, std=std, channels_last=channels_last, dtype=dtype)
    height, width = size
    for one, target in zip(image.movedim(3, 1), result, strict=True):
        target.copy_(preprocess_one(one, (height, width), resize=resize, mean=mean, std=std, dtype=dtype))  # type: ignore[arg-type]
    return result


def fake(
    image: Tensor,
    size: Sequence[int],
    *,
    resize: str = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    check(image, size, resize, mean, std)
    check_dtype("dtype", dtype)
    shape = (image.shape[0], 3, *size)
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=_layout(channels_last))


def reference_out(
    image: Tensor,
    *,
    resize: str = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out: Tensor,
) -> None:
    fake_out(image, resize=resize, mean=mean, std=std, out=out)
    out.copy_(reference(image, out.shape[-2:], resize=resize, mean=mean, std=std, dtype=out.dtype))


def fake_out(
    image: Tensor,
    *,
    resize: str = "antialias",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out: Tensor,
) -> None:
    shape = tuple(out.shape)
    fitting = len(shape) == 4 and shape[:2] == (image.shape[0], 3)
    require(fitting, "preprocess", "out", f"({image.shape[0]}, 3, h, w)", shape)
    check(image, shape[2:], resize, mean, std)
    check_dtype("out", out.dtype)
    expected = "contiguous, channels-last, or the first three of four channels, channels-last"
    require(out.is_contiguous() or pixel_stride(out) > 0, "preprocess", "out", expected, f"strides {out.stride()}")
    require_one_device("preprocess", "image", image.device, {"out": out})


overloads = {"default": Overload(reference, fake), "out": Overload(reference_out, fake_out)}
