"""``hard_feature_loss``: the mean of the largest squared differences between the teacher's and the student's features.

Source: SPEC "Training"; paper, section 3.2. ``D = (teacher - student)^2`` for each element, in float32: the difference
is rounded, then its square. ``threshold`` is the exact ``fraction`` quantile of D, as `efficientad_fast.ops.quantile`
defines it; ``loss`` is the mean of the elements of D that are at least ``threshold``. D is never written. Three
overloads:

``hard_feature_loss(teacher, student, fraction=0.999) -> (loss, threshold, count)``

- teacher, student: ``(N, C, h, w)``, of one shape with at least one element, each float32, float16 or bfloat16; any
  strides. The teacher's features are normalised. Kernels read both in place where each is contiguous, or channels-last
  as the other is, or a slice of channels of such a tensor, and may copy what has other strides.
- fraction: in [0, 1]; 0 gives the plain mean squared error.

loss and threshold are float32, count int64, all of shape ``()`` and on the device of teacher: count is how many
elements reach the threshold, all that tie with it among them. A NaN in D makes loss and threshold NaN and count 0, as
does a quantile that is NaN, between a number and an infinity. The same features give the same bits in every run.

Gradients of loss reach teacher and student through the elements that were selected, in each tensor's dtype, by the
overload below; nothing flows through the threshold. A second derivative is refused.

``hard_feature_loss.out(teacher, student, fraction=0.999, *, loss, threshold, count, workspace)``

The same, written into given tensors. workspace is int64 ``(WORKSPACE,)``, contiguous; what it holds before and after
means nothing. Waits for nothing and allocates nothing on a device, where features are read in place. There is no
gradient.

``hard_feature_loss.gradient(teacher, student, threshold, count, grad_loss) -> gradient``

The gradient with respect to student; with both exchanged it is that of teacher. threshold and count are those of the
call before, grad_loss is the gradient with respect to loss, float32 of shape ``()``, on the same device.

gradient has shape and dtype of student: ``2 (student - teacher) grad_loss / count`` where D is at least threshold,
rounded to the dtype, else zero, or NaN where the difference is not finite. It is channels-last where channels of
student are next to each other in memory, else contiguous.

Errors, in one sentence with argument, expected, got: `InputError` of the reference, RuntimeError of compiled kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficientad_fast import ops
from efficientad_fast.errors import InputError
from efficientad_fast.ops import quantile
from efficientad_fast.ops.overload import Overload, require, require_one_device
from efficientad_fast.reference.losses import HARD_FRACTION, select_hard_features

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MOST_PARTS = 1024
"""Sums that a GPU may make of parts of the features before it adds them."""

WORKSPACE = quantile.WORKSPACE + 2 * MOST_PARTS
"""Elements of the workspace: that of the quantile, and a sum and a count for each part."""


def check(teacher: Tensor, student: Tensor, fraction: float) -> None:
    """What every implementation in Python refuses; csrc/hard_feature_loss.h says the same for the compiled ones."""
    check_features(teacher, student)
    require(0 <= fraction <= 1, "hard_feature_loss", "fraction", "a number in [0, 1]", fraction)


def check_features(teacher: Tensor, student: Tensor) -> None:
    shape = tuple(teacher.shape)
    some = len(shape) == 4 and teacher.numel() >= 1
    require(some, "hard_feature_loss", "teacher", "(N, C, h, w) with at least one number", shape)
    require(
        student.shape == teacher.shape, "hard_feature_loss", "student", f"{shape} as teacher is", tuple(student.shape)
    )
    for name, given in (("teacher", teacher), ("student", student)):
        require(given.dtype in DTYPES, "hard_feature_loss", name, "float32, float16 or bfloat16", given.dtype)
    require_one_device("hard_feature_loss", "teacher", teacher.device, {"student": student})


def check_outputs(teacher: Tensor, loss: Tensor, threshold: Tensor, count: Tensor, workspace: Tensor) -> None:
    """What :func:`check` does not know of the overload that writes into given outputs."""
    _check_numbers(teacher, {"loss": loss, "threshold": threshold}, {"count": count})
    expected = (WORKSPACE,)
    require(workspace.shape == expected, "hard_feature_loss", "workspace", str(expected), tuple(workspace.shape))
    require(workspace.dtype == torch.int64, "hard_feature_loss", "workspace", "torch.int64", workspace.dtype)
    contiguous = workspace.is_contiguous()
    require(contiguous, "hard_feature_loss", "workspace", "contiguous", f"strides {workspace.stride()}")
    require_one_device("hard_feature_loss", "teacher", teacher.device, {"workspace": workspace})


def _check_numbers(teacher: Tensor, floats: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
    for dtype, given in ((torch.float32, floats), (torch.int64, counts)):
        for name, one in given.items():
            require(one.dim() == 0, "hard_feature_loss", name, "of shape ()", f"shape {tuple(one.shape)}")
            require(one.dtype == dtype, "hard_feature_loss", name, str(dtype), one.dtype)
        require_one_device("hard_feature_loss", "teacher", teacher.device, given)


def reference(teacher: Tensor, student: Tensor, fraction: float = HARD_FRACTION) -> tuple[Tensor, Tensor, Tensor]:
    check(teacher, student, fraction)
    return select_hard_features(teacher.float(), student.float(), fraction)


def fake(teacher: Tensor, student: Tensor, fraction: float = HARD_FRACTION) -> tuple[Tensor, Tensor, Tensor]:
    check(teacher, student, fraction)
    loss, threshold = (teacher.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, threshold, teacher.new_empty((), dtype=torch.int64)


def reference_out(
    teacher: Tensor,
    student: Tensor,
    fraction: float = HARD_FRACTION,
    *,
    loss: Tensor,
    threshold: Tensor,
    count: Tensor,
    workspace: Tensor,
) -> None:
    fake_out(teacher, student, fraction, loss=loss, threshold=threshold, count=count, workspace=workspace)
    results = reference(teacher, student, fraction)
    for given, result in zip((loss, threshold, count), results, strict=True):
        given.copy_(result)


def fake_out(
    teacher: Tensor,
    student: Tensor,
    fraction: float = HARD_FRACTION,
    *,
    loss: Tensor,
    threshold: Tensor,
    count: Tensor,
    workspace: Tensor,
) -> None:
    check(teacher, student, fraction)
    check_outputs(teacher, loss, threshold, count, workspace)


def has_channels_innermost(student: Tensor) -> bool:
    """Whether channels of student are next to each other in memory: the gradient is channels-last then."""
    return student.stride(1) == 1


def reference_gradient(teacher: Tensor, student: Tensor, threshold: Tensor, count: Tensor, grad_loss: Tensor) -> Tensor:
    gradient = fake_gradient(teacher, student, threshold, count, grad_loss)
    difference = student.float() - teacher.float()
    factor = torch.where(difference**2 >= threshold, grad_loss / count, 0.0)
    return gradient.copy_(factor * (2 * difference))


def fake_gradient(teacher: Tensor, student: Tensor, threshold: Tensor, count: Tensor, grad_loss: Tensor) -> Tensor:
    check_features(teacher, student)
    _check_numbers(teacher, {"threshold": threshold, "grad_loss": grad_loss}, {"count": count})
    channels_last = has_channels_innermost(student)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(student.shape, dtype=student.dtype, device=student.device, memory_format=layout)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    teacher, student, _ = inputs
    _, threshold, count = output
    ctx.mark_non_differentiable(threshold, count)
    ctx.save_for_backward(teacher, student, threshold, count)


def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
    ops.load()
    gradient = torch.ops.efficientad_fast.hard_feature_loss.gradient
    teacher, student, *selection = ctx.saved_tensors
    of_teacher = gradient(student, teacher, *selection, grad_loss) if ctx.needs_input_grad[0] else None
    of_student = gradient(teacher, student, *selection, grad_loss) if ctx.needs_input_grad[1] else None
    return of_teacher, of_student, None


def refuse_second_derivative(ctx: Any, *_: Any) -> None:
    # Without a formula PyTorch would take the gradient for a constant.
    raise InputError(
        "hard_feature_loss: a gradient must be taken once, got a second derivative; leave out create_graph."
    )


overloads = {
    "default": Overload(reference, fake, setup_context, backward),
    "out": Overload(reference_out, fake_out),
    "gradient": Overload(reference_gradient, fake_gradient, backward=refuse_second_derivative),
}
