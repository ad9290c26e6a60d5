"""What every operator is tested with: calls, the results they must have, and arguments they must refuse.

Each operator of the catalogue has a module ``tests/cases/<op>.py``:

- ``CASES``: calls at ordinary and awkward shapes;
- ``strategy()``: hypothesis draws more of them;
- ``expected(case, *args, **kwargs)``: results in float64, by the reference or another trusted way;
- ``REFUSALS``: arguments that every implementation refuses, and what the sentence says.

``test_operators.py`` runs them over every implementation, on the CPU, in Triton's interpreter and on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from assertions import assert_close
from tolerances import tolerance
from torch import Tensor

from efficientad_fast import ops

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        name: says what is special about it.
        overload: ``<op>`` or ``<op>.<overload>``.
        make: the arguments, in the order and with the names of the schema; the same numbers each time, on the CPU,
            every tensor new.
        spread: a NaN or inf among the arguments may reach this many times as many results as in the reference (SPEC:
            neighbours with weight zero, tiles), and must reach all of those.
        quantity: the row of the tolerances; the operator's own if empty.
        same_as: a call of another overload that has the same results, whose expected results are taken.
    """

    name: str
    overload: str
    make: Callable[[], Arguments]
    spread: int = 1
    quantity: str = ""
    same_as: Case | None = None

    def __repr__(self) -> str:  # what hypothesis prints
        return f"{self.overload} {self.name}"

    @property
    def operator(self) -> str:
        return self.overload.partition(".")[0]

    def arguments(self, device: str | torch.device = "cpu") -> Arguments:
        args, kwargs = self.make()
        return tuple(_placed(arg, device) for arg in args), {name: _placed(arg, device) for name, arg in kwargs.items()}

    def run(self, function: Callable[..., Any], device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """What ``function`` returns for new arguments or, where the overload writes into given outputs, those."""
        args, kwargs = self.arguments(device)
        returned = function(*args, **kwargs)
        outputs = [kwargs[name] for name in result_arguments(self.overload)]
        if outputs:
            assert returned is None, f"{self.overload} returns {returned!r} although it writes into given outputs"
            return tuple(outputs)
        return returned if isinstance(returned, tuple) else (returned,)

    def expected(self) -> tuple[Tensor, ...]:
        if self.same_as is not None:
            return self.same_as.expected()
        args, kwargs = self.arguments()
        results: tuple[Tensor, ...] = cases_module(self.operator).expected(self, *args, **kwargs)
        return results

    def check(self, results: tuple[Tensor, ...]) -> None:
        """Compares with :meth:`expected`, by the tolerance of the operator and each result's dtype.

        Raises:
            AssertionError: says which result differs, where first, and by how much.
        """
        expected = self.expected()
        assert len(results) == len(expected), f"{self.overload} has {len(expected)} results, got {len(results)}"
        for index, (actual, trusted) in enumerate(zip(results, expected, strict=True)):
            what = f"{self!r}, result {index}"
            if self.spread > 1:
                actual, trusted = actual.cpu(), trusted.cpu()
                reached, wanted = ~torch.isfinite(actual), ~torch.isfinite(trusted)
                assert not (wanted & ~reached).any(), f"{what}: finite where the reference is not"
                count, most = int(reached.sum()), self.spread * int(wanted.sum())
                assert count <= most, f"{what}: {count} numbers are NaN or inf, at most {most} may be"
                trusted = torch.where(reached, actual.to(trusted.dtype), trusted)
            assert_close(actual, trusted, tolerance(self.quantity or self.operator, actual.dtype), what)


@dataclass(frozen=True)
class Refusal:
    """Arguments that must be refused.

    Attributes:
        message: a regular expression that the sentence matches: argument, expected, got.
    """

    name: str
    overload: str
    make: Callable[[], Arguments]
    message: str


def cases_module(operator: str) -> ModuleType:
    """``tests/cases/<op>.py``; what is missing names the file to write."""
    return importlib.import_module(f"cases.{operator}")


def cases(operator: str) -> list[Case]:
    found: list[Case] = cases_module(operator).CASES
    return found


def refusals(operator: str) -> list[Refusal]:
    found: list[Refusal] = cases_module(operator).REFUSALS
    return found


def result_arguments(overload: str) -> tuple[str, ...]:
    """Names of the arguments into which an overload writes its results: all that it writes but a workspace."""
    return tuple(name for name in written_arguments(overload) if name != "workspace")


def written_arguments(overload: str) -> tuple[str, ...]:
    """Names of the arguments into which an overload writes."""
    ops.load()
    schema = ops.resolve(ops.NAMESPACE, overload)._schema
    return tuple(arg.name for arg in schema.arguments if arg.alias_info is not None and arg.alias_info.is_write)


def numbers(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def on_tensors(function: Callable[[Tensor], Any], argument: Any) -> Any:
    """An argument with ``function`` applied to it where it is a tensor, or to each of a list of them."""
    if isinstance(argument, list):
        return [on_tensors(function, one) for one in argument]
    return function(argument) if isinstance(argument, Tensor) else argument


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """All tensors among the arguments, those in lists too, in order."""
    found: list[Tensor] = []
    on_tensors(found.append, [*args, *kwargs.values()])
    return tuple(found)


def _placed(argument: Any, device: str | torch.device) -> Any:
    """On the device, with the strides that it has here."""

    def place(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        placed = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if placed.untyped_storage().nbytes() > placed.nbytes:
            # NaN, or the largest number, between the elements: who reads it too is found out.
            placed.untyped_storage().fill_(0xFF)
        return placed.copy_(tensor)

    return on_tensors(place, argument)
