"""Time of ``preprocess``: a uint8 image of 1024 x 1024 to the networks' input of 256 x 256, antialiased."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operators import every_runner, measure
from torch import Tensor

from efficientad_fast.reference.preprocess import IMAGENET_MEAN, IMAGENET_STD

SIDE = 256


def composition(image: Tensor) -> tuple[Tensor]:
    """With PyTorch's own operators: the image is channels-last as it comes, and its resize has a kernel for that."""
    resized = F.interpolate(
        image.permute(0, 3, 1, 2).float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
    )
    scale = 1 / (255 * image.new_tensor(IMAGENET_STD, dtype=torch.float32))
    shift = -image.new_tensor(IMAGENET_MEAN, dtype=torch.float32) / image.new_tensor(IMAGENET_STD, dtype=torch.float32)
    return (torch.addcmul(shift.view(1, 3, 1, 1), resized, scale.view(1, 3, 1, 1)),)


@every_runner
@pytest.mark.parametrize("batch", [1, 8])
def test_preprocess(benchmark: Any, runner: tuple[str, str], batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 1024, 1024, 3), dtype=torch.uint8, generator=generator)

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(out=results[0])

    outputs = [torch.empty(batch, 3, SIDE, SIDE)]
    workload = f"1024x1024 to {SIDE}x{SIDE}, batch {batch}"
    measure(benchmark, runner, "preprocess", workload, composition, call, [image], outputs)
