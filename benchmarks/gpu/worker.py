"""The process of one row, ``python -m benchmarks.gpu.worker TASK``: checks a contestant, then times it."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.contest import DTYPES, LARGEST_ERROR, Row, Task
from benchmarks.gpu.contestants import CONTESTANTS, Contestant
from benchmarks.gpu.timing import Clock, CudaClock, spread
from efficientad_fast import ops
from efficientad_fast.detector import Detector
from efficientad_fast.files import atomic_path
from efficientad_fast.plan import GPU_IMPLEMENTATIONS, Step


def measure(task: Task, device: torch.device, clock: Clock) -> Row:
    """Errors, then times: of each batch in order, as long as there is time. The first setup contains what all need."""
    began = time.monotonic()
    detector = Detector.load(task.detector)
    images = torch.from_numpy(np.load(task.images))
    with np.load(task.reference) as file:
        right = {name: torch.from_numpy(file[name]) for name in file.files}
    row: Row = {"errors": {}, "by_batch": {}}
    before = time.perf_counter()
    contestant = CONTESTANTS[task.contestant](detector, DTYPES[task.dtype], device)
    for batch in task.batches:
        if row["by_batch"] and time.monotonic() - began > task.limit:
            row["left_out"] = f"batches from {batch} on, as the time was up"
            break
        chosen = torch.arange(batch) % len(images)
        contestant.take(images[chosen])
        contestant.run()
        setup = time.perf_counter() - before
        found = errors(contestant, {name: one[chosen] for name, one in right.items()}, offset(detector))
        row["errors"] = {name: max(error, row["errors"].get(name, 0.0)) for name, error in found.items()}
        largest = LARGEST_ERROR[task.dtype]
        wrong = {name: error for name, error in found.items() if not error <= allowed(name, largest)}
        if wrong:
            told = ", ".join(f"{name} is off by {error:.1e}" for name, error in wrong.items())
            row["reason"] = f"at batch {batch} {told}; at most {largest:.1e} counts"
            # JSON has neither NaN nor infinity.
            row["errors"] = {
                name: min(error, 1e30) if error == error else 1e30 for name, error in row["errors"].items()
            }
            break
        row["by_batch"][str(batch)] = measured = {"setup_seconds": setup}
        if task.seconds > 0:
            measured |= {
                "device": spread(clock.device(contestant.run, task.seconds)),
                "host": spread(clock.host(contestant.run_from_host, task.seconds)),
                "images_per_second": batch / clock.stream(contestant.run, task.seconds),
                "images_per_second_host": batch / clock.stream(contestant.overlapping(), task.seconds),
            }
        if batch in task.steps:
            with contestant.steps() as steps:
                measured["steps"] = [
                    {"layer": step.layer, "seconds": clock.step(step.run), "by": by_implementation(step, clock)}
                    for step in steps
                ]
        before = time.perf_counter()
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def by_implementation(
    step: Step, clock: Clock, implementations: Sequence[ops.Implementation] = GPU_IMPLEMENTATIONS
) -> dict[str, float | None]:
    """Seconds of each implementation that has a kernel for the step; None where it makes another result than the step.

    Nothing for a step that is no call of an operator, and on a CPU none of those on a GPU.
    """
    run = step.run
    if not (isinstance(run, partial) and isinstance(run.func, torch._ops.OpOverload)):
        return {}
    name, device = run.func.name().partition("::")[2], step.out.device
    step.run()
    expected = step.out.double()
    found: dict[str, float | None] = {}
    for implementation in implementations:
        on_gpu = implementation in GPU_IMPLEMENTATIONS
        if on_gpu != step.out.is_cuda or (on_gpu and not ops.works_on(implementation, device)):
            continue
        if not ops.has_kernel(implementation, name, device.type.upper()):
            continue
        same = partial(ops.resolve(f"{ops.NAMESPACE}_{implementation}", name), *run.args, **run.keywords)
        step.out.fill_(math.nan)
        same()
        error = float((step.out.double() - expected).norm() / expected.norm())
        right = error <= max(MOST_APART, *(torch.finfo(one.dtype).eps for one in (*step.inputs, step.out)))
        found[implementation] = clock.step(same) if right else None
    return found


MOST_APART = 1e-3
"""Two implementations' results of a step, as norm over norm; or one rounding of what it reads or makes, if more.

Of e4m3 tensor cores add in fewer bits, each instruction in its own way, and a map is of differences of such sums.
"""


def allowed(quantity: str, largest: float) -> float:
    """A score is one pixel, and its error not the mean of many."""
    return 2 * largest if quantity.startswith("scores") else largest


def offset(detector: Detector) -> float:
    """What quantile normalisation subtracts of maps, in their units."""
    if detector.quantiles is None:
        return 0.0
    st_start, st_end, ae_start, ae_end = astuple(detector.quantiles)
    return float(0.05 * (st_start / (st_end - st_start) + ae_start / (ae_end - ae_start)))


def errors(contestant: Contestant, right: Mapping[str, Tensor], subtracted: float) -> dict[str, float]:
    """Of raw maps, and of anomaly maps and scores on the device and on the host, of the worst image.

    Anomaly maps and scores are compared without what was subtracted, so that errors are relative to what was computed.
    """
    given = dict(zip(("map_st", "map_ae"), contestant.raw_maps(), strict=True))
    found = {name: worst(one, right[name]) for name, one in given.items()}
    # One after the other: a run overwrites the results of the one before.
    for where, run in (("device", contestant.run), ("host", contestant.run_from_host)):
        maps, scores = run()
        together = maps if isinstance(maps, Tensor) else torch.stack(maps)[:, None]
        for name, one in (("anomaly_map", together), ("scores", scores)):
            found[f"{name}, {where}"] = worst(one + subtracted, right[name] + subtracted)
    return found


def worst(given: Tensor, right: Tensor) -> float:
    """Norm of the difference over norm, of the worst image; infinite for NaN and for other shapes."""
    if given.shape != right.shape:
        return float("inf")
    difference = (
        (given.double().cpu() - right).flatten(1) if right.ndim > 1 else (given.double().cpu() - right)[:, None]
    )
    norms = right.flatten(1).norm(dim=1) if right.ndim > 1 else right.abs()
    ratio = difference.norm(dim=1) / norms
    return float(torch.where(ratio.isnan(), float("inf"), ratio).max())


def measured_or_told(task: Task, device: torch.device, clock: Clock) -> Row:
    """As :func:`measure`; what a framework raises is this row's result."""
    try:
        return measure(task, device, clock)
    except Exception as error:  # whatever it is
        return {"reason": f"{type(error).__name__}: {error}"}


def main() -> int:
    warnings.simplefilter("ignore")
    given: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    task = Task(**{**given, "batches": tuple(given["batches"]), "steps": tuple(given["steps"])})
    row = measured_or_told(task, torch.device("cuda", 0), CudaClock())
    with atomic_path(task.results) as temporary:
        temporary.write_text(json.dumps(row, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
