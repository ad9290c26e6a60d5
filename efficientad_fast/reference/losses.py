"""The terms of the training loss. Source: paper, section 3.2 and 3.3, algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor

from efficientad_fast.reference.quantile import quantile

HARD_FRACTION = 0.999
"""Quantile of the squared differences from which on they count: p_hard of the paper."""


def hard_feature_loss(teacher: Tensor, student: Tensor, fraction: float = HARD_FRACTION) -> Tensor:
    """Mean of the squared differences that reach their own ``fraction`` quantile; a scalar.

    Args:
        teacher: normalised teacher features, any shape.
        student: the student's prediction of them, same shape.
        fraction: in [0, 1]; 0 gives the plain mean squared error.
    """
    return select_hard_features(teacher, student, fraction)[0]


def select_hard_features(teacher: Tensor, student: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of :func:`hard_feature_loss`, the quantile, and how many elements reach it, in int64; scalars."""
    squared = (teacher - student) ** 2
    threshold = quantile(squared.detach(), (fraction,))[0]
    selected = squared[squared >= threshold]
    return selected.mean(), threshold, torch.tensor(selected.numel(), device=squared.device)


def penalty_loss(student: Tensor) -> Tensor:
    """Mean square of the student's prediction on an image outside its domain; a scalar."""
    return (student**2).mean()


def mean_squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference over all elements; gradients reach both arguments; a scalar."""
    return torch.mean((first - second) ** 2)
