"""``make gpu-peers``, or ``python -m benchmarks.gpu_peers``: this package on a GPU beside the usual ways to run it.

Rivals are PyTorch in half precision, channels-last, with cudnn.benchmark, under a CUDA graph; and torch.compile with
mode="max-autotune", which takes minutes to compile. All have the same weights and images, are checked against float64
in the same run, and have a process of their own. Two regions are timed: from uint8 images on the GPU to anomaly maps
and scores there, and from images in the CPU's pinned memory to results there.

Finished rows are kept in a file beside the results and are not measured again, so that a command that was stopped goes
on where it was: ``--restart`` forgets them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import contest
from benchmarks.gpu.contest import Entrants, Row, Task, compete
from benchmarks.gpu_check import RESULTS, install, is_installed, machine
from efficientad_fast.files import atomic_path

OURS, RIVALS = "efficientad_fast", ("eager", "compile")
BATCHES = (1, 32)

NO_GPU = "There is no GPU that PyTorch can use, and this comparison is one on a GPU: run it where there is one."


def contests(sizes: Sequence[str], only: Sequence[str]) -> list[tuple[str, str, str]]:
    """Contestants, model sizes, dtypes: those that take minutes to compile come last."""
    dtypes = {OURS: ("float16", "bfloat16", "float8"), **{name: ("float16",) for name in RIVALS}}
    return [(name, size, dtype) for name, own in dtypes.items() for size in sizes for dtype in own if name in only]


def table(rows: Sequence[Row], batches: Sequence[int]) -> Table:
    """A row for each; ratios are to the fastest rival in the same region, by medians."""
    made = Table(title="uint8 images to anomaly map and score, 256 x 256", title_justify="left")
    for head in ("model", "contestant", "dtype"):
        made.add_column(head, no_wrap=True)
    for head in ("batch", "on the GPU: ms", "p99", "images/s", "x rival", "host to host: ms", "images/s", "map_st off"):
        made.add_column(head, justify="right")
    for row in rows:
        names = [row["model_size"].upper(), row["contestant"], row["dtype"]]
        if "reason" in row:
            made.add_row(*names, "", "FAILED")
            continue
        for batch, found in row["by_batch"].items():
            ratio = ratio_to_rivals(rows, row, batch)
            made.add_row(
                *names,
                batch,
                f"{1e3 * found['device']['median']:.3f}",
                f"{1e3 * found['device']['p99']:.3f}",
                f"{found['images_per_second']:.0f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{1e3 * found['host']['median']:.3f}",
                f"{found['images_per_second_host']:.0f}",
                f"{row['errors']['map_st']:.1e}",
            )
    return made


def ratio_to_rivals(rows: Sequence[Row], row: Row, batch: str, region: str = "device") -> float | None:
    """How many times as fast as the fastest rival of that model size that counts."""
    rivals = [
        one["by_batch"][batch][region]["median"]
        for one in rows
        if one["contestant"] != OURS
        and one["model_size"] == row["model_size"]
        and contest.counts(one)
        and batch in one.get("by_batch", {})
    ]
    return min(rivals) / row["by_batch"][batch][region]["median"] if rivals else None


def main(arguments: Sequence[str] | None = None, *, run: Callable[[Task, float], Row] = contest.run_task) -> int:
    """Prints the table. Returns the exit status: 2 without a GPU, 1 where this package does not count."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_peers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--size", action="append", choices=["s", "m"], help="of the model (default: both)")
    parser.add_argument("--batch", action="append", type=int, help=f"may be repeated (default: {BATCHES})")
    parser.add_argument("--only", action="append", choices=[OURS, *RIVALS], help="may be repeated (default: all)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go (default: benchmarks/results/)")
    parser.add_argument("--restart", action="store_true", help="measure all again")
    chosen = parser.parse_args(arguments)
    if chosen.batch and min(chosen.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(chosen.batch)}")
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    facts = machine()
    if not is_installed():
        install(EFFICIENTAD_FAST_BUILD="cuda", EFFICIENTAD_FAST_CUDA_ARCHS=facts["compute_capability"])
    target = chosen.json or RESULTS / f"gpu_peers-{re.sub(r'[^A-Za-z0-9]+', '-', facts['gpu'])}.json"
    kept = target.with_suffix(".partial.json")
    if chosen.restart:
        kept.unlink(missing_ok=True)
    sizes, batches = chosen.size or ["s", "m"], tuple(chosen.batch or BATCHES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entrants = Entrants.written(folder, sizes)
        tasks = [
            entrants.task(*one, folder, batches=batches, seconds=chosen.seconds)
            for one in contests(sizes, chosen.only or [OURS, *RIVALS])
        ]
        about = {name: facts[name] for name in ("gpu", "driver", "torch", "triton")} | {"seconds": chosen.seconds}
        rows = compete(tasks, kept, about=about | {"source": contest.source_digest()}, run=run)
    for row in rows:
        for batch, found in row.get("by_batch", {}).items():
            found["ratio_to_fastest_rival"] = ratio_to_rivals(rows, row, batch)
    content: dict[str, Any] = {"format": "efficientad_fast gpu_peers 1", "machine": facts, "rows": rows}
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console = Console(highlight=False, width=150)
    for row in rows:
        if "reason" in row:
            title = f"{row['contestant']}, {row['model_size'].upper()}, {row['dtype']}"
            console.print(f"{title} FAILED and does not count: {row['reason']}", markup=False, soft_wrap=True)
    console.print(table(rows, batches))
    console.print(
        f"{facts['gpu']}, driver {facts['driver']}; PyTorch {facts['torch']}, Triton {facts['triton']}, {facts['date']}"
    )
    console.print(f"results: {target}", markup=False, soft_wrap=True)
    if all(map(contest.counts, rows)):
        kept.unlink(missing_ok=True)
    return 0 if all(contest.counts(row) for row in rows if row["contestant"] == OURS) else 1


if __name__ == "__main__":
    sys.exit(main())
