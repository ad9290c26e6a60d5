"""Comparing numbers so that a failure says where, by how much, and how much was allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tolerances import Tolerance
from torch import Tensor


def _in_float64(values: Any) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return tensor.detach().cpu().to(torch.float64)


def _first_index(differs: Tensor) -> tuple[int, ...]:
    return tuple(int(position) for position in differs.nonzero()[0])


def assert_close(actual: Any, expected: Any, tolerance: Tolerance, what: str = "values") -> None:
    """Compare in float64, element by element and as a whole; ``expected`` is the side that is trusted.

    NaN must stand where NaN is expected, and inf where inf of the same sign is; the rest is judged without them.

    Args:
        actual, expected: tensors, arrays or numbers of the same shape; nothing is broadcast.
        tolerance: from the table in ``tolerances``.
        what: names the quantity in the message.

    Raises:
        AssertionError: names the first differing index with both values, the largest absolute difference and the
            global relative error ``||actual - expected|| / ||expected||``.
    """
    a, b = _in_float64(actual), _in_float64(expected)
    if a.shape != b.shape:
        raise AssertionError(f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    special = ~(torch.isfinite(a) & torch.isfinite(b))
    same_special = (torch.isnan(a) & torch.isnan(b)) | (a == b)
    misplaced = special & ~same_special
    if misplaced.any():
        index = _first_index(misplaced)
        raise AssertionError(
            f"{what}: NaN or inf differs first at {index}: got {a[index].item()}, expected {b[index].item()} "
            f"({int(misplaced.sum())} of {a.numel()} elements)"
        )
    a, b = a.masked_fill(special, 0.0), b.masked_fill(special, 0.0)
    difference = (a - b).abs()
    allowed = tolerance.atol + tolerance.rtol * b.abs()
    differs = difference > allowed
    error, size = float(difference.norm()), float(b.norm())
    relative = error / size if size > 0 else (math.inf if error > 0 else 0.0)
    too_far = error > tolerance.norm * size + tolerance.atol * math.sqrt(b.numel())
    if not differs.any() and not too_far:
        return
    whole = (
        f"largest absolute difference {float(difference.max()):.3g}, "
        f"global relative error {relative:.3g} (allowed {tolerance.norm:.3g})"
    )
    if not differs.any():
        raise AssertionError(f"{what}: each element is near enough, but not all together: {whole}")
    index = _first_index(differs)
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {a.numel()} elements differ, first at {index}: got {a[index].item():.17g}, "
        f"expected {b[index].item():.17g}, allowed {allowed[index].item():.3g}; {whole}"
    )
