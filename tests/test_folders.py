"""data/folders.py: what is found in which layout, what is refused, masks, and the draw of validation images."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from efficientad_fast.data.decode import FORMATS
from efficientad_fast.data.folders import (
    IMAGE_SUFFIXES,
    list_images,
    load_mask,
    open_dataset,
    split_validation,
)
from efficientad_fast.errors import DatasetError, ImageError, InputError


def touch(root: Path, *names: str) -> Path:
    """Files that no test opens."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def relative(root: Path, paths: Any) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_suffixes_are_those_of_readable_formats() -> None:
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in IMAGE_SUFFIXES} <= set(FORMATS)


# list_images


def test_images_are_found_below_and_sorted_as_text(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.JPG", "a/z.png", "a-b/a.tiff", "a/b/c.Bmp", "B.png", "notes.txt", "png", "x.png.part")
    assert relative(tmp_path, list_images(tmp_path)) == [
        "B.png",
        "a-b/a.tiff",
        "a.JPG",
        "a/b/c.Bmp",
        "a/z.png",
        "b.png",
    ]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path / ".cache", "a.png", ".b.png", ".hidden/c.png", "d/.e.png")
    assert relative(tmp_path / ".cache", list_images(tmp_path / ".cache")) == ["a.png"]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.png/b.png")
    assert relative(tmp_path, list_images(tmp_path)) == ["a.png/b.png"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "z/a.png")
    touch(tmp_path / "elsewhere", "b.png")
    links = {"loop": root, "z/up": root, "itself": root / "itself", "out": tmp_path / "elsewhere", "again": root / "z"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "file.png").symlink_to(root / "z" / "a.png")
    (root / "broken.png").symlink_to(root / "missing.png")
    # Decoding will name the broken link; leaving it out would hide it.
    assert relative(root, list_images(root)) == ["broken.png", "file.png", "out/b.png", "z/a.png"]


def test_names_of_any_bytes_are_listed(tmp_path: Path) -> None:
    names = ["a b.png", "a\nb.png", "\udcff/\udcfe.png", "-o.png", "*.png", "$x$.png", "\\.png"]
    touch(tmp_path, *names)
    assert relative(tmp_path, list_images(tmp_path)) == sorted(names)


def test_a_folder_of_100000_files_is_listed_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, number: int) -> None:
            self.name = f"{number * 7919 % 100_000:05d}.png"

        def is_dir(self) -> bool:
            return False

    class Entries(list[Entry]):
        def __enter__(self) -> Entries:
            return self

        def __exit__(self, *error: object) -> None: ...

    # Making them takes longer than listing them.
    monkeypatch.setattr(os, "scandir", lambda folder: Entries(Entry(number) for number in range(100_000)))
    before = time.process_time()
    images = list_images(Path())
    assert time.process_time() - before < 5
    assert [image.name for image in images] == [f"{number:05d}.png" for number in range(100_000)]


@pytest.mark.parametrize("names", [(), ("notes.txt", "sub/data.csv"), (".hidden.png",)])
def test_folders_without_images(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DatasetError, match=r"no images here or in folders below.*\.bmp.*\.jpg.*\.png") as raised:
        list_images(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="missing: no such folder"):
        list_images(tmp_path / "missing")
    with pytest.raises(DatasetError, match=r"file\.png: is not a folder"):
        list_images(touch(tmp_path, "file.png") / "file.png")
    with pytest.raises(DatasetError, match="cannot be read"):
        list_images(tmp_path / ("a" * 5000))


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "sub/b.png")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=r"sub: cannot be read .*Permission denied"):
        list_images(tmp_path)


# open_dataset


def test_a_flat_folder(tmp_path: Path) -> None:
    touch(tmp_path / "bolts", "b.png", "a/c.png")
    dataset = open_dataset(str(tmp_path / "bolts"))
    assert dataset.root == tmp_path / "bolts"
    assert dataset.name == "bolts"
    assert relative(dataset.root, dataset.train) == ["a/c.png", "b.png"]
    assert dataset.validation == dataset.test == ()


def test_the_name_of_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "bolts", "b.png")
    monkeypatch.chdir(tmp_path / "bolts")
    assert open_dataset(".").name == "bolts"


def test_mvtec_ad_layout(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/good/001.png",
        "train/good/000.png",
        "train/defects_for_later/000.png",
        "test/good/000.png",
        "test/crack/000.png",
        "test/crack/001.png",
        "test/dent/000.jpg",
        "test/dent/deep/000.jpg",
        "ground_truth/crack/000_mask.png",
        "ground_truth/dent/000_mask.png",
        "ground_truth/dent/deep/000_mask.bmp",
        "ground_truth/good/000_mask.png",
        "readme.txt",
        "overview.png",
    )
    (tmp_path / "test" / "empty").mkdir()
    dataset = open_dataset(tmp_path)
    assert relative(tmp_path, dataset.train) == ["train/good/000.png", "train/good/001.png"]
    assert dataset.validation == ()
    found = [
        (*relative(tmp_path, [image.path]), image.defect, relative(tmp_path, image.masks)) for image in dataset.test
    ]
    assert found == [
        ("test/crack/000.png", "crack", ["ground_truth/crack/000_mask.png"]),
        ("test/crack/001.png", "crack", []),
        ("test/dent/000.jpg", "dent", ["ground_truth/dent/000_mask.png"]),
        ("test/dent/deep/000.jpg", "dent", ["ground_truth/dent/deep/000_mask.bmp"]),
        ("test/good/000.png", "good", []),
    ]


def test_mvtec_loco_layout(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/good/000.png",
        "validation/good/000.png",
        "validation/good/001.png",
        "test/good/000.png",
        "test/logical_anomalies/000.png",
        "test/structural_anomalies/007.png",
        "ground_truth/logical_anomalies/000/001.png",
        "ground_truth/logical_anomalies/000/000.png",
        "ground_truth/structural_anomalies/007/000.png",
        "ground_truth/structural_anomalies/007/000_mask.png",
    )
    dataset = open_dataset(tmp_path)
    assert relative(tmp_path, dataset.validation) == ["validation/good/000.png", "validation/good/001.png"]
    masks = {image.defect: relative(tmp_path / "ground_truth", image.masks) for image in dataset.test}
    assert masks == {
        "good": [],
        "logical_anomalies": ["logical_anomalies/000/000.png", "logical_anomalies/000/001.png"],
        "structural_anomalies": ["structural_anomalies/007/000.png", "structural_anomalies/007/000_mask.png"],
    }


def test_training_images_alone_in_a_layout(tmp_path: Path) -> None:
    dataset = open_dataset(touch(tmp_path, "train/good/000.png"))
    assert (len(dataset.train), dataset.test) == (1, ())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/000.png",), r"has train/ but no train/good/; put the good images to train on into .*, or, to train"),
        (("test/good/000.png", "ground_truth/a/0_mask.png"), "has test/, ground_truth/ but no train/good/"),
        (("train/good/notes.txt",), "good: no images here"),
        (("train/good/0.png", "validation/0.png"), "validation: has no good/; .* or remove"),
        (("train/good/0.png", "validation/good/0.txt"), "good: no images here"),
        (("train/good/0.png", "test/0.png"), r"test/0\.png: no folder names its defect; move it to .*good or"),
        (
            ("train/good/0.png", "test/dent/0.png", "ground_truth/dent/0_segmentation.png"),
            r"none of its masks belongs to an image in .*dent; expected names such as 0_mask\.png, or a folder 0/",
        ),
        (
            ("bottle/train/good/0.png", "cable/train/good/0.png"),
            "holds bottle/train/, as a data set does",
        ),
        (("Train/good/0.png", "Test/dent/0.png"), r"holds Test/.*\(lower case\)"),
        (("good/0.png", "dent/0.png"), "images in good/ and others beside it, which may be defective"),
        (("good/0.png", "0.png"), "images in good/ and others beside it"),
        ((), "no images here"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path)


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="missing: no such folder"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(DatasetError, match=r"a\.png: is not a folder"):
        open_dataset(touch(tmp_path, "a.png") / "a.png")


def test_only_good_images_in_a_folder_of_that_name_are_fine(tmp_path: Path) -> None:
    assert len(open_dataset(touch(tmp_path, "good/0.png", "good/1.png")).train) == 2


def test_magnetic_tile(data_root: Path) -> None:
    root = data_root / "magnetic_tile"
    if not root.is_dir():
        pytest.skip(f"no magnetic tiles: {root} is no folder")
    dataset = open_dataset(root)
    assert dataset.name == "magnetic_tile"
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (762, 0, 578)
    counts = Counter(image.defect for image in dataset.test)
    assert counts == {"good": 190, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 99}
    assert all(bool(image.masks) == (image.defect != "good") for image in dataset.test)
    defective = next(image for image in dataset.test if image.masks)
    with Image.open(defective.path) as image:
        mask = load_mask(defective.masks, (image.height, image.width))
    assert 0 < mask.mean() < 0.5


# load_mask


def save_mask(path: Path, values: Any, mode: str = "L") -> Path:
    Image.fromarray(np.array(values, dtype=np.uint8)).convert(mode).save(path)
    return path


def test_no_masks_mean_no_defect() -> None:
    mask = load_mask((), (3, 5))
    assert mask.dtype == np.bool_
    assert mask.shape == (3, 5)
    assert not mask.any()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
def test_masks_of_any_kind(tmp_path: Path, mode: str) -> None:
    path = save_mask(tmp_path / "mask.png", [[0, 255], [255, 0]], mode)
    assert load_mask((path,), (2, 2)).tolist() == [[False, True], [True, False]]


def test_every_value_but_zero_is_a_defect(tmp_path: Path) -> None:
    assert load_mask((save_mask(tmp_path / "mask.png", [[0, 1, 128, 255]]),), (1, 4)).tolist() == [
        [False, True, True, True]
    ]


def test_masks_are_united(tmp_path: Path) -> None:
    first = save_mask(tmp_path / "first.png", [[255, 0], [0, 0]])
    second = save_mask(tmp_path / "second.png", [[0], [255]])
    assert load_mask((first, second), (2, 2)).tolist() == [[True, False], [True, True]]


def test_resizing_masks_by_hand(tmp_path: Path) -> None:
    path = save_mask(tmp_path / "mask.png", [[255, 0, 0, 255]])
    assert load_mask((path,), (2, 8)).astype(int).tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]] * 2
    # The centres 2/3, 2 and 10/3 lie in the pixels 0, 2 and 3.
    assert load_mask((path,), (1, 3)).astype(int).tolist() == [[1, 0, 1]]


@given(
    source=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_resized_masks_take_the_pixel_under_the_centre(
    tmp_path_factory: pytest.TempPathFactory, source: tuple[int, int], target: tuple[int, int], seed: int
) -> None:
    values = np.random.default_rng(seed).random(source) < 0.5
    path = save_mask(tmp_path_factory.getbasetemp() / "mask.png", values * 255)
    rows = [(2 * row + 1) * source[0] // (2 * target[0]) for row in range(target[0])]
    columns = [(2 * column + 1) * source[1] // (2 * target[1]) for column in range(target[1])]
    expected = [[bool(values[row, column]) for column in columns] for row in rows]
    assert load_mask((path,), target).tolist() == expected


def test_masks_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"mask\.png: no such file"):
        load_mask((tmp_path / "mask.png",), (4, 4))
    with pytest.raises(InputError, match="size is 0 x 4"):
        load_mask((), (0, 4))


# split_validation


@given(count=st.integers(2, 60), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32), shuffle=st.randoms())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_split_is_a_partition_that_the_order_does_not_change(
    count: int, fraction: float, seed: int, shuffle: Any
) -> None:
    paths = [Path(f"train/good/{index:03d}.png") for index in range(count)]
    training, validation = split_validation(paths, fraction, seed)
    assert sorted(training + validation) == paths
    assert list(training) == sorted(training) and list(validation) == sorted(validation)
    assert len(training) >= 1 and len(validation) >= 1
    assert abs(len(validation) - fraction * count) <= 1
    shuffled = list(paths)
    shuffle.shuffle(shuffled)
    assert split_validation(shuffled, fraction, seed) == (training, validation)
    elsewhere = [Path("/data/bolts") / path for path in paths]
    assert [path.name for path in split_validation(elsewhere, fraction, seed)[1]] == [path.name for path in validation]


def test_the_draw_is_fixed() -> None:
    paths = [Path(f"{index:02d}.png") for index in range(30)]
    assert [path.stem for path in split_validation(paths)[1]] == ["03", "11", "20"]
    assert [path.stem for path in split_validation(paths, seed=1)[1]] == ["02", "09", "16"]


def test_a_tenth_of_762_images() -> None:
    training, validation = split_validation([Path(f"{index}.png") for index in range(762)])
    assert (len(training), len(validation)) == (686, 76)


def test_splits_that_cannot_be() -> None:
    for paths in ([], [Path("a.png")]):
        with pytest.raises(DatasetError, match=rf"^{len(paths)} training image\(s\): at least two are needed"):
            split_validation(paths)
    for fraction in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="expected a number between 0 and 1"):
            split_validation([Path("a.png"), Path("b.png")], fraction)
