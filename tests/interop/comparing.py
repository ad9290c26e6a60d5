"""What the scripts beside this file share, whatever version of anomalib they run with."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from efficientad_fast import Detector

LIMITS = {"float64": 1e-5, "float32": 1e-4}
"""Of norms: ``|ours - theirs| / |theirs|``, of maps and of scores."""

CASES = [(size, padding) for size in ("small", "medium") for padding in (False, True)]


def told(name: str, passed: bool, what: str) -> tuple[str, bool]:
    print(f"{'ok  ' if passed else 'FAIL'} {name}: {what}", flush=True)
    return name, passed


def finish(results: Iterable[tuple[str, bool]]) -> None:
    """Run them to their end; the exit code says whether all passed."""
    passed = [one for _, one in results]
    print(f"{passed.count(True)} passed, {passed.count(False)} failed")
    sys.exit(0 if all(passed) else 1)


def saved(model: LightningModule, path: Path) -> Path:
    """By Lightning, as a training would."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def ours(detector: Detector, images: np.ndarray, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``(N,)`` and maps ``(N, H, W)``."""
    predictions = [detector.predict(image, dtype=dtype) for image in images]
    return torch.tensor([one.score for one in predictions]), torch.from_numpy(
        np.stack([one.anomaly_map for one in predictions])
    )


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())
