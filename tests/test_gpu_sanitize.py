"""`gpu_sanitize` without a GPU: what it says is missing, and what it makes of a compute-sanitizer that is a script."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_sanitize
from efficientad_fast import native

# Runs what it is given, and then finds errors, does not end, or is content.
SANITIZER = """#!/bin/sh
echo $$ > "$0.pid"
tool=$2
options="--tool --error-exitcode 86 --report-api-errors no --target-processes application-only"
[ "$1 $3 $4 $5 $6 $7 $8" = "$options" ] || exit 9
shift 8
case $tool in
  racecheck) exit 86 ;;
  initcheck) sleep 600 & wait ;;
  *) exec "$@" ;;
esac
"""

# Outside of the folder whose conftest.py skips what is marked.
TESTS = """
import os, pytest

@pytest.mark.gpu
def test_results_a(): assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"

@pytest.mark.gpu
def test_results_b(): {second}

@pytest.mark.gpu
def test_of_something_else(): assert False

def test_results_of_no_gpu(): assert False
"""


@pytest.fixture
def sanitizer(tmp_path: Path) -> Path:
    script = tmp_path / "compute-sanitizer"
    script.write_text(SANITIZER, encoding="utf-8")
    script.chmod(0o755)
    return script


def write_tests(folder: Path, second: str) -> list[str]:
    file = folder / "test_with_a_sanitizer.py"
    file.write_text(TESTS.format(second=second), encoding="utf-8")
    return [str(file)]


def test_says_what_is_missing(
    sanitizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_sanitize.main([]) == 1
    assert capsys.readouterr().out == (
        "There is no GPU that PyTorch can use, so compute-sanitizer has nothing to look at.\n"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_sanitize, "find_sanitizer", lambda: None)
    assert gpu_sanitize.main([]) == 1
    assert "There is no compute-sanitizer, a part of the CUDA toolkit, in PATH" in capsys.readouterr().out
    monkeypatch.setattr(native, "why_not_built", lambda name: f"no {name}")
    assert gpu_sanitize.missing(sanitizer) == "The CUDA library is not there (no cuda); make gpu-check builds it."


def test_the_sanitizer_is_found_in_path_and_in_the_toolkit(sanitizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(sanitizer.parent))
    assert gpu_sanitize.find_sanitizer() == sanitizer
    home = sanitizer.parent / "toolkit"
    (home / "bin").mkdir(parents=True)
    inner = sanitizer.rename(home / "bin" / sanitizer.name)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert gpu_sanitize.find_sanitizer() == inner


@pytest.mark.parametrize(
    "tool, second, verdict, passed",
    [
        ("memcheck", "pass", "passed", 2),
        ("synccheck", "assert False", "the tests failed, with code 1", 1),
        ("memcheck", "pytest.skip('no library')", "passed", 1),
        ("racecheck", "pass", "it found errors, which are listed above", 0),
    ],
)
def test_verdicts(tool: str, second: str, verdict: str, passed: int, sanitizer: Path, tmp_path: Path) -> None:
    outcome = gpu_sanitize.run(tool, sanitizer, files=write_tests(tmp_path, second), limit=120)
    assert (outcome.verdict, outcome.tests) == (verdict, passed)


def test_what_takes_too_long_is_stopped_with_all_it_started(sanitizer: Path, tmp_path: Path) -> None:
    outcome = gpu_sanitize.run("initcheck", sanitizer, files=write_tests(tmp_path, "pass"), limit=2)
    assert (outcome.verdict, outcome.tests) == ("stopped after 2 s", 0)
    group = int(Path(f"{sanitizer}.pid").read_text(encoding="utf-8"))
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")


def test_every_tool_must_pass(
    sanitizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(tool: str, given: Path, *, tests: str, limit: float) -> gpu_sanitize.Outcome:
        assert (given, tests, limit) == (sanitizer, gpu_sanitize.TESTS, 900.0)
        return gpu_sanitize.Outcome(tool, "passed" if tool in passing else "stopped after 900 s", 7, 12.3)

    monkeypatch.setattr(gpu_sanitize, "find_sanitizer", lambda: sanitizer)
    monkeypatch.setattr(gpu_sanitize, "missing", lambda given: None)
    monkeypatch.setattr(gpu_sanitize, "run", run)
    passing = set(gpu_sanitize.TOOLS)
    assert gpu_sanitize.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tool}: passed; 7 tests passed, 12 s" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]
    passing.remove("racecheck")
    assert gpu_sanitize.main([]) == 1
    assert gpu_sanitize.main(["--tool", "memcheck", "--tool", "synccheck"]) == 0
