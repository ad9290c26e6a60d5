"""Time of ``anomaly_map``: two raw maps of 56 x 56 to an anomaly map of 256 x 256 and the image score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operators import every_runner, measure
from torch import Tensor

QUANTILES = (0.3, 1.1, 0.2, 0.9)
SIDE, FEATURES, BORDER = 256, 56, 4


def composition(map_st: Tensor, map_ae: Tensor) -> tuple[Tensor, Tensor]:
    """With PyTorch's own operators, in the fewest passes that give the same numbers: one padding and one resize."""
    st, ae = 0.05 / (QUANTILES[1] - QUANTILES[0]), 0.05 / (QUANTILES[3] - QUANTILES[2])
    offset = st * QUANTILES[0] + ae * QUANTILES[2]
    combined = F.pad(torch.add(st * map_st, map_ae, alpha=ae), (BORDER,) * 4)
    anomaly_map = F.interpolate(combined, (SIDE, SIDE), mode="bilinear", align_corners=False) - offset
    return anomaly_map, anomaly_map.amax(dim=(1, 2, 3))


@every_runner
@pytest.mark.parametrize("batch", [1, 32])
def test_anomaly_map(benchmark: Any, runner: tuple[str, str], batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(batch, 1, FEATURES, FEATURES, generator=generator) for _ in range(2)]

    def call(function: Callable[..., Any], results: tuple[Tensor, ...]) -> None:
        function(list(QUANTILES), border=BORDER, anomaly_map=results[0], score=results[1])

    outputs = [torch.empty(batch, 1, SIDE, SIDE), torch.empty(batch)]
    workload = f"{FEATURES}x{FEATURES} to {SIDE}x{SIDE}, batch {batch}"
    measure(benchmark, runner, "anomaly_map", workload, composition, call, maps, outputs)
