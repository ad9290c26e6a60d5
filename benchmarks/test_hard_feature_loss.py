"""Time of ``hard_feature_loss``, alone and with its gradient: one image and a batch, as training has the features."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operators import RIVALS, every_runner, measure
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops.hard_feature_loss import WORKSPACE
from efficientad_fast.reference.losses import HARD_FRACTION

BATCHES = [1, 8]


def composition(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With PyTorch's own operators, the fastest found: the largest squares without sorting them, of which the mean is.

    Where many squares tie with the threshold some of them are missed, which these features do not have.
    """
    squared = torch.flatten((teacher - student) ** 2)
    position = HARD_FRACTION * (squared.numel() - 1)
    low = math.floor(position)
    largest = squared.topk(squared.numel() - low, sorted=False).values
    lower, upper = largest.detach().topk(2, largest=False).values.double()
    along = position - low
    threshold = (lower + (upper - lower) * along if along < 0.5 else upper - (upper - lower) * (1 - along)).float()
    selected = largest >= threshold
    count = selected.sum()
    return torch.where(selected, largest, 0).sum() / count, threshold, count


def features(images: int) -> tuple[Tensor, Tensor]:
    """Of the teacher, and the student's part that predicts them; both networks run channels-last."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, 384, 56, 56)
    teacher = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    student = torch.randn(images, 768, 56, 56, generator=generator).contiguous(memory_format=torch.channels_last)
    return teacher, student[:, :384]


@every_runner
@pytest.mark.parametrize("images", BATCHES)
def test_hard_feature_loss(benchmark: Any, runner: tuple[str, str], images: int) -> None:
    results = [torch.empty(()), torch.empty(()), torch.empty((), dtype=torch.int64)]
    workspace = torch.empty(WORKSPACE, dtype=torch.int64, device=runner[1])

    def call(function: Callable[..., Any], written: tuple[Tensor, ...]) -> None:
        loss, threshold, count = written
        function(loss=loss, threshold=threshold, count=count, workspace=workspace)

    workload = f"{images} x 384 x 56 x 56"
    inputs = features(images)
    measure(benchmark, runner, "hard_feature_loss", workload, composition, call, inputs, results, rounds=50)


@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("by", ["operator", *RIVALS])
def test_with_gradients(benchmark: Any, by: str, images: int) -> None:
    """Loss and the gradient of all the student's channels, on the processor, with all its threads."""
    ops.load()
    teacher, part = features(images)
    student = part._base.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(composition, dynamic=False)
    run: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
        "operator": torch.ops.efficientad_fast.hard_feature_loss,
        "eager": composition,
        "compiled": compiled,
    }

    def step() -> Tensor:
        loss = run[by](teacher, student[:, :384])[0]
        (gradient,) = torch.autograd.grad(loss, student)
        return gradient

    benchmark.group = f"hard_feature_loss and its gradient, {images} x 384 x 56 x 56"
    gradient = benchmark.pedantic(step, rounds=50, iterations=1, warmup_rounds=5)
    (expected,) = torch.autograd.grad(composition(teacher, student[:, :384])[0], student)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)
