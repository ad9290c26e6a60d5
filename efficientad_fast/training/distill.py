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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from efficientad_fast.data.decode import decode_image
from efficientad_fast.data.textures import synthetic_image
from efficientad_fast.errors import InputError
from efficientad_fast.files import atomic_path, new_array
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
from efficientad_fast.training.inputs import check_images, check_output, check_space
from efficientad_fast.training.state import (
    FileSizes,
    check_same_run,
    count_steps,
    file_sizes,
    find_state,
    interruptible,
    save_state,
    step_seed,
)
from efficientad_fast.weights import save_teacher

TARGET_SIDE = BACKBONE_SIDE // 8
STATISTICS_IMAGES = 10_000
SAVE_EVERY = 250
TARGETS_SAVE_EVERY = 100


@dataclass(frozen=True)
class DistillSettings:
    """How to distill. The defaults are the paper's; :func:`quick_distillation` is what two cores can do.

    Attributes:
        backbone: a name from ``backbones.BACKBONES``.
        crop: side in pixels of the random crops a step trains on, without padding; a multiple of 4, at least 36.
            ``None``: whole images, with padding.
        schedule: ``"constant"``, or ``"cosine"`` to zero at the last step.
        grey_probability: share of the images that both networks see in grey. Drawn once an image, since the targets
            are computed once; the paper draws it in every step.
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
        """What a resumed run must share, besides the files."""
        return {"synthetic": self.synthetic, "image_seed": self.seed}

    def sizes(self) -> dict[str, FileSizes]:
        """The files, as a resumed run compares them."""
        return {"images": file_sizes(self.files)}


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


_RECORD, _IMAGES, _TARGETS = "cache.json", "images.npy", "targets.npy"


@dataclass(frozen=True)
class _CacheRecord:
    """How far a target cache is filled, for what, and the running sums of its statistics."""

    identity: dict[str, Any]
    files: dict[str, FileSizes] = field(repr=False)
    done: int = 0  # images
    positions: int = 0  # that the sums are over
    total: Sequence[float] = field(default=(0.0,) * FEATURE_CHANNELS, repr=False)
    squares: Sequence[float] = field(default=(0.0,) * FEATURE_CHANNELS, repr=False)

    @classmethod
    def of(cls, images: DistillImages, settings: DistillSettings) -> _CacheRecord:
        """That of an empty cache."""
        identity = {
            **images.identity(),
            "backbone": settings.backbone,
            "grey_probability": settings.grey_probability,
            "seed": settings.seed,
        }
        return cls(identity, images.sizes())

    def write(self, folder: Path) -> None:
        with atomic_path(folder / _RECORD) as temporary:
            temporary.write_text(json.dumps(asdict(self)))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, ``(384,)`` float32."""
        mean, square = (torch.tensor(sums, dtype=torch.float64) / self.positions for sums in (self.total, self.squares))
        return mean.float(), (square - mean**2).clamp_min(1e-12).sqrt().float()


def _read_record(folder: Path) -> _CacheRecord | None:
    """``None`` where nothing is cached.

    Raises:
        InputError: what is there is no record.
    """
    if not all((folder / name).exists() for name in (_RECORD, _IMAGES, _TARGETS)):
        return None
    try:
        return _CacheRecord(**json.loads((folder / _RECORD).read_text()))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{folder / _RECORD} does not say what is cached here ({error}). Give --restart to drop it and start anew."
        ) from error


def _usable_record(wanted: _CacheRecord, folder: Path, *, restart: bool) -> _CacheRecord | None:
    """What is cached for the same as ``wanted``; ``None`` where nothing is, or where ``restart`` drops what is.

    Raises:
        InputError: the targets are of others and ``restart`` is false.
    """
    try:
        record = _read_record(folder)
        if record is not None:
            check_same_run(folder / _RECORD, (record.identity, record.files), (wanted.identity, wanted.files))
    except InputError:
        if not restart:
            raise
        return None
    return record


def kept_targets(work: Path) -> int:
    """For how many images the targets are cached in ``work``, so that :func:`distill` need not compute them again."""
    record = _read_record(work)
    return 0 if record is None else record.done


def build_target_cache(
    images: DistillImages,
    settings: DistillSettings,
    folder: Path,
    backbone: Backbone,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    restart: bool = False,
) -> TargetCache:
    """Fill ``folder`` with what :class:`TargetCache` holds; what is there already for the same images is reused.

    Args:
        restart: drop what is there for other images or settings.

    Raises:
        ImageError: an image cannot be decoded.
        InputError: something is there for others, and ``restart`` is false; or the disk is too small.
        KeyboardInterrupt: after Ctrl-C, with the targets so far kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = len(images)
    empty = _CacheRecord.of(images, settings)
    record = _usable_record(empty, folder, restart=restart)
    shapes = {
        _IMAGES: (np.uint8, (count, SMALLEST_SIDE, SMALLEST_SIDE, 3)),
        _TARGETS: (np.float16, (count, TARGET_SIDE, TARGET_SIDE, FEATURE_CHANNELS)),
    }
    if record is None:
        # The record first, lest it be taken for that of what comes.
        for name in (_RECORD, *shapes):
            (folder / name).unlink(missing_ok=True)
        check_space(folder, sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in shapes.values()))
        arrays = [new_array(folder / name, dtype, shape) for name, (dtype, shape) in shapes.items()]
        record = empty
    else:
        arrays = [np.load(folder / name, mmap_mode="r+" if record.done < count else "r") for name in shapes]
    cached_images, cached_targets = arrays
    positions = record.positions
    total, squares = (torch.tensor(sums, dtype=torch.float64) for sums in (record.total, record.squares))
    with interruptible() as interruption:
        for index in range(record.done, count):
            draw = torch.Generator().manual_seed(step_seed(settings.seed, index, "grey"))
            grey = torch.rand((), generator=draw).item() < settings.grey_probability
            small, target = image_and_target(images.load(index), backbone, grey=grey)
            cached_images[index] = (small.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            cached_targets[index] = target.numpy().astype(np.float16)
            if index < STATISTICS_IMAGES:
                flat = target.flatten(0, 1).double()
                total += flat.sum(0)
                squares += (flat**2).sum(0)
                positions += flat.shape[0]
            if progress:
                progress("targets", index + 1, count)
            if interruption.requested or (index + 1) % TARGETS_SAVE_EVERY == 0 or index + 1 == count:
                for array in arrays:
                    array.flush()
                record = replace(
                    record, done=index + 1, positions=positions, total=total.tolist(), squares=squares.tolist()
                )
                record.write(folder)
            if interruption.requested:
                raise KeyboardInterrupt
    return TargetCache(cached_images, cached_targets, *record.statistics())


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


def _state_file(work: Path) -> Path:
    return work / "state.safetensors"


def kept_steps(work: Path) -> int:
    """How many steps the state in ``work`` holds, which :func:`distill` can continue; 0 where there is none.

    Raises:
        DetectorFileError: it is damaged.
    """
    return count_steps(_state_file(work))


def distill(
    images: DistillImages,
    out: Path,
    settings: DistillSettings,
    *,
    work: Path,
    holdout: Sequence[Path] = (),
    resume: bool = False,
    restart: bool = False,
    terms: str = "not stated",
    data: str = "not stated",
    progress: Callable[[str, int, int], None] | None = None,
    report_loss: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Distill a teacher and save it to ``out`` (float16 safetensors, provenance inside).

    Before the first target every file is decoded once, and what ``work`` keeps is compared with this run before
    anything is changed. At the end the state goes and the targets stay.

    Args:
        images: at least one.
        work: folder for cached targets (3 MB an image) and the resumable state.
        holdout: files, not among ``images``, on which the explained variance is measured and recorded.
        resume: continue what was interrupted in ``work`` to the same result. Targets that are cached there for the
            same images, backbone and seed are used with or without it.
        restart: drop the state in ``work``, and targets that are of other images, another backbone or seed.
        terms: under what terms the weights may be used; data: what they were made from. Both stored in the file.
        progress: called with stage, done, total.
        report_loss: called with the loss of every tenth step.

    Returns:
        The provenance that was stored.

    Raises:
        ImageError: images that cannot be decoded.
        InputError: no images; something is kept in ``work`` and neither ``resume`` nor ``restart`` was given, or it is
            of another run; nothing is kept there to resume.
        KeyboardInterrupt: after Ctrl-C, with targets and steps so far kept: :func:`kept_targets`, :func:`kept_steps`.
    """
    if len(images) == 0:
        raise InputError("Distillation needs images: give a folder, or a number of synthetic images above 0.")
    check_output(out)
    state_file = _state_file(work)
    run, files = {**asdict(settings), **images.identity()}, images.sizes()
    state = find_state(state_file, run, files, resume=resume, restart=restart)
    record = _usable_record(_CacheRecord.of(images, settings), work, restart=restart)
    cached = 0 if record is None else record.done
    if resume and state is None and (cached == 0 or (cached == len(images) and out.exists())):
        finished = f" {out} is there, so it may be finished." if out.exists() else ""
        raise InputError(f"There is no distillation in {work} to resume.{finished} Leave out --resume to start anew.")
    backbone = load_backbone(settings.backbone)

    def checked(done: int, total: int) -> None:
        if progress:
            progress("checking images", done, total)

    check_images([*images.files[cached:], *holdout], decode_image, checked)
    if restart:
        state_file.unlink(missing_ok=True)
    cache = build_target_cache(images, settings, work, backbone, progress, restart=restart)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        teacher = PatchDescriptionNetwork(settings.model_size, padding=settings.crop is None)
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(teacher.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    first = 0 if state is None else state.restore({"teacher": teacher}, optimiser)
    del state
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
                save_state(state_file, {"teacher": teacher}, optimiser, step + 1, run, files)
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
    state_file.unlink(missing_ok=True)
    return provenance
