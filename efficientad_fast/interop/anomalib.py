"""anomalib's ``EfficientAd``: Lightning checkpoints, with all that they say of preprocessing and threshold.

anomalib normalises images inside its networks; a detector does it before them, which is the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from efficientad_fast.errors import InputError
from efficientad_fast.interop.networks import PADDING, SIZE, Parts, autoencoder, patch_description_network, tensors_of
from efficientad_fast.interop.reading import TensorRecord, TorchFile
from efficientad_fast.interop.unpickling import Record, shown
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork
from efficientad_fast.reference.preprocess import LARGEST_SIDE

DEFAULT_SIZE = (256, 256)
"""What ``EfficientAd`` resizes to where it is not told otherwise."""


def state_of(file: TorchFile) -> dict[str, TensorRecord] | None:
    """The tensors of a Lightning checkpoint or of a torch model's state dict, without ``model.``, if it is one."""
    value = file.value
    state = value.get("state_dict") if isinstance(value, dict) else None
    found = tensors_of(state) if isinstance(state, dict) else tensors_of(value)
    if "model.teacher.conv1.weight" in found:
        return {name.removeprefix("model."): one for name, one in found.items()}
    return found if "teacher.conv1.weight" in found and "ae.encoder.enconv1.weight" in found else None


def read_parts(
    file: TorchFile,
    state: Mapping[str, TensorRecord],
    size: tuple[int, int] | None,
    *,
    padding: bool | None,
    pad_maps: bool | None,
) -> Parts:
    """A detector from an open checkpoint.

    Args:
        state: of :func:`state_of`.
        size, padding, pad_maps: in place of what the checkpoint says.

    Raises:
        DetectorFileError: its weights are not those of the three networks.
    """
    checkpoint: dict[Any, Any] = file.value
    hyper = _dictionary(checkpoint.get("hyper_parameters"))
    required, notes = set[str](), list[str]()
    if padding is None:
        padding = hyper.get("padding")
    if not isinstance(padding, bool):
        required.add(PADDING)
        padding = False
    if pad_maps is None:
        pad_maps = hyper.get("pad_maps", True) is True
    preprocessing = None
    try:
        preprocessing = _preprocessing(checkpoint, hyper) if size is None else Preprocessing(size)
    except _OtherPreprocessing as error:
        required.add(SIZE)
        notes.append(f"Its preprocessing is not a resize, as this package's is: {error}.")

    def inside(name: str) -> dict[str, TensorRecord]:
        return {key.removeprefix(name): one for key, one in state.items() if key.startswith(name)}

    def numbers(name: str) -> Tensor | None:
        record = state.get(name)
        return None if record is None else file.tensor(record)

    mean, std = numbers("mean_std.mean"), numbers("mean_std.std")
    teacher = patch_description_network(file, inside("teacher."), padding=padding)
    student = patch_description_network(file, inside("student."), padding=padding)
    plain = autoencoder(file, inside("ae."), padding=padding)
    channels = cast(PatchDescriptionNetwork, teacher).out_channels
    # anomalib's networks of before they were trained have zeros, and leave the teacher's features as they are then.
    if mean is None or std is None or not (mean.sum() != 0 or std.sum() != 0):
        mean, std = torch.zeros(channels), torch.ones(channels)
    return Parts(
        cast(PatchDescriptionNetwork, teacher),
        cast(PatchDescriptionNetwork, student),
        cast(Autoencoder, plain),
        "resized",
        pad_maps,
        teacher_mean=mean.flatten(),
        teacher_std=std.flatten(),
        quantiles=_quantiles(numbers),
        threshold=_threshold(checkpoint, hyper, numbers),
        preprocessing=preprocessing,
        required=frozenset(required),
        notes=tuple(notes),
        provenance={"made_by": "anomalib"},
    )


def _dictionary(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _quantiles(numbers: Callable[[str], Tensor | None]) -> Quantiles | None:
    found = [numbers(f"quantiles.{name}") for name in ("qa_st", "qb_st", "qa_ae", "qb_ae")]
    values = [0.0 if one is None or one.numel() != 1 else float(one) for one in found]
    return Quantiles(*values) if any(values) else None


# The threshold


def _threshold(
    checkpoint: Mapping[Any, Any], hyper: Mapping[Any, Any], numbers: Callable[[str], Tensor | None]
) -> float | None:
    """The score beyond which anomalib's post-processor calls an image anomalous; ``None`` where nothing set it.

    It maps scores so that its threshold becomes 0.5, with 1 for the range of the scores that it saw, and compares
    them with 1 minus a sensitivity; without a range it compares scores as they are. anomalib 1 has a threshold of
    scores as they are.
    """

    def number(name: str) -> float:
        found = numbers(f"post_processor.{name}")
        return math.nan if found is None or found.numel() != 1 else float(found)

    first = numbers("image_threshold.value")
    if first is not None and first.numel() == 1:
        # anomalib 1 calls an image anomalous whose score is the threshold, which is a score that it saw.
        return float(torch.nextafter(first.float().squeeze(), torch.tensor(-math.inf)))
    enabled = _dictionary(checkpoint.get("anomalib_components_enabled")).get("post_processor", True)
    config = _dictionary(checkpoint.get("anomalib_post_processor_config"))
    older = hyper.get("post_processor")  # which was pickled, or False
    if not config and isinstance(older, Record):
        config = dict(older.attributes)
    if enabled is not True or older is False or config.get("enable_thresholding", True) is not True:
        return None
    threshold, low, high = number("_image_threshold"), number("image_min"), number("image_max")
    if math.isnan(threshold) and config.get("enable_threshold_matching", True) is True:
        threshold = number("_pixel_threshold")
    if math.isnan(threshold) and (math.isnan(low) or math.isnan(high)):
        return None
    sensitivity = config.get("image_sensitivity", 0.5)
    sensitivity = float(sensitivity) if isinstance(sensitivity, int | float) and 0 <= sensitivity <= 1 else 0.5
    normalises = config.get("enable_normalization", True) is True
    if not normalises or math.isnan(low) or math.isnan(high):
        return 1 - sensitivity
    if math.isnan(threshold):
        threshold = (low + high) / 2
    if sensitivity <= 0:
        return math.inf
    return threshold + (0.5 - sensitivity) * (high - low)


# The preprocessing


class _OtherPreprocessing(Exception):
    pass


def _preprocessing(checkpoint: Mapping[Any, Any], hyper: Mapping[Any, Any]) -> Preprocessing:
    """Raises :class:`_OtherPreprocessing` with what it is where it is not one resize, normalised after it or not."""
    enabled = _dictionary(checkpoint.get("anomalib_components_enabled")).get("pre_processor", True)
    config = checkpoint.get("anomalib_pre_processor_config")
    older = hyper.get("pre_processor")
    if enabled is not True or older is False:
        raise _OtherPreprocessing("it has none, and takes images as the data loader resizes them")
    if isinstance(config, dict):
        transforms = _flat(_described(config.get("transform")))
    elif isinstance(older, Record):
        transforms = _flat(_recorded(_child(older, "transform")))
    elif "transform" in checkpoint:  # anomalib 1
        transforms = _flat(_recorded(checkpoint["transform"]))
    elif "pytorch-lightning_version" in checkpoint and "pre_processor" not in hyper:  # anomalib 0
        raise _OtherPreprocessing("the checkpoint does not say what it is")
    else:
        return Preprocessing(DEFAULT_SIZE)
    if [kind for kind, _ in transforms] not in (["Resize"], ["Resize", "Normalize"]):
        raise _OtherPreprocessing(f"it is {', '.join(shown(kind) for kind, _ in transforms[:9]) or 'nothing'}")
    settings = transforms[0][1]
    size, interpolation = settings.get("size"), settings.get("interpolation", "bilinear")
    if isinstance(interpolation, Record):
        interpolation = interpolation.arguments[0] if interpolation.arguments else None
    is_pair = isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_side, size))
    if not is_pair or interpolation != "bilinear" or settings.get("antialias", True) is not True:
        names = ("size", "interpolation", "antialias")
        told = ", ".join(f"{name}={shown(settings[name])}" for name in names if name in settings)
        raise _OtherPreprocessing(f"it is a Resize of {told}")
    try:
        plain = Preprocessing(tuple(cast(Any, size)))
        return plain if len(transforms) == 1 else _normalised(plain, transforms[1][1])
    except InputError as error:
        raise _OtherPreprocessing(str(error)) from error


def _normalised(plain: Preprocessing, settings: Mapping[Any, Any]) -> Preprocessing:
    """With a Normalize between resizing and the network's own normalisation, as anomalib 1.0 had by default."""
    pairs = []
    for name in ("mean", "std"):
        values = settings.get(name)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_small, values)):
            raise _OtherPreprocessing(f"it is a Normalize with {name}={shown(values)}")
        pairs.append(values)
    first, second = zip(*pairs, strict=True), zip(plain.mean, plain.std, strict=True)
    mean, std = zip(*((a + b * m, b * s) for (a, b), (m, s) in zip(first, second, strict=True)), strict=True)
    return replace(plain, mean=cast(Any, mean), std=cast(Any, std))


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 2**31


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST_SIDE


_Transform = tuple[str, Mapping[Any, Any]]
"""A transform of torchvision: its class's name and its settings."""


def _described(spec: Any) -> _Transform:
    """Of what anomalib writes from 2.7 on."""
    spec = _dictionary(spec)
    path = spec.get("class_path")
    return path.rpartition(".")[2] if isinstance(path, str) else "nothing", _dictionary(spec.get("init_args"))


def _recorded(value: Any) -> _Transform:
    """Of what anomalib pickled before."""
    return (value.kind, value.attributes) if isinstance(value, Record) else ("nothing", {})


def _child(record: Record, name: str) -> Any:
    return {**record.attributes, **_dictionary(record.attributes.get("_modules"))}.get(name)


def _flat(transform: _Transform) -> list[_Transform]:
    """One, or those of a Compose."""
    kind, settings = transform
    if kind != "Compose":
        return [transform]
    inner = settings.get("transforms")
    several = inner[:100] if isinstance(inner, list | tuple) else ()
    return [_recorded(one) if isinstance(one, Record) else _described(one) for one in several]
