"""Winograd's minimal filtering: the matrices of F(m, r), exactly.

Source: Winograd 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
``y = A^T ((G g) * (B^T d))`` holds m outputs of a correlation of ``d`` with r taps ``g``, from values of polynomials at
m + r - 1 points. csrc/cpu/winograd.h derives the same at compile time and explains it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

Matrix = tuple[tuple[Fraction, ...], ...]

POSITIVE_POINTS: dict[tuple[int, int], tuple[Fraction, ...]] = {
    (4, 3): (Fraction(1), Fraction(2)),
    (4, 4): (Fraction(1), Fraction(2), Fraction(1, 2)),
    (6, 3): (Fraction(1), Fraction(2), Fraction(1, 2)),
    (6, 4): (Fraction(1), Fraction(2), Fraction(1, 2), Fraction(1, 4)),
}
"""By (m, r): points a that stand for the pair a, -a. Zero is one more where the pairs are too few, infinity always."""


@functools.cache
def matrices(m: int, r: int) -> tuple[Matrix, Matrix, Matrix]:
    """``A^T (m, n)``, ``G (n, r)`` and ``B^T (n, n)``, n = m + r - 1.

    Args:
        m, r: outputs and taps, of :data:`POSITIVE_POINTS`.
    """
    points = [signed for positive in POSITIVE_POINTS[m, r] for signed in (positive, -positive)]
    has_zero = len(points) < m + r - 2
    points += [Fraction(0)] * has_zero
    columns, rows_of_g, rows_of_b = [], [], []
    for j, point in enumerate(points):
        others = points[:j] + points[j + 1 :]
        # With this sign a pair's rows of B^T are the sum and the difference of the same two parts; G takes it back.
        sign = -1 if j % 2 == 1 and not has_zero else 1
        norm = sign * _evaluate(_from_roots(others), point)
        columns.append([point**i for i in range(m)])
        rows_of_g.append(tuple(point**k / norm for k in range(r)))
        rows_of_b.append((*(sign * one for one in _from_roots(others)), Fraction(0)))
    columns.append([Fraction(i == m - 1) for i in range(m)])
    rows_of_g.append(tuple(Fraction(k == r - 1) for k in range(r)))
    rows_of_b.append(tuple(_from_roots(points)))
    return tuple(zip(*columns, strict=True)), tuple(rows_of_g), tuple(rows_of_b)


def _from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of all (x - root), of the lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        raised, scaled = [Fraction(0), *coefficients], [*(root * one for one in coefficients), Fraction(0)]
        coefficients = [high - low for high, low in zip(raised, scaled, strict=True)]
    return coefficients


def _evaluate(coefficients: Sequence[Fraction], x: Fraction) -> Fraction:
    return sum((one * x**power for power, one in enumerate(coefficients)), Fraction(0))


def in_float64(matrix: Matrix, device: torch.device) -> Tensor:
    """Each number rounded once, which for ``A^T`` and ``B^T`` changes none."""
    return torch.tensor([[float(one) for one in row] for row in matrix], dtype=torch.float64, device=device)


def transform_weights(weights: Tensor, m: int, r: int) -> Tensor:
    """``G g G^T`` of weights ``(..., k, k)``, k at most r, zeros below and to the right: ``(..., n, n)`` in float64."""
    kernel = weights.shape[-1]
    taps = torch.nn.functional.pad(weights.double(), (0, r - kernel, 0, r - kernel))
    g = in_float64(matrices(m, r)[1], weights.device)
    return g @ taps @ g.T


def recover_weights(transformed: Tensor, m: int, r: int) -> Tensor:
    """Weights ``(..., r, r)`` of ``(..., n, n)``, in float64: the least squares of all n x n values."""
    inverse = torch.linalg.pinv(in_float64(matrices(m, r)[1], torch.device("cpu"))).to(transformed.device)
    weights: Tensor = inverse @ transformed.double() @ inverse.T
    return weights
