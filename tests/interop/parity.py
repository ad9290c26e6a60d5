"""This package beside anomalib itself: checkpoints that anomalib writes, its forward pass, its Engine.

Run in an environment that has anomalib 2.x, from the root of a checkout::

    python -m tests.interop.parity            # compare; the exit code says whether all is within the limits
    python -m tests.interop.parity --record   # write expected.json beside this file, which the tests read everywhere

Nothing is downloaded: weights come from a seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anomalib
import numpy as np
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.models import EfficientAd
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import efficientad_fast
from efficientad_fast import Detector
from tests import anomalib_networks
from tests.anomalib_networks import fill, seeded_images
from tests.interop.comparing import CASES, LIMITS, distance, finish, ours, saved, told

EXPECTED = Path(__file__).with_name("expected.json")

PIXELS = 16
"""Of each map that are recorded, spread over it."""

CHANNELS = 16
"""Of the models that expectations are recorded of: enough, and ten times smaller than the real ones."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", action="append", choices=CHECKS)
    arguments = parser.parse_args()
    print(
        f"anomalib {anomalib.__version__}, PyTorch {torch.__version__}, efficientad_fast {efficientad_fast.__version__}"
    )
    if arguments.record:
        record()
        return
    finish(one for name in arguments.only or CHECKS for one in CHECKS[name]())


def built(size: str, padding: bool, *, seed: int = 0, statistics: bool = True, **settings: Any) -> EfficientAd:
    model = EfficientAd(model_size=size, padding=padding, **settings)
    fill(model.model, seed, statistics=statistics)
    return model.eval()


@torch.no_grad()
def theirs(model: EfficientAd, images: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``(N,)`` and maps ``(N, H, W)`` of anomalib's preprocessing and torch model."""
    batch = torch.from_numpy(images).movedim(-1, 1).to(dtype) / 255
    # As Engine does it. The pre-processor's forward, which is for exported models, resizes without antialiasing.
    out = model.model.to(dtype)(model.pre_processor.transform(batch))
    return out.pred_score.flatten(), out.anomaly_map[:, 0]


def checkpoints() -> Iterator[tuple[str, bool]]:
    images = seeded_images(1, (300, 280))
    with tempfile.TemporaryDirectory() as folder:
        for size, padding in CASES:
            for pad_maps, statistics in ((True, True), (False, True), (True, False)):
                # These differ in what comes after the networks, of which the small ones will do.
                if size == "medium" and not (pad_maps and statistics):
                    continue
                model = built(size, padding, pad_maps=pad_maps, statistics=statistics)
                with quietly():
                    detector = Detector.load(saved(model, Path(folder) / "model.ckpt"))
                for name, limit in LIMITS.items():
                    dtype = getattr(torch, name)
                    pairs = zip(ours(detector, images, name), theirs(model, images, dtype), strict=True)
                    scores, maps = (distance(*pair) for pair in pairs)
                    case = f"{size}, padding {padding}, pad_maps {pad_maps}, statistics {statistics}, {name}"
                    yield told(case, max(scores, maps) <= limit, f"scores {scores:.1e}, maps {maps:.1e} of {limit}")


def thresholds() -> Iterator[tuple[str, bool]]:
    """Decisions of the whole Lightning module, at many thresholds and sensitivities."""
    images = seeded_images(6, seed=1)
    batch = torch.from_numpy(images).movedim(-1, 1).float() / 255
    plain = built("small", False)
    scores = theirs(plain, images, torch.float32)[0]
    low, high = float(scores.min()), float(scores.max())
    nan = float("nan")
    with tempfile.TemporaryDirectory() as folder:
        for threshold, bounds, options in (
            (float(scores.median()), (low, high), {}),
            (float(scores.median()), (low, high), {"image_sensitivity": 0.3}),
            (float(scores.median()), (low, high), {"image_sensitivity": 0.8}),
            (float(scores.median()), (low, high), {"enable_normalization": False, "image_sensitivity": 0.2}),
            (nan, (low, high), {}),
            (float(scores.median()), (nan, nan), {}),
            (float(scores.median()), (low, low), {}),
        ):
            model = built("small", False, post_processor=PostProcessor(**options))
            model.post_processor._image_threshold.fill_(threshold)
            model.post_processor.image_min.fill_(bounds[0])
            model.post_processor.image_max.fill_(bounds[1])
            # One by one: anomalib 2.0's post-processor takes no more.
            expected = [bool(model(one[None]).pred_label) for one in batch]
            detector = Detector.load(saved(model, Path(folder) / "model.ckpt"))
            found = [detector.predict(image).label for image in images]
            yield told(f"threshold {threshold:.3f}, {bounds}, {options}", found == expected, f"{found}")


def files_of_before() -> Iterator[tuple[str, bool]]:
    """Checkpoints that hold pickled components, as anomalib wrote them before 2.7."""
    for size in ((256, 256), (320, 288)):
        model = built("small", False)
        model.pre_processor = EfficientAd.configure_pre_processor(size)
        model.post_processor._image_threshold.fill_(1.5)
        model.post_processor.image_min.fill_(1.0)
        model.post_processor.image_max.fill_(2.0)
        with tempfile.TemporaryDirectory() as folder:
            path = saved(model, Path(folder) / "model.ckpt")
            content = torch.load(path, weights_only=False)
            for name in [name for name in content if name.startswith("anomalib_")]:
                del content[name]
            content["hyper_parameters"] |= {
                "pre_processor": model.pre_processor,
                "post_processor": PostProcessor(image_sensitivity=0.3),
                "model_size": model.model_size,
            }
            torch.save(content, path)
            detector = Detector.load(path)
        passed = detector.size == size and abs(detector.threshold - 1.7) < 1e-6
        yield told(f"pickled components, {size}", passed, f"{detector.size}, threshold {detector.threshold}")


def teachers() -> Iterator[tuple[str, bool]]:
    for size, padding in CASES:
        teacher = built(size, padding).model.teacher
        image = torch.from_numpy(seeded_images(1)).movedim(-1, 1).float() / 255
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "pretrained_teacher.pth"
            torch.save(teacher.state_dict(), path)
            loaded, _ = efficientad_fast.weights.load_teacher(path, padding=padding)
            mean, std = anomalib_networks.MEAN, anomalib_networks.STD
            error = distance(loaded((image - mean) / std), teacher(image))
        yield told(f"teacher {size}, padding {padding}", error <= LIMITS["float32"], f"{error:.1e}")


def stand_in() -> Iterator[tuple[str, bool]]:
    """What the tests use in anomalib's place gives the same numbers, and has the same names."""
    images = seeded_images(1)
    for size, padding in CASES:
        model = built(size, padding, teacher_out_channels=CHANNELS)
        imitation = anomalib_networks.EfficientAdModel(CHANNELS, size, padding).eval()
        names = set(imitation.state_dict()) == set(model.model.state_dict())
        imitation.load_state_dict(model.model.state_dict())
        batch = torch.from_numpy(images).movedim(-1, 1).float() / 255
        with torch.no_grad():
            error = distance(imitation(batch).anomaly_map, model.model(batch).anomaly_map)
        yield told(f"stand-in {size}, padding {padding}", names and error <= 1e-6, f"{error:.1e}")


def accelerated() -> Iterator[tuple[str, bool]]:
    images = seeded_images(1)
    batch = torch.from_numpy(images).movedim(-1, 1).float() / 255
    for size, padding in CASES:
        model = built(size, padding)
        with torch.no_grad():
            expected = model(batch)
            found = efficientad_fast.accelerate(model)(batch)
        error = max(distance(found.anomaly_map, expected.anomaly_map), distance(found.pred_score, expected.pred_score))
        same = type(found) is type(expected) and isinstance(model, EfficientAd)
        yield told(f"accelerated {size}, padding {padding}", same and error <= LIMITS["float32"], f"{error:.1e}")
    scores = []
    for fast in (False, True):
        model = built("small", False, visualizer=False)
        model = efficientad_fast.accelerate(model) if fast else model
        trainer = Trainer(precision="64-true", accelerator="cpu", logger=False, enable_checkpointing=False)
        (found,) = trainer.predict(model, DataLoader(_Items(batch), collate_fn=lambda items: items[0]))
        scores.append(found.pred_score)
    error = distance(*scores)
    yield told("accelerated, Trainer in float64", error <= LIMITS["float64"], f"{error:.1e}")


class _Items(Dataset):
    """A batch of images as anomalib's data sets give it."""

    def __init__(self, batch: torch.Tensor) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> ImageBatch:
        return ImageBatch(image=self._batch)


def sample_set(folder: Path) -> Folder:
    """A few images in folders, as a data module."""
    for kind, seed in (("good", 0), ("bad", 1), ("train", 2)):
        (folder / kind / "all").mkdir(parents=True)
        for index, image in enumerate(seeded_images(4, (300, 280), seed)):
            # Blocks in the bad ones, so that there is something to tell apart.
            image[100:150, 100:150] = 255 if kind == "bad" else image[100:150, 100:150]
            Image.fromarray(image).save(folder / kind / "all" / f"{index}.png")
    return Folder(
        "parity",
        normal_dir="train/all",
        abnormal_dir="bad/all",
        normal_test_dir="good/all",
        root=folder,
        train_batch_size=1,
        eval_batch_size=2,
        num_workers=0,
        val_split_mode="same_as_test",
    )


def engine() -> Iterator[tuple[str, bool]]:
    """Engine's test and predict, with a model as it is and accelerated."""
    with tempfile.TemporaryDirectory() as name, quietly():
        folder = Path(name)
        data = sample_set(folder)
        found = []
        for fast in (False, True):
            model = built("small", False)
            for kind in ("image", "pixel"):
                getattr(model.post_processor, f"_{kind}_threshold").fill_(0.5)
                getattr(model.post_processor, f"{kind}_min").fill_(-0.2)
                getattr(model.post_processor, f"{kind}_max").fill_(1.0)
            if fast:
                efficientad_fast.accelerate(model)
            model.train()  # as a new model is, whose mode Engine restores
            runner = Engine(accelerator="cpu", devices=1, logger=False, default_root_dir=folder / "results")
            (metrics,) = runner.test(model, datamodule=data, verbose=False)
            batches = runner.predict(model, dataloaders=data.test_dataloader(), return_predictions=True)
            kinds = ("pred_score", "anomaly_map", "pred_label")
            results = [torch.cat([getattr(batch, kind).flatten() for batch in batches]) for kind in kinds]
            found.append((metrics, results, type(model.model).__name__))
        (plain, theirs, _), (fast_metrics, results, kind) = found
        agree = plain.keys() == fast_metrics.keys() and all(
            abs(plain[key] - fast_metrics[key]) <= 1e-4 for key in plain
        )
        yield told("Engine.test gives the same metrics", agree and len(plain) > 1, f"{plain} and {fast_metrics}")
        errors = [distance(one, other) for one, other in zip(results[:2], theirs[:2], strict=True)]
        same = torch.equal(results[2], theirs[2])
        yield told(
            "Engine.predict gives the same", same and max(errors) <= LIMITS["float32"], f"{errors}, labels {same}"
        )
        yield told("it is accelerated after both", kind.startswith("Accelerated"), kind)


def training() -> Iterator[tuple[str, bool]]:
    """Engine.fit, which undoes the acceleration; the checkpoint that it leaves; accelerating again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = sample_set(folder)
        model = built("small", False, imagenet_dir=folder / "good")
        model.prepare_pretrained_model = lambda: None  # type: ignore[method-assign]  # which would download it
        efficientad_fast.accelerate(model)
        model.train()  # as a new model is; Lightning trains it in the mode that it has
        runner = Engine(
            accelerator="cpu", devices=1, logger=False, default_root_dir=folder / "results", max_steps=4, max_epochs=1
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runner.fit(model, datamodule=data)
        said = any("call efficientad_fast.accelerate again" in str(one.message) for one in caught)
        undone = type(model.model).__name__ == "EfficientAdModel"
        yield told("Engine.fit undoes it and says so", said and undone, f"said {said}, undone {undone}")
        model.eval()
        images = seeded_images(3, (300, 280), 5)
        scores, maps = theirs(model, images, torch.float32)
        (checkpoint,) = {path.resolve() for path in (folder / "results").rglob("*.ckpt")}
        detector = Detector.load(checkpoint)
        pairs = zip(ours(detector, images, "float32"), (scores, maps), strict=True)
        errors = [distance(*pair) for pair in pairs]
        yield told("the checkpoint of Engine.fit", max(errors) <= LIMITS["float32"], f"{errors}, {detector.summary()}")
        threshold = float(model.post_processor.image_threshold)
        yield told("its threshold", abs(detector.threshold - threshold) <= 1e-6, f"{detector.threshold}, {threshold}")
        efficientad_fast.accelerate(model)
        error = distance(theirs(model, images, torch.float32)[1], maps)
        yield told("accelerated again", error <= LIMITS["float32"], f"{error:.1e}")


def record() -> None:
    """Numbers of anomalib's own forward pass in float64."""
    images = seeded_images(1)
    found = {}
    for size, padding in CASES:
        model = built(size, padding, teacher_out_channels=CHANNELS)
        scores, maps = theirs(model, images, torch.float64)
        flat = maps[0].flatten()
        places = torch.linspace(0, len(flat) - 1, PIXELS).long()
        found[f"{size}, padding {padding}"] = {
            "score": float(scores[0]),
            "norm": float(flat.norm()),
            "pixels": [float(one) for one in flat[places]],
        }
    content = {
        "made_by": f"anomalib {anomalib.__version__}, PyTorch {torch.__version__}: tests/interop/parity.py --record",
        "channels": CHANNELS,
        "expected": found,
    }
    EXPECTED.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {EXPECTED}")


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CHECKS: dict[str, Callable[[], Iterator[tuple[str, bool]]]] = {
    one.__name__: one
    for one in (checkpoints, thresholds, files_of_before, teachers, stand_in, accelerated, engine, training)
}


if __name__ == "__main__":
    main()
