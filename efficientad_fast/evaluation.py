"""Running a detector over a data set's test images and saying how good it is."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from efficientad_fast.data.folders import GOOD, Dataset, load_mask
from efficientad_fast.detector import PRECISIONS, dtype_name, is_emulated
from efficientad_fast.errors import DatasetError, ImageError
from efficientad_fast.files import atomic_path
from efficientad_fast.metrics import au_pro, image_auroc, pixel_auroc
from efficientad_fast.preprocessing import Preprocessing

if TYPE_CHECKING:
    import torch

    from efficientad_fast.detector import Detector

JSON_FORMAT = "efficientad_fast evaluation 1"

GROUPS = ("structural", "logical")
"""Defects whose names begin so are also measured together, as MVTec LOCO reports them."""

FPR_LIMIT = 0.3
"""False-positive rate up to which AU-PRO is integrated (MVTec AD, VisA)."""

Verdict = Literal["correct", "missed", "false alarm", "failed"]


@dataclass(frozen=True)
class ImageResult:
    """What the detector said of one test image, beside what is known of it.

    Attributes:
        path: the image.
        defect: its kind of defect, or ``"good"``.
        masks: files of its ground truth; none for a good image, or where the data set brings none.
        score: the anomaly score; NaN where the image failed.
        label: whether the detector calls it anomalous; ``None`` where it failed.
        anomaly_map: ``(H, W)`` float32 at the network's size; ``None`` where it failed.
        error: why it failed.
    """

    path: Path
    defect: str
    masks: tuple[Path, ...]
    score: float
    label: bool | None
    anomaly_map: np.ndarray | None = field(repr=False)
    error: str | None = None

    @property
    def anomalous(self) -> bool:
        """Whether the image has a defect, whatever the detector says."""
        return self.defect != GOOD

    @property
    def verdict(self) -> Verdict:
        """How the detector's label compares with the truth."""
        if self.error is not None:
            return "failed"
        if self.label == self.anomalous:
            return "correct"
        return "missed" if self.anomalous else "false alarm"


@dataclass(frozen=True)
class KindResult:
    """The images of one kind, or of a group of kinds.

    Attributes:
        images: how many were scored.
        failed: how many were not.
        flagged: how many of the scored ones the detector calls anomalous.
        auroc: image AUROC against the good test images; ``None`` for the good ones themselves, and where either side
            has no scored image.
        median_score: ``None`` where no image was scored.
    """

    images: int
    failed: int
    flagged: int
    auroc: float | None
    median_score: float | None


@dataclass(frozen=True)
class Confusion:
    """Decisions at the detector's threshold, counted over the scored images; "positive" is anomalous."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def precision(self) -> float | None:
        """Share of the flagged images that are anomalous; ``None`` where none is flagged."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        """Share of the anomalous images that are flagged; ``None`` where there are none."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def false_positive_rate(self) -> float | None:
        """Share of the good images that are flagged; ``None`` where there are none."""
        return _ratio(self.false_positives, self.false_positives + self.true_negatives)


@dataclass(frozen=True)
class Evaluation:
    """A detector's results on one data set.

    Attributes:
        dataset: the data set's name.
        root: its folder.
        threshold: the detector's.
        images: one result for each test image, in the data set's order.
        good: the good images.
        defective: all anomalous images.
        kinds: each kind of defect, in order of name.
        groups: kinds taken together, those of :data:`GROUPS` that occur.
        pixel_auroc, au_pro: over good images and anomalous ones with ground truth, at the size of the maps (masks
            are resized to it); ``None`` where no mask is known.
        confusion: at the threshold.
        seconds: wall-clock time of reading and predicting all images, the first one's start-up included.
        settings: batch size, device and dtype.
        notes: sentences on what was left out of these figures.
        preprocessing: the detector's, by which its images are read again to be shown.
    """

    dataset: str
    root: Path
    threshold: float
    images: tuple[ImageResult, ...] = field(repr=False)
    good: KindResult
    defective: KindResult
    kinds: dict[str, KindResult]
    groups: dict[str, KindResult]
    pixel_auroc: float | None
    au_pro: float | None
    confusion: Confusion
    seconds: float
    settings: dict[str, str | int]
    notes: tuple[str, ...]
    preprocessing: Preprocessing = field(default_factory=Preprocessing, repr=False)

    @property
    def auroc(self) -> float | None:
        """Image AUROC of all anomalous images against all good ones; ``None`` without images of both."""
        return self.defective.auroc

    @property
    def failed(self) -> tuple[ImageResult, ...]:
        """The images that could not be scored; no figure includes them."""
        return tuple(image for image in self.images if image.error is not None)

    @property
    def images_per_second(self) -> float:
        """Images per second of wall-clock time, reading included."""
        return len(self.images) / self.seconds if self.seconds > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Everything but the anomaly maps, as JSON's types; numbers that are not finite become ``None``."""
        return {
            "format": JSON_FORMAT,
            "dataset": self.dataset,
            "root": str(self.root),
            "settings": self.settings,
            "threshold": _finite(self.threshold),
            "image_auroc": self.auroc,
            "pixel_auroc": self.pixel_auroc,
            "au_pro": self.au_pro,
            "au_pro_fpr_limit": FPR_LIMIT,
            "good": _kind_to_dict(self.good),
            "defective": _kind_to_dict(self.defective),
            "kinds": {name: _kind_to_dict(kind) for name, kind in self.kinds.items()},
            "groups": {name: _kind_to_dict(kind) for name, kind in self.groups.items()},
            "confusion": {
                "true_positives": self.confusion.true_positives,
                "false_positives": self.confusion.false_positives,
                "true_negatives": self.confusion.true_negatives,
                "false_negatives": self.confusion.false_negatives,
                "precision": self.confusion.precision,
                "recall": self.confusion.recall,
                "false_positive_rate": self.confusion.false_positive_rate,
            },
            "timing": {
                "images": len(self.images),
                "seconds": self.seconds,
                "images_per_second": _finite(self.images_per_second),
            },
            "failed": len(self.failed),
            "notes": list(self.notes),
            "images": [
                {
                    "path": self.relative_path(image),
                    "defect": image.defect,
                    "score": _finite(image.score),
                    "label": image.label,
                    "verdict": image.verdict,
                    "error": image.error,
                }
                for image in self.images
            ],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write_json(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`to_json` to a file, atomically, and return its path."""
        target = Path(path)
        with atomic_path(target) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8", errors="backslashreplace")
        return target

    def relative_path(self, image: ImageResult) -> str:
        """An image's path inside the data set, with forward slashes; its full path where it lies elsewhere."""
        inside = image.path.is_relative_to(self.root)
        return (image.path.relative_to(self.root) if inside else image.path).as_posix()


def evaluate(
    detector: Detector,
    dataset: Dataset,
    *,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a data set's test images and measure the detector on them.

    An image that cannot be read, or whose map holds NaN, is kept with its error and left out of every figure. The
    maps are kept in float32, 4 bytes a pixel (float16 would tie pixels that are not tied, and those are what AU-PRO
    ranks): 150 MB for 600 images at 256 x 256, twice that for a few seconds at the end.

    Args:
        detector: what to measure, at its threshold for ``dtype``.
        dataset: its ``test`` images are used, in their order.
        batch_size: images that go through the networks together.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype: of the networks; ``None`` as in :meth:`Detector.dtype_on`. float8 is emulated on a CPU: its
            figures are a GPU's but for the order of sums, its time is not.
        progress: called with (images done, images in all) after each image.

    Raises:
        DatasetError: the data set has no test images.
        InputError: an argument is off.
    """
    if not dataset.test:
        raise DatasetError(
            f"{dataset.root} has no test images. Evaluating needs labelled ones: good images in "
            f"{dataset.root / 'test' / GOOD} and defective ones in {dataset.root / 'test' / 'KIND'}, a folder for "
            f"each kind (masks, if any, in {dataset.root / 'ground_truth' / 'KIND'}). To score images that have no "
            "labels, use `efficientad-fast predict`."
        )
    computed = detector.dtype_on(device, dtype)
    threshold = detector.precision(computed).threshold
    name = dtype_name(computed)
    started = time.perf_counter()
    images = []
    stream = detector.stream(
        [image.path for image in dataset.test],
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        map_size="network",
    )
    for image, prediction in zip(dataset.test, stream, strict=True):
        error, anomaly_map = prediction.error, prediction.anomaly_map
        if error is None and (
            math.isnan(prediction.score) or (anomaly_map is not None and np.isnan(anomaly_map).any())
        ):
            error = f"{prediction.source}: the anomaly map holds NaN. Try dtype float32, or train the detector again."
        failed = error is not None
        images.append(
            ImageResult(
                path=image.path,
                defect=image.defect,
                masks=image.masks,
                score=math.nan if failed else prediction.score,
                label=None if failed else prediction.label,
                anomaly_map=None if failed else anomaly_map,
                error=error,
            )
        )
        if progress is not None:
            progress(len(images), len(dataset.test))
    return summarize(
        images,
        dataset=dataset.name,
        root=dataset.root,
        threshold=threshold,
        seconds=time.perf_counter() - started,
        settings={"batch_size": batch_size, "device": str(device), "dtype": name},
        preprocessing=detector.preprocessing,
        notes=_precision_notes(detector, name, emulated=is_emulated(computed, device)),
    )


def _precision_notes(detector: Detector, dtype: str, *, emulated: bool) -> list[str]:
    notes = []
    if emulated:
        notes.append(f"{dtype} was emulated on a CPU: the time says nothing.")
    if dtype in PRECISIONS and dtype not in detector.precisions:
        notes.append(
            f"The detector is not calibrated in {dtype}: its quantiles and threshold are those of float32 "
            f"(`efficientad-fast calibrate MODEL GOOD_IMAGES --dtype {dtype}`)."
        )
    return notes


def summarize(
    images: Iterable[ImageResult],
    *,
    dataset: str,
    root: Path,
    threshold: float,
    seconds: float,
    settings: dict[str, str | int],
    preprocessing: Preprocessing | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Compute every figure of an :class:`Evaluation` from the results of its images; see :func:`evaluate`."""
    results = tuple(images)
    scored = [image for image in results if image.error is None]
    good = [image for image in results if not image.anomalous]
    defects = sorted({image.defect for image in results if image.anomalous})
    own_notes = []
    failed = len(results) - len(scored)
    if failed:
        own_notes.append(f"{failed} of {len(results)} images could not be scored and are left out of every figure.")
    for anomalous, name in ((True, "anomalous"), (False, GOOD)):
        if not any(image.anomalous == anomalous for image in scored):
            own_notes.append(
                f"There is no AUROC: it compares anomalous with good images, and no {name} one was scored."
            )

    groups = {}
    for group in GROUPS:
        members = [image for image in results if image.anomalous and image.defect.startswith(group)]
        if members:
            groups[group] = _kind(members, good)
    pixel_figures, pixel_notes = _pixel_figures(scored)
    return Evaluation(
        dataset=dataset,
        root=root,
        threshold=threshold,
        images=results,
        good=_kind(good, []),
        defective=_kind([image for image in results if image.anomalous], good),
        kinds={name: _kind([image for image in results if image.defect == name], good) for name in defects},
        groups=groups,
        pixel_auroc=pixel_figures[0],
        au_pro=pixel_figures[1],
        confusion=Confusion(
            true_positives=sum(image.anomalous and image.label is True for image in scored),
            false_positives=sum(not image.anomalous and image.label is True for image in scored),
            true_negatives=sum(not image.anomalous and image.label is False for image in scored),
            false_negatives=sum(image.anomalous and image.label is False for image in scored),
        ),
        seconds=seconds,
        settings=settings,
        notes=(*notes, *own_notes, *pixel_notes),
        preprocessing=preprocessing or Preprocessing(),
    )


def _kind(members: Sequence[ImageResult], good: Sequence[ImageResult]) -> KindResult:
    scored = [image for image in members if image.error is None]
    return KindResult(
        images=len(scored),
        failed=len(members) - len(scored),
        flagged=sum(image.label is True for image in scored),
        auroc=_auroc([*members, *good]),
        median_score=float(np.median([image.score for image in scored])) if scored else None,
    )


def _auroc(images: Sequence[ImageResult]) -> float | None:
    scored = [image for image in images if image.error is None]
    truth = {image.anomalous for image in scored}
    if truth != {True, False}:
        return None
    return image_auroc([image.score for image in scored], [image.anomalous for image in scored])


def _pixel_figures(scored: Sequence[ImageResult]) -> tuple[tuple[float | None, float | None], list[str]]:
    """Pixel AUROC and AU-PRO over the images whose ground truth is known, and what was left out."""
    maps, masks = [], []
    unmarked = unreadable = vanished = 0
    for image in scored:
        if image.anomaly_map is None:
            continue
        size = (image.anomaly_map.shape[0], image.anomaly_map.shape[1])
        if not image.anomalous:
            mask = np.zeros(size, dtype=bool)
        elif not image.masks:
            unmarked += 1
            continue
        else:
            try:
                mask = load_mask(image.masks, size)
            except ImageError:
                unreadable += 1
                continue
            if not mask.any():
                vanished += 1
                continue
        maps.append(image.anomaly_map)
        masks.append(mask)
    if not any(mask.any() for mask in masks):
        return (None, None), ["There are no pixel figures: no anomalous image with a ground-truth mask was scored."]

    notes = []
    for count, reason in (
        (unmarked, "anomalous images without a ground-truth mask"),
        (unreadable, "anomalous images whose mask cannot be read"),
        (vanished, "anomalous images whose mask is empty at the size of the maps"),
    ):
        if count:
            notes.append(f"The pixel figures leave out {count} {reason}.")
    if all(mask.all() for mask in masks):
        return (None, None), ["There are no pixel figures: the masks leave no good pixel."]
    return (pixel_auroc(maps, masks), au_pro(maps, masks, FPR_LIMIT)), notes


def _kind_to_dict(kind: KindResult) -> dict[str, int | float | None]:
    return {
        "images": kind.images,
        "failed": kind.failed,
        "flagged": kind.flagged,
        "image_auroc": kind.auroc,
        "median_score": None if kind.median_score is None else _finite(kind.median_score),
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
