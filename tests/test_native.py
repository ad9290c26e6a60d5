"""Finding and loading what was compiled, the living operator, and the report of `efficientad-fast info`."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efficientad_fast import info, native, ops
from efficientad_fast.errors import BackendError
from efficientad_fast.ops import identity

PACKAGE = Path(native.__file__).parent
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool)

needs_cpu_library = pytest.mark.skipif(
    not native.is_built("cpu"), reason=f"no CPU library: {native.why_not_built('cpu')}"
)
needs_cuda_library = pytest.mark.skipif(
    not native.is_built("cuda"), reason=f"no CUDA library: {native.why_not_built('cuda')}"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder to put build information and libraries into, with no other installed."""
    monkeypatch.delenv(native.LIBRARIES_VARIABLE, raising=False)
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native.importlib.metadata, "distributions", lambda **_: [])
    caches = (native.build_info, native.load, native.extension)
    # A library is loaded for good, so what was remembered of the real one is put back by loading again.
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def write_info(package: Path, **changes: Any) -> None:
    info = {
        "version": "0.1.0",
        "mode": "auto",
        "platform": "Linux x86_64",
        "python": "3.11.7",
        "torch": "2.13.0",
        "torch_cuda": None,
        "cxx": "c++ 12",
        "nvcc": None,
        "cuda_archs": [],
        "built": ["extension", "cpu", "cuda"],
        "left_out": {},
    }
    (package / "build_info.json").write_text(json.dumps(info | changes), encoding="utf-8")


def run_python(code: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh Python without editable installs, in `folder`, with `paths` first on its path.

    Libraries are looked for in the package that is found there.
    """
    environment = {key: value for key, value in os.environ.items() if key != native.LIBRARIES_VARIABLE}
    site_packages = [entry for entry in sys.path if "site-packages" in entry]
    lines = [f"import sys; sys.path[:] = {[str(p) for p in paths]!r} + sys.path + {site_packages!r}", code]
    return subprocess.run(
        [sys.executable, "-S", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# Finding and loading


def test_a_tree_that_was_never_built_says_so(package: Path) -> None:
    assert native.build_info() is None
    assert not native.is_built("cpu")
    with pytest.raises(BackendError, match=r"CPU library is not part .* never built; run make test or pip install"):
        native.load("cpu")
    with pytest.raises(BackendError, match=r"_C is not part .* never built"):
        native.extension()


def test_what_was_left_out_gives_its_reason(package: Path) -> None:
    write_info(package, built=["cpu"], left_out={"cuda": "nvcc was not found"})
    assert native.is_built("cpu")
    with pytest.raises(BackendError, match=r"CUDA library is not part .*: nvcc was not found\. .*BUILD=cuda"):
        native.load("cuda")


def test_a_missing_file_is_named(package: Path) -> None:
    write_info(package)
    with pytest.raises(BackendError, match=r"libefficientad_fast_cpu.so is gone; install efficientad-fast again"):
        native.library_path("cpu")


def test_a_damaged_library_is_reported_with_its_path(package: Path) -> None:
    write_info(package)
    (package / "libefficientad_fast_cpu.so").write_bytes(b"not a library")
    with pytest.raises(BackendError, match=r"libefficientad_fast_cpu.so does not load under PyTorch .* built with"):
        native.load("cpu")


def test_damaged_build_info_is_reported(package: Path) -> None:
    (package / "build_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(BackendError, match=r"build_info.json cannot be read .* install efficientad-fast again"):
        native.build_info()


def test_another_folder_of_libraries_is_taken_and_must_have_them(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = package / "other"
    other.mkdir()
    monkeypatch.setenv("EFFICIENTAD_FAST_LIBRARIES", str(other))
    with pytest.raises(BackendError, match=r"LIBRARIES must name a folder with a build_info.json, got"):
        native.is_built("cpu")
    write_info(other, built=["cpu"], left_out={"extension": "off", "cuda": "off"})
    (other / "libefficientad_fast_cpu.so").touch()
    assert native.library_path("cpu") == other / "libefficientad_fast_cpu.so"
    assert not native.is_built("cuda")


def test_an_old_pytorch_is_told_what_is_needed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_info(package)
    (package / "libefficientad_fast_cpu.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(BackendError, match=r"needs PyTorch 2.11 or later; this is 2.9.1"):
        native.load("cpu")


def test_the_cuda_library_needs_a_cuda_build(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_info(package)
    (package / "libefficientad_fast_cuda.so").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match="needs a CUDA build of PyTorch"):
        native.load("cuda")


def test_sanitizers_of_a_build_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE.parent))
    backend = importlib.import_module("build_backend")
    asked = {"EFFICIENTAD_FAST_SANITIZE": "address, undefined"}
    assert backend.requested_sanitizers(asked) == ("address", "undefined")
    assert backend.requested_sanitizers({}) == ()
    with pytest.raises(SystemExit, match=r"'memory' is not known: use some of address, undefined"):
        backend.requested_sanitizers({"EFFICIENTAD_FAST_SANITIZE": "address,memory"})


def test_lines_of_kernels_are_asked_for_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE.parent))
    backend = importlib.import_module("build_backend")
    asked = [backend.requested_lineinfo({"EFFICIENTAD_FAST_LINEINFO": value}) for value in ("1", " 1", "0", "")]
    assert asked == [True, True, False, False]
    assert backend.requested_lineinfo({}) is False
    with pytest.raises(SystemExit, match=r"EFFICIENTAD_FAST_LINEINFO='yes' is not known: use 1"):
        backend.requested_lineinfo({"EFFICIENTAD_FAST_LINEINFO": "yes"})


def test_importing_loads_and_probes_nothing() -> None:
    code = """
import torch
def refuse(*args): raise AssertionError("loaded or probed at import")
torch.ops.load_library = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
import efficientad_fast.info, efficientad_fast.native, efficientad_fast.ops
assert "efficientad_fast._C" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    result = run_python(code, PACKAGE.parent, PACKAGE.parent)
    assert result.returncode == 0, result.stderr


def test_a_tree_that_hides_an_installed_package_says_so(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("build_info.json", "*.so", "__pycache__")
    for folder in ("checkout", "site"):
        shutil.copytree(PACKAGE, tmp_path / folder / "efficientad_fast", ignore=ignore)
    write_info(tmp_path / "site" / "efficientad_fast")
    metadata = tmp_path / "site" / "efficientad_fast-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: efficientad-fast\nVersion: 0.1.0\n", encoding="utf-8")
    code = "from efficientad_fast import native; native.load('cpu')"
    result = run_python(code, tmp_path, tmp_path / "checkout", tmp_path / "site")
    message = result.stderr.strip().splitlines()[-1]
    assert "source tree that was never built" in message
    assert f"hides the one installed in {tmp_path / 'site' / 'efficientad_fast'}" in message


# The operator


def strided(shape: list[int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    x = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    if layout == "reversed":
        return x.permute(tuple(reversed(range(x.dim()))))
    if layout == "stepped" and x.dim():
        return x[..., ::2]
    return x


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    ops.load()


def implementations() -> list[Any]:
    return [torch.ops.efficientad_fast.identity] + (
        [torch.ops.efficientad_fast_cpu.identity] if native.is_built("cpu") else []
    )


@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "reversed", "stepped"]),
)
def test_identity_copies(shape: list[int], dtype: torch.dtype, layout: str) -> None:
    x = strided(shape, dtype, layout)
    for operator in implementations():
        y = operator(x)
        assert torch.equal(y, x)
        assert y.dtype == x.dtype
        assert y.is_contiguous()
        assert y.numel() == 0 or y.data_ptr() != x.data_ptr()


def test_identity_copies_more_than_one_thread_takes() -> None:
    x = torch.arange(300_007)
    for operator in implementations():
        assert torch.equal(operator(x), x)


def test_identity_passes_opcheck() -> None:
    for operator in implementations():
        for x in (torch.randn(3, 4, 5), torch.randn(4, 0), torch.randn(4, 3, requires_grad=True).t()):
            torch.library.opcheck(operator.default, (x,))


def test_identity_is_differentiable() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.efficientad_fast.identity, (x,))


def test_identity_exports() -> None:
    class Copy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.efficientad_fast.identity(x) + 1

    x = torch.randn(4, 6).t()
    assert torch.equal(torch.export.export(Copy(), (x,)).module()(x), x + 1)


@needs_cpu_library
def test_a_cpu_kernel_refuses_what_is_not_dense() -> None:
    with pytest.raises(NotImplementedError, match="efficientad_fast_cpu::identity"):
        torch.ops.efficientad_fast_cpu.identity(torch.eye(2).to_sparse())


@needs_cpu_library
def test_nan_is_black_where_there_are_levels_only() -> None:
    """Pillow's resize is of 8-bit levels, of which none stands for NaN; converting one is undefined in C++."""
    image = torch.rand(1, 9, 20, 3)
    black = image.clone()
    image[0, 2:5], black[0, 2:5] = torch.nan, 0
    results = [torch.ops.efficientad_fast_cpu.preprocess(one, [5, 7], resize="pillow") for one in (image, black)]
    assert torch.equal(*results)


def test_the_operators_exist_without_a_library(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("build_info.json", "*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "efficientad_fast", ignore=ignore)
    code = """
import torch
from efficientad_fast import native, ops
assert not native.is_built("cpu")
ops.load()
x = torch.randn(5, 3, requires_grad=True).t()
y = torch.ops.efficientad_fast.identity(x)
assert torch.equal(x, y) and y.is_contiguous()
torch.library.opcheck(torch.ops.efficientad_fast.identity.default, (x.detach(),))
print(torch.ops.efficientad_fast.identity.default._schema)
"""
    result = run_python(code, tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "efficientad_fast::identity(Tensor x) -> Tensor"


def test_schemas_are_read_and_registered() -> None:
    assert "identity(Tensor x) -> Tensor" in ops.schemas()
    for schema in ops.schemas():
        registered = torch._C.parse_schema(f"efficientad_fast::{schema}")
        operator = getattr(torch.ops.efficientad_fast, registered.name.partition("::")[2])
        assert str(getattr(operator, registered.overload_name or "default")._schema) == str(registered)


def test_an_operator_younger_than_the_built_libraries_runs_by_its_reference() -> None:
    code = """
import sys, types, torch
from efficientad_fast import ops
from efficientad_fast.ops.overload import Overload

newcomer = types.ModuleType("efficientad_fast.ops.newcomer")
newcomer.overloads = {"default": Overload(lambda x: x + 1, torch.empty_like)}
sys.modules[newcomer.__name__] = newcomer
written = ops.schemas()
ops.schemas = lambda: (*written, "newcomer(Tensor x) -> Tensor")
ops.load()
if "cpu" in ops.implementations():
    assert not ops.has_kernel("cpu", "newcomer", "CPU")
print(torch.ops.efficientad_fast.newcomer(torch.zeros(2)).tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[1.0, 1.0]", result.stderr


@pytest.mark.gpu
@needs_cuda_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_copies_on_a_gpu(dtype: torch.dtype) -> None:
    ops.load_implementation("cuda")
    for shape in ([], [0], [1], [7, 5], [3, 129, 257]):
        x = strided(shape, dtype, "reversed").cuda()
        for operator in (torch.ops.efficientad_fast.identity, torch.ops.efficientad_fast_cuda.identity):
            y = operator(x)
            assert torch.equal(y, identity.reference(x))
            assert y.is_contiguous()


@pytest.mark.gpu
@needs_cuda_library
def test_identity_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 24, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        y = torch.ops.efficientad_fast.identity(x)
    stream.synchronize()
    assert bool((y == 1).all())


# The report


def test_info_reports_this_machine() -> None:
    report = info.collect()
    json.dumps(report)
    assert report["backends"]["reference"]["works"]
    assert report["backends"]["cpu"]["works"] == native.is_built("cpu")
    assert report["versions"]["PyTorch"] == torch.__version__
    text = info.render(report)
    for name in ("reference", "cpu", "cuda", "triton", "CPU library", "Default teacher", torch.__version__):
        assert name in text


def test_info_of_a_tree_that_was_never_built(package: Path) -> None:
    report = info.collect()
    assert report["build"] is None
    assert report["backends"]["reference"]["works"]
    assert "never built" in report["backends"]["cpu"]["detail"]
    assert "features unknown" in info.render(report)


def test_info_says_why_cuda_does_not_work(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_info(package, built=[], left_out={"extension": "off", "cpu": "off", "cuda": "nvcc was not found"})
    assert "nvcc was not found" in info.render(info.collect())
    write_info(package, cuda_archs=["8.0", "9.0+PTX"])
    native.build_info.cache_clear()
    monkeypatch.setattr(info, "_gpus", lambda: [])
    assert "PyTorch" in info.collect()["backends"]["cuda"]["detail"]
    monkeypatch.setattr(info, "_gpus", lambda: [{"name": "Some GPU", "capability": "7.5"}])
    detail = info.collect()["backends"]["cuda"]["detail"]
    assert "Some GPU has compute capability 7.5" in detail
    assert "EFFICIENTAD_FAST_CUDA_ARCHS=7.5" in detail


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["8.0"], "8.0", True),
        (["8.0"], "8.6", True),
        (["8.6"], "8.0", False),
        (["8.0"], "9.0", False),
        (["8.0", "9.0+PTX"], "12.0", True),
        (["9.0+PTX"], "8.9", False),
        (["9.0a"], "9.0", True),
        (["9.0a+PTX"], "10.0", False),
        (["10.0f"], "10.3", True),
        (["10.0f"], "11.0", False),
        ([], "9.0", False),
    ],
)
def test_which_gpus_a_library_covers(archs: list[str], capability: str, expected: bool) -> None:
    assert native.covers(archs, capability) is expected


# Loading and choosing


def test_threads_that_load_at_once_load_once() -> None:
    code = """
import threading
from efficientad_fast import ops
barrier, errors = threading.Barrier(8), []
def work(index):
    barrier.wait()
    try:
        ops.load()
        for name in ops.implementations():
            if name != "cuda":
                ops.load_implementation(name)
    except BaseException as error:  # whatever ends a thread is shown to the test
        errors.append(repr(error))
threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(errors)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of capability 7.5, and a CUDA library alone, with code for later ones."""
    for cache in (ops.choose, ops._works_on, ops._has_instructions):
        cache.cache_clear()
    ops.load()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(native, "cuda_archs", lambda: ["8.0", "9.0+PTX"])
    monkeypatch.setattr(ops, "_is_installed", lambda implementation: implementation == "cuda")
    yield
    for cache in (ops.choose, ops._works_on, ops._has_instructions):
        cache.cache_clear()


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_without_code_takes_the_reference_and_is_told_what_to_do() -> None:
    with pytest.warns(RuntimeWarning, match=r"8\.0, 9\.0\+PTX and none for this GPU's 7\.5; .*CUDA_ARCHS=7\.5"):
        assert ops.choose("anomaly_map", 0) is ops.overload("anomaly_map").reference
    assert ops.choose("preprocess.out", 0) is ops.overload("preprocess.out").reference  # told once


@pytest.mark.usefixtures("a_gpu")
def test_a_library_that_does_not_load_is_passed_over_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(implementation: str) -> None:
        raise BackendError("it is for another PyTorch")

    monkeypatch.setattr(native, "cuda_archs", lambda: ["7.5"])
    monkeypatch.setattr(ops, "load_implementation", load)
    with pytest.warns(RuntimeWarning, match="it is for another PyTorch"):
        assert ops.choose("anomaly_map", 0) is ops.overload("anomaly_map").reference


@needs_cuda_library
def test_a_gpu_that_the_library_has_code_for_takes_it(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_archs", lambda: ["7.5"])
    assert ops.choose("anomaly_map", 0) is torch.ops.efficientad_fast_cuda.anomaly_map.default


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("capability", "archs", "told"),
    [
        ((7, 0), ["7.0"], "conv_pool, .*autoencoder by cuda need compute capability 8.0, and this GPU has 7.0$"),
        ((6, 1), ["6.0+PTX", "8.0"], "by cuda need compute capability 8.0, and this GPU has 6.1$"),
        ((9, 0), ["7.5+PTX"], r"this GPU has 9.0, but code for 7.5\+PTX; .*CUDA_ARCHS=9.0$"),
        ((8, 6), ["7.5", "8.0", "9.0"], None),
    ],
)
def test_kernels_whose_instructions_a_gpu_or_its_code_lacks_are_passed_over(
    capability: tuple[int, int], archs: list[str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(native, "cuda_archs", lambda: archs)
    monkeypatch.setattr(ops, "load_implementation", lambda implementation: None)
    monkeypatch.setattr(ops, "has_kernel", lambda implementation, name, device: True)
    monkeypatch.setattr(ops, "resolve", lambda namespace, name: (namespace, name))
    needing = [name for name in ops.qualified_names() if ops.least_capability("cuda", name.partition(".")[0]) == "8.0"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = {name: ops.choose(name, 0) for name in ops.qualified_names()}
    for name, implementation in chosen.items():
        passed_over = told is not None and name in needing
        assert implementation == (ops.overload(name).reference if passed_over else ("efficientad_fast_cuda", name))
    assert {"conv_pool.mixed", "feature_distance.mixed", "autoencoder.mixed"} <= set(needing)
    assert len(caught) == (told is not None)
    for warning in caught:
        assert re.search(told or "", str(warning.message)), str(warning.message)


@pytest.mark.usefixtures("a_gpu")
def test_the_stem_of_many_pixels_is_a_case_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(images: int, dtype: torch.dtype = torch.float16, channels: int = 4, **settings: Any) -> str | None:
        with torch.device("meta"):
            image, weight = torch.empty(images, channels, 256, 256), torch.empty(256, channels, 4, 4)
            out = torch.empty(images, 256, 126, 126)
        given = {"pool": True, **settings}
        return ops.case_of("conv_pool.mixed", image.to(dtype), weight.to(dtype), None, None, **given, out=out)

    assert case(8) == case(32, torch.bfloat16) == "stem"
    assert [case(1), case(8, torch.float32), case(8, channels=8), case(8, pool=False)] == [None] * 4
    assert ops.case_of("anomaly_map", "whatever it is") is None

    monkeypatch.setattr(ops, "_is_installed", lambda implementation: True)
    monkeypatch.setattr(ops, "load_implementation", lambda implementation: None)
    monkeypatch.setattr(ops, "has_kernel", lambda implementation, name, device: True)
    monkeypatch.setattr(ops, "resolve", lambda namespace, name: namespace)
    for capability, stem in (((9, 0), "efficientad_fast_cuda"), ((8, 0), "efficientad_fast_triton")):
        ops.choose.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert ops.choose("conv_pool.mixed", 0, "stem") == stem
        assert ops.choose("conv_pool.mixed", 0) == "efficientad_fast_triton"


@pytest.mark.usefixtures("a_gpu")
def test_triton_makes_nothing_for_gpus_before_7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_is_installed", lambda implementation: implementation == "triton")
    monkeypatch.setattr(ops, "load_implementation", lambda implementation: None)
    monkeypatch.setattr(ops, "has_kernel", lambda implementation, name, device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    with pytest.warns(RuntimeWarning, match="by triton need compute capability 7.0, and this GPU has 6.1$") as told:
        chosen = [ops.choose(name, 0) for name in ("conv_pool.mixed", "quantile", "anomaly_map")]
    assert chosen == [ops.overload(name).reference for name in ("conv_pool.mixed", "quantile", "anomaly_map")]
    assert len(told) == 1


def test_a_source_tree_that_was_never_installed_has_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = ops.importlib.util.find_spec
    missing = "efficientad_fast.triton_kernels"

    def find_spec(name: str) -> Any:
        if name == missing:
            return None
        if name.startswith(missing):
            raise ModuleNotFoundError(name)
        return find(name)

    monkeypatch.setattr(ops.importlib.util, "find_spec", find_spec)
    assert "triton" not in ops.implementations()


@needs_cpu_library
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_kernels_of_lesser_processors(level: str) -> None:
    """The best level runs everywhere else; the processor may have less than is asked for."""
    selected = ["tests/test_operators.py", "-k", "cpu-cpu and (test_results or test_drawn_shapes) and not memory"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "EFFICIENTAD_FAST_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"[1-9]\d* passed", result.stdout)


def test_memory_is_kept_together_where_the_system_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Glibc:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            return asked.append((option, value)) or 1

    for library in (Glibc(), object()):
        monkeypatch.setattr(native.ctypes, "CDLL", lambda name, library=library: library)
        native.keep_memory_together()
    assert asked == [(-8, 2)]
