"""The build backend: setuptools' own, asking for PyTorch only when something will be compiled.

Four environment variables steer the build; all are read and checked here, for setup.py too:

EFFICIENTAD_FAST_BUILD
    ``auto`` (default) compiles what this machine allows and says what it left out and why; ``cpu`` and ``cuda``
    (which includes ``cpu``) fail where they cannot; ``none`` makes a pure-Python package.
EFFICIENTAD_FAST_CUDA_ARCHS
    Architectures of the CUDA library, such as ``8.0,8.6,9.0+PTX``. ``+PTX`` adds code that later GPUs compile
    for themselves.
EFFICIENTAD_FAST_SANITIZE
    Sanitizers to compile the CPU library with, such as ``address,undefined``; nothing else is built then. A finding
    ends the process. ``make sanitize`` builds into a folder of its own and runs the tests with it.
EFFICIENTAD_FAST_LINEINFO
    ``1`` compiles the CUDA library with lines of the sources, by which compute-sanitizer and profilers name places in
    kernels. It is about twice as large then, and as fast.

Nothing here imports PyTorch or asks for a GPU: compilers decide, not the machine that compiles.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

BUILD_VARIABLE = "EFFICIENTAD_FAST_BUILD"
ARCHS_VARIABLE = "EFFICIENTAD_FAST_CUDA_ARCHS"
SANITIZE_VARIABLE = "EFFICIENTAD_FAST_SANITIZE"
LINEINFO_VARIABLE = "EFFICIENTAD_FAST_LINEINFO"
MODES = ("auto", "none", "cpu", "cuda")
SANITIZERS = ("address", "undefined", "float-cast-overflow")
MINIMUM_TORCH = (2, 11)
NATIVE_REQUIREMENTS = [f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}", "ninja", "pybind11"]


def version_tuple(text: str) -> tuple[int, int]:
    """Major and minor number of a version such as ``2.13.0+cpu``; raises ValueError for anything else."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"not a version: {text!r}")
    return int(match[1]), int(match[2])


def build_mode(environ: Mapping[str, str] = os.environ) -> str:
    """The value of EFFICIENTAD_FAST_BUILD; ends the build with a sentence if it is none of MODES."""
    mode = environ.get(BUILD_VARIABLE, "").strip() or "auto"
    if mode not in MODES:
        raise SystemExit(f"{BUILD_VARIABLE}={mode!r} is not known: use one of {', '.join(MODES)}.")
    return mode


def requested_sanitizers(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The words of EFFICIENTAD_FAST_SANITIZE, none where it is not set; ends the build if one is not of SANITIZERS."""
    words = tuple(word for word in re.split(r"[\s,]+", environ.get(SANITIZE_VARIABLE, "")) if word)
    unknown = [word for word in words if word not in SANITIZERS]
    if unknown:
        raise SystemExit(f"{SANITIZE_VARIABLE}: {unknown[0]!r} is not known: use some of {', '.join(SANITIZERS)}.")
    return words


def requested_lineinfo(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether EFFICIENTAD_FAST_LINEINFO is 1; ends the build if it is neither that nor 0 nor empty."""
    value = environ.get(LINEINFO_VARIABLE, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"{LINEINFO_VARIABLE}={value!r} is not known: use 1, or 0 as where it is not set.")
    return value == "1"


@dataclass(frozen=True)
class Architecture:
    """A compute capability to compile for, with its PTX or without."""

    number: int  # 10 * major + minor, as the compiler writes it
    suffix: str = ""  # "a" or "f": code for this capability, or its family, alone
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.number // 10}.{self.number % 10}{self.suffix}{'+PTX' if self.ptx else ''}"

    def flags(self) -> list[str]:
        name = f"{self.number}{self.suffix}"
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}"]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
        return flags


DEFAULT_ARCHITECTURES = (Architecture(80), Architecture(86), Architecture(89), Architecture(90, ptx=True))


def requested_architectures(environ: Mapping[str, str] = os.environ) -> tuple[Architecture, ...] | None:
    """EFFICIENTAD_FAST_CUDA_ARCHS, or None where it is not set; ends the build if it cannot be read."""
    text = environ.get(ARCHS_VARIABLE, "").strip()
    if not text:
        return None
    found = []
    for word in re.split(r"[\s,;]+", text.strip(" ,;")):
        match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise SystemExit(
                f"{ARCHS_VARIABLE}={text!r} cannot be read at {word!r}: give compute capabilities separated by "
                "commas, such as 8.0,8.6,9.0+PTX."
            )
        found.append(Architecture(10 * int(match[1]) + int(match[2]), match[3], match[4] is not None))
    return tuple(found)


def find_cxx(environ: Mapping[str, str] = os.environ) -> str | None:
    """The C++ compiler that the extension builder calls: CXX, or ``c++``."""
    words = shlex.split(environ.get("CXX", "")) or ["c++"]
    return shutil.which(words[0], path=environ.get("PATH"))


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Path | None:
    """nvcc under CUDA_HOME or CUDA_PATH where one is set, else on PATH, else in the usual place."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if home is None:
        on_path = shutil.which("nvcc", path=environ.get("PATH"))
        if on_path is not None:
            return Path(on_path)
        home = "/usr/local/cuda"
    nvcc = Path(home) / "bin" / "nvcc"
    return nvcc if os.access(nvcc, os.X_OK) else None


class Nvcc:
    """What an nvcc says of itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _ask(self, *arguments: str) -> str:
        result = subprocess.run([self.path, *arguments], capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    def version(self) -> str:
        """Such as ``13.0``; empty where the answer cannot be read."""
        match = re.search(r"release (\d+\.\d+)", self._ask("--version"))
        return match[1] if match else ""

    def capabilities(self) -> frozenset[int]:
        """Compute capabilities it compiles for, as 10 * major + minor."""
        return frozenset(int(number) for number in re.findall(r"compute_(\d+)\b", self._ask("--list-gpu-arch")))

    def static_runtime_folder(self) -> Path | None:
        """The folder of libcudart_static.a, where the linker that is not nvcc must be sent."""
        # nvcc may be a wrapper far from its toolkit, so the folder is taken from what it would tell its linker.
        folders = re.findall(r'"-L([^"]+)"', self._ask("--dryrun", "-x", "cu", os.devnull, "-o", "unused"))
        return next((Path(f).resolve() for f in folders if (Path(f) / "libcudart_static.a").is_file()), None)

    def choose(self, requested: tuple[Architecture, ...] | None) -> tuple[Architecture, ...]:
        """The architectures to compile for: the requested ones, or those of the default list it knows.

        Raises ValueError, with a sentence, where a requested one is unknown to it or none is left.
        """
        known = self.capabilities()
        wanted = requested or DEFAULT_ARCHITECTURES
        unknown = [str(a) for a in wanted if a.number not in known]
        chosen = tuple(a for a in wanted if a.number in known)
        if (requested and unknown) or not chosen:
            listed = ", ".join(f"{n // 10}.{n % 10}" for n in sorted(known)) or "none that it lists"
            raise ValueError(
                f"{self.path} (CUDA {self.version()}) does not compile for {', '.join(unknown)}; it knows {listed}. "
                f"Set {ARCHS_VARIABLE} to some of these"
            )
        return chosen


def compiles(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a build in this environment will try to compile anything."""
    mode = build_mode(environ)
    requested_architectures(environ)
    return mode in ("cpu", "cuda") or (mode == "auto" and find_cxx(environ) is not None)


# setuptools' hooks for requirements run setup.py, which wants PyTorch when it compiles; these need nothing.


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return NATIVE_REQUIREMENTS if compiles() else []


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)
