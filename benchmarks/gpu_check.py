"""Every operator's tests and benchmarks on the GPU of this machine, in one command that needs no network.

``make gpu-check``, or ``python -m benchmarks.gpu_check`` where PyTorch, Triton and the test tools are installed. It

1. builds the CUDA library for this GPU alone, or takes the libraries of a wheel built elsewhere (``--wheel FILE``);
2. runs every operator's tests on the device: each implementation against the float64 reference, opcheck, CUDA graphs;
3. runs every operator's benchmarks on the device;
4. prints a short table last and writes everything, with GPU, driver, versions and date, to ``benchmarks/results/``.

Without a GPU it says so and runs what can be run: the same tests on the CPU, in Triton's interpreter and in the CUDA
emulator, and the benchmarks on the CPU. It exits with 0 only if everything that ran has passed.

An operator joins by being in the catalogue, with its cases in ``tests/cases`` and its benchmark in ``benchmarks``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "efficientad_fast"
RESULTS = ROOT / "benchmarks" / "results"

NO_GPU = """There is no GPU that PyTorch can use. What can be run without one is run: the tests on the CPU, in Triton's
interpreter and in the CUDA emulator, and the benchmarks on the CPU. No figure below is of a GPU."""

# With a GPU the emulator and the interpreter have nothing to add.
ON_GPU = (["tests/test_operators.py"], ["-m", "gpu"])
WITHOUT_GPU = (
    ["tests/test_operators.py", "tests/test_triton.py", "tests/test_cuda_operators.py", "tests/test_simt.py"],
    [],
)
# Of a test's name, such as test_results[anomaly_map-anomaly_map.out-into-gpu-cuda].
TEST_NAME = re.compile(r"\[(?P<operator>\w+)-(?:.*-)?(?P<device>cpu|gpu)-(?P<implementation>\w+)\]$")


def machine() -> dict[str, Any]:
    """What a figure means nothing without."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": None,
        "driver": None,
        "cpu": _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
        facts["driver"] = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def take_wheel(wheel: Path) -> None:
    """The libraries of a wheel in the place of those that would be built here."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [
            name for name in archive.namelist() if re.fullmatch(r"efficientad_fast/([^/]+\.so|build_info\.json)", name)
        ]
        if not any(name.endswith(".so") for name in wanted):
            raise SystemExit(f"{wheel} holds no compiled library; build it with EFFICIENTAD_FAST_BUILD=cuda.")
        archive.extractall(ROOT, wanted)


def install(**settings: str) -> None:
    """The checkout, editable, built by these settings. Asks no network for anything; only what changed is compiled."""
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    if run([sys.executable, "-m", "pip", "install", *options], **settings):
        raise SystemExit(f"{ROOT} could not be installed; pip says above why.")


def is_installed() -> bool:
    """Whether this checkout is what Python imports, with libraries built or left out."""
    code = "import efficientad_fast.triton_kernels as t; print(t.__file__)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(found) and Path(found).resolve().parents[1] == ROOT and (PACKAGE / "build_info.json").is_file()


def run(command: Sequence[str], **settings: str) -> int:
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=False).returncode


def run_tests(selection: tuple[list[str], list[str]], folder: Path) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Exit code of pytest, counts by operator and implementation, and the failed tests with their reasons."""
    report = folder / "tests.xml"
    files, options = selection
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", f"--junitxml={report}"]
    code = run([*command, *options, *files])
    if not report.is_file():
        return code or 1, [], ["pytest wrote no report"]
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed"
                failures.append(f"{case.get('classname')}::{name}: {(child.get('message') or '').splitlines()[:1]}")
            elif child.tag == "skipped":
                outcome = "skipped"
        found = TEST_NAME.search(name)
        place = found.groups() if found else ((case.get("classname") or "").rpartition(".")[2], "", "")
        counts.setdefault(place, Counter())[outcome] += 1
    rows = [
        {"operator": operator, "device": device, "implementation": implementation, **dict(counter)}
        for (operator, device, implementation), counter in sorted(counts.items())
    ]
    return code, rows, failures


def run_benchmarks(names: Sequence[str], gpu: bool, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code of pytest and one row per benchmark."""
    report = folder / "benchmarks.json"
    files = [
        str(path.relative_to(ROOT)) for name in names if (path := ROOT / "benchmarks" / f"test_{name}.py").is_file()
    ]
    options = ["-k", "gpu" if gpu else "cpu", "--benchmark-only", f"--benchmark-json={report}", "--benchmark-quiet"]
    if not files:
        return 1, []
    code = run([sys.executable, "-m", "pytest", "-q", "--tb=short", *options, *files])
    if not report.is_file() or report.stat().st_size == 0:
        return code or 1, []
    rows = []
    for one in json.loads(report.read_text(encoding="utf-8"))["benchmarks"]:
        calls = one["extra_info"].get("calls_in_a_round")
        if calls is None:
            continue  # it ended before its figures were complete; pytest has said why
        figures = {f"{name}_microseconds": 1e6 * one["stats"][name] / calls for name in ("min", "median", "iqr", "max")}
        facts = {"group": one["group"], "name": one["name"], "rounds": one["stats"]["rounds"]}
        rows.append(facts | one["extra_info"] | figures)
    return code, rows


def show(facts: dict[str, Any], tests: list[dict[str, Any]], benchmarks: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, width=110)
    table = Table("operator", "where", "implementation", "passed", "failed", "skipped", title="tests")
    for row in tests:
        figures = [str(row.get(outcome, 0)) for outcome in ("passed", "failed", "skipped")]
        table.add_row(row["operator"], row["device"], row["implementation"], *figures)
    console.print(table)
    table = Table("workload", "implementation", "us a call", "iqr", "GB/s", "copy GB/s", title="benchmarks, median")
    for row in sorted(benchmarks, key=lambda row: (row["group"], row["median_microseconds"])):
        table.add_row(
            row["group"],
            row["implementation"],
            *(f"{row[figure]:.2f}" for figure in ("median_microseconds", "iqr_microseconds")),
            *(f"{row[figure]:.0f}" for figure in ("gigabytes_per_second", "copy_gigabytes_per_second")),
        )
    console.print(table)
    where = f"{facts['gpu']}, driver {facts['driver']}" if facts["gpu"] else f"no GPU; {facts['cpu']}"
    console.print(f"{where}; PyTorch {facts['torch']}, Triton {facts['triton']}, {facts['date']}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--wheel", type=Path, help="take the compiled libraries of this wheel, and build none")
    parser.add_argument("--json", type=Path, help="where the results go (with a GPU: benchmarks/results/ by default)")
    parser.add_argument("--no-benchmarks", action="store_true", help="tests alone")
    chosen = parser.parse_args(arguments)

    facts = machine()
    gpu = facts["gpu"] is not None
    if not gpu:
        print(NO_GPU, flush=True)
    if chosen.wheel is not None:
        install(EFFICIENTAD_FAST_BUILD="none")
        take_wheel(chosen.wheel)
    elif gpu:
        install(EFFICIENTAD_FAST_BUILD="cuda", EFFICIENTAD_FAST_CUDA_ARCHS=facts["compute_capability"])
    elif not is_installed():
        install()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tested, tests, failures = run_tests(ON_GPU if gpu else WITHOUT_GPU, folder)
        operators = list(dict.fromkeys(row["operator"] for row in tests if row["device"]))
        timed, benchmarks = (0, []) if chosen.no_benchmarks else run_benchmarks(operators, gpu, folder)
    # Every implementation must have run: a library without CUDA code would only be skipped.
    wanted = {"public", "cuda", "triton", "reference"} if gpu else {"public", "reference"}
    ran = {row["implementation"] for row in tests if row.get("passed")}
    failures += [f"no test of the implementation {name} has run" for name in sorted(wanted - ran)]
    passed = tested == 0 and timed == 0 and not failures
    show(facts, tests, benchmarks)
    for failure in failures:
        print(f"failed: {failure}")

    target = chosen.json
    if target is None and gpu:
        stamp = facts["date"].replace(":", "").replace("-", "")[:13]
        target = RESULTS / f"gpu_check-{re.sub(r'[^A-Za-z0-9]+', '-', facts['gpu'])}-{stamp}.json"
    if target is not None:
        results = {"format": "efficientad_fast gpu_check 1", "passed": passed, "machine": facts}
        results |= {"tests": tests, "failures": failures, "benchmarks": benchmarks}
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".partial")
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        temporary.replace(target)
        print(f"results: {target}")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def _first(pattern: str, file: Path) -> str | None:
    found = re.search(pattern, file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else None


def _ask(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.strip().partition("\n")[0] or None


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
