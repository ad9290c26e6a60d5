"""What plans of operators share: the networks as stacked convolutions, folded in float64, and their buffers.

Teacher and student go through their convolutions together: the stems see one image, and what follows runs as two
groups. Their last convolutions are linear and only differences of them are used, so that each map is one convolution
over both inputs, with weights ``[W_T / std, -W_S]``, whose outputs are squared and averaged and never written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from efficientad_fast.errors import InputError
from efficientad_fast.plan.base import PlanInput
from efficientad_fast.reference.networks import PatchDescriptionNetwork

_Made = TypeVar("_Made")

Scales = Mapping[str, tuple[Tensor, Tensor]]
"""Of activations, by layer: teacher's and student's, ``(channels,)`` each; of the autoencoder, the same twice."""

Statistics = tuple[Tensor | None, Tensor | None]
"""The teacher's mean and std."""


class Parameters(NamedTuple):
    """Of a convolution, in float64, in which they are folded."""

    weight: Tensor
    bias: Tensor

    @staticmethod
    def of(network: nn.Module, name: str) -> Parameters:
        convolution = network.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
        return Parameters(convolution.weight.detach().double(), convolution.bias.detach().double())

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]

    def outputs(self, chosen: slice) -> Parameters:
        return Parameters(self.weight[chosen], self.bias[chosen])

    def normalised(self, mean: Tensor, std: Tensor) -> Parameters:
        """With which the convolution's output is ``(output - mean) / std``."""
        mean, std = (one.detach().to(self.weight.device).double().flatten() for one in (mean, std))
        # Divided by zero, all of a channel is infinite; infinite weights would make it NaN.
        scale = torch.where(std == 0, 0, 1 / std)[:, None, None, None]
        bias = torch.where(std == 0, math.inf, (self.bias - mean) / std)
        return Parameters(self.weight * scale, bias)

    def reading(self, scale: Tensor) -> Parameters:
        """For an input that was divided by ``scale``, by channel."""
        return Parameters(self.weight * scale[None, :, None, None], self.bias)

    def writing(self, scale: Tensor) -> Parameters:
        """With which the output is divided by ``scale``, by channel: the same after ReLU, of positive scales."""
        return Parameters(self.weight / scale[:, None, None, None], self.bias / scale)


@dataclass(frozen=True)
class Geometry:
    """Of a convolution with ReLU, and perhaps pooling, of the patch description networks."""

    kernel_size: int
    outputs: int
    padding: int
    pool: bool
    pool_padding: int
    groups: int

    @property
    def settings(self) -> dict[str, int]:
        """Arguments of ``conv_pool``."""
        return {
            "padding": self.padding,
            "relu": True,
            "pool": self.pool,
            "pool_padding": self.pool_padding,
            "groups": self.groups,
        }

    def shape(self, images: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Of what it makes of images of that size."""
        sides = (side + 2 * self.padding - self.kernel_size + 1 for side in (height, width))
        if self.pool:
            sides = ((side + 2 * self.pool_padding) // 2 for side in sides)
        height, width = sides
        return images, self.outputs, height, width


class Convolution(NamedTuple):
    parameters: Parameters
    geometry: Geometry


class Distance(NamedTuple):
    """The mean square of the difference of two convolutions, of which the first is padded by ``padding``."""

    first: Parameters
    second: Parameters
    padding: int = 0


@dataclass(frozen=True)
class LastConvolutions:
    """Of the teacher, and of the half of the student that predicts it."""

    teacher: Parameters
    student: Parameters

    def map_st(self, mean: Tensor | None, std: Tensor | None) -> Distance:
        teacher = self.teacher
        if mean is not None and std is not None:
            teacher = teacher.normalised(mean, std)
        return Distance(teacher, self.student)

    def check(self, statistics: tuple[Tensor, Tensor] | None) -> None:
        """Raises an :class:`InputError` for statistics of another shape."""
        shape = (1, len(self.teacher.bias), 1, 1)
        for name, one in zip(("mean", "std"), statistics or (), strict=False):
            if one.shape != shape:
                raise InputError(f"The teacher's {name} must have shape {shape}, got {tuple(one.shape)}.")


@dataclass(frozen=True)
class Folded:
    """The networks in float64.

    Attributes:
        padded: whether convolutions and pools are.
        stages: by layer, both networks' convolutions: as one where their shapes are equal, else the teacher's, then
            the student's.
        autoencoder: up to its last convolution.
    """

    padded: bool
    stages: dict[str, list[Convolution]]
    autoencoder: list[Parameters]
    last: LastConvolutions
    map_ae: Distance


def hidden_layers(network: nn.Module) -> tuple[list[str], str]:
    """Names of the convolutions with ReLU, and of the last one."""
    *hidden, last = (name for name, layer in network.named_children() if isinstance(layer, nn.Conv2d))
    return hidden, last


@torch.no_grad()
def fold(source: PlanInput, scales: Scales | None = None) -> Folded:
    """Of networks of the classes in `efficientad_fast.reference.networks`.

    Args:
        scales: by which activations are divided where they are written, by layer.
    """
    teacher, student, autoencoder = source.teacher, source.student, source.autoencoder
    assert isinstance(teacher, PatchDescriptionNetwork)
    hidden, last = hidden_layers(teacher)

    def both(name: str, before: str | None) -> tuple[Parameters, Parameters]:
        found = [Parameters.of(network, name) for network in (teacher, student)]
        if scales is not None:
            if before is not None:
                found = [one.reading(scale) for one, scale in zip(found, scales[before], strict=True)]
            if name in scales:
                found = [one.writing(scale) for one, scale in zip(found, scales[name], strict=True)]
        return found[0], found[1]

    stages: dict[str, list[Convolution]] = {}
    before: str | None = None
    for index, name in enumerate(hidden):
        stages[name] = _stage(*both(name, before), index, padded=teacher.padding)
        before = name
    teacher_last, student_last = both(last, before)
    encoder = [Parameters.of(autoencoder, f"encoder.enconv{layer}") for layer in range(1, 7)]
    decoder = [Parameters.of(autoencoder, f"decoder.deconv{layer}") for layer in range(1, 9)]
    if scales is not None:
        scale, _ = scales["autoencoder"]
        decoder[-2:] = [decoder[-2].writing(scale), decoder[-1].reading(scale)]
    half = len(teacher_last.bias)
    return Folded(
        teacher.padding,
        stages,
        [*encoder, *decoder[:-1]],
        LastConvolutions(teacher_last, student_last.outputs(slice(half))),
        Distance(decoder[-1], student_last.outputs(slice(half, None)), padding=1),
    )


def _stage(teacher: Parameters, student: Parameters, index: int, *, padded: bool) -> list[Convolution]:
    pool, padding = index < 2, 0
    if padded and (pool or teacher.kernel_size == 3):
        padding = teacher.kernel_size - 1 if pool else 1

    def make(parameters: Parameters, groups: int) -> Convolution:
        outputs = len(parameters.bias)
        pool_padding = int(pool and padded)
        return Convolution(parameters, Geometry(parameters.kernel_size, outputs, padding, pool, pool_padding, groups))

    if teacher.weight.shape != student.weight.shape:
        return [make(teacher, 1), make(student, 1)]
    stacked = Parameters(*(torch.cat(pair) for pair in zip(teacher, student, strict=True)))
    return [make(stacked, 1 if index == 0 else 2)]


class Link(NamedTuple):
    """A convolution of a stage, the ``which``-th, with what it reads and writes."""

    layer: str
    which: int
    read: Tensor
    out: Tensor


def link(
    stages: Mapping[str, Sequence[Geometry]], image: Tensor, dtype: torch.dtype
) -> tuple[list[Link], Tensor, Tensor]:
    """Stages one after another, and the teacher's and the student's last activations, in buffers of ``dtype``.

    A stage reads one of two buffers and writes to the other.
    """
    images, _, height, width = image.shape
    written, size = [], (height, width)  # shapes, by stage
    for stage in stages.values():
        written.append([one.shape(images, *size) for one in stage])
        size = written[-1][0][2:]
    buffers = [
        image.new_empty(max(sum(map(math.prod, shapes)) for shapes in written[parity::2]), dtype=dtype)
        for parity in range(2)
    ]
    links, sources = [], [image]
    for number, ((layer, stage), shapes) in enumerate(zip(stages.items(), written, strict=True)):
        outs = _channels_last_in(buffers[number % 2], shapes)
        if len(sources) != len(stage):
            sources = list(sources[0].chunk(2, dim=1))
        links += [Link(layer, index, read, out) for index, (read, out) in enumerate(zip(sources, outs, strict=True))]
        sources = outs
    teacher, student = sources if len(sources) == 2 else sources[0].chunk(2, dim=1)
    return links, teacher, student


def channels_last(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations to be written, dense."""
    return _channels_last_in(torch.empty(math.prod(shape), device=device, dtype=dtype), [shape])[0]


def _channels_last_in(buffer: Tensor, shapes: Sequence[tuple[int, int, int, int]]) -> list[Tensor]:
    """Tensors of those shapes in channels-last memory, one behind the other in ``buffer``."""
    tensors, first = [], 0
    for images, channels, height, width in shapes:
        strides = (height * width * channels, 1, width * channels, channels)
        tensors.append(buffer.as_strided((images, channels, height, width), strides, first))
        first += images * channels * height * width
    return tensors


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is made in inference mode could not be written to outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Refolded(Generic[_Made]):
    """What was made of the teacher statistics given last; made again only where their values differ.

    Drop-in callers pass statistics each time. For one thread at a time.
    """

    def __init__(self) -> None:
        self._kept: tuple[Statistics, Statistics, tuple[int | None, ...], _Made] | None = None

    def get(self, statistics: Statistics, make: Callable[[Tensor | None, Tensor | None], _Made]) -> _Made:
        versions = tuple(map(_version, statistics))
        if self._kept is not None:
            values, given, known, made = self._kept
            unchanged = versions == known and all(map(_is_identical, given, statistics))
            if unchanged or all(map(_is_same, values, statistics)):
                self._kept = (values, statistics, versions, made)
                return made
        with ordinary_tensors():
            made = make(*statistics)
            mean, std = (None if one is None else one.detach().clone() for one in statistics)
        self._kept = ((mean, std), statistics, versions, made)
        return made


def _version(given: Tensor | None) -> int | None:
    """How often it was changed in place, where that is counted."""
    return None if given is None or given.is_inference() else given._version


def _is_identical(known: Tensor | None, given: Tensor | None) -> bool:
    """Whether they are the same without a look at the values, for which a GPU would be waited for.

    On a CPU values are looked at, which changes that are not counted are found by.
    """
    if known is None or given is None:
        return known is given
    return known is given and given.is_cuda and not given.is_inference()


def _is_same(known: Tensor | None, given: Tensor | None) -> bool:
    if known is None or given is None:
        return known is given
    same_kind = known.shape == given.shape and known.device == given.device
    return same_kind and torch.equal(known.nan_to_num(), given.nan_to_num())
