"""``identity(Tensor x) -> Tensor``: a contiguous copy of x, the smallest operator there is.

x: any shape, strides and dtype, on the CPU or a CUDA device. The result has x's shape, dtype and device, owns its
memory and is contiguous. Its gradient with respect to x is the incoming gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficientad_fast.ops.overload import Overload


def reference(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    """Nothing needs to be kept for the gradient."""


def backward(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


overloads = {"default": Overload(reference, fake, setup_context, backward)}
