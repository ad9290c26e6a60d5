"""The augmentation of the autoencoder's images. Source: paper, section 3.3; SPEC "Training", step 3."""

from __future__ import annotations

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


def to_grey(image: Tensor) -> Tensor:
    """Rec. 601 luma of ``(..., 3, H, W)``, repeated over the three channels."""
    weights = torch.tensor(_LUMA, dtype=image.dtype, device=image.device).view(3, 1, 1)
    return (image * weights).sum(-3, keepdim=True).expand_as(image)


def _blend(image: Tensor, other: Tensor, factor: float) -> Tensor:
    return (factor * image + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(image: Tensor, factor: float) -> Tensor:
    """Away from black by ``factor``; ``(3, H, W)`` in [0, 1] to the same."""
    return (image * factor).clamp(0, 1)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Away from the mean grey value by ``factor``; ``(3, H, W)`` in [0, 1] to the same."""
    return _blend(image, to_grey(image).mean(), factor)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Away from grey by ``factor``; ``(3, H, W)`` in [0, 1] to the same."""
    return _blend(image, to_grey(image), factor)


_ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation)


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """One of brightness, contrast and saturation, drawn evenly, changed by a factor from U(0.8, 1.2)."""
    choice = int(torch.randint(len(_ADJUSTMENTS), (), generator=generator))
    factor = 0.8 + 0.4 * torch.rand((), generator=generator).item()
    return _ADJUSTMENTS[choice](image, factor)
