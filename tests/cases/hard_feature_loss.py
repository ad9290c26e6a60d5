"""What ``hard_feature_loss`` is tested with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal, numbers
from torch import Tensor

from efficientad_fast.ops.hard_feature_loss import WORKSPACE
from efficientad_fast.reference.quantile import quantile as by_sorting

Shape = tuple[int, int, int, int]
Layout = Callable[[Tensor], Tensor]


def contiguous(features: Tensor) -> Tensor:
    return features


def channels_last(features: Tensor) -> Tensor:
    return features.contiguous(memory_format=torch.channels_last)


def slice_of_channels(features: Tensor) -> Tensor:
    """The first half, as the student's part that predicts the teacher is."""
    return torch.cat([features, torch.full_like(features, 99.0)], 1)[:, : features.shape[1]]


def slice_channels_last(features: Tensor) -> Tensor:
    both = channels_last(torch.cat([features, torch.full_like(features, 99.0)], 1))
    return both[:, : features.shape[1]]


def every_other_column(features: Tensor) -> Tensor:
    return torch.stack([features, torch.full_like(features, 99.0)], -1)[..., 0]


def turned(features: Tensor) -> Tensor:
    """Rows lie where columns do."""
    return features.mT.contiguous().mT


def cropped(features: Tensor) -> Tensor:
    return torch.nn.functional.pad(features, (1, 2, 1, 0), value=99.0)[..., 1:, 1:-2]


LAYOUTS = (
    contiguous,
    channels_last,
    slice_of_channels,
    slice_channels_last,
    every_other_column,
    turned,
    cropped,
)


def features(
    shape: Shape,
    layouts: tuple[Layout, Layout],
    dtypes: tuple[torch.dtype, torch.dtype],
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Teacher and student, in [-1, 3) and [-0.5, 1.5) if ``change`` leaves them."""
    both = change(4 * numbers(shape) - 1, 2 * numbers(shape, seed=1) - 0.5)
    teacher, student = (lay(one.to(dtype)) for one, lay, dtype in zip(both, layouts, dtypes, strict=True))
    return teacher, student


def unchanged(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    return teacher, student


def rounded(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Most squares equal others, those of both signs among them."""
    return teacher.round(), student.round()


def equal(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(teacher, 1.75), torch.full_like(student, 0.5)


def same(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    return teacher, teacher.clone()


def tiny(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Squares below the normal numbers, and zeros."""
    return 1e-21 * teacher, 1e-21 * student


def huge(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Some squares are infinite."""
    return 1e19 * teacher, student


def with_values(
    of_teacher: Sequence[float], of_student: Sequence[float], teacher: Tensor, student: Tensor
) -> tuple[Tensor, Tensor]:
    """The last of the elements are these."""
    for one, special in ((teacher, of_teacher), (student, of_student)):
        one.view(-1)[one.numel() - len(special) :] = torch.tensor(special)
    return teacher, student


NAN = functools.partial(with_values, [math.nan], [])
NEGATIVE_NAN = functools.partial(with_values, [], [-math.nan])
INFINITY = functools.partial(with_values, [math.inf], [])
INFINITIES = functools.partial(with_values, [math.inf, -math.inf, 0.0], [-math.inf, 1.0, math.inf])
SAME_INFINITY = functools.partial(with_values, [math.inf], [math.inf])

SINGLE = (torch.float32, torch.float32)
HALF = (torch.float16, torch.float16)
BRAIN = (torch.bfloat16, torch.bfloat16)
STUDENT_IN_HALF = (torch.float32, torch.float16)
DTYPES = (SINGLE, HALF, BRAIN, STUDENT_IN_HALF)
PLAIN = (contiguous, contiguous)
AS_TRAINED = (channels_last, slice_channels_last)


def case(
    name: str,
    shape: Shape,
    fraction: float = 0.95,
    *,
    layouts: tuple[Layout, Layout] = PLAIN,
    dtypes: tuple[torch.dtype, torch.dtype] = SINGLE,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = unchanged,
    into: bool = False,
) -> Case:
    def make() -> Arguments:
        arguments = (*features(shape, layouts, dtypes, change), fraction)
        if not into:
            return arguments, {}
        return arguments, {
            "loss": torch.tensor(math.nan),
            "threshold": torch.tensor(math.nan),
            "count": torch.tensor(-7),
            # What a workspace holds before means nothing.
            "workspace": torch.full((WORKSPACE,), -7, dtype=torch.int64),
        }

    return Case(name, "hard_feature_loss.out" if into else "hard_feature_loss", make)


def gradient_case(
    name: str,
    shape: Shape,
    threshold: float = 3.0,
    count: int = 77,
    *,
    layouts: tuple[Layout, Layout] = PLAIN,
    dtypes: tuple[torch.dtype, torch.dtype] = SINGLE,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = unchanged,
    grad_loss: float = 100.0,
) -> Case:
    """The count is not that of the elements that reach the threshold: who divides by another finds it out."""

    def make() -> Arguments:
        both = features(shape, layouts, dtypes, change)
        return (*both, torch.tensor(threshold), torch.tensor(count), torch.tensor(grad_loss)), {}

    return Case(name, "hard_feature_loss.gradient", make)


CASES = [
    case("pixel", (1, 1, 1, 1)),
    case("as training has it", (1, 24, 12, 13), 0.999, layouts=AS_TRAINED),
    case("batch as training has it", (3, 16, 5, 7), layouts=AS_TRAINED),
    case("slice of channels", (2, 5, 7, 11), layouts=(contiguous, slice_of_channels)),
    case("slices of channels", (2, 5, 7, 11), layouts=(slice_of_channels, slice_of_channels)),
    case("each in its own layout", (2, 5, 7, 11), layouts=(contiguous, slice_channels_last)),
    case("each in the other's layout", (2, 5, 7, 11), layouts=(slice_channels_last, contiguous)),
    case("every other column", (2, 3, 5, 7), layouts=(every_other_column, contiguous)),
    case("turned", (2, 3, 5, 7), layouts=(contiguous, turned)),
    case("turned, every other column", (2, 3, 5, 7), layouts=(every_other_column, turned)),
    case("cropped", (2, 3, 5, 7), layouts=(cropped, cropped)),
    case("primes", (3, 5, 7, 13), 0.7),
    case("two numbers", (1, 2, 1, 1), 0.25),
    case("a row", (1, 1, 1, 61), 0.5),
    case("a column of one channel", (2, 1, 61, 1), 0.5, layouts=AS_TRAINED),
    case("off by one from blocks", (1, 17, 1, 241), 0.9),
    case("one less than a block", (1, 5, 9, 91), 0.9),
    case("several blocks", (1, 129, 8, 9), 0.999),
    case("several blocks of rows", (2, 129, 6, 7), 0.99, layouts=AS_TRAINED),
    case("several blocks of short rows", (1, 3, 41, 43), 0.99, layouts=AS_TRAINED),
    case("fraction 0", (2, 3, 5, 7), 0.0),
    case("fraction 1", (2, 3, 5, 7), 1.0),
    case("fraction between two ranks", (1, 1, 2, 3), 0.9),
    case("equal", (1, 7, 20, 30), 0.999, change=equal),
    case("no difference", (1, 3, 5, 7), 0.9, change=same),
    case("ties at the threshold", (2, 8, 11, 13), 0.7, change=rounded),
    case("ties at the threshold, fraction 1", (2, 8, 11, 13), 1.0, change=rounded),
    case("tiny", (1, 3, 5, 7), 0.5, change=tiny),
    case("NaN", (1, 3, 5, 7), change=NAN),
    case("negative NaN", (1, 3, 5, 7), 0.0, change=NEGATIVE_NAN),
    case("one infinity", (1, 3, 5, 7), 0.5, change=INFINITY),
    case("one infinity, next to the threshold", (1, 1, 1, 9), 0.9, change=INFINITY),
    case("one infinity, half way", (1, 1, 1, 9), 0.9375, change=INFINITY),
    case("infinities", (1, 3, 5, 7), 1.0, change=INFINITIES),
    case("infinities that are equal", (1, 3, 5, 7), change=SAME_INFINITY),
    case("squares without bounds", (1, 3, 5, 7), 0.9, change=huge),
    case("float16", (2, 5, 7, 11), dtypes=HALF),
    case("float16 as training has it", (2, 5, 7, 11), dtypes=HALF, layouts=AS_TRAINED),
    case("bfloat16", (2, 5, 7, 11), 0.5, dtypes=BRAIN, layouts=(contiguous, every_other_column)),
    case("student in float16", (2, 5, 7, 11), dtypes=STUDENT_IN_HALF, layouts=AS_TRAINED),
    case("into", (2, 16, 5, 7), 0.999, into=True, layouts=AS_TRAINED),
    case("into, equal", (1, 3, 5, 7), into=True, change=equal),
    case("into, NaN", (1, 3, 5, 7), into=True, change=NAN),
    case("into, several blocks", (1, 129, 8, 9), 0.99, into=True, dtypes=STUDENT_IN_HALF),
    gradient_case("pixel", (1, 1, 1, 1), 0.0, 1),
    gradient_case("as training has it", (1, 24, 12, 13), layouts=AS_TRAINED),
    gradient_case("batch as training has it", (3, 16, 5, 7), layouts=AS_TRAINED),
    gradient_case("slice of channels", (2, 5, 7, 11), layouts=(contiguous, slice_of_channels)),
    gradient_case("each in its own layout", (2, 5, 7, 11), layouts=(contiguous, slice_channels_last)),
    gradient_case("each in the other's layout", (2, 5, 7, 11), layouts=(slice_channels_last, contiguous)),
    gradient_case("turned, every other column", (2, 3, 5, 7), layouts=(every_other_column, turned)),
    gradient_case("off by one from blocks", (1, 17, 1, 241)),
    gradient_case("several blocks of short rows", (1, 3, 41, 43), layouts=AS_TRAINED),
    gradient_case("equal", (1, 7, 20, 30), 1.5625, 4200, change=equal),
    gradient_case("ties at the threshold", (2, 8, 11, 13), 4.0, change=rounded),
    gradient_case("nothing is selected", (1, 3, 5, 7), math.nan, 0),
    gradient_case("nothing is selected, NaN", (1, 3, 5, 7), math.nan, 0, change=NAN),
    gradient_case("infinities", (1, 3, 5, 7), 4.0, 5, change=INFINITIES),
    gradient_case("of nothing", (1, 3, 5, 7), grad_loss=0.0),
    gradient_case("float16", (2, 5, 7, 11), dtypes=HALF),
    gradient_case("bfloat16", (2, 5, 7, 11), dtypes=BRAIN, layouts=AS_TRAINED),
    gradient_case("student in float16", (2, 5, 7, 11), dtypes=STUDENT_IN_HALF, layouts=AS_TRAINED),
]


@st.composite
def strategy(draw: Any) -> Case:
    shape = tuple(draw(st.integers(1, most)) for most in (3, 9, 8, 8))
    layouts = tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(2))
    dtypes = draw(st.sampled_from(DTYPES))
    change = draw(st.sampled_from((unchanged, rounded)))
    names = (*(layout.__name__ for layout in layouts), *map(str, dtypes), change.__name__)
    name = f"drawn, {shape}, {', '.join(names)}"
    if draw(st.integers(0, 2)) == 0:
        threshold = draw(st.sampled_from((0.0, 1.0, 2.25, 4.0)))
        return gradient_case(f"{name}, {threshold}", shape, threshold, layouts=layouts, dtypes=dtypes, change=change)
    fraction = draw(st.floats(0, 1))
    into = draw(st.booleans())
    return case(f"{name}, {fraction}", shape, fraction, layouts=layouts, dtypes=dtypes, change=change, into=into)


def expected(case: Case, teacher: Tensor, student: Tensor, *given: Any, **_: Any) -> tuple[Tensor, ...]:
    # What is selected is decided by squares in float32; the rest is in float64.
    squared = (teacher.float() - student.float()) ** 2
    if case.overload == "hard_feature_loss.gradient":
        threshold, count, grad_loss = given
        difference = student.double() - teacher.double()
        factor = torch.where(squared >= threshold, grad_loss.double() / count, 0.0)
        return (2 * factor * difference,)
    (fraction,) = given
    if torch.isinf(squared).any() or torch.isnan(squared).any():
        # NumPy makes NaN of infinities that a quantile does not reach.
        threshold = by_sorting(squared, [fraction])[0]
    else:
        threshold = torch.tensor(np.float32(np.quantile(squared.double().numpy(), fraction)))
    selected = squared.double()[squared >= threshold]
    return selected.mean(), threshold.double(), torch.tensor(selected.numel())


def refusal(name: str, message: str, overload: str = "hard_feature_loss", **changes: Any) -> Refusal:
    def make() -> Arguments:
        arguments: dict[str, Any] = {"teacher": torch.zeros(1, 3, 2, 2), "student": torch.zeros(1, 3, 2, 2)}
        if overload == "hard_feature_loss.gradient":
            arguments |= {
                "threshold": torch.tensor(0.0),
                "count": torch.tensor(12),
                "grad_loss": torch.tensor(1.0),
            }
        if overload == "hard_feature_loss.out":
            arguments |= {
                "loss": torch.tensor(0.0),
                "threshold": torch.tensor(0.0),
                "count": torch.tensor(0),
                "workspace": torch.zeros(WORKSPACE, dtype=torch.int64),
            }
        return (), arguments | changes

    return Refusal(name, overload, make, f"hard_feature_loss: {message}")


INTO, GRADIENT = "hard_feature_loss.out", "hard_feature_loss.gradient"
EMPTY = torch.zeros(0, 3, 2, 2)

REFUSALS = [
    refusal(
        "nothing",
        r"teacher must be \(N, C, h, w\) with at least one number, got \(0, 3, 2, 2\)",
        teacher=EMPTY,
        student=EMPTY,
    ),
    refusal("three axes", r"teacher must be \(N, C, h, w\) .*got \(3, 2, 2\)", teacher=torch.zeros(3, 2, 2)),
    refusal(
        "another shape",
        r"student must be \(1, 3, 2, 2\) as teacher is, got \(1, 6, 2, 2\)",
        student=torch.zeros(1, 6, 2, 2),
    ),
    refusal(
        "teacher in float64",
        "teacher must be float32, float16 or bfloat16, got torch.float64",
        teacher=torch.zeros(1, 3, 2, 2, dtype=torch.float64),
    ),
    refusal(
        "student of integers",
        "student must be float32, float16 or bfloat16, got torch.int32",
        student=torch.zeros(1, 3, 2, 2, dtype=torch.int32),
    ),
    refusal(
        "student elsewhere", "student must be on .*got meta|another", student=torch.zeros(1, 3, 2, 2, device="meta")
    ),
    refusal("below 0", r"fraction must be a number in \[0, 1\], got -0.25", fraction=-0.25),
    refusal("above 1", r"fraction must be a number in \[0, 1\], got 1.5", fraction=1.5),
    refusal("NaN as fraction", r"fraction must be a number in \[0, 1\], got nan", fraction=math.nan),
    refusal("loss of one axis", r"loss must be of shape \(\), got shape \(1,\)", INTO, loss=torch.zeros(1)),
    refusal(
        "threshold in float64",
        "threshold must be torch.float32, got torch.float64",
        INTO,
        threshold=torch.tensor(0.0, dtype=torch.float64),
    ),
    refusal("count in float32", "count must be torch.int64, got torch.float32", INTO, count=torch.tensor(0.0)),
    refusal("loss elsewhere", "loss must be on .*got meta|another", INTO, loss=torch.zeros((), device="meta")),
    refusal(
        "small workspace",
        rf"workspace must be \({WORKSPACE},\), got \(9,\)",
        INTO,
        workspace=torch.zeros(9, dtype=torch.int64),
    ),
    refusal(
        "workspace of floats",
        "workspace must be torch.int64, got torch.float32",
        INTO,
        workspace=torch.zeros(WORKSPACE),
    ),
    refusal(
        "workspace with gaps",
        "workspace must be contiguous, got strides",
        INTO,
        workspace=torch.zeros(2 * WORKSPACE, dtype=torch.int64)[::2],
    ),
    refusal(
        "gradient of nothing",
        r"teacher must be \(N, C, h, w\) with at least one number, got \(0, 3, 2, 2\)",
        GRADIENT,
        teacher=EMPTY,
        student=EMPTY,
    ),
    refusal("thresholds", r"threshold must be of shape \(\), got shape \(2,\)", GRADIENT, threshold=torch.zeros(2)),
    refusal(
        "gradient of the loss in half",
        "grad_loss must be torch.float32, got torch.float16",
        GRADIENT,
        grad_loss=torch.tensor(1.0, dtype=torch.float16),
    ),
    refusal("count of floats", "count must be torch.int64, got torch.float32", GRADIENT, count=torch.tensor(1.0)),
]
