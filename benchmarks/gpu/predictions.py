"""``python -m benchmarks.gpu.predictions FILE SECONDS``: what `benchmarks.gpu_check` says of whole predictions.

EfficientAD-S and -M in three dtypes, each in a process of its own, and their steps beside the floors. Without a GPU,
results of S are checked on the CPU and nothing is timed. No row is begun after ``SECONDS``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import contest, worker
from benchmarks.gpu.contest import Entrants, Row
from benchmarks.gpu.contestants import OURS
from benchmarks.gpu.datasheets import Gpu
from benchmarks.gpu.timing import CudaClock, ceilings
from benchmarks.gpu.work import meta_steps, work_of
from efficientad_fast.files import atomic_path

SIZES, DTYPES = ("s", "m"), ("float16", "bfloat16", "float8")
BATCHES, STEPS_AT, MEASURED_SECONDS = (1, 32, 8, 64, 16), (1, 32), 0.5
"""What says most comes first: time may not suffice for all batches."""


def this_gpu() -> tuple[Gpu, dict[str, float | None]]:
    """The GPU with the rates that are measured now, for the floors; and the rates."""
    rates = ceilings(CudaClock(), torch.device("cuda", 0))
    properties = torch.cuda.get_device_properties(0)
    float16, bandwidth = rates["float16"], rates["bandwidth"]
    assert float16 is not None and bandwidth is not None
    gpu = Gpu(
        properties.name,
        capability=properties.major + properties.minor / 10,
        multiprocessors=properties.multi_processor_count,
        float16=float16,
        float8=rates["float8"],
        bandwidth=bandwidth,
        l2=properties.L2_cache_size,
        source="measured in this run",
    )
    return gpu, rates


def measured(folder: Path, gpu: bool, end: float) -> list[Row]:
    """Rows of `benchmarks.gpu.contest`, of this package alone; on the CPU of EfficientAD-S, checked and not timed."""
    entrants = Entrants.written(folder, SIZES if gpu else SIZES[:1])
    settings: dict[str, Any] = {"batches": (1,), "seconds": 0.0}
    if gpu:
        settings = {"batches": BATCHES, "seconds": MEASURED_SECONDS, "steps": STEPS_AT}
    tasks = [
        entrants.task(OURS, size, dtype, folder, **settings)
        for dtype in DTYPES
        if not gpu or dtype != "float8" or torch.cuda.get_device_capability(0) >= (8, 9)
        for size in entrants.files
    ]
    if gpu:
        return contest.compete(tasks, None, end=end)
    return [dict(task.key) | worker.measured_or_told(task, torch.device("cpu"), CudaClock()) for task in tasks]


def with_floors(rows: Sequence[Row], gpu: Gpu) -> None:
    """Adds the floors of every step that was timed; the farthest from it comes first."""
    for row in rows:
        for batch, found in row.get("by_batch", {}).items():
            steps = meta_steps(row["model_size"], contest.DTYPES[row["dtype"]], int(batch))
            for timed, step in zip(found.get("steps", ()), steps, strict=False):
                assert timed["layer"] == step.layer
                work = work_of(step, gpu)
                if work.dtype == torch.float8_e4m3fn and gpu.float8 is None:
                    continue
                timed |= {"floor": work.floor(gpu), "floor_with_tiles": work.floor_with_tiles(gpu)}
                timed |= {"operations": work.operations, "bytes": work.bytes, "launches": len(work.launches)}
            if "steps" in found:
                found["steps"].sort(key=lambda one: one.get("floor", 0.0) - one["seconds"])


def main() -> int:
    """Returns the exit status: 1 where a row does not count."""
    target, seconds = Path(sys.argv[1]), float(sys.argv[2])
    end = time.monotonic() + seconds
    gpu = torch.cuda.is_available()
    rates: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as name:
        rows = measured(Path(name), gpu, end)
    if gpu:
        this, rates = this_gpu()
        with_floors(rows, this)
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps({"rows": rows, "rates": rates}, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(map(contest.counts, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
