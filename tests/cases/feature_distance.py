"""What ``feature_distance`` is tested with."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from convolution_cases import (
    LAYOUTS,
    Change,
    channels_last,
    eighth_channels,
    every_other_channel,
    narrowed,
    planes_first,
    quantity,
    signed,
    some_channels,
    turned,
    weights,
    window,
    with_value,
    workspace,
)
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal
from torch import Tensor

from efficientad_fast.ops import conv_pool, feature_distance, packing
from efficientad_fast.ops.packing import Source

Convolution = tuple[int, int, int]
"""Channels, kernel, padding."""


def case(
    name: str,
    images: int,
    size: tuple[int, int],
    outputs: int,
    first: Convolution,
    second: Convolution | None = None,
    *,
    bias: bool = True,
    changes: tuple[Change, Change] = (channels_last, channels_last),
    spread: int = 1,
) -> Case:
    """``size``: of the result, from which those of the images follow."""

    def make() -> Arguments:
        given: list[Tensor | None] = []
        for seed, (convolution, change) in enumerate(zip((first, second), changes, strict=True)):
            if convolution is None:
                given += [None, None]
                continue
            channels, kernel, padding = convolution
            height, width = (side + kernel - 1 - 2 * padding for side in size)
            given.append(change(signed((images, channels, height, width), seed)))
            given.append(weights((outputs, channels, kernel, kernel), 2 + seed))
        given.append(signed((outputs,), 4) if bias else None)
        paddings = {"padding_first": first[2], "padding_second": 0 if second is None else second[2]}
        return tuple(given), paddings

    planes = packing.checked_planes("feature_distance", "auto", _sources(first, second))
    return Case(name, "feature_distance", make, spread, quantity("feature_distance", planes))


def into(
    name: str,
    images: int,
    size: tuple[int, int],
    outputs: int,
    first: Convolution,
    second: Convolution | None = None,
    *,
    algorithm: str,
    threads: int = 1,
    **options: Any,
) -> Case:
    """The same into a given output, with the weights packed for that algorithm."""
    same = case(name, images, size, outputs, first, second, **options)
    planes = packing.checked_planes("feature_distance", algorithm, _sources(first, second))

    def make() -> Arguments:
        (images_first, weight_first, images_second, weight_second, bias), settings = same.make()
        packed = feature_distance.reference_pack(weight_first, weight_second, algorithm=algorithm)
        settings |= {"channels": outputs, "kernel_first": first[1], "kernel_second": 0 if second is None else second[1]}
        settings |= {"out": torch.full((images, 1, *size), math.nan)}
        settings |= {"workspace": workspace(threads, feature_distance.WORKSPACE)}
        return (images_first, images_second, packed, bias), settings

    row = quantity("feature_distance", planes)
    return Case(f"into, {name}, {algorithm}", "feature_distance.out", make, same.spread, row, same_as=same)


FLOAT16, BFLOAT16, FLOAT8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn


def mixed(
    name: str,
    images: int,
    size: tuple[int, int],
    outputs: int,
    first: Convolution,
    second: Convolution | None,
    dtype: torch.dtype,
    *,
    scale: float = 0.0,
    **options: Any,
) -> Case:
    """In mixed precision. ``scale``: about which scales are, 0 for none."""
    same = case(name, images, size, outputs, first, second, **options)

    def make() -> Arguments:
        (*convolved, bias), settings = same.make()
        narrow = [None if one is None else narrowed(one, dtype) for one in convolved]
        scales = scale * (1 + 0.5 * signed((outputs,), 5)) if scale else None
        settings |= {"out": torch.full((images, 1, *size), math.nan)}
        # Zeros, as the contract has it, and a little more than there must be.
        numbers = feature_distance.mixed_workspace_size(images, *size, outputs) + 3 * images
        settings |= {"workspace": torch.zeros(numbers)}
        return (*narrow, scales, bias), settings

    row = "feature_distance, products of float8" if dtype == FLOAT8 else "feature_distance, mixed"
    return Case(f"mixed, {name}", "feature_distance.mixed", make, quantity=row)


def pack_case(
    name: str,
    shape_first: tuple[int, int, int, int],
    shape_second: tuple[int, int, int, int] | None,
    algorithm: str,
) -> Case:
    def make() -> Arguments:
        second = None if shape_second is None else weights(shape_second, 2)
        return (weights(shape_first, 1), second), {"algorithm": algorithm}

    return Case(f"{name}, {algorithm}", "feature_distance.pack", make, quantity="packed weights")


def _sources(first: Convolution, second: Convolution | None) -> list[Source]:
    return [Source(one[0], one[1]) for one in (first, second) if one is not None]


S_LAST, AE_LAST = (17, 4, 0), (16, 3, 1)
"""Kernels and paddings of PDN-S' last convolution, and of the autoencoder's."""

PAIRS = [
    (S_LAST, S_LAST),
    (AE_LAST, S_LAST),
    ((33, 3, 0), (16, 3, 1)),
    ((16, 4, 3), (5, 1, 0)),
    ((3, 4, 0), (48, 4, 1)),
    (AE_LAST, None),
    (S_LAST, None),
    ((5, 5, 2), (3, 2, 0)),
    ((64, 1, 0), (31, 1, 0)),
]

CASES = [
    *(
        case(
            f"kernels {first[1]} and {second[1] if second else 0}, {size[0]} x {size[1]}",
            1,
            size,
            outputs,
            first,
            second,
        )
        for (first, second), size, outputs in zip(
            PAIRS,
            itertools.cycle([(7, 13), (4, 6), (5, 11), (6, 4), (3, 12)]),
            itertools.cycle([48, 33, 64, 16, 3, 31, 1]),
            strict=False,
        )
    ),
    case("one pixel", 1, (1, 1), 5, S_LAST, S_LAST),
    case("one pixel of one by one", 1, (1, 1), 1, (1, 1, 0)),
    case("a row", 2, (1, 25), 17, AE_LAST, S_LAST),
    case("a column", 2, (23, 1), 17, (16, 3, 0), (3, 4, 1)),
    case("many outputs", 1, (5, 6), 200, S_LAST, S_LAST),
    case("no bias", 2, (6, 6), 7, S_LAST, AE_LAST, bias=False),
    case("nothing but a square, no bias", 2, (6, 6), 7, (3, 3, 0), bias=False),
    case("empty", 0, (6, 5), 7, S_LAST, AE_LAST),
    case("some channels of both", 2, (7, 9), 33, S_LAST, S_LAST, changes=(some_channels, some_channels)),
    case("window and planes first", 2, (7, 9), 33, AE_LAST, S_LAST, changes=(window, planes_first)),
    case("turned and every other channel", 2, (7, 9), 3, (5, 3, 0), S_LAST, changes=(turned, every_other_channel)),
    case("NaN", 2, (9, 8), 5, (3, 4, 0), (7, 1, 0), changes=(channels_last, with_value(math.nan))),
    # An inf may be a NaN: it is multiplied by the zeros that fill packed weights up.
    case("inf", 2, (9, 8), 5, (3, 3, 0), changes=(with_value(math.inf), channels_last), spread=2),
    case("NaN in tiles", 2, (19, 23), 5, S_LAST, AE_LAST, changes=(with_value(math.nan), channels_last), spread=16),
    case("inf in tiles", 2, (19, 23), 5, S_LAST, AE_LAST, changes=(channels_last, with_value(math.inf)), spread=16),
    case(
        "NaN in a padded tile", 2, (5, 4), 5, (16, 3, 1), None, changes=(with_value(math.nan), channels_last), spread=16
    ),
    *(
        into(
            f"kernels {first[1]} and {second[1] if second else 0}",
            2,
            size,
            outputs,
            first,
            second,
            algorithm=algorithm,
            threads=threads,
            bias=threads < 3,
        )
        for ((first, second), algorithm), size, outputs, threads in zip(
            [
                (pair, algorithm)
                for pair in PAIRS
                for algorithm in packing.planes_by_algorithm(max(one[1] for one in pair if one is not None))
            ],
            itertools.cycle([(7, 13), (11, 6), (5, 4), (12, 17)]),
            itertools.cycle([33, 5, 64, 32, 17]),
            itertools.cycle([1, 2, 3]),
            strict=False,
        )
    ),
    into("some channels", 2, (7, 9), 33, S_LAST, S_LAST, algorithm="winograd4", changes=(some_channels, some_channels)),
    into("planes first", 2, (7, 9), 33, AE_LAST, S_LAST, algorithm="direct", changes=(planes_first, window)),
    into(
        "NaN in tiles",
        2,
        (17, 14),
        33,
        AE_LAST,
        S_LAST,
        algorithm="winograd6",
        changes=(with_value(math.nan), channels_last),
        spread=16,
    ),
    into(
        "NaN, padding up to 16",
        2,
        (7, 9),
        5,
        (5, 3, 0),
        (3, 3, 1),
        algorithm="direct",
        changes=(with_value(math.nan), channels_last),
    ),
    into("empty", 0, (7, 9), 5, S_LAST, S_LAST, algorithm="winograd4"),
    into("native, one pixel", 1, (1, 1), 3, S_LAST, AE_LAST, algorithm="winograd4"),
    *(
        pack_case(f"{first} and {second}", (33, *first), second and (33, *second), algorithm)
        for first, second, algorithms in [
            ((17, 4, 4), (5, 4, 4), ("direct", "winograd4", "winograd6")),
            ((16, 3, 3), (17, 4, 4), ("auto", "direct", "winograd6")),
            ((5, 3, 3), (17, 1, 1), ("auto", "winograd4")),
            ((33, 3, 3), None, ("direct", "auto")),
            ((2, 5, 5), (3, 2, 2), ("auto",)),
        ]
        for algorithm in algorithms
    ),
    pack_case("equal outputs and channels", (16, 16, 3, 3), (16, 16, 3, 3), "auto"),
    *(
        case
        for dtype, name in (
            (FLOAT16, "float16"),
            (BFLOAT16, "bfloat16"),
            (FLOAT8, "float8"),
            (torch.float32, "float32"),
        )
        for case in (
            mixed(f"map_st in {name}", 2, (9, 10), 150, (32, 4, 0), (32, 4, 0), dtype, scale=2.0),
            mixed(f"map_ae in {name}", 1, (7, 17), 33, (64, 3, 1), (32, 4, 0), dtype),
            mixed(f"one by one in {name}", 1, (5, 9), 40, (96, 1, 0), (17, 1, 0), dtype, scale=0.1, bias=False),
        )
    ),
    mixed("one convolution", 2, (5, 6), 17, (32, 3, 1), None, FLOAT16),
    mixed("one pixel", 1, (1, 1), 1, (1, 1, 0), (3, 2, 0), FLOAT16),
    mixed("empty", 0, (5, 6), 17, (32, 3, 1), None, FLOAT16),
    *(
        mixed(change.__name__, 2, (5, 7), 18, (32, 3, 1), (16, 4, 0), FLOAT16, changes=(change, some_channels))
        for change in (eighth_channels, window, planes_first, every_other_channel)
    ),
    mixed("NaN", 2, (7, 9), 20, (32, 3, 1), (16, 4, 0), FLOAT16, changes=(with_value(math.nan), channels_last)),
    mixed("inf", 2, (7, 9), 20, (32, 3, 1), (16, 4, 0), FLOAT16, changes=(channels_last, with_value(math.inf))),
]


@st.composite
def strategy(draw: Any) -> Case:
    def convolution() -> Convolution:
        kernel = draw(st.integers(1, 5))
        return draw(st.sampled_from((1, 3, 15, 16, 17, 33))), kernel, draw(st.integers(0, kernel - 1))

    first, second = convolution(), convolution() if draw(st.booleans()) else None
    # Images have at least a pixel.
    least = max(1, *(1 - one[1] + 1 + 2 * one[2] for one in (first, second) if one is not None))
    size = (least + draw(st.integers(0, 13)), least + draw(st.integers(0, 13)))
    images, outputs = draw(st.integers(0, 2)), draw(st.integers(1, 70))
    changes = (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)))
    options = {"bias": draw(st.booleans()), "changes": changes}
    name = f"drawn, {images} of {size}, {outputs} outputs, {first}, {second}, {options}"
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(packing.MIXED_DTYPES))
        scale = draw(st.sampled_from((0.0, 0.7)))
        return mixed(f"{name}, {dtype}", images, size, outputs, first, second, dtype, scale=scale, **options)
    if draw(st.booleans()):
        return case(name, images, size, outputs, first, second, **options)
    largest = max(one[1] for one in (first, second) if one is not None)
    algorithm = draw(st.sampled_from(("auto", *packing.planes_by_algorithm(largest))))
    threads = draw(st.integers(1, 3))
    return into(name, images, size, outputs, first, second, algorithm=algorithm, threads=threads, **options)


def expected(case: Case, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    if case.overload == "feature_distance.pack":
        return (_packed(*args, **options),)
    exact = (None if one is None else one.double() for one in args)
    if case.overload == "feature_distance.mixed":
        options = {name: options[name] for name in ("padding_first", "padding_second")}
        return (feature_distance.compute_mixed(*exact, **options),)
    return (feature_distance.compute(*exact, **options),)


def _packed(first: Tensor, second: Tensor | None, algorithm: str) -> Tensor:
    """Each as ``conv_pool.pack`` has it, whose cases say what that is, the smaller filled up, one after the other."""
    given = [first] if second is None else [first, -second]
    kernels = [one.shape[3] for one in given]
    if algorithm == "auto":
        fits = max(kernels) in (3, 4) and 1 not in kernels and first.shape[1] >= 16
        algorithm = ("winograd6" if max(kernels) == 3 else "winograd4") if fits else "direct"
    if algorithm != "direct":
        given = [torch.nn.functional.pad(one, (0, max(kernels) - one.shape[3]) * 2) for one in given]
    return torch.cat([conv_pool.reference_pack(one, algorithm=algorithm) for one in given], 3)


def refusal(name: str, message: str, overload: str = "feature_distance", **changes: Any) -> Refusal:
    def make() -> Arguments:
        arguments: dict[str, Any] = {"weight_first": torch.zeros(6, 4, 3, 3), "weight_second": torch.zeros(6, 5, 4, 4)}
        if overload == "feature_distance.pack":
            return (), arguments | changes
        arguments |= {
            "first": channels_last(torch.zeros(2, 4, 5, 7)),
            "second": channels_last(torch.zeros(2, 5, 8, 10)),
        }
        arguments |= {"bias": torch.zeros(6), "padding_first": 1}
        if overload == "feature_distance.out":
            pair = arguments.pop("weight_first"), arguments.pop("weight_second")
            arguments |= {"packed": feature_distance.reference_pack(*pair), "channels": 6}
            arguments |= {"kernel_first": 3, "kernel_second": 4, "out": torch.zeros(2, 1, 5, 7)}
            arguments["workspace"] = workspace(1, feature_distance.WORKSPACE)
        if overload == "feature_distance.mixed":
            for name in ("first", "second", "weight_first", "weight_second"):
                arguments[name] = arguments[name].half()
            arguments |= {"scale": torch.ones(6), "out": torch.zeros(2, 1, 5, 7), "workspace": torch.zeros(140)}
        return (), arguments | changes

    return Refusal(name, overload, make, f"feature_distance: {message}")


def mixed_refusal(name: str, message: str, **changes: Any) -> Refusal:
    return refusal(f"mixed, {name}", message, "feature_distance.mixed", **changes)


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def _elsewhere(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


PACK, OUT = "feature_distance.pack", "feature_distance.out"

REFUSALS = [
    refusal("three dimensions", r"first must be \(N, C, H, W\) with .*got \(4, 5, 7\)", first=torch.zeros(4, 5, 7)),
    refusal("first in half", "first must be float32, got torch.float16", first=_half(2, 4, 5, 7)),
    refusal("no columns", r"second must be \(N, C, H, W\) .*got \(2, 5, 8, 0\)", second=torch.zeros(2, 5, 8, 0)),
    refusal("second in half", "second must be float32, got torch.float16", second=_half(2, 5, 8, 10)),
    refusal("second elsewhere", "second must be on .*got", second=_elsewhere(2, 5, 8, 10)),
    refusal(
        "too deep",
        "packed must be at most 524160 deep for 1 planes, got 524176",
        first=torch.zeros(2, 524161, 1, 1),
        weight_first=torch.zeros(1, 524161, 1, 1),
        second=None,
        weight_second=None,
        bias=None,
        padding_first=0,
        padding_second=0,
    ),
    refusal("oblong", r"weight_first must be .*got \(6, 4, 3, 4\)", weight_first=torch.zeros(6, 4, 3, 4)),
    refusal("first weight in half", "weight_first must be float32, got", weight_first=_half(6, 4, 3, 3)),
    refusal("first weight elsewhere", "weight_first must be on .*got", weight_first=_elsewhere(6, 4, 3, 3)),
    refusal(
        "first of other channels",
        r"first must be \(N, 9, H, W\) for this weight_first, got \(2, 4, 5, 7\)",
        weight_first=torch.zeros(6, 9, 3, 3),
    ),
    refusal("no second", "second must be given where weight_second is, got None", second=None),
    refusal("no second weight", "weight_second must be given where second is, got None", weight_second=None),
    refusal("second oblong", r"weight_second must be .*got \(6, 5, 4, 3\)", weight_second=torch.zeros(6, 5, 4, 3)),
    refusal("second weight in half", "weight_second must be float32, got", weight_second=_half(6, 5, 4, 4)),
    refusal("second weight elsewhere", "weight_second must be on .*got", weight_second=_elsewhere(6, 5, 4, 4)),
    refusal(
        "weights of more outputs",
        r"weight_second must be of 6 outputs as weight_first is, got \(7, 5, 4, 4\)",
        weight_second=torch.zeros(7, 5, 4, 4),
    ),
    refusal(
        "second of other channels",
        r"second must be \(N, 9, H, W\) for this weight_second, got \(2, 5, 8, 10\)",
        weight_second=torch.zeros(6, 9, 4, 4),
    ),
    refusal("padding 3", "padding_first must be from 0 to 2 for a 3x3 kernel, got 3", padding_first=3),
    refusal("padding -1", "padding_second must be from 0 to 3 for a 4x4 kernel, got -1", padding_second=-1),
    refusal(
        "small first", "first must be at least 3x3 pixels .*got 2x7", padding_first=0, first=torch.zeros(2, 4, 2, 7)
    ),
    refusal("small second", "second must be at least 4x4 pixels .*got 8x3", second=torch.zeros(2, 5, 8, 3)),
    refusal(
        "another batch",
        r"second must be of 2 images as first is, got \(1, 5, 8, 10\)",
        second=torch.zeros(1, 5, 8, 10),
    ),
    refusal(
        "another size",
        "second must be such that its convolution has 5x7 pixels as that of first has, got 5x8",
        second=torch.zeros(2, 5, 8, 11),
    ),
    refusal(
        "padding of nothing",
        "padding_second must be 0 without second, got 1",
        second=None,
        weight_second=None,
        padding_second=1,
    ),
    refusal("bias of five", r"bias must be \(6,\), got \(5,\)", bias=torch.zeros(5)),
    refusal("bias in half", "bias must be float32, got torch.float16", bias=_half(6)),
    refusal("bias elsewhere", "bias must be on .*got", bias=_elsewhere(6)),
    refusal("packed oblong", r"weight_first must be .*got \(6, 4, 3, 4\)", PACK, weight_first=torch.zeros(6, 4, 3, 4)),
    refusal("packed half", "weight_second must be float32, got", PACK, weight_second=_half(6, 5, 4, 4)),
    refusal("packed elsewhere", "weight_second must be on .*got", PACK, weight_second=_elsewhere(6, 5, 4, 4)),
    refusal(
        "packed of more outputs",
        r"weight_second must be of 6 outputs .*got \(7, 5, 4, 4\)",
        PACK,
        weight_second=torch.zeros(7, 5, 4, 4),
    ),
    refusal("unknown algorithm", "algorithm must be 'auto', .*, got 'winograd2'", PACK, algorithm="winograd2"),
    refusal(
        "Winograd for five by five",
        "algorithm must be 'auto' or 'direct' for a 5x5 kernel, got 'winograd6'",
        PACK,
        weight_second=torch.zeros(6, 5, 5, 5),
        algorithm="winograd6",
    ),
    refusal("into, of no image", r"first must be \(N, C, H, W\)", OUT, first=torch.zeros(4, 5, 7)),
    refusal("into, of half", "second must be float32, got", OUT, second=_half(2, 5, 8, 10)),
    refusal("no channels", "channels must be at least 1, got 0", OUT, channels=0),
    refusal("channels beyond numbers", r"packed must be \(1, 288230376151711744, ", OUT, channels=2**63 - 1),
    refusal("kernel 0", "kernel_first must be from 1 to 16, got 0", OUT, kernel_first=0),
    refusal("kernel 17", "kernel_second must be from 1 to 16, got 17", OUT, kernel_second=17),
    refusal("no second kernel", "kernel_second must be from 1 to 16, got 0", OUT, kernel_second=0),
    refusal("kernel of nothing", "kernel_second must be 0 without second, got 4", OUT, second=None),
    refusal("into, padding 3", "padding_first must be from 0 to 2 for a 3x3 kernel, got 3", OUT, padding_first=3),
    refusal("into, another batch", r"second must be of 2 images .*got", OUT, second=torch.zeros(3, 5, 8, 10)),
    refusal(
        "into, another size",
        "second must be such that its convolution has 5x7 pixels .*got 4x7",
        OUT,
        second=torch.zeros(2, 5, 7, 10),
    ),
    refusal(
        "other weights",
        r"packed must be \(1, 1, 1, 128, 32\) or \(1, 1, 49, 32, 32\) or \(1, 1, 81, 32, 32\), got \(1, 1, 36, 32",
        OUT,
        packed=torch.zeros(1, 1, 36, 32, 32),
    ),
    refusal("weights in half", "packed must be float32, got torch.float16", OUT, packed=_half(1, 1, 1, 128, 32)),
    refusal(
        "weights with gaps",
        "packed must be contiguous, got strides",
        OUT,
        packed=torch.zeros(1, 1, 1, 128, 64)[..., ::2],
    ),
    refusal("weights elsewhere", "packed must be on .*got", OUT, packed=_elsewhere(1, 1, 1, 128, 32)),
    refusal("into, bias of five", r"bias must be \(6,\), got \(5,\)", OUT, bias=torch.zeros(5)),
    refusal(
        "output of six channels", r"out must be \(2, 1, 5, 7\), got \(2, 6, 5, 7\)", OUT, out=torch.zeros(2, 6, 5, 7)
    ),
    refusal("output in half", "out must be float32, got torch.float16", OUT, out=_half(2, 1, 5, 7)),
    refusal("output with gaps", "out must be contiguous, got strides", OUT, out=torch.zeros(2, 1, 5, 14)[..., ::2]),
    refusal("output elsewhere", "out must be on .*got", OUT, out=_elsewhere(2, 1, 5, 7)),
    refusal("small workspace", r"workspace must be .*got \(1, 2097151\)", OUT, workspace=torch.zeros(1, 2097151)),
    refusal(
        "workspace of float64",
        "workspace must be float32, got torch.float64",
        OUT,
        workspace=torch.zeros(1, feature_distance.WORKSPACE, dtype=torch.float64),
    ),
    refusal(
        "workspace elsewhere", "workspace must be on .*got", OUT, workspace=_elsewhere(1, feature_distance.WORKSPACE)
    ),
    mixed_refusal(
        "float64", "first must be float32, float16, .*got torch.float64", first=torch.zeros(2, 4, 5, 7).double()
    ),
    mixed_refusal(
        "two dtypes", "second must be torch.float16 as first is, got torch.float32", second=torch.zeros(2, 5, 8, 10)
    ),
    mixed_refusal(
        "weights of another dtype",
        "weight_second must be torch.float16 as first is, got torch.bfloat16",
        weight_second=torch.zeros(6, 5, 4, 4).bfloat16(),
    ),
    mixed_refusal("second alone", "weight_second must be given where second is, got None", weight_second=None),
    mixed_refusal("second elsewhere", "second must be on .*got", second=_half(2, 5, 8, 10).to("meta")),
    mixed_refusal("other channels", r"first must be \(N, 4, H, W\) .*got \(2, 3, 5, 7\)", first=_half(2, 3, 5, 7)),
    mixed_refusal("other outputs", "weight_second must be of 6 outputs .*got", weight_second=_half(5, 5, 4, 4)),
    mixed_refusal(
        "other size", "second must be such that its convolution has 5x7 pixels.*got 6x7", second=_half(2, 5, 9, 10)
    ),
    mixed_refusal("scale of five", r"scale must be \(6,\), got \(5,\)", scale=torch.ones(5)),
    mixed_refusal("bias in half", "bias must be float32, got torch.float16", bias=_half(6)),
    mixed_refusal("output in half", "out must be float32, got torch.float16", out=_half(2, 1, 5, 7)),
    mixed_refusal(
        "output of another size", r"out must be \(2, 1, 5, 7\), got \(2, 1, 5, 8\)", out=torch.zeros(2, 1, 5, 8)
    ),
    mixed_refusal("output with gaps", "out must be contiguous, got strides", out=torch.zeros(2, 1, 5, 14)[..., ::2]),
    mixed_refusal("output elsewhere", "out must be on .*got", out=_elsewhere(2, 1, 5, 7)),
    mixed_refusal(
        "small workspace",
        r"workspace must be \(numbers,\) of at least \(140,\), got \(139,\)",
        workspace=torch.zeros(139),
    ),
    mixed_refusal("workspace of two dimensions", r"workspace must be .*got \(1, 140\)", workspace=torch.zeros(1, 140)),
    mixed_refusal("workspace in half", "workspace must be float32, got", workspace=_half(140)),
    mixed_refusal("workspace with gaps", "workspace must be contiguous", workspace=torch.zeros(280)[::2]),
]
