"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from efficientad_fast import Detector, Prediction, cli, weights
from efficientad_fast.detector import Precision
from efficientad_fast.reference.networks import PatchDescriptionNetwork
from tests.small_detector import CHANNELS, small_detector


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_detector().save(tmp_path / "model.safetensors")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_predict_prints_a_line_for_each_image(model: Path, images: Path) -> None:
    result = _run("predict", model, images)
    assert result.exit_code == 0
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    predictions = Detector.load(model).predict(images)
    assert isinstance(predictions, list)
    assert [line[2] for line in lines] == [str(images / f"{index}.png") for index in range(3)]
    for line, prediction in zip(lines, predictions, strict=True):
        assert float(line[0]) == pytest.approx(prediction.score, abs=1e-5)
        assert line[1] == ("anomalous" if prediction.label else "good")


def test_predict_reports_a_bad_file_and_predicts_the_others(model: Path, images: Path, tmp_path: Path) -> None:
    (images / "1.png").write_bytes(b"not an image")
    out = tmp_path / "out"
    result = _run("predict", model, images, "--out", out)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    assert "1.png" in result.stderr and "1 of 3" in result.stderr
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert rows[1]["score"] == ""
    overlays = sorted(path.name for path in out.glob("*.png"))
    assert overlays == ["00000_0.png", "00002_2.png"]
    assert Image.open(out / overlays[0]).size == (40, 30)


def test_an_overlay_that_cannot_be_written_ends_the_run_with_its_reason_and_loses_no_prediction(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "_write_overlay", full)
    result = _run("predict", model, images, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    printed = [line.split("\t")[2] for line in result.stdout.splitlines()]
    assert printed, "the first overlay is started after its line"
    with (tmp_path / "out" / "predictions.csv").open(encoding="utf-8") as file:
        assert [row["path"] for row in csv.DictReader(file)] == printed


def test_a_score_that_is_nan_fails(images: Path, tmp_path: Path) -> None:
    broken = small_detector()
    with torch.no_grad():
        broken.student.conv4.bias[0] = math.nan
    result = _run("predict", broken.save(tmp_path / "broken.safetensors"), images)
    assert result.exit_code == 1
    assert result.stdout == "" and "NaN" in result.stderr and "3 of 3" in result.stderr


def test_file_names_of_any_bytes_are_predicted(model: Path, images: Path, tmp_path: Path) -> None:
    strange = os.fsencode(images) + b"/\xff\xfe\ttab\n.png"
    (images / "0.png").rename(os.fsdecode(strange))
    out = tmp_path / "out"
    result = _run("predict", model, images, "--out", out)
    assert result.exit_code == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(lines) == 3 and all(len(line) == 3 for line in lines)
    assert any(line[2].endswith(r"\udcff\udcfe\ttab\n.png") for line in lines)
    with (out / "predictions.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert len(list(out.glob("*.png"))) == 3


def test_overlays_are_turned_as_the_image_was(model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "turned.jpg", exif=exif)
    for option, size in (("--apply-exif", (20, 60)), ("--ignore-exif", (60, 20))):
        out = tmp_path / option
        assert _run("predict", model, tmp_path / "turned.jpg", "--out", out, option).exit_code == 0
        with Image.open(out / "00000_turned.png") as image:
            assert image.size == size


def test_what_was_predicted_before_an_interruption_is_kept(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Detector.stream

    def interrupted(self: Detector, *args: Any, **kwargs: Any) -> Iterator[Prediction]:
        yield from itertools.islice(stream(self, *args, **kwargs), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(Detector, "stream", interrupted)
    result = _run("predict", model, images, "--out", tmp_path / "out")
    assert result.exit_code == 130
    with (tmp_path / "out" / "predictions.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_predict_takes_16_bit_files(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(path)
    bright, dark = (_run("predict", model, path, *options) for options in (["--max-value", 1023], []))
    assert bright.exit_code == dark.exit_code == 0
    assert bright.stdout.split("\t")[0] != dark.stdout.split("\t")[0]
    assert _run("predict", model, path, "--max-value", 1023, "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent.safetensors", "x.png"], "No detector file"),
        (["train", "absent", "--out", "m.safetensors", "--teacher", "random"], "absent"),
        (["train", ".", "--out", "m.pth"], ".safetensors"),
        (["train", ".", "--out", "m.safetensors", "--preset", "slow"], "preset"),
        (["train", ".", "--out", "m.safetensors", "--size", "big"], "size"),
        (["train", ".", "--out", "m.safetensors", "--size", "128"], "256"),
        (["distill", "--out", "t.safetensors"], "needs images"),
        (["distill", "--out", "t.safetensors", "--backbone", "resnet", "--synthetic", "1"], "backbone"),
    ],
)
def test_wrong_usage_is_told_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_an_empty_folder_is_told_in_a_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = _run("predict", model, tmp_path / "empty")
    assert result.exit_code == 2 and "empty" in result.stderr


def test_train_evaluate_and_report(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher_file = tmp_path / "teacher.safetensors"
    weights.save_teacher(PatchDescriptionNetwork("s", CHANNELS), teacher_file, {"made_by": "test"})
    data = tmp_path / "data"
    for part in ("train/good", "test/good", "test/dent"):
        (data / part).mkdir(parents=True)
        for path in images.iterdir():
            (data / part / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "trained.safetensors"
    result = _run("train", data, "--out", out, "--preset", "quick", "--steps", 2, "--teacher", teacher_file)
    assert result.exit_code == 0, result.output
    assert "pretraining penalty: none" in result.stdout and "steps: 2 of 2" in result.stdout

    report, figures = tmp_path / "report.html", tmp_path / "figures.json"
    result = _run("evaluate", out, data, "--report", report, "--json", figures)
    assert result.exit_code == 0, result.output
    assert "dent" in result.stdout and report.read_text().startswith("<!doctype html>")
    assert json.loads(figures.read_text())["image_auroc"] == pytest.approx(0.5)

    (data / "test/good/0.png").write_bytes(b"")
    result = _run("evaluate", out, data)
    assert result.exit_code == 1 and "0.png" in result.stderr


def test_calibrate_adds_a_precision_that_predict_and_evaluate_use(model: Path, images: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    out = tmp_path / "calibrated.safetensors"
    result = _run("calibrate", model, images, "--dtype", "bfloat16", "--batch-size", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert "all 3 good images" in result.stdout and "calibration: 3 of 3" in result.stdout
    assert model.read_bytes() == before
    calibrated = Detector.load(out)
    threshold = calibrated.precisions["bfloat16"].threshold
    assert f"threshold in bfloat16 {threshold:.4f} (float32: 0.2500)" in result.stdout
    assert calibrated.threshold == 0.25
    result = _run("predict", out, images, "--dtype", "bfloat16")
    assert result.exit_code == 0 and "anomalous" not in result.stdout
    told = _run("info", out)
    assert told.exit_code == 0 and f"bfloat16 (threshold {round(threshold, 6)}, 3 images)" in told.stdout
    assert json.loads(_run("info", out, "--json").stdout)["model"] == "EfficientAD-S"


def test_calibrate_writes_into_the_detectors_own_file(model: Path, images: Path) -> None:
    one = images / "only"
    one.mkdir()
    (images / "0.png").rename(one / "0.png")
    assert _run("calibrate", model, one, "--dtype", "bfloat16").exit_code == 0
    assert list(Detector.load(model).precisions) == ["bfloat16"]


def test_calibrate_says_what_is_wrong_and_leaves_the_file(model: Path, images: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    (images / "1.png").write_bytes(b"")
    data = tmp_path / "data"
    for part in ("train/good", "test/dent", "test/good"):
        (data / part).mkdir(parents=True)
        (data / part / "0.png").write_bytes((images / "0.png").read_bytes())
    (tmp_path / "empty").mkdir()
    for folder, options, message in (
        (images, ["--dtype", "bfloat16"], "1 of 3 images cannot be used"),
        (images, ["--dtype", "float32"], "float16, bfloat16, float8, got float32"),
        (images, ["--dtype", "int4"], "int4"),
        (images, ["--dtype", "float16", "--out", "m.pth"], ".safetensors"),
        (tmp_path / "empty", ["--dtype", "float16"], "no images"),
        (tmp_path / "absent", ["--dtype", "float16"], "no such folder"),
        (data / "test", ["--dtype", "float16"], f"may be defective; give {data} to calibrate"),
        (data / "test" / "dent", ["--dtype", "float16"], f"may be defective; give {data} to calibrate"),
    ):
        result = _run("calibrate", model, folder, *options)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert message in result.stderr.replace("\n", " ")
    assert model.read_bytes() == before
    result = _run("predict", model, images, "--dtype", "float8")
    assert result.exit_code == 2 and "efficientad-fast calibrate MODEL" in result.stderr


def test_evaluate_in_float8_says_that_it_is_emulated(model: Path, images: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("train/good", "test/good", "test/dent"):
        (data / part).mkdir(parents=True)
        (data / part / "0.png").write_bytes((images / "0.png").read_bytes())
    activations = {"conv1": torch.ones(256), "conv2": torch.ones(512), "conv3": torch.ones(512)}
    scaled = Precision(None, 5.0, {**activations, "autoencoder": torch.ones(64)})
    Detector.load(model).replaced(precisions={"float8": scaled}).save(model)
    figures = tmp_path / "figures.json"
    result = _run("evaluate", model, data, "--dtype", "float8", "--json", figures)
    assert result.exit_code == 0, result.output
    assert "emulated on a CPU" in result.stdout and "float8 on cpu" in result.stdout
    written = json.loads(figures.read_text())
    assert written["threshold"] == 5.0 and written["settings"]["dtype"] == "float8"
    assert any("emulated" in note for note in written["notes"])


def test_folders_and_files_of_any_name_are_trained_on_evaluated_and_reported(images: Path, tmp_path: Path) -> None:
    strange = tmp_path / os.fsdecode(b"\xff [bold]\n\xc3\xa4")
    teacher_file = tmp_path / "teacher.safetensors"
    weights.save_teacher(PatchDescriptionNetwork("s", CHANNELS), teacher_file, {"made_by": "test"})
    for part in ("train/good", "test/good", "test/" + os.fsdecode(b"d\xfent")):
        (strange / part).mkdir(parents=True)
        for path in images.iterdir():
            (strange / part / os.fsdecode(b"\xfe" + os.fsencode(path.name))).write_bytes(path.read_bytes())
    (strange / "test/good/\udcfe0.png").write_bytes(b"")
    out, report, figures = (strange / f"{name}\udcff" for name in ("model", "report", "figures"))
    out = out.with_suffix(".safetensors")
    result = _run("train", strange, "--out", out, "--preset", "quick", "--steps", 1, "--teacher", teacher_file)
    assert result.exit_code == 0, result.output
    assert "\\udcff [bold]\nä" in result.stdout
    result = _run("evaluate", out, strange, "--report", report, "--json", figures)
    assert result.exit_code == 1, result.output
    assert "\\udcfe0.png: the file is empty" in result.stderr
    paths = [image["path"] for image in json.loads(figures.read_text(encoding="utf-8"))["images"]]
    assert "test/good/\udcfe0.png" in paths and "test/d\udcfent/\udcfe2.png" in paths
    assert "\\udcfe0.png" in report.read_text(encoding="utf-8")
    told = _run("info", out)
    assert told.exit_code == 0 and "\\udcff [bold]" in told.stdout
    result = _run("predict", out, strange / "test" / "good", "--out", strange / "results")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2, result.output


def test_evaluating_a_flat_folder_says_what_is_needed(model: Path, images: Path) -> None:
    result = _run("evaluate", model, images)
    assert result.exit_code == 2 and "test images" in result.stderr.replace("\n", " ")


def test_samples_refuse_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = _run("samples", tmp_path)
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_steers_a_terminal_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    detector = small_detector()
    detector.replaced(provenance={"made_by": "\x1b[31m[red]you\x07"}).save(path)
    result = _run("info", path)
    assert "\\x1b[31m[red]you\\x07" in result.stdout and "\x1b" not in result.stdout
    data = tmp_path / "set"
    for folder in ("train/good", "test/good"):
        (data / folder).mkdir(parents=True)
        Image.new("RGB", (30, 40)).save(data / folder / "0.png")
    (data / "test" / "good" / "\x1b[31m.png").write_bytes(b"no image")
    result = _run("evaluate", path, data)
    assert result.exit_code == 1
    assert "\\x1b[31m.png: not an image" in result.stderr.replace("\n", " ") and "\x1b" not in result.stderr


def test_info_reports_backends_and_the_teacher() -> None:
    text = _run("info")
    assert text.exit_code == 0
    for word in ("PyTorch", "reference", "cpu", "cuda", "triton", "PDN-S"):
        assert word in text.stdout
    facts = json.loads(_run("info", "--json").stdout)
    assert facts
