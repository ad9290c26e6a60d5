"""What the catalogue holds of an operator in Python, one entry per overload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from efficientad_fast.errors import InputError


@dataclass(frozen=True)
class Overload:
    """One overload of an operator.

    Arguments that it writes into overlap neither each other nor any other argument, and do not require gradients:
    autograd does not see that they are written.

    Attributes:
        reference: it in plain PyTorch, with the schema's arguments: the kernel where no other is there, and the
            oracle of the tests. Its results never alias its arguments.
        fake: shape, dtype and device of the results, without computing them.
        setup_context, backward: its gradient as ``torch.library.register_autograd`` takes it, where it has one.
        case: given the arguments, a name under which the table of choices may have another order for them, or None.
    """

    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    case: Callable[..., str | None] | None = None


def require(condition: bool, operator: str, argument: str, expected: str, got: object) -> None:
    """The sentence with which every operator refuses an argument."""
    if not condition:
        raise InputError(f"{operator}: {argument} must be {expected}, got {got}.")


def require_one_device(operator: str, first: str, device: object, others: dict[str, Tensor]) -> None:
    """All tensors on the device of the argument ``first``."""
    for name, tensor in others.items():
        require(tensor.device == device, operator, name, f"on {device} as {first} is", tensor.device)


def require_positive_size(operator: str, size: Sequence[int]) -> None:
    """Two sides of at least one pixel."""
    height_and_width = len(size) == 2 and min(size) >= 1
    require(height_and_width, operator, "size", "a height and a width of at least 1", list(size))
