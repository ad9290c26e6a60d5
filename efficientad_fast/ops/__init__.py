"""The catalogue of operators: one module per operator, with its documentation, references, fakes and autograd.

`load` makes them callable as ``torch.ops.efficientad_fast.<op>``. The device picks the kernel:

- CPU: the CPU library where it was built and has a kernel, else the operator's reference;
- CUDA: the first implementation of ``choices.json`` that has a kernel for that GPU; the reference always does.

Every implementation but the reference can also be called by itself, for tests and benchmarks:
``torch.ops.efficientad_fast_<cpu|cuda|triton>.<op>`` after `load_implementation`.

Schemas stand once, in ``schemas.inc``: the CPU library includes it, and Python reads it where there is none.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from efficientad_fast import native
from efficientad_fast.errors import BackendError
from efficientad_fast.ops.overload import Overload

NAMESPACE = "efficientad_fast"

Implementation = Literal["cpu", "cuda", "triton"]

_Result = TypeVar("_Result")


class _Once(Generic[_Result]):
    """``functools.cache`` for what must not run twice: a thread that comes meanwhile waits, whatever is loaded."""

    _lock = threading.RLock()

    def __init__(self, function: Callable[..., _Result]) -> None:
        functools.update_wrapper(self, function)
        self._cached = functools.cache(function)
        self.cache_clear = self._cached.cache_clear

    def __call__(self, *args: Any) -> _Result:
        with self._lock:
            return self._cached(*args)


# Registrations last as long as the object that made them.
_registrations: list[torch.library.Library] = []


@functools.cache
def schemas() -> tuple[str, ...]:
    """Every overload's schema, such as ``identity(Tensor x) -> Tensor``, in the order of ``schemas.inc``."""
    text = Path(__file__).with_name("schemas.inc").read_text(encoding="utf-8")
    entries = re.findall(r'^EFFICIENTAD_FAST_SCHEMA\(\s*((?:"[^"]*"\s*)+)\)', text, re.MULTILINE)
    return tuple("".join(re.findall(r'"([^"]*)"', entry)) for entry in entries)


def qualified_names() -> tuple[str, ...]:
    """Every overload's name as a schema has it, such as ``anomaly_map`` and ``anomaly_map.out``."""
    return tuple(schema.partition("(")[0] for schema in schemas())


def names() -> tuple[str, ...]:
    """Every operator's name."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in qualified_names()))


def overload(qualified_name: str) -> Overload:
    """What the catalogue holds of ``<op>`` or ``<op>.<overload>``."""
    name, _, kind = qualified_name.partition(".")
    overloads: dict[str, Overload] = importlib.import_module(f"efficientad_fast.ops.{name}").overloads
    return overloads[kind or "default"]


def implementations() -> tuple[Implementation, ...]:
    """Those that this installation has, whether or not there is a GPU to run them."""
    return tuple(name for name in get_args(Implementation) if _is_installed(name))


def has_kernel(implementation: Implementation, name: str, device: str) -> bool:
    """Whether ``torch.ops.efficientad_fast_<implementation>.<name>`` runs on that type of device."""
    load_implementation(implementation)
    return _is_registered(f"{NAMESPACE}_{implementation}::{name}", device)


@_Once
def load() -> None:
    """Registers the operators, once. Loads the CPU library where it was built; asks for no GPU.

    Raises:
        BackendError: the CPU library was built and does not load.
    """
    native.mind_forks()
    if native.is_built("cpu"):
        load_implementation("cpu")
    library = _define(NAMESPACE)
    for name in qualified_names():
        if not _is_registered(f"{NAMESPACE}::{name}", "CPU"):
            library.impl(name, overload(name).reference, "CPU")
        library.impl(name, functools.partial(_route_cuda, name), "CUDA")
        _describe(NAMESPACE, name)


@_Once
def load_implementation(implementation: Implementation) -> None:
    """Makes ``torch.ops.efficientad_fast_<implementation>`` callable, with fakes.

    Raises:
        BackendError: a library was not built or does not load; see `native.load`.
    """
    namespace = f"{NAMESPACE}_{implementation}"
    if implementation == "triton":
        library = _define(namespace)
        for name in names():
            if _has_triton_module(name):
                module = importlib.import_module(f"efficientad_fast.triton_kernels.{name}")
                for kind, launch in module.overloads.items():
                    # On CPU tensors it runs in Triton's interpreter, which the tests turn on.
                    for device in ("CUDA", "CPU"):
                        library.impl(name if kind == "default" else f"{name}.{kind}", launch, device)
    else:
        native.load(implementation)
        _define(namespace)
    for name in qualified_names():
        _describe(namespace, name)


@functools.cache
def _table() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(Path(__file__).with_name("choices.json").read_text(encoding="utf-8")))


def choices() -> dict[str, dict[str, list[str]]]:
    """The table of choices for CUDA: operator to compute capability (or ``default``) to implementations, best first."""
    return cast(dict[str, dict[str, list[str]]], _table()["cuda"])


def least_capability(implementation: Implementation, operator: str) -> str:
    """Such as ``8.0``: GPUs below it, and code for them, lack instructions that the implementation's kernels need."""
    known: dict[str, str] = _table()["least_capability"].get(implementation, {})
    return known.get(operator, known.get("default", "0.0"))


def cpu_algorithm(operator: str, kernel_size: int, *, pool: bool = False, outputs: int | None = None) -> str:
    """The table's algorithm for packing a convolution for the CPU kernels: see `efficientad_fast.ops.packing`.

    Args:
        pool: whether what it makes is averaged, its rounding errors with it.
        outputs: pixels of an image's result, where they are known; for few of them, weights cost more than products.
    """
    known = _table()["cpu"]
    if outputs is not None and outputs < known["fewest_outputs"]:
        return "direct"
    by_kernel: dict[str, str] = known[operator]
    plain = by_kernel.get(str(kernel_size), "direct")
    return by_kernel.get(f"{kernel_size} pooled", plain) if pool else plain


def tiles() -> dict[str, list[dict[str, Any]]]:
    """The table's rules for tiles of the Triton kernels, by kernel: see `efficientad_fast.triton_kernels.tiles`."""
    return cast(dict[str, list[dict[str, Any]]], _table()["tiles"])


def best_first(operator: str, capability: str, case: str | None = None) -> list[str]:
    """The order in which the table has implementations for a GPU of that capability, such as ``9.0``."""
    by_capability = choices()[operator]
    order = by_capability.get(capability, by_capability["default"])
    by_case: dict[str, dict[str, list[str]]] = _table()["cuda_cases"].get(operator, {})
    return order if case is None else by_case.get(case, {}).get(capability, order)


def case_of(qualified_name: str, *args: Any, **kwargs: Any) -> str | None:
    """The case among its operator's that these arguments are, where it has some."""
    case = overload(qualified_name).case
    return None if case is None else case(*args, **kwargs)


@_Once
def choose(qualified_name: str, device_index: int, case: str | None = None) -> Callable[..., Any]:
    """The first of :func:`best_first` that works on this GPU and has a kernel for it; the reference always does."""
    capability = _capability(device_index)
    for implementation in best_first(qualified_name.partition(".")[0], capability, case):
        if implementation == "reference":
            break
        known = cast(Implementation, implementation)
        if _runs(known, qualified_name, capability):
            return resolve(f"{NAMESPACE}_{known}", qualified_name)
    return overload(qualified_name).reference


def works_on(implementation: Implementation, device: torch.device) -> bool:
    """Whether it is installed and runs on that GPU."""
    return _works_on(implementation, _capability(device))


def runs(implementation: Implementation, qualified_name: str, device: torch.device) -> bool:
    """Whether it works on that GPU and has a kernel for the operator there."""
    return _runs(implementation, qualified_name, _capability(device))


def _runs(implementation: Implementation, qualified_name: str, capability: str) -> bool:
    if not (_works_on(implementation, capability) and has_kernel(implementation, qualified_name, "CUDA")):
        return False
    least = least_capability(implementation, qualified_name.partition(".")[0])
    return _has_instructions(implementation, capability, least)


def _capability(device: torch.device | int) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


@_Once
def _works_on(implementation: Implementation, capability: str) -> bool:
    """Whether it is installed and runs on GPUs of that capability; a built library that does not is told of once."""
    if not _is_installed(implementation):
        return False
    if implementation == "cuda" and not native.covers(native.cuda_archs(), capability):
        _warn_of_slower(
            f"the CUDA library has code for {', '.join(native.cuda_archs())} and none for this GPU's {capability}; "
            f"install again with EFFICIENTAD_FAST_CUDA_ARCHS={capability}"
        )
        return False
    try:
        load_implementation(implementation)
    except BackendError as error:
        _warn_of_slower(str(error))
        return False
    return True


@_Once
def _has_instructions(implementation: Implementation, capability: str, least: str) -> bool:
    """Whether a GPU of that capability runs code for ``least`` or newer; of one that does not is told once."""
    given, needed = native.as_numbers(capability), native.as_numbers(least)
    code = native.code_for(native.cuda_archs(), capability) if implementation == "cuda" else given
    if code is not None and code >= needed:
        return True
    offered = [name for name, known in choices().items() if implementation in known["default"]]
    lacking = ", ".join(name for name in offered if least_capability(implementation, name) == least)
    reason = f"{lacking} by {implementation} need compute capability {least}, and this GPU has {capability}"
    if given >= needed:
        built = ", ".join(native.cuda_archs())
        reason += f", but code for {built}; install again with EFFICIENTAD_FAST_CUDA_ARCHS={capability}"
    _warn_of_slower(reason)
    return False


def _warn_of_slower(reason: str) -> None:
    warnings.warn(f"Operators run through slower implementations: {reason}", RuntimeWarning, stacklevel=2)


def resolve(namespace: str, qualified_name: str) -> Callable[..., Any]:
    """``torch.ops.<namespace>.<op>.<overload>``."""
    name, _, kind = qualified_name.partition(".")
    return cast(Callable[..., Any], getattr(getattr(getattr(torch.ops, namespace), name), kind or "default"))


def _route_cuda(qualified_name: str, *args: Any, **kwargs: Any) -> Any:
    device = next(one.device for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
    return choose(qualified_name, device.index, case_of(qualified_name, *args, **kwargs))(*args, **kwargs)


def _is_installed(implementation: Implementation) -> bool:
    if implementation == "triton":
        return importlib.util.find_spec("triton") is not None and any(map(_has_triton_module, names()))
    return native.is_built(implementation)


def _has_triton_module(name: str) -> bool:
    # A source tree that was never installed does not have the package that these are in.
    if importlib.util.find_spec("efficientad_fast.triton_kernels") is None:
        return False
    return importlib.util.find_spec(f"efficientad_fast.triton_kernels.{name}") is not None


def _is_registered(qualified_name: str, device: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, device))


def _define(namespace: str) -> torch.library.Library:
    """Defines what nobody has yet: all where no library is loaded, else what was written after it was built."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _registrations.append(library)
    known = torch._C._dispatch_get_all_op_names()
    for schema in schemas():
        if f"{namespace}::{schema.partition('(')[0]}" not in known:
            library.define(schema)
    return library


def _describe(namespace: str, name: str) -> None:
    known = overload(name)
    qualified = f"{namespace}::{name}"
    torch.library.register_fake(qualified, known.fake)
    if known.backward is not None:
        torch.library.register_autograd(qualified, known.backward, setup_context=known.setup_context)
