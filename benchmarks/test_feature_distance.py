"""Time of ``feature_distance``: both raw maps of EfficientAD-S for 256 x 256, from what the last layers read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import channels_last, quantity, signed, weights
from operators import RIVALS, every_runner, measure
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops import feature_distance

OUTPUTS, SIDE = 384, 56
FIRST = {"map_st": (256, 4, 0), "map_ae": (64, 3, 1)}
"""Channels, kernel and padding: of the teacher, and of the autoencoder. The student is as the teacher."""


@every_runner
@pytest.mark.parametrize("raw_map", FIRST)
def test_feature_distance(benchmark: Any, runner: tuple[str, str], raw_map: str) -> None:
    convolutions = (FIRST[raw_map], FIRST["map_st"])
    padding = convolutions[0][2]
    sides = [SIDE + kernel - 1 - 2 * padding for _, kernel, padding in convolutions]
    images, kernels = [], []
    for seed, ((channels, kernel, _), side) in enumerate(zip(convolutions, sides, strict=True)):
        images.append(channels_last(signed((1, channels, side, side), seed)).relu_())
        kernels.append(weights((OUTPUTS, channels, kernel, kernel), 2 + seed))
    bias = signed((OUTPUTS,), 4)

    def composition(
        first: Tensor, second: Tensor, weight_first: Tensor, weight_second: Tensor, bias: Tensor
    ) -> tuple[Tensor]:
        """With PyTorch's own operators; features are subtracted and squared in place."""
        difference = F.conv2d(first, weight_first, bias, padding=padding)
        difference -= F.conv2d(second, weight_second)
        return (difference.square_().mean(1, keepdim=True),)

    row = ""
    packed = placed_bias = workspace = torch.empty(0)
    if runner[0] not in RIVALS:
        ops.load()
        algorithm = ops.cpu_algorithm("feature_distance", max(one.shape[3] for one in kernels))
        packed = torch.ops.efficientad_fast.feature_distance.pack(*kernels, algorithm=algorithm)
        row = quantity("feature_distance", packed.shape[2])
        workspace = torch.empty(torch.get_num_threads(), feature_distance.WORKSPACE, device=runner[1])
        packed, placed_bias = packed.to(runner[1]), bias.to(runner[1])

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(
            packed,
            placed_bias,
            channels=OUTPUTS,
            kernel_first=convolutions[0][1],
            kernel_second=convolutions[1][1],
            padding_first=padding,
            out=results[0],
            workspace=workspace,
        )

    measure(
        benchmark,
        runner,
        "feature_distance",
        f"{raw_map} of S",
        composition,
        call,
        images,
        [torch.empty(1, 1, SIDE, SIDE)],
        constants=[*map(channels_last, kernels), bias],
        quantity=row,
        rounds=40,
    )
