"""Compiling the CUDA C++ and Triton kernels for an architecture, without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
        function: file and function, of which there may be several kernels, such as ``conv_pool.py _conv_pool``.
        made_for: ``float16``, the dtype of the first tensor that a Triton kernel is given; ``float, true``, what a CUDA
            C++ template is given.
        heavy: whether it must run on tensor cores.
        tensor_memory: columns of a block.
        operations_a_byte: as `listings.operations_a_byte` has it.
        alike: names of launches that lead to this very kernel too.
    """

    name: str
    kind: str
    architecture: str
    resources: listings.Resources
    threads: int | None
    dynamic_shared: int | None
    counts: dict[str, int]
    function: str = ""
    made_for: str = ""
    heavy: bool = False
    tensor_memory: int = 0
    operations_a_byte: float | None = None
    alike: tuple[str, ...] = ()

    @property
    def shared(self) -> int:
        """Bytes of a block, static and dynamic, as far as they are known."""
        return self.resources.shared + (self.dynamic_shared or 0)

    @property
    def occupancy(self) -> float:
        limits = ARCHITECTURES[capability(self.architecture)]
        threads = self.threads or ASSUMED_THREADS
        return occupancy(limits, threads, self.resources.registers, self.shared, self.tensor_memory)

    def faults(self) -> list[str]:
        """What ``--check`` does not let pass."""
        found = []
        used = self.resources
        if used.spill_stores or used.spill_loads:
            found.append(f"spills registers ({used.spill_stores} bytes stored, {used.spill_loads} loaded)")
        elif used.stack or self.counts.get("LDL") or self.counts.get("STL"):
            found.append(f"uses local memory ({used.stack} bytes of stack)")
        limits = ARCHITECTURES[capability(self.architecture)]
        if self.shared > limits.shared_of_block:
            most = limits.shared_of_block
            found.append(f"needs {self.shared} bytes of shared memory, and a block has at most {most}")
        if self.tensor_memory > limits.tensor_memory:
            most = limits.tensor_memory
            found.append(f"needs {self.tensor_memory} columns of tensor memory, and a multiprocessor has {most}")
        if self.dynamic_shared is None:
            found.append(
                "has dynamic shared memory, and no constant named k...SharedBytes beside it says how much at most"
            )
        products = CUDA_PRODUCTS if self.kind == "cuda" else limits.products
        if self.heavy and not any(self.counts.get(name) for name in products):
            found.append(f"is a heavy convolution and has no {' or '.join(products)}")
        if self.heavy and self.kind == "cuda":
            found += self._narrow_loads()
        return found

    def _narrow_loads(self) -> list[str]:
        if self.function == STEM:
            return [] if self.counts.get("LDGSTS of 64 bits") else ["copies nothing by 8 bytes a thread, a pixel each"]
        gathers = "false" in self.made_for
        if gathers or self.counts.get("LDGSTS of 128 bits") or self.counts.get("LDG of 128 bits"):
            return []
        return ["is a heavy convolution and loads nothing by 16 bytes a thread"]


CUDA_PRODUCTS = ("HMMA", "QMMA")
"""What `mma.sync` becomes, on every architecture."""

STEM = "conv_pool.cu conv_pool_stem"
"""Reads pixels and taps of four channels, 8 bytes: no 16 of them need be aligned."""

HEAVY_CUDA = {
    *("conv_pool.cu conv_pool", STEM, "feature_distance.cu feature_distance"),
    "autoencoder.cu convolve",
}
"""CUDA C++ kernels that must run on tensor cores."""


def is_heavy_cuda(function: str, made_for: str, architecture: str) -> bool:
    """Whether it is of these, but for products of float32, and of e4m3 where a GPU has none.

    They are told by the first argument of the template: ``Tile<(Number)0, ...>`` and ``(Number)3``.
    """
    refused = "(Number)3" in made_for and capability(architecture) < 89
    return function in HEAVY_CUDA and "(Number)0" not in made_for and not refused


# Triton sets variables while other threads start compilers: a process that is started just then may find none of them.
_ENVIRONMENT = dict(os.environ)


def run(*command: str | Path) -> str:
    """What it prints on both streams.

    Raises:
        RuntimeError: it failed; the message is what it printed.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
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
        most = most_dynamic_shared(source, ARCHITECTURES[capability(architecture)].shared_of_block)
        found = []
        for name, used in resources.items():
            function, _, made_for = f"{source.name} {readable(name)}".partition("<")
            found.append(
                Kernel(
                    name=f"{source.name} {readable(name)}",
                    kind="cuda",
                    architecture=architecture,
                    resources=used,
                    threads=entries[name].threads,
                    dynamic_shared=most if entries[name].dynamic_shared else 0,
                    counts=listings.counts(sass[name]),
                    function=function,
                    made_for=made_for.removesuffix(">"),
                    heavy=is_heavy_cuda(function, made_for, architecture),
                    operations_a_byte=listings.operations_a_byte(sass[name]),
                )
            )
        return found


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


def most_dynamic_shared(source: Path, of_block: int) -> int | None:
    """The most dynamic shared memory of the kernels of a ``.cu`` file, in bytes; None where nothing says it.

    It, or a header that it includes from its folder, does so by ``constexpr int k...SharedBytes = 46 * 1024;``; the
    largest counts. One of the name ``k...OptinSharedBytes`` does where it is no more than ``of_block``, the bytes that
    a block may have: launches ask the GPU for that first.
    """
    text = source.read_text(encoding="utf-8")
    for name in re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE):
        header = source.parent / name
        if header.is_file():
            text += header.read_text(encoding="utf-8")
    stated = re.findall(r"constexpr [\w:]+ k(\w*)SharedBytes = (\d+(?: \* \d+)*);", text)
    sizes = ((name, _product(one)) for name, one in stated)
    return max((size for name, size in sizes if size <= of_block or not name.endswith("Optin")), default=None)


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

MODEL_SIZES = ("s", "m")


@dataclass(frozen=True)
class Compilation:
    """What a launch asks Triton for.

    Attributes:
        name, function, architecture, made_for, heavy: as in `Kernel`.
        source: types, constants and divisibility of the arguments: a ``triton.compiler.ASTSource``.
        options: of Triton's backend, such as ``num_warps``.
        key: the same for what compiles to the same kernel.
        alike: names of others with this key.
    """

    name: str
    function: str
    architecture: str
    made_for: str
    heavy: bool
    source: Any
    options: Mapping[str, Any]
    key: tuple[str, ...]
    alike: tuple[str, ...] = ()


def compilation(name: str, launch: Any, architecture: str, file: str = "", heavy: Collection[str] = ()) -> Compilation:
    """Of a `launching.Launch`; Triton's own launcher finds the types and what it specialises on.

    Args:
        name: of the launch.
        file: that has the kernel.
        heavy: functions that must run on tensor cores, but for images of few channels and for float32.
    """
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(_target(architecture))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, left = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, left, bound, specialization, left)
    source = ASTSource(kernel, signature, constants, attributes)
    dtype = _dtype(launch)
    return Compilation(
        name=name,
        function=f"{file} {kernel.__name__}".strip(),
        architecture=architecture,
        made_for=str(dtype).removeprefix("torch."),
        heavy=kernel.__name__ in heavy and dtype != torch.float32 and not has_few_channels(launch),
        source=source,
        options=options.__dict__,
        key=(source.hash(), options.hash(), architecture),
    )


def _target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability(architecture), WARP)


def _dtype(launch: Any) -> torch.dtype | None:
    for value in launch.arguments.values():
        tensor = getattr(value, "base", value)  # a descriptor has one
        if isinstance(tensor, torch.Tensor):
            return tensor.dtype
    return None


def has_few_channels(launch: Any) -> bool:
    """Whether a convolution's tiles are as deep as several taps, for the channels of one are too few."""
    from efficientad_fast.triton_kernels.implicit_gemm import FLAT

    loads = [value for name, value in launch.arguments.items() if name == "LOADS" or name.endswith("_LOADS")]
    return bool(launch.arguments.get("FLAT")) or (bool(loads) and all(value == FLAT for value in loads))


def distinct(compilations: Iterable[Compilation]) -> list[Compilation]:
    """The first of each key, which names the others, in order."""
    found: dict[tuple[str, ...], list[Compilation]] = {}
    for one in compilations:
        found.setdefault(one.key, []).append(one)
    return [
        dataclasses.replace(
            first, alike=tuple(one.name for one in others), heavy=any(one.heavy for one in (first, *others))
        )
        for first, *others in found.values()
    ]


def model_dtypes(architecture: str) -> tuple[torch.dtype, ...]:
    """In which the models' kernels run there."""
    from efficientad_fast.triton_kernels.implicit_gemm import FLOAT8_SINCE

    halves = (torch.float16, torch.bfloat16)
    return (*halves, torch.float8_e4m3fn) if capability(architecture) / 10 >= FLOAT8_SINCE else halves


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

    def representative(self, module: str, architecture: str) -> list[Compilation]:
        """Every launch of the representative calls of ``efficientad_fast.triton_kernels.<module>``.

        Launches are written down as they would be on that architecture: kernels load in other ways on others.
        """
        return self._recorded(module, architecture, lambda kernels: kernels.representative_calls())

    def of_models(self, module: str, architecture: str) -> list[Compilation]:
        """Every launch of EfficientAD-S and -M, in all dtypes; `representative` ones of a module without models."""
        if not hasattr(_module(module), "model_calls"):
            return self.representative(module, architecture)

        def calls(kernels: Any) -> dict[str, Callable[[], object]]:
            return {
                f"{size.upper()} {str(dtype).removeprefix('torch.')} {name}": call
                for size in MODEL_SIZES
                for dtype in model_dtypes(architecture)
                for name, call in kernels.model_calls(size, dtype).items()
            }

        return self._recorded(module, architecture, calls)

    def _recorded(
        self, module: str, architecture: str, calls: Callable[[Any], Mapping[str, Callable[[], object]]]
    ) -> list[Compilation]:
        from efficientad_fast.triton_kernels import launching

        kernels = _module(module)
        found = []
        with launching.as_if_on(capability(architecture) / 10):
            for call, run_it in calls(kernels).items():
                with launching.recorded() as launches:
                    run_it()
                for which, launch in zip(_numbered(launches), launches, strict=True):
                    name = f"{module}.py {call}{which}"
                    heavy = getattr(kernels, "HEAVY", ())
                    found.append(compilation(name, launch, architecture, f"{module}.py", heavy))
        return found

    def compile_launch(self, name: str, launch: Any, architecture: str) -> Kernel:
        """What a `launching.Launch` would have run."""
        return self.compiled(compilation(name, launch, architecture))

    def compiled(self, asked: Compilation) -> Kernel:
        """The kernel."""
        import triton

        knobs = triton.knobs
        log = io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            with knobs.cache.scope(), knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
                knobs.cache.dir = folder
                knobs.compilation.always_compile = True
                knobs.nvidia.dump_ptxas_log = True
                made = triton.compile(asked.source, target=_target(asked.architecture), options=dict(asked.options))
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(made.asm["cubin"])
            sass = listings.instructions(run(self.disassembler, "-c", cubin))
        ((mangled, used),) = listings.resources(log.getvalue()).items()
        return Kernel(
            name=asked.name,
            kind="triton",
            architecture=asked.architecture,
            resources=used,
            threads=listings.entries(made.asm["ptx"])[mangled].threads,
            dynamic_shared=made.metadata.shared,
            counts=listings.counts(sass[mangled]),
            function=asked.function,
            made_for=asked.made_for,
            heavy=asked.heavy,
            tensor_memory=getattr(made.metadata, "tmem_size", None) or 0,
            operations_a_byte=listings.operations_a_byte(sass[mangled]),
            alike=asked.alike,
        )


def _module(name: str) -> Any:
    return importlib.import_module(f"efficientad_fast.triton_kernels.{name}")


def _numbered(launches: Sequence[Any]) -> list[str]:
    """What tells the launches of one call from each other: nothing, or the function, or its number too."""
    names = [launch.kernel.__name__ for launch in launches]
    if len(names) == 1:
        return [""]
    return [
        f" {name} {names[: index + 1].count(name)}" if names.count(name) > 1 else f" {name}"
        for index, name in enumerate(names)
    ]


def triton_modules() -> list[str]:
    """Operators of the catalogue that have a Triton module."""
    from efficientad_fast import ops

    return [name for name in ops.names() if importlib.util.find_spec(f"efficientad_fast.triton_kernels.{name}")]


def cuda_sources() -> list[Path]:
    """Files of the CUDA library that hold kernels."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
