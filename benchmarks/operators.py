"""How an operator's benchmark runs: its implementations beside PyTorch, with the bytes they move beside a plain copy.

A round on a GPU is a replayed CUDA graph of `CALLS` calls, so that kernels are timed and not the launching of them; the
figures say "per call" after division. Data stay in the caches that they fit in, as they do between a plan's steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from assertions import assert_close
from tolerances import Tolerance, tolerance
from torch import Tensor

from efficientad_fast import ops

CALLS = 100

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none"),
]

# What is timed: PyTorch's own operators, eager and compiled, then ours.
RIVALS = ("eager", "compiled")
RUNNERS = [
    *(pytest.param((one, "cpu"), id=f"cpu-{one}") for one in (*RIVALS, "cpu")),
    *(pytest.param((one, "cuda"), id=f"gpu-{one}", marks=needs_gpu) for one in (*RIVALS, "cuda", "triton")),
]
every_runner = pytest.mark.parametrize("runner", RUNNERS)


def measure(
    benchmark: Any,
    runner: tuple[str, str],
    operator: str,
    workload: str,
    composition: Callable[..., tuple[Tensor, ...]],
    call: Callable[[Callable[..., Any], tuple[Tensor, ...]], None],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    constants: Sequence[Tensor] = (),
    trusted: Callable[..., tuple[Tensor, ...]] | None = None,
    rivals_tolerance: Tolerance | None = None,
    quantity: str = "",
    overload: str = "out",
    rounds: int = 200,
) -> None:
    """Times one runner on a workload, after checking its results against what is trusted.

    Args:
        runner: of `RUNNERS`.
        operator: its name in the catalogue; what is timed is its ``overload``, which writes into given outputs.
        workload: says sizes and batch; names the group with the operator and the device.
        composition: what users write with PyTorch's own operators, from the inputs and constants to the outputs.
        call: given the operator's overload and the tensors for its results, calls it.
        inputs, outputs: on the CPU; placed on the device here.
        constants: likewise; what the composition's users make once. They are not among the bytes that are counted.
        trusted: as the composition, for workloads in which that gives other numbers; else it is what is trusted.
        rivals_tolerance: where it is, how far the composition's may be from the trusted ones; of ours the table says.
        quantity: its row, where it is not the operator's.
        rounds: how often it runs, after a tenth as many runs that are not timed; fewer for what takes long.
    """
    implementation, device = runner
    placed = [one.to(device) for one in inputs]
    results = tuple(torch.empty_like(one, device=device) for one in outputs)
    given = [*placed, *(one.to(device) for one in constants)]
    if implementation in RIVALS:
        run = _run_rival(implementation, composition, given)
    else:
        run = _run(implementation, device, f"{operator}.{overload}", call, placed, results)
    expected = (trusted or composition)(*given)
    actual = run() or results
    for one, other in zip(actual, expected, strict=True):
        allowed = tolerance(quantity or operator, one.dtype)
        if implementation in RIVALS and rivals_tolerance is not None:
            allowed = rivals_tolerance
        assert_close(one, other, allowed, f"{operator}, {implementation}")

    moved = sum(one.numel() * one.element_size() for one in (*placed, *results))
    calls = 1
    if device == "cuda":
        run, calls = _in_a_graph(run), CALLS
    benchmark.group = f"{operator}, {workload}, {device}"
    # The first runs of a process grow the heap and wake the threads.
    benchmark.pedantic(run, rounds=rounds, iterations=1, warmup_rounds=rounds // 10)
    median = benchmark.stats.stats.median / calls
    benchmark.extra_info.update(
        operator=operator,
        implementation=implementation,
        device=device,
        calls_in_a_round=calls,
        microseconds_a_call=1e6 * median,
        bytes_moved=moved,
        gigabytes_per_second=moved / median / 1e9,
        copy_gigabytes_per_second=copy_rate(moved, device),
    )


def _run_rival(
    implementation: str, composition: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...] | None]:
    if implementation == "eager":
        return lambda: composition(*given)
    torch._dynamo.reset()
    compiled = torch.compile(composition, dynamic=False)
    return lambda: compiled(*given)


def _run(
    implementation: str,
    device: str,
    overload: str,
    call: Callable[[Callable[..., Any], tuple[Tensor, ...]], None],
    placed: Sequence[Tensor],
    results: tuple[Tensor, ...],
) -> Callable[[], tuple[Tensor, ...] | None]:
    known: ops.Implementation = implementation
    ops.load()
    if known not in ops.implementations() or not ops.has_kernel(known, overload, device.upper()):
        pytest.skip(f"this installation has no {known} kernel of {overload}")
    function = ops.resolve(f"{ops.NAMESPACE}_{known}", overload)
    return lambda: call(functools.partial(function, *placed), results)


def _in_a_graph(run: Callable[[], Any]) -> Callable[[], None]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


@functools.cache
def copy_rate(moved: int, device: str) -> float:
    """GB/s, read and written, of copying half as many bytes as an operator reads and writes."""
    source = torch.zeros(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy: Callable[[], Any] = functools.partial(target.copy_, source)
    calls = 1
    if device == "cuda":
        copy, calls = _in_a_graph(copy), CALLS
    times = []
    for _ in range(200):
        began = time.perf_counter()
        copy()
        times.append(time.perf_counter() - began)
    return moved * calls / sorted(times)[len(times) // 2] / 1e9
