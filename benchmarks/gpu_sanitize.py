"""``make gpu-sanitize``: the operators' tests on this machine's GPU, under each tool of NVIDIA's compute-sanitizer.

memcheck finds accesses outside of allocations, racecheck hazards in shared memory, initcheck reads of device memory
that nobody has written, synccheck wrong barriers. One after the other they run ``tests/test_operators.py -m gpu`` in
one process, those whose names ``-k`` matches; what takes too long is stopped. PyTorch keeps no memory between
allocations then, so that each ends where its tensor does. CUDA graphs cannot be captured that way, and are left out.

It exits with 0 only if every tool has run to its end, some tests have passed, and nothing was found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from efficientad_fast import native

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FILES = ("tests/test_operators.py",)
TESTS = "test_results and not own_their_memory"
SECONDS = 900.0
FOUND = 86
"""Exit code of compute-sanitizer that has found something; other codes are pytest's."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one tool.

    Attributes:
        tool: its name.
        verdict: ``passed``, or what was wrong.
        tests: how many have passed.
        seconds: that it took.
    """

    tool: str
    verdict: str
    tests: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.tool}: {self.verdict}; {self.tests} tests passed, {self.seconds:.0f} s"


def find_sanitizer() -> Path | None:
    """In PATH, or in the toolkit that CUDA_HOME names or that is where toolkits are."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    return Path(found) if found else None


def missing(sanitizer: Path | None) -> str | None:
    """A sentence that says what this machine lacks, or None."""
    if not torch.cuda.is_available():
        return "There is no GPU that PyTorch can use, so compute-sanitizer has nothing to look at."
    if sanitizer is None:
        return "There is no compute-sanitizer, a part of the CUDA toolkit, in PATH, CUDA_HOME or /usr/local/cuda."
    if (reason := native.why_not_built("cuda")) is not None:
        return f"The CUDA library is not there ({reason}); make gpu-check builds it."
    return None


def run(
    tool: str, sanitizer: Path, *, tests: str = TESTS, files: Sequence[str] = FILES, limit: float = SECONDS
) -> Outcome:
    """One tool over the tests in ``files`` whose names match ``tests``, stopped after ``limit`` seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
        # Compilers that a test starts have nothing to do with it.
        command += ["--target-processes", "application-only", sys.executable, "-m", "pytest", "-q", "--tb=short"]
        command += ["-m", "gpu", "-k", tests, f"--junitxml={report}", *files]
        print("+", " ".join(command), flush=True)
        code = _exit_code(command, limit)
        passed = _passed(report)
    verdict = {
        None: f"stopped after {limit:.0f} s",
        FOUND: "it found errors, which are listed above",
        0: "passed" if passed else "no test has run",
    }.get(code, f"the tests failed, with code {code}")
    return Outcome(tool, verdict, passed, time.monotonic() - began)


def _exit_code(command: Sequence[str], limit: float) -> int | None:
    """None where the command was stopped. Nothing that it started is left in any case."""
    settings = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=settings, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest says how far it came
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _passed(report: Path) -> int:
    if not report.is_file():
        return 0
    return sum(len(case) == 0 for case in ElementTree.parse(report).iter("testcase"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_sanitize", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tool", action="append", choices=TOOLS, help="this one; may be repeated (default: all)")
    parser.add_argument("-k", dest="tests", default=TESTS, help=f"which tests, as pytest takes it (default: {TESTS})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each tool (default: {SECONDS:.0f})")
    chosen = parser.parse_args(arguments)
    sanitizer = find_sanitizer()
    if (sentence := missing(sanitizer)) is not None:
        print(sentence)
        return 1
    assert sanitizer is not None
    outcomes = [run(tool, sanitizer, tests=chosen.tests, limit=chosen.seconds) for tool in chosen.tool or TOOLS]
    for outcome in outcomes:
        print(outcome)
    return 0 if all(outcome.verdict == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
