"""`benchmarks.peers`: checks, turns, table and file, refusals. None of the rivals that come extra is needed."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from rich.console import Console
from small_detector import small_detector
from torch import Tensor, nn

sys.path.append(str(ROOT))

from benchmarks.peers import __main__ as command
from benchmarks.peers import contest, contestants, worker
from benchmarks.peers.contest import Result, WorkerFailed, compete, fastest_rival, relative_errors
from benchmarks.peers.contestants import CONTESTANTS, OURS, Contestant, Task
from benchmarks.peers.networks import RawMaps, Reference, preprocessed_images, random_detector
from benchmarks.peers.report import Contest, as_json, machine, remarks, table, write
from efficientad_fast.plan import build_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Maps of two images, drawn at random, with a plan that takes scores."""
    plan = build_plan(small_detector().plan_input((256, 256)), CPU, torch.float64, backend="reference")
    generator = torch.Generator().manual_seed(0)
    map_st, map_ae = torch.rand(2, 2, 1, 56, 56, generator=generator, dtype=torch.float64)
    quantiles = plan.quantiles
    return Reference(plan, map_st, map_ae, plan.anomaly_map(map_st, map_ae, quantiles, plan.size)[1])


def exact(reference: Reference) -> dict[str, Tensor]:
    return {"map_st": reference.map_st.clone(), "map_ae": reference.map_ae.clone()}


def task(tmp_path: Path, name: str = "eager") -> Task:
    paths = {one: str(tmp_path / one) for one in ("detector", "batch", "calibration", "onnx", "outputs")}
    return Task(contestant=name, folder=str(tmp_path), threads=1, warm_up_seconds=0.0, **paths)


def test_errors_are_those_of_the_worst_image(reference: Reference) -> None:
    maps = exact(reference)
    assert relative_errors(maps, reference) == {"map_st": 0, "map_ae": 0, "score": 0}
    maps["map_st"][1] *= 1 + 1e-3
    errors = relative_errors(maps, reference)
    assert errors["map_st"] == pytest.approx(1e-3) and errors["map_ae"] == 0 and errors["score"] > 0


def test_the_score_s_error_counts_beside_its_size(reference: Reference) -> None:
    maps = exact(reference)
    at = int(maps["map_ae"][0].argmax())
    maps["map_ae"][0].view(-1)[at] += 10
    changed = reference.score(maps["map_st"], maps["map_ae"])[0] - reference.scores[0]
    assert changed > 1
    assert relative_errors(maps, reference)["score"] == pytest.approx(float(changed / (1 + reference.scores[0])))


def test_nan_and_other_shapes_are_infinitely_wrong(reference: Reference) -> None:
    maps = exact(reference)
    maps["map_ae"][0, 0, 3, 5] = math.nan
    assert relative_errors(maps, reference)["map_ae"] == math.inf
    maps = exact(reference)
    maps["map_st"] = maps["map_st"][:1]
    assert set(relative_errors(maps, reference).values()) == {math.inf}


def test_float32_must_agree_and_int8_need_not(reference: Reference) -> None:
    off = {name: one * 1.001 for name, one in exact(reference).items()}
    result = Result("eager", "float32", rounds=[[1.0]])
    result.check(exact(reference), reference)
    assert result.counts
    result.check(off, reference)
    assert not result.counts
    assert result.reason is not None and "map_st is off by 1.0e-03, map_ae is off by 1.0e-03" in result.reason
    result.check(exact(reference), reference)
    assert not result.counts, "being right once more does not help"
    quantised = Result("openvino-int8", "int8", rounds=[[1.0]])
    quantised.check(off, reference)
    assert quantised.counts and quantised.errors["map_ae"] == pytest.approx(1e-3)


def made_up(name: str, *times: float, **facts: Any) -> Result:
    errors = {"map_st": 1e-6, "map_ae": 1e-6, "score": 1e-8}
    facts = {"errors": errors, "setup_seconds": 1.25, "peak_bytes_setup": 9_000_000, "peak_bytes_runs": None} | facts
    return Result(name, CONTESTANTS[name].precision, rounds=[list(times)], **facts)


def a_contest(**facts: Any) -> Contest:
    results = [
        made_up(OURS, 0.010, 0.012, 0.011),
        made_up("eager", 0.044, 0.045),
        made_up("compile", 0.033, 0.031, 0.2),
        made_up("eager-channels-last", 0.02, reason="map_st is off by inf; at most 1e-04 counts"),
        Result("onnxruntime", "float32", missing=["onnx", "onnxruntime"], reason="not installed"),
        made_up("openvino-int8", 0.005, errors={"map_st": math.inf, "map_ae": 0.1, "score": 0.1}),
    ]
    return dataclasses.replace(Contest("s", 8, (256, 512), 1, results), **facts)


def test_the_ratio_is_to_the_fastest_rival_that_counts() -> None:
    found = a_contest()
    fastest = fastest_rival(found.results)
    assert fastest is not None and fastest.name == "compile"
    ratios = [found.ratio(one) for one in found.results]
    assert ratios == [pytest.approx(3.0), pytest.approx(33 / 44.5), 1.0, None, None, pytest.approx(6.6)]
    alone = a_contest(results=[made_up(OURS, 0.01)])
    assert alone.ratio(alone.results[0]) is None


def test_the_table_and_its_remarks() -> None:
    found = a_contest(others_cores=0.52)
    console = Console(width=command.WIDTH, file=io.StringIO())
    console.print(table(found))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.splitlines()[0].rstrip() == "EfficientAD-S, batch 8, 256 x 512, 1 thread"
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in cells_of(shown)}
    assert rows[OURS] == ["11.0", "10.2 to 11.8", "3.00", "1.0e-06", "1.0e-06", "1.0e-08", "1.2", "9 / ?"]
    assert rows["onnxruntime"][:3] == ["", "", "missing"]
    assert rows["eager-channels-last"][2] == "FAILED"
    assert rows["openvino-int8"][2:4] == ["6.60", "inf"]
    assert remarks(found) == [
        "eager-channels-last FAILED and does not count: map_st is off by inf; at most 1e-04 counts",
        "onnxruntime was left out, for lack of onnx, onnxruntime: pip install 'efficientad-fast[bench]'",
        "other programs kept 0.5 cores busy: do not trust these figures, repeat them on a quiet machine",
    ]
    spinning = made_up("eager", 0.1, idle_seconds=10.0, idle_cpu_seconds=19.0)
    assert remarks(a_contest(results=[spinning])) == [
        "eager kept 1.9 cores busy while others ran: do not trust their figures"
    ]


def cells_of(shown: str) -> list[list[str]]:
    return [line.strip("│").split("│") for line in shown.splitlines() if line.startswith("│")]


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "peers.json"
    write(path, as_json({"machine": machine()}, [a_contest()]))
    assert list(path.parent.iterdir()) == [path]
    written = json.loads(path.read_text())
    assert written["machine"]["versions"]["torch"] and written["machine"]["cpu"] and written["machine"]["date"]
    assert set(written["settings"]) == set(CONTESTANTS) and all(written["settings"].values())
    (only,) = written["contests"]
    assert (only["model_size"], only["batch"], only["image_size"], only["threads"]) == ("s", 8, [256, 512], 1)
    rows = {row["name"]: row for row in only["results"]}
    assert rows[OURS]["median"] == 0.011 and rows[OURS]["ratio_to_fastest_rival"] == pytest.approx(3.0)
    assert rows[OURS]["rounds"] == [[0.010, 0.012, 0.011]]
    assert rows["openvino-int8"]["errors"]["map_st"] == "inf"
    assert rows["onnxruntime"]["missing"] == ["onnx", "onnxruntime"] and rows["onnxruntime"]["median"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--device cuda", "--device must be 'cpu', got 'cuda': rivals on a GPU are not compared yet"),
        ("--only tensorrt", "invalid choice: 'tensorrt'"),
        ("--size l", "invalid choice: 'l'"),
        ("--size s --detector x.safetensors", "--size and --detector exclude each other"),
        ("--image-size 256x", "must be a number or HEIGHTxWIDTH such as 256 or 256x512, got '256x'"),
        ("--image-size 255x300", "network size 255 x 300 (height x width) is too small"),
        ("--batch 0", "must be a whole number of at least 1, got '0'"),
        ("--threads two", "must be a whole number of at least 1, got 'two'"),
        ("--seconds -1", "must be a number of seconds of at least 0, got '-1'"),
        ("--seconds nan", "must be a number of seconds of at least 0, got 'nan'"),
        ("--out table.txt", "--out must end in .json, got 'table.txt'"),
    ],
)
def test_bad_options_are_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments.split())
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_options_are_repeatable() -> None:
    sizes = ["--image-size", "256", "--image-size", "256x320"]
    chosen = command.parse([*sizes, "--batch", "1", "--batch", "8", "--threads", "2", "--threads", "1"])
    assert chosen.image_size == [(256, 256), (256, 320)] and chosen.batch == [1, 8] and chosen.threads == [2, 1]


def test_a_detector_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--detector", str(tmp_path / "none.safetensors")]) == 2
    assert "No detector file at" in capsys.readouterr().out


def test_what_is_not_installed_is_named(tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(given: Task) -> contestants.Run:
        raise AssertionError

    absent = Contestant("eager", prepare, modules=("torch", "a_framework_of_tomorrow"))
    monkeypatch.setitem(CONTESTANTS, "eager", absent)
    results, _ = compete([task(tmp_path)], reference, rounds=1, seconds=0.0, tell=lambda line: None)
    assert results[0].missing == ["a_framework_of_tomorrow"] and not results[0].counts
    assert remarks(a_contest(results=results)) == [
        "eager was left out, for lack of a_framework_of_tomorrow: pip install 'efficientad-fast[bench]'"
    ]


def test_the_extra_has_every_rival_s_packages() -> None:
    extra = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"])
    asked = {module.partition(".")[0] for one in CONTESTANTS.values() for module in one.modules}
    assert asked - {"torch", "efficientad_fast"} | {"onnx", "onnxscript"} == extra


def test_warming_up_ends_when_runs_get_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, taken) for taken in (9, 5, 3, 3, 3, 3, 3, 3)))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert worker.warm_up(lambda: None, 100.0) == 6
    assert worker.warm_up(lambda: None, 2.0) == 1


def test_a_turn_leaves_out_its_first_run() -> None:
    calls: list[int] = []

    def run() -> contestants.Maps:
        calls.append(len(calls))
        time.sleep(0.2 if len(calls) == 1 else 0.0)
        return torch.tensor(calls[-1]).numpy(), torch.tensor(0).numpy()

    times, maps = worker.take_turn(run, 0.0)
    assert len(times) == worker.FEWEST_RUNS and max(times) < 0.2
    assert int(maps[0]) == calls[-1] == len(times)
    assert len(worker.take_turn(run, 0.05)[0]) > worker.FEWEST_RUNS


def test_a_process_that_ends_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho starting >&2\necho no such instruction >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    process = contest.Worker(task(tmp_path))
    with pytest.raises(WorkerFailed, match=r"^its process ended with status 3: no such instruction$"):
        process.hear()
    process.close()


def test_a_contestant_that_cannot_is_reported(tmp_path: Path, reference: Reference) -> None:
    results, _ = compete([task(tmp_path)], reference, rounds=1, seconds=0.0, tell=lambda line: None)
    (reason,) = (one.reason for one in results)
    assert reason is not None and reason.startswith("DetectorFileError: No detector file at")


def test_waiting_for_a_quiet_machine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    busy = iter([0.0, 0.5, 0.5, 0.51])
    monkeypatch.setattr(contest, "busy_seconds", lambda: next(busy))
    contest.wait_for_quiet(100.0)
    assert list(busy) == []
    monkeypatch.setattr(contest, "busy_seconds", lambda: None)
    contest.wait_for_quiet(100.0)


def test_random_networks_are_alive() -> None:
    detector = random_detector("s", 0)
    outputs: list[Tensor] = []
    for network in (detector.teacher, detector.student, detector.autoencoder):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, given, output: outputs.append(output.clone()))
    images = preprocessed_images(detector, (256, 256), 1, 5)
    with torch.inference_mode():
        raw = RawMaps(detector)(images)
    assert len(outputs) == 4 + 4 + 14
    assert all(0.05 < one.std() < 20 and 0.05 < (one > 0).float().mean() < 0.95 for one in outputs)
    assert all(0.1 < one.mean() < 100 for one in raw)
    assert detector.quantiles is not None and detector.quantiles.st_start < detector.quantiles.st_end
    again = random_detector("s", 0)
    assert torch.equal(again.teacher.conv4.weight, detector.teacher.conv4.weight)
    assert not torch.equal(random_detector("s", 1).teacher.conv1.weight, detector.teacher.conv1.weight)


def test_from_the_command_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector, out = tmp_path / "small.safetensors", tmp_path / "peers.json"
    small_detector().save(detector)
    options = f"--detector {detector} --image-size 256x260 --threads 1 --rounds 1 --seconds 0 --out {out}"
    assert command.main([*options.split(), "--only", OURS, "--only", "eager"]) == 0
    shown = capsys.readouterr().out
    assert "EfficientAD-S, batch 1, 256 x 260, 1 thread" in shown and "round 1 of 1" in shown
    written = json.loads(out.read_text())
    assert written["command"].startswith("python -m benchmarks.peers --detector ")
    ours, eager = written["contests"][0]["results"]
    assert (ours["name"], eager["name"]) == (OURS, "eager")
    for row in (ours, eager):
        assert row["counts"] and [len(times) for times in row["rounds"]] == [2]
        assert all(0 <= error < 1e-5 for error in row["errors"].values()) and row["setup_seconds"] > 0
        assert row["p10"] <= row["median"] <= row["p90"]
    assert ours["ratio_to_fastest_rival"] == pytest.approx(eager["median"] / ours["median"])
