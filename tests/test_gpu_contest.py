"""What `gpu_check` and `gpu_peers` measure predictions with, on the CPU with a clock that is made up."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from small_detector import small_detector
from torch import Tensor

sys.path.append(str(ROOT))

from benchmarks import gpu_check, gpu_peers
from benchmarks.gpu import contest, contestants, predictions, timing, worker
from benchmarks.gpu.contest import Entrants, Row, Task, compete
from benchmarks.gpu.contestants import Contestant, Eager
from benchmarks.peers.networks import Reference
from efficientad_fast import Detector, native, ops
from efficientad_fast.plan import Step

CPU = torch.device("cpu")


class Clock:
    """Runs everything once; a batch takes a millisecond on the device, and twice as long from the host."""

    def device(self, call: Callable[[], object], seconds: float) -> list[float]:
        call()
        return [1e-3] * 3

    def host(self, call: Callable[[], object], seconds: float) -> list[float]:
        call()
        return [2e-3] * 3

    def stream(self, call: Callable[[], object], seconds: float) -> float:
        call()
        return 0.5e-3

    def step(self, run: Callable[[], object]) -> float:
        run()
        return 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small detector, two images, and what is right of them, as `Entrants.written` writes them."""
    return written(tmp_path_factory.mktemp("entrants"), small_detector())


def written(folder: Path, detector: Detector) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    batch = detector.preprocessing.batch([torch.from_numpy(one).permute(2, 0, 1) for one in images])
    right = Reference.of(detector, batch)
    anomaly_map, scores = right.plan.anomaly_map(right.map_st, right.map_ae, detector.quantiles, detector.size)
    detector.save(folder / "detector.safetensors")
    np.save(folder / "images.npy", images)
    np.savez(
        folder / "right.npz",
        map_st=right.map_st.numpy(),
        map_ae=right.map_ae.numpy(),
        anomaly_map=anomaly_map.numpy(),
        scores=scores.numpy(),
    )
    return folder


def task(files: Path, contestant: str = "eager", **changes: Any) -> Task:
    made = Task(
        contestant,
        "s",
        "float32",
        str(files / "detector.safetensors"),
        str(files / "images.npy"),
        str(files / "right.npz"),
        str(files / "results.json"),
        batches=(1, 3),
        seconds=1.0,
    )
    return dataclasses.replace(made, **changes)


class Known(Contestant):
    """Has what is right from a file."""

    right: Path

    def take(self, images: Tensor) -> None:
        super().take(images)
        with np.load(self.right) as file:
            chosen = torch.arange(len(images)) % 2
            self.known = {name: torch.from_numpy(file[name])[chosen].float() for name in file.files}

    def raw_maps(self) -> tuple[Tensor, Tensor]:
        return self.known["map_st"], self.known["map_ae"]

    def run(self) -> tuple[Tensor, Tensor]:
        return self.known["anomaly_map"], self.known["scores"]

    def run_from_host(self) -> tuple[list[Tensor], Tensor]:
        return list(self.known["anomaly_map"][:, 0]), self.known["scores"]

    @contextlib.contextmanager
    def steps(self) -> Iterator[Sequence[Any]]:
        yield [SimpleNamespace(layer=f"conv{len(self.images)}", run=lambda: None)]


class Wrong(Known):
    """On the host alone."""

    def run_from_host(self) -> tuple[list[Tensor], Tensor]:
        maps, scores = super().run_from_host()
        maps[0] = maps[0].clone()
        maps[0][7, 9] = math.nan
        return maps, scores


class Failing(Known):
    def take(self, images: Tensor) -> None:
        raise ValueError("no such layout")


@pytest.fixture(autouse=True)
def made_up_contestants(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Known, "right", files / "right.npz", raising=False)
    for name, one in (("known", Known), ("wrong", Wrong), ("failing", Failing)):
        monkeypatch.setitem(contestants.CONTESTANTS, name, one)


def test_a_rival_is_right(files: Path) -> None:
    row = worker.measure(task(files, batches=(1,), seconds=0.0), CPU, Clock())
    assert "reason" not in row and contest.counts(row)
    regions = [f"{one}, {at}" for one in ("anomaly_map", "scores") for at in ("device", "host")]
    assert set(row["errors"]) == {"map_st", "map_ae", *regions} and max(row["errors"].values()) < 1e-5
    # Nothing is timed without seconds.
    assert list(row["by_batch"]["1"]) == ["setup_seconds"]


def test_a_rival_is_right_without_padded_maps(tmp_path: Path) -> None:
    detector = small_detector()
    folder = written(tmp_path, detector.replaced(pad_maps=not detector.pad_maps))
    assert contest.counts(worker.measure(task(folder, batches=(1,), seconds=0.0), CPU, Clock()))


def test_every_batch_is_checked_and_timed(files: Path) -> None:
    row = worker.measure(task(files, "known"), CPU, Clock())
    assert list(row["by_batch"]) == ["1", "3"] and max(row["errors"].values()) < 1e-6
    found = row["by_batch"]["3"]
    assert (found["device"]["median"], found["host"]["p99"]) == (1e-3, 2e-3)
    assert found["images_per_second"] == pytest.approx(3 / 0.5e-3)
    json.dumps(row, allow_nan=False)


def test_wrong_results_are_not_timed(files: Path) -> None:
    row = worker.measure(task(files, "wrong"), CPU, Clock())
    assert row["reason"] == "at batch 1 anomaly_map, host is off by inf; at most 1.0e-04 counts"
    assert row["by_batch"] == {} and not contest.counts(row)
    json.dumps(row, allow_nan=False)


def test_what_is_raised_is_a_row_s_result(files: Path) -> None:
    assert worker.measured_or_told(task(files, "failing"), CPU, Clock()) == {"reason": "ValueError: no such layout"}


def test_steps_are_timed_where_asked_for_and_batches_end_with_the_time(files: Path) -> None:
    row = worker.measure(task(files, "known", steps=(3,)), CPU, Clock())
    assert "steps" not in row["by_batch"]["1"]
    assert row["by_batch"]["3"]["steps"] == [{"layer": "conv3", "seconds": 1e-4, "by": {}}]
    row = worker.measure(task(files, "known", limit=-1.0), CPU, Clock())
    assert list(row["by_batch"]) == ["1"] and row["left_out"] == "batches from 3 on, as the time was up"


def test_half_precision_rivals_leave_the_detector_as_it_is(files: Path) -> None:
    detector = Detector.load(files / "detector.safetensors")
    Eager(detector, torch.bfloat16, CPU)
    assert {one.dtype for one in detector.teacher.parameters()} == {torch.float32}


def test_errors_are_relative_to_what_was_computed_and_of_the_worst_image() -> None:
    right = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    given = right.float()
    given[1] += 0.25
    assert worker.worst(given, right) == pytest.approx(0.25)
    assert worker.worst(given[:1], right) == math.inf
    assert worker.worst(torch.tensor([1.0, math.nan]), torch.ones(2, dtype=torch.float64)) == math.inf
    # Quantile normalisation subtracts this much of a map that is 0.05 / 0.2 st + 0.05 / 0.1 ae.
    assert worker.offset(small_detector()) == pytest.approx(0.25 * 0.1 + 0.5 * 0.05)


def rows_of(times: dict[str, float], asked: list[str]) -> Callable[[Task, float], Row]:
    """Rows with a median for each contestant, or the reason ``it broke`` for none."""

    def run(one: Task, limit: float) -> Row:
        asked.append(one.title)
        if one.contestant not in times:
            return dict(one.key) | {"reason": "it broke"}
        median = times[one.contestant]
        figures = {
            "device": {"median": median, "p99": 2 * median},
            "host": {"median": 3 * median},
            "images_per_second": 1 / median,
            "images_per_second_host": 1 / (3 * median),
        }
        return dict(one.key) | {"errors": {"map_st": 1e-4}, "by_batch": {str(batch): figures for batch in one.batches}}

    return run


def test_finished_rows_are_kept_and_failed_ones_measured_again(files: Path, tmp_path: Path) -> None:
    kept, asked = tmp_path / "rows.json", []
    tasks = [task(files, name) for name in ("eager", "compile")]
    first = compete(tasks, kept, run=rows_of({"eager": 1e-3}, asked), tell=lambda line: None)
    assert [contest.counts(row) for row in first] == [True, False]
    told: list[str] = []
    second = compete(tasks, kept, run=rows_of({"eager": 9.0, "compile": 2e-3}, asked), tell=told.append)
    assert [row["by_batch"]["1"]["device"]["median"] for row in second] == [1e-3, 2e-3]
    assert asked == [tasks[0].title, tasks[1].title, tasks[1].title] and told[0].endswith("kept from before")
    assert len(contest.read_kept(kept)) == 2
    # Other batches are other rows.
    compete([task(files, batches=(8,))], kept, run=rows_of({"eager": 1e-3}, asked), tell=lambda line: None)
    assert len(asked) == 4 and len(contest.read_kept(kept)) == 3


def test_rows_of_another_gpu_or_source_are_forgotten(files: Path, tmp_path: Path) -> None:
    kept, asked = tmp_path / "rows.json", []
    run = rows_of({"eager": 1e-3}, asked)
    for about in ({"gpu": "a"}, {"gpu": "a"}, {"gpu": "b"}):
        compete([task(files)], kept, about=about, run=run, tell=lambda line: None)
    assert len(asked) == 2 and len(contest.source_digest()) == 16


def test_an_interrupted_contest_has_kept_what_was_finished(files: Path, tmp_path: Path) -> None:
    kept, inner = tmp_path / "rows.json", rows_of({"eager": 1e-3}, [])

    def run(one: Task, limit: float) -> Row:
        if one.contestant == "compile":
            raise KeyboardInterrupt
        return inner(one, limit)

    with pytest.raises(KeyboardInterrupt):
        compete([task(files), task(files, "compile")], kept, run=run, tell=lambda line: None)
    assert [row["contestant"] for row in contest.read_kept(kept)] == ["eager"]


def test_no_row_is_begun_when_the_time_is_up(files: Path) -> None:
    asked: list[str] = []
    (row,) = compete([task(files)], None, end=time.monotonic() - 1, run=rows_of({}, asked), tell=lambda line: None)
    assert row["reason"] == "not begun, as the time was up" and asked == []


def test_the_time_that_is_left_is_shared(files: Path) -> None:
    limits: list[tuple[float, float]] = []

    def run(one: Task, limit: float) -> Row:
        limits.append((one.limit, limit))
        return dict(one.key) | {"by_batch": {}}

    tasks = [task(files, name) for name in ("eager", "compile", "known")]
    compete(tasks, None, end=time.monotonic() + 60, run=run, tell=lambda line: None)
    assert [share for share, _ in limits] == pytest.approx([20, 30, 60], abs=1)
    assert [limit for _, limit in limits] == pytest.approx([60, 60, 60], abs=1)


def test_a_process_that_fails_is_told(files: Path, tmp_path: Path) -> None:
    row = contest.run_task(task(files, results=str(tmp_path / "row.json"), detector=str(tmp_path / "none")), 60.0)
    assert row["contestant"] == "eager" and "DetectorFileError" in row["reason"]


@pytest.fixture
def on_a_gpu(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as `gpu_peers` can see."""
    facts = {"gpu": "NVIDIA Made-Up 1", "driver": "1", "torch": "2", "triton": "3", "date": "today"}
    paths = {"safetensors": "", "npy": "", "npz": ""}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_peers, "machine", lambda: facts)
    monkeypatch.setattr(gpu_peers, "is_installed", lambda: True)
    monkeypatch.setattr(Entrants, "written", lambda folder, sizes: Entrants(dict.fromkeys(sizes, paths)))


def test_peers_are_compared_with_the_fastest_and_written(
    on_a_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, asked = tmp_path / "peers.json", []
    arguments = ["--json", str(target), "--size", "s"]
    run = rows_of({gpu_peers.OURS: 1e-3, "eager": 3e-3}, asked)
    assert gpu_peers.main(arguments, run=run) == 0, "a rival that fails is no failure of this package"
    printed = capsys.readouterr().out
    assert "compile, S, float16 FAILED and does not count: it broke" in printed and "NVIDIA Made-Up 1" in printed
    content = json.loads(target.read_text())
    ratios = {(row["contestant"], row["dtype"]): row.get("by_batch") for row in content["rows"]}
    assert ratios[gpu_peers.OURS, "float16"]["32"]["ratio_to_fastest_rival"] == pytest.approx(3.0)
    # It goes on with what failed.
    asked.clear()
    run = rows_of({gpu_peers.OURS: 1e-3, "eager": 3e-3, "compile": 2e-3}, asked)
    assert gpu_peers.main(arguments, run=run) == 0 and asked == ["compile, EfficientAD-S, float16"]
    content = json.loads(target.read_text())
    ours = next(row for row in content["rows"] if row["contestant"] == gpu_peers.OURS)
    assert ours["by_batch"]["1"]["ratio_to_fastest_rival"] == pytest.approx(2.0)
    assert not list(tmp_path.glob("*.partial*"))


def test_peers_without_us_fail(on_a_gpu: None, tmp_path: Path) -> None:
    assert gpu_peers.main(["--json", str(tmp_path / "x.json"), "--only", gpu_peers.OURS], run=rows_of({}, [])) == 1


def test_peers_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_peers.main([]) == 2 and "There is no GPU" in capsys.readouterr().out


def test_spread_and_repetition() -> None:
    found = timing.spread([float(one) for one in range(1, 101)])
    assert (found["median"], found["p99"], found["min"], found["runs"]) == (50.5, 100.0, 1.0, 100)
    runs = iter(range(10_000))
    times = timing.repeated(lambda: float(next(runs)), 0.0)
    assert len(times) == timing.FEWEST and times[0] >= 3, "what warms up is not counted"


def test_gpu_check_stops_what_takes_too_long() -> None:
    assert gpu_check.run([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.5) == gpu_check.STOPPED
    assert gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], limit=60) == 3


def test_gpu_check_adds_the_counts_of_its_runs() -> None:
    one = {"operator": "a", "device": "gpu", "implementation": "cuda", "passed": 3}
    other = {"operator": "a", "device": "gpu", "implementation": "cuda", "passed": 2, "failed": 1}
    more = {**other, "implementation": "triton"}
    assert gpu_check.together([one], [other, more]) == [one | {"passed": 5, "failed": 1}, more]


def test_gpu_check_s_tables() -> None:
    figures = {"device": {"median": 2e-4, "p99": 3e-4}, "host": {"median": 4e-4, "p99": 5e-4}}
    slow, fast = ({"images_per_second": rate, "images_per_second_host": rate / 2} for rate in (5000.0, 9000.0))
    steps = [
        {"layer": "conv2", "seconds": 9e-5, "floor": 4e-5, "floor_with_tiles": 5e-5, "launches": 1},
        {"layer": "conv1", "seconds": 4e-6, "floor": 3e-6, "floor_with_tiles": 3e-6, "launches": 1},
    ]
    errors = {"map_st": 1e-4, "map_ae": 2e-4}
    rows: list[Row] = [
        {"model_size": "s", "dtype": "float16", "errors": errors}
        | {"by_batch": {"1": figures | slow | {"steps": steps}, "32": figures | fast}},
        {"model_size": "m", "dtype": "float8", "reason": "it broke"},
        {"model_size": "m", "dtype": "float16", "errors": errors, "by_batch": {"1": {"setup_seconds": 1.0}}},
    ]
    table = gpu_check.prediction_table(rows)
    cells = [list(column.cells) for column in table.columns]
    assert [column[0] for column in cells] == [
        *("S", "float16", "0.200", "0.300", "9000", "32", "0.400", "0.500", "4500", "32", "2.0e-04")
    ]
    assert cells[2][1] == "FAILED" and cells[-1][2] == "2.0e-04"
    (one,) = gpu_check.step_tables(rows)
    assert [next(iter(column.cells)) for column in one.columns] == ["conv2", "90.0", "40.0", "50.0", "2.2", "1"]


def test_the_fastest_implementation_of_a_step_is_marked_and_a_wrong_one_fails() -> None:
    steps = [
        {"layer": "conv2", "seconds": 9e-5, "by": {"triton": 9e-5, "cuda": 8e-5}},
        {"layer": "conv1", "seconds": 4e-6, "by": {"triton": 4e-6, "cuda": None}},
        {"layer": "anomaly_map", "seconds": 4e-6, "by": {"triton": 4e-6}},
    ]
    rows = [{"model_size": "s", "dtype": "float16", "by_batch": {"1": {"steps": steps}}}]
    (table,) = gpu_check.step_tables(rows)
    shown = {str(column.header): list(column.cells) for column in table.columns}
    assert shown["triton"] == ["90.0", "4.0 *", "4.0"] and shown["cuda"] == ["80.0 *", "WRONG", ""]
    assert gpu_check.wrong_steps(rows) == ["s, float16, batch 1: conv1 by cuda is not what the plan makes"]


def test_implementations_of_a_step_are_compared_and_timed() -> None:
    if not native.is_built("cpu"):
        pytest.skip("the CPU library is not built")
    ops.load()
    maps, out = torch.rand(2, 1, 1, 8, 8), torch.empty(1, 1, 32, 32)
    written_to = {"border": 0, "convention": "resized", "anomaly_map": out, "score": torch.empty(1)}
    run = functools.partial(torch.ops.efficientad_fast.anomaly_map.out, maps[0], maps[1], None, **written_to)
    step = Step("anomaly_map", (maps[0], maps[1]), [], {}, out, run)
    assert worker.by_implementation(step, Clock(), ("cpu", "triton")) == {"cpu": 1e-4}
    assert worker.by_implementation(step, Clock()) == {}

    def wrong(*args: Any, **kwargs: Any) -> None:
        out.fill_(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "resolve", lambda namespace, name: wrong)
        assert worker.by_implementation(step, Clock(), ("cpu",)) == {"cpu": None}

    def near(*args: Any, **kwargs: Any) -> None:
        run()
        out.mul_(1.01)

    narrow = step._replace(inputs=(torch.zeros(1, dtype=torch.float8_e4m3fn),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "resolve", lambda namespace, name: near)
        assert worker.by_implementation(step, Clock(), ("cpu",)) == {"cpu": None}
        assert worker.by_implementation(narrow, Clock(), ("cpu",)) == {"cpu": 1e-4}


def test_floors_stand_beside_steps_and_the_farthest_comes_first() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.datasheets import used
    from benchmarks.gpu.work import meta_steps

    layers = [step.layer for step in meta_steps("s", torch.float16, 1)]
    steps = [{"layer": layer, "seconds": 1e-3 if layer == "map_ae" else 1e-4} for layer in layers]
    rows = [{"model_size": "s", "dtype": "float16", "by_batch": {"1": {"steps": steps}}}]
    predictions.with_floors(rows, used()[0])
    assert steps[0]["layer"] == "map_ae" and 0 < steps[0]["floor"] < steps[0]["floor_with_tiles"]


@pytest.mark.parametrize("stopped", [False, True])
def test_gpu_check_with_a_gpu(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sections, whose order and limits are those of a GPU."""
    facts = {"gpu": "NVIDIA Made-Up 1", "compute_capability": "9.0", "driver": "1", "torch": "2", "triton": "3"}
    limits: dict[str, float] = {}
    ran = [
        {"operator": "conv_pool", "device": "gpu", "implementation": name, "passed": 1}
        for name in ("public", "cuda", "triton", "reference")
    ]

    def run_tests(selection: Any, folder: Path, limit: float) -> tuple[int, list[dict[str, Any]], list[str]]:
        name = "tests" if selection == gpu_check.ON_GPU else "rest"
        limits[name] = limit
        return (gpu_check.STOPPED, [], []) if stopped and name == "rest" else (0, ran, [])

    def run_predictions(folder: Path, limit: float) -> tuple[int, dict[str, Any]]:
        limits["predictions"] = limit
        return 0, {"rows": [], "rates": {"float16": 7e14}}

    def run_benchmarks(names: Any, gpu: bool, folder: Path, limit: float) -> tuple[int, list[dict[str, Any]]]:
        assert names == ["conv_pool"] and gpu
        limits["benchmarks"] = limit
        return 0, []

    monkeypatch.setattr(gpu_check, "machine", lambda: facts | {"date": "2026-11-25T01:02:03+00:00"})
    monkeypatch.setattr(gpu_check, "install", lambda **settings: None)
    for one in (run_tests, run_predictions, run_benchmarks):
        monkeypatch.setattr(gpu_check, one.__name__, one)
    assert gpu_check.main(["--json", str(tmp_path / "found.json")]) == 0
    assert list(limits) == ["tests", "predictions", "benchmarks", "rest"]
    # What comes before the rows of predictions may take a minute more.
    assert sum(limits[name] for name in ("tests", "predictions", "benchmarks")) + 60 < gpu_check.ALL_SECONDS < 540
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["rates"] == {"float16": 7e14} and content["stopped"] == (["the remaining tests"] if stopped else [])
    assert ("stopped: the remaining tests" in capsys.readouterr().out) == stopped


def test_rates_are_operations_and_bytes_over_time() -> None:
    found = timing.ceilings(Clock(), CPU, side=16, copied=1000)
    assert found["float16"] == found["bfloat16"] == pytest.approx(2 * 16**3 / 1e-4)
    assert found["bandwidth"] == pytest.approx(2 * 1000 / 1e-4)
    assert found["float8"] in (None, pytest.approx(2 * 16**3 / 1e-4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none")
def test_times_of_a_gpu_grow_with_the_work() -> None:
    clock = timing.CudaClock()
    small, large = (torch.randn(side, side, device="cuda") for side in (256, 2048))
    for measure in (clock.step, lambda run: min(clock.device(run, 0.05)), lambda run: clock.stream(run, 0.05)):
        assert 0 < measure(lambda: small @ small) < measure(lambda: large @ large)
