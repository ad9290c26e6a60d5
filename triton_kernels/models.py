"""The convolutions of EfficientAD-S and -M, which the kernel report compiles: SPEC, "Patch description network".

Teacher and student are two groups. Their stems see one image, with a channel of zeros, so that a pixel is 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

SIDE = 256

ModelSize = Literal["s", "m"]


@dataclass(frozen=True)
class Convolution:
    """Of both patch description networks, before their last ones.

    Attributes:
        channels, outputs: of a group.
        side: height and width of the input.
    """

    name: str
    channels: int
    outputs: int
    kernel: int
    groups: int = 2
    pool: bool = False
    padding: int = 0
    pool_padding: int = 0
    side: int = SIDE

    @property
    def out_side(self) -> int:
        made = self.side + 2 * self.padding - self.kernel + 1
        return (made + 2 * self.pool_padding) // 2 if self.pool else made


_LAYERS: dict[ModelSize, list[Convolution]] = {
    "s": [
        Convolution("conv1", 4, 256, 4, groups=1, pool=True),
        Convolution("conv2", 128, 256, 4, pool=True),
        Convolution("conv3", 256, 256, 3),
    ],
    "m": [
        Convolution("conv1", 4, 512, 4, groups=1, pool=True),
        Convolution("conv2", 256, 512, 4, pool=True),
        Convolution("conv3", 512, 512, 1),
        Convolution("conv4", 512, 512, 3),
        Convolution("conv5 of the teacher", 512, 384, 4, groups=1),
        Convolution("conv5 of the student", 512, 768, 4, groups=1),
    ],
}


def convolutions(model_size: ModelSize, *, padded: bool = False) -> list[Convolution]:
    """In order, at the sizes of 256 x 256 images."""
    found: list[Convolution] = []
    side = SIDE
    for layer in _LAYERS[model_size]:
        padding = (3 if layer.pool else 1 if layer.kernel == 3 else 0) if padded else 0
        found.append(replace(layer, side=side, padding=padding, pool_padding=int(layer.pool and padded)))
        # Both conv5 read the same.
        side = side if "teacher" in layer.name else found[-1].out_side
    return found


def last_channels(model_size: ModelSize) -> tuple[tuple[int, int], int]:
    """Of the last convolutions, whose outputs `feature_distance` compares: teacher's and student's channels; kernel."""
    return ((256, 256), 4) if model_size == "s" else ((384, 768), 1)


def channels_last(given: Tensor) -> Tensor:
    return given.contiguous(memory_format=torch.channels_last)
