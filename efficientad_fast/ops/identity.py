"""``identity(Tensor x) -> Tensor``: a contiguous copy of x, the template for the next operators.

x: any shape, strides and dtype, on the CPU or a CUDA device. The result has x's shape, dtype and device, owns its
memory and is contiguous. Its gradient with respect to x is the incoming gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reference(x: Tensor) -> Tensor:
    """The operator in plain PyTorch: its kernel where nothing is compiled, and the oracle of its tests."""
    return x.clone(memory_format=torch.contiguous_format)


def fake(x: Tensor) -> Tensor:
    """Shape, dtype and device of the result, without computing it."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    """Nothing needs to be kept for the gradient."""


def backward(ctx: Any, gradient: Tensor) -> Tensor:
    """dL/dx = dL/dy."""
    return gradient
