"""reference/preprocess.py against Pillow, against a dense formulation of the same filter, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL
import pytest
import torch
from assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast.errors import InputError
from efficientad_fast.reference.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_network_size,
    preprocess,
    resize_antialias,
    resize_pillow,
)

BILINEAR = Image.Resampling.BILINEAR
# Since 13, Pillow takes the vertical pass first for some sizes.
PILLOW_KEEPS_ORDER = int(PIL.__version__.split(".")[0]) < 13

sides = st.integers(1, 24) | st.integers(1, 120)
sizes = st.tuples(sides, sides)


def random_image(size: tuple[int, int], seed: int, *, extremes: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if extremes:
        return torch.randint(0, 2, (3, *size), dtype=torch.uint8, generator=generator) * 255
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


def pillow_resize(image: Tensor, *steps: tuple[int, int]) -> Tensor:
    """Through the given sizes (height, width), one after the other."""
    current = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    for height, width in steps:
        current = current.resize((width, height), BILINEAR)
    return torch.from_numpy(np.array(current)).permute(2, 0, 1)


def triangle_filter(length: int, target: int) -> NDArray[np.float64]:
    """The matrix ``(target, length)`` of the antialiased bilinear filter, all inputs at once."""
    scale = length / target
    centres = (np.arange(target)[:, None] + 0.5) * scale
    weights = np.maximum(1 - np.abs(np.arange(length)[None] + 0.5 - centres) / max(scale, 1.0), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@given(source=sizes, target=sizes, seed=st.integers(0, 1000), extremes=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pillow_resize_equals_pillow_bit_for_bit(
    source: tuple[int, int], target: tuple[int, int], seed: int, extremes: bool
) -> None:
    image = random_image(source, seed, extremes=extremes)
    ours = resize_pillow(image, target)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    # One axis at a time, so that every version of Pillow takes the passes in this order.
    assert_close(ours, pillow_resize(image, (source[0], target[1]), target), EXACT)
    at_once = pillow_resize(image, target)
    if PILLOW_KEEPS_ORDER:
        assert_close(ours, at_once, EXACT)
    else:
        assert (ours.int() - at_once.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((512, 512), (256, 256)),
        ((700, 500), (256, 256)),
        ((100, 600), (256, 256)),
        ((257, 255), (256, 256)),
        ((1, 1), (256, 256)),
        ((300, 256), (256, 256)),
        ((900, 3), (1, 2)),
        ((2, 801), (2, 1)),
    ],
)
def test_pillow_resize_at_sizes_in_use(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = random_image(source, 7)
    expected = pillow_resize(image, (source[0], target[1]), target)
    assert_close(resize_pillow(image, target), expected, EXACT)


@pytest.mark.parametrize("axis", [1, 2])
def test_resizing_by_hand(axis: int) -> None:
    def along(values: list[int]) -> Tensor:
        image = torch.tensor(values, dtype=torch.uint8).expand(3, 1, len(values))
        return image if axis == 2 else image.transpose(1, 2)

    def size(length: int) -> tuple[int, int]:
        return (1, length) if axis == 2 else (length, 1)

    # Twice as long: a quarter and three quarters of the way between the centres, the border repeated.
    up = [0, 25, 75, 100]
    assert resize_pillow(along([0, 100]), size(4)).flatten()[:4].tolist() == up
    # Half as long: weights 3/4, 3/4, 1/4 divided by their sum.
    down = [50, 160]
    assert resize_pillow(along([0, 70, 140, 210]), size(2)).flatten()[:2].tolist() == down
    for source, target in (([0, 100], up), ([0, 70, 140, 210], down)):
        floats = resize_antialias(along(source), size(len(target)), torch.float64)
        assert_close(floats[0].flatten() * 255, target, tolerance("resize", torch.float64))


@given(source=sizes, target=sizes, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_antialiased_resize_equals_a_matrix_product(
    source: tuple[int, int], target: tuple[int, int], seed: int
) -> None:
    image = random_image(source, seed)
    rows, columns = triangle_filter(source[0], target[0]), triangle_filter(source[1], target[1])
    expected = torch.from_numpy(rows @ (image.double().numpy() / 255) @ columns.T)
    assert_close(resize_antialias(image, target, torch.float64), expected, tolerance("resize", torch.float64))
    single = resize_antialias(image, target)
    assert single.dtype == torch.float32
    assert_close(single, expected, tolerance("resize", torch.float32))


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
def test_same_size_only_normalises(resize: Any) -> None:
    image = random_image((37, 53), 1)
    result = preprocess(image, (37, 53), resize=resize, dtype=torch.float64)
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        assert_close(result[channel], (image[channel].double() / 255 - mean) / std, tolerance("resize", torch.float64))


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("target", [(7, 90), (64, 31), (1, 1)])
def test_constant_images_stay_constant(resize: Any, value: int, target: tuple[int, int]) -> None:
    image = torch.full((3, 50, 41), value, dtype=torch.uint8)
    result = preprocess(image, target, resize=resize, mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float64)
    assert result.shape == (3, *target)
    allowed = EXACT if resize == "pillow" else tolerance("resize", torch.float64)
    assert_close(result, torch.full_like(result, value / 255), allowed)


def test_normalisation_by_hand() -> None:
    image = torch.tensor([255, 0, 51], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    assert_close(preprocess(image, (2, 2))[:, 1, 1], expected, tolerance("resize", torch.float32))
    plain = preprocess(image, (1, 1), mean=(1, 0, 0.2), std=(1, 2, 0.5), dtype=torch.float64)
    assert_close(plain.flatten(), [0, 0, 0], EXACT)


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
def test_float_and_8_bit_images_agree(resize: Any) -> None:
    image = random_image((45, 30), 3)
    for dtype in (torch.float32, torch.float64):
        from_floats = preprocess(image.to(dtype) / 255, (32, 48), resize=resize)
        assert_close(from_floats, preprocess(image, (32, 48), resize=resize), tolerance("resize", torch.float32))


def test_pillow_resize_rounds_floats_to_8_bits_first() -> None:
    image = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.5 / 255, 2.5 / 255, 1.0], dtype=torch.float64).expand(3, 1, 6)
    assert resize_pillow(image, (1, 6))[0].flatten().tolist() == [0, 0, 1, 2, 2, 255]


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
def test_strides_of_the_image_do_not_matter(resize: Any) -> None:
    image = random_image((40, 61), 5)
    views = (
        image.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        image.transpose(1, 2).contiguous().transpose(1, 2),
        image.flip(2).contiguous().flip(2),
        torch.stack([image, image], dim=3)[..., 0],
    )
    expected = preprocess(image, (33, 70), resize=resize)
    for view in views:
        result = preprocess(view, (33, 70), resize=resize)
        assert result.is_contiguous()
        assert_close(result, expected, tolerance("resize", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    image = random_image((40, 61), 6)
    assert_close(preprocess(image, (32, 32), dtype=dtype), preprocess(image, (32, 32)).to(dtype), EXACT)


@pytest.mark.parametrize("resize", ["antialias", "pillow"])
def test_the_image_is_left_as_it_is(resize: Any) -> None:
    image = random_image((20, 20), 8)
    before = image.clone()
    result = preprocess(image, (20, 20), resize=resize)
    result.zero_()
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (np.zeros((3, 4, 4), np.uint8), {}, r"image is a ndarray; expected a torch\.Tensor"),
        (torch.zeros(4, 4, 3), {}, r"shape \(4, 4, 3\); expected \(3, H, W\)"),
        (torch.zeros(1, 3, 4, 4), {}, r"shape \(1, 3, 4, 4\)"),
        (torch.zeros(3, 0, 4), {}, r"shape \(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), {}, "dtype torch.int64; expected uint8"),
        (torch.zeros(3, 4, 4), {"resize": "bicubic"}, "'bicubic'; expected 'antialias' or 'pillow'"),
        (torch.zeros(3, 4, 4), {"size": (0, 4)}, "size is 0 x 4"),
        (torch.zeros(3, 4, 4), {"mean": (0.5,)}, "expected three numbers"),
        (torch.zeros(3, 4, 4), {"std": (0.5, 0.5, 0)}, "not zero"),
        (torch.zeros(3, 4, 4), {"dtype": torch.uint8}, "expected a floating-point type"),
    ],
)
def test_what_is_refused(image: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        preprocess(image, **{"size": (4, 4), **arguments})


@pytest.mark.parametrize("size", [(256, 256), [256, 300], (np.int64(512), 257)])
def test_admitted_network_sizes(size: Any) -> None:
    height, width = check_network_size(size)
    assert (type(height), type(width)) == (int, int)
    assert (height, width) == tuple(size)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((255, 256), "255 x 256 .* at least 256; the nearest admissible size is 256 x 256"),
        ((300, 64), "nearest admissible size is 300 x 256"),
        ((0, 256), "at least 1 pixel"),
        ((-256, 256), "at least 1 pixel"),
        ((256.0, 256), "two integers"),
        ((True, 256), "two integers"),
        ((256,), "two integers"),
        ((256, 256, 3), "two integers"),
        (256, "two integers"),
        ("256x256", "two integers"),
        (None, "two integers"),
    ],
)
def test_refused_network_sizes(size: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_network_size(size)
