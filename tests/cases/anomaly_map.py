"""What ``anomaly_map`` is tested with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal, numbers
from torch import Tensor

from efficientad_fast.ops import anomaly_map

QUANTILES = (0.31, 1.1, 0.07, 0.9)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def case(
    name: str,
    shape: tuple[int, int, int],
    size: tuple[int, int],
    *,
    border: int = 0,
    convention: str = "resized",
    quantiles: Sequence[float] | None = QUANTILES,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    change: Callable[[Tensor], Tensor] = lambda map_st: map_st,
    into: bool = False,
    spread: int = 1,
) -> Case:
    """``shape``: (N, h, w) of the maps. ``change`` is applied to map_st."""
    images, height, width = shape

    def make() -> Arguments:
        map_st, map_ae = (
            4 * numbers((images, 1, height, width), seed=seed, dtype=dtype) for seed, dtype in enumerate(dtypes)
        )
        options = {"border": border, "convention": convention}
        given = None if quantiles is None else list(quantiles)
        if not into:
            return (change(map_st), map_ae, list(size), given), options
        dtype = anomaly_map.result_dtype(map_st, map_ae)
        outputs = {"anomaly_map": torch.full((images, 1, *size), math.nan, dtype=dtype)}
        outputs["score"] = torch.full((images,), math.nan, dtype=dtype)
        return (change(map_st), map_ae, given), options | outputs

    return Case(name, "anomaly_map.out" if into else "anomaly_map", make, spread)


def drop_in_case(
    name: str,
    shape: tuple[int, int, int],
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    quantiles: tuple[Sequence[float] | None, Sequence[float] | None] = (QUANTILES[:2], QUANTILES[2:]),
    quantile_dtype: torch.dtype = torch.float32,
    change: Callable[[Tensor], Tensor] = lambda map_st: map_st,
) -> Case:
    images, height, width = shape

    def make() -> Arguments:
        map_st, map_ae = (
            4 * numbers((images, 1, height, width), seed=seed, dtype=dtype) for seed, dtype in enumerate(dtypes)
        )
        pairs = (None if pair is None else torch.tensor(pair, dtype=quantile_dtype) for pair in quantiles)
        return (change(map_st), map_ae, *pairs), {}

    return Case(name, "anomaly_map.drop_in", make)


def with_value(value: float, map_st: Tensor) -> Tensor:
    """In the second image, where there is one."""
    map_st[-1, 0, map_st.shape[2] // 2, map_st.shape[3] // 3] = value
    return map_st


def turned(map_st: Tensor) -> Tensor:
    """The same numbers in column-major order."""
    return map_st.transpose(2, 3).contiguous().transpose(2, 3)


def every_other(map_st: Tensor) -> Tensor:
    wide = torch.zeros((*map_st.shape[:3], 2 * map_st.shape[3]), dtype=map_st.dtype)
    wide[..., ::2] = map_st
    return wide[..., ::2]


NAN, INF = functools.partial(with_value, math.nan), functools.partial(with_value, math.inf)

CASES = [
    case("as 256 x 256 makes it", (1, 56, 56), (256, 256), border=4),
    case("native, as 256 x 256 makes it", (1, 56, 56), (64, 64), border=4, convention="native"),
    case("native, original size", (2, 19, 23), (111, 70), border=4, convention="native"),
    case("no quantiles", (2, 9, 7), (31, 37), quantiles=None, border=4),
    case("padded networks", (3, 16, 12), (64, 48)),
    case("one pixel", (1, 1, 1), (1, 1)),
    case("one pixel, enlarged", (1, 1, 1), (5, 3)),
    case("border far wider than the map", (1, 2, 3), (9, 11), border=1000),
    case("one pixel with border", (1, 1, 1), (5, 6), border=4),
    case("a row", (1, 1, 13), (7, 29), border=1),
    case("a column", (2, 13, 1), (29, 3), convention="native", border=1),
    case("same size", (2, 17, 11), (17, 11)),
    case("same size with border", (1, 9, 9), (17, 17), border=4),
    case("smaller", (2, 33, 31), (7, 5)),
    case("off by one from blocks", (2, 15, 31), (63, 257)),
    case("much wider than high", (1, 3, 127), (5, 509)),
    case("empty", (0, 5, 5), (8, 8), border=4),
    case("turned", (2, 6, 9), (24, 36), change=turned, border=4),
    case("every other", (2, 6, 9), (24, 36), change=every_other),
    case("NaN", (2, 9, 9), (36, 36), change=NAN, border=4),
    case("inf", (2, 9, 9), (9, 9), change=INF),
    case("inf, resized", (2, 9, 9), (36, 36), change=INF, border=4, spread=9),
    case("negative", (2, 5, 5), (8, 8), change=lambda map_st: map_st - 9, quantiles=None),
    *(
        case(f"{first}, {second}".replace("torch.", ""), (2, 7, 10), (28, 40), border=4, dtypes=(first, second))
        for first in DTYPES
        for second in DTYPES
        if first == second or torch.float16 in (first, second)
    ),
    case("into", (1, 56, 56), (256, 256), border=4, into=True),
    case("into, native, half", (3, 7, 5), (29, 19), convention="native", dtypes=(torch.float16,) * 2, into=True),
    case("into, float64", (2, 7, 5), (29, 19), border=4, dtypes=(torch.float64,) * 2, into=True),
    case("into, empty", (0, 7, 5), (29, 19), into=True),
    case("into, NaN", (2, 7, 5), (29, 19), into=True, change=NAN),
    drop_in_case("float32", (1, 56, 56)),
    drop_in_case("odd size", (3, 7, 13)),
    drop_in_case("no quantiles", (2, 5, 3), quantiles=(None, None)),
    drop_in_case("one map's quantiles", (2, 5, 3), quantiles=(None, QUANTILES[2:])),
    drop_in_case("other map's quantiles", (2, 5, 3), quantiles=(QUANTILES[:2], None)),
    drop_in_case("equal quantiles", (1, 5, 3), quantiles=((0.3, 0.3), QUANTILES[2:])),
    drop_in_case("quantiles in half", (1, 5, 3), quantile_dtype=torch.float16),
    drop_in_case("quantiles in float64", (1, 5, 3), quantile_dtype=torch.float64),
    drop_in_case("empty", (0, 5, 3)),
    drop_in_case("turned", (2, 5, 3), change=turned),
    drop_in_case("NaN", (2, 5, 3), change=NAN),
    *(
        drop_in_case(f"{first}, {second}".replace("torch.", ""), (2, 7, 10), dtypes=(first, second))
        for first in DTYPES
        for second in DTYPES
        if first == second or torch.float16 in (first, second)
    ),
]


@st.composite
def strategy(draw: Any) -> Case:
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    if draw(st.booleans()):
        return drop_in_case(f"drawn, {shape}", shape)
    size = (draw(st.integers(1, 70)), draw(st.integers(1, 70)))
    border = draw(st.integers(0, 5))
    convention = draw(st.sampled_from(("resized", "native")))
    into = draw(st.booleans())
    name = f"drawn, {shape} to {size}, border {border}, {convention}"
    return case(name, shape, size, border=border, convention=convention, into=into)


def expected(
    case: Case,
    map_st: Tensor,
    map_ae: Tensor,
    *others: Any,
    anomaly_map: Tensor | None = None,
    score: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    exact = (map_st.double(), map_ae.double())
    if case.overload == "anomaly_map.drop_in":
        return _reference.reference_drop_in(*exact, *others)
    if anomaly_map is not None:
        others = (list(anomaly_map.shape[-2:]), *others)
    return _reference.reference(*exact, *others, **options)


_reference = anomaly_map


def refusal(name: str, message: str, overload: str = "anomaly_map", **changes: Any) -> Refusal:
    def make() -> Arguments:
        maps = {key: torch.zeros(2, 1, 5, 5) for key in ("map_st", "map_ae")}
        if overload == "anomaly_map.drop_in":
            pairs = {key: torch.tensor([0.0, 1.0]) for key in ("st_quantiles", "ae_quantiles")}
            return (), maps | pairs | changes
        arguments = maps | {"quantiles": list(QUANTILES), "border": 4, "convention": "resized"}
        if overload == "anomaly_map":
            return (), arguments | {"size": [8, 8]} | changes
        outputs = {"anomaly_map": torch.empty(2, 1, 8, 8), "score": torch.empty(2)}
        return (), arguments | outputs | changes

    return Refusal(name, overload, make, f"anomaly_map: {message}")


REFUSALS = [
    refusal("three dimensions", r"map_st must be \(N, 1, h, w\).*got \(2, 5, 5\)", map_st=torch.zeros(2, 5, 5)),
    refusal("two channels", r"map_st must be .*got \(2, 2, 5, 5\)", map_st=torch.zeros(2, 2, 5, 5)),
    refusal("no rows", r"map_st must be .*got \(2, 1, 0, 5\)", map_st=torch.zeros(2, 1, 0, 5)),
    refusal(
        "another shape",
        r"map_ae must be \(2, 1, 5, 5\) as map_st is, got \(2, 1, 5, 6\)",
        map_ae=torch.zeros(2, 1, 5, 6),
    ),
    refusal(
        "integers", r"map_st must be float32, .*got torch.int64", map_st=torch.zeros(2, 1, 5, 5, dtype=torch.int64)
    ),
    refusal("another device", r"map_ae must be on .*got meta", map_ae=torch.zeros(2, 1, 5, 5, device="meta")),
    refusal("size 0", r"size must be a height and a width of at least 1, got \[0, 8\]", size=[0, 8]),
    refusal("border -1", "border must be from 0 to 65536, got -1", border=-1),
    refusal("border beyond all memory", "border must be from 0 to 65536, got 9223372036854775807", border=2**63 - 1),
    refusal("convention", "convention must be 'resized' or 'native', got 'other'", convention="other"),
    refusal("three quantiles", r"quantiles must be four finite numbers .*got \[1", quantiles=[1.0, 2.0, 3.0]),
    refusal("NaN quantile", r"quantiles must be four finite numbers .*got", quantiles=[math.nan, 1.0, 2.0, 3.0]),
    refusal("equal quantiles", r"quantiles must be such that each end differs .*got", quantiles=[1.0, 1.0, 2.0, 3.0]),
    refusal(
        "output of another batch",
        r"anomaly_map must be \(2, 1, H, W\), got \(1, 1, 8, 8\)",
        "anomaly_map.out",
        anomaly_map=torch.empty(1, 1, 8, 8),
    ),
    refusal(
        "output in half",
        "anomaly_map must be torch.float32, got torch.float16",
        "anomaly_map.out",
        anomaly_map=torch.empty(2, 1, 8, 8, dtype=torch.float16),
    ),
    refusal(
        "output with gaps",
        "anomaly_map must be contiguous, got strides",
        "anomaly_map.out",
        anomaly_map=torch.empty(2, 1, 8, 16)[..., ::2],
    ),
    refusal("score of another batch", r"score must be \(2,\), got \(3,\)", "anomaly_map.out", score=torch.empty(3)),
    refusal(
        "quantile pair of three",
        r"st_quantiles must be \(2,\) of a floating dtype.*got \(3,\)",
        "anomaly_map.drop_in",
        st_quantiles=torch.zeros(3),
    ),
    refusal(
        "integer quantiles",
        r"ae_quantiles must be \(2,\) of a floating dtype.*got \(2,\) of torch.int64",
        "anomaly_map.drop_in",
        ae_quantiles=torch.zeros(2, dtype=torch.int64),
    ),
]
