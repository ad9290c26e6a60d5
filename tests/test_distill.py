"""Distilling a teacher, with a stand-in backbone that is quick to compute."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from efficientad_fast import cli, weights
from efficientad_fast.errors import DetectorFileError, ImageError, InputError
from efficientad_fast.reference.networks import PatchDescriptionNetwork
from efficientad_fast.reference.preprocess import IMAGENET_MEAN, IMAGENET_STD
from efficientad_fast.training import distill as module
from efficientad_fast.training.distill import (
    DistillImages,
    DistillSettings,
    build_target_cache,
    distill,
    explained_variance,
    image_and_target,
    quick_distillation,
)

SETTINGS = DistillSettings(
    backbone="stand-in", steps=4, batch_size=2, learning_rate=1e-3, schedule="cosine", crop=48, grey_probability=0.5
)


def _backbone(image: Tensor) -> tuple[Tensor, Tensor]:
    """Local means and their squares: what a PDN can learn."""
    small, smaller = F.avg_pool2d(image, 8), F.avg_pool2d(image, 16)
    return torch.cat([small, small**2], 1), torch.cat([smaller, smaller**2], 1)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_backbone", lambda name: _backbone)


@pytest.fixture
def images(tmp_path: Path) -> DistillImages:
    rng = np.random.default_rng(0)
    files = []
    for index in range(2):
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 256, (90, 80, 3), dtype=np.uint8)).save(files[-1])
    return DistillImages(tuple(files), synthetic=1)


def test_a_teacher_is_made_and_its_file_says_from_what(images: DistillImages, tmp_path: Path) -> None:
    out = tmp_path / "teacher.safetensors"
    provenance = distill(
        images, out, SETTINGS, work=tmp_path / "work", holdout=images.files, terms="free", data="noise"
    )
    teacher, stored = weights.load_teacher(out)
    assert stored == json.loads(json.dumps(provenance))
    assert stored["terms"] == "free" and stored["images"] == 3 and stored["synthetic_images"] == 1
    assert "explained_variance" in stored
    assert teacher(torch.zeros(1, 3, 256, 256)).shape == (1, 384, 56, 56)
    assert "distilled from stand-in" in weights.describe_teacher(stored)


def test_an_interrupted_distillation_resumes_to_the_same_teacher(images: DistillImages, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    distill(images, whole, SETTINGS, work=tmp_path / "a")

    with pytest.raises(KeyboardInterrupt):
        distill(images, broken, SETTINGS, work=tmp_path / "b", progress=_stop_at("steps", 2))
    assert not broken.exists()
    distill(images, broken, SETTINGS, work=tmp_path / "b", resume=True)
    first, second = (weights.load_teacher(path)[0].state_dict() for path in (whole, broken))
    assert all(torch.equal(first[key], second[key]) for key in first)


def _stop_at(stage: str, done: int) -> Callable[[str, int, int], None]:
    """Progress that sends the Ctrl-C signal to this thread: another one of the process might see it late."""

    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (stage, done):
            signal.raise_signal(signal.SIGINT)

    return progress


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class _Counting:
    """The stand-in backbone, and how often it was asked. Fails at one of the calls where told to."""

    def __init__(self, fail_at: int = 0) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("killed")
        return _backbone(image)


def test_caching_that_was_interrupted_continues_with_the_next_image(images: DistillImages, tmp_path: Path) -> None:
    whole = build_target_cache(images, SETTINGS, tmp_path / "whole", _backbone)
    backbone, work = _Counting(), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        build_target_cache(images, SETTINGS, work, backbone, _stop_at("targets", 2))
    assert backbone.calls == module.kept_targets(work) == 2 and module.kept_steps(work) == 0
    cache = build_target_cache(images, SETTINGS, work, backbone)
    assert backbone.calls == module.kept_targets(work) == 3
    for name in ("images", "targets", "mean", "std"):
        assert np.array_equal(getattr(cache, name), getattr(whole, name))


def test_a_killed_caching_continues_from_what_was_last_recorded(
    images: DistillImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_target_cache(images, SETTINGS, tmp_path / "whole", _backbone)
    monkeypatch.setattr(module, "TARGETS_SAVE_EVERY", 1)
    with pytest.raises(RuntimeError, match="killed"):
        build_target_cache(images, SETTINGS, tmp_path / "work", _Counting(fail_at=3))
    assert module.kept_targets(tmp_path / "work") == 2
    cache = build_target_cache(images, SETTINGS, tmp_path / "work", _backbone)
    assert np.array_equal(cache.targets, whole.targets) and torch.equal(cache.std, whole.std)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backbone": "other"}, "backbone = 'stand-in', but this run has 'other'"),
        ({"grey_probability": 0.1}, "grey_probability = 0.5"),
        ({"seed": 1}, "seed = 0"),
    ],
)
def test_targets_of_another_run_are_kept_unless_told_otherwise(
    images: DistillImages, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    work, out = tmp_path / "work", tmp_path / "t.safetensors"
    build_target_cache(dataclasses.replace(images, synthetic=0), SETTINGS, work, _backbone)
    before = _files(work)
    other = dataclasses.replace(SETTINGS, **change)
    for resume in (False, True):
        with pytest.raises(InputError, match=named):
            distill(dataclasses.replace(images, synthetic=0), out, other, work=work, resume=resume)
    renamed = DistillImages((images.files[0], images.files[1].rename(tmp_path / "renamed.png")))
    with pytest.raises(InputError, match=r"other images \(missing: 1.png; new: renamed.png\)"):
        distill(renamed, out, SETTINGS, work=work)
    assert _files(work) == before


def test_a_record_that_cannot_be_read_is_dropped_on_restart_only(images: DistillImages, tmp_path: Path) -> None:
    build_target_cache(images, SETTINGS, tmp_path / "work", _backbone)
    (tmp_path / "work" / "cache.json").write_text('{"identity": 1, "mean": [0.0]}')
    with pytest.raises(InputError, match="does not say what is cached"):
        build_target_cache(images, SETTINGS, tmp_path / "work", _backbone)
    backbone = _Counting()
    build_target_cache(images, SETTINGS, tmp_path / "work", backbone, restart=True)
    assert backbone.calls == 3


def test_steps_are_neither_dropped_nor_continued_unasked(
    images: DistillImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out, backbone = tmp_path / "work", tmp_path / "t.safetensors", _Counting()
    monkeypatch.setattr(module, "load_backbone", lambda name: backbone)
    with pytest.raises(InputError, match=r"no distillation in .* Leave out --resume"):
        distill(images, out, SETTINGS, work=work, resume=True)
    with pytest.raises(KeyboardInterrupt):
        distill(images, out, SETTINGS, work=work, progress=_stop_at("steps", 1))
    assert module.kept_steps(work) == 1
    before = _files(work)
    with pytest.raises(InputError, match=r"holds 1 of 4 steps .* Give --resume to continue it, or --restart"):
        distill(images, out, SETTINGS, work=work)
    with pytest.raises(InputError, match="learning_rate"):
        distill(images, out, dataclasses.replace(SETTINGS, learning_rate=1.0), work=work, resume=True)
    with pytest.raises(InputError, match="exclude each other"):
        distill(images, out, SETTINGS, work=work, resume=True, restart=True)
    assert _files(work) == before
    distill(images, out, dataclasses.replace(SETTINGS, steps=1), work=work, restart=True)
    assert backbone.calls == 3, "targets of the same images must stay"
    assert sorted(_files(work)) == ["cache.json", "images.npy", "targets.npy"]
    finished = out.read_bytes()
    with pytest.raises(InputError, match=r"is there, so it may be finished. Leave out --resume"):
        distill(images, out, SETTINGS, work=work, resume=True)
    assert out.read_bytes() == finished
    # Killed before the first state: the targets alone are something to resume.
    out.unlink()
    distill(images, out, dataclasses.replace(SETTINGS, steps=1), work=work, resume=True)
    assert weights.load_teacher(out)[1]["images"] == 3 and backbone.calls == 3


def test_all_bad_images_are_named_before_the_first_target(images: DistillImages, tmp_path: Path) -> None:
    out, work, holdout = tmp_path / "t.safetensors", tmp_path / "work", tmp_path / "holdout.png"
    images.files[1].write_bytes(b"no image")
    holdout.write_bytes(b"")
    with pytest.raises(ImageError, match="2 of 3 images cannot be used") as caught:
        distill(images, out, SETTINGS, work=work, holdout=[holdout])
    for line, path in zip(str(caught.value).splitlines()[1:], (images.files[1], holdout), strict=True):
        assert line.startswith(str(path))
    assert not work.exists() and not out.exists()


def test_resuming_checks_only_images_without_targets(images: DistillImages, tmp_path: Path) -> None:
    work, stages = tmp_path / "work", list[tuple[str, int, int]]()
    with pytest.raises(KeyboardInterrupt):
        build_target_cache(images, SETTINGS, work, _backbone, _stop_at("targets", 1))

    def progress(*stage: object) -> None:
        stages.append(stage)
        if stage[0] == "targets":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(images, tmp_path / "t.safetensors", SETTINGS, work=work, resume=True, progress=progress)
    assert stages == [("checking images", 1, 1), ("targets", 2, 3)]


def test_a_disk_that_is_too_small_is_refused(
    images: DistillImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    with pytest.raises(InputError, match=r"needs 0.0 GB .* 0.0 GB are free"):
        build_target_cache(images, SETTINGS, tmp_path / "work", _backbone)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("stage", "done", "message"),
    [
        ("checking images", 1, "nothing is kept"),
        ("targets", 1, "1 targets are kept. Give the same command with --resume"),
        ("steps", 1, "1 of 5 steps are kept. Give the same command with --resume"),
    ],
)
def test_ctrl_c_says_what_is_kept(
    images: DistillImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, done: int, message: str
) -> None:
    original = module.distill

    def small(images: DistillImages, out: Path, settings: DistillSettings, **options: Any) -> dict[str, Any]:
        changed = dataclasses.replace(SETTINGS, steps=settings.steps)
        return original(images, out, changed, **(options | {"progress": _stop_at(stage, done)}))

    monkeypatch.setattr(module, "distill", small)
    out = tmp_path / "t.safetensors"
    arguments = ["distill", "--images", images.files[0].parent, "--out", out, "--steps", 5]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 130
    assert message in result.stderr.replace("\n", " ")


def test_targets_are_cached_once_and_recomputed_for_other_images(images: DistillImages, tmp_path: Path) -> None:
    calls: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append(done)

    first = build_target_cache(images, SETTINGS, tmp_path / "work", _backbone, progress)
    again = build_target_cache(images, SETTINGS, tmp_path / "work", _backbone, progress)
    assert calls == [1, 2, 3]
    assert np.array_equal(first.targets, again.targets) and torch.equal(first.mean, again.mean)
    fewer = dataclasses.replace(images, synthetic=0)
    with pytest.raises(InputError, match="synthetic = 1, but this run has 0"):
        build_target_cache(fewer, SETTINGS, tmp_path / "work", _backbone, progress)
    build_target_cache(fewer, SETTINGS, tmp_path / "work", _backbone, progress, restart=True)
    assert calls == [1, 2, 3, 1, 2]


def test_cached_statistics_are_those_of_the_targets(images: DistillImages, tmp_path: Path) -> None:
    cache = build_target_cache(images, SETTINGS, tmp_path / "work", _backbone)
    values = np.asarray(cache.targets, dtype=np.float64).reshape(-1, 384)
    np.testing.assert_allclose(cache.mean.numpy(), values.mean(0), rtol=1e-3)
    np.testing.assert_allclose(cache.std.numpy(), values.std(0), rtol=5e-3)


def test_a_crop_and_its_target_belong_to_the_same_place(tmp_path: Path) -> None:
    """A backbone that returns positions: the target of a crop must name the place where the crop was cut."""
    ramp = np.zeros((512, 512, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(512) // 2, (np.arange(512) // 2)[:, None]
    path = tmp_path / "ramp.png"
    Image.fromarray(ramp).save(path)
    settings = dataclasses.replace(SETTINGS, crop=64, grey_probability=0.0, batch_size=1)
    cache = build_target_cache(DistillImages((path,)), settings, tmp_path / "work", _backbone)
    cache.mean, cache.std = torch.zeros(384), torch.ones(384)
    small, target = image_and_target(torch.from_numpy(ramp).permute(2, 0, 1), _backbone)
    for step in range(4):
        batch, wanted = module._batch(cache, settings, step)
        pixels = batch[0] * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        left, top = (round(float(pixels[channel].min()) * 255) for channel in (0, 1))
        assert wanted.shape == (1, 384, 8, 8)
        row, column = round(top / 4) + 4, round(left / 4) + 4
        expected = target[row : row + 8, column : column + 8].movedim(-1, 0)
        torch.testing.assert_close(wanted[0], expected, rtol=2e-3, atol=2e-3)
    assert small.shape == (3, 256, 256)


def test_explained_variance_is_one_for_the_truth_and_zero_for_the_mean(images: DistillImages) -> None:
    inner = slice(4, 60)
    targets = [image_and_target(module.decode_image(path), _backbone)[1] for path in images.files]
    mean, std = torch.zeros(384), torch.ones(384)

    class Fixed(PatchDescriptionNetwork):
        def __init__(self, outputs: list[Tensor]) -> None:
            super().__init__()
            self.outputs = iter(outputs)

        def forward(self, image: Tensor) -> Tensor:
            return next(self.outputs).movedim(-1, 0).unsqueeze(0)

    truth = [target[inner, inner] for target in targets]
    assert explained_variance(Fixed(truth), images.files, _backbone, mean, std) == pytest.approx(1.0)
    average = torch.cat([one.flatten(0, 1) for one in truth]).double().mean(0).float()
    constant = [average.expand(56, 56, -1)] * 2
    assert explained_variance(Fixed(constant), images.files, _backbone, mean, std) == pytest.approx(0.0, abs=1e-4)
    assert explained_variance(Fixed(targets), images.files, _backbone, mean, std) == pytest.approx(1.0)


def test_no_images_and_bad_crops_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs images"):
        distill(DistillImages(()), tmp_path / "t.safetensors", SETTINGS, work=tmp_path)
    for crop in (32, 50, 300):
        with pytest.raises(InputError, match="crop"):
            dataclasses.replace(SETTINGS, crop=crop)


def test_the_presets_are_valid() -> None:
    assert quick_distillation().crop == 96 and DistillSettings().crop is None


def test_a_file_that_is_no_teacher_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    weights.write_tensors(path, {"a": torch.zeros(1)}, {"format": "other"})
    with pytest.raises(DetectorFileError, match="not a teacher"):
        weights.load_teacher(path)
    teacher = PatchDescriptionNetwork("s", 8)
    weights.save_teacher(teacher, path, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DetectorFileError, match="damaged"):
        weights.load_teacher(path)


def test_the_packaged_teacher_is_small_free_and_better_than_nothing() -> None:
    assert weights.DEFAULT_TEACHER.stat().st_size <= 6_000_000
    teacher, provenance = weights.load_teacher()
    assert provenance["explained_variance"] > 0 and provenance["terms"] and provenance["data"]
    assert all(torch.isfinite(value).all() for value in teacher.state_dict().values())
    assert provenance["settings"]["backbone"] in weights.default_teacher_info()
