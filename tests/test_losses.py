"""The terms of the training loss against hand-computed values and numpy, and where their gradients go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tolerances import EXACT, tolerance

from efficientad_fast.reference.losses import HARD_FRACTION, hard_feature_loss, mean_squared_error, penalty_loss

LOSS = tolerance("loss", torch.float64)


def hard_loss_by_numpy(teacher: np.ndarray, student: np.ndarray, fraction: float) -> float:
    squared = (teacher - student) ** 2
    return float(squared[squared >= np.quantile(squared, fraction)].mean())


def test_hard_loss_by_hand() -> None:
    teacher = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0]])
    student = torch.zeros(1, 5)
    # Squares 1, 4, 9, 16, 25. Quantile 0.5 is 9, reached by three; 0.6 is 11.8, reached by two.
    assert hard_feature_loss(teacher, student, 0.5).item() == pytest.approx((9 + 16 + 25) / 3, rel=1e-6)
    assert hard_feature_loss(teacher, student, 0.6).item() == pytest.approx((16 + 25) / 2, rel=1e-6)
    assert hard_feature_loss(teacher, student, 1.0).item() == 25.0
    assert hard_feature_loss(teacher, student, 0.0).item() == 11.0


def test_hard_loss_takes_the_thousandth_part_unless_told_otherwise() -> None:
    assert HARD_FRACTION == 0.999
    student = torch.arange(2001, dtype=torch.float64).sqrt()
    # The squares are 0 ... 2000 and their 0.999 quantile is 1998.
    assert_close(hard_feature_loss(torch.zeros_like(student), student), 1999.0, LOSS)


@settings(deadline=None)
@given(
    teacher=hnp.arrays(np.float64, (2, 3, 5), elements=st.floats(-10, 10)),
    levels=st.sampled_from([None, 1.0, 5.0]),
    fraction=st.sampled_from([0.0, 0.3, 0.9, 0.95, 0.999, 1.0]),
)
def test_hard_loss_matches_numpy_ties_included(teacher: np.ndarray, levels: float | None, fraction: float) -> None:
    if levels is not None:
        teacher = np.round(teacher / levels) * levels
    student = np.linspace(-1, 1, 30).round(0).reshape(2, 3, 5)
    result = hard_feature_loss(torch.from_numpy(teacher), torch.from_numpy(student), fraction)
    assert result.shape == ()
    assert_close(result, hard_loss_by_numpy(teacher, student, fraction), LOSS)


def test_all_elements_that_tie_with_the_quantile_count() -> None:
    teacher = torch.tensor([0.0, 3.0, 3.0, 3.0], requires_grad=True)
    loss = hard_feature_loss(teacher, torch.zeros(4), 0.999)
    assert loss.item() == 9.0
    loss.backward()
    assert teacher.grad is not None
    assert teacher.grad.tolist() == [0.0, 2.0, 2.0, 2.0]


def test_hard_loss_gradient_reaches_only_what_was_selected() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 4, 10, 10, generator=generator, dtype=torch.float64)
    student = torch.randn(1, 4, 10, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    hard_feature_loss(teacher, student, 0.9).backward()
    squared = ((teacher - student) ** 2).detach().numpy()
    selected = squared >= np.quantile(squared, 0.9)
    assert 0 < selected.sum() < selected.size
    expected = np.where(selected, 2 * (student.detach().numpy() - teacher.numpy()) / selected.sum(), 0.0)
    assert student.grad is not None
    assert_close(student.grad, expected, LOSS)


def test_hard_loss_of_identical_features_is_zero() -> None:
    features = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert hard_feature_loss(features, features).item() == 0.0


def test_hard_loss_with_a_nan_is_nan() -> None:
    assert torch.isnan(hard_feature_loss(torch.tensor([1.0, float("nan"), 2.0]), torch.zeros(3), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_a_real_size_match_numpy_and_keep_the_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(1, 384, 12, 12, generator=generator, dtype=dtype) for _ in range(2))
    a, b = teacher.double().numpy(), student.double().numpy()
    expected = [hard_loss_by_numpy(a, b, 0.999), float((b**2).mean()), float(((a - b) ** 2).mean())]
    results = [hard_feature_loss(teacher, student), penalty_loss(student), mean_squared_error(teacher, student)]
    assert {result.dtype for result in results} == {dtype}
    for result, value in zip(results, expected, strict=True):
        assert_close(result, value, tolerance("loss", dtype))


def test_penalty_is_the_mean_square_and_pulls_towards_zero() -> None:
    student = torch.tensor([1.0, -2.0, 3.0, 0.0], requires_grad=True)
    loss = penalty_loss(student)
    loss.backward()
    assert loss.item() == (1 + 4 + 9) / 4
    assert student.grad is not None
    assert student.grad.tolist() == [0.5, -1.0, 1.5, 0.0]


def test_mean_squared_error_by_hand_with_gradients_for_both_arguments() -> None:
    first = torch.tensor([1.0, 5.0], requires_grad=True)
    second = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = mean_squared_error(first, second)
    loss.backward()
    assert loss.item() == (4 + 16) / 2
    assert first.grad is not None and second.grad is not None
    assert first.grad.tolist() == [-2.0, 4.0]
    assert_close(second.grad, -first.grad, EXACT)
