"""``predict``: a drop-in for the function of that name in the PyTorch implementation that most others start from.

Plain modules go in and maps come out; in between, the weights are packed once per set of modules.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as global_hooks
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from efficientad_fast import ops
from efficientad_fast.errors import InputError
from efficientad_fast.plan import DTYPES, Plan, PlanInput, build_plan
from efficientad_fast.reference import maps
from efficientad_fast.reference.networks import (
    Autoencoder,
    Decoder,
    Encoder,
    ModelSize,
    PatchDescriptionNetwork,
    feature_size,
)

# float8 takes calibration, which detectors have and plain modules have not.
_DTYPES = {name: dtype for name, dtype in DTYPES.items() if name != "float8"}

Network = TypeVar("Network", bound=nn.Module)

CAPACITY = 8
"""Sets of modules whose packed weights are kept; the set that was used longest ago is dropped first."""


class NotPackedWarning(UserWarning):
    """:func:`predict` ran modules through their own forward; the message says why and what to do."""


def predict(
    image: Tensor,
    teacher: nn.Module,
    student: nn.Module,
    autoencoder: nn.Module,
    teacher_mean: Tensor,
    teacher_std: Tensor,
    q_st_start: float | Tensor | None = None,
    q_st_end: float | Tensor | None = None,
    q_ae_start: float | Tensor | None = None,
    q_ae_end: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Anomaly maps of a batch of images, from the three networks as plain modules. Source: SPEC "Maps and score".

    The networks are recognised, and their weights packed, where all three are in eval mode and are either
    ``nn.Sequential`` of the layers of PDN-S, PDN-M (padded or not) and the autoencoder, or this package's
    ``PatchDescriptionNetwork`` and ``Autoencoder``. Hidden widths are the paper's; C is free. Other modules, train
    mode, forward hooks, autocast, and ``nn.Upsample`` sizes that are not made for the image's size lead to the modules'
    own forward, with one :class:`NotPackedWarning` per set of modules and reason.

    Weights are packed again after a change: in-place updates, optimizer steps, ``load_state_dict``, ``.to()``,
    ``.half()``, replaced parameters or layers, edited settings of a layer. Not noticed is what PyTorch does not
    record: edits in place through ``.data``, numpy or DLPack, from another process, of parameters created in
    inference mode, by a replayed CUDA graph or a direct call of ``torch._fused_*``. Call :func:`forget` after those.

    Packed weights take up to five times the memory of the networks (PDN-S 169 MB, PDN-M 353 MB). They are kept for the
    :data:`CAPACITY` sets used last, and freed with the modules. Safe to call from several threads.

    Args:
        image: ``(N, 3, H, W)``, preprocessed, in the dtype and on the device of the networks.
        teacher: makes ``(N, C, h, w)`` of it.
        student: makes ``(N, 2C, h, w)``; the first C channels predict the teacher, the others the autoencoder.
        autoencoder: makes ``(N, C, h, w)``.
        teacher_mean, teacher_std: ``(1, C, 1, 1)``, the teacher's channel statistics. They and the quantiles may
            differ from call to call. Quantiles are used as they come; statistics go into packed weights where kernels
            run the networks, of which those of the last layer are made again for other values.
        q_st_start, q_st_end, q_ae_start, q_ae_end: quantiles. A map is normalised where its start is given. Equal
            start and end divide by zero, as in the original: the map holds infinities and NaN.

    Returns:
        ``(map_combined, map_st, map_ae)``, each ``(N, 1, h, w)``, without gradient: both maps, normalised where
        quantiles are given, and ``0.5 map_st + 0.5 map_ae``. Dtypes are those that plain PyTorch promotes to;
        packed half-precision networks have their features subtracted and squared in float32.

    Raises:
        InputError: an argument has the wrong type, shape, dtype or device, the networks' outputs do not fit each
            other, or a quantile is missing.
    """
    networks = Networks(teacher, student, autoencoder)
    _check_arguments(image, networks, teacher_mean, teacher_std)
    for map_name, start, end in (("st", q_st_start, q_st_end), ("ae", q_ae_start, q_ae_end)):
        if start is not None and end is None:
            raise InputError(f"q_{map_name}_end must be given where q_{map_name}_start is, got None.")
    entry = _entry(networks, _dtype_of_weights)
    found = entry.look_up(networks, image)
    with torch.no_grad():
        if isinstance(found, Packed):
            map_st, map_ae = found.raw_maps(image, teacher_mean, teacher_std)
        else:
            map_st, map_ae = _own_forward(image, networks, teacher_mean, teacher_std)
            if entry.is_first(found):
                warnings.warn(
                    f"efficientad_fast.predict ran modules through their own forward: {found}",
                    NotPackedWarning,
                    stacklevel=2,
                )
        return _finish(map_st, map_ae, (q_st_start, q_st_end), (q_ae_start, q_ae_end))


def pack(networks: Networks, image: Tensor, choose: ChooseDtype) -> Packed | str:
    """What to run ``image`` with: packed weights, kept and made again as :func:`predict` does; or why there are none.

    Args:
        choose: the dtype of the plan, where networks are packed.
    """
    return _entry(networks, choose).look_up(networks, image)


def forget() -> None:
    """Drop all packed weights and the record of warnings given: the next :func:`predict` packs anew."""
    with _lock:
        _entries.clear()


# Arguments and the plain path


@dataclass(frozen=True)
class Networks:
    teacher: nn.Module
    student: nn.Module
    autoencoder: nn.Module

    def named(self) -> tuple[tuple[str, nn.Module], ...]:
        return ("teacher", self.teacher), ("student", self.student), ("autoencoder", self.autoencoder)

    def all(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.teacher, self.student, self.autoencoder


def _check_arguments(image: Tensor, networks: Networks, mean: Tensor, std: Tensor) -> None:
    for name, network in networks.named():
        if not isinstance(network, nn.Module):
            raise InputError(f"{name} must be a torch.nn.Module, got {type(network).__name__}.")
    for name, tensor in (("image", image), ("teacher_mean", mean), ("teacher_std", std)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if image.ndim != 4:
        raise InputError(
            f"image must be a batch of shape (N, 3, H, W), got {tuple(image.shape)}. Add a dimension to a single image."
        )


def _check_statistics(mean: Tensor, std: Tensor, channels: int, device: torch.device) -> None:
    for name, statistic in (("teacher_mean", mean), ("teacher_std", std)):
        if statistic.shape != (1, channels, 1, 1):
            raise InputError(
                f"{name} must have shape (1, {channels}, 1, 1) for a teacher of {channels} channels, "
                f"got {tuple(statistic.shape)}."
            )
        if statistic.device != device:
            raise InputError(f"{name} must be on the device of the networks, {device}, got {statistic.device}.")


def _check_channels(teacher: int, student: int, autoencoder: int) -> None:
    for name, expected, got in (("student", 2 * teacher, student), ("autoencoder", teacher, autoencoder)):
        if got != expected:
            raise InputError(f"{name} must have {expected} output channels beside a teacher of {teacher}, got {got}.")


def _own_forward(image: Tensor, networks: Networks, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    teacher, student, autoencoder = (network(image) for network in networks.all())
    for name, features in (("teacher", teacher), ("student", student), ("autoencoder", autoencoder)):
        if not isinstance(features, Tensor) or features.ndim != 4:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{name} must return features of shape (N, channels, h, w), got {got}.")
        if features.shape[-2:] != teacher.shape[-2:]:
            raise InputError(
                f"{name} must return features of the teacher's size, {tuple(teacher.shape[-2:])}, for an image of "
                f"{tuple(image.shape[-2:])}, got {tuple(features.shape[-2:])}. Use networks of one padding, and "
                "nn.Upsample sizes made for this image size."
            )
    _check_channels(teacher.shape[1], student.shape[1], autoencoder.shape[1])
    _check_statistics(mean, std, teacher.shape[1], teacher.device)
    return maps.raw_maps(teacher, student, autoencoder, mean, std)


ChooseDtype = Callable[[PlanInput, Tensor], torch.dtype]
"""Of what a plan is made from, and one of the networks' weights: the dtype that the plan computes in."""


def _dtype_of_weights(source: PlanInput, weight: Tensor) -> torch.dtype:
    return weight.dtype


_Pair = tuple[float | Tensor | None, float | Tensor | None]


def _finish(map_st: Tensor, map_ae: Tensor, st_quantiles: _Pair, ae_quantiles: _Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised where quantiles are given, and combined: by the operator, or by what it does in one pass."""
    pairs = (st_quantiles, ae_quantiles)
    # Half precision and quantiles with dimensions round and promote step by step in the plain expressions.
    exact = map_st.dtype == map_ae.dtype and map_st.dtype in (torch.float32, torch.float64)
    if exact and all(isinstance(one, int | float) or one is None or one.ndim == 0 for pair in pairs for one in pair):
        ops.load()
        placed = [_placed_pair(start, end, map_st.device) for start, end in pairs]
        results: tuple[Tensor, Tensor, Tensor] = torch.ops.efficientad_fast.anomaly_map.drop_in(map_st, map_ae, *placed)
        return results
    (st_start, st_end), (ae_start, ae_end) = pairs
    if st_start is not None and st_end is not None:
        map_st = maps.normalise_map(map_st, st_start, st_end)
    if ae_start is not None and ae_end is not None:
        map_ae = maps.normalise_map(map_ae, ae_start, ae_end)
    return 0.5 * map_st + 0.5 * map_ae, map_st, map_ae


def _placed_pair(start: float | Tensor | None, end: float | Tensor | None, device: torch.device) -> Tensor | None:
    """``(2,)`` float64 on the device. A GPU is not waited for: numbers are filled in, not copied."""
    if start is None or end is None:
        return None
    pair = torch.empty(2, dtype=torch.float64, device=device)
    for place, value in zip(pair.unbind(), (start, end), strict=True):
        if isinstance(value, Tensor):
            place.copy_(value)
        else:
            place.fill_(value)
    return pair


# Recognising


class UnrecognisedError(Exception):
    """Why modules cannot be packed, and what to do: the end of the warning's sentence."""


@dataclass(frozen=True)
class Recognised:
    """What a set of modules turned out to be. The parameters are the modules' own, not copies.

    Attributes:
        teacher, student, autoencoder: as in ``reference.networks``.
        upsample_sizes: the seven sizes that an ``nn.Sequential`` autoencoder is fixed to; ``None`` follows the image.
        image_size: the smallest image that those sizes are made for.
    """

    teacher: PatchDescriptionNetwork
    student: PatchDescriptionNetwork
    autoencoder: Autoencoder
    upsample_sizes: list[tuple[int, int]] | None
    image_size: tuple[int, int] | None


# Every type of module that can be recognised, with the settings that its forward reads.
_SETTINGS: dict[type[nn.Module], Callable[[Any], Any]] = {
    nn.Sequential: type,
    nn.Conv2d: operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.ReLU: type,
    nn.AvgPool2d: operator.attrgetter(
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    nn.Upsample: operator.attrgetter("size", "scale_factor", "mode", "align_corners"),
    nn.Dropout: type,
    PatchDescriptionNetwork: operator.attrgetter("model_size", "padding"),
    Autoencoder: type,
    Encoder: type,
    Decoder: operator.attrgetter("padding"),
}

_LAYER_CODES: dict[type[nn.Module], str] = {nn.Conv2d: "C", nn.ReLU: "R", nn.AvgPool2d: "P", nn.Upsample: "U"}
_PDN_LAYERS: dict[str, ModelSize] = {"CRPCRPCRC": "s", "CRPCRPCRCRCRC": "m"}
_AUTOENCODER_LAYERS = "CR" * 5 + "C" + "UCR" * 7 + "C"


def recognise(teacher: nn.Module, student: nn.Module, autoencoder: nn.Module) -> Recognised | str:
    """The networks that three modules are, or a text that says why they cannot be packed and what to do.

    Raises:
        InputError: they are recognised, but their channels do not fit each other.
    """
    networks = Networks(teacher, student, autoencoder)
    try:
        for name, network in networks.named():
            _require_plain_eval(name, network)
        _require_one_placement(networks)
        pdn, student_pdn = _recognise_pdn("teacher", teacher), _recognise_pdn("student", student)
        if (pdn.model_size, pdn.padding) != (student_pdn.model_size, student_pdn.padding):
            raise UnrecognisedError("teacher and student differ in size or padding. Use two of one kind.")
        plain, upsample_sizes = _recognise_autoencoder(autoencoder, padding=pdn.padding)
        image_size = None if upsample_sizes is None else _image_size(upsample_sizes, padding=pdn.padding)
    except UnrecognisedError as reason:
        return str(reason)
    _check_channels(pdn.out_channels, student_pdn.out_channels, plain.decoder.deconv8.out_channels)
    return Recognised(pdn, student_pdn, plain, upsample_sizes, image_size)


def recognise_teacher(teacher: nn.Module) -> PatchDescriptionNetwork | str:
    """As :func:`recognise`, of a teacher alone."""
    try:
        _require_plain_eval("teacher", teacher)
        return _recognise_pdn("teacher", teacher)
    except UnrecognisedError as reason:
        return str(reason)


def _require_plain_eval(name: str, network: nn.Module) -> None:
    if _has_global_hooks():
        raise UnrecognisedError("forward hooks are registered for all modules. Remove them.")
    for layer in network.modules():
        if type(layer) not in _SETTINGS:
            raise UnrecognisedError(
                f"the {name} holds a {type(layer).__name__}, which no known network does. Use the layers of the "
                "original, or PatchDescriptionNetwork and Autoencoder of efficientad_fast.reference."
            )
        if layer.training:
            raise UnrecognisedError(f"the {name} is in train mode. Call .eval() on it.")
        if is_intercepted(layer.__dict__):
            raise UnrecognisedError(f"the {name} has forward hooks or a replaced forward. Remove them.")
        for parameter in layer.parameters(recurse=False):
            if type(parameter) is not nn.Parameter:
                raise UnrecognisedError(
                    f"a parameter of the {name} is a {type(parameter).__name__}. Use plain parameters."
                )


def _has_global_hooks() -> bool:
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


def is_intercepted(state: dict[str, Any]) -> bool:
    """Whether calling the module whose ``__dict__`` this is runs more, or other, than its type's forward."""
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def _require_one_placement(networks: Networks) -> None:
    placements = {
        (parameter.device, parameter.dtype) for network in networks.all() for parameter in network.parameters()
    }
    if len(placements) != 1:
        raise UnrecognisedError("their parameters have several dtypes or devices. Bring them to one with .to().")
    device, dtype = placements.pop()
    if device.type not in ("cpu", "cuda") or dtype not in _DTYPES.values():
        raise UnrecognisedError(
            f"they are {dtype} on {device}. Bring them to the CPU or a CUDA GPU, in one of {', '.join(_DTYPES)}."
        )


def _unknown_layers(name: str) -> UnrecognisedError:
    return UnrecognisedError(
        f"the layers of the {name} are not those of a known network. Build it as in the original, or with "
        "PatchDescriptionNetwork and Autoencoder of efficientad_fast.reference."
    )


def _recognise_pdn(name: str, network: nn.Module) -> PatchDescriptionNetwork:
    if isinstance(network, PatchDescriptionNetwork):
        out_channels = _out_channels(name, network.modules())
        canonical = empty_pdn(network.model_size, out_channels, padding=network.padding)
        return adopt(name, canonical, _layers_named_as_in(canonical, network), list(canonical.modules()))
    layers = _sequential_layers(name, network)
    model_size = _PDN_LAYERS.get(_layer_code(layers))
    if model_size is None:
        raise _unknown_layers(name)
    layers = [layer for layer in layers if not isinstance(layer, nn.ReLU)]
    padded = _pair(layers[1].padding) == (1, 1)
    canonical = empty_pdn(model_size, _out_channels(name, layers), padding=padded)
    conv1, conv2, *others = _convolutions(canonical.modules())
    return adopt(name, canonical, layers, [conv1, canonical.pool, conv2, canonical.pool, *others])


def _recognise_autoencoder(network: nn.Module, *, padding: bool) -> tuple[Autoencoder, list[tuple[int, int]] | None]:
    name = "autoencoder"
    if isinstance(network, Autoencoder):
        canonical = empty_autoencoder(_out_channels(name, network.modules()), padding=padding)
        return adopt(name, canonical, _layers_named_as_in(canonical, network), list(canonical.modules())), None
    layers = _sequential_layers(name, network)
    if _layer_code(layers) != _AUTOENCODER_LAYERS:
        raise _unknown_layers(name)
    sizes = []
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            if layer.size is None or layer.mode != "bilinear" or layer.align_corners:
                raise UnrecognisedError(
                    f"the autoencoder holds {layer}. Use a fixed size, mode 'bilinear' and no align_corners."
                )
            sizes.append(_pair(layer.size))
    canonical = empty_autoencoder(_out_channels(name, layers), padding=padding)
    return adopt(name, canonical, _convolutions(layers), _convolutions(canonical.modules())), sizes


def empty_pdn(model_size: ModelSize, out_channels: int, *, padding: bool) -> PatchDescriptionNetwork:
    with torch.device("meta"):
        return PatchDescriptionNetwork(model_size, out_channels, padding=padding).eval()


def empty_autoencoder(out_channels: int, *, padding: bool) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(out_channels, padding=padding).eval()


def _layers_named_as_in(canonical: nn.Module, network: nn.Module) -> list[nn.Module | None]:
    layers = dict(network.named_modules(remove_duplicate=False))
    return [layers.get(name) for name, _ in canonical.named_modules()]


def _sequential_layers(name: str, network: nn.Module) -> list[Any]:
    """Without dropout, which does nothing in eval mode."""
    if not isinstance(network, nn.Sequential):
        raise _unknown_layers(name)
    return [layer for layer in network if not isinstance(layer, nn.Dropout)]


def _layer_code(layers: Iterable[nn.Module]) -> str:
    return "".join(_LAYER_CODES.get(type(layer), "?") for layer in layers)


def _convolutions(layers: Iterable[nn.Module]) -> list[nn.Conv2d]:
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def _out_channels(name: str, layers: Iterable[nn.Module]) -> int:
    convolutions = _convolutions(layers)
    if not convolutions:
        raise _unknown_layers(name)
    return len(convolutions[-1].weight)


def adopt(name: str, canonical: Network, layers: Sequence[nn.Module | None], expected: Sequence[nn.Module]) -> Network:
    """``canonical``, whose layers are ``expected``, with the parameters of ``layers`` where these are the same."""
    for layer, target in zip(layers, expected, strict=True):
        if layer is None or _description(layer) != _description(target):
            raise _unknown_layers(name)
        for key, parameter in layer.named_parameters(recurse=False):
            setattr(target, key, parameter)
    return canonical


def _description(layer: nn.Module) -> tuple[object, ...]:
    parameters = {key: tuple(parameter.shape) for key, parameter in layer.named_parameters(recurse=False)}
    settings = _SETTINGS[type(layer)](layer)
    return type(layer), [*map(_pair, settings)] if isinstance(settings, tuple) else settings, parameters


def _pair(setting: Any) -> Any:
    """2 and [2, 2] as (2, 2): the spellings of a layer's setting for height and width."""
    if isinstance(setting, list):
        return tuple(setting)
    return (setting, setting) if type(setting) is int else setting


def upsample_sizes_for(size: tuple[int, int], *, padding: bool) -> list[tuple[int, int]]:
    """Of an ``nn.Sequential`` autoencoder for images of ``size`` (height, width)."""
    return [*Decoder.step_sizes(size), feature_size(size, padding=padding)]


def _image_size(upsample_sizes: Sequence[tuple[int, int]], *, padding: bool) -> tuple[int, int]:
    """The smallest image with these sizes: its sides are twice those of the sixth step, plus 2 or 3."""
    height, width = upsample_sizes[5]
    for size in itertools.product((2 * height + 2, 2 * height + 3), (2 * width + 2, 2 * width + 3)):
        if upsample_sizes_for(size, padding=padding) == upsample_sizes:
            return size
    raise UnrecognisedError(
        f"the autoencoder's nn.Upsample sizes {upsample_sizes} belong to no image size. Use H//64-1, H//32, H//16-1, "
        "H//8, H//4-1, H//2-1 and the PDN's output size."
    )


# Packed weights, and noticing that modules have changed


@dataclass(frozen=True)
class Packed:
    """Networks that are packed in a plan, for images of ``dtype``."""

    plan: Plan
    dtype: torch.dtype
    channels: int
    padding: bool
    upsample_sizes: list[tuple[int, int]] | None

    def refusal(self, image: Tensor) -> str | None:
        """Why these modules, though packed, have to run by themselves on ``image``."""
        if torch.is_autocast_enabled(self.plan.device.type):
            return "autocast is on, and packed networks run in their own dtype. Leave it, or use .half()."
        size = (image.shape[-2], image.shape[-1])
        if self.upsample_sizes is not None and self.upsample_sizes != upsample_sizes_for(size, padding=self.padding):
            return f"the autoencoder's nn.Upsample sizes are not made for images of size {size}. Resize the images."
        return None

    def raw_maps(self, image: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtypes that the plain expressions have."""
        if image.shape[1] != 3:
            raise InputError(f"image must have 3 channels, (N, 3, H, W), got {tuple(image.shape)}.")
        if image.dtype != self.dtype or image.device != self.plan.device:
            raise InputError(
                f"image must be {self.dtype} on {self.plan.device} as the networks are, "
                f"got {image.dtype} on {image.device}."
            )
        _check_statistics(mean, std, self.channels, self.plan.device)
        map_st, map_ae = self.plan.raw_maps(image, statistics=(mean, std))
        teacher_dtype = torch.promote_types(torch.promote_types(image.dtype, mean.dtype), std.dtype)
        return map_st.to(teacher_dtype), map_ae.to(image.dtype)


class _Entry:
    """One set of modules: what it was recognised as, as of which state of the modules, and which warnings it got.

    Holds the modules weakly, so that it goes when one of them does.
    """

    def __init__(self, networks: Networks, key: _Key, choose: ChooseDtype) -> None:
        self._choose = choose
        self.optimizer_steps = 0
        self.parameter_ids: frozenset[int] = frozenset()
        self._roots = [weakref.ref(network, partial(_discard, key)) for network in networks.all()]
        self._lock = threading.Lock()
        self._snapshot: _Snapshot | None = None
        self._found: Packed | str = ""
        self._warned: set[str] = set()

    def look_up(self, networks: Networks, image: Tensor) -> Packed | str:
        """What to run ``image`` with, or why there is nothing but the modules themselves."""
        # Observed before packing: what changes meanwhile is noticed at the next call.
        observed = _observe(networks.all(), self.optimizer_steps)
        with self._lock:
            if self._snapshot is None or not self._snapshot.matches(*observed):
                self._snapshot = None
                self._found = self._pack(networks, image)
                self._snapshot = _Snapshot(*observed)
            found = self._found
        return found if isinstance(found, str) else found.refusal(image) or found

    def _pack(self, networks: Networks, image: Tensor) -> Packed | str:
        _watch_optimizers()
        self.parameter_ids = frozenset(
            id(parameter) for network in networks.all() for parameter in network.parameters()
        )
        recognised = recognise(*networks.all())
        if isinstance(recognised, str):
            return recognised
        source = PlanInput(
            recognised.teacher,
            recognised.student,
            recognised.autoencoder,
            teacher_mean=None,
            teacher_std=None,
            quantiles=None,
            map_convention="native",
            pad_maps=False,
            size=recognised.image_size or (image.shape[-2], image.shape[-1]),
        )
        weight = recognised.teacher.conv1.weight
        return Packed(
            build_plan(source, weight.device, self._choose(source, weight)),
            weight.dtype,
            recognised.teacher.out_channels,
            recognised.teacher.padding,
            recognised.upsample_sizes,
        )

    def is_first(self, reason: str) -> bool:
        """Whether ``reason`` is given for the first time."""
        with self._lock:
            is_new = reason not in self._warned
            self._warned.add(reason)
        return is_new


def _observe(
    roots: Sequence[nn.Module], optimizer_steps: int
) -> tuple[list[nn.Module], list[Any], list[UntypedStorage]]:
    """All modules, facts about them and their parameters, and the parameters' storages.

    Two observations with the same modules, storages and facts: nothing was recorded that changes what is computed.
    """
    modules: list[nn.Module] = []
    facts: list[Any] = [optimizer_steps, _has_global_hooks()]
    storages: list[UntypedStorage] = []
    seen: set[nn.Module] = set()
    pending = list(roots)
    # Runs at every call: attributes are read from the dictionaries, which halves the time.
    for module in pending:
        if module in seen:
            continue
        seen.add(module)
        modules.append(module)
        kind = type(module)
        facts.append(kind)
        settings = _SETTINGS.get(kind)
        if settings is None:
            continue  # its set is not recognised, whatever is inside
        state = module.__dict__
        facts += (state["training"], is_intercepted(state), settings(module))
        if state["_modules"]:
            children = [child for child in state["_modules"].values() if child is not None]
            pending += children
            facts.append([*map(id, children)])
        for parameter in state["_parameters"].values():
            facts.append(id(parameter))
            if type(parameter) is nn.Parameter:
                storage = parameter.untyped_storage()
                storages.append(storage)
                facts += (storage._cdata, parameter.data_ptr(), version(parameter))
    return modules, facts, storages


def version(parameter: Tensor) -> int | None:
    """How often it was changed in place, where that is counted."""
    try:
        return parameter._version
    except RuntimeError:  # created in inference mode: changes in place are not recorded
        return None


class _Snapshot:
    """An observation, kept without keeping what was observed alive."""

    def __init__(self, modules: list[nn.Module], facts: list[Any], storages: list[UntypedStorage]) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._facts = facts
        # As long as these live, no other storage gets the same address: .half().float() comes back to it otherwise.
        # The parameters themselves must not be referenced: PyTorch refuses to swap tensors with weak references.
        self._storages = [StorageWeakRef(storage) for storage in storages]

    def matches(self, modules: list[nn.Module], facts: list[Any], _: list[UntypedStorage]) -> bool:
        return self._facts == facts and all(map(operator.is_, (known() for known in self._modules), modules))


_Key = tuple[int, ...]
_lock = threading.Lock()
_entries: dict[_Key, _Entry] = {}


def _entry(networks: Networks, choose: ChooseDtype) -> _Entry:
    key = tuple(map(id, networks.all()))
    with _lock:
        entry = _entries.pop(key, None) or _Entry(networks, key, choose)
        _entries[key] = entry
        # A copy of the keys, for garbage collection may discard entries at any moment.
        for oldest in list(_entries)[:-CAPACITY]:
            _entries.pop(oldest, None)
    return entry


def _discard(key: _Key, _: object) -> None:
    # Runs inside garbage collection, so takes no lock; a dict's own operations are atomic.
    _entries.pop(key, None)


def _note_step(optimizer: Optimizer, *_: object) -> None:
    """Fused optimizers write to parameters without recording a change."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for entry in list(_entries.values()):
        if not stepped.isdisjoint(entry.parameter_ids):
            entry.optimizer_steps += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)
