"""From a detector's weights to what a backend runs.

A plan is built once for a device and a dtype; it decides and packs then, so that running a batch decides nothing.
:class:`ReferencePlan` runs the networks as they are, :class:`OperatorPlan` (float32 on a CPU) and :class:`MixedPlan`
(narrower numbers on a GPU) as kernels; :func:`build_plan` chooses.
"""

from __future__ import annotations

import warnings
from typing import get_args

import torch
import torch.nn.functional as F

from efficientad_fast import native, ops
from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.plan.base import (
    DTYPES,
    Backend,
    ImagePreprocessing,
    Pending,
    Plan,
    PlanInput,
    Step,
    parse_device,
    parse_dtype,
)
from efficientad_fast.plan.mixed import MIXED_DTYPES, OPERATORS, MixedPlan
from efficientad_fast.plan.operators import OperatorPlan
from efficientad_fast.plan.reference import ReferencePlan
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork

__all__ = [
    "DTYPES",
    "Backend",
    "ImagePreprocessing",
    "MixedPlan",
    "OperatorPlan",
    "Pending",
    "Plan",
    "PlanInput",
    "ReferencePlan",
    "Step",
    "build_plan",
    "default_dtype",
    "parse_device",
    "parse_dtype",
]

LEAST_CAPABILITY = {torch.float16: (8, 0), torch.bfloat16: (8, 0), torch.float8_e4m3fn: (8, 9)}
"""Compute capability of the oldest GPUs whose kernels there are."""

GPU_IMPLEMENTATIONS: tuple[ops.Implementation, ...] = ("triton", "cuda")

LARGEST_ERRORS = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1, torch.float8_e4m3fn: 1e-1}
"""Of a plan's raw maps, as norm over norm, beyond which its kernels count as broken: ten times what rounding does."""

_warned: set[str] = set()


def build_plan(source: PlanInput, device: torch.device, dtype: torch.dtype, *, backend: Backend = "auto") -> Plan:
    """The plan for a device and dtype. ``backend`` forces one; ``auto`` takes the fastest that works there.

    A :class:`MixedPlan` on a GPU is tried on one image first, beside the networks in float32 (in float8, beside its
    operators' references), for its kernels were tried on few kinds of GPU. Where it fails, and where a GPU is too old
    for it or there is neither Triton nor the CUDA library, plain PyTorch runs, and a RuntimeWarning says why, once.

    Raises:
        InputError: unknown backend, or float8 without activations; BackendError: the plan that was forced does not work
            there, or float8, for which there is no other, does not.
    """
    if backend not in get_args(Backend):
        raise InputError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}.")
    is_float8 = dtype == torch.float8_e4m3fn
    if is_float8 and backend == "reference":
        raise BackendError("Plain PyTorch has no convolutions in float8. Use backend='auto', or dtype='float16'.")
    implementation: ops.Implementation | None = backend if backend in ("triton", "cuda") else None
    why_not = _why_no_operators(source, device, dtype, implementation)
    if backend == "reference":
        return ReferencePlan(source, device, dtype)
    if why_not is None:
        if device.type == "cpu" and not is_float8:
            return OperatorPlan(source, device, dtype)
        namespace = ops.NAMESPACE if implementation is None else f"{ops.NAMESPACE}_{implementation}"
        plan = MixedPlan(source, device, dtype, namespace=namespace)
        why_not = _why_broken(plan, source) if device.type == "cuda" else None
        if why_not is None:
            return plan
    if is_float8:
        raise BackendError(f"float8 was asked for, but {why_not}. Use dtype={_instead(device)!r}.")
    if backend != "auto":
        raise BackendError(f"Backend {backend!r} was asked for, but {why_not}. Use backend='auto'.")
    if device.type == "cuda" and dtype in MIXED_DTYPES:
        _warn_once(f"The networks run as plain PyTorch in {_name(dtype)}, which takes longer: {why_not}.")
    return ReferencePlan(source, device, dtype)


def default_dtype(device: torch.device, source: PlanInput) -> torch.dtype:
    """float16 on a GPU whose kernels there are, else float32."""
    runs = device.type == "cuda" and _why_no_operators(source, device, torch.float16, None) is None
    return torch.float16 if runs else torch.float32


def _why_no_operators(
    source: PlanInput, device: torch.device, dtype: torch.dtype, implementation: ops.Implementation | None
) -> str | None:
    """``implementation``: that alone, on a GPU."""
    if device.type == "cuda":
        why_not = _why_no_gpu_kernels(device, dtype, implementation)
    elif implementation is not None:
        why_not = f"its kernels run on GPUs alone, and the device is {device}"
    elif dtype == torch.float8_e4m3fn:
        why_not = None
    elif dtype != torch.float32:
        why_not = f"it computes in float32 on the CPU alone, not in {dtype} on {device.type}"
    else:
        why_not = None if native.is_built("cpu") else f"the CPU library is not there: {native.why_not_built('cpu')}"
    if why_not is not None:
        return why_not
    pair = (source.teacher, source.student)
    if (
        not all(type(network) is PatchDescriptionNetwork for network in pair)
        or type(source.autoencoder) is not Autoencoder
    ):
        return "the networks are not PatchDescriptionNetwork and Autoencoder of efficientad_fast.reference"
    if not _are_unchanged(source):
        return "layers of the networks are not those that their classes make"
    return None


def _why_no_gpu_kernels(
    device: torch.device, dtype: torch.dtype, implementation: ops.Implementation | None
) -> str | None:
    if dtype not in MIXED_DTYPES:
        return f"on a GPU they compute in float16, bfloat16 and float8 alone, not in {_name(dtype)}"
    capability, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY[dtype]
    if capability < least:
        name = torch.cuda.get_device_name(device)
        return (
            f"kernels in {_name(dtype)} need a GPU of compute capability {least[0]}.{least[1]} or newer, and {name} "
            f"has {capability[0]}.{capability[1]}"
        )
    ops.load()
    asked = GPU_IMPLEMENTATIONS if implementation is None else (implementation,)
    working = [one for one in asked if ops.works_on(one, device)]
    # What a plan cannot do without; images and results may take longer.
    needed = [name for name in OPERATORS if "mixed" in name or implementation is not None]
    missing = [name for name in needed if not any(ops.runs(one, name, device) for one in working)]
    if not missing:
        return None
    lacking = f"there is no kernel of {', '.join(missing)}" if working else "there are no kernels for this GPU"
    reasons = []
    if "triton" in asked and "triton" not in working:
        reasons.append("Triton is not installed, or without this package's kernels")
    if "cuda" in asked and "cuda" not in working:
        why = native.why_not_built("cuda")
        told = "was built for other GPUs, or does not load" if why is None else f"was not built ({why})"
        reasons.append(f"the CUDA library {told}")
    if reasons:
        lacking += f": {', and '.join(reasons)}"
    return f"{lacking}; `efficientad-fast info` says more"


def _why_broken(plan: MixedPlan, source: PlanInput) -> str | None:
    """What is wrong with the raw maps of a smooth random image: launched one by one, and from a graph.

    In float8 a good student's maps may be half rounding, so that they are compared with those of the same roundings.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 8, 8, generator=generator)
    image = F.interpolate(noise, plan.size, mode="bilinear", align_corners=False).to(plan.device)
    limit, dtype = LARGEST_ERRORS[plan.dtype], _name(plan.dtype)
    try:
        if plan.dtype == torch.float8_e4m3fn:
            trusted = plan.reference_maps(image)
        else:
            trusted = ReferencePlan(source, plan.device, torch.float32).raw_maps(image)
        runs = [plan.raw_maps(image) for _ in range(2)]
        errors = [
            float((one - other).norm() / other.norm()) for run in runs for one, other in zip(run, trusted, strict=True)
        ]
    # Whatever a compiler or a driver raises.
    except Exception as error:
        return f"the kernels in {dtype} failed on this GPU ({type(error).__name__}: {error})"
    if all(error <= limit for error in errors):
        return None
    shown = ", ".join(f"{error:.1e}" for error in errors)
    return f"the maps in {dtype} are wrong on this GPU: they are off by {shown} of their norm, and {limit} is the limit"


def _warn_once(sentence: str) -> None:
    if sentence not in _warned:
        _warned.add(sentence)
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def _name(dtype: torch.dtype) -> str:
    return next((name for name, one in DTYPES.items() if one == dtype), str(dtype))


def _instead(device: torch.device) -> str:
    return "float16" if device.type == "cuda" else "float32"


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


def _outline(network: torch.nn.Module) -> tuple[str, dict[str, torch.Size]]:
    return repr(network), {name: parameter.shape for name, parameter in network.named_parameters()}
