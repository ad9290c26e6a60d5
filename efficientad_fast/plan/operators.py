"""The plan of a CPU: float32, by operators whose weights are packed."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.ops import autoencoder
from efficientad_fast.plan.base import Plan, PlanInput, Step, check_batch
from efficientad_fast.plan.folding import (
    Convolution,
    Distance,
    Folded,
    Refolded,
    channels_last,
    fold,
    link,
    ordinary_tensors,
)
from efficientad_fast.reference.networks import Decoder, feature_size

_CPU = torch.device("cpu")

_SHAPES_KEPT = 2
"""Shapes of batches whose buffers a plan keeps: a folder's batches and its last, smaller one."""


class _Convolution:
    """With its weights packed."""

    def __init__(self, convolution: Convolution) -> None:
        parameters, self.geometry = convolution
        geometry = self.geometry
        algorithm = ops.cpu_algorithm("conv_pool", geometry.kernel_size, pool=geometry.pool)
        self.packed = torch.ops.efficientad_fast.conv_pool.pack(
            parameters.weight.float(), groups=geometry.groups, algorithm=algorithm
        )
        self.bias = parameters.bias.float()
        self.settings = {"kernel_size": geometry.kernel_size} | geometry.settings

    def step(self, layer: str, image: Tensor, out: Tensor, workspace: Tensor) -> Step:
        run = partial(
            torch.ops.efficientad_fast.conv_pool.out,
            image,
            self.packed,
            self.bias,
            **self.settings,
            out=out,
            workspace=workspace,
        )
        return Step(layer, (image,), [self.packed], self.settings, out, run)


class _Distance:
    """With its weights packed."""

    def __init__(self, distance: Distance) -> None:
        first, second, padding = distance
        self.settings = {
            "channels": len(first.bias),
            "kernel_first": first.kernel_size,
            "kernel_second": second.kernel_size,
            "padding_first": padding,
        }
        kernels = (first.kernel_size, second.kernel_size)
        # A 1x1 kernel gains nothing from being filtered as a larger one.
        filtered = 1 if 1 in kernels else max(kernels)
        self.packed = torch.ops.efficientad_fast.feature_distance.pack(
            first.weight.float(),
            second.weight.float(),
            algorithm=ops.cpu_algorithm("feature_distance", filtered),
        )
        self.bias = (first.bias - second.bias).float()

    def step(self, layer: str, first: Tensor, second: Tensor, out: Tensor, workspace: Tensor) -> Step:
        run = partial(
            torch.ops.efficientad_fast.feature_distance.out,
            first,
            second,
            self.packed,
            self.bias,
            **self.settings,
            out=out,
            workspace=workspace,
        )
        return Step(layer, (first, second), [self.packed], self.settings, out, run)


@dataclass(frozen=True)
class _Bound:
    """The steps of a prediction for one shape of batch, with their buffers: for one thread at a time.

    Attributes:
        distance: map_st, as it was when the steps were made.
    """

    distance: _Distance
    image: Tensor
    map_st: Tensor
    map_ae: Tensor
    workspace: Tensor
    steps: list[Step]


class OperatorPlan(Plan):
    """The networks as operators of the catalogue: weights folded, stacked and packed once, buffers kept.

    `efficientad_fast.plan.folding` says what becomes of the networks.

    Args:
        source: networks of the classes in `efficientad_fast.reference.networks`.
    """

    def __init__(self, source: PlanInput, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype)
        ops.load()
        folded = fold(source)
        self._padded = folded.padded
        self._stages = {layer: [_Convolution(one) for one in stage] for layer, stage in folded.stages.items()}
        self._autoencoder, self._autoencoder_biases = self._pack_autoencoder(folded)
        self._last = folded.last
        self._map_ae = _Distance(folded.map_ae)
        self._lock = threading.Lock()
        self._map_st: Refolded[_Distance] = Refolded()
        self._statistics = (source.teacher_mean, source.teacher_std)
        if source.teacher_mean is not None:
            self._map_st.get(self._statistics, self._pack_map_st)
        self._free: OrderedDict[tuple[int, int, int, int], list[_Bound]] = OrderedDict()

    @torch.no_grad()
    def raw_maps(self, batch: Tensor, *, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        with self._bound(batch, statistics) as bound:
            for step in bound.steps:
                step.run()
            return bound.map_st.clone(), bound.map_ae.clone()

    @contextlib.contextmanager
    def steps(self, batch: Tensor) -> Iterator[list[Step]]:
        """The operators of one prediction, in order, with ``batch`` in their buffers: for who wants to time them."""
        with self._bound(batch, None) as bound:
            yield bound.steps

    def memory(self, batch: Tensor) -> dict[str, int]:
        """Bytes of ``packed`` weights, and of the ``workspace`` and activations that such a batch takes beside them."""
        with self._bound(batch, None) as bound:
            packed = {one.data_ptr(): one for step in bound.steps for one in step.weights}
            used = {one.untyped_storage().data_ptr(): one for step in bound.steps for one in (*step.inputs, step.out)}
            return {
                "packed": sum(one.nbytes for one in packed.values()),
                "workspace": bound.workspace.nbytes + sum(one.untyped_storage().nbytes() for one in used.values()),
            }

    def _pack_map_st(self, mean: Tensor | None, std: Tensor | None) -> _Distance:
        return _Distance(self._last.map_st(mean, std))

    def _pack_autoencoder(self, folded: Folded) -> tuple[list[Tensor], list[Tensor]]:
        sizes = [*Decoder.step_sizes(self.size), feature_size(self.size, padding=self._padded)]
        encoders = autoencoder.ENCODER_LAYERS
        algorithms = ["direct"] * encoders + [
            ops.cpu_algorithm("autoencoder", one.kernel_size, outputs=height * width)
            for one, (height, width) in zip(folded.autoencoder[encoders:], sizes, strict=True)
        ]
        packed = [
            torch.ops.efficientad_fast.conv_pool.pack(one.weight.float(), algorithm=algorithm)
            for one, algorithm in zip(folded.autoencoder, algorithms, strict=True)
        ]
        return packed, [one.bias.float() for one in folded.autoencoder]

    @contextlib.contextmanager
    def _bound(self, batch: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Iterator[_Bound]:
        """The steps for such a batch, with it in their buffers; those of the shapes used last are kept for the next."""
        images, height, width = check_batch(batch)
        self._last.check(statistics)
        key = (images, height, width, torch.get_num_threads())
        with self._lock:
            distance = self._map_st.get(self._statistics if statistics is None else statistics, self._pack_map_st)
            free = self._free.pop(key, [])
            self._free[key] = free
            while len(self._free) > _SHAPES_KEPT:
                self._free.popitem(last=False)
            bound = free.pop() if free else None
        if bound is None or bound.distance is not distance:
            with ordinary_tensors():
                bound = self._bind(key, distance)
        bound.image.copy_(batch)
        yield bound
        with self._lock:
            if key in self._free:
                self._free[key].append(bound)

    def _bind(self, key: tuple[int, int, int, int], distance: _Distance) -> _Bound:
        images, height, width, threads = key
        features = feature_size((height, width), padding=self._padded)
        channels = [len(bias) for bias in self._autoencoder_biases]
        workspace = torch.empty(threads, autoencoder.workspace_size((height, width), features, channels))
        image = channels_last((images, 3, height, width), _CPU)
        hidden = channels_last((images, channels[-1], *features), _CPU)
        map_st, map_ae = torch.empty(images, 1, *features), torch.empty(images, 1, *features)
        geometries = {layer: [one.geometry for one in stage] for layer, stage in self._stages.items()}
        links, teacher, student = link(geometries, image, torch.float32)
        steps = [self._stages[layer][index].step(layer, read, out, workspace) for layer, index, read, out in links]
        run = partial(
            torch.ops.efficientad_fast.autoencoder.out,
            image,
            self._autoencoder,
            self._autoencoder_biases,
            out=hidden,
            workspace=workspace,
        )
        steps.append(Step("autoencoder", (image,), self._autoencoder, {}, hidden, run))
        steps.append(distance.step("map_st", teacher, student, map_st, workspace))
        steps.append(self._map_ae.step("map_ae", hidden, student, map_ae, workspace))
        return _Bound(distance, image, map_st, map_ae, workspace, steps)
