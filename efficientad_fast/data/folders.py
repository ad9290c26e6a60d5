"""Images and data sets on disk: flat folders of good images, and the layouts of MVTec AD and MVTec LOCO."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficientad_fast.data.decode import decode_image
from efficientad_fast.errors import DatasetError, InputError

IMAGE_SUFFIXES: frozenset[str] = frozenset(
    {".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""What is taken for an image in a folder, in any case."""

GOOD = "good"

_LAYOUT_FOLDERS = ("train", "validation", "test", "ground_truth")
_MASK_ENDING = "_mask"


@dataclass(frozen=True)
class TestImage:
    """A labelled image.

    ``defect`` is the name of its folder, ``"good"`` for a normal image; ``masks`` are files in which pixels that are
    not zero belong to a defect: none for good images and where a mask is missing, several for some data sets.
    """

    # Tells pytest that this is no test class.
    __test__ = False

    path: Path
    defect: str
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Dataset:
    """A data set on disk. Every tuple is sorted by path; ``validation`` and ``test`` may be empty.

    ``validation`` holds good images that the data set itself sets apart; where it is empty, see
    :func:`split_validation`.
    """

    root: Path
    name: str
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    test: tuple[TestImage, ...]


def list_images(folder: Path) -> list[Path]:
    """All images in ``folder`` and below, sorted by their path relative to it (as text, with forward slashes).

    A file is taken by its suffix, see :data:`IMAGE_SUFFIXES`, whether it can be read or not: decoding says so. Files
    and folders whose names begin with a dot are left out. Links to folders are followed, each folder is entered
    once.

    Raises:
        DatasetError: ``folder`` is missing, is no folder, cannot be read, or holds no image.
    """
    images = find_images(Path(folder))
    if not images:
        raise DatasetError(
            f"{folder}: no images here or in folders below; files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} are looked for (upper or lower case, hidden ones left out)"
        )
    return images


def is_image_name(name: str) -> bool:
    """Whether :func:`list_images` takes a file of that name: a known suffix, and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def find_images(folder: Path, *, skip_unreadable: bool = False) -> list[Path]:
    """As :func:`list_images`, but an empty folder is no error.

    With ``skip_unreadable``, nor is a folder inside it that cannot be read, or that has gone meanwhile.
    """
    images: list[Path] = []
    entered: set[tuple[int, int]] = set()
    pending, links = [folder], list[Path]()
    # Links come last, so that a folder is listed under its own path where it has one in here.
    while pending or links:
        current = pending.pop() if pending else links.pop(0)
        try:
            status = check_folder(current)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entries = _entries(current)
        except DatasetError:
            if skip_unreadable and current != folder:
                continue
            raise
        entered.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = current / entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else pending).append(path)
            elif is_image_name(entry.name):
                images.append(path)
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def check_folder(folder: Path) -> os.stat_result:
    """Its status; refuses, with a :class:`DatasetError`, what is missing, no folder, or may not be looked at."""
    try:
        status = folder.stat()
    except FileNotFoundError as error:
        raise DatasetError(f"{folder}: no such folder; check the path") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder}: cannot be read ({error}); check the path and its permissions") from error
    if not stat.S_ISDIR(status.st_mode):
        raise DatasetError(f"{folder}: is not a folder; give the folder that holds the images")
    return status


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Entries that are not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read ({error}); check its permissions") from error
    return (entry for entry in found if not entry.name.startswith("."))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself, or through a folder that may not be searched.
        return False


def open_dataset(root: str | os.PathLike[str]) -> Dataset:
    """Find the images of a data set without opening them.

    A folder that holds one of ``train``, ``validation``, ``test`` and ``ground_truth`` has a layout; without any of
    them it is flat, and every image in it and below is a good one to train on. The layouts, of which all but
    ``train/good`` may be missing::

        train/good/*.png                                  MVTec AD, MVTec LOCO
        validation/good/*.png                             MVTec LOCO
        test/good/*.png, test/<defect>/*.png              MVTec AD, MVTec LOCO
        ground_truth/<defect>/<stem>_mask.png             MVTec AD
        ground_truth/<defect>/<stem>/*.png                MVTec LOCO

    Any of :data:`IMAGE_SUFFIXES` does for images and masks alike. Other folders in ``train`` and ``validation`` are
    not used.

    Raises:
        DatasetError: no training images; a layout without ``train/good``; test images without a folder that names
            their defect; masks none of which belongs to a test image; or a flat folder that mixes good images with
            others as far as folder names tell.
    """
    root = Path(root)
    check_folder(root)
    folders = {entry.name for entry in _entries(root) if _is_folder(entry)}
    if not folders.intersection(_LAYOUT_FOLDERS):
        return Dataset(root, root.resolve().name, _flat_images(root), (), ())
    good = root / "train" / GOOD
    if not good.is_dir():
        found = ", ".join(f"{name}/" for name in _LAYOUT_FOLDERS if name in folders)
        raise DatasetError(
            f"{root}: has {found} but no train/{GOOD}/; put the good images to train on into {good}, or, to train on "
            f"a folder of good images alone, give that folder"
        )
    return Dataset(root, root.resolve().name, tuple(list_images(good)), _validation_images(root), _test_images(root))


def _flat_images(root: Path) -> tuple[Path, ...]:
    images = list_images(root)
    tops = set()
    for image in images:
        folders = image.relative_to(root).parent.parts
        tops.add(folders[0] if folders else "")
        for depth, name in enumerate(folders):
            if name.lower() in _LAYOUT_FOLDERS:
                raise DatasetError(
                    f"{root}: holds {Path(*folders[: depth + 1]).as_posix()}/, as a data set does, but is none itself; "
                    f"give one data set, a folder with train/{GOOD}/ in it (lower case)"
                )
    if GOOD in tops and len(tops) > 1:
        raise DatasetError(
            f"{root}: holds images in {GOOD}/ and others beside it, which may be defective; give {root / GOOD}, or put "
            f"the good images into train/{GOOD}/ and the others into test/<defect>/"
        )
    return tuple(images)


def _validation_images(root: Path) -> tuple[Path, ...]:
    folder = root / "validation"
    if not folder.is_dir():
        return ()
    if not (folder / GOOD).is_dir():
        raise DatasetError(
            f"{folder}: has no {GOOD}/; put good images into {folder / GOOD}, or remove {folder} to have validation "
            f"images drawn from the training images"
        )
    return tuple(list_images(folder / GOOD))


def _test_images(root: Path) -> tuple[TestImage, ...]:
    folder = root / "test"
    if not folder.is_dir():
        return ()
    images = []
    for entry in _entries(folder):
        path = folder / entry.name
        if _is_folder(entry):
            images.extend(_defect_images(path, root / "ground_truth" / entry.name))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            raise DatasetError(
                f"{path}: no folder names its defect; move it to {folder / GOOD} or to {folder}/<name of the defect>"
            )
    return tuple(images)


def _defect_images(folder: Path, masks_folder: Path) -> list[TestImage]:
    defect, images = folder.name, find_images(folder)
    if defect == GOOD or not masks_folder.is_dir():
        return [TestImage(image, defect, ()) for image in images]
    masks = _masks_by_image(masks_folder)
    found = [
        TestImage(image, defect, tuple(masks.get(image.relative_to(folder).with_suffix("").as_posix(), ())))
        for image in images
    ]
    if masks and images and not any(image.masks for image in found):
        stem = images[0].stem
        raise DatasetError(
            f"{masks_folder}: none of its masks belongs to an image in {folder}; expected names such as "
            f"{stem}{_MASK_ENDING}.png, or a folder {stem}/ with the masks of {images[0].name}"
        )
    return found


def _masks_by_image(folder: Path) -> dict[str, list[Path]]:
    """Masks by the path, relative and without suffix, of the image that they belong to."""
    masks: dict[str, list[Path]] = {}
    for mask in find_images(folder):
        relative = mask.relative_to(folder)
        masks.setdefault(relative.parent.as_posix(), []).append(mask)
        if relative.stem.endswith(_MASK_ENDING):
            image = relative.with_name(relative.stem.removesuffix(_MASK_ENDING) or relative.name)
            masks.setdefault(image.as_posix(), []).append(mask)
    return masks


def load_mask(masks: tuple[Path, ...], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The union of mask files: ``(H, W)`` bool, true where any of them is not zero (black), false without masks.

    Args:
        masks: image files of any size, kind and depth.
        size: (height, width) of the result in pixels. A mask of another size is resized by taking, for each pixel,
            the one under its centre.

    Raises:
        ImageError: a file cannot be read as an image.
        InputError: ``size`` is not positive.
    """
    height, width = size
    if height < 1 or width < 1:
        raise InputError(f"size is {height} x {width}; expected a height and a width of at least 1 pixel")
    union = np.zeros((height, width), dtype=np.bool_)
    for path in masks:
        defective = (decode_image(path) != 0).any(dim=0).numpy()
        rows = _nearest(defective.shape[0], height)
        columns = _nearest(defective.shape[1], width)
        union |= defective[rows[:, None], columns]
    return union


def _nearest(length: int, target: int) -> NDArray[np.int64]:
    # Twice the centre, (i + 1/2) * length / target, in whole numbers.
    return (2 * np.arange(target, dtype=np.int64) + 1) * length // (2 * target)


def split_validation(
    paths: Sequence[Path], fraction: float = 0.1, seed: int = 0
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Draw validation images from the training images; see SPEC "Training the student and the autoencoder", 4.

    The draw hangs on the number of paths, their order when sorted as text with forward slashes, and the seed; not
    on the platform, and not on the order they are given in.

    Args:
        paths: at least two.
        fraction: of the images that go to validation, between 0 and 1; rounded to whole images, and at least one is
            left on each side.
        seed: of the generator that draws.

    Returns:
        ``(training, validation)``, each sorted.

    Raises:
        DatasetError: fewer than two paths.
        InputError: ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction!r}; expected a number between 0 and 1, such as 0.1")
    if len(paths) < 2:
        raise DatasetError(
            f"{len(paths)} training image(s): at least two are needed, one to train on and one to validate with; add "
            f"good images"
        )
    ordered = sorted(paths, key=lambda path: path.as_posix())
    count = min(max(round(fraction * len(ordered)), 1), len(ordered) - 1)
    draws = np.random.default_rng(seed).random(len(ordered))
    chosen = set(np.argsort(draws, kind="stable")[:count].tolist())
    return (
        tuple(path for index, path in enumerate(ordered) if index not in chosen),
        tuple(path for index, path in enumerate(ordered) if index in chosen),
    )
