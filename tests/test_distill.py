"""Distilling a teacher, with a stand-in backbone that is quick to compute."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from efficientad_fast import weights
from efficientad_fast.errors import DetectorFileError, InputError
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

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "steps" and done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(images, broken, SETTINGS, work=tmp_path / "b", progress=stop)
    assert not broken.exists()
    distill(images, broken, SETTINGS, work=tmp_path / "b", resume=True)
    first, second = (weights.load_teacher(path)[0].state_dict() for path in (whole, broken))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_targets_are_cached_once_and_recomputed_for_other_images(images: DistillImages, tmp_path: Path) -> None:
    calls: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append(done)

    first = build_target_cache(images, SETTINGS, tmp_path / "work", _backbone, progress)
    again = build_target_cache(images, SETTINGS, tmp_path / "work", _backbone, progress)
    assert calls == [1, 2, 3]
    assert np.array_equal(first.targets, again.targets) and torch.equal(first.mean, again.mean)
    build_target_cache(dataclasses.replace(images, synthetic=0), SETTINGS, tmp_path / "work", _backbone, progress)
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
