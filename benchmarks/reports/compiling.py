"""Compiling the CUDA C++ and Triton kernels for an architecture, without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.reports import listings
from benchmarks.reports.architectures import ARCHITECTURES, WARP, capability, occupancy

ROOT = Path(__file__).resolve().parents[2]

# Where no launch bounds say how many threads a block has.
ASSUMED_THREADS = 256


class Unavailable(Exception):
    """Why kernels of one kind cannot be compiled here; the message is a sentence without its full stop."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        name: file and kernel, such as ``anomaly_map.cu resize_maps<float>`` or ``anomaly_map.py float16``.
        kind: ``cuda`` or ``triton``.
        architecture: such as ``sm_90``.
        threads: of a block; None where its launch bounds do not say.
        dynamic_shared: bytes of a block that the launch decides, at most; None where nothing says how many.
        counts: of instructions, as `listings.counts` names them.
    """

    name: str
    kind: str
    architecture: str
    resources: listings.Resources
    threads: int | None
    dynamic_shared: int | None
    counts: dict[str, int]

    @property
    def shared(self) -> int:
        """Bytes of a block, static and dynamic, as far as they are known."""
        return self.resources.shared + (self.dynamic_shared or 0)

    @property
    def occupancy(self) -> float:
        limits = ARCHITECTURES[capability(self.architecture)]
        return occupancy(limits, self.threads or ASSUMED_THREADS, self.resources.registers, self.shared)

    def faults(self) -> list[str]:
        """What ``--check`` does not let pass."""
        found = []
        used = self.resources
        if used.spill_stores or used.spill_loads:
            found.append(f"spills registers ({used.spill_stores} bytes stored, {used.spill_loads} loaded)")
        elif used.stack or self.counts.get("LDL") or self.counts.get("STL"):
            found.append(f"uses local memory ({used.stack} bytes of stack)")
        most = ARCHITECTURES[capability(self.architecture)].shared_of_block
        if self.shared > most:
            found.append(f"needs {self.shared} bytes of shared memory, and a block has at most {most}")
        if self.dynamic_shared is None:
            found.append(
                "has dynamic shared memory, and no constant named k...SharedBytes beside it says how much at most"
            )
        return found


def run(*command: str | Path) -> str:
    """What it prints on both streams.

    Raises:
        RuntimeError: it failed; the message is what it printed.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def find_disassembler(nvcc: Path | None) -> Path:
    """nvdisasm: beside the compiler, on PATH, or in the Triton wheel.

    Raises:
        Unavailable: it is in none of them.
    """
    candidates = [] if nvcc is None else [nvcc.parent / "nvdisasm"]
    on_path = shutil.which("nvdisasm")
    if on_path is not None:
        candidates.append(Path(on_path))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise Unavailable("nvdisasm was not found (beside nvcc, on PATH, in Triton); install the CUDA toolkit or Triton")


# CUDA C++


class CudaCompiler:
    """nvcc, called as setup.py calls it.

    Raises:
        Unavailable: setup.py could not build the CUDA library here, and says why; or there is no disassembler.
    """

    NAME = "nvcc"

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT))
        try:
            import build_backend
        finally:
            sys.path.pop(0)
        nvcc = build_backend.find_nvcc()
        if nvcc is None:
            raise Unavailable("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
        self.nvcc = nvcc
        self.disassembler = find_disassembler(nvcc)
        self.flags = _flags_of_setup()

    def version(self) -> str:
        match = re.search(r"release (\S+),", run(self.nvcc, "--version"))
        return match[1] if match else "unknown"

    def compile(self, source: Path, architecture: str) -> list[Kernel]:
        """Every kernel in a ``.cu`` file, in its order."""
        number = architecture.removeprefix("sm_")
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            log = run(
                *(self.nvcc, *self.flags, f"-gencode=arch=compute_{number},code=sm_{number}", "-Xptxas", "-v"),
                *("-cubin", "--keep", "--keep-dir", folder, source, "-o", cubin),
            )
            resources = listings.resources(log)
            if not resources:
                return []
            entries = listings.entries(next(Path(folder).glob("*.ptx")).read_text())
            sass = listings.instructions(run(self.disassembler, "-c", cubin))
        most = most_dynamic_shared(source)
        return [
            Kernel(
                name=f"{source.name} {readable(name)}",
                kind="cuda",
                architecture=architecture,
                resources=used,
                threads=entries[name].threads,
                dynamic_shared=most if entries[name].dynamic_shared else 0,
                counts=listings.counts(sass[name]),
            )
            for name, used in resources.items()
        ]


def _flags_of_setup() -> list[str]:
    """What setup.py gives nvcc for the CUDA library, but for the architectures."""
    try:
        importlib.import_module("setuptools")  # brings distutils where Python has none
        from distutils.core import run_setup
    except ImportError as error:
        raise Unavailable("setuptools is not installed") from error
    with mock.patch.dict(os.environ, EFFICIENTAD_FAST_BUILD="cuda"), contextlib.chdir(ROOT):
        try:
            distribution = run_setup(str(ROOT / "setup.py"), ["--quiet", "build_ext"], stop_after="init")
            command: Any = distribution.get_command_obj("build_ext")
            command.ensure_finalized()
            extension = next(one for one in distribution.ext_modules if one.name.endswith("_cuda"))
            command.prepare_cuda(extension)
        except Exception as error:
            # setup.py's own class of errors is nowhere to be imported from.
            if type(error).__name__ != "CannotBuild":
                raise
            raise Unavailable(str(error)) from error
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    return [
        *(f"-I{folder}" for folder in extension.include_dirs),
        *(f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros),
        *COMMON_NVCC_FLAGS,
        *(flag for flag in extension.extra_compile_args["nvcc"] if not flag.startswith("-gencode")),
        "-std=c++20",
    ]


def most_dynamic_shared(source: Path) -> int | None:
    """The most dynamic shared memory of the kernels of a ``.cu`` file, in bytes; None where nothing says it.

    It, or a header that it includes from its folder, does so by ``constexpr int k...SharedBytes = 46 * 1024;``; the
    largest counts.
    """
    text = source.read_text(encoding="utf-8")
    for name in re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE):
        header = source.parent / name
        if header.is_file():
            text += header.read_text(encoding="utf-8")
    products = re.findall(r"constexpr [\w:]+ k\w*SharedBytes = (\d+(?: \* \d+)*);", text)
    return max((_product(one) for one in products), default=None)


def _product(text: str) -> int:
    result = 1
    for factor in text.split(" * "):
        result *= int(factor)
    return result


def readable(mangled: str) -> str:
    """A kernel's name without namespaces and arguments, such as ``resize_maps<float>``."""
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    name = run(demangler, "-p", mangled).strip() if demangler else mangled
    return re.sub(r"\(anonymous namespace\)::|\b[a-z_]\w*::", "", name)


# Triton

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class TritonCompiler:
    """Triton, compiling what its kernels' own launches ask for.

    Raises:
        Unavailable: Triton is not installed, or interprets.
    """

    NAME = "Triton"

    def __init__(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise Unavailable("Triton is not installed")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise Unavailable("TRITON_INTERPRET=1 makes Triton interpret")
        self.disassembler = find_disassembler(None)

    def version(self) -> str:
        import triton

        return str(triton.__version__)

    def compile(self, module: str, architecture: str) -> list[Kernel]:
        """Every launch of the representative calls of ``efficientad_fast.triton_kernels.<module>``."""
        from efficientad_fast.triton_kernels import launching

        found = []
        calls = importlib.import_module(f"efficientad_fast.triton_kernels.{module}").representative_calls()
        for name, call in calls.items():
            with launching.recorded() as launches:
                call()
            for launch in launches:
                which = f" {launch.kernel.__name__}" if len(launches) > 1 else ""
                found.append(self.compile_launch(f"{module}.py {name}{which}", launch, architecture))
        return found

    def compile_launch(self, name: str, launch: Any, architecture: str) -> Kernel:
        """What a `launching.Launch` would have run."""
        import triton
        from triton.backends.compiler import GPUTarget

        knobs = triton.knobs
        target = GPUTarget("cuda", capability(architecture), WARP)
        log = io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            with knobs.cache.scope(), knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
                knobs.cache.dir = folder
                knobs.compilation.always_compile = True
                knobs.nvidia.dump_ptxas_log = True
                compiled = triton.compile(_source(launch), target=target, options=dict(launch.options))
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            sass = listings.instructions(run(self.disassembler, "-c", cubin))
        ((mangled, used),) = listings.resources(log.getvalue()).items()
        return Kernel(
            name=name,
            kind="triton",
            architecture=architecture,
            resources=used,
            threads=listings.entries(compiled.asm["ptx"])[mangled].threads,
            dynamic_shared=compiled.metadata.shared,
            counts=listings.counts(sass[mangled]),
        )


def _source(launch: Any) -> Any:
    """Types, constants and divisibility of the arguments, as Triton's launcher finds them."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = parameter.annotation_type or "fp32"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and specialised and not parameter.do_not_specialize_on_alignment and name not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def triton_modules() -> list[str]:
    """Operators of the catalogue that have a Triton module."""
    from efficientad_fast import ops

    return [name for name in ops.names() if importlib.util.find_spec(f"efficientad_fast.triton_kernels.{name}")]


def cuda_sources() -> list[Path]:
    """Files of the CUDA library that hold kernels."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
