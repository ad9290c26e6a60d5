"""This package beside anomalib itself: checkpoints that anomalib writes, its forward pass, its Engine.

Run in an environment that has anomalib 2.x, from the root of a checkout::

    python -m tests.interop.parity            # compare; the exit code says whether all is within the limits
    python -m tests.interop.parity --record   # write expected.json beside this file, which the tests read everywhere

Nothing is downloaded: weights come from a seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anomalib
import numpy as np
import torch
from anomalib.models import EfficientAd
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Trainer

import efficientad_fast
from efficientad_fast import Detector
from tests import anomalib_networks
from tests.anomalib_networks import fill, seeded_images

LIMITS = {"float64": 1e-5, "float32": 1e-4}
"""Of norms: ``|ours - theirs| / |theirs|``, of maps and of scores."""

EXPECTED = Path(__file__).with_name("expected.json")

CASES = [(size, padding) for size in ("small", "medium") for padding in (False, True)]

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
    results = [one for name in arguments.only or CHECKS for one in CHECKS[name]()]
    failed = [name for name, passed in results if not passed]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


def told(name: str, passed: bool, what: str) -> tuple[str, bool]:
    print(f"{'ok  ' if passed else 'FAIL'} {name}: {what}", flush=True)
    return name, passed


def built(size: str, padding: bool, *, seed: int = 0, statistics: bool = True, **settings: Any) -> EfficientAd:
    model = EfficientAd(model_size=size, padding=padding, **settings)
    fill(model.model, seed, statistics=statistics)
    return model.eval()


def saved(model: EfficientAd, path: Path) -> Path:
    """By Lightning, as a training would."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


@torch.no_grad()
def theirs(model: EfficientAd, images: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``(N,)`` and maps ``(N, H, W)`` of anomalib's preprocessing and torch model."""
    batch = torch.from_numpy(images).movedim(-1, 1).to(dtype) / 255
    # Its constants are float32, which rounds 0.485 before it is widened.
    out = model.model.to(dtype)(model.pre_processor(batch))
    return out.pred_score.flatten(), out.anomaly_map[:, 0]


def ours(detector: Detector, images: np.ndarray, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    predictions = [detector.predict(image, dtype=dtype) for image in images]
    return torch.tensor([one.score for one in predictions]), torch.from_numpy(
        np.stack([one.anomaly_map for one in predictions])
    )


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


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
            expected = model(batch).pred_label.flatten().tolist()
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
    return iter(())


def engine() -> Iterator[tuple[str, bool]]:
    return iter(())


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
    one.__name__: one for one in (checkpoints, thresholds, files_of_before, teachers, stand_in, accelerated, engine)
}


if __name__ == "__main__":
    main()
