"""Compiles kernels with the emulator of csrc/simt into a Python module, once for every content of the sources.

What is compiled is kept in EFFICIENTAD_FAST_SIMT_CACHE, or in a folder of this user's beside the other temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SIMT = CSRC / "simt"

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
PARTS = ("fiber", "symbols", "memory", "ptx", "machine", "hooks", "bindings")
PLAIN_FLAGS = ["-O2"]
# Kernels keep the accesses they are written with: none is hoisted out of a condition, split, merged or hidden in an
# expanded memcpy; and a product and a sum stay two operations, whatever this processor has.
KERNEL_FLAGS = [
    *("-O1", "-g1", "-fsanitize=thread", "-DEFFICIENTAD_FAST_SIMT", "-include", str(SIMT / "instrumented.h")),
    *("-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unused-function"),
]
GCC_KERNEL_FLAGS = ["-fno-tree-sra", "-fno-tree-loop-im", "-Werror=frame-larger-than=49152"]
CLANG_KERNEL_FLAGS = [
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    *("-Wframe-larger-than=49152", "-Werror=frame-larger-than"),
]


@functools.cache
def _compiler() -> tuple[list[str], str] | str:
    """The C++ compiler's command and version, or why there is none that will do."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform != "linux":
        return f"the emulator of CUDA C++ needs Linux, and this is {sys.platform}"
    if shutil.which(command[0]) is None:
        return f"the emulator of CUDA C++ is compiled, and there is no C++ compiler {command[0]!r}; set CXX to one"
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    with tempfile.TemporaryDirectory() as folder:
        source, assembly = Path(folder, "probe.cpp"), Path(folder, "probe.s")
        source.write_text("void store(int* p) { *p = 1; }\n", encoding="utf-8")
        probe = [*command, "-std=c++17", "-fsanitize=thread", "-S", str(source), "-o", str(assembly)]
        subprocess.run(probe, capture_output=True, check=False)
        if not assembly.is_file() or "__tsan_write4" not in assembly.read_text(encoding="utf-8"):
            return f"the emulator of CUDA C++ needs -fsanitize=thread, and the compiler {command[0]!r} does not have it"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the emulator of CUDA C++ is a Python module, and Python.h is not installed (python3-dev)"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulator of CUDA C++ is bound with pybind11, which is not installed"
    return command, version.partition("\n")[0]


def why_not() -> str | None:
    """A sentence that says why nothing can be compiled here, or None."""
    found = _compiler()
    return found if isinstance(found, str) else None


def is_clang() -> bool:
    """Whether the compiler is clang, which splits the load of a vector before the emulator could see its alignment."""
    found = _compiler()
    return not isinstance(found, str) and "clang" in found[1]


def _cache() -> Path:
    given = os.environ.get("EFFICIENTAD_FAST_SIMT_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"efficientad_fast_simt_{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; set EFFICIENTAD_FAST_SIMT_CACHE to a folder of yours.")
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{answer.stdout}{answer.stderr}")
    if "warning:" in answer.stderr:
        print(answer.stderr, file=sys.stderr)


def _digest(*parts: str | bytes | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:20]


def _produce(target: Path, command: Callable[[Path], list[str]]) -> Path:
    """Makes `target` by a command that writes to the given path, unless it is there."""
    if not target.exists():
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                unfinished = target.with_suffix(".unfinished")
                _run(command(unfinished))
                unfinished.replace(target)
    return target


def _object(source: Path, flags: list[str], headers: list[Path]) -> Path:
    found = _compiler()
    assert not isinstance(found, str), found
    compiler, version = found
    bound = [importlib.metadata.version("pybind11"), sysconfig.get_config_var("EXT_SUFFIX")]
    key = _digest(
        version, *bound, " ".join(compiler + flags), source.name, source, *(h for h in headers if h.is_file())
    )
    target = _cache() / f"{source.stem}-{key}.o"
    return _produce(target, lambda path: [*compiler, *flags, "-c", str(source), "-o", str(path)])


@functools.cache
def load(name: str, *sources: Path, folders: tuple[Path, ...] = ()) -> ModuleType:
    """The emulator as module `name` with the kernels and bindings of `sources`; headers may also lie in `folders`.

    A source includes "simt/bindings.h" and binds its functions in EFFICIENTAD_FAST_SIMT_BINDINGS. The test that asks is
    skipped where no compiler is fit; a source that does not compile raises RuntimeError with the compiler's words.
    """
    found = _compiler()
    if isinstance(found, str):
        pytest.skip(found)
    import pybind11

    compiler, _ = found
    common = [*COMMON_FLAGS, f"-I{CSRC}", *(f"-I{folder}" for folder in folders)]
    common += ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    kernel_flags = [*common, *KERNEL_FLAGS, *(CLANG_KERNEL_FLAGS if is_clang() else GCC_KERNEL_FLAGS)]
    own_headers = sorted(SIMT.glob("*.h"))
    headers = [*own_headers, *sorted((CSRC / "cuda").glob("*.h")), *sorted(CSRC.glob("*.h"))]
    headers += [header for folder in folders for header in sorted(folder.glob("*.h"))]
    objects = [
        *(_object(SIMT / f"{part}.cpp", [*common, *PLAIN_FLAGS], own_headers) for part in PARTS),
        *(_object(source, kernel_flags, headers) for source in sources),
    ]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = _cache() / _digest(*(item.name for item in objects), name, suffix)
    folder.mkdir(exist_ok=True)
    library = _produce(
        folder / f"{name}{suffix}",
        lambda path: [*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(path)],
    )
    # Every such library calls itself `emulated`, and is known to Python by the name of its own before that.
    spec = importlib.util.spec_from_file_location(f"{name}.emulated", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def buffer(
    module: ModuleType,
    name: str,
    array: torch.Tensor | np.ndarray[Any, Any],
    *,
    writable: bool = False,
    initialised: bool = True,
) -> Any:
    """Device memory with the content of a contiguous CPU tensor or array, under the name errors are to give it.

    The array must outlive it, and receives what kernels wrote when `run` returns. Of memory that is not `initialised`
    nothing may be read before it is written.
    """
    if isinstance(array, torch.Tensor):
        assert array.is_contiguous() and array.device.type == "cpu", (array.shape, array.stride(), array.device)
        pointer, nbytes = array.data_ptr(), array.numel() * array.element_size()
    else:
        assert array.flags.c_contiguous
        pointer, nbytes = array.ctypes.data, array.nbytes
    return module.Buffer(name, pointer, nbytes, writable=writable, initialised=initialised)


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a binding and copies the writable buffers among its arguments back to where they came from."""
    result = function(*arguments)
    for argument in arguments:
        if getattr(argument, "writable", False) and hasattr(argument, "download"):
            argument.download()
    return result
