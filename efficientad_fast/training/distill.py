"""Distilling a teacher: a patch description network learns a pretrained backbone's patch embedding.

Source: paper, appendix A.2; SPEC "Distilling a teacher". The targets of all images are computed once and kept in a
working folder as float16, so that a step costs the small network alone. Without padding the PDN on a crop is the
crop of the PDN, so steps may use small crops of many images in place of whole ones.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from efficientad_fast.data.decode import decode_image
from efficientad_fast.data.textures import synthetic_image
from efficientad_fast.errors import InputError
from efficientad_fast.files import atomic_path
from efficientad_fast.reference.networks import (
    FEATURE_BORDER,
    FEATURE_CHANNELS,
    FEATURE_STRIDE,
    SMALLEST_SIDE,
    ModelSize,
    PatchDescriptionNetwork,
)
from efficientad_fast.reference.preprocess import normalise, resize_antialias
from efficientad_fast.training.augment import to_grey
from efficientad_fast.training.backbones import BACKBONE_SIDE, Backbone, embed, load_backbone
from efficientad_fast.training.state import fingerprint, interruptible, load_state, save_state, step_seed
from efficientad_fast.weights import save_teacher

TARGET_SIDE = BACKBONE_SIDE // 8
STATISTICS_IMAGES = 10_000
SAVE_EVERY = 250


@dataclass(frozen=True)
class DistillSettings:
    """How to distill. The defaults are the paper's; :func:`quick_distillation` is what two cores can do.

    Attributes:
        backbone: a name from ``backbones.BACKBONES``.
        crop: side in pixels of the random crops a step trains on, without padding; a multiple of 4, at least 36.
            ``None``: whole images, with padding.
        schedule: ``"constant"``, or ``"cosine"`` to zero at the last step.
        grey_probability: share of the images that both networks see in grey.
    """

    backbone: str = "wide_resnet101_2"
    model_size: ModelSize = "s"
    steps: int = 60_000
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    crop: int | None = None
    grey_probability: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = 2 * FEATURE_BORDER * FEATURE_STRIDE + FEATURE_STRIDE
        if self.crop is not None and not (smallest <= self.crop <= SMALLEST_SIDE and self.crop % FEATURE_STRIDE == 0):
            raise InputError(f"crop must be a multiple of 4 from {smallest} to {SMALLEST_SIDE}, got {self.crop}.")
        if min(self.steps, self.batch_size) < 1:
            raise InputError(f"steps and batch_size must be positive, got {self.steps} and {self.batch_size}.")


def quick_distillation(steps: int = 4000, backbone: str = "efficientnet-lite0") -> DistillSettings:
    """Crops of 96 pixels, batch 8, cosine from 1e-3: under an hour on two cores."""
    return DistillSettings(backbone=backbone, steps=steps, batch_size=8, learning_rate=1e-3, schedule="cosine", crop=96)


@dataclass(frozen=True)
class DistillImages:
    """What to distill on: files, then ``synthetic`` images that the code generates."""

    files: tuple[Path, ...]
    synthetic: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.files) + self.synthetic

    def load(self, index: int) -> Tensor:
        """Image ``index``: ``(3, H, W)``, uint8 or float in [0, 1]."""
        if index < len(self.files):
            return decode_image(self.files[index])
        generated = synthetic_image(index - len(self.files), seed=self.seed, size=BACKBONE_SIDE)
        return torch.from_numpy(generated).permute(2, 0, 1)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return {"files": fingerprint(self.files), "synthetic": self.synthetic, "image_seed": self.seed}


@torch.inference_mode()
def image_and_target(image: Tensor, backbone: Backbone, *, grey: bool = False) -> tuple[Tensor, Tensor]:
    """The PDN's input before normalisation, ``(3, 256, 256)`` in [0, 1], and its raw target ``(64, 64, 384)``."""
    large, small = (resize_antialias(image, (side, side)) for side in (BACKBONE_SIDE, SMALLEST_SIDE))
    if grey:
        large, small = to_grey(large), to_grey(small)
    return small, embed(*backbone(large.unsqueeze(0)))[0]


@dataclass
class TargetCache:
    """Inputs and raw targets of all images on disk, and the targets' channel statistics."""

    images: np.ndarray = field(repr=False)  # (n, 256, 256, 3) uint8
    targets: np.ndarray = field(repr=False)  # (n, 64, 64, 384) float16
    mean: Tensor  # (384,) float32
    std: Tensor


def build_target_cache(
    images: DistillImages,
    settings: DistillSettings,
    folder: Path,
    backbone: Backbone,
    progress: Callable[[str, int, int], None] | None = None,
) -> TargetCache:
    """Fill ``folder`` with what :class:`TargetCache` holds; a folder already filled for the same images is reused.

    Raises:
        ImageError: an image cannot be decoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done_file = folder / "cache.json"
    identity = {
        **images.identity(),
        "backbone": settings.backbone,
        "grey_probability": settings.grey_probability,
        "seed": settings.seed,
    }
    image_file, target_file = folder / "images.npy", folder / "targets.npy"
    count = len(images)
    if done_file.exists():
        stored = json.loads(done_file.read_text())
        if stored["identity"] == identity:
            return TargetCache(
                np.load(image_file, mmap_mode="r"),
                np.load(target_file, mmap_mode="r"),
                torch.tensor(stored["mean"]),
                torch.tensor(stored["std"]),
            )
        done_file.unlink()
    cached_images = open_memmap(image_file, "w+", np.uint8, (count, SMALLEST_SIDE, SMALLEST_SIDE, 3))
    cached_targets = open_memmap(target_file, "w+", np.float16, (count, TARGET_SIDE, TARGET_SIDE, FEATURE_CHANNELS))
    total = torch.zeros(FEATURE_CHANNELS, dtype=torch.float64)
    total_squares = torch.zeros_like(total)
    seen = 0
    for index in range(count):
        draw = torch.Generator().manual_seed(step_seed(settings.seed, index, "grey"))
        grey = torch.rand((), generator=draw).item() < settings.grey_probability
        small, target = image_and_target(images.load(index), backbone, grey=grey)
        cached_images[index] = (small.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        cached_targets[index] = target.numpy().astype(np.float16)
        if index < STATISTICS_IMAGES:
            flat = target.flatten(0, 1).double()
            total += flat.sum(0)
            total_squares += (flat**2).sum(0)
            seen += flat.shape[0]
        if progress:
            progress("targets", index + 1, count)
    mean = total / seen
    std = (total_squares / seen - mean**2).clamp_min(1e-12).sqrt()
    cached_images.flush()
    cached_targets.flush()
    with atomic_path(done_file) as temporary:
        temporary.write_text(json.dumps({"identity": identity, "mean": mean.tolist(), "std": std.tolist()}))
    return TargetCache(cached_images, cached_targets, mean.float(), std.float())


def _batch(cache: TargetCache, settings: DistillSettings, step: int) -> tuple[Tensor, Tensor]:
    """Network input and normalised target of one step: ``(N, 3, s, s)`` and ``(N, 384, f, f)``."""
    generator = torch.Generator().manual_seed(step_seed(settings.seed, step, "distill"))
    indices = torch.randint(len(cache.images), (settings.batch_size,), generator=generator).tolist()
    inputs, targets = [], []
    for index in indices:
        if settings.crop is None:
            image, target = cache.images[index], cache.targets[index]
        else:
            positions = (SMALLEST_SIDE - settings.crop) // FEATURE_STRIDE + 1
            top, left = torch.randint(positions, (2,), generator=generator).tolist()
            features = settings.crop // FEATURE_STRIDE - 2 * FEATURE_BORDER
            y, x = top * FEATURE_STRIDE, left * FEATURE_STRIDE
            image = cache.images[index, y : y + settings.crop, x : x + settings.crop]
            row, column = top + FEATURE_BORDER, left + FEATURE_BORDER
            target = cache.targets[index, row : row + features, column : column + features]
        inputs.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        targets.append(torch.from_numpy(np.array(target)).float())
    batch = normalise(torch.stack(inputs).float() / 255)
    target = ((torch.stack(targets) - cache.mean) / cache.std).movedim(-1, 1)
    return batch.contiguous(memory_format=torch.channels_last), target


@torch.inference_mode()
def explained_variance(
    teacher: PatchDescriptionNetwork, files: Sequence[Path], backbone: Backbone, mean: Tensor, std: Tensor
) -> float:
    """Share of the normalised targets' variance that ``teacher`` explains on held-out images, all channels together.

    1 - sum (target - prediction)^2 / sum (target - channel mean over these images)^2; above 0 is better than
    predicting each channel's mean. The features that need no padding are compared.
    """
    residual = squares = 0.0
    sums = torch.zeros(FEATURE_CHANNELS, dtype=torch.float64)
    positions = 0
    inner = slice(FEATURE_BORDER, TARGET_SIDE - FEATURE_BORDER)
    for file in files:
        small, target = image_and_target(decode_image(file), backbone)
        wanted = ((target[inner, inner] - mean) / std).flatten(0, 1).double()
        features = teacher(normalise(small).unsqueeze(0))[0]
        if features.shape[-1] == TARGET_SIDE:
            features = features[:, inner, inner]
        predicted = features.flatten(1).T.double()
        residual += float(((wanted - predicted) ** 2).sum())
        squares += float((wanted**2).sum())
        sums += wanted.sum(0)
        positions += wanted.shape[0]
    return 1 - residual / (squares - float((sums**2).sum()) / positions)


def distill(
    images: DistillImages,
    out: Path,
    settings: DistillSettings,
    *,
    work: Path,
    holdout: Sequence[Path] = (),
    resume: bool = False,
    terms: str = "not stated",
    data: str = "not stated",
    progress: Callable[[str, int, int], None] | None = None,
    report_loss: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Distill a teacher and save it to ``out`` (float16 safetensors, provenance inside).

    Args:
        images: at least one.
        work: folder for cached targets (3 MB an image) and the resumable state.
        holdout: files, not among ``images``, on which the explained variance is measured and recorded.
        resume: continue from the state in ``work``, where there is one, to the same result.
        terms: under what terms the weights may be used; data: what they were made from. Both stored in the file.
        progress: called with stage, done, total.
        report_loss: called with the loss of every tenth step.

    Returns:
        The provenance that was stored.

    Raises:
        InputError: no images, or a state of another run.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    if len(images) == 0:
        raise InputError("Distillation needs images: give a folder, or a number of synthetic images above 0.")
    backbone = load_backbone(settings.backbone)
    cache = build_target_cache(images, settings, work, backbone, progress)
    run = {**asdict(settings), **images.identity()}
    state_file = work / "state.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        teacher = PatchDescriptionNetwork(settings.model_size, padding=settings.crop is None)
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(teacher.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    first = 0
    if resume and state_file.exists():
        first = load_state(state_file, {"teacher": teacher}, optimiser, run)
    smoothed = math.nan
    with interruptible() as interruption:
        for step in range(first, settings.steps):
            if settings.schedule == "cosine":
                rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
                optimiser.param_groups[0]["lr"] = rate
            batch, target = _batch(cache, settings, step)
            loss = torch.mean((teacher(batch) - target) ** 2)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if step % 10 == 0:
                value = loss.item()
                smoothed = value if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * value
                if report_loss:
                    report_loss(smoothed)
            if progress:
                progress("steps", step + 1, settings.steps)
            if interruption.requested or (step + 1) % SAVE_EVERY == 0 or step + 1 == settings.steps:
                save_state(state_file, {"teacher": teacher}, optimiser, step + 1, run)
            if interruption.requested:
                raise KeyboardInterrupt
    teacher.eval()
    provenance: dict[str, Any] = {
        "made_by": "efficientad-fast distill",
        "settings": asdict(settings),
        "data": data,
        "terms": terms,
        "images": len(images),
        "synthetic_images": images.synthetic,
        "final_loss": round(smoothed, 4) if not math.isnan(smoothed) else None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
    }
    if holdout:
        if progress:
            progress("holdout", 0, len(holdout))
        share = explained_variance(teacher, holdout, backbone, cache.mean, cache.std)
        provenance["explained_variance"] = round(share, 4)
        provenance["holdout_images"] = len(holdout)
    save_teacher(teacher, out, provenance)
    return provenance
