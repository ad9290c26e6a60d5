"""From features to maps and scores: hand-computed values, both conventions, and other formulations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_close
from formulations import bilinear, bilinear_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, tolerance
from torch import Tensor

from efficientad_fast.reference import maps
from efficientad_fast.reference.maps import Quantiles

QUANTILES = Quantiles(st_start=1.0, st_end=3.0, ae_start=2.0, ae_end=7.0)
MAP = tolerance("map", torch.float64)


def random_map(seed: int, height: int = 11, width: int = 8, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, height, width, generator=generator, dtype=torch.float64) * 4


def zero_padded(raw: Tensor) -> Tensor:
    canvas = raw.new_zeros(*raw.shape[:2], raw.shape[2] + 8, raw.shape[3] + 8)
    canvas[:, :, 4:-4, 4:-4] = raw
    return canvas


def test_feature_distance_is_the_mean_square_over_channels_by_hand() -> None:
    first = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])
    second = torch.tensor([[[[0.0, 2.0]], [[1.0, 3.0]]]])
    distance = maps.feature_distance(first, second)
    assert distance.shape == (1, 1, 1, 2)
    assert distance.flatten().tolist() == [(1 + 4) / 2, (0 + 16) / 2]


def test_raw_maps_by_hand_with_and_without_teacher_statistics() -> None:
    teacher = torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    student = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    autoencoder = torch.tensor([3.0, 10.0]).view(1, 2, 1, 1)
    mean, std = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    # Normalised teacher: (2, 1); the autoencoder is compared with the student's last two as it is.
    map_st, map_ae = maps.raw_maps(teacher, student, autoencoder, mean, std)
    assert (map_st.item(), map_ae.item()) == ((1 + 1) / 2, (0 + 36) / 2)
    map_st, map_ae = maps.raw_maps(teacher, student, autoencoder, None, None)
    assert (map_st.item(), map_ae.item()) == ((16 + 25) / 2, (0 + 36) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_raw_maps_match_the_expanded_square_in_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher, student, autoencoder = draw(2, 24, 5, 7), draw(2, 48, 5, 7), draw(2, 24, 5, 7)
    mean, std = draw(1, 24, 1, 1), draw(1, 24, 1, 1).abs() + 0.5
    features = (tensor.to(dtype) for tensor in (teacher, student, autoencoder, mean, std))
    map_st, map_ae = maps.raw_maps(*features)
    assert map_st.dtype == map_ae.dtype == dtype

    normalised = torch.einsum("nchw,c->nchw", teacher - mean, 1 / std.flatten())
    for result, one, other in ((map_st, normalised, student[:, :24]), (map_ae, autoencoder, student[:, 24:])):
        products = [torch.einsum("nchw,nchw->nhw", a, b) for a, b in ((one, one), (one, other), (other, other))]
        expected = (products[0] - 2 * products[1] + products[2]) / 24
        assert_close(result, expected.unsqueeze(1), tolerance("map", dtype))


def test_quantile_normalisation_maps_start_to_0_and_end_to_a_tenth() -> None:
    raw = torch.tensor([2.0, 6.0, 4.0, 0.0, 10.0], dtype=torch.float64)
    expected = [0.0, 0.1, 0.05, -0.05, 0.2]
    assert_close(maps.normalise_map(raw, 2.0, 6.0), expected, MAP)
    start, end = torch.tensor(2.0, dtype=torch.float64), torch.tensor(6.0, dtype=torch.float64)
    assert_close(maps.normalise_map(raw, start, end), expected, MAP)


def test_equal_quantiles_divide_by_zero_as_the_original_does() -> None:
    result = maps.normalise_map(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0), torch.tensor(2.0))
    assert_close(result, [-math.inf, math.nan, math.inf], EXACT)


def test_pad_map_adds_four_zeros_a_side() -> None:
    raw = random_map(0, 3, 5)
    padded = maps.pad_map(raw)
    assert_close(padded, zero_padded(raw), EXACT)
    assert float(padded.sum()) == pytest.approx(float(raw.sum()), abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 45), st.integers(1, 45))
def test_resize_map_is_a_product_with_bilinear_weights_in_float64(
    height: int, width: int, target_height: int, target_width: int
) -> None:
    raw = random_map(1, height, width)
    size = (target_height, target_width)
    assert_close(maps.resize_map(raw, size), bilinear(raw, size), tolerance("resize", torch.float64))


def test_resize_map_in_float32_matches_float64_at_the_sizes_in_use() -> None:
    raw = random_map(2, 64, 64, count=1)
    resized = maps.resize_map(raw.float(), (256, 300))
    assert resized.dtype == torch.float32
    assert_close(resized, bilinear(raw, (256, 300)), tolerance("resize", torch.float32))


def test_resize_map_doubles_a_row_by_hand() -> None:
    raw = torch.tensor([[[[0.0, 4.0]]]])
    assert maps.resize_map(raw, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert maps.resize_map(raw, [1, 2]).flatten().tolist() == [0.0, 4.0]


def test_combine_by_hand_with_and_without_quantiles() -> None:
    map_st = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    map_ae = torch.tensor([2.0, 7.0, 2.0], dtype=torch.float64)
    assert_close(maps.combine(map_st, map_ae, QUANTILES), [0.0, 0.1, 0.1], MAP)
    assert maps.combine(map_st, map_ae, None).tolist() == [1.5, 5.0, 3.5]


@pytest.mark.parametrize("pad_maps", [False, True])
@pytest.mark.parametrize("quantiles", [QUANTILES, None])
def test_resized_convention_is_pad_resize_normalise_combine(quantiles: Quantiles | None, pad_maps: bool) -> None:
    map_st, map_ae = random_map(3), random_map(4)
    result = maps.combine_resized(map_st, map_ae, quantiles, (31, 40), pad_maps=pad_maps)
    st, ae = (bilinear(zero_padded(raw) if pad_maps else raw, (31, 40)) for raw in (map_st, map_ae))
    assert_close(maps.resized_raw_map(map_st, (31, 40), pad_maps=pad_maps), st, MAP)
    if quantiles is not None:
        st, ae = 0.1 * (st - 1) / (3 - 1), 0.1 * (ae - 2) / (7 - 2)
    assert_close(result, (st + ae) / 2, MAP)


@pytest.mark.parametrize("pad_maps", [False, True])
@pytest.mark.parametrize("quantiles", [QUANTILES, None])
def test_native_convention_is_normalise_combine_pad(quantiles: Quantiles | None, pad_maps: bool) -> None:
    map_st, map_ae = random_map(5), random_map(6)
    result = maps.combine_native(map_st, map_ae, quantiles, pad_maps=pad_maps)
    st, ae = map_st, map_ae
    if quantiles is not None:
        st, ae = 0.1 * (st - 1) / (3 - 1), 0.1 * (ae - 2) / (7 - 2)
    combined = (st + ae) / 2
    assert_close(result, zero_padded(combined) if pad_maps else combined, MAP)


def test_the_border_is_zero_in_the_native_map_and_below_zero_in_the_resized_one() -> None:
    map_st, map_ae = random_map(7), random_map(8)
    native = maps.combine_native(map_st, map_ae, QUANTILES, pad_maps=True)
    assert native[..., 0, 0].tolist() == [[0.0], [0.0]]
    resized = maps.combine_resized(map_st, map_ae, QUANTILES, (38, 32), pad_maps=True)
    # A padded zero is normalised: (0.1 (0 - 1) / 2 + 0.1 (0 - 2) / 5) / 2.
    assert_close(resized[..., 0, 0], [[-0.045], [-0.045]], MAP)


@settings(deadline=None, max_examples=25)
@given(
    starts=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    widths=st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
    pad_maps=st.booleans(),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
)
def test_resized_convention_is_one_resize_of_a_weighted_sum(
    starts: tuple[float, float], widths: tuple[float, float], pad_maps: bool, size: tuple[int, int]
) -> None:
    map_st, map_ae = random_map(9), random_map(10)
    quantiles = Quantiles(starts[0], starts[0] + widths[0], starts[1], starts[1] + widths[1])
    a_st = 0.05 / (quantiles.st_end - quantiles.st_start)
    a_ae = 0.05 / (quantiles.ae_end - quantiles.ae_start)
    weighted = a_st * map_st + a_ae * map_ae
    expected = bilinear(zero_padded(weighted) if pad_maps else weighted, size)
    expected = expected - a_st * quantiles.st_start - a_ae * quantiles.ae_start
    result = maps.combine_resized(map_st, map_ae, quantiles, size, pad_maps=pad_maps)
    assert_close(result, expected, tolerance("map", torch.float64))


def test_the_conventions_differ_on_the_same_maps() -> None:
    map_st, map_ae = random_map(11), random_map(12)
    resized = maps.combine_resized(map_st, map_ae, QUANTILES, (76, 64), pad_maps=True)
    native = maps.resize_map(maps.combine_native(map_st, map_ae, QUANTILES, pad_maps=True), (76, 64))
    assert float((resized - native).abs().max()) > 0.01


def test_the_score_is_the_maximum_of_each_image_alone() -> None:
    anomaly_map = torch.full((3, 1, 4, 5), -2.0)
    anomaly_map[0, 0, 3, 4] = 7.0
    anomaly_map[2, 0, 0, 0] = -1.0
    scores = maps.image_score(anomaly_map)
    assert scores.shape == (3,)
    assert scores.tolist() == [7.0, -2.0, -1.0]


@pytest.mark.parametrize("convention", ["resized", "native"])
@pytest.mark.parametrize("which", ["st", "ae"])
def test_one_nan_in_either_map_makes_that_images_score_nan_and_no_others(convention: str, which: str) -> None:
    map_st, map_ae = random_map(13), random_map(14)
    (map_st if which == "st" else map_ae)[1, 0, 5, 3] = math.nan
    if convention == "resized":
        combined = maps.combine_resized(map_st, map_ae, QUANTILES, (44, 32), pad_maps=True)
    else:
        combined = maps.resize_map(maps.combine_native(map_st, map_ae, QUANTILES, pad_maps=True), (44, 32))
    scores = maps.image_score(combined)
    assert math.isfinite(scores[0].item())
    assert math.isnan(scores[1].item())


def test_a_nan_feature_reaches_the_map_at_its_place_alone() -> None:
    features = torch.zeros(1, 6, 3, 3)
    teacher = torch.zeros(1, 3, 3, 3)
    teacher[0, 2, 1, 0] = math.nan
    map_st, map_ae = maps.raw_maps(teacher, features, torch.zeros(1, 3, 3, 3), None, None)
    assert torch.isnan(map_st).nonzero().tolist() == [[0, 0, 1, 0]]
    assert not bool(torch.isnan(map_ae).any())


def test_the_weight_matrices_of_these_tests_sum_to_one_a_row() -> None:
    for length, target in [(1, 5), (7, 3), (56, 256), (64, 64)]:
        weights = bilinear_weights(length, target)
        assert_close(weights.sum(1), torch.ones(target), tolerance("resize", torch.float64))
    assert_close(bilinear_weights(64, 64), torch.eye(64), EXACT)
