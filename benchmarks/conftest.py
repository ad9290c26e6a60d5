"""What benchmarks share: the tests' modules, and the facts without which a figure means nothing."""

from __future__ import annotations

import datetime
import math
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The peers' networks and the comparison of numbers are the tests'.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "tests")]

# After the path, on which it lies.
from operators import RIVALS  # noqa: E402


def cpu_model() -> str:
    """As the kernel names it, or as Python does where there is no such file."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


@pytest.fixture(autouse=True)
def provenance(benchmark: Any) -> None:
    """Every result carries the machine, the versions and the date."""
    benchmark.extra_info.update(
        cpu=cpu_model(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What pytest-benchmark's table does not have: the time of a call, how many times the rivals', and the bytes."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[dict[str, Any]]] = {}
    for done in session.benchmarks if session else ():
        if "microseconds_a_call" in done.extra_info:
            groups.setdefault(done.group, []).append(done.extra_info)
    for group, rows in groups.items():
        terminalreporter.write_line(f"\n{group}")
        best = min((row["microseconds_a_call"] for row in rows if row["implementation"] in RIVALS), default=math.nan)
        for row in rows:
            ratio = "" if math.isnan(best) else f"{best / row['microseconds_a_call']:.2f} x the faster PyTorch"
            terminalreporter.write_line(
                f"  {row['implementation']:<10}{row['microseconds_a_call']:>12.1f} us a call{ratio:>29}"
                f"{row['gigabytes_per_second']:>9.1f} GB/s (copying as much: {row['copy_gigabytes_per_second']:.1f})"
            )
