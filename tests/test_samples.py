"""The generated sample set and the endless synthetic images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from efficientad_fast.data.folders import load_mask, open_dataset
from efficientad_fast.data.samples import (
    DEFECTS,
    DESCRIPTION_FILE,
    generate_sample_set,
    mean_image_baseline,
    render_sample,
)
from efficientad_fast.data.textures import synthetic_image
from efficientad_fast.errors import DatasetError, InputError
from efficientad_fast.metrics import image_auroc

PER_DEFECT = 5


def grown(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """The mask and everything within that many pixels of it, rows and columns counted alike."""
    for axis in (0, 1):
        mask = np.any([np.roll(mask, step, axis) for step in range(-pixels, pixels + 1)], axis=0)
    return mask


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "set"
    return generate_sample_set(out, seed=3, train=24, good=20, per_defect=PER_DEFECT, size=128)


def test_the_layout_is_that_of_mvtec_ad(sample_set: Path) -> None:
    dataset = open_dataset(sample_set)
    assert len(dataset.train) == 24
    counted = {kind: sum(image.defect == kind for image in dataset.test) for kind in ("good", *DEFECTS)}
    assert counted == {"good": 20} | dict.fromkeys(DEFECTS, PER_DEFECT)
    assert len(dataset.test) == sum(counted.values())
    for image in dataset.test:
        with Image.open(image.path) as opened:
            assert (opened.mode, opened.size) == ("RGB", (128, 128))
        assert len(image.masks) == (image.defect != "good")
    assert {kind.partition("_")[0] for kind in DEFECTS} == {"structural", "logical"}
    leftovers = [path for path in sample_set.rglob(".*") if path.is_file()]
    assert not leftovers


def test_masks_are_black_and_white_and_lie_on_the_part(sample_set: Path) -> None:
    for image in open_dataset(sample_set).test:
        if not image.masks:
            continue
        with Image.open(image.masks[0]) as opened:
            assert set(np.unique(np.asarray(opened))) == {0, 255}
        mask = load_mask(image.masks, (128, 128))
        share = mask.mean()
        assert 0.0005 < share < 0.1, image.path
        # The part never comes within 4 % of the border of the image.
        assert not mask[:5].any() and not mask[-5:].any() and not mask[:, :5].any() and not mask[:, -5:].any()


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_changes_the_image_inside_its_mask_and_nowhere_else(kind: str) -> None:
    for index in range(4):
        with_defect = render_sample(kind, index, seed=11)
        without = render_sample(kind, index, seed=11, flawless=True)
        assert not without.mask.any()
        difference = np.abs(with_defect.image.astype(np.int16) - without.image).max(axis=2)
        assert difference[~grown(with_defect.mask, 2)].max() <= 2, index
        # Visible: at least half of the marked pixels change by more than the noise of the sensor.
        assert (difference[with_defect.mask] > 8).mean() > 0.5, index


def test_defects_vary_in_place_and_size() -> None:
    for kind in DEFECTS:
        masks = [render_sample(kind, index, seed=5, size=64).mask for index in range(8)]
        centres = [np.argwhere(mask).mean(axis=0) for mask in masks]
        assert np.std(centres, axis=0).max() > 2, kind
        if kind.startswith("structural"):
            areas = [mask.sum() for mask in masks]
            assert max(areas) > 1.3 * min(areas), kind


def test_good_images_have_no_mask_and_no_two_are_alike() -> None:
    images = [render_sample(group, index, size=64) for group in ("train", "good") for index in range(4)]
    assert not any(sample.mask.any() for sample in images)
    assert len({sample.image.tobytes() for sample in images}) == 8


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for out, seed in ((first, 1), (second, 1), (other, 2)):
        generate_sample_set(out, seed=seed, train=1, good=1, per_defect=1, size=64)
    assert contents(first) == contents(second)
    shared = {digest for name, digest in contents(first).items() if "_mask" not in name}
    assert not shared & set(contents(other).values())


def test_a_larger_set_begins_with_the_smaller_one(sample_set: Path) -> None:
    with Image.open(sample_set / "test" / DEFECTS[0] / "001.png") as opened:
        assert np.array_equal(np.asarray(opened), render_sample(DEFECTS[0], 1, seed=3, size=128).image)


def test_an_interrupted_set_is_completed(tmp_path: Path) -> None:
    def make() -> Path:
        return generate_sample_set(str(tmp_path / "set"), seed=1, train=2, good=1, per_defect=1, size=64)

    out = make()
    whole = contents(out)
    kept = out / "train" / "good" / "001.png"
    written = kept.stat().st_mtime_ns
    (out / "train" / "good" / "000.png").unlink()
    (out / "ground_truth" / DEFECTS[0] / "000_mask.png").unlink()
    assert make() == out
    assert contents(out) == whole
    assert kept.stat().st_mtime_ns == written


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "holiday.png").write_bytes(b"precious")
    with pytest.raises(DatasetError, match="not empty"):
        generate_sample_set(foreign, train=1, good=0, per_defect=0, size=64)
    assert [path.name for path in foreign.iterdir()] == ["holiday.png"]
    for description in ("not json", "[1, 2]"):
        (foreign / DESCRIPTION_FILE).write_text(description)
        with pytest.raises(DatasetError, match="not empty"):
            generate_sample_set(foreign, train=1, good=0, per_defect=0, size=64)
    with pytest.raises(DatasetError, match="is a file"):
        generate_sample_set(foreign / "holiday.png", train=1, good=0, per_defect=0, size=64)


def test_a_set_of_other_parameters_is_refused_with_the_difference(tmp_path: Path) -> None:
    generate_sample_set(tmp_path, train=1, good=0, per_defect=0, size=64)
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match="seed 0 there, 5 asked for"):
        generate_sample_set(tmp_path, seed=5, train=1, good=0, per_defect=0, size=64)
    assert contents(tmp_path) == before
    assert json.loads((tmp_path / DESCRIPTION_FILE).read_text())["seed"] == 0


@pytest.mark.parametrize(
    "arguments", [{"train": 0}, {"good": -1}, {"per_defect": -1}, {"size": 63}, {"seed": -1}], ids=str
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(InputError):
        generate_sample_set(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(InputError, match="structural_rust"):
        render_sample("structural_rust", 0)


@pytest.mark.parametrize("reduction", ["max", "mean", "smoothed_max"])
def test_the_difference_from_the_mean_image_does_not_solve_the_set(sample_set: Path, reduction: str) -> None:
    dataset = open_dataset(sample_set)
    scores = mean_image_baseline(dataset.train, [image.path for image in dataset.test], reduction=reduction)
    for part in ("structural", "logical", ""):
        chosen = [i for i, image in enumerate(dataset.test) if image.defect == "good" or image.defect.startswith(part)]
        labels = [dataset.test[i].defect != "good" for i in chosen]
        assert image_auroc([scores[i] for i in chosen], labels) < 0.8, part


@pytest.mark.parametrize("reduction", ["max", "mean", "smoothed_max"])
def test_the_baseline_solves_a_set_without_variation(tmp_path: Path, reduction: str) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for index in range(8):
        pixels = 100 + rng.integers(-3, 4, (64, 64, 3))
        if index >= 6:
            pixels[20:30, 20:30] += 60
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        paths.append(path)
    scores = mean_image_baseline(paths[:4], paths[4:], reduction=reduction)
    assert max(scores[:2]) < min(scores[2:])


def test_the_baseline_reports_the_difference_itself(tmp_path: Path) -> None:
    for name, value in (("dark", 50), ("bright", 70), ("test", 90)):
        Image.new("RGB", (256, 256), (value,) * 3).save(tmp_path / f"{name}.png")
    train, test = [tmp_path / "dark.png", tmp_path / "bright.png"], [tmp_path / "test.png"]
    for reduction in ("max", "mean", "smoothed_max"):
        assert mean_image_baseline(train, test, reduction=reduction) == pytest.approx([30.0])


def test_the_baseline_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"):
        mean_image_baseline([], [tmp_path / "a.png"])
    with pytest.raises(InputError, match="median"):
        mean_image_baseline([tmp_path / "a.png"], [], reduction="median")


@settings(max_examples=15, deadline=None)
@given(index=st.integers(0, 10**9), seed=st.integers(0, 2**63), size=st.integers(16, 90))
def test_any_synthetic_image_can_be_made_again(index: int, seed: int, size: int) -> None:
    image = synthetic_image(index, seed=seed, size=size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.std() > 0
    assert np.array_equal(image, synthetic_image(index, seed=seed, size=size))


def test_synthetic_images_are_diverse() -> None:
    images = np.stack([synthetic_image(index, seed=0, size=96) for index in range(60)]).astype(np.float64)
    assert len({image.tobytes() for image in images}) == 60
    brightness = images.mean(axis=(1, 2, 3))
    contrast = images.std(axis=(1, 2, 3))
    sharpness = np.abs(np.diff(images, axis=2)).mean(axis=(1, 2, 3))
    colour = np.abs(images[..., 0] - images[..., 2]).mean(axis=(1, 2))
    for name, values in (("contrast", contrast), ("sharpness", sharpness), ("colour", colour + 1)):
        low, high = np.percentile(values, (10, 90))
        assert high > 2.5 * low, name
    assert np.ptp(np.percentile(brightness, (10, 90))) > 50


def test_synthetic_images_of_other_seeds_are_other_images() -> None:
    assert not np.array_equal(synthetic_image(0, seed=0, size=32), synthetic_image(0, seed=1, size=32))


@pytest.mark.parametrize("arguments", [{"index": -1}, {"seed": -1}, {"size": 15}], ids=str)
def test_synthetic_images_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(InputError):
        synthetic_image(**({"index": 0, "seed": 0, "size": 64} | arguments))
