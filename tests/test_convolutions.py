"""What kernels of ``conv_pool``, ``feature_distance`` and ``autoencoder`` can get wrong: threads, bytes, images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from assertions import assert_close
from cases import autoencoder as autoencoder_cases
from cases import conv_pool as conv_pool_cases
from cases import feature_distance as feature_distance_cases
from convolution_cases import Change, channels_last, signed
from operator_cases import Case, cases, on_tensors
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast import native, ops
from efficientad_fast.ops import packing

pytestmark = pytest.mark.skipif(not native.is_built("cpu"), reason="there is no CPU library")


def conv_pool(algorithm: str, change: Change = channels_last, threads: int = 1) -> Case:
    shape, options = (3, 34, 23, 27), {"groups": 2, "pool": True, "change": change, "threads": threads}
    return conv_pool_cases.into("of a batch", shape, 70, 4, algorithm, **options)


def feature_distance(algorithm: str, change: Change = channels_last, threads: int = 1) -> Case:
    convolutions = (feature_distance_cases.AE_LAST, feature_distance_cases.S_LAST)
    options: dict[str, Any] = {"algorithm": algorithm, "changes": (change, change), "threads": threads}
    return feature_distance_cases.into("of a batch", 3, (19, 21), 70, *convolutions, **options)


def autoencoder(algorithm: str, change: Change = channels_last, threads: int = 1) -> Case:
    algorithms = dict.fromkeys(range(6, 13), algorithm)
    options: dict[str, Any] = {"algorithms": algorithms, "change": change, "threads": threads}
    channels = autoencoder_cases.ENOUGH
    return autoencoder_cases.into("of a batch", 3, (256, 256), (33, 30), channels, **options)


OPERATORS = (conv_pool, feature_distance, autoencoder)
EVERY = pytest.mark.parametrize(
    ("make", "algorithm"),
    [
        pytest.param(make, algorithm, id=f"{make.__name__}-{algorithm}")
        for make in OPERATORS
        for algorithm in ("direct", "winograd4", "winograd6")
    ],
)


def run(case: Case) -> Tensor:
    ops.load_implementation("cpu")
    return case.run(ops.resolve("efficientad_fast_cpu", case.overload))[0]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@EVERY
def test_the_same_bits_by_any_number_of_threads(
    make: Callable[..., Case], algorithm: str, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    expected = run(make(algorithm))
    for threads, rows in [(1, 3), (2, 1), (2, 2), (3, 3), (3, 2), (5, 7)]:
        set_threads(threads)
        result = run(make(algorithm, threads=rows))
        assert_close(result, expected, EXACT, f"{threads} threads, a workspace for {rows}")


@EVERY
def test_no_image_sees_another(make: Callable[..., Case], algorithm: str, set_threads: Callable[[int], None]) -> None:
    """Not even one full of NaN."""
    set_threads(2)

    def without_the_second(images: Tensor) -> Tensor:
        images[1] = math.nan
        return channels_last(images)

    expected, result = run(make(algorithm)), run(make(algorithm, without_the_second, threads=2))
    assert torch.isnan(result[1]).all()
    assert_close(result[::2], expected[::2], EXACT)


@EVERY
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_bytes_beside_what_is_given_stay(
    make: Callable[..., Case], algorithm: str, offset: int, set_threads: Callable[[int], None]
) -> None:
    """At any alignment; with a workspace for fewer threads than there are."""
    set_threads(3)
    case = make(algorithm, threads=2)
    beside: list[Tensor] = []

    def amid(tensor: Tensor) -> Tensor:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        buffer = torch.full((last + 1 + 128 + offset,), 1e30)
        beside.extend((buffer[: 64 + offset], buffer[64 + offset + last + 1 :]))
        return buffer.as_strided(tensor.shape, tensor.stride(), 64 + offset).copy_(tensor)

    args, kwargs = case.arguments()
    args, kwargs = on_tensors(amid, list(args)), {name: on_tensors(amid, one) for name, one in kwargs.items()}
    ops.load_implementation("cpu")
    ops.resolve("efficientad_fast_cpu", case.overload)(*args, **kwargs)
    assert all(bool(one.eq(1e30).all()) for one in beside)
    assert_close(kwargs["out"], run(case), EXACT)


@pytest.mark.parametrize("make", OPERATORS)
def test_a_nan_reaches_all_that_the_formula_says(make: Callable[..., Case]) -> None:
    """Wherever it lies: in a tile's middle, where tiles overlap, in what fills the last one up."""
    for row, column in [(0, 0), (3, 4), (5, 6), (6, 3), (9, 13), (22, 26)]:

        def change(images: Tensor, row: int = row, column: int = column) -> Tensor:
            images = channels_last(images)
            images[2, 1, min(row, images.shape[2] - 1), min(column, images.shape[3] - 1)] = math.nan
            return images

        case = make("winograd4", change)
        reached, wanted = torch.isnan(run(case)), torch.isnan(case.expected()[0])
        assert wanted.any()
        assert not (wanted & ~reached).any(), f"finite where the reference is NaN, with a NaN at {row}, {column}"
        assert not reached[:2].any()


@pytest.mark.parametrize(("channels", "kernel", "pool"), [(8064, 3, False), (10560, 4, True), (524160, 1, True)])
def test_the_deepest_weights_stay_within_a_thread_s_workspace(channels: int, kernel: int, pool: bool) -> None:
    """One row, with NaN behind it."""
    algorithm = {1: "direct", 3: "winograd6", 4: "winograd4"}[kernel]
    deepest = packing.WORKSPACE // (4 * {1: 1, 3: 64, 4: 49}[kernel]) - 128
    images = signed((1, channels, 5, 6), 0).contiguous(memory_format=torch.channels_last)
    weight = signed((1, channels, kernel, kernel), 1) / channels
    ops.load_implementation("cpu")
    operator = torch.ops.efficientad_fast_cpu.conv_pool
    packed = operator.pack(weight, algorithm=algorithm)
    assert deepest - 16 < packed.shape[3] <= deepest
    rows = torch.full((2, packing.WORKSPACE), math.nan)
    expected = torch.nn.functional.conv2d(images.double(), weight.double())
    if pool:
        expected = torch.nn.functional.avg_pool2d(expected, 2)
    out = torch.empty(expected.shape).contiguous(memory_format=torch.channels_last)
    operator.out(images, packed, kernel_size=kernel, relu=False, pool=pool, out=out, workspace=rows[:1])
    assert torch.isnan(rows[1]).all()
    assert_close(out, expected, tolerance("conv_pool, F(6x6, 4x4)", torch.float32))


@pytest.mark.parametrize("operator", ["conv_pool", "feature_distance", "autoencoder"])
def test_references_in_mixed_precision_as_on_a_gpu(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There they compute in float64: PyTorch convolves no float32 with float64, and TF32 would round scaled weights."""

    def in_float64(given: Tensor | None) -> Tensor | None:
        return None if given is None else given.double()

    monkeypatch.setattr(packing, "exact", in_float64)
    tried = [case for case in cases(operator) if case.overload == f"{operator}.mixed"]
    for case in tried:
        case.check(case.run(ops.overload(case.overload).reference))
    assert tried
