"""Time of ``preprocess``: a uint8 image of 1024 x 1024 to the networks' input of 256 x 256, by either resize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from assertions import assert_close
from operators import every_runner, measure
from PIL import Image
from tolerances import Tolerance, tolerance
from torch import Tensor

from efficientad_fast.ops import preprocess as contract
from efficientad_fast.reference.preprocess import IMAGENET_MEAN, IMAGENET_STD

SIDE = 256

# (x / 255 - mean) / std as one multiplication and addition, whose factors whoever calls it often makes once.
MEAN, STD = (torch.tensor(one).view(1, 3, 1, 1) for one in (IMAGENET_MEAN, IMAGENET_STD))
SCALE, SHIFT = 1 / (255 * STD), -MEAN / STD

A_LEVEL = Tolerance(
    0.0, 1.001 * float(SCALE.max()), 0.0, "PyTorch's sums before rounding to 8 bits are not Pillow's: a level apart"
)


def _resized(planes: Tensor) -> Tensor:
    return F.interpolate(planes, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)


def antialias(image: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor]:
    """With PyTorch's own operators: the image is channels-last as it comes, and its resize has a kernel for that."""
    return (torch.addcmul(shift, _resized(image.permute(0, 3, 1, 2).float()), scale),)


def pillow(image: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor]:
    """As in `antialias`, on 8-bit values, for which PyTorch has a kernel on the processor alone."""
    planes = image.permute(0, 3, 1, 2)
    levels = _resized(planes.float()).round() if image.is_cuda else _resized(planes)
    return (torch.addcmul(shift, levels, scale),)


def exact(image: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor]:
    return (contract.reference(image, (SIDE, SIDE), resize="pillow"),)


@every_runner
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("resize", contract.RESIZES)
def test_preprocess(benchmark: Any, runner: tuple[str, str], resize: str, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 1024, 1024, 3), dtype=torch.uint8, generator=generator)

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(resize=resize, out=results[0])

    measure(
        benchmark,
        runner,
        "preprocess",
        f"1024x1024 to {SIDE}x{SIDE}, {resize}, batch {batch}",
        {"antialias": antialias, "pillow": pillow}[resize],
        call,
        [image],
        [torch.empty(batch, 3, SIDE, SIDE)],
        constants=[SCALE, SHIFT],
        trusted=exact if resize == "pillow" else None,
        rivals_tolerance=A_LEVEL if resize == "pillow" else None,
    )


def test_pillow_itself(benchmark: Any) -> None:
    """What the ``pillow`` resize replaces, with the same bits: Pillow's resize, then PyTorch."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 1024, 1024, 3), dtype=torch.uint8, generator=generator)

    def run() -> Tensor:
        resized = Image.fromarray(image[0].numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return torch.addcmul(SHIFT, torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float(), SCALE)

    assert_close(run(), *exact(image, SCALE, SHIFT), tolerance("preprocess", torch.float32), "Pillow")
    benchmark.group = f"preprocess, 1024x1024 to {SIDE}x{SIDE}, pillow, batch 1, cpu"
    benchmark.pedantic(run, rounds=100, iterations=1, warmup_rounds=10)
