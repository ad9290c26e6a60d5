"""What ``conv_pool`` is tested with."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from convolution_cases import (
    LAYOUTS,
    Change,
    channels_last,
    eighth_channels,
    narrowed,
    planes_first,
    quantity,
    signed,
    some_channels,
    weights,
    window,
    with_value,
    workspace,
    written,
)
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal
from torch import Tensor

from efficientad_fast.ops import conv_pool, packing, winograd
from efficientad_fast.ops.packing import Source


def case(
    name: str,
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: int,
    *,
    groups: int = 1,
    bias: bool = True,
    change: Change = channels_last,
    spread: int = 1,
    **options: Any,
) -> Case:
    """``shape``: of the input, whose channels and the ``outputs`` are those of all groups."""

    def make() -> Arguments:
        images = change(signed(shape, 0))
        weight = weights((outputs, shape[1] // groups, kernel, kernel), 1)
        return (images, weight, signed((outputs,), 2) if bias else None), {"groups": groups, **options}

    planes = packing.checked_planes("conv_pool", "auto", [Source(shape[1] // groups, kernel)])
    return Case(name, "conv_pool", make, spread, quantity("conv_pool", planes))


def into(
    name: str,
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: int,
    algorithm: str,
    *,
    threads: int = 1,
    groups: int = 1,
    **options: Any,
) -> Case:
    """The same into given outputs, with the weights packed for that algorithm."""
    same = case(name, shape, outputs, kernel, groups=groups, **options)
    planes = packing.checked_planes("conv_pool", algorithm, [Source(shape[1] // groups, kernel)])

    def make() -> Arguments:
        (images, weight, bias), settings = same.make()
        out = written(tuple(conv_pool.fake(images, weight, bias, **settings).shape))
        packed = conv_pool.reference_pack(weight, groups=groups, algorithm=algorithm)
        settings |= {"kernel_size": kernel, "out": out, "workspace": workspace(threads, conv_pool.WORKSPACE)}
        return (images, packed, bias), settings

    return Case(f"into, {name}", "conv_pool.out", make, same.spread, quantity("conv_pool", planes), same_as=same)


FLOAT16, BFLOAT16, FLOAT8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn


def mixed(
    name: str,
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
    *,
    groups: int = 1,
    bias: bool | tuple[float, ...] = True,
    scale: float = 0.0,
    change: Change = channels_last,
    change_weight: Change = channels_last,
    **options: Any,
) -> Case:
    """In mixed precision. ``scale``: about which scales are, 0 for none; ``bias``: or those of the first outputs."""

    def make() -> Arguments:
        images = narrowed(change(signed(shape, 0)), dtype)
        weight = narrowed(change_weight(weights((outputs, shape[1] // groups, kernel, kernel), 1)), dtype)
        scales = scale * (1 + 0.5 * signed((outputs,), 3)) if scale else None
        biases = signed((outputs,), 2) if bias else None
        if isinstance(bias, tuple):
            biases = torch.cat([torch.tensor(bias), signed((outputs,), 2)[len(bias) :]])
        size = conv_pool.fake(images.float(), weight.float(), biases, groups=groups, **options).shape
        return (images, weight, scales, biases), {
            "groups": groups,
            **options,
            "out": written(tuple(size), out_dtype or dtype),
        }

    row = "conv_pool, products of float8" if dtype == FLOAT8 else "conv_pool, mixed"
    return Case(f"mixed, {name}", "conv_pool.mixed", make, quantity=row)


def pack_case(name: str, shape: tuple[int, int, int, int], algorithm: str, *, groups: int = 1) -> Case:
    def make() -> Arguments:
        return (weights(shape, 1),), {"groups": groups, "algorithm": algorithm}

    return Case(f"{name}, {algorithm}", "conv_pool.pack", make, quantity="packed weights")


# Heights and widths of results, off by one from tiles of 4 and 6, with channels and outputs off by one from 16 and 32.
SHAPES = [
    ((1, 1), 16, 1),
    ((3, 5), 17, 33),
    ((4, 13), 16, 32),
    ((6, 12), 33, 16),
    ((7, 4), 48, 31),
    ((11, 6), 16, 64),
    ((1, 25), 31, 17),
    ((23, 1), 64, 3),
]
FITTING = [(algorithm, kernel) for kernel in (1, 2, 3, 4, 5) for algorithm in packing.planes_by_algorithm(kernel)]

CASES = [
    case("as conv1 makes it", (1, 3, 21, 19), 40, 4, pool=True),
    case("as conv1 makes it, padded", (2, 3, 13, 11), 32, 4, padding=3, pool=True, pool_padding=1),
    case("as conv2 makes it, two groups", (1, 34, 9, 17), 66, 4, groups=2, pool=True),
    case("as conv2 makes it, padded", (1, 34, 9, 12), 64, 4, groups=2, padding=3, pool=True, pool_padding=1),
    case("as conv3 makes it, two groups", (2, 64, 9, 8), 64, 3, groups=2, padding=1),
    case("one pixel", (1, 1, 1, 1), 1, 1),
    case("one pixel, padded", (1, 16, 1, 1), 5, 3, padding=2),
    case("one output pixel of all of an image", (2, 5, 16, 16), 3, 16),
    case("one pooled pixel", (1, 16, 4, 5), 7, 3, pool=True),
    case("one pooled pixel of zeros and one", (1, 3, 4, 4), 2, 4, pool=True, pool_padding=1),
    case("rows left out by pooling", (1, 17, 10, 9), 4, 4, pool=True),
    case("a channel per group", (2, 5, 7, 6), 10, 3, groups=5, padding=1),
    case("an output per group", (1, 51, 8, 7), 3, 3, groups=3),
    case("negative numbers stay", (1, 17, 8, 7), 5, 3, relu=False),
    case("negative numbers are averaged", (1, 3, 9, 7), 5, 4, relu=False, pool=True, pool_padding=1),
    case("no bias", (1, 48, 8, 7), 5, 4, bias=False),
    case("one by one", (2, 17, 5, 3), 33, 1),
    case("one by one, many channels, pooled", (1, 64, 7, 9), 48, 1, pool=True, pool_padding=1),
    case("five by five", (1, 17, 9, 11), 16, 5, padding=4, pool=True),
    case("two by two", (1, 3, 5, 9), 33, 2, padding=1),
    case("empty", (0, 16, 9, 8), 5, 3, pool=True),
    case("no bias, empty", (0, 3, 9, 8), 5, 4, bias=False),
    *(
        case(
            f"{outputs[0]} x {outputs[1]} of {kernel} x {kernel}", (1, channels, *sides), count, kernel, padding=padding
        )
        for (outputs, channels, count), kernel, padding in zip(
            SHAPES, itertools.cycle((3, 4)), itertools.cycle((0, 1, 2)), strict=False
        )
        if (sides := tuple(side + kernel - 1 - 2 * padding for side in outputs)) and min(sides) > 0
    ),
    *(
        case(f"{change.__name__}, {kernel} x {kernel}", (2, channels, 7, 9), 6, kernel, padding=1, change=change)
        for change, (channels, kernel) in itertools.product(LAYOUTS[1:], ((3, 4), (18, 3)))
    ),
    case("some channels, two groups", (2, 36, 7, 9), 6, 4, groups=2, pool=True, change=some_channels),
    case("NaN", (2, 3, 13, 17), 5, 4, change=with_value(math.nan)),
    case("NaN, one by one", (2, 17, 5, 4), 5, 1, change=with_value(math.nan)),
    case("NaN, pooled", (2, 3, 13, 17), 5, 4, pool=True, pool_padding=1, change=with_value(math.nan)),
    case("inf", (2, 5, 9, 8), 5, 3, relu=False, change=with_value(math.inf)),
    # A pixel lies in up to four tiles of 6x6, of which the reference has 3x3 results.
    case("NaN in tiles", (2, 17, 19, 23), 5, 3, change=with_value(math.nan), spread=16),
    case("inf in tiles", (2, 17, 19, 23), 5, 4, relu=False, padding=1, change=with_value(math.inf), spread=16),
    case("NaN in tiles, pooled", (2, 17, 19, 23), 5, 4, pool=True, change=with_value(math.nan), spread=16),
    *(
        into(f"{algorithm}, {kernel} x {kernel}", (2, channels, 13, 15), outputs, kernel, algorithm, threads=threads)
        for (algorithm, kernel), (channels, outputs, threads) in zip(
            FITTING, itertools.cycle(((16, 33, 1), (17, 32, 2), (3, 5, 3))), strict=False
        )
    ),
    *(
        into(f"{outputs[0]} x {outputs[1]} by {algorithm}", (1, channels, *sides), count, 4, algorithm, **options)
        for (outputs, channels, count), algorithm, options in zip(
            SHAPES * 2,
            itertools.cycle(("winograd6", "winograd4", "direct")),
            itertools.cycle(({}, {"pool": True, "pool_padding": 1}, {"relu": False, "threads": 2}, {"bias": False})),
            strict=False,
        )
        if (sides := tuple(side + 3 for side in outputs))
    ),
    *(
        into(
            f"two groups, pooled by {algorithm}",
            (2, 36, 11, 14),
            70,
            3,
            algorithm,
            groups=2,
            padding=2,
            pool=True,
            pool_padding=padding,
            threads=3,
        )
        for algorithm, padding in (("direct", 0), ("winograd4", 1), ("winograd6", 0))
    ),
    into("some channels", (2, 18, 9, 11), 33, 3, "winograd4", change=some_channels),
    into("window", (2, 3, 9, 11), 33, 4, "direct", change=window, pool=True),
    into("NaN in tiles", (2, 20, 17, 25), 33, 4, "winograd6", change=with_value(math.nan), spread=16),
    into("NaN, padding up to 16", (2, 5, 17, 25), 33, 3, "direct", change=with_value(math.nan)),
    into("empty", (0, 16, 9, 8), 5, 3, "winograd6"),
    into("native, one pixel", (1, 2, 3, 3), 2, 3, "winograd4"),
    *(
        pack_case(f"{kernel} x {kernel}", shape, algorithm, groups=groups)
        for algorithm, kernel in FITTING
        for shape, groups in [((34, 5 if kernel > 1 else 17, kernel, kernel), 2 if kernel == 4 else 1)]
    ),
    *(
        case
        for dtype, name in (
            (FLOAT16, "float16"),
            (BFLOAT16, "bfloat16"),
            (FLOAT8, "float8"),
            (torch.float32, "float32"),
        )
        for case in (
            mixed(f"stem in {name}", (1, 4, 13, 15), 40, 4, dtype, pool=True, scale=2.0),
            mixed(
                f"pooled in {name}, padded", (2, 64, 7, 9), 48, 4, dtype, groups=2, padding=3, pool=True, pool_padding=1
            ),
            mixed(f"odd channels in {name}", (1, 34, 6, 5), 33, 3, dtype, padding=1, relu=False, scale=0.1),
        )
    ),
    mixed(
        "float16 to float8, padded stem", (2, 4, 9, 11), 32, 4, FLOAT16, FLOAT8, padding=3, pool=True, pool_padding=1
    ),
    mixed("float8 to float16", (1, 32, 5, 6), 20, 3, FLOAT8, FLOAT16),
    mixed("float8 to float32, two depths", (1, 256, 3, 4), 16, 1, FLOAT8, torch.float32, scale=1.0),
    mixed("larger than e4m3 can be", (1, 16, 5, 6), 20, 3, FLOAT16, FLOAT8, scale=4000.0, relu=False),
    mixed("three channels", (1, 3, 9, 7), 17, 4, FLOAT16, bias=False),
    mixed("many depths", (1, 192, 5, 4), 16, 2, FLOAT16),
    mixed("more outputs than a tile", (1, 16, 4, 5), 150, 3, FLOAT16, padding=1),
    mixed("rows and columns of several tiles", (1, 16, 21, 70), 16, 3, FLOAT16, pool=True),
    mixed("one pixel", (1, 1, 1, 1), 1, 1, FLOAT16),
    mixed("one output pixel of all of an image", (2, 5, 16, 16), 3, 16, FLOAT16, FLOAT16),
    mixed("empty", (0, 16, 9, 8), 5, 3, FLOAT16, pool=True),
    *(
        mixed(f"{change.__name__}", (2, 32, 5, 7), 18, 3, FLOAT16, groups=2, padding=1, change=change)
        for change in (some_channels, eighth_channels, window, planes_first)
    ),
    mixed("weight with planes first", (1, 16, 5, 7), 18, 3, FLOAT16, change_weight=planes_first),
    mixed("NaN", (2, 16, 7, 9), 5, 4, FLOAT16, pool=True, change=with_value(math.nan)),
    mixed("NaN to float8", (2, 16, 7, 9), 5, 4, FLOAT16, FLOAT8, change=with_value(math.nan)),
    mixed("inf", (2, 16, 7, 9), 5, 4, FLOAT16, relu=False, change=with_value(math.inf)),
    pack_case("16 of 32 of three groups", (96, 16, 3, 3), "auto", groups=3),
    pack_case("fewer channels than 16", (33, 15, 3, 3), "auto"),
    pack_case("equal channels and outputs", (32, 16, 4, 4), "auto"),
    pack_case("one pixel", (1, 1, 1, 1), "auto"),
]


@st.composite
def strategy(draw: Any) -> Case:
    kernel = draw(st.integers(1, 5))
    groups = draw(st.integers(1, 3))
    padding = draw(st.integers(0, kernel - 1))
    pool = draw(st.booleans())
    pool_padding = draw(st.integers(0, int(pool)))
    least = max(kernel - 2 * padding + int(pool and not pool_padding), 1)
    height, width = (least + draw(st.integers(0, 14)) for _ in range(2))
    channels, outputs = draw(st.sampled_from((1, 3, 15, 16, 17, 33))), draw(st.integers(1, 35))
    shape = (draw(st.integers(0, 2)), channels * groups, height, width)
    options = {"padding": padding, "pool": pool, "pool_padding": pool_padding, "groups": groups}
    options |= {"relu": draw(st.booleans()), "bias": draw(st.booleans()), "change": draw(st.sampled_from(LAYOUTS))}
    name = f"drawn, {shape} to {outputs * groups}, {kernel} x {kernel}, {options}"
    if draw(st.booleans()):
        mixed_options = options | {"scale": draw(st.sampled_from((0.0, 0.7)))}
        dtypes = [draw(st.sampled_from(packing.MIXED_DTYPES)) for _ in range(2)]
        return mixed(f"{name}, {dtypes}", shape, outputs * groups, kernel, *dtypes, **mixed_options)
    if draw(st.booleans()):
        return case(name, shape, outputs * groups, kernel, **options)
    algorithm = draw(st.sampled_from(("auto", *packing.planes_by_algorithm(kernel))))
    threads = draw(st.integers(1, 3))
    return into(f"{name}, {algorithm}", shape, outputs * groups, kernel, algorithm, threads=threads, **options)


def expected(case: Case, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    if case.overload == "conv_pool.mixed":
        exact = (None if one is None else one.double() for one in args)
        out = options.pop("out")
        result = conv_pool.compute_mixed(*exact, **options)
        largest = packing.LARGEST_E4M3
        return (result.clamp(-largest, largest) if out.dtype == FLOAT8 else result,)
    if case.overload == "conv_pool.pack":
        return (torch.from_numpy(_packed(args[0].double().numpy(), **options)),)
    exact = (None if one is None else one.double() for one in args)
    return (conv_pool.compute(*exact, **options),)


def _packed(weight: np.ndarray, groups: int, algorithm: str) -> np.ndarray:
    """Number by number, as the contract has it."""
    outputs, channels, kernel, _ = weight.shape
    if algorithm == "auto":
        fits = kernel in (3, 4) and channels >= 16
        algorithm = ("winograd6" if kernel == 3 else "winograd4") if fits else "direct"
    g = np.eye(kernel)
    if algorithm != "direct":
        g = np.array([[float(one) for one in row] for row in winograd.matrices(int(algorithm[-1]), kernel)[1]])
    of_group = outputs // groups
    depth = channels * kernel**2 if algorithm == "direct" else channels
    planes = 1 if algorithm == "direct" else len(g) ** 2
    packed = np.zeros((groups, -(-of_group // 32), planes, -(-depth // 16) * 16, 32))
    for output, channel in itertools.product(range(outputs), range(channels)):
        group, place = divmod(output, of_group)
        to = packed[group, place // 32, :, :, place % 32]
        transformed = (g @ weight[output, channel] @ g.T).ravel()
        if algorithm == "direct":
            to[0, channel:depth:channels] = transformed
        else:
            to[:, channel] = transformed
    return packed


def refusal(name: str, message: str, overload: str = "conv_pool", **changes: Any) -> Refusal:
    def make() -> Arguments:
        arguments: dict[str, Any] = {"weight": torch.zeros(6, 4, 3, 3), "groups": 2}
        if overload == "conv_pool.pack":
            return (), arguments | changes
        arguments |= {"input": channels_last(torch.zeros(2, 8, 7, 9)), "bias": torch.zeros(6), "pool": True}
        if overload == "conv_pool.mixed":
            for name in ("input", "weight"):
                arguments[name] = arguments[name].half()
            arguments |= {"scale": torch.ones(6), "out": written((2, 6, 2, 3), torch.float16)}
        if overload == "conv_pool.out":
            arguments["packed"] = conv_pool.reference_pack(arguments.pop("weight"), groups=2)
            arguments |= {"kernel_size": 3, "out": written((2, 6, 2, 3))}
            arguments["workspace"] = workspace(1, conv_pool.WORKSPACE)
        return (), arguments | changes

    return Refusal(name, overload, make, f"conv_pool: {message}")


def mixed_refusal(name: str, message: str, **changes: Any) -> Refusal:
    return refusal(f"mixed, {name}", message, "conv_pool.mixed", **changes)


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


REFUSALS = [
    refusal("three dimensions", r"input must be \(N, C, H, W\) with .*got \(8, 7, 9\)", input=torch.zeros(8, 7, 9)),
    refusal("no rows", r"input must be \(N, C, H, W\) with .*got \(2, 8, 0, 9\)", input=torch.zeros(2, 8, 0, 9)),
    refusal("input in half", "input must be float32, got torch.float16", input=_half(2, 8, 7, 9)),
    refusal("weight without outputs", r"weight must be .*got \(0, 4, 3, 3\)", weight=torch.zeros(0, 4, 3, 3)),
    refusal(
        "oblong", r"weight must be \(outputs, channels, k, k\).*got \(6, 4, 3, 4\)", weight=torch.zeros(6, 4, 3, 4)
    ),
    refusal("17 x 17", r"weight must be .* k at most 16, got \(6, 4, 17, 17\)", weight=torch.zeros(6, 4, 17, 17)),
    refusal("weight in float64", "weight must be float32, got torch.float64", weight=torch.zeros(6, 4, 3, 3).double()),
    refusal(
        "too deep",
        "packed must be at most 8064 deep for 64 planes, got 8080",
        input=torch.zeros(2, 8065, 7, 9),
        weight=torch.zeros(2, 8065, 3, 3),
        groups=1,
        bias=None,
    ),
    refusal(
        "too deep to be packed",
        "packed must be at most 6344 deep for 81 planes, got 6352",
        "conv_pool.pack",
        weight=torch.zeros(1, 6345, 4, 4),
        groups=1,
        algorithm="winograd6",
    ),
    refusal("weight elsewhere", "weight must be on .*got", weight=torch.zeros(6, 4, 3, 3, device="meta")),
    refusal("no groups", "groups must be at least 1 and a divisor of 6, the outputs of weight, got 0", groups=0),
    refusal("groups of unequal size", "groups must be at least 1 and a divisor of 6.*, got 4", groups=4),
    refusal("negative groups", "groups must be at least 1 .*got -9223372036854775808", groups=-(2**63)),
    refusal(
        "other channels",
        r"input must be \(N, 8, H, W\) for this weight and groups, got \(2, 7, 7, 9\)",
        input=torch.zeros(2, 7, 7, 9),
    ),
    refusal("other groups", r"input must be \(N, 12, H, W\) for this weight and groups, got \(2, 8", groups=3),
    refusal("padding -1", "padding must be from 0 to 2 for a 3x3 kernel, got -1", padding=-1),
    refusal("padding 3", "padding must be from 0 to 2 for a 3x3 kernel, got 3", padding=3),
    refusal("padding beyond numbers", "padding must be from 0 to 2 .*got 9223372036854775807", padding=2**63 - 1),
    refusal("pool_padding 2", "pool_padding must be 0 or 1, got 2", pool_padding=2),
    refusal("pool_padding alone", "pool_padding must be 0 without pool, got 1", pool=False, pool_padding=1),
    refusal(
        "small input",
        "input must be at least 3x3 pixels for a 3x3 kernel with padding 0, got 2x9",
        pool=False,
        input=torch.zeros(2, 8, 2, 9),
    ),
    refusal(
        "too small to pool",
        "input must be at least 2x2 pixels for a 3x3 kernel with padding 1 and pooling, got 5x1",
        padding=1,
        input=torch.zeros(2, 8, 5, 1),
    ),
    refusal("bias of five", r"bias must be \(6,\), got \(5,\)", bias=torch.zeros(5)),
    refusal("bias in half", "bias must be float32, got torch.float16", bias=_half(6)),
    refusal("bias elsewhere", "bias must be on .*got", bias=torch.zeros(6, device="meta")),
    refusal("packed oblong", r"weight must be .*got \(6, 4, 3, 4\)", "conv_pool.pack", weight=torch.zeros(6, 4, 3, 4)),
    refusal("packed half", "weight must be float32, got torch.float16", "conv_pool.pack", weight=_half(6, 4, 3, 3)),
    refusal("packed in four groups", "groups must be at least 1 and a divisor of 6.*got 4", "conv_pool.pack", groups=4),
    refusal(
        "unknown algorithm",
        "algorithm must be 'auto', 'direct', 'winograd4' or 'winograd6', got 'fft'",
        "conv_pool.pack",
        algorithm="fft",
    ),
    refusal(
        "Winograd for one by one",
        "algorithm must be 'auto' or 'direct' for a 1x1 kernel, got 'winograd4'",
        "conv_pool.pack",
        weight=torch.zeros(6, 4, 1, 1),
        algorithm="winograd4",
    ),
    refusal("into, of no image", r"input must be \(N, C, H, W\)", "conv_pool.out", input=torch.zeros(8, 7, 9)),
    refusal("into, of half", "input must be float32, got", "conv_pool.out", input=_half(2, 8, 7, 9)),
    refusal("kernel 0", "kernel_size must be from 1 to 16, got 0", "conv_pool.out", kernel_size=0),
    refusal("kernel 17", "kernel_size must be from 1 to 16, got 17", "conv_pool.out", kernel_size=17),
    refusal(
        "into, three groups",
        "groups must be at least 1 and a divisor of 8, the channels of input, got 3",
        "conv_pool.out",
        groups=3,
    ),
    refusal("into, padding 3", "padding must be from 0 to 2 for a 3x3 kernel, got 3", "conv_pool.out", padding=3),
    refusal("into, pool_padding 2", "pool_padding must be 0 or 1, got 2", "conv_pool.out", pool_padding=2),
    refusal(
        "into, small",
        "input must be at least 4x4 pixels for a 3x3 kernel with padding 0 and pooling, got 3x9",
        "conv_pool.out",
        input=torch.zeros(2, 8, 3, 9),
    ),
    refusal(
        "output of another size",
        r"out must be \(2, O, 2, 3\) with O a multiple of groups, 2, got \(2, 6, 3, 3\)",
        "conv_pool.out",
        out=written((2, 6, 3, 3)),
    ),
    refusal(
        "output of another batch",
        r"out must be \(2, O, 2, 3\) .*got \(1, 6, 2, 3\)",
        "conv_pool.out",
        out=written((1, 6, 2, 3)),
    ),
    refusal(
        "output of odd channels",
        r"out must be \(2, O, 2, 3\) .*got \(2, 7, 2, 3\)",
        "conv_pool.out",
        out=written((2, 7, 2, 3)),
    ),
    refusal(
        "output in half",
        "out must be float32, got torch.float16",
        "conv_pool.out",
        out=channels_last(_half(2, 6, 2, 3)),
    ),
    refusal(
        "output with planes first",
        r"out must be dense and channels-last, got strides \(36, 6, 3, 1\)",
        "conv_pool.out",
        out=torch.zeros(2, 6, 2, 3),
    ),
    refusal(
        "output with gaps",
        "out must be dense and channels-last, got strides",
        "conv_pool.out",
        out=written((2, 12, 2, 3))[:, :6],
    ),
    refusal(
        "output elsewhere",
        "out must be on .*got",
        "conv_pool.out",
        out=channels_last(torch.zeros(2, 6, 2, 3, device="meta")),
    ),
    refusal(
        "weights of more outputs",
        r"packed must be \(2, 1, 1, 48, 32\) or \(2, 1, 36, 16, 32\) or \(2, 1, 64, 16, 32\), got \(2, 2, 1, 48, 32\)",
        "conv_pool.out",
        packed=torch.zeros(2, 2, 1, 48, 32),
    ),
    refusal(
        "weights of another kernel",
        r"packed must be \(2, 1, 1, 112, 32\), got \(2, 1, 1, 48, 32\)",
        "conv_pool.out",
        kernel_size=5,
        out=written((2, 6, 1, 2)),
        input=channels_last(torch.zeros(2, 8, 6, 8)),
        packed=torch.zeros(2, 1, 1, 48, 32),
    ),
    refusal(
        "weights as they were", r"packed must be .*got \(6, 4, 3, 3\)", "conv_pool.out", packed=torch.zeros(6, 4, 3, 3)
    ),
    refusal("weights in half", "packed must be float32, got", "conv_pool.out", packed=_half(2, 1, 1, 48, 32)),
    refusal(
        "weights with gaps",
        "packed must be contiguous, got strides",
        "conv_pool.out",
        packed=torch.zeros(2, 1, 1, 48, 64)[..., :32],
    ),
    refusal(
        "weights elsewhere",
        "packed must be on .*got",
        "conv_pool.out",
        packed=torch.zeros(2, 1, 1, 48, 32, device="meta"),
    ),
    refusal("into, bias of five", r"bias must be \(6,\), got \(5,\)", "conv_pool.out", bias=torch.zeros(5)),
    mixed_refusal(
        "float64",
        "input must be float32, float16, bfloat16 or float8_e4m3fn, got torch.float64",
        input=torch.zeros(2, 8, 7, 9).double(),
    ),
    mixed_refusal(
        "integers", "weight must be float32, float16, .*got torch.int32", weight=torch.zeros(6, 4, 3, 3).int()
    ),
    mixed_refusal(
        "two dtypes", "weight must be torch.float16 as input is, got torch.float32", weight=torch.zeros(6, 4, 3, 3)
    ),
    mixed_refusal("weight elsewhere", "weight must be on .*got", weight=_half(6, 4, 3, 3).to("meta")),
    mixed_refusal("no channels", r"input must be \(N, C, H, W\) with .*got \(2, 0, 7, 9\)", input=_half(2, 0, 7, 9)),
    mixed_refusal("other channels", r"input must be \(N, 8, H, W\) .*got \(2, 7, 7, 9\)", input=_half(2, 7, 7, 9)),
    mixed_refusal("oblong", r"weight must be .*got \(6, 4, 3, 4\)", weight=_half(6, 4, 3, 4)),
    mixed_refusal("groups", "groups must be at least 1 and a divisor of 6.*, got 4", groups=4),
    mixed_refusal("padding", "padding must be from 0 to 2 for a 3x3 kernel, got 3", padding=3),
    mixed_refusal("pool_padding", "pool_padding must be 0 or 1, got 2", pool_padding=2),
    mixed_refusal("small input", "input must be at least 4x4 pixels .*got 3x9", input=_half(2, 8, 3, 9)),
    mixed_refusal("scale of five", r"scale must be \(6,\), got \(5,\)", scale=torch.ones(5)),
    mixed_refusal("scale in half", "scale must be float32, got torch.float16", scale=torch.ones(6).half()),
    mixed_refusal("bias elsewhere", "bias must be on .*got", bias=torch.ones(6, device="meta")),
    mixed_refusal(
        "output of another size", r"out must be \(2, 6, 2, 3\), got \(2, 6, 3, 3\)", out=written((2, 6, 3, 3))
    ),
    mixed_refusal(
        "output of integers",
        "out must be float32, float16, .*got torch.int8",
        out=channels_last(torch.zeros(2, 6, 2, 3).to(torch.int8)),
    ),
    mixed_refusal(
        "output with planes first", "out must be dense and channels-last, got strides", out=_half(2, 6, 2, 3)
    ),
    mixed_refusal("output elsewhere", "out must be on .*got", out=channels_last(_half(2, 6, 2, 3).to("meta"))),
    refusal(
        "workspace for no thread",
        r"workspace must be \(threads, numbers\) of at least \(1, 2097152\), got \(0, 2097152\)",
        "conv_pool.out",
        workspace=torch.zeros(0, conv_pool.WORKSPACE),
    ),
    refusal("small workspace", r"workspace must be .*got \(2, 99\)", "conv_pool.out", workspace=torch.zeros(2, 99)),
    refusal(
        "workspace of one dimension",
        r"workspace must be .*got \(2097152,\)",
        "conv_pool.out",
        workspace=torch.zeros(conv_pool.WORKSPACE),
    ),
    refusal(
        "workspace of integers",
        "workspace must be float32, got torch.int32",
        "conv_pool.out",
        workspace=torch.zeros(1, conv_pool.WORKSPACE, dtype=torch.int32),
    ),
    refusal(
        "workspace with gaps",
        "workspace must be contiguous, got strides",
        "conv_pool.out",
        workspace=torch.zeros(conv_pool.WORKSPACE, 2).T,
    ),
    refusal(
        "workspace elsewhere",
        "workspace must be on .*got",
        "conv_pool.out",
        workspace=torch.zeros(1, conv_pool.WORKSPACE, device="meta"),
    ),
]
