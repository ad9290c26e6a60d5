"""Networks from what files hold of them: state dicts, and ``nn.Sequential`` modules that were pickled whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from efficientad_fast.errors import DetectorFileError
from efficientad_fast.interop.reading import TensorRecord, TorchFile
from efficientad_fast.interop.unpickling import Record, shown
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import MapConvention, Quantiles
from efficientad_fast.reference.networks import Autoencoder, ModelSize, PatchDescriptionNetwork

_CONVOLUTIONS: dict[int, ModelSize] = {4: "s", 6: "m"}
"""How many the patch description networks have."""

_MOST_LAYERS = 64
"""Of an autoencoder with all its activations and dropout layers there are 39."""

_AUTOENCODER = [*(f"encoder.enconv{n}" for n in range(1, 7)), *(f"decoder.deconv{n}" for n in range(1, 9))]


HOW_GIVEN = {
    "the teacher's mean and std": ("teacher_mean= and teacher_std=", "--statistics FILE"),
    "quantiles": ("quantiles=", "--statistics FILE"),
    "whether the networks pad": ("padding=", "--padding or --no-padding"),
    "the network size": ("size=", "--size"),
}
"""How what is missing is given to ``Detector.load``, and to ``efficientad-fast convert``."""

STATISTICS, QUANTILES, PADDING, SIZE = HOW_GIVEN


@dataclass(frozen=True)
class Parts:
    """What files made elsewhere hold of a detector; ``None`` is what they do not.

    Attributes:
        required: of :data:`HOW_GIVEN`, what a detector needs and these files do not say.
        notes: sentences for people, on what was understood.
    """

    teacher: PatchDescriptionNetwork
    student: PatchDescriptionNetwork
    autoencoder: Autoencoder
    map_convention: MapConvention
    pad_maps: bool
    teacher_mean: Tensor | None = None
    teacher_std: Tensor | None = None
    quantiles: Quantiles | None = None
    threshold: float | None = None
    preprocessing: Preprocessing | None = None
    required: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def tensors_of(value: Any, prefix: str = "") -> dict[str, TensorRecord]:
    """The tensors of a state dict whose names begin with ``prefix``, by the rest of their names."""
    if not isinstance(value, dict):
        return {}
    # What DataParallel and DistributedDataParallel wrap has this before every name.
    names = [name for name in value if isinstance(name, str)]
    wrapped = "module." if names and all(name.startswith("module.") for name in names) else ""
    return {
        name[len(wrapped + prefix) :]: one
        for name, one in value.items()
        if isinstance(name, str) and name.startswith(wrapped + prefix) and isinstance(one, TensorRecord)
    }


def patch_description_network(file: TorchFile, state: Mapping[str, TensorRecord], *, padding: bool) -> nn.Module:
    """From a state dict with the names ``conv1.weight`` ...

    Raises:
        DetectorFileError: it is none of a patch description network.
    """
    model_size = _CONVOLUTIONS.get(sum(name.endswith(".weight") for name in state))
    if model_size is None:
        raise _unknown(file)
    last = state.get("conv4.weight" if model_size == "s" else "conv6.weight")
    channels = last.size[0] if last is not None and last.size else 0
    return _filled(file, state, lambda: PatchDescriptionNetwork(model_size, channels, padding=padding))


def autoencoder(file: TorchFile, state: Mapping[str, TensorRecord], *, padding: bool) -> nn.Module:
    """From a state dict with the names ``encoder.enconv1.weight`` ... ``decoder.deconv8.bias``.

    Raises:
        DetectorFileError: it is none of an autoencoder.
    """
    last = state.get("decoder.deconv8.weight")
    channels = last.size[0] if last is not None and last.size else 0
    return _filled(file, state, lambda: Autoencoder(channels, padding=padding))


def network(file: TorchFile, value: Any, *, padding: bool) -> nn.Module:
    """A patch description network or an autoencoder.

    Args:
        value: what was saved, or the part of it that is the network.
        padding: whether networks pad whose file does not say it, which state dicts do not.

    Returns:
        An ``nn.Sequential`` where one was pickled, of which only layers that are known were made, else one of
        ``reference.networks``. In eval mode.

    Raises:
        DetectorFileError: there is no network, or one of another kind.
    """
    if isinstance(value, Record):
        return _sequential(file, value).eval()
    state = tensors_of(value)
    if _is_sequential(state):
        order = sorted({name.split(".")[0] for name in state}, key=int)
        names = _AUTOENCODER if len(order) == len(_AUTOENCODER) else [f"conv{n + 1}" for n in range(len(order))]
        renamed = dict(zip(order, names, strict=True))
        state = {f"{renamed[name.split('.')[0]]}.{name.split('.')[1]}": one for name, one in state.items()}
    if "encoder.enconv1.weight" in state:
        return autoencoder(file, state, padding=padding)
    if "conv1.weight" in state:
        return patch_description_network(file, state, padding=padding)
    raise _unknown(file)


def _is_sequential(state: Mapping[str, TensorRecord]) -> bool:
    return bool(state) and all(re.fullmatch(r"\d{1,3}\.(weight|bias)", name, re.ASCII) for name in state)


def _unknown(file: TorchFile) -> DetectorFileError:
    value = file.value
    if isinstance(value, dict):
        names = ", ".join(map(shown, list(value)[:4])) or "nothing"
        held = f"a dictionary of {names}{' ...' if len(value) > 4 else ''}"
    else:
        held = shown(value)
    return DetectorFileError(
        f"{file.source} holds {held}, and no network of EfficientAD. Expected are a state dict or a pickled "
        "nn.Sequential of the widely used PyTorch implementation, anomalib's teacher, or anomalib's Lightning "
        "checkpoint (.ckpt)."
    )


def _filled(file: TorchFile, state: Mapping[str, TensorRecord], build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            built = build()
    except (RuntimeError, TypeError, ValueError) as error:
        raise _unknown(file) from error
    expected = {name: tuple(one.shape) for name, one in built.state_dict().items()}
    found = {name: one.size for name, one in state.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise DetectorFileError(
            f"{file.source}: {wrong} has shape {found.get(wrong)}, expected {expected.get(wrong)} in a network of the "
            "published widths. Networks of other widths are not read."
        )
    built.load_state_dict({name: _weights(file, one) for name, one in state.items()}, assign=True)
    return built.eval().requires_grad_(False)


def _weights(file: TorchFile, record: TensorRecord) -> Tensor:
    found = file.tensor(record)
    if not found.is_floating_point():
        raise DetectorFileError(f"{file.source} has weights in {found.dtype}. Save them as float32.")
    return found if found.dtype == torch.float64 else found.float()


# Modules that were pickled whole


def _sequential(file: TorchFile, record: Record) -> nn.Sequential:
    children = record.attributes.get("_modules")
    if record.kind != "Sequential" or not isinstance(children, dict) or len(children) > _MOST_LAYERS:
        raise _unknown(file)
    return nn.Sequential(*(_layer(file, child) for child in children.values()))


def _layer(file: TorchFile, record: Any) -> nn.Module:
    make = _LAYERS.get(record.kind) if isinstance(record, Record) else None
    if make is None:
        raise DetectorFileError(
            f"{file.source} holds {shown(record)}, which none of the three networks has. Expected are "
            f"{', '.join(_LAYERS)}."
        )
    attributes = record.attributes
    try:
        return make(file, attributes)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DetectorFileError):
            raise
        raise DetectorFileError(f"{file.source} holds a {record.kind} that is damaged ({error}).") from error


def _convolution(file: TorchFile, attributes: Mapping[str, Any]) -> nn.Module:
    parameters = {
        name: nn.Parameter(_weights(file, one), requires_grad=False)
        for name, one in cast(dict[str, Any], attributes["_parameters"]).items()
        if name in ("weight", "bias") and isinstance(one, TensorRecord)
    }
    outputs, inputs = parameters["weight"].shape[:2]
    groups = _plain(attributes["groups"])
    if not isinstance(groups, int):
        raise ValueError("groups that are no number")
    with torch.device("meta"):
        layer = nn.Conv2d(
            inputs * groups,
            outputs,
            parameters["weight"].shape[2:],  # type: ignore[arg-type]
            _plain(attributes["stride"]),
            _plain(attributes["padding"]),
            _plain(attributes["dilation"]),
            groups,
            bias="bias" in parameters,
            padding_mode=_plain(attributes["padding_mode"]),
        )
    for name, parameter in parameters.items():
        setattr(layer, name, parameter)
    return layer


def _average_pool(file: TorchFile, attributes: Mapping[str, Any]) -> nn.Module:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    return nn.AvgPool2d(*(_plain(attributes[name]) for name in names))


def _upsample(file: TorchFile, attributes: Mapping[str, Any]) -> nn.Module:
    names = ("size", "scale_factor", "mode", "align_corners")
    return nn.Upsample(**{name: _plain(attributes[name]) for name in names})


def _plain(setting: Any) -> Any:
    """Of a layer: a number, a word, or a pair of numbers."""
    flat = setting if isinstance(setting, tuple | list) else (setting,)
    is_small = all(one is None or (isinstance(one, int | float) and abs(one) < 2**31) for one in flat)
    if len(flat) > 4 or not (is_small or (isinstance(setting, str) and len(setting) < 40)):
        raise ValueError("a setting that no layer has")
    return setting


_LAYERS: dict[str, Callable[[TorchFile, Mapping[str, Any]], nn.Module]] = {
    "Conv2d": _convolution,
    "ReLU": lambda file, attributes: nn.ReLU(),
    "AvgPool2d": _average_pool,
    "Upsample": _upsample,
    "Dropout": lambda file, attributes: nn.Dropout(),
}
