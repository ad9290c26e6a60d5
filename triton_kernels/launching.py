"""How the Triton kernels are launched: on the device of their tensors, or only written down for the kernel report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from efficientad_fast.ops.overload import require

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET when they were decorated, with this import."""


@dataclass(frozen=True)
class Launch:
    """A launch that was written down.

    Attributes:
        kernel: the ``triton.jit`` function.
        arguments: by parameter's name, constexprs included; tensors are on the meta device.
        options: of the compiler, such as ``num_warps``.
        programs: how many run.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int = 1


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)
_capability: ContextVar[float] = ContextVar("capability", default=8.0)

TENSOR_DESCRIPTORS_SINCE = 9.0
"""Compute capability from which on tiles are loaded by descriptors (TMA)."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are written down into the list this gives, not launched, and meta tensors are taken."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


@contextlib.contextmanager
def as_if_on(capability: float) -> Iterator[None]:
    """Inside, what is written down or interpreted is made for GPUs of that compute capability; else for 8.0."""
    token = _capability.set(capability)
    try:
        yield
    finally:
        _capability.reset(token)


def capability(device: torch.device) -> float:
    """Of a GPU, such as 9.0; of what is written down or interpreted, as :func:`as_if_on` has it."""
    if device.type != "cuda":
        return _capability.get()
    major, minor = torch.cuda.get_device_capability(device)
    return major + minor / 10


def require_runnable(operator: str, name: str, tensor: Tensor) -> None:
    """Refuses a tensor that the kernels cannot reach: they run on CUDA devices, interpreted also on the CPU."""
    runnable = tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu") or _recorded.get() is not None
    require(runnable, operator, name, "on a CUDA device", tensor.device)


def launch(kernel: Any, programs: int, device: torch.device, arguments: Sequence[Any], **options: Any) -> None:
    """``programs`` programs of ``kernel`` on the current stream of ``device``; none where there are none.

    Args:
        arguments: in the order of the kernel's parameters.
        options: the kernel's constexprs and the compiler's options, by name.
    """
    launches = _recorded.get()
    if launches is not None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        given |= {name: value for name, value in options.items() if name in kernel.arg_names}
        launches.append(Launch(kernel, given, {k: v for k, v in options.items() if k not in given}, programs))
    elif programs:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](*arguments, **options)


def tiles(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)
