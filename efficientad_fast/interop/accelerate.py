"""Models of anomalib that keep their interface and predict by this package's plans."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad_fast import ops
from efficientad_fast.dropin import (
    Networks,
    NotPackedWarning,
    Packed,
    UnrecognisedError,
    adopt,
    empty_autoencoder,
    empty_pdn,
    is_intercepted,
    pack,
    version,
)
from efficientad_fast.errors import BackendError, InputError
from efficientad_fast.plan import LARGEST_ERRORS, PlanInput, default_dtype, parse_dtype
from efficientad_fast.reference.networks import FEATURE_BORDER, SMALLEST_SIDE, ModelSize
from efficientad_fast.reference.preprocess import IMAGENET_MEAN, IMAGENET_STD

_Model = TypeVar("_Model", bound=nn.Module)
_Made = TypeVar("_Made")

_PARTS = ("teacher", "student", "ae", "mean_std", "quantiles", "pad_maps")
"""What anomalib's torch model has."""

_QUANTILES = ("qa_st", "qb_st", "qa_ae", "qb_ae")

_SIZES: dict[int, ModelSize] = {4: "s", 6: "m"}

_LARGEST_ERROR = 1e-3
"""Of maps in float32 and float64, norm over norm, beyond which a model counts as another than was recognised."""


def accelerate(model: _Model, *, dtype: str | torch.dtype | None = None) -> _Model:
    """Let a model of anomalib predict by this package's plans; it is changed in place, and returned.

    It keeps its class's interface, its parameters and its state dict, and runs in anomalib's ``Engine`` as before. In
    eval mode its forward gives the same maps and scores, without gradient, on whatever device it is moved to; weights,
    statistics and quantiles that change are noticed, as by :func:`efficientad_fast.predict`. Its own forward runs where
    a gradient of the images is asked for, while it is compiled, traced or exported, under autocast and with hooks on
    layers. The first forward in train mode undoes the acceleration, with a warning. Copies and pickles of it are not
    accelerated.

    Before it is changed, both ways are compared on one image.

    Args:
        model: anomalib's ``EfficientAd`` (2.x), or its torch model ``EfficientAdModel``.
        dtype: of the networks: ``None`` is that of the weights, on a GPU float16 in place of float32 where the GPU plan
            runs (maps within 2e-3).

    Raises:
        InputError: it is no such model. BackendError: it computes something else than such a model does.
    """
    inner = _torch_model(model)
    if isinstance(inner, _Accelerated):
        _undo(inner)
    original = type(inner)
    state = _State(inner, None if dtype is None else parse_dtype(dtype), _result_type(original))
    _compare(inner, state)
    inner.__dict__[_STATE] = state
    inner.__class__ = _accelerated(original)  # type: ignore[arg-type]
    return model


_STATE = "_efficientad_fast"


class _Accelerated:
    """What classes of accelerated models inherit first."""

    _original: type[nn.Module]

    def forward(self, batch: Tensor, batch_imagenet: Tensor | None = None, normalize: bool = True) -> Any:
        model = cast(nn.Module, self)
        own = functools.partial(self._original.forward, model, batch, batch_imagenet, normalize)
        if model.training:
            _undo(model)
            warnings.warn(
                "This model was accelerated by efficientad_fast and is in train mode: from here on it runs through "
                "its own forward. After training, or .eval() where it was not meant, call efficientad_fast.accelerate "
                "again.",
                UserWarning,
                stacklevel=2,
            )
            return own()
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return own()
        if torch.is_grad_enabled() and batch.requires_grad:
            return own()
        state: _State = self.__dict__[_STATE]
        result = state.predict(model, batch, normalize)
        if isinstance(result, str):
            state.warn_once(result)
            return own()
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self._original.__new__(self._original)
        plain.__dict__.update({name: one for name, one in self.__dict__.items() if name != _STATE})
        # In the form of the first protocols: pickle refuses another class in that of the later ones.
        return plain.__reduce_ex__(0)


@functools.cache
def _accelerated(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Accelerated{original.__name__}", (_Accelerated, original), {"_original": original})


def _undo(model: nn.Module) -> None:
    original = cast(_Accelerated, model)._original
    del model.__dict__[_STATE]
    model.__class__ = original


class _State:
    """The networks of a model as this package's, with the same parameters, and what is known of its other tensors."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, result: Callable[..., Any]) -> None:
        # Nothing that holds the networks: what is packed must go with them.
        self._choose = functools.partial(_dtype, dtype)
        self.computes_in = torch.float32
        self._result = result
        self._parameters, self._networks = _adopted(model)
        self._quantiles: _Remembered[list[float] | None] = _Remembered()
        self._statistics: _Remembered[tuple[Tensor, Tensor]] = _Remembered()
        self._normalisation: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._warned: set[str] = set()

    def warn_once(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"A model that efficientad_fast accelerated ran through its own forward: {reason}",
                NotPackedWarning,
                stacklevel=4,
            )

    def predict(self, model: Any, batch: Tensor, normalize: bool) -> Any:
        """What the model's forward returns in eval mode, or why it has to run itself."""
        layers = [layer for part in (model.teacher, model.student, model.ae) for layer in part.modules()]
        if any(is_intercepted(layer.__dict__) for layer in layers):
            return "layers have forward hooks or a replaced forward. Remove them."
        parameters = _parameters(model)
        if len(parameters) != len(self._parameters) or any(map(_is_other, parameters, self._parameters)):
            self._parameters, self._networks = _adopted(model)
        with torch.no_grad():
            quantiles = self._quantiles.get([model.quantiles[name] for name in _QUANTILES], _numbers)
            if normalize and quantiles is not None and (quantiles[0] == quantiles[1] or quantiles[2] == quantiles[3]):
                return "its quantiles are equal, so that maps are divided by zero. Validate it on varied images."
            mean, std = (one.to(batch.device) for one in self._normalised_by(batch.device))
            images = (batch - mean) / std  # of one image without its batch, too
            packed = pack(self._networks, images, self._choose)
            if not isinstance(packed, Packed):
                return packed
            self.computes_in = packed.plan.dtype
            given = self._statistics.get([model.mean_std["mean"], model.mean_std["std"]], _statistics)
            map_st, map_ae = packed.raw_maps(images, *given)
            ops.load()
            anomaly_map, scores = torch.ops.efficientad_fast.anomaly_map(
                map_st,
                map_ae,
                list(batch.shape[-2:]),
                quantiles if normalize else None,
                border=FEATURE_BORDER if model.pad_maps else 0,
                convention="resized",
            )
        return self._result(pred_score=scores.unsqueeze(1), anomaly_map=anomaly_map)

    def _normalised_by(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # As anomalib makes them, in the default dtype, which Lightning sets where it computes in float64.
        key = (device, torch.get_default_dtype())
        if key not in self._normalisation:
            mean, std = (torch.tensor(one, device=device).view(1, 3, 1, 1) for one in (IMAGENET_MEAN, IMAGENET_STD))
            self._normalisation[key] = (mean, std)
        return self._normalisation[key]


def _dtype(asked: torch.dtype | None, source: PlanInput, weight: Tensor) -> torch.dtype:
    if asked is not None:
        return asked
    return default_dtype(weight.device, source) if weight.dtype == torch.float32 else weight.dtype


class _Remembered(Generic[_Made]):
    """What was made of tensors, made again only where they changed: on a GPU, a look at values waits for it."""

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], list[Any], _Made] | None = None

    def get(self, tensors: list[Tensor], make: Callable[[Sequence[Tensor]], _Made]) -> _Made:
        facts = [(one.data_ptr(), one.device, one.dtype, version(one)) for one in tensors]
        if self._kept is not None:
            known, known_facts, made = self._kept
            if known_facts == facts and not any(map(_is_other, known, tensors)):
                return made
        made = make(tensors)
        self._kept = (list(tensors), facts, made)
        return made


def _is_other(one: object, other: object) -> bool:
    return one is not other


def _is_set(tensors: Sequence[Tensor]) -> bool:
    return any(bool(one.sum() != 0) for one in tensors)


def _numbers(quantiles: Sequence[Tensor]) -> list[float] | None:
    return [float(one) for one in quantiles] if _is_set(quantiles) else None


def _statistics(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    mean, std = (one.detach() for one in given)
    return (mean, std) if _is_set(given) else (torch.zeros_like(mean), torch.ones_like(std))


# Recognising


def _torch_model(model: object) -> nn.Module:
    inner = getattr(model, "model", None)
    for candidate in (model, inner):
        if isinstance(candidate, nn.Module) and all(hasattr(candidate, name) for name in _PARTS):
            return candidate
    raise InputError(
        f"accelerate takes anomalib's EfficientAd or its torch model, got {type(model).__name__}. For modules of "
        "another implementation, use efficientad_fast.predict."
    )


def _result_type(original: type[nn.Module]) -> Callable[..., Any]:
    """The class of what the model's forward returns; anomalib is not imported for it, the model already has it."""
    for kind in original.__mro__:
        forward = kind.__dict__.get("forward")
        found = getattr(forward, "__globals__", {}).get("InferenceBatch")
        if found is not None:
            return cast(Callable[..., Any], found)
    raise InputError(
        f"{original.__name__} does not return the InferenceBatch of anomalib 2.x, which accelerate needs. Update "
        "anomalib, or load the checkpoint with efficientad_fast.Detector.load."
    )


def _parameters(model: Any) -> list[nn.Parameter]:
    return [one for part in (model.teacher, model.student, model.ae) for one in part.parameters()]


def _adopted(model: Any) -> tuple[list[nn.Parameter], Networks]:
    """Its parameters, and the same parameters in networks of this package."""
    try:
        padding = bool(model.ae.decoder.padding)
        networks = Networks(
            _adopted_pdn("teacher", model.teacher, padding=padding),
            _adopted_pdn("student", model.student, padding=padding),
            _adopted_autoencoder(model.ae, padding=padding),
        )
    except (AttributeError, UnrecognisedError) as error:
        raise InputError(f"The model is not built as anomalib builds EfficientAd: {error}") from error
    return _parameters(model), networks


def _adopted_pdn(name: str, network: Any, *, padding: bool) -> nn.Module:
    convolutions = [layer for layer in network.children() if isinstance(layer, nn.Conv2d)]
    model_size = _SIZES.get(len(convolutions))
    if model_size is None:
        raise UnrecognisedError(f"the {name} has {len(convolutions)} convolutions, expected 4 or 6")
    canonical = empty_pdn(model_size, convolutions[-1].out_channels, padding=padding)
    numbered = range(1, len(convolutions) + 1)
    layers = [network.avgpool1, network.avgpool2, *(getattr(network, f"conv{number}") for number in numbered)]
    expected = [canonical.pool, canonical.pool, *(getattr(canonical, f"conv{number}") for number in numbered)]
    return adopt(name, canonical, layers, expected)


def _adopted_autoencoder(network: Any, *, padding: bool) -> nn.Module:
    canonical = empty_autoencoder(network.decoder.deconv8.out_channels, padding=padding)
    named = [(name, layer) for name, layer in canonical.named_modules() if isinstance(layer, nn.Conv2d)]
    layers = [network.get_submodule(name) for name, _ in named]
    return adopt("autoencoder", canonical, layers, [layer for _, layer in named])


@torch.no_grad()
def _compare(model: nn.Module, state: _State) -> None:
    """Raises a :class:`BackendError` where both ways differ on an image of smooth noise."""
    weight = next(model.parameters())
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(noise, (SMALLEST_SIDE, SMALLEST_SIDE), mode="bilinear").to(weight)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found, expected = state.predict(model, image, False), model(image, normalize=False)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if isinstance(found, str):
        raise InputError(f"The model cannot be accelerated: {found}")
    difference = (found.anomaly_map - expected.anomaly_map).double().norm()
    error = float(difference / expected.anomaly_map.double().norm())
    limit = LARGEST_ERRORS.get(state.computes_in, _LARGEST_ERROR)
    if not error <= limit:
        raise BackendError(
            f"The model computes something else than anomalib's EfficientAd does: the maps of an image differ by "
            f"{error:.1e} of their norm, and {limit} is the limit. It is left as it is."
        )
