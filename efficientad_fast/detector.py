"""A trained detector: what it consists of, its file, and predicting with it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from efficientad_fast.data.decode import check_decode_options
from efficientad_fast.data.folders import list_images
from efficientad_fast.errors import DetectorFileError, ImageError, InputError
from efficientad_fast.files import is_file, is_folder, read_tensors, write_tensors
from efficientad_fast.plan import (
    DTYPES,
    Backend,
    Pending,
    Plan,
    PlanInput,
    build_plan,
    default_dtype,
    parse_device,
    parse_dtype,
)
from efficientad_fast.preprocessing import DecodeOptions, ImageSource, Preprocessing
from efficientad_fast.reference.maps import MapConvention, Quantiles
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork
from efficientad_fast.weights import describe_teacher

FILE_FORMAT = "efficientad_fast detector 1"

_THREAD = "efficientad_fast-decode"

_MOST_WAITING_BYTES = 256 * 2**20
"""Of images that were decoded and wait for the networks; four times as many where each of them is large."""

MapSize = Literal["network", "original"]


PRECISIONS = ("float16", "bfloat16", "float8")
"""The dtypes that a detector may be calibrated in again; see :class:`Precision`."""


@dataclass(frozen=True, eq=False)
class Precision:
    """What a detector needs to know in one dtype of its networks; :meth:`Detector.calibrated` estimates it.

    Attributes:
        quantiles, threshold: in place of the detector's own, which were estimated in float32.
        activations: of float8 alone, by layer: the largest activation of each channel, ``(channels,)`` float32, from
            which the scales of that layer are made.
        provenance: of what they were estimated, and where; anything JSON holds.

    Raises:
        InputError: a value that cannot be.
    """

    quantiles: Quantiles | None
    threshold: float
    activations: Mapping[str, Tensor] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        _check_quantiles(self.quantiles)
        for layer, largest in (self.activations or {}).items():
            known = largest.ndim == 1 and largest.dtype == torch.float32
            if not known or not bool((largest.isfinite() & (largest >= 0)).all()):
                raise InputError(
                    f"The activations of {layer} must be a number for each channel, finite and not negative, in "
                    f"float32, got shape {tuple(largest.shape)}, {largest.dtype}. Calibrate again."
                )


_EXPORTED = frozenset({".onnx", ".xml", ".engine", ".plan", ".tflite"})

_NO_SCORE = (
    "the networks made NaN of it, so it has no score; predict with dtype='float32' if another was asked for, else the "
    "detector's weights or statistics are damaged: copy or train it again"
)


@dataclass(frozen=True)
class Prediction:
    """What a detector says of one image.

    Attributes:
        source: the path, or ``image N`` for the N-th array, tensor or PIL image (from 0).
        score: the anomaly score, unbounded; NaN where there is none.
        label: whether ``score > threshold``; ``None`` where there is no score.
        anomaly_map: ``(H, W)`` float32, or ``None`` where the image could not be read.
        error: why there is no score: the image could not be read, or the networks made NaN of it.
        note: what else there is to know: the file holds further frames or pages, which were not looked at.
    """

    source: str
    score: float
    label: bool | None
    anomaly_map: np.ndarray | None = field(repr=False)
    error: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Decoded:
    source: str
    image: Tensor | None  # (3, H, W), as it was decoded
    error: str | None = None
    note: str | None = None


@dataclass(frozen=True, eq=False)
class Detector:
    """Teacher, student and autoencoder with all that turns an image into a score and a decision.

    Immutable; :meth:`replaced` gives a changed copy. Predicting is safe from several threads, with the same numbers,
    and in processes forked from one that predicted, where a CPU computes in one thread. Changing the networks' weights
    in place after the first prediction is not noticed: make a new detector.

    Attributes:
        teacher, student, autoencoder: of one model size and padding, on the CPU. They are put into eval mode, and their
            parameters no longer ask for gradients.
        teacher_mean, teacher_std: ``(384,)``, the teacher's channel statistics over the training images.
        quantiles: ``None`` leaves the maps as they are.
        threshold: an image whose score is above it is anomalous.
        map_convention, pad_maps: see SPEC "Maps and score".
        provenance: data, steps, versions, date; anything JSON holds.
        precisions: by the dtype's name, one of :data:`PRECISIONS`: what is in place of ``quantiles`` and ``threshold``
            where the networks run in that dtype. Without an entry those hold in it as well; float8 needs one.
    """

    teacher: PatchDescriptionNetwork
    student: PatchDescriptionNetwork
    autoencoder: Autoencoder
    teacher_mean: Tensor
    teacher_std: Tensor
    quantiles: Quantiles | None = None
    threshold: float = math.inf
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    map_convention: MapConvention = "resized"
    pad_maps: bool = True
    provenance: Mapping[str, Any] = field(default_factory=dict)
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    _plans: dict[tuple[torch.device, torch.dtype, Backend], Plan] = field(default_factory=dict, init=False, repr=False)
    _dtypes: dict[torch.device, torch.dtype] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, expected: str, got: object) -> None:
            if not condition:
                raise InputError(f"{name} must {expected}, got {got}.")

        conventions = get_args(MapConvention)
        known = self.map_convention in conventions
        require(known, "map_convention", f"be one of {', '.join(conventions)}", repr(self.map_convention))
        channels = self.teacher.out_channels
        decoder = self.autoencoder.decoder
        for name, has, wanted in (
            ("student", self.student.out_channels, 2 * channels),
            ("autoencoder", decoder.deconv8.out_channels, channels),
        ):
            require(has == wanted, name, f"have {wanted} output channels beside a teacher of {channels}", has)
        sizes = (self.teacher.model_size, self.student.model_size)
        require(sizes[0] == sizes[1], "student", f"be of the teacher's model size {sizes[0]!r}", repr(sizes[1]))
        for name, padding in (("student", self.student.padding), ("autoencoder", decoder.padding)):
            require(
                padding == self.teacher.padding, name, f"have the teacher's padding={self.teacher.padding}", padding
            )
        for name in ("teacher_mean", "teacher_std"):
            shape = tuple(getattr(self, name).shape)
            require(shape == (channels,), name, f"have shape ({channels},)", shape)
        mean, std = self.teacher_mean, self.teacher_std
        require(bool(mean.isfinite().all()), "teacher_mean", "be finite", "infinity or NaN")
        usable = bool((std.isfinite() & (std > 0)).all())
        require(usable, "teacher_std", "be finite and above 0 in every channel", f"{float(std.min())} and others")
        _check_threshold(self.threshold)
        _check_quantiles(self.quantiles)
        for name, precision in self.precisions.items():
            require(name in PRECISIONS, "precisions", f"be of {', '.join(PRECISIONS)}", repr(name))
            scaled = precision.activations is not None
            expected = "have activations" if name == "float8" else "have no activations, which float8 alone needs"
            require(scaled == (name == "float8"), f"precisions[{name!r}]", expected, "some" if scaled else "none")
        for network in (self.teacher, self.student, self.autoencoder):
            network.eval().requires_grad_(False)
        _alive.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without plans and lock: a copy, or another process, plans anew."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _plans={}, _dtypes={}, _lock=threading.Lock())
        _alive.add(self)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.preprocessing.size

    def replaced(self, **changes: Any) -> Detector:
        """A copy with some fields changed, such as ``threshold``; networks are shared.

        A new ``threshold`` holds in every dtype. Where anything else than it and ``provenance`` changes, ``precisions``
        are left out, unless they are given: they were estimated for what was.
        """
        if "precisions" not in changes:
            kept = self.precisions if changes.keys() <= {"threshold", "provenance"} else {}
            if "threshold" in changes:
                kept = {name: replace(one, threshold=changes["threshold"]) for name, one in kept.items()}
            changes["precisions"] = kept
        return replace(self, **changes)

    def summary(self) -> dict[str, object]:
        """What a person wants to know of a detector, in reading order."""
        facts: dict[str, object] = {
            "model": f"EfficientAD-{self.teacher.model_size.upper()}",
            "network size": f"{self.size[0]} x {self.size[1]}",
            "threshold": round(self.threshold, 6),
            "map convention": self.map_convention,
        }
        if self.precisions:
            facts["calibrated in"] = ", ".join(
                f"{name} (threshold {round(one.threshold, 6)}, {one.provenance.get('images', '?')} images)"
                for name, one in self.precisions.items()
            )
        for key, value in self.provenance.items():
            # The settings are for repeating a training, and stay in the file.
            if key != "settings":
                facts[key.replace("_", " ")] = describe_teacher(value) if key == "teacher" else value
        return facts

    # Files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the detector to one safetensors file, atomically; :meth:`load` gives back the same bits."""
        networks = {"teacher": self.teacher, "student": self.student, "autoencoder": self.autoencoder}
        tensors = {
            f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()
        }
        tensors["teacher_mean"] = self.teacher_mean
        tensors["teacher_std"] = self.teacher_std
        for name, precision in self.precisions.items():
            for layer, largest in (precision.activations or {}).items():
                tensors[f"precisions.{name}.{layer}"] = largest
        facts = {
            "model_size": self.teacher.model_size,
            "out_channels": self.teacher.out_channels,
            "padding": self.teacher.padding,
            "quantiles": None if self.quantiles is None else asdict(self.quantiles),
            "threshold": self.threshold,
            "preprocessing": asdict(self.preprocessing),
            "map_convention": self.map_convention,
            "pad_maps": self.pad_maps,
            "provenance": dict(self.provenance),
            "precisions": {
                name: {
                    "quantiles": None if one.quantiles is None else asdict(one.quantiles),
                    "threshold": one.threshold,
                    "activations": None if one.activations is None else list(one.activations),
                    "provenance": dict(one.provenance),
                }
                for name, one in self.precisions.items()
            },
        }
        write_tensors(path, tensors, {"format": FILE_FORMAT, "detector": json.dumps(facts)})
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        images: str | os.PathLike[str] | None = None,
        teacher_mean: Tensor | None = None,
        teacher_std: Tensor | None = None,
        quantiles: Quantiles | None = None,
        threshold: float | None = None,
        size: tuple[int, int] | None = None,
        padding: bool | None = None,
        pad_maps: bool | None = None,
    ) -> Detector:
        """Read a file written by :meth:`save`, or a model that was made elsewhere. No pickle is executed.

        Made elsewhere: anomalib's Lightning checkpoint of ``EfficientAd``, or the folder it is in; the three files
        ``teacher_*.pth``, ``student_*.pth``, ``autoencoder_*.pth`` of the widely used PyTorch implementation, or their
        folder. They bring their map convention, preprocessing and threshold along where they have them. What they lack
        is given, and what is given replaces what they have; the three files always lack the teacher's statistics and
        the quantiles. docs/migrating.md shows both.

        Args:
            path: a file, a folder, or three files.
            images: a folder of good images or a data set, to compute what is missing from. Of the three files'
                data set, statistics and quantiles come from the images that they were trained and validated with.
            teacher_mean, teacher_std: the teacher's channel statistics, a number for each channel.
            size: height and width that images are resized to, where the file does not say it, or not in a way that this
                package has.
            padding: whether the networks pad, where the files do not say it: not, unless told otherwise.
            pad_maps: whether maps are padded, where the file does not say it: yes, unless told otherwise.

        Warns:
            UserWarning: what was made elsewhere lacks a threshold, and whatever else should be known of it.

        Raises:
            DetectorFileError: the file is missing, damaged, or something else; or what a detector needs is neither in
                it nor given.
            InputError: arguments are given for a file of this package, which has all of them.
        """
        from efficientad_fast.interop.loading import Supplied, load_elsewhere
        from efficientad_fast.interop.reading import is_torch_file

        supplied = Supplied(images, teacher_mean, teacher_std, quantiles, threshold, size, padding, pad_maps)
        is_one = isinstance(path, str | os.PathLike)
        if path == "" or not (is_one or (isinstance(path, Sequence) and not isinstance(path, bytes))):
            raise InputError(f"path must be that of a file or a folder, or those of three files, got {path!r}.")
        if not isinstance(path, str | os.PathLike) or is_folder(path) or is_torch_file(path):
            loaded = load_elsewhere(path, supplied)
            for note in loaded.notes:
                warnings.warn(note, UserWarning, stacklevel=2)
            return loaded.detector
        path = Path(path)
        if not is_file(path):
            raise DetectorFileError(
                f"No detector file at {path}. Check the path, or train one with `efficientad-fast train DATA --out "
                f"{path}`."
            )
        if path.suffix in _EXPORTED:
            raise DetectorFileError(
                f"{path} looks like an exported model. Give the checkpoint (.ckpt, .pth) that it was exported from."
            )
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FILE_FORMAT:
            raise DetectorFileError(
                f"{path} is not a detector of this package: its format is {metadata.get('format')!r}, "
                f"expected {FILE_FORMAT!r}. Train one with `efficientad-fast train DATA --out MODEL`."
            )
        if supplied.given():
            raise InputError(
                f"{path} is a detector of this package, which has all it needs: leave out "
                f"{', '.join(supplied.given())}. detector.replaced changes fields."
            )
        try:
            facts = json.loads(metadata["detector"])
            tables = [facts["provenance"], *(one["provenance"] for one in facts.get("precisions", {}).values())]
            if not isinstance(facts["padding"], bool) or not all(isinstance(one, dict) for one in tables):
                raise ValueError("padding must be true or false, and provenance a table")
            networks = _empty_networks(facts["model_size"], facts["out_channels"], padding=facts["padding"])
            for name, network in networks.items():
                prefix = f"{name}."
                weights = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
                network.to(next(iter(weights.values())).dtype).load_state_dict(weights)
            stored = facts["preprocessing"]
            return cls(
                cast(PatchDescriptionNetwork, networks["teacher"]),
                cast(PatchDescriptionNetwork, networks["student"]),
                cast(Autoencoder, networks["autoencoder"]),
                tensors["teacher_mean"],
                tensors["teacher_std"],
                quantiles=None if facts["quantiles"] is None else Quantiles(**facts["quantiles"]),
                threshold=float(facts["threshold"]),
                preprocessing=Preprocessing(
                    size=tuple(stored["size"]),
                    resize=stored["resize"],
                    mean=tuple(stored["mean"]),
                    std=tuple(stored["std"]),
                    max_value=stored["max_value"],
                    apply_exif=stored["apply_exif"],
                ),
                map_convention=facts["map_convention"],
                pad_maps=bool(facts["pad_maps"]),
                provenance=facts["provenance"],
                # Files of before there were any have none.
                precisions=_stored_precisions(facts.get("precisions", {}), tensors),
            )
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
            StopIteration,
        ) as error:
            raise DetectorFileError(
                f"{path} says it is a detector of this package, but its content is not: {error}. "
                "Copy or train it again."
            ) from error

    # Predicting

    def precision(self, dtype: str | torch.dtype) -> Precision:
        """Quantiles and threshold where the networks run in ``dtype``: its own, or the detector's.

        Raises:
            InputError: an unknown dtype, or float8 where the detector is not calibrated in it.
        """
        name = dtype_name(parse_dtype(dtype))
        own = self.precisions.get(name)
        if own is None and name == "float8":
            raise InputError(
                "This detector is not calibrated in float8, whose scales are made from activations of good images. Use "
                "detector.calibrated(GOOD_IMAGES, 'float8') or `efficientad-fast calibrate MODEL GOOD_IMAGES --dtype "
                "float8`."
            )
        return Precision(self.quantiles, self.threshold) if own is None else own

    def dtype_on(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
        """The dtype that predicting on a device computes in: ``dtype``, or the device's default where it is ``None``.

        The default is float32 on a CPU; float16 on a GPU where the GPU plan runs, with maps within 2e-3 of float32's
        (relative norm), else float32.

        Raises:
            InputError: unknown device or dtype; BackendError: this machine has no such device.
        """
        if dtype is not None:
            return parse_dtype(dtype)
        parsed = parse_device(device)
        # Looking at all layers takes longer than predicting an image.
        if parsed not in self._dtypes:
            self._dtypes[parsed] = default_dtype(parsed, self.plan_input(self.size))
        return self._dtypes[parsed]

    def calibrated(
        self,
        images: ImageSource | Iterable[ImageSource],
        dtype: str | torch.dtype,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Detector:
        """A copy with quantiles and threshold estimated in ``dtype``, as training estimates those of float32.

        In float8 the images go through the networks twice: the first time in float16, for the activations that the
        scales are made from. Memory does not grow with their number. On a CPU, float8 is emulated: the same numbers as
        on a GPU but for the order of sums.

        Args:
            images: good ones that the detector was not trained on: a folder (a data set's: its validation images, or
                those that training held back), or a list or tuple as for :meth:`predict`.
            dtype: one of :data:`PRECISIONS`.
            device: where the networks run.
            batch_size: images that go through them together.
            progress: called with what is being done, images done, and images in all.

        Raises:
            InputError: no images, images that can be read only once, a folder of defective ones, or another dtype.
            ImageError: an image cannot be read.
            BackendError: the device cannot run the dtype.
        """
        from efficientad_fast.training.calibrate import calibration_dtype, estimate, images_for

        name = dtype_name(calibration_dtype(dtype))
        if isinstance(images, str | os.PathLike) and Path(images).is_dir():
            several: Iterable[ImageSource] = images_for(self, Path(images))[0]
        else:
            _, several = _arrange(images)
        if not isinstance(several, Sequence):
            raise InputError("Calibrating reads the images more than once: give a folder or a list, not an iterator.")
        found = estimate(self, several, name, device=device, batch_size=batch_size, progress=progress)
        return replace(self, precisions={**self.precisions, name: found})

    def plan_input(self, size: tuple[int, int], dtype: str | torch.dtype = "float32") -> PlanInput:
        """What plans of this detector are made from, for inputs of ``size`` (height, width) and a dtype."""
        shape = (1, -1, 1, 1)
        precision = self.precision(dtype)
        return PlanInput(
            self.teacher,
            self.student,
            self.autoencoder,
            self.teacher_mean.view(shape),
            self.teacher_std.view(shape),
            precision.quantiles,
            self.map_convention,
            self.pad_maps,
            size,
            precision.activations,
        )

    def plan(
        self, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None, *, backend: Backend = "auto"
    ) -> Plan:
        """The plan for a device and dtype (:meth:`dtype_on` says what ``None`` is), built on first use and kept.

        Raises:
            InputError: unknown device, dtype or backend; BackendError: they cannot be used on this machine.
        """
        key = (parse_device(device), self.dtype_on(device, dtype), backend)
        with self._lock:
            if key not in self._plans:
                source = self.plan_input(self.size, key[1])
                self._plans[key] = build_plan(source, key[0], key[1], backend=backend)
            return self._plans[key]

    def warmup(
        self,
        *,
        batch_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        runs: int = 3,
    ) -> None:
        """Build the plan and run it on blank images, so that the first real prediction is as fast as the next.

        On a GPU the third run is the first that is all of one graph; the graph's images are of the networks' size.
        """
        plan = self.plan(device, dtype)
        blank = torch.zeros(3, *self.size, dtype=torch.uint8)
        for _ in range(runs):
            plan.submit([blank] * batch_size, self.preprocessing).result()

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        map_size: MapSize = "network",
        channel_order: str = "rgb",
        max_value: int | None = None,
        apply_exif: bool | None = None,
    ) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """Predict one image, several, a folder, or a stream.

        Args:
            images: what comes out has the form of what goes in.

                - a path to an image, a PIL image, an array ``(H, W)`` or ``(H, W, C)``, a tensor ``(C, H, W)``:
                  one :class:`Prediction`;
                - a path to a folder (searched recursively, sorted), a list or tuple of single images, an array
                  ``(N, H, W, C)``, a tensor ``(N, C, H, W)``: a list;
                - any other iterable: an iterator of predictions, in order, with bounded memory. An image, its file
                  too, is read before the next is asked for.
            batch_size: images that go through the networks together. A stream waits for that many.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
            dtype: of the networks: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float64"``, or ``"float8"`` where
                the detector is :meth:`calibrated` in it. ``None`` is the device's, as :meth:`dtype_on` says: float32
                on a CPU, float16 on a GPU (maps within 2e-3).
            map_size: return maps at the network's size or each image's own. Scores are the same.
            channel_order: ``"rgb"`` or ``"bgr"`` (OpenCV), for arrays and tensors.
            max_value: value of white, for uint16 arrays and 16-bit files, in place of the detector's own.
            apply_exif: turn photographs upright as their EXIF data says, in place of the detector's own.

        Raises:
            ImageError: the one image given cannot be read. Among several, a bad one becomes a prediction with
                ``error`` set and the others are predicted.
            DatasetError: a folder without images.
            InputError: any other argument is off.
        """
        options = DecodeOptions(channel_order, max_value, apply_exif)
        single, several = _arrange(images)
        if single:
            plan = self._checked_plan(batch_size, device, dtype, map_size, options)
            (source,) = several
            # In this thread: there is nothing to decode ahead.
            decoded = _decode(source, _name(source, 0), self.preprocessing, options)
            (prediction,) = _submitted([decoded], plan, self.preprocessing, map_size == "original").predictions(
                self.precision(plan.dtype).threshold
            )
            if prediction.error is not None:
                raise ImageError(prediction.error)
            return prediction
        results = self.stream(
            several, batch_size=batch_size, device=device, dtype=dtype, map_size=map_size, decode=options
        )
        return list(results) if isinstance(several, Sequence) else results

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        map_size: MapSize = "network",
        decode: DecodeOptions | None = None,
    ) -> Iterator[Prediction]:
        """Predictions one by one, in order; memory does not grow with their number.

        Images are decoded ahead while the networks run: a batch, and an image more for each thread, or fewer, so that
        about 256 MiB wait at most. The files of a list or tuple are decoded in several threads. Of any other iterable,
        each image is read before the next is asked for, so that a camera may reuse its memory or its file. Arguments as
        for :meth:`predict`.

        Raises:
            InputError: an argument is off (at the call, not at the first ``next``).
        """
        options = decode or DecodeOptions()
        plan = self._checked_plan(batch_size, device, dtype, map_size, options)
        return self._run(images, plan, batch_size, map_size == "original", options)

    def _checked_plan(
        self,
        batch_size: int,
        device: str | torch.device,
        dtype: str | torch.dtype | None,
        map_size: MapSize,
        options: DecodeOptions,
    ) -> Plan:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a positive integer, got {batch_size!r}.")
        if map_size not in get_args(MapSize):
            raise InputError(f"map_size must be one of {', '.join(get_args(MapSize))}, got {map_size!r}.")
        check_decode_options(options.channel_order, options.max_value)
        return self.plan(device, dtype)

    def _run(
        self,
        images: Iterable[ImageSource],
        plan: Plan,
        batch_size: int,
        original_maps: bool,
        options: DecodeOptions,
    ) -> Iterator[Prediction]:
        if isinstance(images, list | tuple):
            batch_size = min(batch_size, len(images))
        threshold = self.precision(plan.dtype).threshold
        with _decoding_ahead(images, self.preprocessing, options, batch_size) as decoded:
            if plan.device.type == "cuda":
                yield from self._run_overlapped(decoded, plan, batch_size, threshold, original_maps)
                return
            while items := self._run_batch(decoded, plan, batch_size, original_maps):
                yield from items.predictions(threshold)

    def _run_batch(
        self, decoded: Iterator[_Decoded], plan: Plan, batch_size: int, original_maps: bool
    ) -> _Submitted | None:
        """The next ``batch_size`` images, or those that are left, each preprocessed as soon as it is there."""
        batch = self.preprocessing.empty_batch(batch_size)
        items: list[_Decoded] = []
        sizes: list[tuple[int, int]] = []
        for item in itertools.islice(decoded, batch_size):
            if item.image is not None:
                self.preprocessing.into(batch[len(sizes) : len(sizes) + 1], item.image)
                sizes.append((item.image.shape[-2], item.image.shape[-1]))
            # Images as they were decoded, which may be large, do not wait for their batch.
            items.append(replace(item, image=None))
            del item
        if not items:
            return None
        if not sizes:
            return _Submitted(items, None)
        results = plan.run(batch[: len(sizes)], sizes, original_maps=original_maps)
        return _Submitted(items, Pending(lambda: results))

    def _run_overlapped(
        self, decoded: _Ahead, plan: Plan, batch_size: int, threshold: float, original_maps: bool
    ) -> Iterator[Prediction]:
        """A batch is copied to the device while the one before is computed, unless its images are late."""
        before: _Submitted | None = None
        while True:
            items: list[_Decoded] = []
            while len(items) < batch_size:
                if before is not None and not decoded.has_next():
                    # A camera gets each prediction before it has to give its next image.
                    yield from before.predictions(threshold)
                    before = None
                item = next(decoded, None)
                if item is None:
                    break
                items.append(item)
            following = _submitted(items, plan, self.preprocessing, original_maps) if items else None
            if before is not None:
                yield from before.predictions(threshold)
            if following is None:
                return
            before = following


_alive: weakref.WeakSet[Detector] = weakref.WeakSet()


def _after_fork() -> None:
    """Other threads may have held locks, which nobody would give back: new ones, and on a CPU new plans."""
    for detector in list(_alive):
        kept = {key: plan for key, plan in detector._plans.items() if key[0].type != "cpu"}
        detector.__dict__.update(_plans=kept, _lock=threading.Lock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class _Submitted:
    """Images that the networks have, without those; ``pending`` are the ones that could be read, if there are any."""

    items: list[_Decoded]
    pending: Pending | None

    def predictions(self, threshold: float) -> list[Prediction]:
        results: Iterator[tuple[float, Tensor]] = iter(())
        if self.pending is not None:
            scores, maps = self.pending.result()
            results = zip(scores.tolist(), maps, strict=True)
        predictions = []
        for item in self.items:
            if item.error is not None:
                predictions.append(Prediction(item.source, math.nan, None, None, item.error))
                continue
            score, anomaly_map = next(results)
            # Keeping one map must not keep its whole batch.
            is_part = anomaly_map.untyped_storage().nbytes() > anomaly_map.nbytes
            pixels = (anomaly_map.clone() if is_part else anomaly_map).float().numpy()
            if math.isnan(score):
                error = f"{item.source}: {_NO_SCORE}"
                predictions.append(Prediction(item.source, score, None, pixels, error, item.note))
            else:
                predictions.append(Prediction(item.source, score, score > threshold, pixels, note=item.note))
        return predictions


def _submitted(items: list[_Decoded], plan: Plan, preprocessing: Preprocessing, original_maps: bool) -> _Submitted:
    images = [item.image for item in items if item.image is not None]
    without = [replace(item, image=None) for item in items]
    pending = plan.submit(images, preprocessing, original_maps=original_maps) if images else None
    return _Submitted(without, pending)


def is_emulated(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether a device has no arithmetic in ``dtype``, and other arithmetic makes the numbers it would give."""
    return dtype == DTYPES["float8"] and torch.device(device).type == "cpu"


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype of :data:`plan.DTYPES` is called there."""
    return next(name for name, one in DTYPES.items() if one == dtype)


def _check_threshold(threshold: float) -> None:
    if math.isnan(threshold):
        raise InputError(f"threshold must be a number or infinity, got {threshold}.")


def _check_quantiles(quantiles: Quantiles | None) -> None:
    if quantiles is None:
        return
    if not isinstance(quantiles, Quantiles):
        raise InputError(f"quantiles must be an efficientad_fast.Quantiles, got a {type(quantiles).__name__}.")
    given = astuple(quantiles)
    if not all(map(math.isfinite, given)):
        raise InputError(f"quantiles must be finite, got {given}.")
    if given[0] >= given[1] or given[2] >= given[3]:
        raise InputError(
            f"quantiles must have ends above their starts (None leaves the maps as they are), got {given}."
        )


def _stored_precisions(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Precision]:
    return {
        name: Precision(
            None if one["quantiles"] is None else Quantiles(**one["quantiles"]),
            float(one["threshold"]),
            None
            if one["activations"] is None
            else {layer: tensors[f"precisions.{name}.{layer}"] for layer in one["activations"]},
            one["provenance"],
        )
        for name, one in stored.items()
    }


def _empty_networks(model_size: Any, out_channels: int, *, padding: bool) -> dict[str, nn.Module]:
    # Weights follow, so time and the caller's random state are not spent on initial ones.
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "teacher": PatchDescriptionNetwork(model_size, out_channels, padding=padding),
            "student": PatchDescriptionNetwork(model_size, 2 * out_channels, padding=padding),
            "autoencoder": Autoencoder(out_channels, padding=padding),
        }
    return {name: network.to_empty(device="cpu") for name, network in networks.items()}


def _arrange(images: ImageSource | Iterable[ImageSource]) -> tuple[bool, Iterable[ImageSource]]:
    """Whether ``images`` is a single one, and an iterable over it or them; a sequence where all are at hand."""
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        return (False, list_images(path)) if is_folder(path) else (True, [images])
    if isinstance(images, Image.Image):
        return True, [images]
    if isinstance(images, np.ndarray | Tensor):
        return (False, list(images)) if images.ndim == 4 else (True, [images])
    if isinstance(images, Iterable) and not isinstance(images, bytes | bytearray | memoryview):
        return False, images
    raise InputError(
        "images must be a path, a folder, a PIL image, an array, a tensor, or an iterable of these, "
        f"got {type(images).__name__}."
    )


def _name(source: object, index: int) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source) if isinstance(os.fspath(source), str) else os.fsdecode(source)
    return getattr(source, "filename", "") or f"image {index}"


def _decode(source: ImageSource, name: str, preprocessing: Preprocessing, options: DecodeOptions) -> _Decoded:
    notes: list[str] = []
    try:
        image = preprocessing.decode(source, options, channels_last=True, tell=notes.append)
        return _Decoded(name, image, note="; ".join(notes) or None)
    except ImageError as error:
        return _Decoded(name, None, str(error) if name in str(error) else f"{name}: {error}")


def _decoding_threads() -> int:
    """As many as may run at once, but not so many that they wait for each other in Python."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 8)


class _Room:
    """For decoded images that wait to be taken, in order: whoever would decode one more waits until there is some.

    The next ``always`` images to be taken may take four times as much of it, and the very next one needs none, so that
    whoever takes it never waits for nothing. Those being decoded are not counted.
    """

    def __init__(self, always: int) -> None:
        self._always = always
        self._taken = 0
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def decode(self, index: int, *job: Any) -> _Decoded:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may(index))
        decoded = _decode(*job)
        with self._changed:
            self._bytes += 0 if decoded.image is None else decoded.image.nbytes
        return decoded

    def _may(self, index: int) -> bool:
        if index < self._taken + self._always and self._bytes < 4 * _MOST_WAITING_BYTES:
            return True
        return self._bytes < _MOST_WAITING_BYTES or index <= self._taken

    def take(self, decoded: _Decoded) -> None:
        with self._changed:
            self._bytes -= 0 if decoded.image is None else decoded.image.nbytes
            self._taken += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Ahead:
    """Iterator over what threads decode, in order. Errors of their source are raised where they stand."""

    def __init__(self, ready: queue.Queue[Future[_Decoded] | BaseException | None], room: _Room) -> None:
        self._ready = ready
        self._room = room
        self._head: list[Future[_Decoded] | BaseException | None] = []  # one at most

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> _Decoded:
        item = self._head[0] if self._head else self._ready.get()
        if not isinstance(item, Future):
            # Nothing comes after it: asked again, it is the same again.
            self._head = [item]
            raise StopIteration if item is None else item
        self._head.clear()
        decoded = item.result()
        self._room.take(decoded)
        return decoded

    def has_next(self) -> bool:
        """Whether the next image is there already; neither an end nor an error is one."""
        if not self._head:
            with contextlib.suppress(queue.Empty):
                self._head.append(self._ready.get_nowait())
        return bool(self._head) and isinstance(self._head[0], Future) and self._head[0].done()


@contextlib.contextmanager
def _decoding_ahead(
    images: Iterable[ImageSource], preprocessing: Preprocessing, options: DecodeOptions, batch_size: int
) -> Iterator[_Ahead]:
    """Decode in threads, in order, ahead of who takes the results. Errors of the iterable itself are raised.

    One thread asks for the images, and others decode the files of a list or tuple. All else is decoded by the first
    before it asks for the next: an image's memory, or the file that it is read from, may be the next one's too.
    """
    known_files = isinstance(images, list | tuple)
    threads = _decoding_threads()
    ready: queue.Queue[Future[_Decoded] | BaseException | None] = queue.Queue(maxsize=batch_size + threads)
    stopped = threading.Event()
    room = _Room(always=threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_THREAD)

    def put(item: Future[_Decoded] | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def draw() -> None:
        end: BaseException | None = None
        try:
            for index, source in enumerate(images):
                if stopped.is_set():
                    return
                job = (index, source, _name(source, index), preprocessing, options)
                if known_files and isinstance(source, str | os.PathLike):
                    put(pool.submit(room.decode, *job))
                else:
                    done: Future[_Decoded] = Future()
                    done.set_result(room.decode(*job))
                    put(done)
        # Whatever ends the source, Ctrl-C in it included, is raised in the caller's thread.
        except BaseException as error:
            end = error
        put(end)

    thread = threading.Thread(target=draw, name=_THREAD, daemon=True)
    thread.start()
    try:
        # Not a generator: it would hold on to what was taken last.
        yield _Ahead(ready, room)
    finally:
        stopped.set()
        room.close()
        pool.shutdown(wait=False, cancel_futures=True)
        # A source that blocks, such as a camera, cannot be woken; the thread ends with its next image.
        thread.join(timeout=1.0)
