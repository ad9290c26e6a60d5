"""The CUDA C++ kernels in the emulator: every case of the catalogue, and what is special to how these kernels work."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable

import emulated
import pytest
import simt_build
import torch
from assertions import assert_close
from cases import anomaly_map as anomaly_map_cases
from cases import autoencoder as autoencoder_cases
from cases import conv_pool as conv_pool_cases
from cases import feature_distance as feature_distance_cases
from cases import hard_feature_loss as loss_cases
from cases import preprocess as preprocess_cases
from conftest import ROOT
from convolution_cases import eighth_channels, planes_first, some_channels, window
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operator_cases import Arguments, Case, cases, cases_module, numbers
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast.ops import anomaly_map as anomaly_map_operator
from efficientad_fast.ops import hard_feature_loss as loss_operator
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

# A block takes 512 vectors, of 4 numbers where both are float32, else of 8; more where there would be over 1024 blocks.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MORE_FEATURES = [
    make(f"{shape}, {', '.join(map(str, dtypes))}".replace("torch.", ""), shape, layouts=layouts, dtypes=dtypes)
    for dtypes in [(first, second) for first in FLOATS for second in FLOATS]
    for shape, layouts in [
        ((2, 16, 5, 7), loss_cases.AS_TRAINED),
        ((1, 12, 9, 7), loss_cases.AS_TRAINED),
        ((1, 1, 41, 61), loss_cases.PLAIN),
        ((3, 8, 2, 3), (loss_cases.slice_of_channels, loss_cases.contiguous)),
    ]
    for make in (loss_cases.case, loss_cases.gradient_case)
]
MORE_FEATURES += [
    make(f"{numbers_of_all} numbers, {dtypes[0]}", (1, 1, 1, numbers_of_all), dtypes=dtypes)
    for dtypes, block in ((loss_cases.SINGLE, 2048), (loss_cases.HALF, 4096))
    for numbers_of_all in (block - 1, block, block + 1, block // 2 + 1, 3 * block + 5)
    for make in (loss_cases.case, loss_cases.gradient_case)
]
MORE_FEATURES += [
    make(f"{shape}, more than 1024 blocks", shape, layouts=layouts)
    for shape, layouts in [((1, 5, 600, 601), loss_cases.AS_TRAINED), ((1, 7, 601, 503), loss_cases.PLAIN)]
    for make in (loss_cases.case, loss_cases.gradient_case)
]

# Tiles are 64, 128 or 256 pixels, or quads of them, by 128 outputs, of which a warp has 64; pieces are 64 or 128 bytes
# deep, and three or four of them are in shared memory.
HALF, EIGHTH = torch.float16, torch.float8_e4m3fn
TILED = ("conv_pool.mixed", "feature_distance.mixed")

MORE_CONVOLUTIONS = [
    *(
        conv_pool_cases.mixed(f"{pixels} pixels, {outputs} outputs", (1, 16, 1, pixels), outputs, 1, dtype, HALF)
        for pixels, outputs, dtype in [
            (63, 63, HALF),
            (64, 64, EIGHTH),
            (65, 65, HALF),
            (127, 127, EIGHTH),
            (128, 128, HALF),
            (129, 129, EIGHTH),
            (255, 129, HALF),
            (256, 128, torch.bfloat16),
            (257, 200, HALF),
        ]
    ),
    *(
        conv_pool_cases.mixed(
            f"{quads} quads of padded images in {dtype}".replace("torch.", ""),
            (2, 32, 3, 2 * quads - 1),
            72,
            3,
            dtype,
            out,
            padding=2,
            pool=True,
            pool_padding=1,
            scale=0.5,
            relu=quads % 2 == 0,
        )
        for quads, dtype, out in [
            (3, HALF, EIGHTH),
            (7, EIGHTH, EIGHTH),
            (8, torch.bfloat16, torch.bfloat16),
            (16, EIGHTH, HALF),
            (17, torch.float32, torch.float32),
            (31, HALF, torch.float32),
        ]
    ),
    *(
        conv_pool_cases.mixed(
            f"{channels} channels, {kernel} x {kernel}, in {dtype}".replace("torch.", ""),
            (1, 2 * channels, 6, 7),
            48,
            kernel,
            dtype,
            HALF,
            groups=2,
            padding=kernel // 2,
        )
        for channels, kernel, dtype in [
            (8, 1, HALF),
            (8, 2, HALF),
            (24, 3, HALF),
            (40, 4, HALF),
            (72, 2, torch.bfloat16),
            (16, 3, EIGHTH),
            (48, 4, EIGHTH),
            (144, 1, EIGHTH),
            (144, 2, EIGHTH),
            (4, 3, torch.float32),
            (20, 2, torch.float32),
            (9, 3, HALF),
            (3, 5, EIGHTH),
            (5, 2, torch.float32),
        ]
    ),
    conv_pool_cases.mixed("the largest kernel", (1, 8, 9, 10), 17, 16, HALF, padding=15),
    conv_pool_cases.mixed("outputs that cannot be stored together", (1, 16, 5, 6), 2 * 37, 3, HALF, groups=2),
    # The stem's tiles are 4 by 16 quads by 256 outputs; each block has several.
    *(
        conv_pool_cases.mixed(
            f"stem, {height} x {width} of {channels} channels",
            (2, channels, 2 * height + 3, 2 * width + 3 + height % 2),
            outputs,
            4,
            dtype,
            out,
            pool=True,
            scale=scale,
            relu=scale > 0,
            bias=scale > 0,
        )
        for height, width, channels, outputs, dtype, out, scale in [
            (3, 15, 4, 255, HALF, HALF, 0.5),
            (4, 16, 4, 256, HALF, EIGHTH, 2.0),
            (5, 17, 4, 264, torch.bfloat16, torch.bfloat16, 0.0),
            (9, 33, 3, 40, HALF, torch.float32, 1.0),
            (1, 1, 1, 1, torch.bfloat16, HALF, 0.0),
            (4, 7, 2, 65, HALF, HALF, 0.7),
        ]
    ),
    *(
        conv_pool_cases.mixed(
            f"padded stem, {change.__name__}",
            (2, 4, 11, 34),
            33,
            4,
            HALF,
            padding=3,
            pool=True,
            pool_padding=1,
            change=change,
        )
        for change in (some_channels, eighth_channels, window, planes_first)
    ),
    # Without scales a bias is taken out of sums and of what they are at least; pixels of padding count as zeros.
    *(
        conv_pool_cases.mixed(
            f"stem, awkward biases, scale {scale}, relu {relu}, pool_padding {pool_padding}",
            (1, 4, 12, 21),
            40,
            4,
            torch.bfloat16 if relu else HALF,
            torch.float32,
            pool=True,
            pool_padding=pool_padding,
            bias=(-math.inf, math.nan, math.inf, -5e37, 5e37, -1e20, 3.0),
            scale=scale,
            relu=relu,
        )
        for scale in (0.0, 2.0)
        for relu in (False, True)
        for pool_padding in (0, 1)
    ),
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
        "so many pixels of deconv6 that its tiles are the highest",
        4,
        (256, 256),
        (17, 23),
        torch.bfloat16,
        (3, 2, 2, 2, 2, 2, 2, 2, 2, 3, 16, 40, 8),
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

# Outputs are divided among blocks by 128; the second convolution follows the first, whose last piece may not be full.
MORE_DISTANCES = [
    feature_distance_cases.mixed(
        f"{height} x {width} pixels, {outputs} outputs, {first} and {second} in {dtype}".replace("torch.", ""),
        images,
        (height, width),
        outputs,
        first,
        second,
        dtype,
        scale=scale,
        bias=scale != 2.0,
    )
    for images, height, width, outputs, first, second, dtype, scale in [
        (1, 7, 9, 127, (32, 3, 1), (16, 1, 0), HALF, 0.5),
        (1, 8, 8, 128, (8, 3, 1), (24, 4, 0), torch.bfloat16, 2.0),
        (3, 5, 13, 129, (16, 3, 1), (48, 4, 0), EIGHTH, 0.5),
        (1, 2, 127, 256, (16, 1, 0), (16, 2, 1), HALF, 0.0),
        (2, 8, 8, 257, (64, 1, 0), (192, 1, 0), EIGHTH, 1.0),
        (1, 3, 43, 300, (40, 3, 2), (40, 3, 2), HALF, 1.0),
        (2, 5, 6, 130, (12, 3, 1), (4, 2, 0), torch.float32, 0.7),
        (1, 5, 6, 140, (5, 3, 1), (16, 2, 0), HALF, 2.0),
        (1, 5, 6, 140, (32, 3, 1), None, EIGHTH, 0.7),
    ]
]


def inner(raw: Tensor) -> Tensor:
    return raw[:, :, 1:-1, 1:]


def every(found: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=repr(case)) for case in found])


CASES = [case for operator in OPERATORS for case in cases(operator) if case.overload in emulated.FUNCTIONS]


@every([*CASES, *MORE_MAPS, *MORE_IMAGES, *MORE_AUTOENCODERS, *MORE_FEATURES, *MORE_CONVOLUTIONS, *MORE_DISTANCES])
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


@every([*(case for case in CASES if case.overload in TILED), *MORE_CONVOLUTIONS, *MORE_DISTANCES])
def test_convolutions_in_small_tiles(case: Case) -> None:
    with emulated.multiprocessors(1000):
        case.check(case.run(emulated.FUNCTIONS[case.overload]))


@every([*MORE_CONVOLUTIONS[::3], *MORE_DISTANCES])
def test_convolutions_in_large_tiles_with_less_shared_memory(case: Case) -> None:
    with emulated.shared_of_block(99 * 1024):
        case.check(case.run(emulated.FUNCTIONS[case.overload]))


@pytest.mark.parametrize("order", [1, 2])
def test_convolutions_in_another_order_of_blocks_and_threads(order: int) -> None:
    for case in [*MORE_CONVOLUTIONS[:: 5 + order], *MORE_DISTANCES]:
        with emulated.shuffled(order):
            case.check(case.run(emulated.FUNCTIONS[case.overload]))


def test_maps_do_not_depend_on_the_order_of_blocks_and_leave_counts_of_zero() -> None:
    """By a workspace that other calls used before, of other sizes too, which count in other places."""
    larger, smaller = MORE_DISTANCES[4], MORE_DISTANCES[3]
    numbers_of = [case.arguments()[1]["workspace"].shape[0] for case in (larger, smaller)]
    workspace = torch.zeros(max(numbers_of) + 7)

    def maps(case: Case) -> Tensor:
        args, kwargs = case.arguments()
        emulated.feature_distance_mixed(*args, **(kwargs | {"workspace": workspace}))
        case.check((kwargs["out"],))
        result: Tensor = kwargs["out"]
        return result

    expected = [maps(case) for case in (larger, smaller, larger)]
    for order in (1, 2, 3):
        with emulated.shuffled(order):
            for one, case in zip(expected, (larger, smaller, larger), strict=True):
                assert_close(maps(case), one, EXACT)


def test_every_kernel_of_the_library_runs_here() -> None:
    """But `identity`, which has no header of its own. The cases of what is not here would be passed over in silence."""
    registered = {
        name
        for source in (ROOT / "csrc" / "cuda").glob("*.cu")
        for name in re.findall(r'm\.impl\("([^"]+)"', source.read_text(encoding="utf-8"))
    }
    assert registered - {"identity"} == set(emulated.FUNCTIONS)


def test_shared_variables_are_guarded() -> None:
    assert emulated.unguarded_shared_variables() == []


SECONDS_EACH = ("autoencoder",)
"""Operators of which a case takes so long that few are drawn."""

TIMES = int(os.environ.get("EFFICIENTAD_FAST_EXAMPLES", "1"))
"""As many shapes are drawn; `make fuzz-kernels` asks for more, and for others every time."""


@pytest.mark.parametrize("operator", [one for one in OPERATORS if one not in SECONDS_EACH])
@settings(max_examples=40 * TIMES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_shapes(operator: str, data: st.DataObject) -> None:
    case = data.draw(cases_module(operator).strategy().filter(lambda drawn: drawn.overload in emulated.FUNCTIONS))
    case.check(case.run(emulated.FUNCTIONS[case.overload]))


@pytest.mark.parametrize("operator", SECONDS_EACH)
@settings(max_examples=3 * TIMES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
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


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtypes", [loss_cases.SINGLE, loss_cases.STUDENT_IN_HALF])
def test_losses_have_the_same_bits_in_another_order(dtypes: tuple[torch.dtype, torch.dtype], order: int) -> None:
    """Whichever block comes last adds the others' sums."""
    features = loss_cases.features((1, 24, 31, 33), loss_cases.AS_TRAINED, dtypes, loss_cases.unchanged)
    for fraction in (0.0, 0.9, 0.999):
        expected = emulated.hard_feature_loss(*features, fraction)
        with emulated.shuffled(order):
            actual = emulated.hard_feature_loss(*features, fraction)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, EXACT)


@pytest.mark.parametrize("dtypes", [loss_cases.SINGLE, loss_cases.HALF, loss_cases.STUDENT_IN_HALF])
@pytest.mark.parametrize("first", [(0, 1), (1, 0), (2, 3), (8, 4)])
def test_losses_of_features_at_any_alignment(first: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    shape = (1, 3, 8, 100)
    both = loss_cases.features(shape, loss_cases.PLAIN, dtypes, loss_cases.unchanged)
    moved = [
        torch.cat([one.new_zeros(at), one.flatten()])[at:].view(shape) for at, one in zip(first, both, strict=True)
    ]
    expected = emulated.hard_feature_loss(*both, 0.9)
    for one, other in zip(emulated.hard_feature_loss(*moved, 0.9), expected, strict=True):
        assert_close(one, other, EXACT)
    selection = (*expected[1:], expected[0])
    actual = emulated.hard_feature_loss_gradient(*moved, *selection)
    assert_close(actual, emulated.hard_feature_loss_gradient(*both, *selection), EXACT)


@pytest.mark.parametrize("along", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("lower", [1.0, 1.42, 3.0])
def test_thresholds_between_squares_that_are_near_each_other(lower: float, along: float) -> None:
    """Rounded, a threshold may be one of the two squares that it lies between, and then all that equal it reach it."""

    def make() -> Arguments:
        student = torch.tensor([0.0, lower, lower, lower, 0.0, lower, 8.0, 9.0])
        student[4] = torch.nextafter(student[1], torch.tensor(math.inf))
        return (torch.zeros(1, 2, 2, 2), student.view(1, 2, 2, 2), (4 + along) / 7), {}

    case = Case("near squares", "hard_feature_loss", make)
    case.check(case.run(emulated.hard_feature_loss))


@pytest.mark.parametrize("shape", [(1, 6, 5, 7), (3, 6, 5, 7), (3, 1, 5, 7), (3, 6, 1, 1), (1, 1, 1, 1), (2, 6, 1, 7)])
@pytest.mark.parametrize(
    "layouts",
    [
        loss_cases.PLAIN,
        loss_cases.AS_TRAINED,
        (loss_cases.channels_last, loss_cases.channels_last),
        (loss_cases.contiguous, loss_cases.slice_of_channels),
        (loss_cases.slice_of_channels, loss_cases.slice_of_channels),
        (loss_cases.slice_channels_last, loss_cases.channels_last),
    ],
)
def test_features_of_the_contracts_layouts_are_read_in_place(
    shape: loss_cases.Shape, layouts: tuple[loss_cases.Layout, loss_cases.Layout]
) -> None:
    both = loss_cases.features(shape, layouts, loss_cases.SINGLE, loss_cases.unchanged)
    for one, taken in zip(both, emulated.in_rows(*both), strict=True):
        assert taken.data_ptr() == one.data_ptr()


def test_a_workspace_for_losses_serves_any_features() -> None:
    workspace = torch.full((loss_operator.WORKSPACE,), -1, dtype=torch.int64)
    names = ("loss", "threshold", "count")
    for shape in [(1, 16, 20, 30), (1, 1, 1, 3)]:
        both = loss_cases.features(shape, loss_cases.PLAIN, loss_cases.SINGLE, loss_cases.unchanged)
        results = loss_operator.fake(*both)
        given = dict(zip(names, results, strict=True))
        emulated.hard_feature_loss_out(*both, 0.5, **given, workspace=workspace)
        for one, other in zip(results, emulated.hard_feature_loss(*both, 0.5), strict=True):
            assert_close(one, other, EXACT)
