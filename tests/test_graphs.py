"""CUDA graphs of a plan: through a stand-in for `torch.cuda` that writes down what is asked of it, and on a GPU.

The stand-in's graphs hold the operators that were called while they were captured, and call them again when replayed,
with the same tensors; while they are captured nothing is written, as on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from assertions import assert_close
from plan_cases import CPU, images, source
from tolerances import EXACT, tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import efficientad_fast.plan as planning
from efficientad_fast.plan import MixedPlan, Pending, PlanInput, ReferencePlan, Step, build_plan
from efficientad_fast.plan import graphs as graphs_module
from efficientad_fast.plan.graphs import GraphTurns, Launches, Transfers, Work
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import Quantiles

QUANTILES = Quantiles(0.4, 1.1, 0.3, 0.7)


class StandInStream:
    def __init__(self, cuda: StandInCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: StandInStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: StandInEvent) -> None:
        self.cuda.log.append(f"{self.name} waits for event of {event.stream.name}")


class StandInEvent:
    """One that was not recorded is waited for by nobody."""

    def __init__(self, cuda: StandInCuda) -> None:
        self.cuda = cuda
        self.stream: StandInStream | None = None

    def record(self, stream: StandInStream | None = None) -> None:
        self.stream = stream or self.cuda.current_stream(None)
        self.cuda.log.append(f"event of {self.stream.name}")

    def synchronize(self) -> None:
        if self.stream is not None:
            self.cuda.log.append(f"host waits for event of {self.stream.name}")


class Recorder(TorchDispatchMode):
    """Keeps what is called, and leaves out what would write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable:
            self.calls.append((function, args, kwargs or {}))
            return args[0] if function._schema.returns else None
        return function(*args, **(kwargs or {}))


class StandInGraph:
    def __init__(self, cuda: StandInCuda) -> None:
        self.cuda = cuda

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.cuda.log.append(f"capture into {pool}, {capture_error_mode}, on {self.cuda.current_stream(None).name}")
        if self.cuda.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorder = Recorder()
        self.recorder.__enter__()

    def capture_end(self) -> None:
        if hasattr(self, "recorder"):
            self.recorder.__exit__(None, None, None)
        self.cuda.log.append("captured")

    def replay(self) -> None:
        self.cuda.log.append(f"replay on {self.cuda.current_stream(None).name}")
        for function, args, kwargs in self.recorder.calls:
            function(*args, **kwargs)


class StandInCuda:
    """What plans use of `torch.cuda`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refuses = self.capturing = False
        self._made = self._pools = 0
        self._current = threading.local()

    def Stream(self, device: Any, priority: int = 0) -> StandInStream:
        self._made += 1
        return StandInStream(self, f"stream {self._made}" if priority == 0 else f"first stream {self._made}")

    def Event(self) -> StandInEvent:
        return StandInEvent(self)

    def CUDAGraph(self) -> StandInGraph:
        return StandInGraph(self)

    def graph_pool_handle(self) -> str:
        self._pools += 1
        return f"pool {self._pools}"

    def current_stream(self, device: Any) -> StandInStream:
        return getattr(self._current, "stream", None) or StandInStream(self, "the caller")

    @contextlib.contextmanager
    def stream(self, stream: StandInStream) -> Iterator[None]:
        before = getattr(self._current, "stream", None)
        self._current.stream = stream
        yield
        self._current.stream = before

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


class SmallWork(Work):
    make: Callable[[], Launches]


def small_work(cuda: StandInCuda, target: Tensor, layers: tuple[str, ...]) -> SmallWork:
    """Steps that say their names, and add their numbers to ``target``."""

    def made() -> Launches:
        cuda.log.append("made")

        def step(number: int, layer: str) -> Step:
            def run(*_: Any) -> None:
                cuda.log.append(f"{layer} on {cuda.current_stream(None).name}")
                target.add_(10.0**number)

            return Step(layer, (), [], {}, target, partial(run))

        return Launches(None, [step(number, layer) for number, layer in enumerate(layers)])

    work = SmallWork()
    work.make = made
    return work


LAYERS = ("conv1", "autoencoder", "map_st", "map_ae")


def run(turns: GraphTurns, work: SmallWork) -> None:
    with turns.turn():
        turns.run(work, work.make)


def test_launched_first_then_captured_then_replayed() -> None:
    cuda, target = StandInCuda(), torch.zeros(1)
    turns = GraphTurns(CPU, cuda)
    work = small_work(cuda, target, LAYERS)
    run(turns, work)
    assert cuda.log == ["made", *(f"{layer} on the caller" for layer in LAYERS), "event of the caller"]
    assert target.item() == 1111
    cuda.log.clear()
    run(turns, work)
    assert cuda.log == [
        "the caller waits for event of the caller",
        "stream 1 waits for the caller",
        "capture into pool 1, thread_local, on stream 1",
        "made",
        "stream 2 waits for stream 1",
        "autoencoder on stream 2",
        "conv1 on stream 1",
        "map_st on stream 1",
        "stream 1 waits for stream 2",
        "map_ae on stream 1",
        "captured",
        "the caller waits for stream 1",
        "replay on the caller",
        "event of the caller",
    ]
    assert target.item() == 2222
    cuda.log.clear()
    with cuda.stream(cuda.Stream(None)):
        run(turns, work)
    assert cuda.log == [
        "stream 3 waits for event of the caller",
        "replay on stream 3",
        "event of stream 3",
    ]
    assert target.item() == 3333


def test_what_others_wait_for_goes_first() -> None:
    cuda = StandInCuda()
    turns, work = GraphTurns(CPU, cuda), small_work(cuda, torch.zeros(1), LAYERS)
    make = work.make
    work.make = lambda: make()._replace(side_first=True)
    for _ in range(2):
        run(turns, work)
    assert "autoencoder on first stream 2" in cuda.log and "map_ae on stream 1" in cuda.log
    other = small_work(cuda, torch.zeros(1), LAYERS)
    for _ in range(2):
        run(turns, other)
    assert "autoencoder on stream 3" in cuda.log


def test_of_one_image_the_small_networks_wait_for_the_autoencoder(plain: PlanInput) -> None:
    for planned, firsts in ((plain, [True, False]), (source("m"), [False, False])):
        cuda = StandInCuda()
        plan, found = MixedPlan(planned, CPU, torch.float16, cuda=cuda), []
        for count in (1, 2):
            key = planning.mixed._Key(count, *plan.size, False, None)
            found.append(plan._launches(plan._buffers(key), key, plan._own).side_first)
        assert found == firsts


def test_what_runs_beside_is_joined_also_where_nobody_reads_it() -> None:
    cuda = StandInCuda()
    turns, work = GraphTurns(CPU, cuda), small_work(cuda, torch.zeros(1), ("autoencoder", "conv1"))
    for _ in range(2):
        run(turns, work)
    assert cuda.log.index("stream 1 waits for stream 2") < cuda.log.index("captured")


def test_graphs_share_a_pool_while_there_are_some() -> None:
    cuda = StandInCuda()
    turns = GraphTurns(CPU, cuda)
    works = [small_work(cuda, torch.zeros(1), LAYERS) for _ in range(3)]

    def captured(work: SmallWork) -> str:
        cuda.log.clear()
        for _ in range(2):
            run(turns, work)
        return next(line for line in cuda.log if line.startswith("capture "))

    assert "pool 1" in captured(works[0]) and "pool 1" in captured(works[1])
    del works[:2]
    gc.collect()
    assert "pool 2" in captured(works[0])


def test_where_capturing_fails_kernels_are_launched_one_by_one_and_it_is_said_once() -> None:
    cuda, target = StandInCuda(), torch.zeros(1)
    turns = GraphTurns(CPU, cuda)
    works = [small_work(cuda, target, LAYERS) for _ in range(2)]
    run(turns, works[0])
    cuda.refuses = True
    with pytest.warns(RuntimeWarning, match=r"one by one.*failed \(operation not permitted when") as told:
        for work in works * 2:
            run(turns, work)
    assert len(told) == 1
    assert target.item() == 5 * 1111
    assert sum("capture into" in line for line in cuda.log) == 1
    assert not graphs_module._capturing.locked()


def test_no_cycles_are_collected_while_capturing() -> None:
    cuda = StandInCuda()
    turns, collecting = GraphTurns(CPU, cuda), []

    def made() -> Launches:
        collecting.append(gc.isenabled())
        return Launches(None, [])

    work = Work()
    for _ in range(2):
        with turns.turn():
            turns.run(work, made)
    assert collecting == [True, False] and gc.isenabled()
    cuda.refuses = True
    with turns.turn(), pytest.warns(RuntimeWarning, match="one by one"):
        turns.run(Work(has_run=True), made)
    assert gc.isenabled()


def test_while_something_else_is_captured_kernels_are_launched_one_by_one() -> None:
    cuda, target = StandInCuda(), torch.zeros(1)
    turns, work = GraphTurns(CPU, cuda), small_work(cuda, target, LAYERS)
    with graphs_module._capturing:
        for _ in range(3):
            run(turns, work)
    assert not any("capture" in line for line in cuda.log)
    run(turns, work)
    assert any("capture into" in line for line in cuda.log)
    assert target.item() == 4444


def test_a_turn_that_fails_leaves_the_next_one_a_stream_to_wait_for() -> None:
    cuda = StandInCuda()
    turns = GraphTurns(CPU, cuda)
    with pytest.raises(ValueError, match="broken"), turns.turn():
        raise ValueError("broken")
    assert cuda.log == ["event of the caller"]
    turns.settle()
    assert cuda.log[-1] == "host waits for event of the caller"


def test_copies_go_on_streams_of_their_own() -> None:
    cuda = StandInCuda()
    transfers = Transfers(CPU, cuda)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8, generator=generator)
    moved = transfers.to_device(list(pixels.movedim(3, 1)))
    assert torch.equal(moved, pixels) and moved.data_ptr() != pixels.data_ptr()
    assert cuda.log == ["the caller waits for stream 1"], "what is computed must wait for the copy, and not it for that"
    cuda.log.clear()
    wait = transfers.to_host(torch.arange(4.0))
    assert cuda.log == ["stream 2 waits for the caller", "event of stream 2"]
    assert wait().tolist() == [0, 1, 2, 3]
    assert cuda.log[-1] == "host waits for event of stream 2"


# A whole plan


@pytest.fixture(scope="module")
def plain() -> PlanInput:
    return replace(source(), quantiles=QUANTILES)


@pytest.fixture(scope="module")
def expected(plain: PlanInput) -> MixedPlan:
    """Without graphs."""
    return MixedPlan(plain, CPU, torch.float16)


@pytest.fixture
def cuda() -> StandInCuda:
    return StandInCuda()


@pytest.fixture
def plan(plain: PlanInput, cuda: StandInCuda) -> MixedPlan:
    return MixedPlan(plain, CPU, torch.float16, cuda=cuda)


def assert_maps(actual: Any, expected: Any, allowed: Any = EXACT) -> None:
    for name, one, other in zip(("map_st", "map_ae"), actual, expected, strict=True):
        assert_close(one, other, allowed, name)


def replays(cuda: StandInCuda) -> int:
    return sum(line.startswith("replay") for line in cuda.log)


def test_replayed_maps_are_those_of_the_batch_and_the_callers_own(
    plan: MixedPlan, expected: MixedPlan, cuda: StandInCuda
) -> None:
    kept = []
    for seed in range(4):
        found = plan.raw_maps(images(seed=seed))
        right = expected.raw_maps(images(seed=seed))
        assert_maps(found, right)
        kept.append((found, right))
    assert replays(cuda) == 3
    for found, right in kept:
        assert_maps(found, right)
    batch, sizes = images(seed=7), [(256, 256)]
    assert torch.equal(plan.run(batch, sizes)[0], expected.run(batch, sizes)[0])
    assert replays(cuda) == 4, "the same graph serves raw maps and scores"


def test_statistics_reach_what_was_captured(plain: PlanInput, plan: MixedPlan, expected: MixedPlan) -> None:
    own = expected.raw_maps(images())
    for shift in (0.0, 0.3, 0.3, 0.0, 0.7):
        statistics = (plain.teacher_mean + shift, (1 + shift) * plain.teacher_std)
        right = expected.raw_maps(images(), statistics=statistics)
        assert_maps(plan.raw_maps(images(), statistics=statistics), right)
        assert_maps(plan.raw_maps(images()), own)


def test_graphs_that_were_not_used_for_long_are_let_go(
    plan: MixedPlan, cuda: StandInCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.mixed, "_KEPT", 2)
    for _ in range(2):
        plan.raw_maps(images())
    graph = weakref.ref(next(iter(plan._entries.values())).work.graph)
    plan.raw_maps(images(1, (256, 272)))
    assert graph() is not None
    cuda.log.clear()
    plan.raw_maps(images(1, (256, 288)))
    gc.collect()
    assert graph() is None and len(plan._entries) == 2
    assert "host waits for event of the caller" in cuda.log, "memory that is still worked on was let go"


def decoded(seed: int, *sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).movedim(2, 0) for size in sizes]


@pytest.mark.parametrize(("convention", "original_maps"), [("resized", False), ("resized", True), ("native", False)])
def test_submitted_images(plain: PlanInput, cuda: StandInCuda, convention: str, original_maps: bool) -> None:
    planned = replace(plain, map_convention=convention)
    plan, expected = MixedPlan(planned, CPU, torch.float16, cuda=cuda), MixedPlan(planned, CPU, torch.float16)
    preprocessing = Preprocessing()
    alike, others = ((300, 260), (300, 260)), ((280, 300), (256, 256))
    batches = [decoded(seed, *sizes) for seed, sizes in enumerate([alike, alike, others, alike, alike])]
    waiting = [plan.submit(batch, preprocessing, original_maps=original_maps) for batch in batches]
    for batch, pending in zip(batches, waiting, strict=True):
        scores, maps = pending.result()
        right_scores, right_maps = expected.submit(batch, preprocessing, original_maps=original_maps).result()
        # Preprocessed in float16 here, in float32 there, which is rounded afterwards.
        assert_close(scores, right_scores, tolerance("preprocess", torch.float16), "scores")
        for one, right in zip(maps, right_maps, strict=True):
            assert_close(one, right, tolerance("preprocess", torch.float16), "map")
        assert pending.result()[0] is scores
    # Three by the graph that begins at the networks, of which the first was launched; then one launched that begins at
    # the preprocessing, and captured with the next.
    keys = {key.form is not None: entry.work for key, entry in plan._entries.items()}
    assert keys.keys() == {False, True} and all(work.graph is not None for work in keys.values())


def test_small_batches_are_copied_by_the_graph(plan: MixedPlan, expected: MixedPlan, cuda: StandInCuda) -> None:
    preprocessing, allowed = Preprocessing(), tolerance("preprocess", torch.float16)

    def submitted(seed: int) -> tuple[list[Tensor], Pending]:
        batch = decoded(seed, (300, 260))
        return batch, plan.submit(batch, preprocessing)

    def assert_right(batch: list[Tensor], pending: Pending) -> None:
        right_scores, right_maps = expected.submit(batch, preprocessing).result()
        scores, maps = pending.result()
        assert_close(scores, right_scores, allowed, "scores")
        assert_close(maps[0], right_maps[0], allowed, "map")

    for seed in range(3):  # launched beside its copies, then with them, then captured
        assert_right(*submitted(seed))
    cuda.log.clear()
    assert_right(*submitted(3))
    assert cuda.log == [
        "the caller waits for event of the caller",
        "host waits for event of the caller",
        "replay on the caller",
        "event of the caller",
        "event of the caller",
        "host waits for event of the caller",
    ], "one graph, and nothing on other streams"

    # Of several under way two are staged, and one is copied as larger batches are.
    waiting = [submitted(seed) for seed in range(4, 7)]
    cuda.log.clear()
    for one in waiting:
        assert_right(*one)
    assert [line for line in cuda.log if "stream" in line] == ["host waits for event of stream 2"]
    # Whoever forgets a batch, or keeps what came of it, keeps no stage.
    forgotten = submitted(7)
    del forgotten
    kept = [submitted(seed) for seed in (8, 9)]
    for one in kept:
        assert_right(*one)
    cuda.log.clear()
    for seed in (10, 11, 12):
        assert_right(*submitted(seed))
    assert not any("stream" in line for line in cuda.log)
    [stages] = [entry.stages for key, entry in plan._entries.items() if key.form is not None]
    assert len(stages._free) == 2


def test_batches_that_take_long_to_copy_are_copied_beside_the_networks(plan: MixedPlan, cuda: StandInCuda) -> None:
    batch = decoded(0, (512, 1024))
    for _ in range(4):
        plan.submit(batch, Preprocessing()).result()
    assert all(entry.stages._made == 0 for entry in plan._entries.values())
    assert "host waits for event of stream 2" in cuda.log


def test_inside_a_capture_of_the_callers_everything_is_its_own(
    plain: PlanInput, plan: MixedPlan, expected: MixedPlan, cuda: StandInCuda
) -> None:
    plan.raw_maps(images(seed=1))
    cuda.log.clear()
    cuda.capturing = True
    found = plan.raw_maps(images(seed=2))
    statistics = (plain.teacher_mean + 0.3, plain.teacher_std)
    others = plan.raw_maps(images(seed=2), statistics=statistics)
    cuda.capturing = False
    assert cuda.log == []
    assert_maps(found, expected.raw_maps(images(seed=2)))
    assert_maps(others, expected.raw_maps(images(seed=2), statistics=statistics))
    assert_maps(plan.raw_maps(images(seed=1)), expected.raw_maps(images(seed=1)))


def test_of_no_images_there_is_no_graph(plan: MixedPlan, cuda: StandInCuda) -> None:
    for _ in range(3):
        maps = plan.raw_maps(images(0))
        assert [one.shape[:2] for one in maps] == [(0, 1)] * 2
    assert replays(cuda) == 0 and all(entry.work.graph is None for entry in plan._entries.values())


def test_threads_take_turns(plan: MixedPlan, expected: MixedPlan, cuda: StandInCuda) -> None:
    batches = [images(seed=seed) for seed in range(6)]
    right = [expected.raw_maps(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for one, other in zip(pool.map(plan.raw_maps, batches), right, strict=True):
            assert_maps(one, other)
    assert replays(cuda) == 5


# On a GPU


@pytest.fixture(scope="module")
def devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def on_gpu(planned: PlanInput, device: torch.device, dtype: torch.dtype) -> MixedPlan:
    if dtype == torch.float8_e4m3fn:
        if torch.cuda.get_device_capability(device) < (8, 9):
            pytest.skip("needs a GPU of compute capability 8.9 or newer for float8")
        observer = on_gpu(planned, device, torch.float16)
        planned = replace(planned, activations=observer.observe(images(4, seed=1)))
    made = build_plan(planned, device, dtype, backend="operators")
    assert isinstance(made, MixedPlan)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", planning.MIXED_DTYPES)
@pytest.mark.parametrize(("model_size", "padding"), [("s", False), ("s", True), ("m", False), ("m", True)])
def test_gpu_maps_are_those_of_the_networks(
    devices: list[torch.device], model_size: str, padding: bool, dtype: torch.dtype
) -> None:
    planned = source(model_size, padding=padding)
    plan = on_gpu(planned, devices[0], dtype)
    for count in (1, 3):
        batch = images(count)
        trusted = ReferencePlan(planned, devices[0], torch.float64).raw_maps(batch)
        for _ in range(3):
            found = plan.raw_maps(batch)
            assert_maps(found, trusted, tolerance("mixed map", dtype))
    assert any(entry.work.graph is not None for entry in plan._entries.values()), "nothing was captured"


@pytest.mark.gpu
def test_gpu_scores_maps_and_images(plain: PlanInput, devices: list[torch.device]) -> None:
    plan, trusted = on_gpu(plain, devices[0], torch.float16), ReferencePlan(plain, CPU, torch.float32)
    preprocessing = Preprocessing()
    batches = [decoded(seed, (300, 260), (300, 260)) for seed in range(4)] + [decoded(9, (280, 300), (256, 256))]
    waiting = [plan.submit(batch, preprocessing) for batch in batches]
    for batch, pending in zip(batches, waiting, strict=True):
        right_scores, right_maps = trusted.submit(batch, preprocessing).result()
        scores, maps = pending.result()
        assert_close(scores, right_scores, tolerance("map", torch.float16), "scores")
        for one, right in zip(maps, right_maps, strict=True):
            assert one.device == CPU and not one.is_pinned()
            assert_close(one, right, tolerance("map", torch.float16), "map")
        if batch[0].shape == batch[1].shape:
            pixels = torch.stack(batch).movedim(1, 3).to(devices[0])
            on_device = plan.run_images(pixels, preprocessing)
            assert_close(on_device[0], scores, tolerance("preprocess", torch.float16), "scores")


@pytest.mark.gpu
def test_gpu_small_batches_from_many_threads(plain: PlanInput, devices: list[torch.device]) -> None:
    plan, preprocessing = on_gpu(plain, devices[0], torch.float16), Preprocessing()
    batches = [decoded(seed, (300, 260)) for seed in range(6)]
    right = [plan.submit(batch, preprocessing).result() for batch in batches]

    def repeated(number: int) -> list[tuple[Tensor, list[Tensor]]]:
        waiting = [plan.submit(batches[number], preprocessing) for _ in range(3)]
        found = [one.result() for one in waiting]
        return found + [plan.submit(batches[number], preprocessing).result() for _ in range(20)]

    with ThreadPoolExecutor(6) as pool:
        for found, (scores, [anomaly_map]) in zip(pool.map(repeated, range(6)), right, strict=True):
            for one in found:
                assert_close(one[0], scores, tolerance("preprocess", torch.float16), "scores")
                assert_close(one[1][0], anomaly_map, tolerance("preprocess", torch.float16), "map")
    assert any(entry.stages._made for entry in plan._entries.values())


@pytest.mark.gpu
def test_gpu_threads_streams_and_devices(plain: PlanInput, devices: list[torch.device]) -> None:
    batches = [images(1 + seed % 2, seed=seed) for seed in range(8)]
    for device in devices[:2]:
        plan = on_gpu(plain, device, torch.float16)
        right = [[one.clone() for one in plan.raw_maps(batch)] for batch in batches]

        def repeated(batch: Tensor, plan: MixedPlan = plan, device: torch.device = device) -> list[list[Tensor]]:
            found = []
            with torch.cuda.stream(torch.cuda.Stream(device)):
                for _ in range(20):
                    found.append([one.clone() for one in plan.raw_maps(batch.to(device))])
                torch.cuda.current_stream(device).synchronize()
            return found

        with ThreadPoolExecutor(8) as pool:
            for results, expected in zip(pool.map(repeated, batches), right, strict=True):
                for found in results:
                    assert_maps(found, expected)


@pytest.mark.gpu
def test_gpu_graphs_in_cycles_do_not_disturb_a_capture(plain: PlanInput, devices: list[torch.device]) -> None:
    plan = on_gpu(plain, devices[0], torch.float16)
    other = on_gpu(plain, devices[0], torch.float16)
    for _ in range(3):
        other.raw_maps(images())
    cycle = [other]
    cycle.append(cycle)  # type: ignore[arg-type]
    del other, cycle
    threshold = gc.get_threshold()
    plan.raw_maps(images())
    gc.set_threshold(1, 1, 1)  # collected by whatever is allocated next
    try:
        plan.raw_maps(images())
    finally:
        gc.set_threshold(*threshold)
    assert all(entry.work.graph is not None for entry in plan._entries.values())


@pytest.mark.gpu
def test_gpu_results_stay_as_they_are(plain: PlanInput, devices: list[torch.device]) -> None:
    plan = on_gpu(plain, devices[0], torch.float16)
    kept = [plan.raw_maps(images(seed=seed)) for seed in range(5)]
    alone = on_gpu(plain, devices[0], torch.float16)
    for seed, found in enumerate(kept):
        assert_maps(found, alone.raw_maps(images(seed=seed)))


@pytest.mark.gpu
def test_gpu_in_a_graph_of_the_callers(plain: PlanInput, devices: list[torch.device]) -> None:
    plan = on_gpu(plain, devices[0], torch.float16)
    batch = images().to(devices[0])
    plan.raw_maps(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = plan.raw_maps(batch)
    for seed in (1, 2):
        batch.copy_(images(seed=seed))
        graph.replay()
        assert_maps(found, plan.raw_maps(batch))
