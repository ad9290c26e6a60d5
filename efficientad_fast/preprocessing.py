"""From an image as it comes to the network's input: how it is decoded, resized and normalised."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.data.decode import check_decode_options, decode_image
from efficientad_fast.errors import InputError
from efficientad_fast.reference.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Resize,
    check_image,
    check_network_size,
)

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class DecodeOptions:
    """How arrays and files are read; see ``data.decode.decode_image``. ``None`` leaves it to the detector."""

    channel_order: str = "rgb"
    max_value: int | None = None
    apply_exif: bool | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; see ``data.decode`` and ``reference.preprocess``.

    Attributes:
        size: height and width in pixels.
        mean, std: of each channel, in units of [0, 1].
        max_value: what white is in 16-bit images, such as 4095 for a 12-bit camera; ``None``: 65535 in files, and
            arrays must come with their own.
        apply_exif: turn photographs upright as their EXIF data says.

    Raises:
        InputError: a size that the networks do not admit, or another value that cannot be.
    """

    size: tuple[int, int] = (256, 256)
    resize: Resize = "antialias"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    max_value: int | None = None
    apply_exif: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_network_size(self.size))
        if self.resize not in get_args(Resize):
            raise InputError(f"resize must be one of {', '.join(get_args(Resize))}, got {self.resize!r}.")
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and 0 in values):
                wanted = "three finite numbers" + (", none of them zero" if name == "std" else "")
                raise InputError(f"{name} must be {wanted}, got {values!r}.")
        check_decode_options("rgb", self.max_value)

    def decode(
        self,
        source: ImageSource,
        options: DecodeOptions | None = None,
        *,
        channels_last: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> Tensor:
        """``(3, H, W)``, uint8 or float32 in [0, 1]: ``source`` as :func:`data.decode.decode_image` reads it.

        Args:
            options: what differs for this image.
            channels_last: lay it out so, as :meth:`batch` reads it fastest.
            tell: called with a sentence where the result is not all that the file holds.
        """
        options = options or DecodeOptions()
        return decode_image(
            source,
            channel_order=options.channel_order,
            max_value=self.max_value if options.max_value is None else options.max_value,
            apply_exif=self.apply_exif if options.apply_exif is None else options.apply_exif,
            channels_last=channels_last,
            tell=tell,
        )

    def __call__(self, image: Tensor) -> Tensor:
        """``(3, H, W)`` uint8 or float in [0, 1] to ``(3, *size)`` float32, normalised."""
        check_image(image)
        ops.load()
        known = image if image.dtype == torch.uint8 else image.float()
        batch: Tensor = torch.ops.efficientad_fast.preprocess(
            known.movedim(0, -1).unsqueeze(0), self.size, resize=self.resize, mean=self.mean, std=self.std
        )
        return batch[0]

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images ``(3, H, W)``, uint8 or float in [0, 1], of any sizes, to ``(N, 3, *size)`` float32, normalised.

        The result is channels-last, as networks on a CPU read it.
        """
        result = self.empty_batch(len(images))
        for image, out in zip(images, result.split(1), strict=True):
            self.into(out, image)
        return result

    def empty_batch(self, images: int) -> Tensor:
        """``(images, 3, *size)`` float32, channels-last, for :meth:`into`."""
        return torch.empty((images, 3, *self.size), memory_format=torch.channels_last)

    def into(self, out: Tensor, image: Tensor) -> None:
        """As :meth:`batch`, of one ``image``, into ``out``: ``(1, 3, *size)`` of an :meth:`empty_batch`."""
        ops.load()
        known = image if image.dtype == torch.uint8 else image.float()
        torch.ops.efficientad_fast.preprocess.out(
            known.movedim(0, -1).unsqueeze(0), resize=self.resize, mean=self.mean, std=self.std, out=out
        )
