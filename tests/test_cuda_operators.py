"""The CUDA C++ kernels in the emulator: every case of the catalogue, and what is special to how these kernels work."""

from __future__ import annotations

import math
from collections.abc import Callable

import emulated
import pytest
import simt_build
import torch
from assertions import assert_close
from cases import anomaly_map as anomaly_map_cases
from cases import autoencoder as autoencoder_cases
from cases import preprocess as preprocess_cases
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operator_cases import Case, cases, cases_module, numbers
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast.ops import anomaly_map as anomaly_map_operator
from efficientad_fast.ops import quantile as quantile_operator
from efficientad_fast.reference.preprocess import preprocess as preprocess_reference
from efficientad_fast.reference.quantile import quantile as by_sorting

OPERATORS = tuple(dict.fromkeys(name.partition(".")[0] for name in emulated.FUNCTIONS))
DTYPES = anomaly_map_cases.DTYPES

# Tiles are 128 pixels wide and 8 to 128 high; rows of a thread: 1 for few images, 16 for many.
MORE_MAPS = [
    *(
        anomaly_map_cases.case(
            f"{first}, {second}, mixed".replace("torch.", ""), (1, 3, 5), (9, 12), border=1, dtypes=(first, second)
        )
        for first in DTYPES
        for second in DTYPES
        if first != second
    ),
    *(
        anomaly_map_cases.case(f"{height} x {width}", (1, 6, 5), (height, width), border=2, convention=convention)
        for height, width, convention in [
            (7, 127, "native"),
            (8, 128, "resized"),
            (9, 129, "native"),
            (1, 131, "resized"),
            (17, 1, "native"),
        ]
    ),
    anomaly_map_cases.case("many images, many rows a thread", (150, 3, 2), (133, 5), border=1),
    anomaly_map_cases.case("more images than threads reset scores", (131, 2, 2), (3, 4)),
    anomaly_map_cases.case("smaller by 100", (2, 300, 201), (3, 2), convention="native", border=4),
    anomaly_map_cases.case("border wider than the map", (1, 1, 2), (30, 40), border=17, convention="native"),
    anomaly_map_cases.case("float64 in scalars", (2, 5, 7), (11, 13), dtypes=(torch.float64, torch.float64)),
    anomaly_map_cases.case(
        "float64, negative",
        (2, 5, 7),
        (11, 13),
        quantiles=None,
        dtypes=(torch.float64, torch.float64),
        change=lambda map_st: map_st - 50,
    ),
]

# Source rows are not staged where they and the weights of a tile are too much for shared memory.
MORE_IMAGES = [
    preprocess_cases.case(name, shape, size, resize=resize, source=source, channels_last=channels_last)
    for resize in ("antialias", "pillow")
    for source in (torch.uint8, torch.float32)
    for name, shape, size, channels_last in [
        ("a tile less one", (1, 31, 61), (7, 31), False),
        ("a tile", (1, 32, 64), (8, 32), True),
        ("a tile and one", (2, 33, 65), (9, 33), True),
        ("rows in several rounds", (1, 190, 340), (9, 17), False),
        ("unstaged", (1, 70, 2100), (3, 17), True),
        ("unstaged, rows in several rounds", (1, 70, 1500), (1, 2), False),
        ("larger", (1, 11, 13), (20, 70), True),
    ]
]
MORE_IMAGES += [
    preprocess_cases.case(f"unstaged, {name}", (2, 3, 1200), (2, 1), resize=resize, change=change)
    for resize in ("antialias", "pillow")
    for name, change in [("planes first", preprocess_cases.planes_first), ("window", preprocess_cases.window)]
]


# Vectors and numbers one by one; windows of more channels than there is room for; every tile.
MORE_AUTOENCODERS = [
    autoencoder_cases.mixed(
        "as many channels as EfficientAD has, but where there are many pixels",
        1,
        (256, 288),
        (104, 104),
        torch.float16,
        (32, 32, 64, 64, 64, 64, 64, 64, 64, 16, 16, 40, 64),
    ),
    autoencoder_cases.mixed(
        "more than 64 channels",
        2,
        (256, 321),
        (17, 23),
        torch.bfloat16,
        (3, 2, 8, 24, 72, 130, 66, 64, 40, 8, 16, 48, 64),
        out_dtype=torch.float8_e4m3fn,
    ),
]


def inner(raw: Tensor) -> Tensor:
    return raw[:, :, 1:-1, 1:]


def every(found: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=repr(case)) for case in found])


CASES = [case for operator in OPERATORS for case in cases(operator) if case.overload in emulated.FUNCTIONS]


@every([*CASES, *MORE_MAPS, *MORE_IMAGES, *MORE_AUTOENCODERS])
def test_results(case: Case) -> None:
    case.check(case.run(emulated.FUNCTIONS[case.overload]))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_blocks_and_threads_does_not_matter(dtype: torch.dtype, order: int) -> None:
    """A GPU runs them as it likes; scores are raised by several blocks."""
    maps = [numbers((2, 1, 40, 30), seed=seed, dtype=dtype) - 1 for seed in range(2)]
    image = numbers((1, 60, 150, 3))
    expected = (*emulated.anomaly_map(*maps, [80, 130]), emulated.preprocess(image, [17, 70]))
    with emulated.shuffled(order):
        actual = (*emulated.anomaly_map(*maps, [80, 130]), emulated.preprocess(image, [17, 70]))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, EXACT)


def test_shared_variables_are_guarded() -> None:
    assert emulated.unguarded_shared_variables() == []


SECONDS_EACH = ("autoencoder",)
"""Operators of which a case takes so long that few are drawn."""


@pytest.mark.parametrize("operator", [one for one in OPERATORS if one not in SECONDS_EACH])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_shapes(operator: str, data: st.DataObject) -> None:
    case = data.draw(cases_module(operator).strategy())
    case.check(case.run(emulated.FUNCTIONS[case.overload]))


@pytest.mark.parametrize("operator", SECONDS_EACH)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_few_drawn_shapes(operator: str, data: st.DataObject) -> None:
    drawn = cases_module(operator).strategy().filter(lambda case: case.overload in emulated.FUNCTIONS)
    case = data.draw(drawn)
    case.check(case.run(emulated.FUNCTIONS[case.overload]))


@every([case for case in [*cases("preprocess"), *MORE_IMAGES] if "pillow" in case.name])
def test_pillow_is_exact(case: Case) -> None:
    """Bit for bit the reference in the result's dtype: it normalises the same 8-bit values in the same float32."""
    (actual,) = case.run(emulated.FUNCTIONS[case.overload])
    args, kwargs = case.arguments()
    options = {name: kwargs[name] for name in ("mean", "std") if name in kwargs}
    for image, result in zip(args[0].movedim(3, 1), actual, strict=True):
        expected = preprocess_reference(image, tuple(actual.shape[2:]), resize="pillow", dtype=actual.dtype, **options)
        assert_close(result, expected, EXACT, repr(case))


def test_pillow_rounds_floats_to_even_levels() -> None:
    """At the middle between two levels and the numbers next to it; beyond the range; NaN is the lowest level."""
    middles = ((torch.arange(255, dtype=torch.float64) + 0.5) / 255).float()
    infinity = torch.tensor(math.inf)
    special = torch.tensor([-1.0, -0.0, 0.0, 1.0, 1.002, 2.0, math.inf, -math.inf])
    values = torch.cat([middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity), special])
    image = values.repeat(3).reshape(1, 1, -1, 3)
    plain = {"resize": "pillow", "mean": [0.0] * 3, "std": [1.0] * 3}
    actual = emulated.preprocess(image, list(image.shape[1:3]), **plain)
    expected = torch.stack([preprocess_reference(one, image.shape[1:3], **plain) for one in image.movedim(3, 1)])
    assert_close(actual, expected, EXACT)
    assert emulated.preprocess(torch.full_like(image, math.nan), [1, 2], **plain).eq(0).all()


@pytest.mark.parametrize("size", [(6, 5), (3, 5), (12, 10), (2, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_special_values_of_an_image_stay_where_the_reference_has_them(size: tuple[int, int], value: float) -> None:
    image = numbers((2, 6, 5, 3))
    image[1, 3, 1, 2] = value
    actual = emulated.preprocess(image, list(size))
    assert torch.isfinite(actual[0]).all()
    assert torch.isfinite(actual[1, :2]).all()
    expected = preprocess_reference(image[1].movedim(2, 0), size)
    assert torch.isfinite(actual[1]).equal(torch.isfinite(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "value, score", [(math.nan, math.nan), (-math.nan, math.nan), (math.inf, math.inf), (-math.inf, None)]
)
@pytest.mark.parametrize("place", [(0, 0), (40, 129), (39, 130), (17, 3)])
def test_score_with_special_values(
    place: tuple[int, int], value: float, score: float | None, dtype: torch.dtype
) -> None:
    """Wherever it lies, in the first block of an image or the last, also where all else is negative."""
    map_st = numbers((3, 1, 41, 131), dtype=dtype) - 2
    map_st[1, 0, place[0], place[1]] = value
    anomaly_map, scores = emulated.anomaly_map(map_st, map_st.clone(), [41, 131])
    assert_close(anomaly_map, map_st, EXACT)
    expected = torch.stack([image.max() for image in map_st])
    if score is not None:
        assert_close(expected[1], score, EXACT)
    assert_close(scores, expected, EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_of_one_infinity(dtype: torch.dtype) -> None:
    lowest = torch.full((2, 1, 5, 6), -math.inf, dtype=dtype)
    _, score = emulated.anomaly_map(lowest, lowest.clone(), [5, 6])
    assert score.eq(-math.inf).all()


@pytest.mark.parametrize("change", [anomaly_map_cases.turned, anomaly_map_cases.every_other, inner])
def test_maps_of_any_strides_in_both_arguments(change: Callable[[Tensor], Tensor]) -> None:
    map_st, map_ae = (change(numbers((2, 1, 9, 12), seed=seed)) for seed in range(2))
    quantiles = list(anomaly_map_cases.QUANTILES)
    actual = emulated.anomaly_map(map_st, map_ae, [20, 24], quantiles, border=4)
    expected = emulated.anomaly_map(map_st.contiguous(), map_ae.contiguous(), [20, 24], quantiles, border=4)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, EXACT)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_results_at_any_alignment(first: int) -> None:
    """Given outputs and sources need not start where a vector does."""
    map_st, map_ae = (numbers((1, 1, 4, 5), seed=seed) for seed in range(2))
    expected, _ = emulated.anomaly_map(map_st, map_ae, [8, 12])
    out, score = torch.empty(8 * 12 + first)[first:].view(1, 1, 8, 12), torch.empty(1)
    emulated.anomaly_map_out(map_st, map_ae, anomaly_map=out, score=score)
    assert_close(out, expected, EXACT)
    assert_close(score, expected.max().reshape(1), EXACT)

    flat = (256 * numbers((9 * 40 * 3 + first,))).to(torch.uint8)
    image = flat[first:].view(1, 9, 40, 3)
    out = torch.empty(3 * 5 * 33 + first)[first:].view(1, 3, 5, 33)
    emulated.preprocess_out(image, out=out)
    assert_close(out, emulated.preprocess(image.clone(), [5, 33]), EXACT)

    maps = [numbers((100 + first,), seed=seed)[first:].view(1, 1, 10, 10) for seed in range(2)]
    for one, other in zip(emulated.anomaly_map_drop_in(*maps), (sum(maps) / 2, *maps), strict=True):
        assert_close(one, other, EXACT)


def test_quantiles_of_the_drop_in_may_have_strides() -> None:
    maps = [numbers((1, 1, 3, 7), seed=seed) for seed in range(2)]
    pairs = torch.tensor([[0.1, 0.2], [0.7, 0.9]])
    actual = emulated.anomaly_map_drop_in(*maps, pairs[:, 0], pairs[:, 1])
    expected = emulated.anomaly_map_drop_in(*maps, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, EXACT)


def test_quantiles_of_the_drop_in_are_subtracted_in_float64() -> None:
    """Two that are one number in float32 do not divide by zero."""
    maps = [numbers((1, 1, 3, 7), seed=seed) for seed in range(2)]
    near = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64)
    expected = anomaly_map_operator.reference_drop_in(*maps, near, near)
    for one, other in zip(emulated.anomaly_map_drop_in(*maps, near, near), expected, strict=True):
        assert_close(one, other, tolerance("anomaly_map", torch.float32))


@pytest.mark.parametrize("order", [1, 2])
def test_quantiles_in_another_order_of_blocks_and_threads(order: int) -> None:
    kernels = simt_build.load("operators", simt_build.SIMT / "operators.cpp")
    kernels.configure(order=order, threads=2)
    try:
        for case in cases("quantile"):
            if "several blocks" in case.name or "many" in case.name:
                case.check(case.run(emulated.FUNCTIONS[case.overload]))
    finally:
        kernels.configure()


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_quantiles_of_values_at_any_alignment(first: int) -> None:
    values = numbers((50 + first,))[first:]
    assert_close(emulated.quantile(values, [0.0, 0.3, 1.0]), by_sorting(values, [0.0, 0.3, 1.0]), EXACT)
    counts, expected = (torch.zeros(quantile_operator.BUCKETS, dtype=torch.int64) for _ in range(2))
    emulated.quantile_count(values, [], counts=counts)
    quantile_operator.reference_count(values, [], counts=expected)
    assert_close(counts, expected, EXACT)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_autoencoder_at_any_alignment(first: int) -> None:
    """Vectors are read and written where that can be; what a layer computes does not depend on it."""
    case = autoencoder_cases.mixed("", 1, (256, 256), (9, 7), torch.float16, (4, 2, 3, 8, 16, 8, 16, 8, 16, 3, 2, 8, 8))
    (expected,) = case.run(emulated.autoencoder_mixed)
    (image, weights, biases), written = case.arguments()

    def moved(given: Tensor) -> Tensor:
        place = torch.empty(given.numel() + first, dtype=given.dtype)[first:]
        return place.as_strided(given.shape, given.stride()).copy_(given)

    written = {name: moved(one) for name, one in written.items()}
    emulated.autoencoder_mixed(moved(image), [moved(one) for one in weights], biases, **written)
    assert_close(written["out"], expected, EXACT)


@pytest.mark.parametrize("order", [1, 2])
def test_autoencoder_in_another_order_of_blocks_and_threads(order: int) -> None:
    case = autoencoder_cases.mixed("", 2, (256, 256), (9, 7), torch.float16, autoencoder_cases.ENOUGH)
    (expected,) = case.run(emulated.autoencoder_mixed)
    with emulated.shuffled(order):
        (actual,) = case.run(emulated.autoencoder_mixed)
    assert_close(actual, expected, EXACT)
