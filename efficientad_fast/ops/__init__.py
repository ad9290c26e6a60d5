"""The catalogue of operators: one module per operator, with its documentation, reference, fake kernel and autograd.

`load` makes them callable as ``torch.ops.efficientad_fast.<op>``. The device picks the kernel:

- CPU: the CPU library where it was built, else the operator's reference;
- CUDA: the CUDA library where it was built, else the operator's reference.

Every compiled implementation can also be called by itself, for tests and benchmarks:
``torch.ops.efficientad_fast_cpu.<op>`` and ``torch.ops.efficientad_fast_cuda.<op>`` after `load_implementation`.

Schemas stand once, in ``schemas.inc``: the CPU library includes it, and Python reads it where there is none.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from efficientad_fast import native

NAMESPACE = "efficientad_fast"

# Registrations last as long as the object that made them.
_registrations: list[torch.library.Library] = []


@functools.cache
def schemas() -> tuple[str, ...]:
    """Every operator's schema, such as ``identity(Tensor x) -> Tensor``, in the order of ``schemas.inc``."""
    text = Path(__file__).with_name("schemas.inc").read_text(encoding="utf-8")
    entries = re.findall(r'^EFFICIENTAD_FAST_SCHEMA\(\s*((?:"[^"]*"\s*)+)\)', text, re.MULTILINE)
    return tuple("".join(re.findall(r'"([^"]*)"', entry)) for entry in entries)


def names() -> tuple[str, ...]:
    """Every operator's name."""
    return tuple(schema.partition("(")[0] for schema in schemas())


@functools.cache
def load() -> None:
    """Registers the operators, once. Loads the CPU library where it was built; asks for no GPU.

    Raises:
        BackendError: the CPU library was built and does not load.
    """
    if native.is_built("cpu"):
        load_implementation("cpu")
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
    else:
        library = torch.library.Library(NAMESPACE, "DEF")
        for schema in schemas():
            library.define(schema)
            name = schema.partition("(")[0]
            library.impl(name, _module(name).reference, "CPU")
    _registrations.append(library)
    for name in names():
        library.impl(name, _route_cuda(name), "CUDA")
        _describe(NAMESPACE, name)


@functools.cache
def load_implementation(name: native.Library) -> None:
    """Loads one library and registers fake kernels for ``torch.ops.efficientad_fast_<name>``.

    Raises:
        BackendError: the library was not built or does not load; see `native.load`.
    """
    native.load(name)
    for operator in names():
        _describe(f"{NAMESPACE}_{name}", operator)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"efficientad_fast.ops.{name}")


def _describe(namespace: str, name: str) -> None:
    module = _module(name)
    qualified = f"{namespace}::{name}"
    torch.library.register_fake(qualified, module.fake)
    if hasattr(module, "backward"):
        torch.library.register_autograd(qualified, module.backward, setup_context=module.setup_context)


def _route_cuda(name: str) -> Callable[..., Any]:
    def route(*args: Any) -> Any:
        if not native.is_built("cuda"):
            return _module(name).reference(*args)
        load_implementation("cuda")
        return getattr(torch.ops.efficientad_fast_cuda, name)(*args)

    return route
