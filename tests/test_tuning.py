"""`efficientad_fast.tuning`, with kernels and a clock that are made up: what is tried, what counts, what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from efficientad_fast.triton_kernels import tiles

from efficientad_fast import tuning
from efficientad_fast.errors import BackendError, InputError

GRID = [{"rows": rows, "depth": depth} for rows in (1, 2, 4, 8) for depth in (16, 32, 64)]
FIRST = {"rows": 1, "depth": 16}


class Step:
    """A step of a made-up kernel; it notes which tiles it ran in."""

    def __init__(self, layer: str, facts: dict[str, Any], *, kernel: str = "conv_pool") -> None:
        self.layer, self.facts, self.kernel = layer, facts, kernel
        self.out = torch.zeros(4)
        self.ran: list[dict[str, int]] = []
        self.wrong: dict[str, int] | None = None
        self.broken: dict[str, int] | None = None

    def run(self) -> None:
        tile = tiles.choose(self.kernel, self.facts)
        self.ran.append(tile)
        if tile == self.broken:
            raise RuntimeError("out of resource: shared memory\nmore of it")
        self.out[:] = torch.arange(4.0)
        if tile == self.wrong:
            self.out[2] = math.nan


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's, in a folder of the test; the rules that ship are made up too."""
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv(tiles.TABLE_VARIABLE, str(path))
    monkeypatch.setattr(
        tiles.ops, "tiles", lambda: {"conv_pool": [{"when": {}, "tile": FIRST}], "quiet": [{"when": {}, "tile": {}}]}
    )
    modules = {
        "tiles": tiles,
        "conv_pool": SimpleNamespace(candidates=lambda facts: [dict(one) for one in GRID]),
        "quiet": SimpleNamespace(),
    }
    monkeypatch.setattr(tuning, "_module", modules.__getitem__)
    tiles.rules.cache_clear()
    yield path
    tiles.rules.cache_clear()


def clock(step: Step, seconds: Callable[[dict[str, int]], float]) -> Callable[[Callable[[], object]], float]:
    def timer(run: Callable[[], object]) -> float:
        run()
        return seconds(step.ran[-1])

    return timer


def bowl(tile: dict[str, int]) -> float:
    """Fastest at 4 rows and a depth of 32, and the slower the farther from that."""
    return 1e-6 * (1 + abs(math.log2(tile["rows"] / 4)) + abs(math.log2(tile["depth"] / 32)))


def test_steps_that_state_the_same_facts_are_one_case() -> None:
    one, other = {"pixels": 9, "pool": True}, {"pixels": 10, "pool": True}
    steps = [Step("conv1", one), Step("conv2", other), Step("conv3", dict(one))]
    cases = tuning.cases_of(steps)
    assert [(case.facts, case.layers) for case in cases] == [(one, "conv1, conv3"), (other, "conv2")]


def test_the_search_follows_what_is_faster_and_leaves_the_rest() -> None:
    step = Step("conv1", {"pixels": 9})
    found = tuning.search(tuning.Case("conv_pool", step.facts, [step]), timer=clock(step, bowl))
    assert found.tile == {"rows": 4, "depth": 32} and found.finished
    assert found.first_seconds == pytest.approx(4e-6) and found.seconds == pytest.approx(1e-6)
    assert {"rows": 8, "depth": 64} not in step.ran and found.tried < len(GRID)


def test_a_thorough_search_tries_all() -> None:
    step = Step("conv1", {"pixels": 9})
    # Where no path of faster tiles leads.
    far = {"rows": 8, "depth": 64}
    timer = clock(step, lambda tile: 1e-6 if tile == far else 2e-6)
    case = tuning.Case("conv_pool", step.facts, [step])
    assert tuning.search(case, timer=timer).tile == FIRST
    found = tuning.search(case, timer=timer, thorough=True)
    assert found.tile == far and found.tried == len(GRID)


def test_wrong_and_broken_tiles_do_not_count() -> None:
    step = Step("conv1", {"pixels": 9})
    step.wrong, step.broken = {"rows": 4, "depth": 32}, {"rows": 2, "depth": 32}
    found = tuning.search(tuning.Case("conv_pool", step.facts, [step]), timer=clock(step, bowl), thorough=True)
    assert found.tile not in (step.wrong, step.broken) and found.seconds == pytest.approx(2e-6)
    reasons = [reason for _, reason in found.refused]
    assert [tile for tile, _ in found.refused] == [step.broken, step.wrong]
    assert reasons == ["RuntimeError: out of resource: shared memory", "_WrongResult: conv1 is off by nan"]


def test_a_device_that_no_longer_works_ends_the_search() -> None:
    step = Step("conv1", {"pixels": 9})
    step.broken = {"rows": 2, "depth": 16}

    def timer(run: Callable[[], object]) -> float:
        run()
        return 1e-6

    whole = step.run

    def run() -> None:
        if step.broken in step.ran:
            raise RuntimeError("illegal memory access")
        whole()

    step.run = run  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"After a tile of conv_pool that failed .*shared memory.*illegal"):
        tuning.search(tuning.Case("conv_pool", step.facts, [step]), timer=timer, thorough=True)


def test_a_search_ends_in_time() -> None:
    step = Step("conv1", {"pixels": 9})
    found = tuning.search(tuning.Case("conv_pool", step.facts, [step]), timer=clock(step, bowl), seconds=-1.0)
    assert not found.finished and found.tried == 1 and found.tile == FIRST


def tune(step: Step, **options: Any) -> list[tuning.Tuned]:
    return tuning.tune([("S", lambda: [step])], device_name="a GPU", timer=clock(step, bowl), **options)


def test_rules_hold_for_exactly_what_was_timed_and_stand_beside_others(table: Path) -> None:
    other = {"when": {"pixels": 7}, "tile": {"rows": 8, "depth": 16}, "note": "mine"}
    table.parent.mkdir()
    table.write_text(json.dumps({"conv_pool": [other], "feature_distance": []}))
    step = Step("conv1", {"pixels": 9, "dtype": "float16"})
    lines: list[str] = []
    tune(step, tell=lines.append)
    rules = json.loads(table.read_text())
    assert rules["conv_pool"][0] == other and rules["feature_distance"] == []
    mine = rules["conv_pool"][1]
    assert (mine["when"], mine["tile"], mine["finished"]) == (step.facts, {"rows": 4, "depth": 32}, True)
    assert lines[0].startswith("S, 1 of 1, conv_pool (conv1): 1.0 us, 4.00 times as fast as before, of ")
    # It counts at once, for these facts alone.
    assert tiles.choose("conv_pool", step.facts) == {"rows": 4, "depth": 32}
    assert tiles.choose("conv_pool", step.facts | {"pixels": 10}) == FIRST
    assert tiles.choose("conv_pool", {"pixels": 7, "dtype": "float16"}) == {"rows": 8, "depth": 16}


def test_what_is_known_is_not_tried_again_unless_asked_for(table: Path) -> None:
    step = Step("conv1", {"pixels": 9})
    assert len(tune(step)) == 1
    lines: list[str] = []
    assert tune(step, tell=lines.append) == [] and lines == ["S, 1 of 1, conv_pool (conv1): known"]
    assert len(tune(step, again=True)) == 1
    # Another GPU, or other versions, make other rules.
    assert len(tuning.tune([("S", lambda: [step])], device_name="another", timer=clock(step, bowl))) == 1
    assert len(json.loads(table.read_text())["conv_pool"]) == 1


def test_an_interrupted_search_keeps_the_best_so_far_and_is_gone_on_with(table: Path) -> None:
    step = Step("conv1", {"pixels": 9})
    inner = clock(step, bowl)

    def timer(run: Callable[[], object]) -> float:
        if step.ran[-1] == {"rows": 4, "depth": 32}:
            raise KeyboardInterrupt
        return inner(run)

    with pytest.raises(KeyboardInterrupt):
        tuning.tune([("S", lambda: [step])], device_name="a GPU", timer=timer)
    rule = json.loads(table.read_text())["conv_pool"][0]
    assert rule["finished"] is False and bowl(rule["tile"]) < bowl(FIRST)
    assert tune(step)[0].tile == {"rows": 4, "depth": 32}
    assert not list(table.parent.glob(".*")), "a partial file was left"


def test_kernels_without_a_choice_are_passed_over(table: Path) -> None:
    assert tune(Step("conv1", {}, kernel="quiet")) == [] and not table.exists()


def test_a_table_that_is_none_and_no_table_are_refused(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.parent.mkdir()
    table.write_text("[1")
    tiles.rules.cache_clear()
    with pytest.raises(InputError, match="is no table of tiles"):
        tune(Step("conv1", {"pixels": 9}))
    monkeypatch.setenv(tiles.TABLE_VARIABLE, "")
    with pytest.raises(InputError, match="is empty, so that there is no table to write"):
        tune(Step("conv1", {"pixels": 9}))


def test_nan_marks_what_is_not_written_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        out = torch.zeros(2, 3, dtype=dtype)
        step = SimpleNamespace(layer="conv1", out=out, run=lambda: None)
        (result,) = tuning._results(tuning.Case("conv_pool", {}, [step]))
        assert isinstance(result, Tensor) and bool(result.isnan().all())


def test_tiles_are_forced_for_the_facts_that_are_meant() -> None:
    with tiles.forced("conv_pool", {"pixels": 9}, {"rows": 2}):
        assert tiles.choose("conv_pool", {"pixels": 9}) == {"rows": 2}
        assert tiles.choose("conv_pool", {"pixels": 8}) == FIRST
    assert tiles.choose("conv_pool", {"pixels": 9}) == FIRST
