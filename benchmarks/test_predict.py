"""Time of one prediction, S and M, 256x256, batch 1, float32: plain PyTorch, the drop-in ``predict``, a detector.

Run with ``pytest benchmarks --benchmark-only``; ``--benchmark-json FILE`` keeps the figures with where they are from.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from assertions import assert_close
from fork_networks import OUT_CHANNELS, autoencoder, pdn_medium, pdn_small, plain_predict
from tolerances import tolerance
from torch import Tensor

from efficientad_fast import Detector, Prediction, dropin, predict
from efficientad_fast.plan import Plan
from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import Quantiles

SIDE = 256

# Nothing is subtracted, so that the figures compared keep their digits.
QUANTILES = Quantiles(0.0, 1.0, 0.0, 1.0)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none"),
        ],
    ),
]


@dataclass(frozen=True)
class Workload:
    """One image and one detector, as each of the rivals takes them."""

    device: str
    image: Tensor
    arguments: tuple[Any, ...]
    rival: dict[torch.memory_format, tuple[Any, ...]]
    detector: Detector
    expected: tuple[Tensor, Tensor, Tensor]

    def check(self, actual: Tensor, expected: Tensor) -> None:
        # cuDNN's default for float32 is TF32, which has the mantissa of float16.
        assert_close(actual, expected, tolerance("map", torch.float32 if self.device == "cpu" else torch.float16))

    def eager(self, layout: torch.memory_format) -> tuple[Tensor, ...]:
        """As the rival is usually run, or in the layout that our plan chooses: the fair comparison."""
        return self._finished(plain_predict(*self.rival[layout]))

    def drop_in(self) -> tuple[Tensor, ...]:
        return self._finished(predict(*self.arguments))

    def detect(self) -> Prediction:
        """With decoding, preprocessing, resizing, and the way back to the CPU."""
        prediction = self.detector.predict(self.image, device=self.device)
        assert isinstance(prediction, Prediction)
        return prediction

    def _finished(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result


@functools.cache
def workload(size: str, device: str) -> Workload:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    mean = 0.1 * torch.randn(1, OUT_CHANNELS, 1, 1, generator=generator)
    std = 0.5 + torch.rand(1, OUT_CHANNELS, 1, 1, generator=generator)
    torch.manual_seed(0)
    pdn = pdn_small if size == "s" else pdn_medium
    networks = [network.eval() for network in (pdn(), pdn(2 * OUT_CHANNELS), autoencoder())]
    known = dropin.recognise(*networks)
    assert isinstance(known, dropin.Recognised), known
    detector = Detector(
        known.teacher, known.student, known.autoencoder, mean.flatten(), std.flatten(), quantiles=QUANTILES
    )
    batch = detector.preprocessing(image)[None].to(device)
    quantiles = (QUANTILES.st_start, QUANTILES.st_end, QUANTILES.ae_start, QUANTILES.ae_end)
    placed = [network.to(device) for network in networks]
    arguments = (batch, *placed, mean.to(device), std.to(device), *quantiles)
    turned = [copy.deepcopy(network).to(memory_format=torch.channels_last) for network in placed]
    channels_last = (batch.contiguous(memory_format=torch.channels_last), *turned, *arguments[4:])
    rival = {torch.contiguous_format: arguments, torch.channels_last: channels_last}
    return Workload(device, image, arguments, rival, detector, plain_predict(*arguments))


def measure(benchmark: Any, run: Callable[[], object], size: str, device: str) -> None:
    benchmark.group = f"predict, {size.upper()}, {SIDE}x{SIDE}, batch 1, float32, {device}"
    benchmark.extra_info.update(size=size, device=device, dtype="float32", side=SIDE, batch=1)
    # The check's run is not enough: the first runs of a process grow the heap, which doubles their time.
    rounds, warmup = (5, 2) if device == "cpu" else (100, 10)
    benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=warmup)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_eager(benchmark: Any, size: str, device: str, layout: torch.memory_format) -> None:
    load = workload(size, device)
    for actual, expected in zip(load.eager(layout), load.expected, strict=True):
        load.check(actual, expected)
    measure(benchmark, functools.partial(load.eager, layout), size, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.filterwarnings("error")
def test_drop_in(benchmark: Any, size: str, device: str) -> None:
    load = workload(size, device)
    for actual, expected in zip(load.drop_in(), load.expected, strict=True):
        load.check(actual, expected)
    measure(benchmark, load.drop_in, size, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", ["s", "m"])
def test_detector(benchmark: Any, size: str, device: str) -> None:
    load = workload(size, device)
    anomaly_map = load.detect().anomaly_map
    assert anomaly_map is not None
    _, map_st, map_ae = load.expected
    expected = maps.combine_resized(map_st, map_ae, None, load.detector.size, pad_maps=load.detector.pad_maps)
    load.check(torch.from_numpy(anomaly_map), expected[0, 0])
    measure(benchmark, load.detect, size, device)


class InstantPlan(Plan):
    """Leaves nothing to time but finding the plan."""

    def raw_maps(self, batch: Tensor, *, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return batch[:, :1, :1, :1], batch[:, :1, :1, :1]


@pytest.fixture
def instant_plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dropin.forget()
    monkeypatch.setattr(dropin, "build_plan", InstantPlan)
    yield
    dropin.forget()


@pytest.mark.usefixtures("instant_plan")
def test_noticing_changes(benchmark: Any) -> None:
    """What the drop-in adds to each call: looking whether its three modules have changed."""
    load = workload("s", "cpu")
    benchmark.group = "predict, without the networks, cpu"
    benchmark.pedantic(predict, args=load.arguments, rounds=1000, iterations=1, warmup_rounds=10)
