"""One image, before and after a switch from another implementation: latency on this machine's CPU.

    python -m benchmarks.migrating [--rounds 30] [--threads 2]

Before and after take turns, so that what else the machine does meets both; of the rounds' times the lower quartile is
shown. anomalib's own model is measured where anomalib is installed, else a stand-in that computes the same
(``tests/interop/parity.py`` compares the two). Weights are random, results are compared first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import efficientad_fast
from efficientad_fast import Detector
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.preprocess import normalise, resize_antialias

# The tests' modules import each other without the folder's name.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from anomalib_networks import EfficientAdModel, checkpoint, fill, seeded_images
from fork_networks import autoencoder, pdn_medium, pdn_small, plain_predict

Q = Quantiles(0.5, 3.0, 0.25, 2.0)
CHANNELS = 384
LIMIT = 1e-4

Run = Callable[[], float]
"""Predicts the image and returns its score."""


def anomalib_model(size: str) -> tuple[nn.Module, str]:
    """``EfficientAdModel`` in eval mode, and whose it is."""
    try:
        from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel as Original
        from anomalib.models.image.efficient_ad.torch_model import EfficientAdModelSize
    except ImportError:
        return EfficientAdModel(CHANNELS, size).eval(), "a stand-in for anomalib"
    return Original(CHANNELS, EfficientAdModelSize(size)).eval(), "anomalib"


@torch.no_grad()
def fork_switch(folder: Path, size: str, image: Path) -> Iterator[tuple[str, Run, Run]]:
    torch.manual_seed(0)
    pdn = pdn_small if size == "small" else pdn_medium
    networks = (pdn(CHANNELS).eval(), pdn(2 * CHANNELS).eval(), autoencoder(CHANNELS).eval())
    mean, std = torch.zeros(1, CHANNELS, 1, 1), torch.ones(1, CHANNELS, 1, 1)
    quantiles = (Q.st_start, Q.st_end, Q.ae_start, Q.ae_end)
    for name, network in zip(("teacher", "student", "autoencoder"), networks, strict=True):
        torch.save(network, folder / f"{name}_final.pth")
    detector = Detector.load(folder, teacher_mean=mean, teacher_std=std, quantiles=Q, threshold=0.0)

    def score(predict: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> float:
        with Image.open(image) as opened:
            width, height = opened.size
            resized = opened.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
        batch = normalise(torch.from_numpy(np.array(resized)).movedim(-1, 0) / 255).unsqueeze(0)
        combined = predict(batch, *networks, mean, std, *quantiles)[0]
        return float(F.interpolate(F.pad(combined, (4, 4, 4, 4)), (height, width), mode="bilinear").max())

    def before() -> float:
        return score(plain_predict)

    yield "predict(...) replaced by ours", before, lambda: score(efficientad_fast.predict)
    yield "Detector.load(folder).predict(path)", before, lambda: detector.predict(image).score  # type: ignore[union-attr]


@torch.no_grad()
def anomalib_switch(folder: Path, size: str, image: Path) -> Iterator[tuple[str, Run, Run]]:
    model, _ = anomalib_model(size)
    fill(model)
    path = folder / f"{size}.ckpt"
    stand_in = EfficientAdModel(CHANNELS, size)
    stand_in.load_state_dict(model.state_dict())
    torch.save(checkpoint(stand_in, size), path)
    detector = Detector.load(path, threshold=0.0)
    fast = efficientad_fast.accelerate(copy.deepcopy(model))

    def score(chosen: Any) -> float:
        with Image.open(image) as opened:
            pixels = torch.from_numpy(np.array(opened.convert("RGB"))).movedim(-1, 0)
        with torch.no_grad():
            return float(chosen(resize_antialias(pixels, (256, 256)).unsqueeze(0)).pred_score)

    yield "accelerate(model)", lambda: score(model), lambda: score(fast)
    yield "Detector.load(ckpt).predict(path)", lambda: score(model), lambda: detector.predict(image).score  # type: ignore[union-attr]


def lower_quartiles(runs: tuple[Run, Run], rounds: int) -> tuple[float, float]:
    """Milliseconds of each, of runs that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        scores = [run() for run in runs for _ in range(2)]
        if max(scores) - min(scores) > LIMIT * abs(scores[0]):
            raise SystemExit(f"the scores differ: {scores}")
        for _ in range(rounds):
            for run, kept in zip(runs, times, strict=True):
                began = time.perf_counter()
                run()
                kept.append(1e3 * (time.perf_counter() - began))
    first, second = (statistics.quantiles(one, n=4)[0] for one in times)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")
    print(f"PyTorch {torch.__version__}, {chosen.threads} threads, {anomalib_model('small')[1]}")
    print("| from | switch | before, ms | after, ms | times |\n|---|---|---|---|---|")
    for size in ("small", "medium"):
        for origin, switch in (("the fork", fork_switch), ("anomalib", anomalib_switch)):
            with tempfile.TemporaryDirectory() as name:
                image = Path(name) / "image.png"
                Image.fromarray(seeded_images(1, (900, 900))[0]).save(image)
                for what, before, after in switch(Path(name), size, image):
                    first, second = lower_quartiles((before, after), chosen.rounds)
                    label = f"{origin}, {size[0].upper()}"
                    print(f"| {label} | {what} | {first:.1f} | {second:.1f} | {first / second:.1f} |", flush=True)


if __name__ == "__main__":
    main()
