"""Metrics against hand-computed values, scikit-learn, scipy and a threshold-by-threshold formulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from efficientad_fast.errors import InputError
from efficientad_fast.metrics import au_pro, image_auroc, label_regions, pixel_auroc, roc_curve

EXACT = 1e-12
"""Both sides are float64 sums of at most a few thousand terms of size one."""


@st.composite
def scores_and_labels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few distinct values, so that ties are the rule; both classes present."""
    labels = draw(hnp.arrays(bool, st.integers(2, 40)).filter(lambda drawn: drawn.any() and not drawn.all()))
    values = st.one_of(st.sampled_from([-1.0, 0.0, 0.25, 3.0]), st.floats(-1e6, 1e6))
    return draw(hnp.arrays(np.float64, labels.size, elements=values)), labels


@st.composite
def maps_and_masks(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps of different sizes with many ties; at least one defective and one good pixel."""
    maps, masks = [], []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        levels = draw(st.sampled_from([2, 5, 1000]))
        maps.append(draw(hnp.arrays(np.int64, shape, elements=st.integers(0, levels))).astype(np.float32) / 8)
        masks.append(draw(hnp.arrays(bool, shape)))
    masks[0][0, 0] = True
    maps.append(np.array([[0.5, 60.0]], dtype=np.float32))
    masks.append(np.zeros((1, 2), dtype=bool))
    return maps, masks


def test_image_auroc_by_hand() -> None:
    # Pairs (anomalous, good): 0.8 beats both, 0.4 beats 0.1 and ties with 0.4: 3.5 of 4.
    assert image_auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1]) == 3.5 / 4
    assert image_auroc([1, 2, 3, 4], [False, False, True, True]) == 1.0
    assert image_auroc([1, 2, 3, 4], [True, True, False, False]) == 0.0
    assert image_auroc([7, 7, 7], [0, 1, 1]) == 0.5
    assert image_auroc([-np.inf, np.inf, np.inf], [0, 1, 0]) == 0.75


@given(scores_and_labels())
@settings(deadline=None, derandomize=True)
def test_image_auroc_and_roc_curve_agree_with_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = case
    assert image_auroc(scores, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=EXACT)
    expected = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(scores, labels), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=EXACT, rtol=0)


@given(scores_and_labels())
@settings(deadline=None, derandomize=True)
def test_image_auroc_turns_with_the_scores_and_ignores_their_scale(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = case
    area = image_auroc(scores, labels)
    assert image_auroc(-scores, labels) == pytest.approx(1 - area, abs=EXACT)
    assert image_auroc(4 * scores, labels) == area


def test_roc_curve_by_hand() -> None:
    fpr, tpr, thresholds = roc_curve([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0])
    assert fpr.tolist() == [0.0, 0.0, 0.5, 1.0]
    assert tpr.tolist() == [0.0, 0.5, 1.0, 1.0]
    assert thresholds.tolist() == [np.inf, 0.9, 0.5, 0.1]


@pytest.mark.parametrize("function", [image_auroc, roc_curve])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [0, 1], "Score 1 is NaN"),
        ([0.1, 0.2], [1, 1], "2 anomalous and 0 good"),
        ([0.1, 0.2], [0, 0], "0 anomalous and 2 good"),
        ([], [], "0 anomalous and 0 good"),
        ([0.1, 0.2], [0, 2], "0 .good. and 1"),
        ([0.1, 0.2, 0.3], [0, 1], "one length"),
        ([[0.1, 0.2]], [[0, 1]], "two vectors"),
    ],
)
def test_image_scores_that_have_no_auroc_are_refused(function, scores, labels, message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(scores, labels)


def test_regions_touching_at_a_corner_are_one() -> None:
    labels, count = label_regions([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert count == 3
    assert labels.tolist() == [[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0], [3, 3, 0, 0]]


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=14)))
@settings(deadline=None, derandomize=True)
def test_regions_agree_with_scipy(mask: np.ndarray) -> None:
    labels, count = label_regions(mask)
    expected, expected_count = ndimage.label(mask, structure=np.ones((3, 3)))
    assert count == expected_count
    assert labels.dtype == np.int32
    # Up to their numbering: each of our numbers meets exactly one of theirs.
    pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == count + (not mask.all())
    assert np.array_equal(labels > 0, mask)


def test_regions_of_a_spiral_and_of_noise() -> None:
    spiral = np.zeros((64, 64), dtype=bool)
    for ring in range(0, 30, 4):
        spiral[ring, ring : 64 - ring] = spiral[ring : 64 - ring, 63 - ring] = True
        spiral[63 - ring, ring : 64 - ring] = spiral[ring + 2 : 64 - ring, ring] = True
        spiral[ring + 2, ring : ring + 5] = True
    noise = np.random.default_rng(0).random((256, 256)) < 0.35
    for mask in (spiral, noise):
        assert label_regions(mask)[1] == ndimage.label(mask, structure=np.ones((3, 3)))[1]


def test_pixel_auroc_by_hand() -> None:
    maps = [np.array([[0.1, 0.4]], np.float32), np.array([[0.4], [0.8]], np.float32)]
    masks = [np.zeros((1, 2), bool), np.array([[255], [255]], np.uint8)]
    assert pixel_auroc(maps, masks) == 3.5 / 4


@given(maps_and_masks())
@settings(deadline=None, derandomize=True)
def test_pixel_auroc_agrees_with_scikit_learn(case: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    maps, masks = case
    scores = np.concatenate([values.ravel() for values in maps])
    labels = np.concatenate([mask.ravel() for mask in masks])
    assert pixel_auroc(maps, masks) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=EXACT)


def au_pro_by_threshold(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """The definition: sweep all thresholds, measure every region, integrate the broken line up to the limit."""
    regions = []
    for values, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [values[labels == number] for number in range(1, count + 1)]
    good = np.concatenate([values[~mask] for values, mask in zip(maps, masks, strict=True)])
    thresholds = np.unique(np.concatenate([values.ravel() for values in maps]))[::-1]
    fpr = np.array([0.0] + [np.mean(good >= threshold) for threshold in thresholds])
    pro = np.array([0.0] + [np.mean([np.mean(r >= threshold) for r in regions]) for threshold in thresholds])
    inside = fpr <= limit
    last = int(np.flatnonzero(inside)[-1])
    x, y = fpr[inside], pro[inside]
    if fpr[last] < limit:
        share = (limit - fpr[last]) / (fpr[last + 1] - fpr[last])
        x, y = np.append(x, limit), np.append(y, pro[last] + share * (pro[last + 1] - pro[last]))
    return float(np.trapezoid(y, x)) / limit


@given(maps_and_masks(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
@settings(deadline=None, derandomize=True)
def test_au_pro_agrees_with_its_definition(case: tuple[list[np.ndarray], list[np.ndarray]], limit: float) -> None:
    maps, masks = case
    assert au_pro(maps, masks, limit) == pytest.approx(au_pro_by_threshold(maps, masks, limit), abs=1e-10)


def test_au_pro_by_hand() -> None:
    # Good pixels 4, 3, 2, 1. The region of one pixel (5) lies above all of them; of the region of two, one pixel
    # (3) ties with the second good one and one (0) lies below all.
    values = np.array([[5, 9, 3, 0, 9, 4, 3, 2, 1]], dtype=np.float64)
    values[values == 9] = -1
    mask = np.array([[1, 0, 1, 1, 0, 0, 0, 0, 0]])
    # Good pixels including the two separators at -1: six. FPR 1/6 after 4; the tie at 3 rises from 1/6 to 2/6.
    limit = 0.5
    single = limit
    tied = (2 / 6 - 1 / 6) / 2 + (limit - 2 / 6)
    assert au_pro([values], [mask], limit) == pytest.approx((single + (tied + 0.0) / 2) / 2 / limit, abs=EXACT)
    # A limit inside the tie: the ramp has come half its way.
    limit = 0.25
    tied = (0.25 - 1 / 6) * 0.5 / 2
    assert au_pro([values], [mask], limit) == pytest.approx((limit + tied / 2) / 2 / limit, abs=EXACT)


def test_au_pro_weighs_regions_equally_and_pixel_auroc_does_not() -> None:
    values = np.full((32, 32), 0.5)
    mask = np.zeros((32, 32), dtype=bool)
    mask[2, 2] = mask[10:26, 10:26] = True
    values[2, 2], values[10:26, 10:26] = 0.0, 1.0
    assert au_pro([values], [mask]) == 0.5
    assert pixel_auroc([values], [mask]) == pytest.approx(256 / 257)
    perfect = mask.astype(np.float16)
    assert au_pro([perfect], [mask]) == 1.0
    assert au_pro([1 - perfect], [mask]) == 0.0


@pytest.mark.parametrize("function", [pixel_auroc, au_pro])
@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([np.zeros((2, 2))], [], "1 maps and 0 masks"),
        ([np.zeros((2, 2))], [np.zeros((2, 3))], r"\(2, 2\) and \(2, 3\)"),
        ([np.zeros(4)], [np.zeros(4)], "two-dimensional"),
        ([np.zeros((1, 2)), np.array([[0, np.nan]])], [np.eye(1, 2)] * 2, "Map 1 holds NaN"),
        ([np.zeros((2, 2))], [np.zeros((2, 2))], "all masks are empty"),
        ([np.zeros((2, 2))], [np.ones((2, 2))], "at least one good pixel"),
    ],
)
def test_maps_that_have_no_figure_are_refused(function, maps, masks, message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(maps, masks)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.5, float("nan")])
def test_au_pro_refuses_a_limit_outside_its_range(limit: float) -> None:
    with pytest.raises(InputError, match="fpr_limit"):
        au_pro([np.eye(2)], [np.eye(2)], limit)
