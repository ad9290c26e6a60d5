"""Contestants' processes, and their rounds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.contestants import CONTESTANTS, OURS, Precision, Task
from benchmarks.peers.networks import Reference

ROOT = Path(__file__).resolve().parents[2]

LARGEST_ERROR = 1e-4
"""Of maps: norm of the difference over norm; of scores: difference over 1 + |score|. The worst image counts."""

BUSY_CORES = 0.1
"""More than this of a core busy with something else makes figures doubtful."""


class WorkerFailed(Exception):
    """A contestant's process ended, or said that it cannot; the reason."""


@dataclass
class Result:
    """What became of one contestant.

    Attributes:
        rounds: seconds of each run, by round.
        errors: largest so far of ``map_st``, ``map_ae`` and ``score``, see `LARGEST_ERROR`.
        missing: packages that are not installed.
        reason: why there are no times, or why they do not count; ``None`` where they do.
        idle_seconds, idle_cpu_seconds: how long it waited, and the processor time that it used meanwhile.
    """

    name: str
    precision: Precision
    setup_seconds: float | None = None
    rounds: list[list[float]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    reason: str | None = None
    peak_bytes_setup: int | None = None
    peak_bytes_runs: int | None = None
    idle_seconds: float = 0.0
    idle_cpu_seconds: float = 0.0

    @property
    def idle_cores(self) -> float:
        """Processors that it kept busy while it was not its turn."""
        return self.idle_cpu_seconds / self.idle_seconds if self.idle_seconds else 0.0

    @property
    def times(self) -> list[float]:
        return [one for times in self.rounds for one in times]

    @property
    def counts(self) -> bool:
        return self.reason is None and bool(self.rounds)

    def percentile(self, percent: float) -> float:
        """In seconds."""
        return float(np.percentile(self.times, percent))

    def check(self, maps: Mapping[str, Tensor], reference: Reference) -> None:
        """Compares maps, sets `errors`, and `reason` where float32 is too far off."""
        for name, error in relative_errors(maps, reference).items():
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        if self.precision == "float32":
            off = [name for name, error in self.errors.items() if not error <= LARGEST_ERROR]
            if off:
                self.reason = f"{', '.join(f'{name} is off by {self.errors[name]:.1e}' for name in off)}; " + (
                    f"at most {LARGEST_ERROR:.0e} counts"
                )


def relative_errors(maps: Mapping[str, Tensor], reference: Reference) -> dict[str, float]:
    """Of both maps and of the image score, as `LARGEST_ERROR` says; infinite for NaN and for other shapes."""
    errors = {}
    for name, right in (("map_st", reference.map_st), ("map_ae", reference.map_ae)):
        given = maps[name]
        if given.shape != right.shape:
            return dict.fromkeys(("map_st", "map_ae", "score"), float("inf"))
        difference = (given.double() - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
        errors[name] = _worst(difference)
    scores = reference.score(maps["map_st"], maps["map_ae"]).double()
    errors["score"] = _worst((scores - reference.scores).abs() / (1 + reference.scores.abs()))
    return errors


def _worst(errors: Tensor) -> float:
    return float(torch.where(errors.isnan(), float("inf"), errors).max())


def fastest_rival(results: Sequence[Result]) -> Result | None:
    """Of those in float32 that count, by the median."""
    rivals = [one for one in results if one.name != OURS and one.precision == "float32" and one.counts]
    return min(rivals, key=lambda one: one.percentile(50), default=None)


class Worker:
    """A process of `benchmarks.peers.worker`."""

    def __init__(self, task: Task) -> None:
        self._log = Path(task.folder) / "log.txt"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(task.threads))
        # Compiled in this run, and no usage statistics sent from a benchmark.
        settings = {"TORCHINDUCTOR_CACHE_DIR": str(Path(task.folder) / "inductor"), "NNCF_CI": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.worker"],
                cwd=ROOT,
                env=os.environ | threads | settings,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._say(task.to_json())

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # hear() has the reason
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next answer.

        Raises:
            WorkerFailed: it had none, or an error.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()
            status = f"its process ended with status {self._process.wait()}"
            raise WorkerFailed(f"{status}: {said[-1]}" if said else status)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def take_turn(self, seconds: float) -> dict[str, Any]:
        self._say(str(seconds))
        return self.hear()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def _all_closed(workers: Mapping[str, Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in workers.values():
            worker.close()


def busy_seconds() -> float | None:
    """Processor time of everything on this machine since it started, what a hypervisor took included; or None."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit: float) -> None:
    """Until the machine does next to nothing for half a second; no longer than ``limit`` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end and (before := busy_seconds()) is not None:
        time.sleep(0.5)
        if (busy_seconds() or 0.0) - before < 0.5 * BUSY_CORES:
            return


def compete(
    tasks: Sequence[Task],
    reference: Reference,
    *,
    rounds: int,
    seconds: float,
    wait: float = 0.0,
    tell: Callable[[str], None],
) -> tuple[list[Result], float | None]:
    """Results in the order of the tasks, and the processors that others kept busy in the rounds (None where unknown).

    Args:
        seconds: of each contestant in each round.
        wait: at most so many seconds before each turn, for a quiet machine.
        tell: is given a line for each step.
    """
    results = {one.contestant: Result(one.contestant, CONTESTANTS[one.contestant].precision) for one in tasks}
    workers: dict[str, Worker] = {}
    with _all_closed(workers):
        for task in tasks:
            result = results[task.contestant]
            result.missing = CONTESTANTS[task.contestant].missing()
            if result.missing:
                result.reason = f"{', '.join(result.missing)} not installed"
                continue
            tell(f"{task.contestant}: setting up")
            try:
                workers[task.contestant] = worker = Worker(task)
                answer = worker.hear()
                result.setup_seconds, result.peak_bytes_setup = answer["setup_seconds"], answer["peak_bytes_setup"]
                result.check(_load(task), reference)
                worker.hear()
            except WorkerFailed as failure:
                result.reason = str(failure)
                workers.pop(task.contestant).close()
        others, elapsed = 0.0, 0.0
        order = [task for task in tasks if task.contestant in workers]
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            # Nobody always follows the same one.
            for task in random.Random(number).sample(order, len(order)):
                result = results[task.contestant]
                if task.contestant not in workers:
                    continue
                wait_for_quiet(wait)
                began, busy_before = time.perf_counter(), busy_seconds()
                try:
                    answer = workers[task.contestant].take_turn(seconds)
                except WorkerFailed as failure:
                    result.reason = str(failure)
                    workers.pop(task.contestant).close()
                    continue
                busy_after = busy_seconds()
                if busy_before is not None and busy_after is not None:
                    others += busy_after - busy_before - answer["cpu_seconds"]
                    elapsed += time.perf_counter() - began
                result.rounds.append(answer["times"])
                result.peak_bytes_runs = answer["peak_bytes_runs"]
                result.idle_seconds += answer["idle_seconds"]
                result.idle_cpu_seconds += answer["idle_cpu_seconds"]
                result.check(_load(task), reference)
    return list(results.values()), max(others, 0.0) / elapsed if elapsed else None


def _load(task: Task) -> dict[str, Tensor]:
    with np.load(task.outputs) as maps:
        return {name: torch.from_numpy(maps[key]) for name, key in (("map_st", "arr_0"), ("map_ae", "arr_1"))}
