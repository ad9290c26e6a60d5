"""What is in the sdist and the wheel, and what the build does with its settings.

Everything is built from a copy of the sources, with the tools of the environment that runs the tests. The CUDA
library is not compiled here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MODULE_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything built; building in it leaves the checkout as it was."""
    folder = tmp_path_factory.mktemp("packaging") / "sources"
    left = shutil.ignore_patterns(
        ".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "*.so", "build_info.json", "results"
    )
    shutil.copytree(ROOT, folder, ignore=left)
    return folder


def environment(**settings: str) -> dict[str, str]:
    """The environment of a build, with these settings and none that the tests were started with."""
    ours = ("EFFICIENTAD_FAST_", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | settings


def run(*command: str | Path, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def build(sources: Path, out: Path, what: str = "wheel", **settings: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", out, sources)
    return run(*command, cwd=sources, env=environment(**settings))


def built(sources: Path, out: Path, what: str = "wheel", **settings: str) -> Path:
    result = build(sources, out, what, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = out.iterdir()
    return file


def unpacked(archive: Path, folder: Path) -> Path:
    """The folder that the archive's content lies in."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return folder
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def use(site: Path, code: str, elsewhere: Path) -> str:
    """Runs code where `site` is the only folder that has the package: no editable install, no checkout."""
    site_packages = [entry for entry in sys.path if "site-packages" in entry]
    prepare = f"import sys, site; site.addsitedir({str(site)!r}); sys.path += {site_packages!r}"
    result = run(sys.executable, "-S", "-c", f"{prepare}\n{code}", cwd=elsewhere, env=environment())
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = built(sources, tmp_path_factory.mktemp("sdist"), "sdist", EFFICIENTAD_FAST_BUILD="none")
    return unpacked(archive, tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def cpu_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the CPU library, built from the sdist."""
    return built(sdist, tmp_path_factory.mktemp("cpu_wheel"), EFFICIENTAD_FAST_BUILD="cpu")


@pytest.fixture(scope="module")
def site(cpu_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(cpu_wheel, tmp_path_factory.mktemp("site"))


def python_sources() -> set[str]:
    folders = {"efficientad_fast": "efficientad_fast", "triton_kernels": "efficientad_fast/triton_kernels"}
    return {
        f"{installed}/{path.relative_to(ROOT / folder)}"
        for folder, installed in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def package_data() -> set[str]:
    package = ROOT / "efficientad_fast"
    patterns = ("py.typed", "ops/schemas.inc", "ops/choices.json", "weights/*.safetensors", "report/*.j2")
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in package.glob(pattern)}


# What is inside


def test_the_sdist_has_what_a_build_needs_and_nothing_else(sdist: Path) -> None:
    files = files_below(sdist)
    needed = {"setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "triton_kernels").rglob("*.py")}
    needed |= {name for name in python_sources() if "/triton_kernels/" not in name} | package_data()
    assert needed <= files, f"missing: {sorted(needed - files)}"
    allowed = ("csrc/", "efficientad_fast/", "triton_kernels/", "efficientad_fast.egg-info/")
    extra = {f for f in files - needed if not f.startswith(allowed)} - {"MANIFEST.in", "Makefile", "setup.cfg"}
    assert not extra
    assert not [f for f in files if f.endswith((".so", ".pyc", "build_info.json"))]


def test_the_wheel_has_the_package_and_its_libraries(cpu_wheel: Path, site: Path) -> None:
    files = {name for name in files_below(site) if ".dist-info/" not in name}
    compiled = {f"efficientad_fast/_C{MODULE_SUFFIX}", "efficientad_fast/libefficientad_fast_cpu.so"}
    expected = python_sources() | package_data() | compiled | {"efficientad_fast/build_info.json"}
    assert files == expected
    assert cpu_wheel.name.startswith(f"efficientad_fast-0.1.0-cp{sys.version_info.major}{sys.version_info.minor}-")
    (metadata,) = site.glob("*.dist-info")
    assert "efficientad_fast.cli:main" in (metadata / "entry_points.txt").read_text(encoding="utf-8")
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text(encoding="utf-8")


def test_the_cpu_library_links_neither_python_nor_cuda(site: Path) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    library = site / "efficientad_fast" / "libefficientad_fast_cpu.so"
    output = run(readelf, "-d", library, cwd=site, env=environment()).stdout
    needed = [line.split("[")[1].rstrip("]") for line in output.splitlines() if "(NEEDED)" in line]
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]


def test_the_wheel_works_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    code = """
import json, torch
from efficientad_fast import info, native, ops
import efficientad_fast.triton_kernels
ops.load()
x = torch.randn(4, 5).t()
assert torch.equal(torch.ops.efficientad_fast_cpu.identity(x), x)
assert native.extension().cpu_features().keys() == {"avx2", "avx512", "fma", "neon"}
facts = info.collect()
print(json.dumps([native.__file__, efficientad_fast.triton_kernels.__file__, facts["backends"], info.render(facts)]))
"""
    native_file, triton_file, backends, text = json.loads(use(site, code, tmp_path))
    assert native_file.startswith(str(site))
    assert triton_file == str(site / "efficientad_fast" / "triton_kernels" / "__init__.py")
    assert backends["cpu"]["works"]
    assert not backends["cuda"]["works"]
    assert "EFFICIENTAD_FAST_BUILD=cpu was set when it was installed" in text


# Without compiling


def test_none_builds_without_pytorch_and_imports(sources: Path, tmp_path: Path) -> None:
    poison = tmp_path / "poison"
    poison.mkdir()
    for name in ("torch", "ninja", "pybind11"):
        (poison / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')", encoding="utf-8")
    out = tmp_path / "dist"
    wheel = built(sources, out, EFFICIENTAD_FAST_BUILD="none", PYTHONPATH=str(poison))
    assert wheel.name == "efficientad_fast-0.1.0-py3-none-any.whl"
    site = unpacked(wheel, tmp_path / "site")
    assert not [name for name in files_below(site) if name.endswith(".so")]
    code = """
import torch
from efficientad_fast import native, ops
ops.load()
print(torch.ops.efficientad_fast.identity(torch.arange(3)).tolist(), native.why_not_built("cpu"))
import wheel_smoke
wheel_smoke.check_prediction()
"""
    shutil.copy(ROOT / "tests" / "wheel_smoke.py", site)
    printed = use(site, code, tmp_path)
    assert printed.strip() == "[0, 1, 2] EFFICIENTAD_FAST_BUILD=none was set when it was installed"


def test_an_editable_install_maps_triton_kernels(sources: Path, tmp_path: Path) -> None:
    code = "import sys, build_backend; print(build_backend.build_editable(sys.argv[1]))"
    settings = environment(EFFICIENTAD_FAST_BUILD="none", PYTHONPATH=str(sources))
    result = run(sys.executable, "-c", code, tmp_path, cwd=sources, env=settings)
    assert result.returncode == 0, result.stderr
    try:
        site = unpacked(next(tmp_path.glob("*.whl")), tmp_path / "site")
        code = "from efficientad_fast import native as n, triton_kernels as t; print(t.__file__, n.__file__)"
        triton_file, native_file = use(site, code, tmp_path).split()
        assert Path(triton_file) == sources / "triton_kernels" / "__init__.py"
        assert Path(native_file) == sources / "efficientad_fast" / "native.py"
        info = json.loads((sources / "efficientad_fast" / "build_info.json").read_text(encoding="utf-8"))
        assert info["left_out"].keys() == {"extension", "cpu", "cuda"}
    finally:
        (sources / "efficientad_fast" / "build_info.json").unlink(missing_ok=True)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"EFFICIENTAD_FAST_BUILD": "gpu"}, "'gpu' is not known: use one of auto, none, cpu, cuda."),
        (
            {"EFFICIENTAD_FAST_BUILD": "cpu", "EFFICIENTAD_FAST_CUDA_ARCHS": "8.0,hopper"},
            "cannot be read at 'hopper': give compute capabilities separated by commas",
        ),
    ],
)
def test_a_setting_that_cannot_be_read_ends_the_build(
    sources: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    result = build(sources, tmp_path / "dist", **settings)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_cuda_fails_without_nvcc(sources: Path, tmp_path: Path) -> None:
    result = build(sources, tmp_path / "dist", EFFICIENTAD_FAST_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    message = "EFFICIENTAD_FAST_BUILD=cuda: the CUDA library cannot be built: nvcc was not found"
    assert message in result.stdout + result.stderr


def test_without_a_compiler_auto_builds_nothing_and_cpu_fails(sources: Path, tmp_path: Path) -> None:
    no_compiler = {"CXX": str(tmp_path / "absent")}
    wheel = built(sources, tmp_path / "dist", EFFICIENTAD_FAST_BUILD="auto", **no_compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    site = unpacked(wheel, tmp_path / "site")
    info = json.loads((site / "efficientad_fast" / "build_info.json").read_text(encoding="utf-8"))
    assert "no C++ compiler was found" in info["left_out"]["cpu"]
    result = build(sources, tmp_path / "refused", EFFICIENTAD_FAST_BUILD="cpu", **no_compiler)
    assert result.returncode != 0
    assert "EFFICIENTAD_FAST_BUILD=cpu: the module _C cannot be built: there is no C++" in result.stdout + result.stderr


def fake_nvcc(home: Path) -> None:
    """An nvcc that answers questions and compiles nothing."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 99.9, V99.9.41' ;;\n"
        "--list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_120\\n' ;;\n"
        "esac\n",
        encoding="utf-8",
    )
    nvcc.chmod(0o755)


def test_auto_states_why_cuda_was_left_out(sources: Path, tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "toolkit")
    settings = {"EFFICIENTAD_FAST_BUILD": "auto", "CUDA_HOME": str(tmp_path / "toolkit")}
    result = build(sources, tmp_path / "dist", **settings)
    assert result.returncode == 0, result.stderr
    if torch.version.cuda is None:
        reason = f"PyTorch {torch.__version__} is not a CUDA build"
    else:
        reason = f"nvcc is of CUDA 99.9 and PyTorch of CUDA {torch.version.cuda}"
    assert "efficientad_fast: CUDA library: left out: " in result.stdout
    assert reason in result.stdout
    assert "efficientad_fast: CPU library: built" in result.stdout
    site = unpacked(next((tmp_path / "dist").iterdir()), tmp_path / "site")
    info = json.loads((site / "efficientad_fast" / "build_info.json").read_text(encoding="utf-8"))
    assert reason in info["left_out"]["cuda"]
    assert info["built"] == ["extension", "cpu"]


# The backend's own functions


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_backend"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_pytorch_is_asked_for_only_when_something_is_compiled(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hooks: list[Callable[[], list[str]]] = [
        backend.get_requires_for_build_wheel,
        backend.get_requires_for_build_editable,
    ]
    for mode, compiler, expected in (
        ("none", True, False),
        ("cpu", False, True),
        ("cuda", False, True),
        ("auto", True, True),
        ("auto", False, False),
    ):
        monkeypatch.setenv("EFFICIENTAD_FAST_BUILD", mode)
        monkeypatch.setenv("CXX", sys.executable if compiler else str(tmp_path / "absent"))
        for hook in hooks:
            assert any(requirement.startswith("torch>=2.11") for requirement in hook()) is expected
    assert backend.get_requires_for_build_sdist() == []


def test_architectures(backend: ModuleType, tmp_path: Path) -> None:
    assert backend.requested_architectures({}) is None
    requested = backend.requested_architectures({"EFFICIENTAD_FAST_CUDA_ARCHS": "8.0; 9.0a,12.0+PTX"})
    assert [str(architecture) for architecture in requested] == ["8.0", "9.0a", "12.0+PTX"]
    assert [flag for architecture in requested for flag in architecture.flags()] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    fake_nvcc(tmp_path)
    nvcc = backend.Nvcc(backend.find_nvcc({"CUDA_HOME": str(tmp_path)}))
    assert nvcc.version() == "99.9"
    assert nvcc.choose(requested) == requested
    assert [str(architecture) for architecture in nvcc.choose(None)] == ["8.0", "9.0+PTX"]
    unknown = backend.requested_architectures({"EFFICIENTAD_FAST_CUDA_ARCHS": "8.0,7.5"})
    with pytest.raises(ValueError, match=r"does not compile for 7.5; it knows 8.0, 9.0, 12.0"):
        nvcc.choose(unknown)


def test_versions_are_numbers(backend: ModuleType) -> None:
    assert backend.version_tuple("2.9.1") < backend.MINIMUM_TORCH <= backend.version_tuple("2.11.0+cpu")
    assert backend.version_tuple("2.15.0a0+git123") == (2, 15)
    with pytest.raises(ValueError, match="not a version"):
        backend.version_tuple("unknown")
