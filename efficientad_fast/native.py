"""Finds and loads what was compiled: the operator libraries and the module ``_C``.

Importing this loads nothing. The first call that needs a library loads it, and says what is missing and what to
do if that fails. What was built, and why the rest was not, is read from ``build_info.json``, which the build
writes into the package; a source tree that was never built has none.

EFFICIENTAD_FAST_LIBRARIES names a folder whose ``build_info.json`` and libraries are taken in place of the package's,
such as the one that ``make sanitize`` builds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from efficientad_fast.errors import BackendError

Library = Literal["cpu", "cuda"]

MINIMUM_TORCH = (2, 11)
LIBRARIES_VARIABLE = "EFFICIENTAD_FAST_LIBRARIES"

_M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

_PACKAGE = Path(__file__).resolve().parent
_DISTRIBUTION = "efficientad-fast"
_TITLES = {"extension": "module _C", "cpu": "CPU library", "cuda": "CUDA library"}
_MODES = {"extension": "cpu", "cpu": "cpu", "cuda": "cuda"}


def keep_memory_together() -> None:
    """For a process of one's own that predicts for long: its memory stays as it is.

    By default, glibc gives threads memory from places of their own, up to eight for each core. Those that decode images
    come and go, and what is free in so many places is more and more: 9 % after 6,000 predictions of mixed sizes. Call
    it before there are threads; MALLOC_ARENA_MAX=2 in the environment does the same. Other systems are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


@functools.cache
def mind_forks() -> None:
    """From now on, forked processes compute in one thread.

    They have none of the threads that the process before them had, and would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


@functools.cache
def build_info() -> dict[str, Any] | None:
    """What the build wrote down, or None in a source tree that was never built.

    Keys: ``version``, ``mode``, ``platform``, ``python``, ``torch``, ``torch_cuda``, ``cxx``, ``nvcc``,
    ``cuda_archs`` (list of str), ``built`` (list of ``extension``, ``cpu``, ``cuda``), ``left_out`` (name to
    reason).

    Raises:
        BackendError: the file is there and cannot be read, or is not in the folder that was named for it.
    """
    path = _folder() / "build_info.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if os.environ.get(LIBRARIES_VARIABLE):
            raise BackendError(
                f"{LIBRARIES_VARIABLE} must name a folder with a build_info.json, got {path.parent}; "
                "build into it, or unset the variable."
            ) from error
        return None
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} cannot be read ({error}); install efficientad-fast again.") from error
    return info


def why_not_built(name: Library | Literal["extension"]) -> str | None:
    """None where it was built, else the reason, as a sentence without its full stop."""
    info = build_info()
    if info is None:
        return _why_unbuilt()
    reason: str | None = info["left_out"].get(name)
    return reason


def is_built(name: Library) -> bool:
    """Whether this installation has the library. Loads nothing."""
    return why_not_built(name) is None


def library_path(name: Library) -> Path:
    """The file of a library.

    Raises:
        BackendError: it was not built, or its file is gone.
    """
    _require(name)
    path = _folder() / f"libefficientad_fast_{name}.so"
    if not path.is_file():
        raise BackendError(f"The {_TITLES[name]} was built but {path} is gone; install efficientad-fast again.")
    return path


def cuda_archs() -> list[str]:
    """Architectures that the CUDA library has code for, such as ``8.0`` and ``9.0+PTX``; none if it was not built."""
    info = build_info()
    return [] if info is None else list(info["cuda_archs"])


def code_for(archs: list[str], capability: str) -> tuple[int, int] | None:
    """The newest code for ``archs`` (``8.0``, ``9.0a``, ``9.0+PTX``) that runs on a GPU of this capability (``8.6``).

    Machine code runs on its own major version from its own minor version on, PTX on everything later; code with a
    suffix runs on that capability alone (``f``: on its family).

    Returns:
        The capability that it was compiled for, such as ``(8, 0)``; None where no code runs.
    """
    device = as_numbers(capability)
    found = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"not an architecture: {arch!r}")
        code, suffix, ptx = (int(match[1]), int(match[2])), match[3], match[4] is not None
        runs_later = suffix != "a" and (code[0] == device[0] or (ptx and not suffix))
        if code == device or (code < device and runs_later):
            found.append(code)
    return max(found, default=None)


def covers(archs: list[str], capability: str) -> bool:
    """Whether :func:`code_for` finds any."""
    return code_for(archs, capability) is not None


def as_numbers(capability: str) -> tuple[int, int]:
    """``(8, 6)`` of ``8.6``."""
    major, minor = capability.split(".")
    return int(major), int(minor)


@functools.cache
def load(name: Library) -> None:
    """Loads a library once, which registers its operators as ``torch.ops.efficientad_fast_<name>``.

    The CPU library also defines the public operators, ``torch.ops.efficientad_fast``; call
    `efficientad_fast.ops.load`, which does the same where no library was built. No GPU is asked for.

    Raises:
        BackendError: it was not built, this PyTorch cannot take it, or it does not load.
    """
    path = library_path(name)
    if _torch_version() < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise BackendError(
            f"The {_TITLES[name]} needs PyTorch {wanted} or later; this is {torch.__version__}. Install a newer one."
        )
    if name == "cuda" and torch.version.cuda is None:
        raise BackendError(
            f"The CUDA library needs a CUDA build of PyTorch; this is {torch.__version__}. Install a CUDA build, "
            'or predict with device="cpu".'
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        info = build_info() or {}
        raise BackendError(
            f"{path} does not load under PyTorch {torch.__version__}: {error}. It was built with PyTorch "
            f"{info.get('torch')} on {info.get('platform')}; install efficientad-fast again on this machine, or with "
            "EFFICIENTAD_FAST_BUILD=none to do without compiled libraries."
        ) from error


@functools.cache
def extension() -> ModuleType:
    """The module ``_C``: ``build_info()`` and ``cpu_features()`` as they were compiled in.

    Raises:
        BackendError: it was not built, or it does not import under this Python.
    """
    _require("extension")
    try:
        return importlib.import_module("efficientad_fast._C")
    except ImportError as error:
        info = build_info() or {}
        raise BackendError(
            f"The module _C does not import: {error}. It was built for Python {info.get('python')}; install "
            "efficientad-fast again with the Python that runs it."
        ) from error


def _folder() -> Path:
    return Path(os.environ.get(LIBRARIES_VARIABLE) or _PACKAGE)


def _require(name: Library | Literal["extension"]) -> None:
    reason = why_not_built(name)
    if reason is None:
        return
    message = f"The {_TITLES[name]} is not part of this installation: {reason}."
    if build_info() is not None:
        message += f" To change that, install again with EFFICIENTAD_FAST_BUILD={_MODES[name]}."
    raise BackendError(message)


def _torch_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _why_unbuilt() -> str:
    reason = f"{_PACKAGE} is a source tree that was never built"
    for distribution in importlib.metadata.distributions(name=_DISTRIBUTION):
        installed = Path(str(distribution.locate_file("efficientad_fast"))).resolve()
        if installed != _PACKAGE and (installed / "build_info.json").is_file():
            return (
                f"{reason}, and it hides the one installed in {installed} because Python was started in, or was given, "
                "the folder above it; start Python in another folder, or run pip install -e . in that one"
            )
    return f"{reason}; run make test or pip install -e . in the folder above it"
