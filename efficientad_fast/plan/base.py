"""What every plan is: from a batch to raw maps, from these to anomaly maps and scores; and what it is made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from efficientad_fast import ops
from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import MapConvention, Quantiles
from efficientad_fast.reference.networks import FEATURE_BORDER, require_admitted_size

Backend = Literal["auto", "operators", "triton", "cuda", "reference"]
"""``auto`` takes the fastest that works. ``operators`` insists on this package's kernels, ``triton`` and ``cuda`` on
those of one implementation in every step on a GPU, ``reference`` on plain PyTorch."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
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
        activations: for float8 alone, by layer (``conv1``, ``conv2``, ..., ``autoencoder``): the largest activation of
            each of its channels over calibration images, ``(channels,)`` float32, the teacher's before the student's,
            as `MixedPlan.observe` gives them.
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
    activations: Mapping[str, Tensor] | None = None


class ImagePreprocessing(Protocol):
    """What plans ask of `efficientad_fast.preprocessing.Preprocessing`."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def resize(self) -> str: ...

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...

    def batch(self, images: Sequence[Tensor]) -> Tensor: ...


Results = tuple[Tensor, list[Tensor]]
"""Scores ``(N,)`` and N maps ``(H, W)`` on the CPU."""


class Pending:
    """A batch that was submitted and may not be done yet."""

    def __init__(self, finish: Callable[[], Results]) -> None:
        self._finish = finish
        self._results: Results | None = None

    def result(self) -> Results:
        """Waits for the batch: scores and maps as :meth:`Plan.run` returns them."""
        finish = self._finish  # before looking at what another thread may write
        if self._results is None:
            self._results = finish()
            # It may hold memory that another batch could use.
            self._finish = _finished
        return self._results


def _finished() -> Results:
    raise AssertionError("a batch's results are made once")


class Step(NamedTuple):
    """One operator of a prediction, bound to its buffers.

    Attributes:
        layer: what it computes, such as ``conv2`` or ``map_st``.
        inputs: the activations that it reads.
        weights: of its convolutions, as its kernel reads them.
        settings: its other arguments.
        out: what it writes.
        run: does it: an overload of the catalogue with its arguments.
    """

    layer: str
    inputs: tuple[Tensor, ...]
    weights: Sequence[Tensor]
    settings: Mapping[str, int]
    out: Tensor
    run: partial[None]


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
            border=self._border,
            convention=self.map_convention,
        )
        return result

    @property
    def _border(self) -> int:
        return FEATURE_BORDER if self.pad_maps else 0

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
        return self._run(batch, original_sizes, original_maps)

    def _run(self, batch: Tensor, original_sizes: Sequence[tuple[int, int]], original_maps: bool) -> Results:
        map_st, map_ae = self.raw_maps(batch)
        if len(batch) == 0:
            return map_st.new_empty(0).cpu(), []
        scores, scored = self.scored_maps(map_st, map_ae, self.quantiles, original_sizes)
        sized = self._sized(map_st, map_ae, scored, original_sizes, original_maps)
        return scores.cpu(), [one[0, 0].cpu() for one in sized]

    def _sized(
        self,
        map_st: Tensor,
        map_ae: Tensor,
        scored: list[Tensor],
        original_sizes: Sequence[tuple[int, int]],
        original_maps: bool,
    ) -> list[Tensor]:
        """The maps ``(1, 1, H, W)`` to be returned, where ``scored`` are those that scores were taken of."""
        if self.map_convention == "native":
            if original_maps:
                return scored
            return list(self.anomaly_map(map_st, map_ae, self.quantiles, self.size)[0].split(1))
        if not original_maps:
            return scored
        return [maps.resize_map(one, size) for one, size in zip(scored, original_sizes, strict=True)]

    def submit(
        self, images: Sequence[Tensor], preprocessing: ImagePreprocessing, *, original_maps: bool = False
    ) -> Pending:
        """Scores and anomaly maps of images as they were decoded; on a GPU, without waiting for them.

        There, what is submitted next is copied to it while this is computed. Each batch that was submitted and not
        asked for takes memory: keep two.

        Args:
            images: each ``(3, h, w)``, uint8 or float in [0, 1], of any sizes; fastest where its memory is ``(h, w,
                3)``, as `data.decode` lays it out. May be changed once this returns.
            preprocessing: a `Preprocessing`, of the plan's size.
            original_maps: as for :meth:`run`.

        Raises:
            InputError: a preprocessing of another size.
        """
        self._check_size(preprocessing)
        batch = preprocessing.batch(images) if images else torch.empty(0, 3, *self.size)
        results = self.run(batch, _sizes(images), original_maps=original_maps)
        return Pending(lambda: results)

    def _check_size(self, preprocessing: ImagePreprocessing) -> None:
        if tuple(preprocessing.size) != tuple(self.size):
            raise InputError(
                f"preprocessing must be of the plan's size {tuple(self.size)}, got {tuple(preprocessing.size)}. "
                "Build a plan for that size."
            )


def _sizes(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(one.shape[-2], one.shape[-1]) for one in images]


def check_batch(batch: Tensor) -> tuple[int, int, int]:
    """Images, height and width of what is a batch that the networks admit.

    Raises:
        InputError: it is none.
    """
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise InputError(f"A batch must have shape (N, 3, H, W), got {tuple(batch.shape)}.")
    images, _, height, width = batch.shape
    require_admitted_size(height, width)
    return images, height, width


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
