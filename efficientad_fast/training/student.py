"""Training a detector: the student and the autoencoder learn good images from a frozen teacher.

Source: paper, section 3 and algorithm 1; SPEC "Training the student and the autoencoder".
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from efficientad_fast import ops
from efficientad_fast.data.folders import Dataset, split_validation
from efficientad_fast.data.textures import synthetic_image
from efficientad_fast.detector import Detector
from efficientad_fast.errors import DatasetError, ImageError, InputError
from efficientad_fast.files import new_array, read_tensors, write_tensors
from efficientad_fast.plan import parse_device
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.losses import mean_squared_error, penalty_loss
from efficientad_fast.reference.maps import MapConvention
from efficientad_fast.reference.networks import (
    FEATURE_BORDER,
    FEATURE_STRIDE,
    Autoencoder,
    PatchDescriptionNetwork,
    feature_size,
    normalise_features,
    split_student,
)
from efficientad_fast.reference.preprocess import normalise, resize_antialias
from efficientad_fast.training.augment import augment, to_grey
from efficientad_fast.training.calibrate import THRESHOLD_RULE, ChannelStatistics, calibrate, threshold_from_scores
from efficientad_fast.training.inputs import check_images, check_output, check_space
from efficientad_fast.training.state import (
    count_steps,
    file_sizes,
    find_state,
    fingerprint,
    interruptible,
    save_state,
    step_seed,
    weights_digest,
)
from efficientad_fast.version import __version__

PENALTY_LOAD_SIDE, PENALTY_SIDE, PENALTY_GREY = 512, 256, 0.3


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults are the paper's; see :func:`quick_training` for minutes on two cores.

    Attributes:
        augment: change brightness, contrast or saturation of the autoencoder's images. Without it the student sees an
            image once for both of its halves and, with ``cache_teacher``, the teacher is not run in a step at all.
        crop: side in pixels of the square the student sees in a step, a multiple of 4; ``None`` for the whole
            image. The autoencoder always sees the whole image. Only without padding, where the PDN on a crop is the
            crop of the PDN.
        autoencoder_images: how many of a step's images the autoencoder and the student's prediction of it learn
            from; ``None`` for all.
        cache_teacher: compute the teacher's features of the training images once and keep them on disk as float16
            (2.4 MB an image at 256x256).
        decay_after: share of the steps after which the learning rate is a tenth.
        schedule: ``"step"`` as in the paper, or ``"cosine"`` down to zero.
        hard_fraction: quantile of the squared differences from which on they count.
        initialisation: of student and autoencoder. PyTorch's own shrinks the signal in every layer, so that the
            autoencoder's 14 give their bias alone for the first few hundred steps; ``"kaiming"`` keeps its scale.
        max_value, apply_exif: how image files are decoded, see `efficientad_fast.preprocessing.Preprocessing`; the
            detector keeps them.
        validation_fraction: share of the training images held back where the data set brings no validation images.
        save_every: steps from one resumable state to the next.
    """

    steps: int = 70_000
    batch_size: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    schedule: Literal["step", "cosine"] = "step"
    decay_after: float = 0.95
    hard_fraction: float = 0.999
    initialisation: Literal["pytorch", "kaiming"] = "pytorch"
    size: tuple[int, int] = (256, 256)
    padding: bool = False
    pad_maps: bool = True
    map_convention: MapConvention = "resized"
    augment: bool = True
    crop: int | None = None
    autoencoder_images: int | None = None
    cache_teacher: bool = False
    max_value: int | None = None
    apply_exif: bool = False
    validation_fraction: float = 0.1
    seed: int = 0
    save_every: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.preprocessing.size)
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.autoencoder_images is not None and not 1 <= self.autoencoder_images <= self.batch_size:
            raise InputError(
                f"autoencoder_images must be from 1 to the batch size {self.batch_size}, got {self.autoencoder_images}."
            )
        smallest = (2 * FEATURE_BORDER + 1) * FEATURE_STRIDE
        if self.crop is not None:
            if self.padding:
                raise InputError("crop and padding exclude each other: a padded network on a crop is not its crop.")
            if not smallest <= self.crop <= min(self.size) or self.crop % FEATURE_STRIDE:
                raise InputError(f"crop must be a multiple of 4 from {smallest} to {min(self.size)}, got {self.crop}.")

    @property
    def preprocessing(self) -> Preprocessing:
        """How the detector sees an image."""
        return Preprocessing(size=self.size, max_value=self.max_value, apply_exif=self.apply_exif)


def quick_training(steps: int = 360, seed: int = 0) -> TrainSettings:
    """Minutes on two cores: few steps of several small crops at a higher rate, the teacher's features cached."""
    return TrainSettings(
        steps=steps,
        batch_size=4,
        learning_rate=1e-3,
        schedule="cosine",
        hard_fraction=0.99,
        initialisation="kaiming",
        augment=False,
        crop=96,
        autoencoder_images=2,
        cache_teacher=True,
        seed=seed,
        save_every=60,
    )


class Observer(Protocol):
    """Who watches a training. ``losses`` holds the terms of one step, at most a few times a second."""

    def progress(self, stage: str, done: int, total: int) -> None: ...

    def losses(self, step: int, losses: Mapping[str, float]) -> None: ...


class _Silent:
    def progress(self, stage: str, done: int, total: int) -> None: ...

    def losses(self, step: int, losses: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class PenaltyImages:
    """Images from outside the domain, for the pretraining penalty: files, or endless ones that the code generates."""

    files: tuple[Path, ...] = ()
    name: str = "generated images"

    def draw(self, generator: torch.Generator, preprocessing: Preprocessing) -> Tensor:
        """A random one at 512x512, grey with probability 0.3, centre-cropped to 256: ``(3, 256, 256)``, normalised.

        Args:
            preprocessing: decodes the files.
        """
        if self.files:
            image = preprocessing.decode(self.files[int(torch.randint(len(self.files), (), generator=generator))])
        else:
            seed = int(torch.randint(1 << 31, (), generator=generator))
            image = torch.from_numpy(synthetic_image(0, seed=seed, size=PENALTY_LOAD_SIDE)).permute(2, 0, 1)
        image = resize_antialias(image, (PENALTY_LOAD_SIDE, PENALTY_LOAD_SIDE))
        if torch.rand((), generator=generator).item() < PENALTY_GREY:
            image = to_grey(image)
        start = (PENALTY_LOAD_SIDE - PENALTY_SIDE) // 2
        return normalise(image[:, start : start + PENALTY_SIDE, start : start + PENALTY_SIDE])


@dataclass(frozen=True)
class _StepData:
    """Input of one step: N images, of which the autoencoder sees the first A.

    Crops are of one place for an image and for all that belongs to it. Features are the teacher's, not normalised, as
    cached; ``None`` where they are to be computed.
    """

    places: list[tuple[slice, slice]]  # of the N crops, in features
    crops: Tensor  # (N, 3, c, c)
    crop_features: Tensor | None  # (N, 384, f, f)
    whole: Tensor  # (A, 3, H, W), augmented where the settings say so
    whole_crops: Tensor  # (A, 3, c, c), the crops of them
    whole_features: Tensor | None  # (A, 384, h, w), of images that are not augmented
    penalty: Tensor | None  # (N, 3, c, c)


class _Batches:
    """Draws and loads the data of a step; the same for the same seed and step, whatever came before."""

    def __init__(
        self,
        paths: Sequence[Path],
        settings: TrainSettings,
        penalty: PenaltyImages | None,
        features: np.ndarray | None,
    ) -> None:
        self._paths = paths
        self._settings = settings
        self._penalty = penalty
        self._features = features
        self._preprocessing = settings.preprocessing
        self._feature_size = feature_size(settings.size, padding=settings.padding)

    def _indices(self, step: int) -> list[int]:
        """Every image once an epoch, each epoch in an order of its own."""
        first = step * self._settings.batch_size
        count = len(self._paths)
        indices = []
        for position in range(first, first + self._settings.batch_size):
            epoch, offset = divmod(position, count)
            generator = torch.Generator().manual_seed(step_seed(self._settings.seed, epoch, "epoch"))
            indices.append(int(torch.randperm(count, generator=generator)[offset]))
        return indices

    def _starts(self, crop: int) -> tuple[range, range]:
        """The rows and the columns, in features, at which a crop may begin so that it ends inside the image."""
        height, width = self._settings.size
        return range((height - crop) // FEATURE_STRIDE + 1), range((width - crop) // FEATURE_STRIDE + 1)

    def _place(self, generator: torch.Generator) -> tuple[slice, slice]:
        crop = self._settings.crop
        if crop is None:
            return slice(0, self._feature_size[0]), slice(0, self._feature_size[1])
        features = crop // FEATURE_STRIDE - 2 * FEATURE_BORDER
        top, left = (int(torch.randint(len(starts), (), generator=generator)) for starts in self._starts(crop))
        return slice(top, top + features), slice(left, left + features)

    def _crop(self, image: Tensor, place: tuple[slice, slice]) -> Tensor:
        """The pixels of ``(..., H, W)`` that the features at ``place`` see."""
        if self._settings.crop is None:
            return image
        top, left = (part.start * FEATURE_STRIDE for part in place)
        return image[..., top : top + self._settings.crop, left : left + self._settings.crop]

    def load(self, step: int) -> _StepData:
        settings = self._settings
        generator = torch.Generator().manual_seed(step_seed(settings.seed, step, "data"))
        places: list[tuple[slice, slice]] = []
        crops: list[Tensor] = []
        crop_features: list[Tensor] = []
        whole: list[Tensor] = []
        whole_features: list[Tensor] = []
        penalties: list[Tensor] = []
        for index in self._indices(step):
            image = resize_antialias(self._preprocessing.decode(self._paths[index]), settings.size)
            place = self._place(generator)
            places.append(place)
            crops.append(self._crop(normalise(image), place))
            cached = None if self._features is None else self._features[index]
            if cached is not None:
                crop_features.append(torch.from_numpy(np.array(cached[place])).movedim(-1, 0))
            if len(whole) < (settings.autoencoder_images or settings.batch_size):
                whole.append(normalise(augment(image, generator) if settings.augment else image))
                if cached is not None and not settings.augment:
                    whole_features.append(torch.from_numpy(np.array(cached)).movedim(-1, 0))
            if self._penalty is not None:
                penalty = self._penalty.draw(generator, self._preprocessing)
                side = min(settings.crop or PENALTY_SIDE, PENALTY_SIDE)
                top, left = (int(torch.randint(PENALTY_SIDE - side + 1, (), generator=generator)) for _ in range(2))
                penalties.append(penalty[:, top : top + side, left : left + side])

        def stacked(tensors: list[Tensor]) -> Tensor | None:
            return torch.stack(tensors) if tensors else None

        return _StepData(
            places,
            torch.stack(crops),
            stacked(crop_features),
            torch.stack(whole),
            torch.stack([self._crop(image, place) for image, place in zip(whole, places, strict=False)]),
            stacked(whole_features),
            stacked(penalties),
        )

    def ahead(self, first: int, last: int) -> Iterator[tuple[int, _StepData]]:
        """The steps' data in order, each loaded in a thread while the step before it computes."""
        with ThreadPoolExecutor(1, thread_name_prefix="efficientad_fast-load") as pool:
            following: Future[_StepData] | None = None
            for step in range(first, last):
                current = following or pool.submit(self.load, step)
                following = pool.submit(self.load, step + 1) if step + 1 < last else None
                yield step, current.result()


def step_losses(
    teacher: nn.Module,
    student: nn.Module,
    autoencoder: nn.Module,
    data: _StepData,
    mean: Tensor,
    std: Tensor,
    settings: TrainSettings,
) -> dict[str, Tensor]:
    """The terms of one step's loss, scalars; their sum is what is minimised. mean, std: ``(1, 384, 1, 1)``."""
    ops.load()
    device = mean.device

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device).contiguous(memory_format=torch.channels_last)

    def teach(images: Tensor, cached: Tensor | None) -> Tensor:
        with torch.no_grad():
            features = teacher(images) if cached is None else cached.to(device, mean.dtype)
            return normalise_features(features, mean, std)

    def at_places(features: Tensor) -> Tensor:
        pairs = zip(features, data.places[: len(features)], strict=True)
        return torch.stack([one[:, rows, columns] for one, (rows, columns) in pairs])

    crops, whole = place(data.crops), place(data.whole)
    decoded = autoencoder(whole)
    decoded_crops = at_places(decoded)
    student_st, student_ae = split_student(student(crops))
    if settings.augment:
        whole_crops = place(data.whole_crops)
        _, student_ae = split_student(student(whole_crops))
        autoencoder_loss = mean_squared_error(teach(whole_crops, None), decoded_crops)
    else:
        autoencoder_loss = mean_squared_error(teach(whole, data.whole_features), decoded)
    taught = teach(crops, data.crop_features)
    hard_loss, _, _ = torch.ops.efficientad_fast.hard_feature_loss(taught, student_st, settings.hard_fraction)
    losses = {
        "hard": hard_loss,
        "ae": autoencoder_loss,
        "stae": mean_squared_error(decoded_crops, student_ae[: len(decoded)]),
    }
    if data.penalty is not None:
        losses["penalty"] = penalty_loss(split_student(student(place(data.penalty)))[0])
    return losses


def _learning_rate(settings: TrainSettings, step: int) -> float:
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * step / settings.steps)))
    return settings.learning_rate * (1.0 if step < settings.decay_after * settings.steps else 0.1)


def teacher_statistics(
    teacher: PatchDescriptionNetwork,
    paths: Sequence[Path],
    settings: TrainSettings,
    device: torch.device,
    cache: Path | None,
    observer: Observer,
) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """Channel mean and standard deviation of the teacher over ``paths``, summed in float64: two ``(384,)`` float32.

    With ``cache``, a file for them, the features themselves as well: ``(n, h, w, 384)`` float16, not normalised.

    Raises:
        ImageError: an image cannot be decoded. InputError: a channel that never changes, or no room for the cache.
    """
    preprocessing = settings.preprocessing
    height, width = feature_size(settings.size, padding=settings.padding)
    features: np.ndarray | None = None
    statistics = ChannelStatistics()
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        check_space(cache.parent, 2 * len(paths) * height * width * teacher.out_channels)
    for index, path in enumerate(paths):
        image = normalise(resize_antialias(preprocessing.decode(path), settings.size)).unsqueeze(0)
        with torch.inference_mode():
            output = teacher(image.to(device).contiguous(memory_format=torch.channels_last))[0]
        if cache is not None:
            if features is None:
                features = new_array(cache, np.float16, (len(paths), height, width, len(output)))
            features[index] = output.movedim(0, -1).half().cpu().numpy()
        statistics.add(output.unsqueeze(0))
        observer.progress("teacher statistics", index + 1, len(paths))
    return *statistics.result(), features


def _kept_statistics(
    teacher: PatchDescriptionNetwork,
    paths: Sequence[Path],
    settings: TrainSettings,
    device: torch.device,
    work: Path,
    observer: Observer,
) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """:func:`teacher_statistics`, or what an interrupted run with the same teacher and images left of it."""
    kept, cache = work / "statistics.safetensors", work / "teacher_features.npy" if settings.cache_teacher else None
    identity = {
        "teacher": weights_digest(teacher),
        "padding": str(teacher.padding),
        "images": fingerprint(paths),
        "preprocessing": json.dumps(asdict(settings.preprocessing)),
    }
    if kept.exists() and (cache is None or cache.exists()):
        tensors, metadata = read_tensors(kept)
        if metadata == identity:
            return tensors["mean"], tensors["std"], None if cache is None else np.load(cache, mmap_mode="r")
    # Not to be taken for those of features that are about to be overwritten.
    kept.unlink(missing_ok=True)
    mean, std, features = teacher_statistics(teacher, paths, settings, device, cache, observer)
    if isinstance(features, np.memmap):
        features.flush()
    write_tensors(kept, {"mean": mean, "std": std}, identity)
    return mean, std, features


def new_networks(
    teacher: PatchDescriptionNetwork, settings: TrainSettings
) -> tuple[PatchDescriptionNetwork, Autoencoder]:
    """An untrained student and autoencoder for a teacher: the same ones for the same seed, whatever came before."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        student = PatchDescriptionNetwork(teacher.model_size, 2 * teacher.out_channels, padding=settings.padding)
        autoencoder = Autoencoder(teacher.out_channels, padding=settings.padding)
        if settings.initialisation == "kaiming":
            for module in itertools.chain(student.modules(), autoencoder.modules()):
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return student, autoencoder


def _split(dataset: Dataset, settings: TrainSettings) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    if dataset.validation:
        return dataset.train, dataset.validation
    if len(dataset.train) < 2:
        raise DatasetError(
            f"{dataset.root} holds {len(dataset.train)} training image(s), but at least 2 are needed: one to train on "
            "and one to calibrate on. Add good images."
        )
    return split_validation(dataset.train, settings.validation_fraction, settings.seed)


def _work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".training")


def _state_file(out: Path) -> Path:
    return _work_folder(out) / "state.safetensors"


def kept_steps(out: str | os.PathLike[str]) -> int:
    """How many steps the state beside ``out`` holds, which :func:`train` can continue; 0 where there is none.

    Raises:
        DetectorFileError: it is damaged.
    """
    return count_steps(_state_file(Path(out)))


def train(
    dataset: Dataset,
    out: str | os.PathLike[str],
    settings: TrainSettings,
    *,
    teacher: PatchDescriptionNetwork,
    teacher_provenance: Mapping[str, Any],
    penalty: PenaltyImages | None = None,
    resume: bool = False,
    restart: bool = False,
    device: str | torch.device = "cpu",
    observer: Observer | None = None,
) -> Detector:
    """Train a detector on a data set's good images and save it to ``out``.

    A folder ``OUT.training`` beside it holds the resumable state and the cache, and is removed at the end. Before the
    first step every image is decoded once, and a kept state is compared with this run before anything is changed.

    Args:
        dataset: where it has no validation images, a tenth of the training images is held back.
        teacher: its size becomes the student's.
        penalty: images for the pretraining penalty; ``None`` leaves the penalty out, which the provenance says.
        resume: continue from the state beside ``out`` to the same result as without a break.
        restart: drop that state.

    Returns:
        The detector as saved, with quantiles and threshold from the validation images.

    Raises:
        DatasetError, ImageError, InputError: the images or the settings do not do; a state is there and neither
            ``resume`` nor ``restart`` was given; ``resume`` was, and there is none, or one of another run.
        KeyboardInterrupt: after Ctrl-C, in the steps with the state saved: see :func:`kept_steps`.
    """
    started = time.monotonic()
    out = Path(out)
    observer = observer or _Silent()
    target = parse_device(device)
    if teacher.padding != settings.padding:
        raise InputError(f"padding is {settings.padding}, but the teacher's is {teacher.padding}; give one for both.")
    paths, validation = _split(dataset, settings)
    work, state_file = _work_folder(out), _state_file(out)
    run = {
        **json.loads(json.dumps({key: value for key, value in asdict(settings).items() if key != "save_every"})),
        "penalty": None if penalty is None else "files" if penalty.files else penalty.name,
        "teacher": dict(teacher_provenance),
        "teacher weights": weights_digest(teacher),
    }
    files = {"training images": file_sizes(paths)}
    if penalty is not None and penalty.files:
        files["penalty images"] = file_sizes(penalty.files)
    check_output(out)
    state = find_state(state_file, run, files, resume=resume, restart=restart)
    if resume and state is None:
        finished = f" {out} is there, so it may be finished." if out.exists() else ""
        raise InputError(f"There is no training of {out} to resume.{finished} Leave out --resume to train anew.")
    check_images(
        [*paths, *validation, *(penalty.files if penalty is not None else ())],
        settings.preprocessing.decode,
        lambda done, total: observer.progress("checking images", done, total),
    )
    if state is None and work.exists():
        shutil.rmtree(work)

    teacher = teacher.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std, features = _kept_statistics(teacher, paths, settings, target, work, observer)
    student, autoencoder = new_networks(teacher, settings)
    for network in (student, autoencoder):
        network.to(device=target, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(
        itertools.chain(student.parameters(), autoencoder.parameters()),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    trained = {"student": student, "autoencoder": autoencoder}
    first = 0 if state is None else state.restore(trained, optimiser)
    del state

    def save(step: int) -> None:
        save_state(state_file, trained, optimiser, step, run, files)

    batches = _Batches(paths, settings, penalty, features)
    statistics = mean.to(target), std.to(target)
    _take_steps(teacher, student, autoencoder, optimiser, batches, settings, first, statistics, save, observer)
    detector = Detector(
        teacher.cpu(),
        student.cpu(),
        autoencoder.cpu(),
        mean,
        std,
        preprocessing=settings.preprocessing,
        map_convention=settings.map_convention,
        pad_maps=settings.pad_maps,
    )
    quantiles, scores = calibrate(
        detector,
        validation,
        device=target,
        progress=lambda done, total: observer.progress("calibration", done, total),
    )
    provenance = {
        "data": dataset.name,
        "training_images": len(paths),
        "validation_images": len(validation),
        "steps": settings.steps,
        "settings": json.loads(json.dumps(asdict(settings))),
        "penalty": "none" if penalty is None else penalty.name,
        "teacher": dict(teacher_provenance),
        "threshold_rule": THRESHOLD_RULE,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - started),
        "versions": {"efficientad_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    detector = detector.replaced(quantiles=quantiles, threshold=threshold_from_scores(scores), provenance=provenance)
    detector.save(out)
    del features
    shutil.rmtree(work)
    return detector


def _take_steps(
    teacher: nn.Module,
    student: nn.Module,
    autoencoder: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: _Batches,
    settings: TrainSettings,
    first: int,
    statistics: tuple[Tensor, Tensor],
    save: Callable[[int], None],
    observer: Observer,
) -> None:
    mean, std = (statistic.view(1, -1, 1, 1) for statistic in statistics)
    reported = 0.0
    done = first
    with interruptible() as interruption, torch.random.fork_rng():
        try:
            for step, data in batches.ahead(first, settings.steps):
                torch.manual_seed(step_seed(settings.seed, step, "dropout"))
                for group in optimiser.param_groups:
                    group["lr"] = _learning_rate(settings, step)
                losses = step_losses(teacher, student, autoencoder, data, mean, std, settings)
                optimiser.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
                optimiser.step()
                done = step + 1
                if time.monotonic() - reported > 0.5 or done == settings.steps:
                    reported = time.monotonic()
                    observer.losses(step, {name: value.item() for name, value in losses.items()})
                observer.progress("steps", done, settings.steps)
                if interruption.requested or done % settings.save_every == 0 or done == settings.steps:
                    save(done)
                if interruption.requested:
                    raise KeyboardInterrupt
        except ImageError:
            # A file that was there before the first step has gone; the steps taken need not go with it.
            if done > first:
                save(done)
            raise
