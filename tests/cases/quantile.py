"""What ``quantile`` is tested with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal, numbers
from torch import Tensor

from efficientad_fast.ops.quantile import BUCKETS, WORKSPACE
from efficientad_fast.reference.quantile import quantile as by_sorting

FRACTIONS = (0.9, 0.995)

Change = Callable[[Tensor], Tensor]


def signed(shape: tuple[int, ...]) -> Tensor:
    return 4 * numbers(shape) - 1


def case(
    name: str,
    shape: tuple[int, ...],
    fractions: Sequence[float] = FRACTIONS,
    *,
    change: Change = lambda values: values,
    into: bool = False,
) -> Case:
    """Values in [-1, 3), which ``change`` replaces or turns."""

    def make() -> Arguments:
        arguments = (change(signed(shape)), list(fractions))
        if not into:
            return arguments, {}
        out = torch.full((len(fractions),), math.nan)
        # What a workspace holds before means nothing.
        return arguments, {"out": out, "workspace": torch.full((WORKSPACE,), -7, dtype=torch.int64)}

    return Case(name, "quantile.out" if into else "quantile", make)


def count_case(
    name: str,
    shape: tuple[int, ...],
    prefixes: Sequence[int] = (),
    *,
    change: Change = lambda values: values,
    counted: int = 0,
) -> Case:
    """``counted``: what the histograms hold before."""

    def make() -> Arguments:
        counts = torch.full((len(prefixes), BUCKETS) if prefixes else (BUCKETS,), counted, dtype=torch.int64)
        return (change(signed(shape)), list(prefixes)), {"counts": counts}

    return Case(name, "quantile.count", make)


def with_values(special: Sequence[float], values: Tensor) -> Tensor:
    """The last of the elements are these."""
    values.view(-1)[-len(special) :] = torch.tensor(special)
    return values


def every_other(values: Tensor) -> Tensor:
    return torch.stack([values, torch.full_like(values, 99.0)], -1)[..., 0]


def rounded(values: Tensor) -> Tensor:
    """Most of them equal to others."""
    return (2 * values).round()


def of_all_sizes(values: Tensor) -> Tensor:
    """Every exponent, both signs, numbers below the normal ones among them."""
    bits = (values.double().frac().abs() * 2**32).to(torch.int64)
    return torch.nan_to_num(bits.to(torch.int32).view(torch.float32), nan=0.0, posinf=1e38, neginf=-1e38)


NAN, NEGATIVE_NAN = (functools.partial(with_values, [one]) for one in (math.nan, -math.nan))
INFINITIES = functools.partial(with_values, [math.inf, -math.inf, math.inf])
ZEROS = functools.partial(with_values, [0.0, -0.0, -0.0, 0.0, 1e-45, -1e-45])
ONE, MINUS_TWO = 0x3F80 | 0x8000, 0xFFFF ^ 0xC000

CASES = [
    case("as calibration makes it", (56, 56)),
    case("one number", (1,), (0.0, 0.3, 1.0)),
    case("no axes", (), (0.7,)),
    case("two numbers", (2,), (0.0, 0.25, 0.5, 0.75, 1.0)),
    case("many fractions, in any order", (3, 7, 11), (0.995, 0.0, 0.5, 1.0, 0.3333, 0.5, 0.001)),
    case("no fractions", (5,), ()),
    case("every rank of a prime number", (13,), [rank / 12 for rank in range(13)]),
    case("off by one from vectors", (4097,), (0.1, 0.9)),
    case("several blocks", (9001,), (0.0, 1.0)),
    case("all equal", (70, 60), change=torch.ones_like),
    case("few different", (50, 41), (0.2, 0.7), change=rounded),
    case("of all sizes", (2003,), (0.0, 0.4, 0.77), change=of_all_sizes),
    case("around zero", (6,), (0.2, 0.45, 0.6), change=ZEROS),
    case("negative", (37,), change=lambda values: values - 5),
    case("turned", (5, 7), change=lambda values: values.T),
    case("every other", (5, 7), change=every_other),
    case("NaN", (4, 5), change=NAN),
    case("negative NaN", (4, 5), change=NEGATIVE_NAN),
    case("infinities", (9,), (0.0, 0.06, 0.125, 0.5, 0.8, 0.875, 1.0), change=INFINITIES),
    case("infinities alone", (3,), (0.0, 0.25, 0.5, 0.6), change=INFINITIES),
    case("into", (56, 56), into=True),
    case("into, all equal", (9,), (0.5,), into=True, change=torch.ones_like),
    case("into, five fractions", (700,), (0.9, 0.1, 0.5, 1.0, 0.0), into=True),
    case("into, NaN", (700,), (0.9, 0.1, 0.5), into=True, change=NAN),
    case("into, turned", (20, 30), into=True, change=lambda values: values.T),
    count_case("upper bits", (57, 43)),
    count_case("upper bits of all sizes", (2003,), change=of_all_sizes),
    count_case("upper bits, added", (5, 3), counted=3),
    count_case("upper bits of nothing", (0, 3), counted=3),
    count_case("NaN", (8,), change=functools.partial(with_values, [math.nan, -math.nan, math.inf, -math.inf, -0.0])),
    count_case("lower bits", (57, 43), (ONE, MINUS_TWO, 0)),
    count_case("lower bits, added", (57, 43), (ONE,), counted=1 << 40),
    count_case("lower bits of equal ones", (70, 60), (ONE, 0xFFFF), change=torch.ones_like),
    count_case("lower bits for many", (301,), tuple(range(ONE - 20, ONE + 20))),
    count_case("lower bits of nothing", (0,), (ONE,)),
    count_case("lower bits, turned", (7, 9), (ONE, ONE - 1), change=lambda values: values.T),
]


@st.composite
def strategy(draw: Any) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=2)))
    change = draw(st.sampled_from((rounded, of_all_sizes, every_other)))
    name = f"drawn, {shape}, {change.__name__}"
    if draw(st.integers(0, 2)) == 0:
        prefixes = draw(st.lists(st.integers(ONE - 300, ONE + 300), max_size=5, unique=True))
        return count_case(f"{name}, {prefixes}", shape, prefixes, change=change)
    fractions = draw(st.lists(st.floats(0, 1), max_size=5))
    return case(f"{name}, {fractions}", shape, fractions, change=change, into=draw(st.booleans()))


def expected(
    case: Case,
    values: Tensor,
    given: Sequence[Any],
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if counts is not None:
        return (counts + torch.from_numpy(_counted(values.numpy().ravel(), given)).view(counts.shape),)
    if torch.isinf(values).any():
        # NumPy makes NaN of infinities that a quantile does not reach.
        return (by_sorting(values, given),)
    exact = np.quantile(values.double().numpy(), given) if len(given) else np.empty(0)
    return (torch.from_numpy(exact.astype(np.float32)),)


def _counted(values: np.ndarray, prefixes: Sequence[int]) -> np.ndarray:
    bits = values.view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys[np.isnan(values)] = 0xFFFFFFFF
    upper, lower = keys >> 16, keys & 0xFFFF
    rows = [lower[upper == prefix] for prefix in prefixes] if prefixes else [upper]
    return np.stack([np.bincount(row, minlength=BUCKETS) for row in rows])


def refusal(name: str, message: str, overload: str = "quantile", **changes: Any) -> Refusal:
    def make() -> Arguments:
        arguments: dict[str, Any] = {"values": torch.zeros(5, 3)}
        if overload == "quantile.count":
            return (), arguments | {"prefixes": [], "counts": torch.zeros(BUCKETS, dtype=torch.int64)} | changes
        arguments["fractions"] = list(FRACTIONS)
        if overload == "quantile.out":
            arguments |= {"out": torch.zeros(2), "workspace": torch.zeros(WORKSPACE, dtype=torch.int64)}
        return (), arguments | changes

    return Refusal(name, overload, make, f"quantile: {message}")


REFUSALS = [
    refusal("nothing", r"values must be at least one number, got shape \(0, 3\)", values=torch.zeros(0, 3)),
    refusal("float64", "values must be float32, got torch.float64", values=torch.zeros(3, dtype=torch.float64)),
    refusal("below 0", r"fractions must be numbers in \[0, 1\], got \[0.5, -0.25\]", fractions=[0.5, -0.25]),
    refusal("above 1", r"fractions must be numbers in \[0, 1\], got \[1.5\]", fractions=[1.5]),
    refusal("NaN as fraction", r"fractions must be numbers in \[0, 1\], got \[nan\]", fractions=[math.nan]),
    refusal("output of three", r"out must be \(2,\), got \(3,\)", "quantile.out", out=torch.zeros(3)),
    refusal(
        "output in half",
        "out must be torch.float32, got torch.float16",
        "quantile.out",
        out=torch.zeros(2, dtype=torch.float16),
    ),
    refusal("output with gaps", "out must be contiguous, got strides", "quantile.out", out=torch.zeros(4)[::2]),
    refusal("output elsewhere", "out must be on .*got meta|another", "quantile.out", out=torch.zeros(2, device="meta")),
    refusal(
        "small workspace",
        rf"workspace must be \({WORKSPACE},\), got \(9,\)",
        "quantile.out",
        workspace=torch.zeros(9, dtype=torch.int64),
    ),
    refusal(
        "workspace of floats",
        "workspace must be torch.int64, got torch.float32",
        "quantile.out",
        workspace=torch.zeros(WORKSPACE),
    ),
    refusal(
        "counted float16",
        "values must be float32, got torch.float16",
        "quantile.count",
        values=torch.zeros(3, dtype=torch.float16),
    ),
    refusal(
        "prefix of 17 bits",
        r"prefixes must be different numbers in \[0, 65535\], got \[65536\]",
        "quantile.count",
        prefixes=[65536],
    ),
    refusal("equal prefixes", r"prefixes must be different .*got \[7, 7\]", "quantile.count", prefixes=[7, 7]),
    refusal("counts for one", r"counts must be \(1, 65536\), got \(65536,\)", "quantile.count", prefixes=[7]),
    refusal(
        "counts in int32",
        "counts must be torch.int64, got torch.int32",
        "quantile.count",
        counts=torch.zeros(BUCKETS, dtype=torch.int32),
    ),
]
