"""Who predicts on a GPU, and how each is set up: this package, and the usual ways to run PyTorch networks.

All take uint8 images ``(N, H, W, 3)`` of the network's size and give the anomaly map ``(N, 1, H, W)`` and the score
``(N,)`` in float32, by the ``resized`` convention. Rivals have what is known to help them: half
precision, channels-last memory, cudnn.benchmark, and a CUDA graph from the images to the scores.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers.networks import RawMaps
from efficientad_fast.detector import Detector
from efficientad_fast.plan import MixedPlan, Pending, Step, build_plan
from efficientad_fast.reference import maps

OURS = "efficientad_fast"

Results = tuple[Tensor, Tensor]
"""Anomaly maps and scores."""


class Contestant(ABC):
    """A detector made ready for a device and a dtype, and then for one batch of images after the other."""

    images: Tensor
    on_device: Tensor

    def __init__(self, detector: Detector, dtype: torch.dtype, device: torch.device) -> None:
        self.detector, self.dtype, self.device = detector, dtype, device

    def take(self, images: Tensor) -> None:
        """What every run has from now on: ``(N, H, W, 3)`` uint8 on the CPU."""
        self.images = images.pin_memory() if self.device.type == "cuda" else images
        self.on_device = images.to(self.device)

    @abstractmethod
    def raw_maps(self) -> tuple[Tensor, Tensor]:
        """Both, float32 ``(N, 1, h, w)``."""

    @abstractmethod
    def run(self) -> Results:
        """From images on the device to results there, without waiting. They are overwritten by the next run."""

    @abstractmethod
    def run_from_host(self) -> Results | tuple[list[Tensor], Tensor]:
        """From images on the CPU to results there; the maps perhaps one by one, each ``(H, W)``."""

    def overlapping(self) -> Callable[[], object]:
        """The same again and again; where copies overlap computing, a call gives what an earlier one took."""
        return self.run_from_host

    @contextlib.contextmanager
    def steps(self) -> Iterator[Sequence[Step]]:
        """Of a plan, where there is one."""
        yield []


class Network(nn.Module):
    """From images to raw maps, anomaly maps and scores in plain PyTorch."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector, dtype: torch.dtype) -> None:
        super().__init__()
        self.networks = RawMaps(copy.deepcopy(detector))
        self.dtype = dtype
        self.quantiles = detector.quantiles
        self.size, self.pad_maps = detector.size, detector.pad_maps
        shape = (1, 3, 1, 1)
        for name, values in (("mean", detector.preprocessing.mean), ("std", detector.preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).view(shape))
        for network in (self.networks.teacher, self.networks.student, self.networks.autoencoder):
            network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def raw_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch = ((images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std).to(self.dtype)
        networks = self.networks
        # Differences and squares in float32, as half precision is too narrow for them.
        features = (one(batch).float() for one in (networks.teacher, networks.student, networks.autoencoder))
        return maps.raw_maps(*features, networks.mean, networks.std)

    def forward(self, images: Tensor) -> Results:
        map_st, map_ae = self.raw_maps(images)
        anomaly_map = maps.combine_resized(map_st, map_ae, self.quantiles, self.size, pad_maps=self.pad_maps)
        return anomaly_map, maps.image_score(anomaly_map)


class Eager(Contestant):
    """PyTorch, channels-last, cudnn.benchmark, under a CUDA graph."""

    def __init__(self, detector: Detector, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(detector, dtype, device)
        torch.backends.cudnn.benchmark = True
        self.network = Network(detector, dtype).to(device)

    def take(self, images: Tensor) -> None:
        super().take(images)
        device = self.device
        self.input = torch.empty_like(self.on_device)
        self.replay, self.outputs = self._prepared(lambda: self.network(self.input))
        self.host = tuple(torch.empty_like(one, device="cpu", pin_memory=device.type == "cuda") for one in self.outputs)

    @torch.inference_mode()
    def _prepared(self, call: Callable[[], Results]) -> tuple[Callable[[], object], Results]:
        self.input.copy_(self.on_device)
        if self.device.type != "cuda":
            outputs = call()

            def again() -> None:
                for kept, made in zip(outputs, call(), strict=True):
                    kept.copy_(made)

            return again, outputs
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):  # cudnn tries its algorithms, which is not allowed while capturing
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return graph.replay, outputs

    @torch.inference_mode()
    def raw_maps(self) -> tuple[Tensor, Tensor]:
        return self.network.raw_maps(self.on_device)

    @torch.inference_mode()
    def run(self) -> Results:
        self.input.copy_(self.on_device)
        self.replay()
        return self.outputs

    @torch.inference_mode()
    def run_from_host(self) -> Results:
        self.input.copy_(self.images, non_blocking=True)
        self.replay()
        for kept, made in zip(self.host, self.outputs, strict=True):
            kept.copy_(made, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return self.host[0], self.host[1]


class Compiled(Eager):
    """torch.compile, mode="max-autotune", static shapes, channels-last; its own CUDA graphs."""

    @torch.inference_mode()
    def _prepared(self, call: Callable[[], Results]) -> tuple[Callable[[], object], Results]:
        self.compiled = torch.compile(self.network, mode="max-autotune", dynamic=False)
        self.input.copy_(self.on_device)
        self.outputs = self._compiled_once()  # compiles
        for _ in range(2):  # warms up, and records its graph
            self._again()
        return self._again, self.outputs

    def _again(self) -> None:
        # Results of a run that somebody holds would make it record another graph for the next.
        del self.outputs
        self.outputs = self._compiled_once()

    def _compiled_once(self) -> Results:
        torch.compiler.cudagraph_mark_step_begin()
        results: Results = self.compiled(self.input)
        return results


class Ours(Contestant):
    """The plan in mixed precision: `MixedPlan.run_images`, and `Plan.submit` from the host."""

    def __init__(self, detector: Detector, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(detector, dtype, device)
        source = detector.plan_input(detector.size, dtype)
        # On a CPU, where nobody would choose it, to look at its results.
        make = MixedPlan if device.type == "cpu" else partial(build_plan, backend="operators")
        plan = make(source, device, dtype)
        assert isinstance(plan, MixedPlan)
        self.plan = plan

    def take(self, images: Tensor) -> None:
        super().take(images)
        self.separate = [one.permute(2, 0, 1) for one in self.images]

    def raw_maps(self) -> tuple[Tensor, Tensor]:
        return self.plan.raw_maps(self._batch())

    def run(self) -> Results:
        scores, anomaly_maps = self.plan.run_images(self.on_device, self.detector.preprocessing)
        return anomaly_maps, scores

    def run_from_host(self) -> tuple[list[Tensor], Tensor]:
        scores, anomaly_maps = self.plan.submit(self.separate, self.detector.preprocessing).result()
        return anomaly_maps, scores

    def overlapping(self) -> Callable[[], object]:
        waiting: deque[Pending] = deque()

        def call() -> None:
            waiting.append(self.plan.submit(self.separate, self.detector.preprocessing))
            if len(waiting) > 1:
                waiting.popleft().result()

        return call

    @contextlib.contextmanager
    def steps(self) -> Iterator[Sequence[Step]]:
        with self.plan.steps(self._batch()) as steps:
            yield steps

    def _batch(self) -> Tensor:
        return self.detector.preprocessing.batch([one.permute(2, 0, 1) for one in self.images])


CONTESTANTS: dict[str, type[Contestant]] = {OURS: Ours, "eager": Eager, "compile": Compiled}
