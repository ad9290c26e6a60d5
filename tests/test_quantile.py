"""Exact quantiles against numpy in float64: any number of values, ties, both zeros, denormals, inf, NaN, any chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pytest
import torch
from assertions import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tolerances import EXACT
from torch import Tensor

from efficientad_fast import native, ops
from efficientad_fast.errors import InputError
from efficientad_fast.ops import quantile as operator
from efficientad_fast.reference.quantile import quantile, streamed_quantiles

FRACTIONS = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.995, 0.999, 1.0]), st.floats(0, 1))
SINGLES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, 65504.0]),
)

Stream = Callable[[Callable[[], Iterable[Tensor]], Sequence[float]], list[float]]
every_stream = pytest.mark.parametrize(
    "streamed", [streamed_quantiles, operator.streamed], ids=["reference", "operator"]
)


def by_numpy(values: np.ndarray, fractions: list[float]) -> np.ndarray:
    return np.asarray(np.quantile(values.astype(np.float64).ravel(), fractions))


def in_chunks(values: Tensor, cuts: Iterable[int]) -> list[Tensor]:
    """``values`` cut at the given places; equal cuts give empty chunks."""
    return list(torch.tensor_split(values, sorted(cut % (len(values) + 1) for cut in cuts)))


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float64,
        st.one_of(st.integers(1, 60), hnp.array_shapes(max_dims=4, max_side=5)),
        elements=st.one_of(st.floats(-1e150, 1e150), st.sampled_from([0.0, -0.0, 2.0, 5e-324, -2.2e-308])),
    ),
    st.lists(FRACTIONS, max_size=4),
)
def test_float64_quantiles_are_numpys(values: np.ndarray, fractions: list[float]) -> None:
    result = quantile(torch.from_numpy(values), fractions)
    assert result.dtype == torch.float64
    assert_close(result, by_numpy(values, fractions), EXACT)


def test_float64_quantiles_between_distant_values_are_numpys_to_the_last_bit() -> None:
    # Neighbours far apart, so that it shows from which of them, and in what order, the interpolation is taken.
    values = np.random.default_rng(0).normal(size=7)
    fractions = list(np.linspace(0, 1, 501))
    assert_close(quantile(torch.from_numpy(values), fractions), by_numpy(values, fractions), EXACT)


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 60), elements=SINGLES), st.lists(FRACTIONS, min_size=1, max_size=4))
def test_float32_quantiles_are_numpys_in_float64_rounded_once(values: np.ndarray, fractions: list[float]) -> None:
    result = quantile(torch.from_numpy(values), fractions)
    assert result.dtype == torch.float32
    assert_close(result, by_numpy(values, fractions).astype(np.float32), EXACT)


def test_interpolation_in_float32_would_round_elsewhere() -> None:
    # A case where the two differ, so that the test above can fail.
    values = np.random.default_rng(0).random(1001).astype(np.float32) * 1e3
    fractions = list(np.linspace(0, 1, 97))
    result = quantile(torch.from_numpy(values), fractions)
    in_float32 = torch.quantile(torch.from_numpy(values), torch.tensor(fractions, dtype=torch.float32))
    assert not torch.equal(result, in_float32)
    assert_close(result, by_numpy(values, fractions).astype(np.float32), EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_quantiles_are_rounded_from_float64(dtype: torch.dtype) -> None:
    values = torch.randn(501, generator=torch.Generator().manual_seed(0)).to(dtype)
    fractions = [0.0, 0.1, 0.33, 0.9, 0.995, 1.0]
    result = quantile(values, fractions)
    assert result.dtype == dtype
    assert_close(result, torch.from_numpy(by_numpy(values.float().numpy(), fractions)).to(dtype), EXACT)


def test_quantile_by_hand() -> None:
    values = torch.tensor([[40.0, 10.0], [30.0, 20.0]])
    assert quantile(values, (0.0, 0.5, 0.9, 1.0)).tolist() == pytest.approx([10.0, 25.0, 37.0, 40.0], rel=1e-6)
    assert quantile(torch.tensor(7.0), (0.0, 0.3, 1.0)).tolist() == [7.0, 7.0, 7.0]
    assert quantile(values, ()).shape == (0,)


@every_stream
@settings(deadline=None)
@given(
    values=hnp.arrays(np.float32, st.integers(1, 80), elements=SINGLES),
    cuts=st.lists(st.integers(0, 80), max_size=6),
    fractions=st.lists(FRACTIONS, min_size=1, max_size=3),
)
@example(values=np.array([-0.0, 0.0, -0.0], dtype=np.float32), cuts=[0, 0, 3, 3], fractions=[0.0, 0.5, 1.0])
@example(values=np.array([-1e-45, 1e-45], dtype=np.float32), cuts=[], fractions=[0.0, 0.75, 1.0])
def test_streamed_quantiles_equal_numpys_bit_for_bit_however_the_stream_is_cut(
    streamed: Stream, values: np.ndarray, cuts: list[int], fractions: list[float]
) -> None:
    chunks = in_chunks(torch.from_numpy(values), cuts)
    results = streamed(lambda: iter(chunks), fractions)
    assert all(isinstance(result, float) for result in results)
    assert_close(results, by_numpy(values, fractions).astype(np.float32), EXACT)


@every_stream
@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1)))
def test_streamed_quantiles_order_every_bit_pattern_as_numpy_does(streamed: Stream, bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    if values.size:
        fractions = [rank / max(values.size - 1, 1) for rank in range(values.size)]
        results = streamed(lambda: [torch.from_numpy(values)], fractions)
        assert_close(results, by_numpy(values, fractions).astype(np.float32), EXACT)


@every_stream
def test_streamed_quantiles_take_chunks_of_any_shape_layout_and_gradient(streamed: Stream) -> None:
    values = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    chunks = [values[0], values[1].T, values[2, :2].clone().requires_grad_(True), values[2, 2:], values[:0]]
    results = streamed(lambda: chunks, (0.1, 0.9))
    assert_close(results, by_numpy(values.numpy(), [0.1, 0.9]).astype(np.float32), EXACT)


@every_stream
def test_streamed_quantiles_read_the_stream_twice_and_hold_no_chunk(streamed: Stream) -> None:
    reads = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal reads
        reads += 1
        buffer = torch.empty(100)
        for start in range(0, 1000, 100):
            # The same memory again and again: a chunk that were kept would change.
            yield torch.arange(start, start + 100, dtype=torch.float32, out=buffer)

    assert streamed(chunks, (0.0, 0.5, 1.0)) == [0.0, 499.5, 999.0]
    assert reads == 2


@every_stream
def test_more_than_2_to_the_24_values_stream_exactly(streamed: Stream) -> None:
    block = torch.arange(1 << 20, dtype=torch.float32)
    more = torch.full((3,), 2.0**20)

    def chunks() -> Iterator[Tensor]:
        yield more
        for _ in range(16):
            yield block

    # Rank r < 2^24 holds r // 16; the three largest values lie beyond 2^24 ranks.
    count = (1 << 24) + 3
    lower, along = divmod(0.9 * (count - 1), 1)
    expected = lower // 16 + (along if lower % 16 == 15 else 0)
    middle, last = streamed(chunks, (0.9, (count - 3) / (count - 1)))
    assert middle == float(np.float32(expected))
    assert last == 2.0**20


def test_more_than_2_to_the_24_values_at_once() -> None:
    values = torch.zeros((1 << 24) + 3)
    values[5], values[-1] = -3.0, 8.0
    assert quantile(values, (0.0, 0.5, 1.0)).tolist() == [-3.0, 0.0, 8.0]


@every_stream
def test_infinite_values_take_part_as_the_largest_and_smallest(streamed: Stream) -> None:
    values = [-math.inf, 1.0, 2.0, 4.0, math.inf]
    fractions = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
    expected = [-math.inf, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf]
    for dtype in (torch.float32, torch.float64):
        assert quantile(torch.tensor(values, dtype=dtype), fractions).tolist() == expected
    assert streamed(lambda: [torch.tensor(values)], fractions) == expected


@every_stream
def test_equal_infinite_neighbours_give_that_infinity(streamed: Stream) -> None:
    values = torch.tensor([math.inf, math.inf, -math.inf, -math.inf])
    assert quantile(values, (0.1, 0.9)).tolist() == [-math.inf, math.inf]
    assert streamed(lambda: [values], (0.1, 0.9)) == [-math.inf, math.inf]


@every_stream
def test_a_quantile_between_a_number_and_an_infinity_is_not_finite(streamed: Stream) -> None:
    values = torch.tensor([-math.inf, 1.0, math.inf])
    fractions = (0.1, 0.25, 0.6, 0.9)
    assert not bool(torch.isfinite(quantile(values, fractions)).any())
    assert not any(math.isfinite(result) for result in streamed(lambda: [values], fractions))


@every_stream
@pytest.mark.parametrize("position", [0, 5, 9])
def test_a_nan_anywhere_makes_every_quantile_nan(streamed: Stream, position: int) -> None:
    values = torch.arange(10, dtype=torch.float32)
    values[position] = math.nan
    assert torch.isnan(quantile(values, (0.0, 0.5, 1.0))).tolist() == [True] * 3
    results = streamed(lambda: values.split(3), (0.0, 0.5, 1.0))
    assert [math.isnan(result) for result in results] == [True] * 3


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    values = torch.ones(3)
    with pytest.raises(InputError, match="between 0 and 1"):
        quantile(values, (0.5, fraction))
    with pytest.raises(InputError, match="between 0 and 1"):
        streamed_quantiles(lambda: [values], (0.5, fraction))


def test_no_values_are_refused() -> None:
    with pytest.raises(InputError, match="at least one value"):
        quantile(torch.empty(0, 3), (0.5,))
    with pytest.raises(InputError, match="at least one value"):
        streamed_quantiles(lambda: [], (0.5,))
    with pytest.raises(InputError, match="at least one value"):
        streamed_quantiles(lambda: [torch.empty(0)], (0.5,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_streams_of_another_dtype_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=str(dtype)):
        streamed_quantiles(lambda: [torch.ones(3, dtype=dtype)], (0.5,))


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan])
def test_the_operator_refuses_a_stream_for_such_a_fraction_unread(fraction: float) -> None:
    def chunks() -> Iterable[Tensor]:
        raise AssertionError("read")

    with pytest.raises(InputError, match=r"fractions must be numbers in \[0, 1\]"):
        operator.streamed(chunks, (0.5, fraction))


def test_the_operator_refuses_streams_of_nothing_and_of_other_dtypes() -> None:
    for nothing in ([], [torch.empty(0)]):
        with pytest.raises(InputError, match="chunks must be at least one number, got none"):
            operator.streamed(lambda nothing=nothing: nothing, (0.5,))
    # Compiled operators raise RuntimeError.
    with pytest.raises((InputError, RuntimeError), match=r"values must be float32, got torch.float64"):
        operator.streamed(lambda: [torch.ones(3, dtype=torch.float64)], (0.5,))
    assert operator.streamed(lambda: [torch.ones(3)], ()) == []


@pytest.mark.skipif(not native.is_built("cpu"), reason=f"no CPU library: {native.why_not_built('cpu')}")
def test_any_number_of_threads_counts_the_same() -> None:
    """More numbers than one thread takes, and more wanted ranks apart from each other than one pass has histograms."""
    ops.load()
    values = torch.randn(1_500_007, generator=torch.Generator().manual_seed(0))
    fractions = [step / 37 for step in range(38)]
    expected = by_numpy(values.numpy(), fractions).astype(np.float32)
    prefixes = list(range(0xBF70, 0xBF90))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_close(torch.ops.efficientad_fast.quantile(values, fractions), expected, EXACT, f"{count} threads")
            for given, shape in (([], (operator.BUCKETS,)), (prefixes, (len(prefixes), operator.BUCKETS))):
                counts, trusted = (torch.ones(shape, dtype=torch.int64) for _ in range(2))
                torch.ops.efficientad_fast.quantile.count(values, given, counts=counts)
                operator.reference_count(values, given, counts=trusted)
                assert_close(counts, trusted, EXACT, f"counts of {len(given)} prefixes by {count} threads")
    finally:
        torch.set_num_threads(threads)
