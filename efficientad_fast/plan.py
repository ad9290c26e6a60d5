"""From a detector's weights to what a backend runs.

A plan is built once for a device and a dtype; it decides and packs then, so that running a batch decides nothing.
Backends implement :class:`Plan`; :func:`build_plan` chooses one.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from efficientad_fast import ops
from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import MapConvention, Quantiles
from efficientad_fast.reference.networks import FEATURE_BORDER

Backend = Literal["auto", "reference"]

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
        InputError: unknown backend.
    """
    if backend not in get_args(Backend):
        raise InputError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}.")
    return ReferencePlan(source, device, dtype)
