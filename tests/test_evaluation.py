"""Evaluations of a detector that says what it is told to, checked by hand, and one of a real one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from small_detector import small_detector

from efficientad_fast import Detector, Prediction, Preprocessing
from efficientad_fast.data import Dataset, TestImage, open_dataset
from efficientad_fast.detector import Precision, dtype_name
from efficientad_fast.errors import DatasetError, InputError
from efficientad_fast.evaluation import Evaluation, evaluate
from efficientad_fast.metrics import au_pro, pixel_auroc
from efficientad_fast.plan import parse_dtype

SIZE = 8


@dataclass
class ScriptedDetector:
    """Gives each image, by the name of its file, a score and a map; a name that is not listed fails."""

    scores: dict[str, float]
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    threshold: float = 0.4
    precisions: dict[str, Precision] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    asked: dict[str, Any] = field(default_factory=dict)

    def dtype_on(self, device: str, dtype: str | None) -> torch.dtype:
        return parse_dtype(dtype or "float32")

    def precision(self, dtype: torch.dtype) -> Precision:
        return self.precisions.get(dtype_name(dtype), Precision(None, self.threshold))

    def stream(self, images: Iterable[Path], **settings: Any) -> Iterator[Prediction]:
        self.asked = settings
        for path in images:
            if path.name not in self.scores:
                yield Prediction(str(path), math.nan, None, None, f"{path}: the file is empty")
                continue
            score = self.scores[path.name]
            anomaly_map = self.maps.get(path.name, np.full((SIZE, SIZE), score, np.float32))
            yield Prediction(str(path), score, score > self.threshold, anomaly_map)


def run(detector: ScriptedDetector, test: Iterable[TestImage], root: Path = Path("set"), **settings: Any) -> Evaluation:
    dataset = Dataset(root, root.name, (), (), tuple(test))
    return evaluate(cast(Detector, detector), dataset, **settings)


def images(defects: dict[str, str]) -> list[TestImage]:
    return [TestImage(Path("set/test") / defect / name, defect, ()) for name, defect in defects.items()]


def write_mask(path: Path, mask: np.ndarray) -> Path:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


SCORES = {"a": 0.1, "b": 0.2, "c": 0.6, "d": 0.5, "e": 0.9, "f": 0.3}
DEFECTS = {
    "a": "good",
    "b": "good",
    "c": "good",
    "d": "structural_scratch",
    "e": "structural_dent",
    "f": "logical_screw",
}


def test_figures_by_hand() -> None:
    result = run(ScriptedDetector(SCORES), images(DEFECTS))
    # Of the nine pairs, 0.5 wins two, 0.9 three and 0.3 two.
    assert result.auroc == pytest.approx(7 / 9)
    assert {name: kind.auroc for name, kind in result.kinds.items()} == pytest.approx(
        {"logical_screw": 2 / 3, "structural_dent": 1.0, "structural_scratch": 2 / 3}
    )
    assert list(result.kinds) == sorted(result.kinds)
    assert {name: (group.images, group.auroc) for name, group in result.groups.items()} == {
        "structural": (2, pytest.approx(5 / 6)),
        "logical": (1, pytest.approx(2 / 3)),
    }
    confusion = result.confusion
    assert (confusion.true_positives, confusion.false_positives) == (2, 1)
    assert (confusion.true_negatives, confusion.false_negatives) == (2, 1)
    assert confusion.precision == pytest.approx(2 / 3)
    assert confusion.recall == pytest.approx(2 / 3)
    assert confusion.false_positive_rate == pytest.approx(1 / 3)
    assert (result.good.images, result.good.flagged, result.good.auroc) == (3, 1, None)
    assert result.good.median_score == 0.2
    assert [image.verdict for image in result.images] == ["correct"] * 2 + ["false alarm"] + ["correct"] * 2 + [
        "missed"
    ]
    assert result.seconds > 0
    assert result.images_per_second == pytest.approx(6 / result.seconds)


def test_kinds_without_a_known_beginning_form_no_group() -> None:
    result = run(ScriptedDetector(SCORES), images({"a": "good", "d": "crack", "e": "biological"}))
    assert result.groups == {}


def test_images_that_fail_are_kept_and_left_out() -> None:
    maps = {"d": np.full((SIZE, SIZE), np.nan, np.float32), "e": np.zeros((SIZE, SIZE), np.float32)}
    scores = {name: score for name, score in SCORES.items() if name != "c"} | {"e": math.nan}
    result = run(ScriptedDetector(scores, maps), images(DEFECTS))
    assert [image.path.name for image in result.failed] == ["c", "d", "e"]
    assert "the file is empty" in str(result.failed[0].error)
    assert "holds NaN" in str(result.failed[1].error)
    for image in result.failed:
        assert image.verdict == "failed"
        assert image.label is None
        assert image.anomaly_map is None
        assert math.isnan(image.score)
    assert result.auroc == 1.0
    assert (result.good.images, result.good.failed) == (2, 1)
    assert result.kinds["structural_dent"].images == 0
    assert result.kinds["structural_dent"].auroc is None
    assert result.kinds["structural_dent"].median_score is None
    assert any(note.startswith("3 of 6 images could not be scored") for note in result.notes)


def test_without_test_images_it_says_what_is_needed() -> None:
    with pytest.raises(DatasetError, match=r"has no test images.*test/good.*test/KIND") as caught:
        run(ScriptedDetector({}), [])
    assert "predict" in str(caught.value)


@pytest.mark.parametrize(("kept", "absent"), [("good", "anomalous"), ("logical_screw", "good")])
def test_one_class_alone_has_no_auroc(kept: str, absent: str) -> None:
    result = run(ScriptedDetector(SCORES), images({name: kind for name, kind in DEFECTS.items() if kind == kept}))
    assert result.auroc is None
    assert all(kind.auroc is None for kind in result.kinds.values())
    assert any(f"no {absent} one was scored" in note for note in result.notes)
    rates = (result.confusion.recall, result.confusion.false_positive_rate)
    assert rates == ((None, 1 / 3) if kept == "good" else (0.0, None))
    json.loads(result.to_json())


def test_when_every_image_fails_there_are_no_figures() -> None:
    result = run(ScriptedDetector({}), images(DEFECTS))
    assert result.auroc is None
    assert result.pixel_auroc is None
    assert result.confusion.precision is None
    assert len(result.failed) == 6


def test_pixel_figures_use_the_masks_at_the_size_of_the_maps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[1:4, 2:5] = mask[6, 6] = True
    maps = {name: rng.random((SIZE, SIZE), dtype=np.float32) for name in "ade"}
    maps["d"][mask] += 0.4
    large = write_mask(tmp_path / "large.png", mask.repeat(3, axis=0).repeat(3, axis=1))
    left, right = mask.copy(), mask.copy()
    left[:, 4:], right[:, :4] = False, False
    halves = (write_mask(tmp_path / "left.png", left), write_mask(tmp_path / "right.png", right))
    test = [
        TestImage(tmp_path / "a", "good", ()),
        TestImage(tmp_path / "d", "crack", (large,)),
        TestImage(tmp_path / "e", "crack", halves),
    ]
    result = run(ScriptedDetector(SCORES, maps), test)
    truth = [np.zeros_like(mask), mask, mask]
    assert result.pixel_auroc == pixel_auroc(list(maps.values()), truth)
    assert result.au_pro == au_pro(list(maps.values()), truth, 0.3)
    assert result.notes == ()


def test_pixel_figures_leave_out_what_has_no_usable_mask(tmp_path: Path) -> None:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[2:5, 2:5] = True
    whole = write_mask(tmp_path / "whole.png", mask)
    speck = np.zeros((16 * SIZE, 16 * SIZE), dtype=bool)
    speck[0, 0] = True
    lost = write_mask(tmp_path / "speck.png", speck)
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:40])
    test = [
        TestImage(tmp_path / "a", "good", ()),
        TestImage(tmp_path / "d", "crack", (whole,)),
        TestImage(tmp_path / "e", "crack", ()),
        TestImage(tmp_path / "f", "crack", (lost,)),
        TestImage(tmp_path / "c", "crack", (broken,)),
    ]
    perfect = {"d": np.where(mask, np.float32(1), np.float32(0.05))}
    result = run(ScriptedDetector(SCORES, perfect), test)
    # The other three, with maps of 0.9, 0.3 and 0.6 throughout, would spoil this.
    assert result.pixel_auroc == pytest.approx(1.0)
    assert result.au_pro == pytest.approx(1.0)
    for reason in (
        "1 anomalous images without",
        "1 anomalous images whose mask is empty",
        "1 anomalous images whose mask ca",
    ):
        assert any(reason in note for note in result.notes), reason

    unmarked = run(ScriptedDetector(SCORES), test[:1] + test[2:])
    assert unmarked.pixel_auroc is None
    assert unmarked.au_pro is None
    assert any("no anomalous image with a ground-truth mask" in note for note in unmarked.notes)

    everywhere = write_mask(tmp_path / "everywhere.png", np.ones((SIZE, SIZE), dtype=bool))
    full = run(ScriptedDetector(SCORES), [TestImage(tmp_path / "d", "crack", (everywhere,))])
    assert full.pixel_auroc is None
    assert any("leave no good pixel" in note for note in full.notes)


def test_settings_reach_the_detector_and_progress_is_told() -> None:
    detector = ScriptedDetector(SCORES)
    calls: list[tuple[int, int]] = []
    result = run(
        detector, images(DEFECTS), batch_size=4, device="cpu", dtype="float64", progress=lambda *at: calls.append(at)
    )
    assert detector.asked == {"batch_size": 4, "device": "cpu", "dtype": "float64", "map_size": "network"}
    assert result.settings == {"batch_size": 4, "device": "cpu", "dtype": "float64"}
    assert calls == [(done, 6) for done in range(1, 7)]


def test_the_threshold_is_that_of_the_dtype_and_notes_say_where_there_is_none() -> None:
    detector = ScriptedDetector(SCORES, precisions={"float16": Precision(None, 0.7)})
    assert run(detector, images(DEFECTS)).threshold == 0.4
    half = run(detector, images(DEFECTS), dtype="float16")
    assert half.threshold == 0.7 and not any("calibrated" in note for note in half.notes)
    brain = run(detector, images(DEFECTS), dtype=torch.bfloat16)
    assert brain.threshold == 0.4 and brain.settings["dtype"] == "bfloat16"
    assert any("not calibrated in bfloat16" in note and "--dtype bfloat16" in note for note in brain.notes)
    assert not any("emulated" in note for note in brain.notes)
    emulated = run(detector, images(DEFECTS), dtype="float8")
    assert emulated.settings["dtype"] == "float8" and any("emulated on a CPU" in note for note in emulated.notes)
    with pytest.raises(InputError, match="calibrated"):
        evaluate(small_detector(), Dataset(Path("set"), "set", (), (), tuple(images(DEFECTS))), dtype="float8")


def test_json_holds_everything_but_maps_and_is_strict(tmp_path: Path) -> None:
    scores = {name: score for name, score in SCORES.items() if name != "c"} | {"e": math.inf}
    result = run(ScriptedDetector(scores, threshold=math.inf), images(DEFECTS))
    path = result.write_json(tmp_path / "new" / "evaluation.json")
    written = json.loads(
        path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["threshold"] is None
    assert written["image_auroc"] == 1.0
    assert written["failed"] == 1
    assert written["groups"]["structural"]["images"] == 2
    assert written["images"][2] == {
        "path": "test/good/c",
        "defect": "good",
        "score": None,
        "label": None,
        "verdict": "failed",
        "error": "set/test/good/c: the file is empty",
    }
    assert written["images"][4]["score"] is None


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text("old")
    result = run(ScriptedDetector(SCORES), images(DEFECTS))
    half_way = Path.write_text

    def full_disk(self: Path, text: str, **rest: Any) -> int:
        half_way(self, text[:100], **rest)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        result.write_json(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_path_outside_the_data_set_is_given_in_full() -> None:
    result = run(ScriptedDetector({"a": 0.1}), [TestImage(Path("elsewhere/a"), "good", ())])
    assert result.relative_path(result.images[0]) == "elsewhere/a"


def test_a_real_detector_on_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train/good/0.png", "test/good/0.png", "test/good/1.png", "test/scratch/0.png", "test/scratch/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    (tmp_path / "test/scratch/1.png").write_bytes(b"not an image")
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 10:30] = True
    (tmp_path / "ground_truth/scratch").mkdir(parents=True)
    write_mask(tmp_path / "ground_truth/scratch/0_mask.png", mask)
    detector = small_detector()
    result = evaluate(detector, open_dataset(tmp_path), batch_size=3)
    assert [image.path.name for image in result.failed] == ["1.png"]
    assert result.auroc is not None
    assert result.au_pro is not None
    expected = detector.predict(result.images[0].path)
    assert isinstance(expected, Prediction)
    assert result.images[0].score == pytest.approx(expected.score, rel=1e-5)
    assert result.images[0].anomaly_map is not None
    assert result.images[0].anomaly_map.shape == detector.size
