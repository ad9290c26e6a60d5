"""Time of ``autoencoder``: all of it but the last convolution, for images of 256 x 256."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.autoencoder import parameters
from convolution_cases import channels_last, signed, written
from operators import RIVALS, RUNNERS, every_runner, measure
from tolerances import tolerance
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops import autoencoder

SIZE, FEATURES = (256, 256), (56, 56)


def composition(image: Tensor, *parameters: Tensor) -> tuple[Tensor]:
    """With PyTorch's own operators, a call for each: the reference, channels-last."""
    weights, biases = parameters[: autoencoder.LAYERS], parameters[autoencoder.LAYERS :]
    return (autoencoder.compute(image, weights, biases, FEATURES),)


@every_runner
@pytest.mark.parametrize("batch", [1, 8])
def test_autoencoder(benchmark: Any, runner: tuple[str, str], batch: int) -> None:
    image = channels_last(signed((batch, 3, *SIZE), 99))
    weights, biases = parameters(autoencoder.CHANNELS)
    packed: list[Tensor] = []
    placed_biases = [one.to(runner[1]) for one in biases]
    row = ""
    workspace = torch.empty(0)
    if runner[0] not in RIVALS:
        ops.load()
        for index, (layer, weight) in enumerate(zip(autoencoder.layers(SIZE, FEATURES), weights, strict=True)):
            pixels = layer.size[0] * layer.size[1]
            algorithm = ops.cpu_algorithm("autoencoder", layer.kernel, outputs=pixels)
            algorithm = algorithm if index >= autoencoder.ENCODER_LAYERS else "direct"
            one = torch.ops.efficientad_fast.conv_pool.pack(weight, algorithm=algorithm)
            row = "autoencoder, F(6x6, 4x4)" if one.shape[2] == 81 else row
            packed.append(one.to(runner[1]))
        numbers = autoencoder.workspace_size(SIZE, FEATURES)
        workspace = torch.empty(torch.get_num_threads(), numbers, device=runner[1])

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(packed, placed_biases, out=results[0], workspace=workspace)

    measure(
        benchmark,
        runner,
        "autoencoder",
        f"{SIZE[0]}x{SIZE[1]}, batch {batch}",
        composition,
        call,
        [image],
        [written((batch, autoencoder.CHANNELS[-1], *FEATURES))],
        constants=[*map(channels_last, weights), *biases],
        quantity=row,
        rounds=40,
    )


def rounded_in_between(image: Tensor, *parameters: Tensor) -> tuple[Tensor]:
    """In float32, in which products of float16 are exact, and rounded where the operator promises it."""
    weights, biases = parameters[: autoencoder.LAYERS], parameters[autoencoder.LAYERS :]
    wide, wide_biases = ([one.float() for one in given] for given in (weights, biases))
    return (autoencoder.compute_mixed(image.float(), wide, wide_biases, FEATURES, image.dtype),)


@pytest.mark.parametrize("runner", [one for one in RUNNERS if one.values[0][1] == "cuda"])
@pytest.mark.parametrize("batch", [1, 32])
def test_autoencoder_in_float16(benchmark: Any, runner: tuple[str, str], batch: int) -> None:
    """As the GPU plan runs it, of images with a fourth channel of zeros."""
    image = channels_last(torch.nn.functional.pad(signed((batch, 3, *SIZE), 99), (0, 0, 0, 0, 0, 1)).half())
    weights, biases = ([one.half() for one in given] for given in parameters(autoencoder.CHANNELS, image.shape[1]))
    weights = [channels_last(one) for one in weights]
    placed_weights, placed_biases = (
        [one.to(runner[1]) for one in weights],
        [one.float().to(runner[1]) for one in biases],
    )
    numbers = autoencoder.mixed_workspace_size(batch, SIZE, FEATURES)
    workspace = torch.empty(numbers, dtype=image.dtype, device=runner[1])

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(placed_weights, placed_biases, out=results[0], workspace=workspace)

    measure(
        benchmark,
        runner,
        "autoencoder",
        f"float16, {SIZE[0]}x{SIZE[1]}, batch {batch}",
        composition,
        call,
        [image],
        [written((batch, autoencoder.CHANNELS[-1], *FEATURES), image.dtype)],
        constants=[*weights, *biases],
        trusted=rounded_in_between,
        rivals_tolerance=tolerance("features", image.dtype),
        quantity="autoencoder, mixed",
        overload="mixed",
        rounds=40,
    )
