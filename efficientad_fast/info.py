"""What this installation is and what works on this machine, for ``efficientad-fast info``.

This is the only place outside a prediction that touches a CUDA driver.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from pkgutil import iter_modules
from typing import Any

import torch

from efficientad_fast import native, ops
from efficientad_fast.errors import BackendError, DetectorFileError
from efficientad_fast.version import __version__


def collect() -> dict[str, Any]:
    """Everything that `render` prints, as plain values.

    Keys: ``versions`` (name to str or None), ``build`` (see `native.build_info`), ``compiled_in`` (of ``_C``, or
    None), ``cpu_features`` (name to bool, or None), ``gpus`` (list of name and capability), ``backends`` (name to
    ``works`` and ``detail``), ``teacher`` (str).
    """
    gpus = _gpus()
    return {
        "versions": _versions(),
        "build": native.build_info(),
        "build_left_out": {name: native.why_not_built(name) for name in ("extension", "cpu", "cuda")},
        "compiled_in": native.extension().build_info() if _extension_imports() else None,
        "cpu_features": native.extension().cpu_features() if _extension_imports() else None,
        "gpus": gpus,
        "backends": {
            "reference": _works("plain PyTorch" + (", on the CPU and on CUDA" if gpus else ", on the CPU")),
            "cpu": _cpu_backend(),
            "cuda": _cuda_backend(gpus),
            "triton": _triton_backend(gpus),
        },
        "teacher": _teacher(),
    }


def render(info: dict[str, Any]) -> str:
    """The report of `collect` as lines of text."""
    lines = [f"{name:<18} {value or 'not installed'}" for name, value in info["versions"].items()]
    lines += ["", "Built"]
    build = info["build"]
    for name, reason in info["build_left_out"].items():
        lines.append(f"  {_TITLES[name]:<16} {'yes' if reason is None else f'no: {reason}'}")
    if build is not None:
        if build["built"]:
            lines.append(f"  {'built with':<16} PyTorch {build['torch']}, {build['cxx']}, Python {build['python']}")
        if build["cuda_archs"]:
            lines.append(f"  {'CUDA':<16} nvcc {build['nvcc']}, for {', '.join(build['cuda_archs'])}")
    if info["compiled_in"] is not None:
        compiled = info["compiled_in"]
        lines.append(f"  {'compiler':<16} {compiled['compiler']}, C++ {compiled['cpp_standard']}, {compiled['flags']}")
    lines += ["", "This machine"]
    features = info["cpu_features"]
    if features is None:
        lines.append(f"  {'CPU':<16} features unknown: the module _C is missing")
    else:
        lines.append(f"  {'CPU':<16} {', '.join(n.upper() for n, there in features.items() if there) or 'no features'}")
    gpus = ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in info["gpus"])
    lines.append(f"  {'GPU':<16} {gpus or 'none that PyTorch can use'}")
    lines += ["", "Backends"]
    for name, state in info["backends"].items():
        lines.append(f"  {name:<16} {'works' if state['works'] else 'does not work here'}: {state['detail']}")
    lines += ["", f"Default teacher: {info['teacher']}"]
    return "\n".join(lines)


def render_summary(summary: Mapping[str, object]) -> str:
    """What `Detector.summary` tells, a line each."""
    return "\n".join(f"{name:<18} {_one_line(value)}" for name, value in summary.items())


def _one_line(value: object) -> str:
    return ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, Mapping) else str(value)


_TITLES = {"extension": "module _C", "cpu": "CPU library", "cuda": "CUDA library"}


def _versions() -> dict[str, str | None]:
    return {
        "efficientad-fast": __version__,
        "Python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "PyTorch": torch.__version__,
        "CUDA of PyTorch": torch.version.cuda or "none: a CPU build",
        "Triton": _installed("triton"),
    }


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, str]]:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
    return found


def _works(detail: str) -> dict[str, Any]:
    return {"works": True, "detail": detail}


def _fails(reason: str) -> dict[str, Any]:
    return {"works": False, "detail": reason}


def _extension_imports() -> bool:
    try:
        native.extension()
    except BackendError:
        return False
    return True


def _run(name: native.Library) -> dict[str, Any]:
    """Loads a library and runs its smallest operator."""
    x = torch.arange(6, device=name)
    try:
        ops.load_implementation(name)
        y = getattr(torch.ops, f"efficientad_fast_{name}").identity(x)
    except (BackendError, RuntimeError) as error:
        return _fails(str(error))
    if not torch.equal(x, y):
        return _fails("its identity operator returns wrong values")
    return _works("compiled operators run")


def _cpu_backend() -> dict[str, Any]:
    reason = native.why_not_built("cpu")
    return _run("cpu") if reason is None else _fails(f"not built: {reason}")


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a CPU build"
    return "PyTorch finds no GPU that it can use (none there, no driver, or none visible)"


def _cuda_backend(gpus: list[dict[str, str]]) -> dict[str, Any]:
    reason = native.why_not_built("cuda")
    if reason is not None:
        return _fails(f"not built: {reason}")
    if not gpus:
        return _fails(_no_gpu())
    archs: list[str] = (native.build_info() or {})["cuda_archs"]
    if not native.covers(archs, gpus[0]["capability"]):
        return _fails(
            f"the library is compiled for {', '.join(archs)} and {gpus[0]['name']} has compute capability "
            f"{gpus[0]['capability']}; install again with EFFICIENTAD_FAST_CUDA_ARCHS={gpus[0]['capability']}"
        )
    return _run("cuda")


def _triton_backend(gpus: list[dict[str, str]]) -> dict[str, Any]:
    spec = importlib.util.find_spec("efficientad_fast.triton_kernels")
    if spec is None:
        return _fails("its kernels are outside the package until this source tree is installed")
    if not any(iter_modules(spec.submodule_search_locations)):
        return _fails(f"version {__version__} has no Triton kernels")
    if _installed("triton") is None:
        return _fails("Triton is not installed")
    if not gpus:
        return _fails(_no_gpu())
    return _works("kernels are compiled at first use")


def _teacher() -> str:
    # Not needed by the rest of the report, which also helps where the weights are what is wrong.
    from efficientad_fast.weights import default_teacher_info

    try:
        return default_teacher_info()
    except DetectorFileError as error:
        return f"missing: {error}"
