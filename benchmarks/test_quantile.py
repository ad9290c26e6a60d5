"""Time of ``quantile``: the two quantiles of calibration, of one anomaly map and of more; beside NumPy for many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from operators import every_runner, measure
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops.quantile import WORKSPACE

FRACTIONS = [0.9, 0.995]


def composition(values: Tensor) -> tuple[Tensor]:
    """With PyTorch's own operators, the fastest found: each selection is made from what the one before left.

    ``torch.quantile`` sorts, interpolates in float32, and takes no more than 2^24 numbers in some releases. A sorted
    ``topk`` and ``kthvalue`` give the same numbers later.
    """
    last = values.numel() - 1
    largest = values.view(-1)
    results = []
    for fraction in FRACTIONS:  # in ascending order
        position = fraction * last
        low = math.floor(position)
        largest = largest.topk(last - low + 1, sorted=False).values
        lower, upper = largest.topk(2, largest=False).values.double()
        along = position - low
        results.append(lower + (upper - lower) * along if along < 0.5 else upper - (upper - lower) * (1 - along))
    return (torch.stack(results).float(),)


@every_runner
@pytest.mark.parametrize("maps", [1, 16])
def test_quantile(benchmark: Any, runner: tuple[str, str], maps: int) -> None:
    values = torch.rand(maps, 256, 256, generator=torch.Generator().manual_seed(0)).square_()
    workspace = torch.empty(WORKSPACE, dtype=torch.int64, device=runner[1])

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(FRACTIONS, out=results[0], workspace=workspace)

    workload = f"{len(FRACTIONS)} of {maps} x 256 x 256"
    measure(benchmark, runner, "quantile", workload, composition, call, [values], [torch.empty(len(FRACTIONS))])


@pytest.mark.parametrize("count", [10**7, 10**8])
@pytest.mark.parametrize("by", ["operator", "numpy"])
def test_many(benchmark: Any, by: str, count: int) -> None:
    """On the processor, with all its threads; NumPy interpolates in float32, and so differs in the last digits."""
    ops.load()
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    array = values.numpy()
    run: dict[str, Callable[[], Any]] = {
        "operator": lambda: torch.ops.efficientad_fast.quantile(values, FRACTIONS).numpy(),
        "numpy": lambda: np.quantile(array, FRACTIONS),
    }
    benchmark.group = f"quantile, {len(FRACTIONS)} of {count:,} numbers"
    result = benchmark.pedantic(run[by], rounds=5, iterations=1, warmup_rounds=1)
    np.testing.assert_allclose(result, [1.2815516, 2.5758293], rtol=5e-3)
