"""From a detector's weights to what a backend runs.

A plan is built once for a device and a dtype; it decides and packs then, so that running a batch decides nothing.
:class:`ReferencePlan` runs the networks as they are, :class:`OperatorPlan` as kernels; :func:`build_plan` chooses.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from efficientad_fast import native, ops
from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.ops import autoencoder
from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import MapConvention, Quantiles
from efficientad_fast.reference.networks import (
    FEATURE_BORDER,
    Autoencoder,
    Decoder,
    PatchDescriptionNetwork,
    feature_size,
    require_admitted_size,
)

Backend = Literal["auto", "operators", "reference"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class PlanInput:
    """What a plan is made from.

    Attributes:
        teacher, student, autoencoder: networks in eval mode with outputs ``(N, C, h, w)``, ``(N, 2C, h, w)`` and
            ``(N, C, h, w)``; not changed by planning.
        teacher_mean, teacher_std: ``(1, C, 1, 1)``, or ``None`` for a teacher that is left as it is.
        quantiles: ``None`` leaves the maps as they are.
        size: height and width of the network's input.
    """

    teacher: nn.Module
    student: nn.Module
    autoencoder: nn.Module
    teacher_mean: Tensor | None
    teacher_std: Tensor | None
    quantiles: Quantiles | None
    map_convention: MapConvention
    pad_maps: bool
    size: tuple[int, int]


class Plan(ABC):
    """A detector made ready for one device and dtype. Safe to run from several threads at once."""

    def __init__(self, source: PlanInput, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.map_convention = source.map_convention
        self.pad_maps = source.pad_maps
        self.quantiles = source.quantiles
        self.size = source.size

    @abstractmethod
    def raw_maps(self, batch: Tensor, *, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``(map_st, map_ae)``, each ``(N, 1, h, w)`` at feature resolution, not normalised, without gradient.

        New tensors, which the caller may keep and change: float64 in a float64 plan, float32 in all others.

        Args:
            batch: ``(N, 3, H, W)``, preprocessed, any floating dtype, on any device, of any size that the networks
                admit.
            statistics: the teacher's mean and std, ``(1, C, 1, 1)``, for this call in place of the plan's.
        """

    def anomaly_map(
        self, map_st: Tensor, map_ae: Tensor, quantiles: Quantiles | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Anomaly maps ``(N, 1, *size)`` and scores ``(N,)`` of raw maps, by the operator of that name.

        Args:
            map_st, map_ae: as :meth:`raw_maps` returns them.
            quantiles: in place of the plan's; calibration has them before a plan does.
            size: height and width of the map. The scores are the images' only where the convention takes them there.
        """
        ops.load()
        result: tuple[Tensor, Tensor] = torch.ops.efficientad_fast.anomaly_map(
            map_st,
            map_ae,
            list(size),
            None if quantiles is None else list(astuple(quantiles)),
            border=FEATURE_BORDER if self.pad_maps else 0,
            convention=self.map_convention,
        )
        return result

    def scored_maps(
        self, map_st: Tensor, map_ae: Tensor, quantiles: Quantiles | None, original_sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Scores ``(N,)``, and the maps ``(1, 1, H, W)`` they are the maxima of: SPEC "Maps and score".

        Args:
            original_sizes: of the images before preprocessing, which the ``native`` convention goes back to.
        """
        if self.map_convention == "resized":
            anomaly_map, scores = self.anomaly_map(map_st, map_ae, quantiles, self.size)
            return scores, list(anomaly_map.split(1))
        scored = [
            self.anomaly_map(st, ae, quantiles, size)
            for st, ae, size in zip(map_st.split(1), map_ae.split(1), original_sizes, strict=True)
        ]
        return torch.cat([score for _, score in scored]), [anomaly_map for anomaly_map, _ in scored]

    @torch.inference_mode()
    def run(
        self, batch: Tensor, original_sizes: Sequence[tuple[int, int]], *, original_maps: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Scores and anomaly maps of a preprocessed batch.

        Args:
            batch: ``(N, 3, *size)``.
            original_sizes: height and width of each image before preprocessing.
            original_maps: return each map at its original size in place of the network's.

        Returns:
            Scores ``(N,)`` and N maps ``(H, W)`` on the CPU, dtype as :meth:`raw_maps`. The score is taken where
            the map convention says, whatever size the map is returned at.

        Raises:
            InputError: not one original size per image.
        """
        if len(original_sizes) != len(batch):
            raise InputError(f"original_sizes must hold one size per image, {len(batch)}, got {len(original_sizes)}.")
        map_st, map_ae = self.raw_maps(batch)
        if len(batch) == 0:
            return map_st.new_empty(0).cpu(), []
        scores, scored = self.scored_maps(map_st, map_ae, self.quantiles, original_sizes)
        if self.map_convention == "resized":
            wanted = original_sizes if original_maps else [self.size] * len(scored)
            sized = [maps.resize_map(one, size) for one, size in zip(scored, wanted, strict=True)]
        elif original_maps:
            sized = scored
        else:
            sized = list(self.anomaly_map(map_st, map_ae, self.quantiles, self.size)[0].split(1))
        return scores.cpu(), [one[0, 0].cpu() for one in sized]


class ReferencePlan(Plan):
    """Plain PyTorch: copies of the networks on the device, in channels-last layout (a quarter faster on CPUs)."""

    def __init__(self, source: PlanInput, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype)

        def place(network: nn.Module) -> nn.Module:
            placed = copy.deepcopy(network).to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            return placed.eval().requires_grad_(False)  # type: ignore[no-any-return]

        self._networks = tuple(place(network) for network in (source.teacher, source.student, source.autoencoder))
        self._map_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._statistics = self._placed((source.teacher_mean, source.teacher_std))

    @torch.no_grad()
    def raw_maps(self, batch: Tensor, *, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        placed = batch.to(device=self.device, dtype=self.dtype).contiguous(memory_format=torch.channels_last)
        # Differences and squares of half-precision features lose too much in half precision.
        teacher, student, autoencoder = (network(placed).to(self._map_dtype) for network in self._networks)
        mean, std = self._statistics if statistics is None else self._placed(statistics)
        return maps.raw_maps(teacher, student, autoencoder, mean, std)

    def _placed(self, statistics: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            None if statistic is None else statistic.to(device=self.device, dtype=self._map_dtype)
            for statistic in statistics
        ]


class Step(NamedTuple):
    """One operator of a prediction, bound to its buffers.

    Attributes:
        layer: what it computes, such as ``conv2`` or ``map_st``.
        inputs: the activations that it reads.
        packed: its weights.
        settings: its other arguments.
        out: what it writes.
        run: does it.
    """

    layer: str
    inputs: tuple[Tensor, ...]
    packed: Sequence[Tensor]
    settings: dict[str, int]
    out: Tensor
    run: Callable[[], None]


class _Parameters(NamedTuple):
    """Of a convolution, in float64, in which they are folded."""

    weight: Tensor
    bias: Tensor

    @staticmethod
    def of(network: nn.Module, name: str) -> _Parameters:
        convolution = network.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
        return _Parameters(convolution.weight.detach().double(), convolution.bias.detach().double())

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]

    def outputs(self, chosen: slice) -> _Parameters:
        return _Parameters(self.weight[chosen], self.bias[chosen])

    def normalised(self, mean: Tensor, std: Tensor) -> _Parameters:
        """With which the convolution's output is ``(output - mean) / std``."""
        mean, std = mean.detach().double().flatten(), std.detach().double().flatten()
        # Divided by zero, all of a channel is infinite; infinite weights would make it NaN.
        scale = torch.where(std == 0, 0, 1 / std)[:, None, None, None]
        bias = torch.where(std == 0, math.inf, (self.bias - mean) / std)
        return _Parameters(self.weight * scale, bias)


class _Convolution:
    """A convolution with ReLU, and perhaps pooling, of the patch description networks."""

    def __init__(self, parameters: _Parameters, *, padding: int, pool: bool, pool_padding: int, groups: int) -> None:
        algorithm = ops.cpu_algorithm("conv_pool", parameters.kernel_size, pool=pool)
        self.packed = torch.ops.efficientad_fast.conv_pool.pack(
            parameters.weight.float(), groups=groups, algorithm=algorithm
        )
        self.bias = parameters.bias.float()
        self.settings = {
            "kernel_size": parameters.kernel_size,
            "padding": padding,
            "relu": True,
            "pool": pool,
            "pool_padding": pool_padding,
            "groups": groups,
        }

    def shape(self, images: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Of what it makes of images of that size."""
        settings = self.settings
        sides = (side + 2 * settings["padding"] - settings["kernel_size"] + 1 for side in (height, width))
        if settings["pool"]:
            sides = ((side + 2 * settings["pool_padding"]) // 2 for side in sides)
        height, width = sides
        return images, len(self.bias), height, width

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
    """The mean square of the difference of two convolutions, of which the first is padded by ``padding``."""

    def __init__(self, first: _Parameters, second: _Parameters, *, padding: int = 0) -> None:
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

    Teacher and student go through their convolutions together: the stems see one image, and what follows runs as two
    groups. Their last convolutions are linear and only differences of them are used, so that each map is one
    convolution over both inputs, with weights ``[W_T / std, -W_S]``, whose outputs are squared and averaged and never
    written.

    Args:
        source: networks of the classes in `efficientad_fast.reference.networks`.
    """

    def __init__(self, source: PlanInput, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype)
        ops.load()
        teacher, student = source.teacher, source.student
        assert isinstance(teacher, PatchDescriptionNetwork)
        self._padded = teacher.padding
        *hidden, last = (name for name, layer in teacher.named_children() if isinstance(layer, nn.Conv2d))
        self._stages = {
            name: self._stage(_Parameters.of(teacher, name), _Parameters.of(student, name), index)
            for index, name in enumerate(hidden)
        }
        self._autoencoder, self._autoencoder_biases = self._pack_autoencoder(source.autoencoder)
        self._teacher_last, student_last = _Parameters.of(teacher, last), _Parameters.of(student, last)
        half = len(self._teacher_last.bias)
        self._student_last = student_last.outputs(slice(half))
        decoded = _Parameters.of(source.autoencoder, "decoder.deconv8")
        self._map_ae = _Distance(decoded, student_last.outputs(slice(half, None)), padding=1)
        self._lock = threading.Lock()
        # Drop-in callers pass statistics each time; what was folded and packed for the last ones is kept.
        self._statistics = (source.teacher_mean, source.teacher_std)
        self._folded: tuple[tuple[Tensor | None, Tensor | None], _Distance] | None = None
        if source.teacher_mean is not None:
            self._map_st(self._statistics)
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
            packed = {one.data_ptr(): one for step in bound.steps for one in step.packed}
            used = {one.untyped_storage().data_ptr(): one for step in bound.steps for one in (*step.inputs, step.out)}
            return {
                "packed": sum(one.nbytes for one in packed.values()),
                "workspace": bound.workspace.nbytes + sum(one.untyped_storage().nbytes() for one in used.values()),
            }

    def _stage(self, teacher: _Parameters, student: _Parameters, index: int) -> list[_Convolution]:
        """Both networks' convolution ``index``: as one where their shapes are equal."""
        pool, padding = index < 2, 0
        if self._padded and (pool or teacher.kernel_size == 3):
            padding = teacher.kernel_size - 1 if pool else 1
        make = partial(_Convolution, padding=padding, pool=pool, pool_padding=int(pool and self._padded))
        if teacher.weight.shape != student.weight.shape:
            return [make(teacher, groups=1), make(student, groups=1)]
        stacked = _Parameters(*(torch.cat(pair) for pair in zip(teacher, student, strict=True)))
        return [make(stacked, groups=1 if index == 0 else 2)]

    def _pack_autoencoder(self, network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        encoder = [_Parameters.of(network, f"encoder.enconv{layer}") for layer in range(1, 7)]
        decoder = [_Parameters.of(network, f"decoder.deconv{layer}") for layer in range(1, 8)]
        sizes = [*Decoder.step_sizes(self.size), feature_size(self.size, padding=self._padded)]
        algorithms = ["direct"] * 6 + [
            ops.cpu_algorithm("autoencoder", one.kernel_size, outputs=height * width)
            for one, (height, width) in zip(decoder, sizes, strict=True)
        ]
        packed = [
            torch.ops.efficientad_fast.conv_pool.pack(one.weight.float(), algorithm=algorithm)
            for one, algorithm in zip([*encoder, *decoder], algorithms, strict=True)
        ]
        return packed, [one.bias.float() for one in [*encoder, *decoder]]

    def _map_st(self, statistics: tuple[Tensor | None, Tensor | None]) -> _Distance:
        """For those teacher statistics; packed again only when their values differ from the last ones."""
        with self._lock:
            if self._folded is not None and all(map(_is_same, self._folded[0], statistics)):
                return self._folded[1]
            mean, std = statistics
            with _ordinary_tensors():
                teacher = self._teacher_last
                if mean is not None and std is not None:
                    teacher = teacher.normalised(mean, std)
                made = _Distance(teacher, self._student_last)
                kept = (None if mean is None else mean.detach().clone(), None if std is None else std.detach().clone())
            self._folded = (kept, made)
            return made

    @contextlib.contextmanager
    def _bound(self, batch: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Iterator[_Bound]:
        """The steps for such a batch, with it in their buffers; those of the shapes used last are kept for the next."""
        if batch.ndim != 4 or batch.shape[1] != 3:
            raise InputError(f"A batch must have shape (N, 3, H, W), got {tuple(batch.shape)}.")
        images, _, height, width = batch.shape
        require_admitted_size(height, width)
        shape = (1, len(self._teacher_last.bias), 1, 1)
        for name, one in zip(("mean", "std"), statistics or (), strict=False):
            if one.shape != shape:
                raise InputError(f"The teacher's {name} must have shape {shape}, got {tuple(one.shape)}.")
        distance = self._map_st(self._statistics if statistics is None else statistics)
        key = (images, height, width, torch.get_num_threads())
        with self._lock:
            free = self._free.pop(key, [])
            self._free[key] = free
            while len(self._free) > _SHAPES_KEPT:
                self._free.popitem(last=False)
            bound = free.pop() if free else None
        if bound is None or bound.distance is not distance:
            with _ordinary_tensors():
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
        image = _channels_last(images, 3, height, width)
        hidden = _channels_last(images, channels[-1], *features)
        map_st, map_ae = torch.empty(images, 1, *features), torch.empty(images, 1, *features)

        written = []  # shapes, by stage
        size = (height, width)
        for stage in self._stages.values():
            written.append([one.shape(images, *size) for one in stage])
            size = written[-1][0][2:]
        # A stage reads one of two buffers and writes to the other.
        buffers = [
            torch.empty(max(sum(map(math.prod, shapes)) for shapes in written[parity::2])) for parity in range(2)
        ]
        steps, sources = [], [image]
        for index, ((layer, stage), shapes) in enumerate(zip(self._stages.items(), written, strict=True)):
            outs = _channels_last_in(buffers[index % 2], shapes)
            if len(sources) != len(stage):
                sources = list(sources[0].chunk(2, dim=1))
            for one, read, out in zip(stage, sources, outs, strict=True):
                steps.append(one.step(layer, read, out, workspace))
            sources = outs
        teacher, student = sources if len(sources) == 2 else sources[0].chunk(2, dim=1)
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


_SHAPES_KEPT = 2
"""Shapes of batches whose buffers a plan keeps: a folder's batches and its last, smaller one."""


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """What is made in inference mode could not be written to outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _is_same(known: Tensor | None, given: Tensor | None) -> bool:
    if known is None or given is None:
        return known is given
    return known.shape == given.shape and torch.equal(known.nan_to_num(), given.nan_to_num())


def _channels_last(images: int, channels: int, height: int, width: int) -> Tensor:
    shape = (images, channels, height, width)
    return _channels_last_in(torch.empty(math.prod(shape)), [shape])[0]


def _channels_last_in(buffer: Tensor, shapes: Sequence[tuple[int, int, int, int]]) -> list[Tensor]:
    """Tensors of those shapes in channels-last memory, one behind the other in ``buffer``."""
    tensors, first = [], 0
    for images, channels, height, width in shapes:
        strides = (height * width * channels, 1, width * channels, channels)
        tensors.append(buffer.as_strided((images, channels, height, width), strides, first))
        first += images * channels * height * width
    return tensors


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype of :data:`DTYPES` by name or as itself; anything else is an :class:`InputError`."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return found


def parse_device(device: str | torch.device) -> torch.device:
    """A device that this machine has.

    Raises:
        InputError: no device name; BackendError: CUDA was asked for and cannot be used.
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"Unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:N'.") from error
    if parsed.type not in ("cpu", "cuda"):
        raise InputError(f"Device {device!r} is not supported: use 'cpu', 'cuda' or 'cuda:N'.")
    if parsed.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                f"Device {device!r} was asked for, but this PyTorch ({torch.__version__}) sees no CUDA GPU. "
                "Use device='cpu', or run `efficientad-fast info` to see what is missing."
            )
        if parsed.index is None:
            parsed = torch.device("cuda", torch.cuda.current_device())
        elif parsed.index >= torch.cuda.device_count():
            raise BackendError(f"Device {device!r} was asked for, but there are {torch.cuda.device_count()} CUDA GPUs.")
    return parsed


def build_plan(source: PlanInput, device: torch.device, dtype: torch.dtype, *, backend: Backend = "auto") -> Plan:
    """The plan for a device and dtype. ``backend`` forces one; ``auto`` takes the fastest that works there.

    Raises:
        InputError: unknown backend; BackendError: the one that was forced does not work there.
    """
    if backend not in get_args(Backend):
        raise InputError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}.")
    why_not = _why_no_operators(source, device, dtype)
    if backend == "operators" and why_not is not None:
        raise BackendError(f"Backend 'operators' was asked for, but {why_not}. Use backend='auto'.")
    if backend == "reference" or why_not is not None:
        return ReferencePlan(source, device, dtype)
    return OperatorPlan(source, device, dtype)


def _why_no_operators(source: PlanInput, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return f"it computes in float32 on the CPU alone, not in {dtype} on {device.type}"
    if not native.is_built("cpu"):
        return f"the CPU library is not there: {native.why_not_built('cpu')}"
    pair = (source.teacher, source.student)
    if (
        not all(type(network) is PatchDescriptionNetwork for network in pair)
        or type(source.autoencoder) is not Autoencoder
    ):
        return "the networks are not PatchDescriptionNetwork and Autoencoder of efficientad_fast.reference"
    if not _are_unchanged(source):
        return "layers of the networks are not those that their classes make"
    return None


def _are_unchanged(source: PlanInput) -> bool:
    """Whether all layers have the settings and shapes of new networks that fit each other."""
    teacher, autoencoder = source.teacher, source.autoencoder
    assert isinstance(teacher, PatchDescriptionNetwork) and isinstance(autoencoder, Autoencoder)
    size, channels, padding = teacher.model_size, teacher.out_channels, teacher.padding
    with torch.device("meta"):
        new = (
            PatchDescriptionNetwork(size, channels, padding=padding),
            PatchDescriptionNetwork(size, 2 * channels, padding=padding),
            Autoencoder(channels, padding=padding),
        )
    given = (teacher, source.student, autoencoder)
    same_layers = all(_outline(one) == _outline(other) for one, other in zip(given, new, strict=True))
    return same_layers and autoencoder.decoder.padding == padding


def _outline(network: nn.Module) -> tuple[str, dict[str, torch.Size]]:
    return repr(network), {name: parameter.shape for name, parameter in network.named_parameters()}
