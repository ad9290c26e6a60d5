"""results.py and predicting into a folder: rows, overlays, going on, and being killed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib_networks import EfficientAdModel, checkpoint, fill, saved, with_numbers
from PIL import Image
from typer.testing import CliRunner, Result

from efficientad_fast import Detector, Prediction, cli
from efficientad_fast.data.arrivals import FileVersion, file_version
from efficientad_fast.errors import ImageError, InputError, OutputError
from efficientad_fast.files import printable
from efficientad_fast.results import FIELDS, Results
from tests.small_detector import small_detector

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("EFFICIENTAD_FAST_KILLS", "3"))
"""Random moments at which each writer is killed; `make kill` has 100."""

RUN = {"detector": "a", "dtype": "float32"}
VERSION = FileVersion(1, 2)


def good(source: str = "a.png", score: float = 0.5) -> Prediction:
    return Prediction(source, score, False, np.zeros((4, 4), np.float32))


def drawn(path: Path, prediction: Prediction) -> None:
    path.write_bytes(b"overlay")


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


# The folder


def test_rows_and_overlays(tmp_path: Path) -> None:
    odd = "a\n\udcff,\"'\\.png"
    with Results(tmp_path, RUN, draw=drawn) as results:
        results.add(good(), VERSION)
        results.add(Prediction("b.png", float("nan"), None, None, "b.png: empty\n"), None)
        results.add(Prediction(odd, 1.5, True, None, note="of many"), FileVersion(3, 4))
    first, second, third = table(tmp_path)
    assert tuple(first) == FIELDS
    assert list(first.values()) == ["a.png", "0.5", "False", "", "", "00000_a.png", "1", "2"]
    assert list(second.values()) == ["b.png", "", "", r"b.png: empty\n", "", "", "", ""]
    assert third["path"] == r"a\n\udcff,\"'\\.png".replace(r"\"", '"') and third["note"] == "of many"
    overlays = {path.name for path in tmp_path.glob("*.png")}
    assert overlays == {first["overlay"], third["overlay"]}


def test_what_is_done_is_known_later(tmp_path: Path) -> None:
    with Results(tmp_path, RUN, draw=drawn) as results:
        assert not results.is_done("a.png", VERSION)
        results.add(good(), VERSION)
        results.add(Prediction("b.png", float("nan"), None, None, "b.png: empty"), VERSION)
        results.add(good("c.png"), VERSION)
        results.add(good("d.png"), None)
    (tmp_path / "00002_c.png").unlink()
    with Results(tmp_path, RUN, draw=drawn) as results:
        assert results.is_done("a.png", VERSION) and results.is_done(Path("a.png"), VERSION)
        assert not results.is_done("a.png", FileVersion(1, 3))
        # It failed; its overlay has gone; its version was not known.
        assert not any(results.is_done(name, VERSION) for name in ("b.png", "c.png", "d.png"))
        results.forget(["a.png", "b.png", "e.png"])
        results.add(good("b.png"), VERSION)
    assert [row["path"] for row in table(tmp_path)] == ["a.png", "c.png", "d.png", "b.png"]
    assert table(tmp_path)[-1]["overlay"] == "00004_b.png"
    with Results(tmp_path, RUN) as results:
        # Where none are drawn, none are missed.
        assert all(results.is_done(name, VERSION) for name in ("a.png", "b.png", "c.png"))


def test_another_run_is_refused_unless_it_drops_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "00000_mine.png").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_text("mine")
    with Results(tmp_path, RUN, draw=drawn) as results:
        results.add(good(), VERSION)
    with pytest.raises(InputError, match=r"dtype = 'float32', but this run has 'float16'\. Give another.*--restart"):
        Results(tmp_path, {**RUN, "dtype": "float16"})
    assert len(table(tmp_path)) == 1
    with Results(tmp_path, {**RUN, "dtype": "float16"}, restart=True) as results:
        assert not results.is_done("a.png", VERSION)
    assert table(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000_mine.png",
        "notes.txt",
        "predictions.csv",
        "predictions.json",
    ]


@pytest.mark.parametrize(
    "content",
    [
        "path,score,anomalous,error\r\na.png,1,True,\r\n",
        "",
        ",".join(FIELDS) + "\r\na,b\r\n",
        ",".join(FIELDS) + '\r\n"a',
        ",".join(FIELDS) + "\r\n" + "x" * 200_000 + "," * 7 + "\r\n",
        "\udcff\r\n",
    ],
)
def test_a_table_that_is_not_ours_is_refused_and_left(tmp_path: Path, content: str) -> None:
    with Results(tmp_path, RUN):
        pass
    path = tmp_path / "predictions.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    before = path.read_bytes()
    if content.endswith('"a'):
        with Results(tmp_path, RUN):
            assert table(tmp_path) == []
        return
    if content:
        with pytest.raises(InputError, match=r"predictions\.csv.*--restart"):
            Results(tmp_path, RUN)
        assert path.read_bytes() == before
    (tmp_path / "predictions.json").unlink()
    with pytest.raises(InputError, match=r"not what made them in predictions\.json"):
        Results(tmp_path, RUN)


def test_names_in_a_table_are_not_trusted(tmp_path: Path) -> None:
    outside = tmp_path / "00000_precious.png"
    outside.write_bytes(b"precious")
    folder = tmp_path / "out"
    with Results(folder, RUN, draw=drawn) as results:
        results.add(good(), VERSION)
    lines = (folder / "predictions.csv").read_text()
    (folder / "predictions.csv").write_text(lines.replace("00000_a.png", "../00000_precious.png"))
    with Results(folder, RUN, draw=drawn) as results:
        assert not results.is_done("a.png", VERSION)
    with Results(folder, RUN, restart=True):
        assert outside.exists()


def test_half_a_row_at_the_end_is_cut(tmp_path: Path) -> None:
    with Results(tmp_path, RUN) as results:
        results.add(good("a.png"), VERSION)
        results.add(good("b.png"), VERSION)
    path = tmp_path / "predictions.csv"
    whole = path.read_bytes()
    for cut in range(1, 12):
        path.write_bytes(whole[:-cut])
        with Results(tmp_path, RUN) as results:
            assert results.is_done("a.png", VERSION) and not results.is_done("b.png", VERSION)
            results.add(good("b.png"), VERSION)
        assert path.read_bytes() == whole


def test_an_emptied_table_begins_anew(tmp_path: Path) -> None:
    with Results(tmp_path, RUN) as results:
        results.add(good("a.png"), VERSION)
    whole = (tmp_path / "predictions.csv").read_bytes()
    for content in (b"", whole[:20]):
        (tmp_path / "predictions.csv").write_bytes(content)
        with Results(tmp_path, RUN) as results:
            assert not results.is_done("a.png", VERSION)
            results.add(good("a.png"), VERSION)
        assert (tmp_path / "predictions.csv").read_bytes() == whole


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_row_that_is_being_written_when_interrupted_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    original = os.write

    def interrupted(descriptor: int, content: bytes) -> int:
        monkeypatch.setattr(os, "write", original)
        if moment == "after":
            original(descriptor, content)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Results(tmp_path, RUN) as results:
        results.add(good("a.png"), VERSION)
        monkeypatch.setattr(os, "write", interrupted)
        results.add(good("b.png"), VERSION)
    assert [row["path"] for row in table(tmp_path)] == ["a.png", "b.png"]


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="is a file, or in one"):
            Results(place, RUN)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Results(tmp_path, RUN), pytest.raises(InputError, match="Another process writes predictions"):
        Results(tmp_path, RUN)
    with Results(tmp_path, RUN):
        pass


def test_an_overlay_whose_file_has_gone_is_noted(tmp_path: Path) -> None:
    def gone(path: Path, prediction: Prediction) -> None:
        raise ImageError("a.png: no such file")

    with Results(tmp_path, RUN, draw=gone) as results:
        results.add(good(), VERSION)
    assert table(tmp_path)[0]["note"] == "no overlay: a.png: no such file" and table(tmp_path)[0]["score"] == "0.5"


@pytest.mark.parametrize("name", ["x" * 251, "ä" * 120, "\udcff" * 240, "\n" * 250])
def test_overlays_of_files_with_the_longest_names_have_shorter_ones(tmp_path: Path, name: str) -> None:
    with Results(tmp_path, RUN, draw=drawn) as results:
        results.add(good(name + ".png"), VERSION)
    with Results(tmp_path, RUN, draw=drawn) as results:
        assert results.is_done(name + ".png", VERSION)


@pytest.mark.skipif(not hasattr(os, "ftruncate"), reason="no ftruncate")
def test_a_row_that_does_not_fit_leaves_the_table_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with Results(tmp_path, RUN) as results:
        results.add(good(), VERSION)
        before = (tmp_path / "predictions.csv").read_bytes()

        def full(file: int, content: bytes) -> int:
            if len(content) > 10:
                return write(file, content[:10])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OutputError, match=r"predictions\.csv could not be written: No space left"):
                results.add(good("b.png"), VERSION)
        assert (tmp_path / "predictions.csv").read_bytes() == before
        results.add(good("c.png"), VERSION)
    # It is written once there is room.
    assert [row["path"] for row in table(tmp_path)] == ["a.png", "b.png", "c.png"]


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_detector().save(tmp_path / "model.safetensors")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_the_same_command_does_what_is_left(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stream = Detector.stream

    def interrupted(self: Detector, paths: Any, **options: Any) -> Iterator[Prediction]:
        for index, prediction in enumerate(stream(self, paths, **options)):
            if index == 2:
                raise KeyboardInterrupt
            yield prediction

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "stream", interrupted)
        assert run("predict", model, images, "--out", out).exit_code == 130
    assert [Path(row["path"]).name for row in table(out)] == ["0.png", "1.png"]
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    result = run("predict", model, images, "--out", out)
    assert result.exit_code == 0, result.output
    assert [line.split("\t")[2] for line in result.stdout.splitlines()] == [str(images / f"{n}.png") for n in (2, 3)]
    assert f"2 of 4 images are in {out} already" in result.stderr.replace("\n", " ")
    assert [Path(row["path"]).name for row in table(out)] == ["0.png", "1.png", "2.png", "3.png"]
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    result = run("predict", model, images, "--out", out)
    assert result.exit_code == 0 and result.stdout == "" and len(table(out)) == 4


def test_failed_and_changed_images_are_predicted_again(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(whole[:200])
    (images / "2.png").unlink()
    assert run("predict", model, images, "--out", out).exit_code == 1
    result = run("predict", model, images, "--out", out)
    assert result.exit_code == 1 and result.stdout == "" and "1 of 1 images failed" in result.stderr
    assert len(table(out)) == 3
    (images / "1.png").write_bytes(whole)
    (images / "0.png").write_bytes(whole)
    result = run("predict", model, images, "--out", out)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 2
    # Of a file that changed, both versions have their rows; of one that failed, the failure is gone.
    rows = [Path(row["path"]).name for row in table(out)]
    assert rows == ["0.png", "3.png", "0.png", "1.png"] and not any(row["error"] for row in table(out))


def test_another_detector_needs_another_folder_or_restart(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("predict", model, images, "--out", out).exit_code == 0
    before = table(out)
    small_detector(seed=1).save(model)
    result = run("predict", model, images, "--out", out)
    assert result.exit_code == 2 and "--restart" in result.stderr and table(out) == before
    result = run("predict", model, images, "--out", out, "--restart")
    assert result.exit_code == 0 and len(table(out)) == 4
    assert [row["score"] for row in table(out)] != [row["score"] for row in before]
    assert run("predict", model, images, "--out", out, "--max-value", 4095).exit_code == 2


def test_another_checkpoint_in_the_same_folder_is_another_detector(images: Path, tmp_path: Path) -> None:
    inner, out = tmp_path / "latest" / "weights" / "lightning", tmp_path / "out"
    inner.mkdir(parents=True)
    for seed, code in ((0, 0), (1, 2)):
        model = EfficientAdModel(6).eval()
        fill(model, seed)
        saved(with_numbers(checkpoint(model), _image_threshold=1.0), inner / "model.ckpt")
        assert run("predict", tmp_path / "latest", images, "--out", out).exit_code == code


def test_an_empty_folder_is_told_before_anything_is_predicted(model: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("predict", model, images, tmp_path / "empty")
    assert result.exit_code == 2 and result.stdout == "" and "empty: no images here" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--out", "out"]])
def test_names_that_are_too_long_do_not_stop_the_others(
    model: Path, images: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(images)
    result = run("predict", model, "1.png", f"{'x' * 300}.png", "2.png", *arguments)
    assert result.exit_code == 1 and "1 of 3 images failed" in result.stderr
    assert [line.split("\t")[2] for line in result.stdout.splitlines()] == ["1.png", "2.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_searched_does_not_stop_the_others(model: Path, images: Path, tmp_path: Path) -> None:
    (images / "closed").mkdir(mode=0o700)
    (images / "0.png").rename(images / "closed" / "0.png")
    paths = [images / "1.png", images / "closed" / "0.png", images / "2.png"]
    for folder in (images, tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    assert run("predict", model, *paths).exit_code == 0
    told = tmp_path / "told"
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        whole, result = run("predict", model, images), run("predict", model, *paths)
        told.write_text(f"{whole.exit_code} {whole.stdout}\n{result.exit_code}\n{result.stderr}{result.stdout}")
        os._exit(0)
    os.waitpid(child, 0)
    whole, code, failed, count, *good = told.read_text().splitlines()
    # A folder that may not be listed is told before anything is predicted.
    assert whole == "2 "
    assert code == "1" and "closed/0.png: permission denied" in failed and count == "1 of 3 images failed."
    assert [line.split("\t")[2] for line in good] == [str(paths[0]), str(paths[2])]


def test_a_folder_of_results_inside_that_of_the_images_is_no_image(model: Path, images: Path) -> None:
    out = images / "results"
    for _ in range(2):
        assert run("predict", model, images, "--out", out).exit_code == 0
        assert len(table(out)) == 4 and len(list(out.glob("*.png"))) == 4
    for given in (images, images / "1.png"):
        result = run("predict", model, given, "--out", images)
        assert result.exit_code == 2 and "is a folder of images" in result.stderr.replace("\n", " ")


def test_that_there_is_no_threshold_is_said(model: Path, images: Path) -> None:
    assert "threshold" not in run("predict", model, images).stderr
    small_detector().replaced(threshold=float("inf")).save(model)
    assert "no threshold: no image is called anomalous" in run("predict", model, images).stderr.replace("\n", " ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_folder_of_everything_has_a_row_for_each(model: Path, images: Path, tmp_path: Path, batch_size: int) -> None:
    whole = (images / "0.png").read_bytes()
    for name, content in {"cut.png": whole[:300], "empty.png": b"", "text.png": b"no image"}.items():
        (images / name).write_bytes(content)
    os.mkfifo(images / "pipe.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "nowhere.png").symlink_to(images / "gone")
    (images / "link.png").symlink_to(images / "0.png")
    (images / "around").symlink_to(images)
    odd = ["a b.png", "a\nb.png", "\udcff.png", "=1+1.png", "[red].png", "'\"`.png"]
    for name in odd:
        (images / name).write_bytes(whole)
    out = tmp_path / "out"
    result = run("predict", model, images, tmp_path / "absent.png", "--out", out, "--batch-size", batch_size)
    assert result.exit_code == 1 and "Traceback" not in result.output
    rows = {Path(row["path"]).name: row for row in table(out)}
    reasons = {
        "cut.png": "truncated",
        "empty.png": "empty",
        "text.png": "not an image",
        "pipe.png": "pipe",
        "loop.png": "not a usable path",
        "nowhere.png": "no such file",
        "absent.png": "no such file",
    }
    good = {*(f"{number}.png" for number in range(4)), "link.png", *map(printable, odd)}
    assert rows.keys() == good | reasons.keys()
    assert all(reason in rows[name]["error"] for name, reason in reasons.items())
    assert not any(rows[name]["error"] for name in good)
    assert len(result.stdout.splitlines()) == len(good)
    assert f"{len(reasons)} of {len(rows)} images failed" in result.stderr
    # What had failed is tried again, and fails again; nothing is there twice.
    assert run("predict", model, images, tmp_path / "absent.png", "--out", out).exit_code == 1
    assert sorted(row["path"] for row in table(out)) == sorted(row["path"] for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "--follow"), (["a.png", "--follow", "."], "one of the two"), (["a.png", "--restart"], "--out")],
)
def test_arguments_that_do_not_go_together(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("predict", model, *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_overlays_of_large_images_are_smaller(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_MOST_OVERLAY_PIXELS", 500)
    assert run("predict", model, images / "0.png", "--out", tmp_path / "out").exit_code == 0
    with Image.open(tmp_path / "out" / "00000_0.png") as image:
        assert image.size == (20, 15)


# Killed


def kill(what: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.killed", what, folder, str(KILLS)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == KILLS
    return found


def test_saving_a_detector_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    found = kill("save", tmp_path)
    assert any(one["threshold"] < 2 for one in found)


def test_training_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    found = kill("train", tmp_path)
    assert any(one["steps"] or one["out"] for one in found)


def test_predicting_into_a_folder_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    found = kill("predict", tmp_path)
    assert any(one["rows"] for one in found)


def test_a_full_disk_while_predicting_is_told_in_a_sentence(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run("predict", model, images, "--out", out)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "could not be written: No space left on device" in result.stderr
    assert not (out / "predictions.csv").exists()
    assert run("predict", model, images, "--out", out).exit_code == 0
    assert file_version(images / "0.png") == FileVersion(*map(int, list(table(out)[0].values())[-2:]))
    assert json.loads((out / "predictions.json").read_text())["run"]["dtype"] == "float32"
