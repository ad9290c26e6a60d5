"""The layers once more, each in another way than PyTorch computes it: what the networks are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def convolution(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution as one matrix product: every window unfolded to a row, every kernel to a column."""
    batch, channels, height, width = x.shape
    out, _, kernel, _ = weight.shape
    canvas = x.new_zeros(batch, channels, height + 2 * padding, width + 2 * padding)
    canvas[:, :, padding : padding + height, padding : padding + width] = x
    windows = canvas.unfold(2, kernel, stride).unfold(3, kernel, stride)
    rows, columns = windows.shape[2:4]
    unfolded = windows.permute(0, 2, 3, 1, 4, 5).reshape(batch * rows * columns, -1)
    product = unfolded @ weight.reshape(out, -1).T + bias
    return product.reshape(batch, rows, columns, out).permute(0, 3, 1, 2)


def average_pool(x: Tensor, *, padding: int = 0) -> Tensor:
    """2x2 average pooling with stride 2 as a quarter of four pixels; padded zeros count as pixels."""
    batch, channels, height, width = x.shape
    canvas = x.new_zeros(batch, channels, height + 2 * padding, width + 2 * padding)
    canvas[:, :, padding : padding + height, padding : padding + width] = x
    rows, columns = canvas.shape[2] // 2 * 2, canvas.shape[3] // 2 * 2
    even, odd = canvas[:, :, 0:rows:2], canvas[:, :, 1:rows:2]
    corners = (even[..., 0:columns:2], even[..., 1:columns:2], odd[..., 0:columns:2], odd[..., 1:columns:2])
    return sum(corners[1:], corners[0]) / 4


def bilinear_weights(length: int, target: int) -> Tensor:
    """``(target, length)`` float64: row ``i`` weighs the input samples of output ``i``, pixel areas aligned."""
    weights = torch.zeros(target, length, dtype=torch.float64)
    for row in range(target):
        centre = max((row + 0.5) * length / target - 0.5, 0.0)
        near = int(centre)
        weights[row, near] += 1 - (centre - near)
        weights[row, min(near + 1, length - 1)] += centre - near
    return weights


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of float64 ``(..., H, W)`` as a product with a matrix from each side."""
    return bilinear_weights(x.shape[-2], size[0]) @ x @ bilinear_weights(x.shape[-1], size[1]).T
