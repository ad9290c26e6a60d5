"""Builds what the machine allows: the module `_C`, the CPU library and the CUDA library.

build_backend.py explains the variables that steer this. What was built, and why the rest was not, is printed at
the end and written to ``efficientad_fast/build_info.json``, because pip hides the output of a build.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build as _build
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a front end need not run this from here

import build_backend as backend  # noqa: E402

PACKAGE = "efficientad_fast"
TITLES = {"extension": "module _C", "cpu": "CPU library", "cuda": "CUDA library"}
FILES = {"extension": "_C", "cpu": "libefficientad_fast_cpu", "cuda": "libefficientad_fast_cuda"}
# The first release whose stable ABI the sources use; libraries built with later headers load there too.
TARGET = f"-DTORCH_TARGET_VERSION=0x{backend.MINIMUM_TORCH[0]:02x}{backend.MINIMUM_TORCH[1]:02x}000000000000"

MODE = backend.build_mode()
REQUESTED_ARCHITECTURES = backend.requested_architectures()
SANITIZERS = [f"-fsanitize={one}" for one in backend.requested_sanitizers()]
OPTIMIZE = ["-O3", "-g0"]
if SANITIZERS:
    # Python's own flags may have integers wrap, which is then no finding.
    OPTIMIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS, "-fno-sanitize-recover=all"]
LINEINFO = ["-lineinfo"] if backend.requested_lineinfo() else []
CXX_FLAGS = [*OPTIMIZE, "-fvisibility=hidden", TARGET]

left_out: dict[str, str] = {}
architectures: list[str] = []


class CannotBuild(Exception):
    """What is missing for one of the three; the message is a sentence without its full stop."""


def first_choice() -> list[str]:
    """What to try, from what can be seen without PyTorch; the rest goes to `left_out`."""
    if MODE == "none":
        wanted = []
        reason = f"{backend.BUILD_VARIABLE}=none was set when it was installed"
    elif SANITIZERS:
        wanted = ["cpu"]
        reason = f"{backend.SANITIZE_VARIABLE} was set when it was built, which is for the CPU library alone"
    elif MODE == "auto" and backend.find_cxx() is None:
        wanted = []
        reason = "no C++ compiler was found when it was installed (CXX, or c++ on PATH)"
    elif MODE == "cpu":
        wanted = ["extension", "cpu"]
        reason = f"{backend.BUILD_VARIABLE}=cpu was set when it was installed"
    elif MODE == "auto" and backend.find_nvcc() is None:
        wanted = ["extension", "cpu"]
        reason = "nvcc was not found when it was installed (CUDA_HOME, PATH, /usr/local/cuda)"
    else:
        wanted = ["extension", "cpu", "cuda"]
        reason = ""
    left_out.update({name: reason for name in TITLES if name not in wanted})
    return wanted


def leave_out(name: str, reason: str) -> None:
    """Goes on without one of the three, or ends the build where it was asked for."""
    if MODE != "auto":
        raise SystemExit(f"{backend.BUILD_VARIABLE}={MODE}: the {TITLES[name]} cannot be built: {reason}.")
    left_out[name] = reason


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(pattern))


def find_torch() -> ModuleType | None:
    """PyTorch's extension builder, or None where PyTorch is not installed beside the build."""
    if importlib.util.find_spec("torch") is None:
        return None
    nvcc = backend.find_nvcc()
    if nvcc is not None:
        os.environ["CUDA_HOME"] = str(nvcc.parent.parent)  # so that PyTorch means the same compiler
    import torch

    # The builder asks for a GPU while it is imported, only to warn on a machine without one.
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        import torch.utils.cpp_extension
    return torch


def pybind11_include() -> str:
    """Headers of pybind11: the package's, else the copy that PyTorch brings."""
    for package, inside in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / inside
            if (folder / "pybind11" / "pybind11.h").is_file():
                return str(folder)
    raise CannotBuild("pybind11 is not installed where the package is built; install it, or build with isolation")


WANTED = first_choice()
torch = find_torch() if WANTED else None
if torch is not None:
    # Ninja would start two jobs more than there are processors, which a CUDA compiler can turn into swapping.
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2))


class build_ext(torch.utils.cpp_extension.BuildExtension if torch else _build_ext):  # type: ignore[misc]
    """Builds each of the three by itself, so that one that cannot be built does not take the others along."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = str(ROOT / "build" / "editable")  # pip's own would forget what is compiled

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] in (FILES["cpu"], FILES["cuda"]):
            return str(Path(*fullname.split(".")).with_suffix(".so"))  # plain libraries, for every Python
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        wanted = {extension.name.removeprefix(f"{PACKAGE}."): extension for extension in self.extensions}
        temp, built = self.build_temp, []
        for name in TITLES:  # what is missing is said before anything is compiled
            if FILES[name] in wanted:
                try:
                    getattr(self, f"prepare_{name}")(wanted[FILES[name]])
                except CannotBuild as error:
                    leave_out(name, str(error))
        for name in TITLES:
            if FILES[name] in wanted and name not in left_out:
                self.build_temp = str(Path(temp) / name)
                self.extensions = [wanted[FILES[name]]]
                try:
                    super().build_extensions()
                except (RuntimeError, CCompilerError, BaseError) as error:
                    leave_out(name, f"it did not compile ({error}); pip shows the compiler's messages with -v")
                else:
                    built += self.extensions
        self.build_temp, self.extensions = temp, built

    def prepare_any(self, extension: Extension) -> None:
        if backend.find_cxx() is None:
            raise CannotBuild("there is no C++ compiler (CXX, or c++ on PATH); install one, such as g++")
        if not extension.sources:
            raise CannotBuild("its sources are not here")

    def prepare_extension(self, extension: Extension) -> None:
        self.prepare_any(extension)
        python_headers = sysconfig.get_path("include")
        if not Path(python_headers, "Python.h").is_file():
            raise CannotBuild(f"Python.h is not in {python_headers}; install Python's headers (python3-dev)")
        extension.include_dirs.append(pybind11_include())
        texts = {
            "VERSION": self.distribution.get_version(),
            "TORCH": torch.__version__ if torch else "",
            "FLAGS": " ".join(CXX_FLAGS),
        }
        extension.define_macros += [(f"EFFICIENTAD_FAST_{key}", json.dumps(text)) for key, text in texts.items()]
        extension.extra_compile_args = ["-O3", "-g0", "-fvisibility=hidden"]

    def prepare_cpu(self, extension: Extension) -> None:
        self.prepare_any(extension)
        if torch is None:
            raise CannotBuild(
                "PyTorch is not installed where the package is built; install it, or build with isolation"
            )
        if backend.version_tuple(torch.__version__) < backend.MINIMUM_TORCH:
            wanted = ".".join(map(str, backend.MINIMUM_TORCH))
            raise CannotBuild(f"PyTorch {torch.__version__} is too old; it takes the headers of {wanted} or later")
        extension.include_dirs += torch.utils.cpp_extension.include_paths()
        extension.include_dirs += [str(ROOT / "csrc"), str(ROOT / PACKAGE / "ops")]
        extension.library_dirs += torch.utils.cpp_extension.library_paths()
        extension.libraries += ["torch_cpu", "c10"]
        extension.extra_compile_args = {"cxx": list(CXX_FLAGS)}
        extension.extra_link_args += SANITIZERS

    def prepare_cuda(self, extension: Extension) -> None:
        path = backend.find_nvcc()
        if path is None:
            raise CannotBuild("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda); install the CUDA toolkit")
        self.prepare_cpu(extension)
        if torch.version.cuda is None:
            raise CannotBuild(f"PyTorch {torch.__version__} is not a CUDA build; install one that is")
        nvcc = backend.Nvcc(path)
        release = nvcc.version()
        if not release or backend.version_tuple(release)[0] != backend.version_tuple(torch.version.cuda)[0]:
            raise CannotBuild(
                f"{path} is of CUDA {release or 'an unreadable version'} and PyTorch of CUDA {torch.version.cuda}; "
                "install a toolkit of the same major version"
            )
        try:
            chosen = nvcc.choose(REQUESTED_ARCHITECTURES)
        except ValueError as error:
            raise CannotBuild(str(error)) from error
        runtime = nvcc.static_runtime_folder()
        if runtime is None:
            raise CannotBuild(f"libcudart_static.a was not found where {path} links from; install the whole toolkit")
        extension.libraries += ["torch_cuda", "cudart_static", "rt", "dl", "pthread"]
        extension.library_dirs.append(str(runtime))
        extension.define_macros += [("EFFICIENTAD_FAST_CUDA", None), ("USE_CUDA", None)]
        extension.extra_compile_args["nvcc"] = [
            *("-O3", *LINEINFO, TARGET, "-Xcompiler", "-fvisibility=hidden"),
            *(flag for architecture in chosen for flag in architecture.flags()),
        ]
        architectures[:] = [str(architecture) for architecture in chosen]


class build_info(Command):
    """Writes what was built and why the rest was not, and removes libraries of an earlier build."""

    user_options: ClassVar[list[Any]] = [("build-lib=", "b", "folder that the package was built in")]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def _target(self) -> Path:
        return (ROOT if self.editable_mode else Path(str(self.build_lib))) / PACKAGE / "build_info.json"

    def run(self) -> None:
        target = self._target()
        for name in left_out:
            for stale in target.parent.glob(f"{FILES[name]}.*so"):
                stale.unlink()
        cxx, nvcc = backend.find_cxx(), backend.find_nvcc()
        info = {
            "version": self.distribution.get_version(),
            "mode": MODE,
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": str(torch.__version__) if torch else None,
            "torch_cuda": torch.version.cuda if torch else None,
            "cxx": compiler_version(cxx) if cxx and len(left_out) < len(TITLES) else None,
            "nvcc": backend.Nvcc(nvcc).version() if nvcc and "cuda" not in left_out else None,
            "cuda_archs": architectures if "cuda" not in left_out else [],
            "built": [name for name in TITLES if name not in left_out],
            "left_out": left_out,
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        for name, title in TITLES.items():
            print(f"{PACKAGE}: {title}: " + (f"left out: {left_out[name]}" if name in left_out else "built"))

    def get_outputs(self) -> list[str]:
        return [str(Path(str(self.build_lib)) / PACKAGE / "build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {self.get_outputs()[0]: f"{PACKAGE}/build_info.json"} if self.editable_mode else {}

    def get_source_files(self) -> list[str]:
        return []


def compiler_version(cxx: str) -> str:
    answer = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return answer.partition("\n")[0].strip()


class build(_build):
    sub_commands: ClassVar[list[Any]] = [*_build.sub_commands, ("build_info", None)]


SOURCES = {
    "extension": ["csrc/bindings.cpp"],
    "cpu": ["csrc/library.cpp", *sources("cpu", "*.cpp")],
    "cuda": ["csrc/library.cpp", *sources("cuda", "*.cu")],
}

setup(
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), f"{PACKAGE}.triton_kernels"],
    package_dir={f"{PACKAGE}.triton_kernels": "triton_kernels"},
    ext_modules=[
        Extension(f"{PACKAGE}.{FILES[name]}", SOURCES[name], language="c++", optional=MODE == "auto") for name in WANTED
    ],
    cmdclass={"build": build, "build_ext": build_ext, "build_info": build_info},
)
