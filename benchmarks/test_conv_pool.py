"""Time of ``conv_pool``: the convolutions of a PDN-S teacher, of an image of 256 x 256."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import channels_last, quantity, signed, weights, written
from operators import RIVALS, every_runner, measure
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops import conv_pool

LAYERS = {
    "conv1": ((3, 256, 256), 128, 4, True),
    "conv2": ((128, 126, 126), 256, 4, True),
    "conv3": ((256, 61, 61), 256, 3, False),
}
"""Channels, height and width of the input; outputs, kernel, and whether they are pooled."""


@every_runner
@pytest.mark.parametrize("layer", LAYERS)
def test_conv_pool(benchmark: Any, runner: tuple[str, str], layer: str) -> None:
    shape, outputs, kernel, pool = LAYERS[layer]
    image = channels_last(signed((1, *shape), 0)).relu_()
    weight, bias = weights((outputs, shape[0], kernel, kernel), 1), signed((outputs,), 2)

    def composition(image: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        """With PyTorch's own operators, channels-last, which is the faster layout on processors and GPUs."""
        result = F.relu(F.conv2d(image, weight, bias), inplace=True)
        return (F.avg_pool2d(result, 2) if pool else result,)

    side = (shape[1] - kernel + 1) // (2 if pool else 1)
    outcome = written((1, outputs, side, side))
    row = ""
    packed = placed_bias = workspace = torch.empty(0)
    if runner[0] not in RIVALS:
        ops.load()
        packed = torch.ops.efficientad_fast.conv_pool.pack(weight, algorithm=ops.cpu_algorithm("conv_pool", kernel))
        row = quantity("conv_pool", packed.shape[2])
        workspace = torch.empty(torch.get_num_threads(), conv_pool.WORKSPACE, device=runner[1])
        packed, placed_bias = packed.to(runner[1]), bias.to(runner[1])

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(packed, placed_bias, kernel_size=kernel, pool=pool, out=results[0], workspace=workspace)

    workload = f"{layer} of PDN-S"
    constants = [channels_last(weight), bias]
    measure(
        benchmark,
        runner,
        "conv_pool",
        workload,
        composition,
        call,
        [image],
        [outcome],
        constants=constants,
        quantity=row,
        rounds=40,
    )
