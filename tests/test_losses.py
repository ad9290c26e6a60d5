"""The terms of the training loss against hand-computed values and numpy, and where their gradients go.

What ``hard_feature_loss`` computes as an operator is tested by its cases; here, what autograd and compilers make of it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.errors import InputError
from efficientad_fast.reference.losses import HARD_FRACTION, hard_feature_loss, mean_squared_error, penalty_loss

LOSS = tolerance("loss", torch.float64)
LOSS_IN_FLOAT32 = tolerance("loss", torch.float32)


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


def operator(teacher: Tensor, student: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    ops.load()
    return torch.ops.efficientad_fast.hard_feature_loss(teacher, student, fraction)


def features(*shape: int) -> tuple[Tensor, Tensor]:
    """Of few bits, so that all arithmetic is exact and many squares tie; channels-last, the student's twice as many."""
    generator = torch.Generator().manual_seed(2)
    both = [torch.randint(-20, 20, (*shape[:1], channels, *shape[2:]), generator=generator) / 8 for channels in (8, 16)]
    teacher, student = (one.contiguous(memory_format=torch.channels_last) for one in both)
    return teacher, student


@pytest.mark.parametrize("fraction", [0.0, 0.9, 0.99, 1.0])
def test_the_operators_gradients_are_those_of_the_reference(fraction: float) -> None:
    teacher, student = (one.requires_grad_() for one in features(2, 8, 9, 7))
    exact_teacher, exact_student = (one.detach().double().requires_grad_() for one in (teacher, student))
    loss, threshold, count = operator(teacher, student[:, :8], fraction)
    assert not threshold.requires_grad and not count.requires_grad
    exact_loss = hard_feature_loss(exact_teacher, exact_student[:, :8], fraction)
    assert_close(loss, exact_loss, LOSS_IN_FLOAT32)
    gradients = torch.autograd.grad(3 * loss, (teacher, student))
    expected = torch.autograd.grad(3 * exact_loss, (exact_teacher, exact_student))
    for actual, trusted in zip(gradients, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, trusted, LOSS_IN_FLOAT32)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    assert 0 < int(gradients[0].count_nonzero()) <= int(count)


def test_the_operators_gradients_have_the_dtype_of_their_tensor() -> None:
    teacher, student = features(1, 8, 3, 5)
    student = student[:, :8].half().requires_grad_()
    teacher.requires_grad_()
    of_teacher, of_student = torch.autograd.grad(operator(teacher, student, 0.5)[0], (teacher, student))
    assert of_teacher.dtype == torch.float32 and of_student.dtype == torch.float16
    assert_close(of_student, -of_teacher, tolerance("hard_feature_loss", torch.float16))


def test_the_operator_takes_its_threshold_from_the_quantiles_bits() -> None:
    teacher, student = (torch.randn(2, 5, 13, 11, generator=torch.Generator().manual_seed(one)) for one in range(2))
    for fraction in (0.0, 0.5, 0.7, 0.999, 1.0):
        _, threshold, count = operator(teacher, student, fraction)
        squared = (teacher - student) ** 2
        assert_close(threshold, torch.ops.efficientad_fast.quantile(squared, [fraction])[0], EXACT)
        assert int(count) == int((squared >= threshold).sum())


def test_the_operator_reads_what_is_repeated() -> None:
    teacher, student = features(3, 8, 5, 7)
    repeated = teacher[:1].expand(3, -1, -1, -1)
    actual = operator(repeated, student[:, :8], 0.9)
    for one, other in zip(actual, operator(repeated.contiguous(), student[:, :8], 0.9), strict=True):
        assert_close(one, other, EXACT)
    gradient = torch.ops.efficientad_fast.hard_feature_loss.gradient
    selection = (*actual[1:], torch.tensor(2.0))
    of_teacher = gradient(student[:, :8], repeated, *selection)
    assert_close(of_teacher, -gradient(repeated, student[:, :8], *selection), EXACT)


def test_any_number_of_threads_gives_the_operators_bits() -> None:
    # As many as several threads share, in either of the loops.
    teacher, student = (torch.randn(3, 64, 53, 56, generator=torch.Generator().manual_seed(one)) for one in range(2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, threshold, count = operator(teacher, student, 0.3)
            gradient = torch.ops.efficientad_fast.hard_feature_loss.gradient
            results.append((loss, threshold, count, gradient(teacher, student, threshold, count, loss)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert_close(one, same, EXACT)


def test_the_operator_refuses_a_second_derivative() -> None:
    teacher, student = features(1, 8, 3, 5)
    student = student[:, :8].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(operator(teacher, student, 0.5)[0], student, create_graph=True)
    with pytest.raises(InputError, match=r"^hard_feature_loss: .* leave out create_graph\.$"):
        torch.autograd.grad(gradient.sum(), student)


def test_opcheck_of_the_operator_with_gradients() -> None:
    teacher, student = (one.requires_grad_() for one in features(2, 8, 3, 5))
    ops.load()
    function = torch.ops.efficientad_fast.hard_feature_loss.default
    torch.library.opcheck(function, (teacher, student[:, :8], 0.9))
    torch.library.opcheck(function, (teacher.detach(), student[:, :8], 0.9))


def test_a_compiled_step_has_the_operators_gradients() -> None:
    teacher, student = features(2, 8, 3, 5)

    def step(given: Tensor) -> Tensor:
        loss, _, _ = torch.ops.efficientad_fast.hard_feature_loss(teacher, given[:, :8], 0.9)
        return 2 * loss

    ops.load()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (step, compiled):
        leaf = student.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0], EXACT)


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
