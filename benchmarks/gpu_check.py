"""Tests and benchmarks of operators and predictions on this machine's GPU, in one command that needs no network.

``make gpu-check``, or ``python -m benchmarks.gpu_check`` where PyTorch, Triton and the test tools are installed. It

1. builds the CUDA library for this GPU alone, or takes the libraries of a wheel built elsewhere (``--wheel FILE``);
2. runs every PTX instruction that kernels use beside its emulation, then tests every operator on the device: results of
   each implementation against the float64 reference, and CUDA graphs;
3. predicts with EfficientAD-S and -M in float16, bfloat16 and float8: maps against float64, then latency at batch 1 and
   throughput of larger batches, from uint8 images on the GPU to map and score there, and from the host to the host;
4. times every step of these plans by itself, by each implementation that has it, beside its floor at this GPU's own
   rates (see `benchmarks.roofline`); the fastest is marked;
5. runs every operator's benchmarks on the device;
6. runs the remaining tests there: the plan's graphs, threads and streams, then refusals, memory, opcheck;
7. prints short tables last and writes everything, with GPU, driver, versions and date, to ``benchmarks/results/``.

All of it takes less than 9 minutes: a section whose time is up is stopped, and said to be, which is a failure where
results were not all tested.

Without a GPU it says so and runs what can be run: the same tests on the CPU, in Triton's interpreter and in the CUDA
emulator, predictions by the plans' references on the CPU, which are checked and not timed, and the benchmarks on the
CPU. It exits with 0 only if everything that ran has passed.

An operator joins by being in the catalogue, with its cases in ``tests/cases`` and its benchmark in ``benchmarks``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
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
interpreter and in the CUDA emulator, predictions by references on the CPU, and the benchmarks on the CPU. No figure
below is of a GPU."""

TESTS_SECONDS, PREDICTIONS_SECONDS, BENCHMARKS_SECONDS, ALL_SECONDS = 200.0, 170.0, 80.0, 520.0
"""After which each is stopped, and everything; what is left is for the remaining tests. On a GPU alone."""

MOST_WORKERS = 6
"""Processes of tests on a GPU, where pytest-xdist is installed."""

# With a GPU the emulator and the interpreter have nothing to add.
RESULTS_ALONE = "(emulator or test_results or cuda_graph) and not own_their_memory"
ON_GPU = (["tests/test_ptx.py", "tests/test_operators.py"], ["-m", "gpu", "-k", RESULTS_ALONE])
REST_ON_GPU = (["tests/test_graphs.py", "tests/test_operators.py"], ["-m", "gpu", "-k", f"not ({RESULTS_ALONE})"])
WITHOUT_GPU = (
    [f"tests/test_{name}.py" for name in ("operators", "triton", "cuda_operators", "simt", "ptx")],
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


NO_LIMIT = 24 * 3600.0

STOPPED = -1
"""In place of an exit code, of what was stopped because its time was up."""


def run(command: Sequence[str], *, limit: float | None = None, **settings: str) -> int:
    """Its exit code. After ``limit`` seconds it is interrupted as by Ctrl-C: pytest then still writes its report."""
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit:.0f} s: its time was up", flush=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return STOPPED
    except BaseException:
        process.kill()
        process.wait()
        raise


def run_tests(
    selection: tuple[list[str], list[str]], folder: Path, limit: float | None = None
) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Exit code of pytest, counts by operator and implementation, and the failed tests with their reasons."""
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    files, options = selection
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", f"--junitxml={report}"]
    if limit is not None and importlib.util.find_spec("xdist") is not None:
        # The results of float64 are the processor's, and most of the time.
        command += ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS))]
    code = run([*command, *options, *files], limit=limit)
    if not report.is_file():
        return code or 1, [], [] if code == STOPPED else ["pytest wrote no report"]
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


def together(*runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts of several runs of pytest, by operator and implementation."""
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for row in (row for rows in runs for row in rows):
        place = (row["operator"], row["device"], row["implementation"])
        counts.setdefault(place, Counter()).update({key: value for key, value in row.items() if isinstance(value, int)})
    return [
        {"operator": operator, "device": device, "implementation": implementation, **dict(counter)}
        for (operator, device, implementation), counter in sorted(counts.items())
    ]


def run_predictions(folder: Path, limit: float) -> tuple[int, dict[str, Any]]:
    """Exit code of `benchmarks.gpu.predictions`, in a process that imports what was just installed; what it found."""
    report = folder / "predictions.json"
    # The rows end by themselves; what comes before them, and after, takes longer on slow processors.
    code = run([sys.executable, "-m", "benchmarks.gpu.predictions", str(report), str(limit)], limit=limit + 60)
    if not report.is_file():
        return code or 1, {"rows": [], "rates": {}}
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return code, found


def run_benchmarks(
    names: Sequence[str], gpu: bool, folder: Path, limit: float | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """Exit code of pytest and one row per benchmark."""
    report = folder / "benchmarks.json"
    files = [
        str(path.relative_to(ROOT)) for name in names if (path := ROOT / "benchmarks" / f"test_{name}.py").is_file()
    ]
    options = ["-k", "gpu" if gpu else "cpu", "--benchmark-only", f"--benchmark-json={report}", "--benchmark-quiet"]
    if not files:
        return 1, []
    code = run([sys.executable, "-m", "pytest", "-q", "--tb=short", *options, *files], limit=limit)
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


def show(
    facts: dict[str, Any],
    tests: list[dict[str, Any]],
    benchmarks: list[dict[str, Any]],
    predictions: list[dict[str, Any]],
) -> None:
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
    console.print(prediction_table(predictions))
    for steps in step_tables(predictions):
        console.print(steps)
    where = f"{facts['gpu']}, driver {facts['driver']}" if facts["gpu"] else f"no GPU; {facts['cpu']}"
    console.print(f"{where}; PyTorch {facts['torch']}, Triton {facts['triton']}, {facts['date']}")


def prediction_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Latency at batch 1, and the best throughput, on the GPU and from host to host."""
    table = Table(title="predictions: uint8 images to anomaly map and score, 256 x 256", title_justify="left")
    for head in ("model", "dtype"):
        table.add_column(head)
    for head in ("ms at batch 1", "p99", "images/s", "at batch", "host: ms", "p99", "images/s", "at", "off by"):
        table.add_column(head, justify="right")
    for row in rows:
        names = [row["model_size"].upper(), row["dtype"]]
        if "reason" in row:
            table.add_row(*names, "FAILED")
            continue
        timed = {batch: found for batch, found in row["by_batch"].items() if "device" in found}
        off = f"{max(row['errors']['map_st'], row['errors']['map_ae']):.1e}"
        cells = [""] * 8
        if timed:
            one = timed.get("1")
            cells = []
            for region, rate in (("device", "images_per_second"), ("host", "images_per_second_host")):
                best = max(timed, key=lambda batch, rate=rate: float(timed[batch][rate]))
                shown = (
                    ["", ""] if one is None else [f"{1e3 * one[region][figure]:.3f}" for figure in ("median", "p99")]
                )
                cells += [*shown, f"{timed[best][rate]:.0f}", best]
        table.add_row(*names, *cells, off)
    return table


def step_tables(rows: Sequence[dict[str, Any]], dtype: str = "float16") -> list[Table]:
    """Of one dtype; what is lost most comes first."""
    tables = []
    for row in rows:
        for batch, found in row.get("by_batch", {}).items():
            if row["dtype"] != dtype or "steps" not in found:
                continue
            model = f"{row['model_size'].upper()}, {dtype}, batch {batch}"
            title = f"{model}: steps, each by itself, farthest from its floor first"
            table = Table(title=title, title_justify="left")
            table.add_column("step")
            implementations = sorted({name for step in found["steps"] for name in step.get("by", {})}, reverse=True)
            for head in ("us", *implementations, "floor", "with tiles", "x floor", "launches"):
                table.add_column(head, justify="right")
            for step in found["steps"]:
                figures = [f"{1e6 * step['seconds']:.1f}"]
                figures += [_by(step, name) for name in implementations]
                if "floor" in step:
                    figures += [f"{1e6 * step[name]:.1f}" for name in ("floor", "floor_with_tiles")]
                    figures += [f"{step['seconds'] / step['floor']:.1f}", str(step["launches"])]
                table.add_row(step["layer"], *figures)
            tables.append(table)
    return tables


def _by(step: dict[str, Any], implementation: str) -> str:
    """Microseconds of an implementation of the step, marked where it is the fastest."""
    by: dict[str, float | None] = step.get("by", {})
    seconds = by.get(implementation)
    if seconds is None:
        return "WRONG" if implementation in by else ""
    fastest = min(one for one in by.values() if one is not None)
    return f"{1e6 * seconds:.1f}{' *' if len(by) > 1 and seconds == fastest else ''}"


def wrong_steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences about implementations that made another result of a step than the plan's."""
    return [
        f"{row['model_size']}, {row['dtype']}, batch {batch}: {step['layer']} by {name} is not what the plan makes"
        for row in rows
        for batch, found in row.get("by_batch", {}).items()
        for step in found.get("steps", ())
        for name, seconds in step.get("by", {}).items()
        if seconds is None
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--wheel", type=Path, help="take the compiled libraries of this wheel, and build none")
    parser.add_argument("--json", type=Path, help="where the results go (with a GPU: benchmarks/results/ by default)")
    parser.add_argument("--no-benchmarks", action="store_true", help="tests and predictions alone")
    chosen = parser.parse_args(arguments)

    began = time.monotonic()
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
        selection = ON_GPU if gpu else WITHOUT_GPU
        tested, tests, failures = run_tests(selection, folder, TESTS_SECONDS if gpu else None)
        operators = list(dict.fromkeys(row["operator"] for row in tests if row["device"]))
        predicted, found = run_predictions(folder, PREDICTIONS_SECONDS if gpu else NO_LIMIT)
        predictions = found["rows"]
        timed, benchmarks, rest = 0, [], 0
        if not chosen.no_benchmarks:
            timed, benchmarks = run_benchmarks(operators, gpu, folder, BENCHMARKS_SECONDS if gpu else None)
        if gpu:
            left = max(ALL_SECONDS - (time.monotonic() - began), 1.0)
            rest, others, more = run_tests(REST_ON_GPU, folder, left)
            tests, failures = together(tests, others), failures + more
    codes = {"the tests": tested, "the predictions": predicted, "the benchmarks": timed, "the remaining tests": rest}
    stopped = [what for what, code in codes.items() if code == STOPPED]
    # What there was no time for is missed, and nothing is wrong; but results must have been tested.
    timed, rest = (0 if code == STOPPED else code for code in (timed, rest))
    failures += [f"{row['model_size']}, {row['dtype']}: {row['reason']}" for row in predictions if "reason" in row]
    failures += wrong_steps(predictions)
    # Every implementation must have run: a library without CUDA code would only be skipped.
    wanted = {"public", "cuda", "triton", "reference"} if gpu else {"public", "reference"}
    ran = {row["implementation"] for row in tests if row.get("passed")}
    failures += [f"no test of the implementation {name} has run" for name in sorted(wanted - ran)]
    passed = tested == 0 and predicted == 0 and timed == 0 and rest == 0 and not failures
    show(facts, tests, benchmarks, predictions)
    for what in stopped:
        print(f"stopped: {what}, when their time was up")
    for failure in failures:
        print(f"failed: {failure}")

    target = chosen.json
    if target is None and gpu:
        stamp = facts["date"].replace(":", "").replace("-", "")[:13]
        target = RESULTS / f"gpu_check-{re.sub(r'[^A-Za-z0-9]+', '-', facts['gpu'])}-{stamp}.json"
    if target is not None:
        results = {"format": "efficientad_fast gpu_check 2", "passed": passed, "machine": facts}
        results |= {"tests": tests, "failures": failures, "stopped": stopped, "benchmarks": benchmarks}
        results |= {"predictions": predictions, "rates": found["rates"]}
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
