"""The process of one contestant: sets it up, then runs it when told to, and waits in between.

It reads lines from standard input: the `Task`, then numbers of seconds to run for. It answers each by a line of JSON on
what was standard output; what libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.contestants import CONTESTANTS, Maps, Run, Task

FEWEST_RUNS = 2
"""Of a turn, however long they take."""


def warm_up(run: Callable[[], Any], limit: float) -> int:
    """Runs until three in a row are not 2 % faster than the fastest before, or for ``limit`` seconds; how often."""
    times: list[float] = []
    while True:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
        if sum(times) > limit or (len(times) > 3 and min(times[-3:]) > 0.98 * min(times[:-3])):
            return len(times)


def take_turn(run: Run, seconds: float) -> tuple[list[float], Maps]:
    """Seconds of each run, in about ``seconds`` but no fewer than `FEWEST_RUNS`, and the last one's maps.

    The first run, whose data others have driven out of the caches, is not among them.
    """
    maps = run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST_RUNS or time.perf_counter() < end:
        began = time.perf_counter()
        maps = run()
        times.append(time.perf_counter() - began)
    return times, maps


def peak_memory() -> int | None:
    """Most bytes that this process has had in memory since it started or `forget_peak_memory`; None where unknown."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def forget_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def serve(task: Task, answer: Callable[[dict[str, Any]], None]) -> None:
    """Until standard input ends."""
    contestant = CONTESTANTS[task.contestant]
    for module in contestant.modules:
        importlib.import_module(module)
    began = time.perf_counter()
    run = contestant.prepare(task)
    maps = run()
    setup = time.perf_counter() - began
    np.savez(task.outputs, *maps)
    answer({"setup_seconds": setup, "peak_bytes_setup": peak_memory()})
    forget_peak_memory()
    answer({"warm_up_runs": warm_up(run, task.warm_up_seconds)})
    rested = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = time.perf_counter() - rested[0], time.process_time() - rested[1]
        computed = time.process_time()
        times, maps = take_turn(run, float(line))
        computed = time.process_time() - computed
        np.savez(task.outputs, *maps)
        facts = {"times": times, "cpu_seconds": computed, "idle_seconds": idle[0], "idle_cpu_seconds": idle[1]}
        rested = time.perf_counter(), time.process_time()
        answer(facts | {"peak_bytes_runs": peak_memory()})


def main() -> int:
    # Libraries print where answers go, so they are moved.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")

    def answer(facts: dict[str, Any]) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    try:
        serve(Task(**json.loads(sys.stdin.readline())), answer)
    except Exception as error:  # whatever a framework raises is this contestant's result, and told by the parent
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
