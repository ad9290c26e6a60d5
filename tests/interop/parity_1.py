"""This package beside anomalib 1: checkpoints that it writes, and its forward pass.

Run in an environment that has anomalib 1.x, from the root of a checkout: ``python -m tests.interop.parity_1``. Nothing
is downloaded: weights come from a seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import anomalib
import numpy as np
import torch
from anomalib.metrics import MinMax
from anomalib.metrics.threshold import F1AdaptiveThreshold, ManualThreshold
from anomalib.models import EfficientAd
from torchmetrics import MetricCollection
from torchvision.transforms.v2 import Compose, Normalize

import efficientad_fast
from efficientad_fast import Detector
from tests.anomalib_networks import fill, seeded_images
from tests.interop.comparing import CASES, LIMITS, distance, finish, ours, saved, told


def built(size: str, padding: bool, image_size: tuple[int, int], *, normalised: bool = False) -> EfficientAd:
    """As ``Engine`` leaves it: with transform, thresholds, and the range of scores."""
    model = EfficientAd(model_size=size, padding=padding).eval()
    fill(model.model)
    # In anomalib 1.0 with a Normalize, of which later versions have none.
    transform = model.configure_transforms(image_size)
    normalise = Normalize([0.4, 0.5, 0.6], [0.3, 0.2, 0.1])
    model.set_transform(Compose([*transform.transforms, normalise]) if normalised else transform)
    model.image_threshold, model.pixel_threshold = F1AdaptiveThreshold(), F1AdaptiveThreshold()
    model.normalization_metrics = MetricCollection(
        {name: MinMax() for name in ("anomaly_maps", "box_scores", "pred_scores")}
    )
    model.normalization_metrics.update(torch.tensor([0.5, 2.5]))
    return model


@torch.no_grad()
def theirs(model: EfficientAd, images: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``(N,)`` and maps ``(N, H, W)``, as its callbacks make the scores."""
    batch = torch.from_numpy(images).movedim(-1, 1).to(dtype) / 255
    maps = model.model.to(dtype)(model.transform(batch))["anomaly_map"][:, 0]
    return maps.amax((1, 2)), maps


def checkpoints() -> Iterator[tuple[str, bool]]:
    images = seeded_images(1, (300, 280))
    with tempfile.TemporaryDirectory() as folder:
        for size, padding in CASES:
            for image_size in ((256, 256), (320, 288)) if size == "small" else ((256, 256),):
                has_one = len(EfficientAd().configure_transforms((256, 256)).transforms) > 1
                model = built(size, padding, image_size, normalised=size == "small" and not padding and not has_one)
                detector = Detector.load(saved(model, Path(folder) / "model.ckpt"))
                for name, limit in LIMITS.items():
                    pairs = zip(ours(detector, images, name), theirs(model, images, getattr(torch, name)), strict=True)
                    scores, maps = (distance(*pair) for pair in pairs)
                    case = f"{size}, padding {padding}, {image_size}, {name}"
                    passed = detector.size == image_size and max(scores, maps) <= limit
                    yield told(case, passed, f"scores {scores:.1e}, maps {maps:.1e} of {limit}")


def thresholds() -> Iterator[tuple[str, bool]]:
    """Decisions as its callbacks make them, with a threshold that is a score itself."""
    images = seeded_images(6, seed=1)
    model = built("small", False, (256, 256))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        scores = ours(Detector.load(saved(model, path)), images, "float32")[0]
        middle = scores.float().median()
        model.image_threshold.value = middle
        for kind in ("adaptive", "manual"):
            if kind == "manual":
                model.image_threshold = ManualThreshold(float(middle))
            detector = Detector.load(saved(model, path))
            found = [detector.predict(image).label for image in images]
            expected = (scores.float() >= model.image_threshold.value).tolist()
            yield told(f"{kind} threshold {float(middle):.3f}", found == expected, f"{found}")


if __name__ == "__main__":
    print(
        f"anomalib {anomalib.__version__}, PyTorch {torch.__version__}, efficientad_fast {efficientad_fast.__version__}"
    )
    finish(one for check in (checkpoints, thresholds) for one in check())
