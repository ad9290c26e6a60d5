"""What benchmarks share: the tests' modules, and the facts without which a figure means nothing."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The peers' networks and the comparison of numbers are the tests'.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


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
