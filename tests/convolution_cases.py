"""What the cases of ``conv_pool``, ``feature_distance`` and ``autoencoder`` are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from operator_cases import numbers
from torch import Tensor

from efficientad_fast.ops import packing

Change = Callable[[Tensor], Tensor]


def signed(shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2 * numbers(shape, seed=seed, dtype=torch.float64).float() - 1


def weights(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    """With which outputs are about as large as :func:`signed` inputs are."""
    return signed(shape, seed) * math.sqrt(3 / math.prod(shape[1:]))


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def some_channels(images: Tensor) -> Tensor:
    """A view of some channels of a channels-last tensor: channels are neighbours, pixels are not."""
    count = images.shape[1]
    wide = channels_last(torch.nn.functional.pad(images, (0, 0, 0, 0, 3, 2)))
    return wide[:, 3 : 3 + count]


def window(images: Tensor) -> Tensor:
    """Rows and columns of a larger channels-last tensor."""
    return channels_last(torch.nn.functional.pad(images, (2, 1, 1, 3)))[..., 1:-3, 2:-1]


def planes_first(images: Tensor) -> Tensor:
    return images.contiguous()


def turned(images: Tensor) -> Tensor:
    """The same numbers with columns next to each other."""
    return images.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_channel(images: Tensor) -> Tensor:
    return channels_last(images.repeat_interleave(2, 1))[:, ::2]


LAYOUTS: tuple[Change, ...] = (channels_last, some_channels, window, planes_first, turned, every_other_channel)


def with_value(value: float) -> Change:
    """In the middle of the last image, in its last channel."""

    def change(images: Tensor) -> Tensor:
        images = channels_last(images)
        images[-1, -1, images.shape[2] // 2, images.shape[3] // 3] = value
        return images

    return change


def workspace(threads: int, least: int) -> Tensor:
    """Full of NaN, for what it holds means nothing, and a little larger than it must be where there are several."""
    return torch.full((threads, least + 16 * (threads - 1)), math.nan)


def written(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations to be written, full of NaN."""
    return packing.dense(shape, torch.empty(0)).fill_(math.nan).to(dtype)


def eighth_channels(images: Tensor) -> Tensor:
    """As :func:`some_channels`, which begin at a multiple of 16 bytes and are as far from pixel to pixel."""
    wide = channels_last(torch.nn.functional.pad(images, (0, 0, 0, 0, 16, 16)))
    return wide[:, 16 : 16 + images.shape[1]]


def narrowed(given: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype, with its strides."""
    return torch.empty_strided(given.shape, given.stride(), dtype=dtype).copy_(given)


def quantity(operator: str, planes: int) -> str:
    """The row of the tolerances for that many planes."""
    special = {1: ", direct", 81: ", F(6x6, 4x4)"}
    return operator + special.get(planes, "")
