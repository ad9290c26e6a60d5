"""The comparison that the other tests rely on, and the table of tolerances it takes its limits from."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from assertions import assert_close
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, TOLERANCES, Tolerance, tolerance

LOOSE = Tolerance(rtol=0.1, atol=0.0, norm=1.0, reason="for these tests")
TIGHT_NORM = Tolerance(rtol=0.1, atol=0.0, norm=0.01, reason="for these tests")


@given(st.lists(st.floats(), max_size=20))
def test_anything_equals_itself_nan_and_inf_included(values: list[float]) -> None:
    assert_close(torch.tensor(values, dtype=torch.float64), np.array(values, dtype=np.float64), EXACT)


def test_the_message_names_first_index_both_values_largest_difference_and_global_error() -> None:
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    actual = torch.tensor([[3.0, 0.5], [-1.0, 4.0]])
    with pytest.raises(AssertionError) as failure:
        assert_close(actual, expected, LOOSE, "the map")
    message = str(failure.value)
    assert message.startswith("the map: 2 of 4 elements differ, first at (0, 1): got 0.5, expected 0,")
    assert "largest absolute difference 1," in message
    assert f"global relative error {math.sqrt(1.25) / 5:.3g} (allowed 1)" in message


@pytest.mark.parametrize(("difference", "passes"), [(0.0999, True), (0.1001, False), (-0.0999, True), (-0.1001, False)])
def test_the_relative_tolerance_is_a_share_of_the_expected_value(difference: float, passes: bool) -> None:
    expected = torch.tensor([7.0, -7.0], dtype=torch.float64)
    if passes:
        assert_close(expected * (1 + difference), expected, LOOSE)
    else:
        with pytest.raises(AssertionError, match=r"first at \(0,\)"):
            assert_close(expected * (1 + difference), expected, LOOSE)


def test_an_absolute_tolerance_admits_noise_around_an_expected_zero() -> None:
    limits = Tolerance(rtol=0.0, atol=1e-3, norm=0.0, reason="for these tests")
    assert_close([1e-3, 0.0], [0.0, 0.0], limits)
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        assert_close([0.0, 1.1e-3], [0.0, 0.0], limits)


def test_many_small_errors_fail_by_the_global_error_where_no_single_one_does() -> None:
    expected = torch.ones(100)
    assert_close(expected * 1.05, expected, LOOSE)
    with pytest.raises(AssertionError, match=r"not all together.*global relative error 0\.05 \(allowed 0\.01\)"):
        assert_close(expected * 1.05, expected, TIGHT_NORM)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, 1.0),
        (1.0, math.inf),
        (math.inf, -math.inf),
        (math.nan, math.inf),
        (math.inf, math.nan),
    ],
)
def test_nan_and_inf_in_other_places_fail_and_are_named(actual: float, expected: float) -> None:
    with pytest.raises(AssertionError, match=rf"first at \(1,\): got {actual}, expected {expected}"):
        assert_close([1.0, actual, math.nan], [1.0, expected, math.nan], LOOSE)


def test_what_is_beside_nan_and_inf_is_still_compared() -> None:
    special = [math.nan, math.inf, -math.inf]
    with pytest.raises(AssertionError, match=r"first at \(3,\): got 2, expected 1"):
        assert_close([*special, 2.0], [*special, 1.0], LOOSE)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(AssertionError, match=r"shape \(1, 3\), expected \(3,\)"):
        assert_close(torch.ones(1, 3), torch.ones(3), LOOSE)
    with pytest.raises(AssertionError, match=r"shape \(\), expected \(1,\)"):
        assert_close(1.0, [1.0], LOOSE)


def test_dtypes_and_kinds_of_arguments_may_differ() -> None:
    assert_close(torch.ones(2, dtype=torch.bfloat16, requires_grad=True), np.ones(2, dtype=np.float16), EXACT)
    assert_close(1, 1.0, EXACT)
    assert_close(torch.empty(0), np.empty(0), EXACT)


def test_every_tolerance_has_a_reason_and_grows_as_the_dtype_shrinks() -> None:
    by_precision = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for quantity in {quantity for quantity, _ in TOLERANCES}:
        entries = [TOLERANCES[quantity, dtype] for dtype in by_precision if (quantity, dtype) in TOLERANCES]
        assert all(len(entry.reason) > 10 for entry in entries)
        for finer, coarser in itertools.pairwise(entries):
            assert (finer.rtol, finer.atol, finer.norm) <= (coarser.rtol, coarser.atol, coarser.norm)
            assert finer.norm < coarser.norm or finer is coarser is EXACT


def test_a_quantity_without_a_tolerance_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="colour"):
        tolerance("colour", torch.float32)
