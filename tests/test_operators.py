"""Every operator of the catalogue, in every implementation that this machine can run, over the calls of its cases.

Triton's kernels run on CPU tensors where TRITON_INTERPRET=1 was set before Python started (test_triton.py does that).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import (
    Case,
    Refusal,
    cases,
    cases_module,
    on_tensors,
    refusals,
    result_arguments,
    tensors_of,
    written_arguments,
)
from tolerances import EXACT

from efficientad_fast import native, ops
from efficientad_fast.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Runner:
    """One way to an operator's kernel.

    Attributes:
        implementation: of `ops.Implementation`; ``public`` is what users call, ``reference`` the plain PyTorch.
        capability: of the GPU that Triton's kernels are made for, where it is the interpreter that runs them.
    """

    implementation: str
    device: str
    capability: float | None = None

    @property
    def namespace(self) -> str:
        return ops.NAMESPACE + ("" if self.implementation == "public" else f"_{self.implementation}")

    def find(self, overload: str) -> Callable[..., Any]:
        """What to call, or a skip that says why it cannot be."""
        ops.load()
        if self.implementation == "reference":
            return ops.overload(overload).reference
        if self.implementation != "public":
            known: ops.Implementation = self.implementation
            if known not in ops.implementations():
                reason = "Triton is not installed" if known == "triton" else native.why_not_built(known)
                pytest.skip(f"no implementation {known}: {reason}")
            if not ops.has_kernel(known, overload, self.device.upper()):
                pytest.skip(f"{known} has no kernel of {overload}")
        function = ops.resolve(self.namespace, overload)
        if self.capability is None:
            return function
        if overload.partition(".")[0] not in BY_DESCRIPTORS:
            pytest.skip("its kernels are the same for all GPUs")
        return AsIfOn(function, self.capability)


BY_DESCRIPTORS = ("conv_pool", "feature_distance")
"""Operators whose Triton kernels load tiles in another way from compute capability 9.0 on."""


class AsIfOn:
    """An operator, interpreted as kernels are made for that GPU."""

    def __init__(self, function: Callable[..., Any], capability: float) -> None:
        self.function = function
        self.capability = capability

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from efficientad_fast.triton_kernels import launching

        with launching.as_if_on(self.capability):
            return self.function(*args, **kwargs)


def runners() -> list[Any]:
    found = [] if INTERPRETED else [Runner("public", "cpu"), Runner("cpu", "cpu"), Runner("reference", "cpu")]
    if INTERPRETED:
        found += [Runner("triton", "cpu"), Runner("triton", "cpu", 9.0)]
    # One of them says why there is no GPU as well as four.
    kinds = ("public", "cuda", "triton", "reference") if torch.cuda.is_available() else ("public",)
    on_gpu = [Runner(implementation, "cuda") for implementation in kinds]
    return [
        *(
            pytest.param(one, id=f"{one.device}-{one.implementation}{'_descriptors' if one.capability else ''}")
            for one in found
        ),
        *(pytest.param(one, id=f"gpu-{one.implementation}", marks=pytest.mark.gpu) for one in on_gpu),
    ]


def over(items: Callable[[str], list[Any]]) -> Any:
    found = [(operator, item) for operator in ops.names() for item in items(operator)]
    return [pytest.param(item, id=f"{operator}-{item.overload}-{item.name}") for operator, item in found]


every_runner = pytest.mark.parametrize("runner", runners())
every_case = pytest.mark.parametrize("case", over(cases))
every_operator = pytest.mark.parametrize("operator", ops.names())


@every_runner
@every_case
def test_results(runner: Runner, case: Case) -> None:
    results = case.run(runner.find(case.overload), runner.device)
    case.check(results)
    assert all(result.device.type == runner.device for result in results)


@every_runner
@every_operator
@settings(max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_shapes(runner: Runner, operator: str, data: st.DataObject) -> None:
    case = data.draw(cases_module(operator).strategy())
    case.check(case.run(runner.find(case.overload), runner.device))


@every_runner
@every_case
def test_results_own_their_memory(runner: Runner, case: Case) -> None:
    """Nothing that is returned changes when an argument is changed afterwards, nor the other way round."""
    function = runner.find(case.overload)
    args, kwargs = case.arguments(runner.device)
    returned = function(*args, **kwargs)
    given_to = {one.untyped_storage().data_ptr() for one in tensors_of(args, kwargs)}
    for result in returned if isinstance(returned, tuple) else (returned,):
        if result is not None and result.numel() > 0:
            assert result.untyped_storage().data_ptr() not in given_to


@every_runner
@every_case
def test_inputs_are_left_alone(runner: Runner, case: Case) -> None:
    function = runner.find(case.overload)
    args, kwargs = case.arguments(runner.device)
    function(*args, **kwargs)
    before = case.arguments(runner.device)
    written = written_arguments(case.overload)
    for name, after, earlier in [
        *((f"argument {index}", *both) for index, both in enumerate(zip(args, before[0], strict=True))),
        *((name, kwargs[name], before[1][name]) for name in kwargs if name not in written),
    ]:
        for one, first in zip(tensors_of([after], {}), tensors_of([earlier], {}), strict=True):
            assert_close(one, first, EXACT, name)


@every_runner
@pytest.mark.parametrize("refusal", over(refusals))
def test_refusals(runner: Runner, refusal: Refusal) -> None:
    function = runner.find(refusal.overload)
    args, kwargs = Case(refusal.name, refusal.overload, refusal.make).arguments(runner.device)
    with pytest.raises((InputError, RuntimeError), match=refusal.message) as caught:
        function(*args, **kwargs)
    # A sentence, with nothing of where in C++ it was thrown.
    assert str(caught.value).strip().endswith(".")
    assert "\n" not in str(caught.value).strip()


@every_runner
@every_case
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_opcheck(runner: Runner, case: Case) -> None:
    if runner.implementation == "reference":
        pytest.skip("the reference by itself is no torch operator")
    if runner.capability is not None:
        pytest.skip("the same operator as without descriptors")
    if not all(bool(torch.isfinite(one.double()).all()) for one in case.expected()):
        pytest.skip("opcheck takes NaN for a difference; test_results looks at these")
    function = runner.find(case.overload)
    args, kwargs = case.arguments(runner.device)
    if any(one.dtype == torch.float8_e4m3fn for one in tensors_of(args, kwargs)):
        pytest.skip("opcheck cannot compare float8")
    torch.library.opcheck(function, args, kwargs)


@every_operator
def test_compiles_and_exports(operator: str) -> None:
    if INTERPRETED:
        pytest.skip("torch.compile is tried outside the interpreter")
    ops.load()
    for kind in {case.overload: case for case in cases(operator)}.values():
        function = ops.resolve(ops.NAMESPACE, kind.overload)
        args, kwargs = kind.arguments()
        torch._dynamo.reset()  # one limit of recompilations holds for all lambdas of this line
        compiled = torch.compile(lambda *a, f=function, **k: f(*a, **k), backend="aot_eager", fullgraph=True)
        for actual, expected in zip(kind.run(compiled), kind.run(function), strict=True):
            assert_close(actual, expected, EXACT, f"{kind!r} compiled")

        exported = torch.export.export(Call(function, args, kwargs), tensors_of(args, kwargs)).module()
        for actual, expected in zip(
            kind.run(lambda *a, f=exported, **k: f(*tensors_of(a, k))), kind.run(function), strict=True
        ):
            assert_close(actual, expected, EXACT, f"{kind!r} exported")


class Call(torch.nn.Module):
    """An operator with its tensors as inputs, and everything else fixed: what is exported takes no dtypes."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.arguments = (args, kwargs)

    def forward(self, *tensors: torch.Tensor) -> Any:
        args, kwargs = self.arguments
        given = iter(tensors)
        placed = on_tensors(lambda _: next(given), list(args))
        named = {name: on_tensors(lambda _: next(given), one) for name, one in kwargs.items()}
        return self.function(*placed, **named)


@pytest.mark.gpu
@every_case
def test_works_in_a_cuda_graph(case: Case) -> None:
    """Overloads that write into given outputs: captured with zeros in all tensors, replayed with the case's numbers."""
    if not written_arguments(case.overload):
        pytest.skip("an overload that allocates its results")
    ops.load()
    function = ops.resolve(ops.NAMESPACE, case.overload)
    if ops.choose(case.overload, torch.cuda.current_device()) is ops.overload(case.overload).reference:
        pytest.skip("no GPU kernel: the reference allocates, and copies from the host")
    args, kwargs = case.arguments("cuda")
    captured = tensors_of(args, kwargs)
    for tensor in captured:
        tensor.zero_()
    function(*args, **kwargs)  # whatever compiles at first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*args, **kwargs)
    # Outputs too, for what is added to them.
    for tensor, numbers in zip(captured, tensors_of(*case.arguments("cuda")), strict=True):
        tensor.copy_(numbers)
    graph.replay()
    torch.cuda.synchronize()
    case.check(tuple(kwargs[name] for name in result_arguments(case.overload)))


@every_operator
def test_house_is_complete(operator: str) -> None:
    """One name across the house: whoever knows one room finds the others."""
    root = Path(__file__).resolve().parents[1]
    chosen = {implementation for best_first in ops.choices()[operator].values() for implementation in best_first}
    rooms = [f"efficientad_fast/ops/{operator}.py", f"csrc/cpu/{operator}.cpp", f"tests/cases/{operator}.py"]
    if operator != "identity":  # a copy, which has nothing to measure, and a kernel without a header of its own
        rooms.append(f"benchmarks/test_{operator}.py")
    gpu_rooms = {
        "cuda": [f"csrc/cuda/{operator}.cu", *([f"csrc/cuda/{operator}_kernel.h"] if operator != "identity" else [])],
        "triton": [f"triton_kernels/{operator}.py"],
    }
    rooms += [room for implementation in chosen & gpu_rooms.keys() for room in gpu_rooms[implementation]]
    missing = [room for room in rooms if not (root / room).is_file()]
    assert not missing, f"{operator} has no {', no '.join(missing)}"
    # What is there is chosen somewhere.
    unused = [name for name in gpu_rooms.keys() - chosen if any((root / room).is_file() for room in gpu_rooms[name])]
    assert not unused, f"{operator} has a kernel of {', '.join(unused)}, which no GPU takes"
