"""Tiles for the GPU that is there: times those that a kernel may work in, and keeps the fastest in the user's table.

What a kernel is asked for is taken from plans: for every step the kernel states facts, by which the rules choose (see
`efficientad_fast.triton_kernels.tiles`). A rule of the user's table holds for exactly the facts that it was timed for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.files import atomic_path
from efficientad_fast.plan import MixedPlan, PlanInput, Step, build_plan, parse_device
from efficientad_fast.plan.mixed import MIXED_DTYPES
from efficientad_fast.reference.networks import FEATURE_CHANNELS, Autoencoder, ModelSize, PatchDescriptionNetwork

Tile = Mapping[str, int]

LEAST_GAIN = 0.01
"""Of the time: a tile that gains less is not better than one that was tried before."""

_MEASURED_SECONDS = 0.02
_MOST_RUNS, _FEWEST_REPLAYS = 50, 5


@dataclass(frozen=True)
class Case:
    """What a kernel is asked for.

    Attributes:
        facts: that it states.
        steps: that ask for just that; what is fastest for all of them together counts.
    """

    kernel: str
    facts: Mapping[str, Any]
    steps: Sequence[Step]

    @property
    def layers(self) -> str:
        return ", ".join(dict.fromkeys(step.layer for step in self.steps))


@dataclass
class Tuned:
    """What was found for a case.

    Attributes:
        tile: the fastest.
        seconds, first_seconds: of it, and of the tile that the rules chose before.
        tried: how many were timed.
        refused: of the others, with the reason: they do not compile, need more than a multiprocessor has, or are wrong.
        finished: whether everything was tried that should be.
    """

    case: Case
    tile: dict[str, int]
    seconds: float
    first_seconds: float
    tried: int = 1
    refused: list[tuple[dict[str, int], str]] = field(default_factory=list)
    finished: bool = False


def _module(name: str) -> Any:
    """Of the Triton kernels, which are installed from another folder, where type checkers do not look for them."""
    return importlib.import_module(f"efficientad_fast.triton_kernels.{name}")


def cases_of(steps: Sequence[Step]) -> list[Case]:
    """By kernel and facts, in the order in which they are first asked for. Runs every step once."""
    tiles = _module("tiles")
    found: dict[tuple[str, str], Case] = {}
    for step in steps:
        with tiles.stated() as stated:
            step.run()
        for kernel, facts in stated:
            key = kernel, json.dumps(facts, sort_keys=True)
            known = found.get(key, Case(kernel, facts, ()))
            if not any(step is one for one in known.steps):
                found[key] = Case(kernel, facts, (*known.steps, step))
    return list(found.values())


def candidates(case: Case) -> list[dict[str, int]]:
    """The tiles that its kernel's module offers; none where it offers no choice."""
    module, _, part = case.kernel.partition(".")
    name = f"candidates_{part}" if part else "candidates"
    offer: Callable[[Mapping[str, Any]], list[dict[str, int]]] | None = getattr(_module(module), name, None)
    return [] if offer is None else offer(case.facts)


def seconds_between_events(call: Callable[[], object]) -> float:
    """On the current CUDA stream, from when it comes to a call to when that has ended."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def device_seconds(run: Callable[[], object]) -> float:
    """Of one run on the current CUDA device, by replays of a graph that holds many."""
    run()
    torch.cuda.synchronize()
    runs = max(1, min(_MOST_RUNS, int(_MEASURED_SECONDS / _FEWEST_REPLAYS / max(seconds_between_events(run), 1e-7))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(runs):
            run()
    seconds_between_events(graph.replay)
    times: list[float] = []
    while len(times) < _FEWEST_REPLAYS or (sum(times) < _MEASURED_SECONDS and len(times) < 100):
        times.append(seconds_between_events(graph.replay))
    return statistics.median(times) / runs


def search(
    case: Case,
    *,
    timer: Callable[[Callable[[], object]], float] = device_seconds,
    thorough: bool = False,
    seconds: float = math.inf,
    keep: Callable[[Tuned], object] = lambda found: None,
) -> Tuned:
    """Times tiles, beginning with the one that the rules choose now.

    A tile counts whose results are those of the first tile to the rounding of their dtype; they are full of NaN before.

    Args:
        timer: seconds of a run.
        thorough: try all. Else those that differ from the fastest so far in one number, or in the warps and one more,
            until none of them is faster.
        seconds: no tile is begun after so many.
        keep: is given what was found so far, whenever that is better than before.

    Raises:
        BackendError: the first tile does not work, or none does any more.
    """
    tiles = _module("tiles")
    begin = time.monotonic()
    chosen = tiles.choose(case.kernel, case.facts)
    expected = _results(case)
    first = sum(timer(step.run) for step in case.steps)
    found = Tuned(case, chosen, first, first)
    waiting = [one for one in candidates(case) if one != chosen]

    def is_next(tile: Tile) -> bool:
        # More of something often needs more warps to hold it.
        others = {name for name in {*tile, *found.tile} if tile.get(name) != found.tile.get(name)}
        return len(others) == 1 or (len(others) == 2 and "warps" in others)

    alone = not any(map(is_next, waiting))
    while waiting:
        batch = waiting if thorough or alone else [one for one in waiting if is_next(one)]
        if not batch:
            break
        waiting = [one for one in waiting if one not in batch]
        for tile in batch:
            if time.monotonic() - begin > seconds:
                return found
            try:
                with tiles.forced(case.kernel, case.facts, tile):
                    _check(case, expected)
                    taken = sum(timer(step.run) for step in case.steps)
            except Exception as error:  # compilers and drivers raise what they like
                found.refused.append((tile, f"{type(error).__name__}: {error}".partition("\n")[0]))
                _require_working(case, expected, found.refused[-1][1])
                continue
            found.tried += 1
            if taken < (1 - LEAST_GAIN) * found.seconds:
                found.tile, found.seconds = tile, taken
                keep(found)
    found.finished = True
    return found


class _WrongResult(Exception):
    """Of a tile."""


def _results(case: Case) -> list[Tensor]:
    """Of every step, in float32."""
    made = []
    for step in case.steps:
        step.out.fill_(math.nan)
        step.run()
        made.append(step.out.float())
    return made


def _check(case: Case, expected: Sequence[Tensor]) -> None:
    for step, result, right in zip(case.steps, _results(case), expected, strict=True):
        # Sums in another order, and where that crosses a boundary a rounding to the other side.
        error = float((result - right).norm() / right.norm().clamp(min=1e-30))
        if not error <= max(torch.finfo(step.out.dtype).eps, 1e-4):
            raise _WrongResult(f"{step.layer} is off by {error:.1e}")


def _require_working(case: Case, expected: Sequence[Tensor], reason: str) -> None:
    """A kernel that wrote where it must not leaves the device unusable for this process."""
    try:
        _check(case, expected)
    except Exception as error:
        raise BackendError(
            f"After a tile of {case.kernel} that failed ({reason}), the one that works fails too ({error}). What was "
            "found before is kept; start again to go on."
        ) from error


def random_source(model_size: ModelSize, size: tuple[int, int], *, padding: bool = False) -> PlanInput:
    """Networks whose activations neither die nor explode: a GPU may be faster on zeros than on what it will get."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = (
            PatchDescriptionNetwork(model_size, FEATURE_CHANNELS, padding=padding),
            PatchDescriptionNetwork(model_size, 2 * FEATURE_CHANNELS, padding=padding),
            Autoencoder(FEATURE_CHANNELS, padding=padding),
        )
        for network in networks:
            for module in network.eval().requires_grad_(False).modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    return PlanInput(*networks, None, None, None, "resized", True, size)


def parse_gpu(device: str) -> torch.device:
    """A GPU of this machine.

    Raises:
        InputError: another device; BackendError: there is no GPU, or not that one.
    """
    if not device.startswith("cuda"):
        raise InputError(f"Tiles are those of a GPU's kernels: the device must be 'cuda' or 'cuda:N', got {device!r}.")
    if not torch.cuda.is_available():
        raise BackendError(
            f"Tiles are timed on a GPU, and this PyTorch ({torch.__version__}) sees none. `efficientad-fast info` says "
            "what is there and what is missing."
        )
    return parse_device(device)


def plans_of(
    source: PlanInput, batches: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> list[tuple[str, Callable[[], list[Step]]]]:
    """For :func:`tune`: titles, and what makes the steps of a plan for random images.

    Raises:
        InputError: a dtype that has no tiles. What is returned raises BackendError where the kernels do not work.
    """
    for dtype in dtypes:
        if dtype not in MIXED_DTYPES:
            raise InputError(f"Tiles are tuned in float16, bfloat16 and float8, got {dtype}.")

    def make(batch: int, dtype: torch.dtype) -> list[Step]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, *source.size, generator=generator)
        chosen = source
        if dtype == torch.float8_e4m3fn:
            # How large activations may become decides nothing about how long it takes.
            observed = MixedPlan(source, device, torch.float16).observe(images[:1])
            chosen = replace(source, activations=observed)
        plan = build_plan(chosen, device, dtype, backend="operators")
        assert isinstance(plan, MixedPlan)
        with plan.steps(images) as steps:
            return steps

    return [(f"{_name(dtype)}, batch {batch}", partial(make, batch, dtype)) for dtype in dtypes for batch in batches]


def _name(dtype: torch.dtype) -> str:
    return "float8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def tune(
    plans: Sequence[tuple[str, Callable[[], Sequence[Step]]]],
    *,
    device_name: str,
    timer: Callable[[Callable[[], object]], float] = device_seconds,
    thorough: bool = False,
    again: bool = False,
    seconds: float = math.inf,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Tuned]:
    """Tunes every case of some plans, and writes a rule for each to the user's table as soon as it is found.

    A case whose rule was made on this GPU by these versions is left as it is, so that an interrupted run goes on.

    Args:
        plans: title, and what gives the steps.
        device_name: of the GPU, noted in the rules.
        timer, thorough, seconds: as of :func:`search`.
        again: tune those too that have a rule.
        tell: is given a line for each case.

    Raises:
        InputError: the user wants no table, or theirs is none; BackendError: as of :func:`search`.
    """
    path = table_path()
    made_by = {"gpu": device_name, **_versions()}
    tuned = []
    for title, steps in plans:
        cases = cases_of(steps())
        for number, case in enumerate(cases, 1):
            line = f"{title}, {number} of {len(cases)}, {case.kernel} ({case.layers})"
            rule = rule_for(path, case)
            if not again and rule is not None and rule.get("made_by") == made_by and rule.get("finished"):
                tell(f"{line}: known")
                continue
            if not candidates(case):
                continue

            def keep(found: Tuned, path: Path = path) -> None:
                write_rule(path, found, made_by)

            found = search(case, timer=timer, thorough=thorough, seconds=seconds, keep=keep)
            keep(found)
            tuned.append(found)
            tell(
                f"{line}: {1e6 * found.seconds:.1f} us, {found.first_seconds / found.seconds:.2f} times as fast as "
                f"before, of {found.tried} tiles{'' if found.finished else ', not all'}"
            )
    return tuned


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("efficientad-fast", "torch", "triton")}


def table_path() -> Path:
    """The user's table.

    Raises:
        BackendError: there is no Triton; InputError: the user wants no table.
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendError("Tiles are those of Triton's kernels, and Triton is not installed: pip install triton.")
    tiles = _module("tiles")
    path: Path | None = tiles.user_table()
    if path is None:
        raise InputError(
            f"{tiles.TABLE_VARIABLE} is empty, so that there is no table to write. Unset it, or name a file."
        )
    return path


def rule_for(path: Path, case: Case) -> dict[str, Any] | None:
    """The user's rule for exactly these facts."""
    return next((rule for rule in _table(path).get(case.kernel, []) if rule["when"] == dict(case.facts)), None)


def write_rule(path: Path, found: Tuned, made_by: Mapping[str, str]) -> None:
    """Puts it in the place of the rule for the same facts, beside all others; the file is whole at every moment.

    It counts from now on, in this process for what is run or captured anew.
    """
    tiles = _module("tiles")
    table = _table(path)
    when = dict(found.case.facts)
    rule = {
        "when": when,
        "tile": dict(found.tile),
        "seconds": found.seconds,
        "first_seconds": found.first_seconds,
        "finished": found.finished,
        "made_by": dict(made_by),
    }
    others = [one for one in table.get(found.case.kernel, []) if one["when"] != when]
    table[found.case.kernel] = [*others, rule]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    tiles.rules.cache_clear()


def _table(path: Path) -> dict[str, Any]:
    tiles = _module("tiles")
    if not path.is_file():
        return {}
    for kernel in tiles.ops.tiles():
        tiles.rules(kernel)  # says what is wrong with a table that is none
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table
