"""How long things take on a GPU, and how fast it multiplies and copies."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from efficientad_fast.tuning import device_seconds, seconds_between_events

FEWEST, MOST = 20, 5000
"""Runs of a measurement."""

MOST_UNDER_WAY = 4


class Clock(Protocol):
    """Seconds of many runs, one by one."""

    def device(self, call: Callable[[], object], seconds: float) -> list[float]:
        """On the device, from when the stream comes to a run to when that has ended."""

    def host(self, call: Callable[[], object], seconds: float) -> list[float]:
        """From calling to having returned; what is called waits for the device itself."""

    def stream(self, call: Callable[[], object], seconds: float) -> float:
        """Of one of many runs that follow each other without waiting, by the processor's clock."""

    def step(self, run: Callable[[], object]) -> float:
        """Of one of many runs in one graph."""


class CudaClock:
    """Events on the current stream, and the processor's clock. About ``seconds`` each, after a tenth as many runs."""

    def device(self, call: Callable[[], object], seconds: float) -> list[float]:
        return repeated(lambda: seconds_between_events(call), seconds)

    def host(self, call: Callable[[], object], seconds: float) -> list[float]:
        def run() -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin

        return repeated(run, seconds)

    def stream(self, call: Callable[[], object], seconds: float) -> float:
        def for_about(limit: float) -> float:
            begin, runs = time.perf_counter(), 0
            # Processors are far ahead of a GPU if they are let.
            under_way: deque[torch.cuda.Event] = deque()
            while runs < FEWEST or time.perf_counter() - begin < limit:
                call()
                runs += 1
                under_way.append(torch.cuda.Event())
                under_way[-1].record()
                if len(under_way) > MOST_UNDER_WAY:
                    under_way.popleft().synchronize()
            torch.cuda.synchronize()
            return (time.perf_counter() - begin) / runs

        for_about(seconds / 10)
        return for_about(seconds)

    def step(self, run: Callable[[], object]) -> float:
        return device_seconds(run)


def repeated(run: Callable[[], float], seconds: float) -> list[float]:
    """What runs say they took, for about ``seconds`` by the clock on the wall."""
    begin, warm = time.perf_counter(), 0
    while warm < 3 or (time.perf_counter() - begin < seconds / 10 and warm < MOST // 10):
        run()
        warm += 1
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < FEWEST or (time.perf_counter() - begin < seconds and len(times) < MOST):
        times.append(run())
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, percentiles and count."""
    ordered = sorted(times)

    def percentile(part: float) -> float:
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

    return {
        "median": statistics.median(ordered),
        "p10": percentile(0.10),
        "p90": percentile(0.90),
        "p99": percentile(0.99),
        "min": ordered[0],
        "runs": len(ordered),
    }


def ceilings(clock: Clock, device: torch.device, side: int = 8192, copied: int = 2**29) -> dict[str, float | None]:
    """Rates of the GPU as it is: operations a second by dtype, and bytes a second that a kernel reads and writes.

    Args:
        side: of the matrices of random numbers that PyTorch multiplies; the rate is None where it has no products.
        copied: bytes.
    """
    generator = torch.Generator(device).manual_seed(0)
    found: dict[str, float | None] = {}
    plain = [torch.randn(side, side, device=device, generator=generator) for _ in range(2)]
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        left, right = (one.to(dtype) for one in plain)
        product = torch.empty_like(left)
        found[name] = 2 * side**3 / clock.step(lambda a=left, b=right, out=product: torch.mm(a, b, out=out))
    found["float8"] = _float8_rate(clock, plain, side)
    source = torch.randn(copied // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    # By a kernel: a copy of memory in a graph is slower than that (on an H200 2.8 TB/s, the kernel 4.2).
    found["bandwidth"] = 2 * source.nbytes / clock.step(lambda: torch.mul(source, 2.0, out=target))
    return found


def _float8_rate(clock: Clock, plain: Sequence[torch.Tensor], side: int) -> float | None:
    try:
        left, right = (one.to(torch.float8_e4m3fn) for one in plain)
        one = torch.ones((), device=left.device)
        multiply: Any = torch._scaled_mm
        return 2 * side**3 / clock.step(lambda: multiply(left, right.t(), one, one, out_dtype=torch.bfloat16))
    except (RuntimeError, ValueError):
        return None
