"""The table, and the file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.peers.contest import BUSY_CORES, Result, fastest_rival
from benchmarks.peers.contestants import CONTESTANTS
from efficientad_fast.files import atomic_path

FORMAT = "efficientad_fast peers 1"
INSTALL = "pip install 'efficientad-fast[bench]'"
PACKAGES = ("efficientad-fast", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")


@dataclass(frozen=True)
class Contest:
    """One table: what was run, and what came of it.

    Attributes:
        image_size: height and width.
        others_cores: processors that other programs kept busy meanwhile; ``None`` where unknown.
    """

    model_size: str
    batch: int
    image_size: tuple[int, int]
    threads: int
    results: Sequence[Result]
    others_cores: float | None = None

    @property
    def title(self) -> str:
        height, width = self.image_size
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"EfficientAD-{self.model_size.upper()}, batch {self.batch}, {height} x {width}, {threads}"

    def ratio(self, result: Result) -> float | None:
        """How many times as fast as the fastest rival, by medians."""
        fastest = fastest_rival(self.results)
        if fastest is None or not result.counts:
            return None
        return fastest.percentile(50) / result.percentile(50)


def table(contest: Contest) -> Table:
    """A row for each contestant. Errors are relative; memory is the most in setting up, and in running."""
    result = Table(title=Text(contest.title), title_justify="left", title_style="bold")
    result.add_column("", no_wrap=True)
    for name in ("median ms", "p10 to p90", "x rival", "map_st", "map_ae", "score", "setup s", "peak MB"):
        result.add_column(name, justify="right", no_wrap=True)
    for one in contest.results:
        result.add_row(*_cells(contest, one))
    return result


def _cells(contest: Contest, one: Result) -> list[str]:
    if one.missing:
        return [one.name, "", "", "missing"]
    median, spread = ("", "") if not one.times else (f"{1e3 * one.percentile(50):.1f}", _spread(one))
    ratio = contest.ratio(one)
    setup = "" if one.setup_seconds is None else f"{one.setup_seconds:.1f}"
    return [
        one.name,
        median,
        spread,
        "FAILED" if one.reason is not None else "" if ratio is None else f"{ratio:.2f}",
        *(f"{one.errors[name]:.1e}" if name in one.errors else "" for name in ("map_st", "map_ae", "score")),
        setup,
        " / ".join(
            "?" if peak is None else f"{peak / 1e6:.0f}" for peak in (one.peak_bytes_setup, one.peak_bytes_runs)
        ),
    ]


def _spread(one: Result) -> str:
    return f"{1e3 * one.percentile(10):.1f} to {1e3 * one.percentile(90):.1f}"


def remarks(contest: Contest) -> list[str]:
    """What a table does not say: why somebody is out, and what makes its figures doubtful."""
    lines = []
    for one in contest.results:
        if one.missing:
            lines.append(f"{one.name} was left out, for lack of {', '.join(one.missing)}: {INSTALL}")
        elif one.reason is not None:
            lines.append(f"{one.name} FAILED and does not count: {one.reason}")
        if one.idle_cores > BUSY_CORES:
            lines.append(
                f"{one.name} kept {one.idle_cores:.1f} cores busy while others ran: do not trust their figures"
            )
    if contest.others_cores is not None and contest.others_cores > BUSY_CORES:
        lines.append(
            f"other programs kept {contest.others_cores:.1f} cores busy: do not trust these figures, repeat them on a "
            "quiet machine"
        )
    return lines


def machine() -> dict[str, Any]:
    """What a figure means nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_json(facts: dict[str, Any], contests: Sequence[Contest]) -> dict[str, Any]:
    """Everything, for a file. Times are in seconds."""
    return {
        "format": FORMAT,
        **facts,
        "settings": {name: one.settings for name, one in CONTESTANTS.items()},
        "contests": [
            {
                "model_size": contest.model_size,
                "batch": contest.batch,
                "image_size": list(contest.image_size),
                "threads": contest.threads,
                "others_cores": contest.others_cores,
                "results": [_row(contest, one) for one in contest.results],
            }
            for contest in contests
        ],
    }


def _row(contest: Contest, one: Result) -> dict[str, Any]:
    percentiles = {
        name: one.percentile(percent) if one.times else None
        for name, percent in (("median", 50), ("min", 0), ("p10", 10), ("p90", 90))
    }
    return {
        "name": one.name,
        "precision": one.precision,
        "counts": one.counts,
        "reason": one.reason,
        "missing": one.missing,
        **percentiles,
        "ratio_to_fastest_rival": contest.ratio(one),
        # JSON has no infinity.
        "errors": {name: error if error < float("inf") else "inf" for name, error in one.errors.items()},
        "setup_seconds": one.setup_seconds,
        "peak_bytes_setup": one.peak_bytes_setup,
        "peak_bytes_runs": one.peak_bytes_runs,
        "idle_cores": one.idle_cores,
        "rounds": one.rounds,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
