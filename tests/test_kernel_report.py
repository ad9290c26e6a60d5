"""`benchmarks.kernel_report`: the tools' texts, the limits of GPUs, and faults that it must find in real kernels."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT))

from benchmarks import kernel_report
from benchmarks.kernel_report import Failure, Job
from benchmarks.reports import compiling, listings
from benchmarks.reports.architectures import ARCHITECTURES, capability, occupancy
from benchmarks.reports.compiling import CudaCompiler, Kernel, TritonCompiler, Unavailable

PTXAS_LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z7dynamicIfEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z7dynamicIfEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 128 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 12.904 ms
ptxas info    : Compiling entry function 'spilling' for 'sm_90'
ptxas info    : Function properties for spilling
    544 bytes stack frame, 1144 bytes spill stores, 1140 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 544 bytes cumulative stack size
ptxas info    : Compile time = 30.853 ms
"""

PTX = """\
.extern .shared .align 16 .b8 buffer[];

.visible .entry bounded(
	.param .u64 bounded_param_0
)
.maxntid 16, 8, 1
.minnctapersm 8
{
	.shared .align 4 .b8 fixed[128];
	mov.u32 	%r4, fixed;
	ret;
}
	// .globl	_Z7dynamicIfEvPT_
.weak .entry _Z7dynamicIfEvPT_(
	.param .u64 _Z7dynamicIfEvPT__param_0
)
{
	mov.u32 	%r4, buffer;
	ret;
}
.visible .entry by_triton(
	.param .u64 .ptr .global .align 1 by_triton_param_0
)
.reqntid 128
{
	ret;
}
"""

SASS = """\
	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R16, desc[UR4][R26.64] ;
        /*0020*/                   LDG.E.U8.CONSTANT R0, desc[UR8][R2.64] ;
        /*0030*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/               @P1 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   LDSM.16.M88.4 R8, [R4] ;
        /*0070*/                   LDS.128 R8, [R4] ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   EXIT ;
.L_x_0:
        /*00a0*/                   BRA `(.L_x_0);
        /*00b0*/                   NOP;
	.section	.text.second,"ax",@progbits
.text.second:
        /*0000*/                   STL [R0], R11 ;
        /*0010*/                   LDL.128 R8, [R1+0x10] ;
        /*0020*/                   FFMA R1, R2, R3, R4 ;
        /*0030*/                   UTMALDG.4D [UR8], [UR24], desc[URZ] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR8][R2.64], P1 ;
        /*0048*/                   LDGSTS.E.64 [R7], desc[UR8][R2.64], P1 ;
        /*0050*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, !UPT ;
        /*0060*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24, gsb0 ;
        /*0070*/                   QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4 ;
        /*0080*/              @!P0 UTCQMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0 ;
        /*0090*/                   LDTM.x128 R4, tmem[UR6] ;
"""


def test_resources_of_a_log() -> None:
    assert listings.resources(PTXAS_LOG) == {
        "_Z7dynamicIfEvPT_": listings.Resources(registers=12, stack=0, spill_stores=0, spill_loads=0, shared=128),
        "spilling": listings.Resources(registers=32, stack=544, spill_stores=1144, spill_loads=1140, shared=0),
    }
    with pytest.raises(ValueError, match="ptxas says nothing of the resources of x"):
        listings.resources("Compiling entry function 'x' for 'sm_90'\n")


def test_entries_of_ptx() -> None:
    assert listings.entries(PTX) == {
        "bounded": listings.Entry(threads=128, dynamic_shared=False),
        "_Z7dynamicIfEvPT_": listings.Entry(threads=None, dynamic_shared=True),
        "by_triton": listings.Entry(threads=128, dynamic_shared=False),
    }
    called = ".func helper(\n)\n{\n\tmov.u32 %r1, buffer;\n}\n"
    assert all(entry.dynamic_shared for entry in listings.entries(called + PTX).values())


def test_instructions_of_sass() -> None:
    found = listings.instructions(SASS)
    assert set(found) == {"first", "second"}
    assert listings.counts(found["first"]) == {
        "HMMA": 1,
        "LDG": 2,
        "STG": 1,
        "LDSM": 1,
        "LDS": 1,
        "BAR": 1,
        "LDG of 128 bits": 1,
        "STG of 128 bits": 1,
        "LDS of 128 bits": 1,
        "all": 11,
    }
    wide = {"LDGSTS of 128 bits": 1, "LDGSTS of 64 bits": 1, "LDGSTS": 2}
    later = ("UTMALDG", "LDGSTS", "HGMMA", "QGMMA", "QMMA", "UTCQMMA", "LDTM")
    assert listings.counts(found["second"]) == {name: 1 for name in ("LDL", "STL", "FFMA", *later)} | wide | {"all": 11}
    assert listings.counts(Counter()) == {"all": 0}


def test_operations_for_each_byte_loaded() -> None:
    copies = Counter({"LDGSTS.E.BYPASS.LTC128B.128": 2, "LDG.E.U16.CONSTANT": 4, "LDG.E": 1})
    loaded = 32 * (2 * 16 + 4 * 2 + 4)
    assert listings.operations_a_byte(copies + Counter({"HMMA.16816.F32": 8})) == 8 * 4096 / loaded
    assert listings.operations_a_byte(copies + Counter({"QMMA.16832.F32.E4M3.E4M3": 1})) == 8192 / loaded
    assert listings.operations_a_byte(copies) is None
    assert listings.operations_a_byte(Counter({"HMMA.16816.F32": 8, "UTMALDG.4D": 1, "LDG.E": 1})) is None


@pytest.mark.parametrize(
    "architecture, threads, registers, shared, expected",
    [
        # As NVIDIA's occupancy calculator has them.
        (80, 256, 32, 0, 1.0),
        (80, 256, 64, 0, 0.5),
        (80, 256, 33, 0, 0.75),  # 40 registers are given out
        (90, 128, 128, 0, 0.25),
        (90, 1024, 64, 0, 0.5),
        (90, 1024, 65, 0, 0.0),  # one block does not fit
        (86, 1024, 32, 0, 2 / 3),
        (89, 32, 16, 0, 0.5),  # 24 blocks of a warp
        (80, 256, 32, 48 * 1024, 3 / 8),
        (90, 256, 32, 48 * 1024, 4 / 8),
        (90, 256, 32, 227 * 1024, 1 / 8),
        (90, 256, 32, 227 * 1024 + 1, 0.0),
        (80, 33, 32, 0, 1.0),  # two warps
        (100, 32, 16, 0, 0.5),  # 32 blocks of a warp
        (100, 256, 32, 227 * 1024, 1 / 8),
        (120, 32, 16, 0, 0.5),  # 24
        (120, 256, 32, 48 * 1024, 2 / 6),
    ],
)
def test_occupancy(architecture: int, threads: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(ARCHITECTURES[architecture], threads, registers, shared) == pytest.approx(expected)


def test_tensor_memory_limits_occupancy() -> None:
    blackwell = ARCHITECTURES[100]
    assert occupancy(blackwell, 128, 32, 0, tensor_memory=128) == 4 * 4 / 64
    assert occupancy(blackwell, 128, 32, 0, tensor_memory=129) == 2 * 4 / 64
    assert occupancy(blackwell, 128, 32, 0, tensor_memory=1) == 1.0, "32 columns are given out"


def test_architectures_have_names() -> None:
    assert capability("sm_90a") == 90
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*got 'sm_75'"):
        capability("sm_75")


FINE = Kernel(
    name="x.cu x",
    kind="cuda",
    architecture="sm_80",
    resources=listings.Resources(registers=32, stack=0, spill_stores=0, spill_loads=0, shared=1024),
    threads=None,
    dynamic_shared=162 * 1024,
    counts={"LDG": 4, "LDG of 128 bits": 1, "all": 100},
)


def test_faults() -> None:
    assert FINE.faults() == []
    cases = {
        "spills registers (0 bytes stored, 8 loaded)": {"resources": replace(FINE.resources, spill_loads=8)},
        "uses local memory (16 bytes of stack)": {"resources": replace(FINE.resources, stack=16)},
        "uses local memory (0 bytes of stack)": {"counts": {"STL": 1}},
        "needs 166913 bytes of shared memory, and a block has at most 166912": {"dynamic_shared": 162 * 1024 + 1},
        "has dynamic shared memory, and no constant": {"dynamic_shared": None},
        "needs 128 columns of tensor memory, and a multiprocessor has 0": {"tensor_memory": 128},
        "is a heavy convolution and has no HMMA or QMMA": {"heavy": True},
        "is a heavy convolution and has no HGMMA or QGMMA": {
            "heavy": True,
            "kind": "triton",
            "architecture": "sm_90",
            "counts": {"HMMA": 64, "all": 100},
        },
    }
    for expected, changes in cases.items():
        (fault,) = replace(FINE, **changes).faults()
        assert fault.startswith(expected)
    for name in ("HGMMA", "QGMMA"):
        assert replace(FINE, kind="triton", heavy=True, architecture="sm_90", counts={name: 1}).faults() == []
    heavy = replace(FINE, heavy=True, architecture="sm_90", counts={"HMMA": 1, "LDG of 128 bits": 1})
    assert heavy.faults() == []
    narrow = replace(heavy, counts={"HMMA": 1, "LDG": 8})
    assert narrow.faults() == ["is a heavy convolution and loads nothing by 16 bytes a thread"]
    assert replace(narrow, made_for="Tile<(Number)1, 2, 2, false> ").faults() == []
    stem = replace(narrow, function=compiling.STEM, made_for="(Number)1, (Number)1, false")
    assert stem.faults() == ["copies nothing by 8 bytes a thread, a pixel each"]
    assert replace(stem, counts=stem.counts | {"LDGSTS of 64 bits": 1}).faults() == []


def test_which_cuda_kernels_are_heavy() -> None:
    tile, e4m3 = "Tile<(Number)1, 2, 4, true> ", "Tile<(Number)3, 2, 4, true> "
    assert compiling.is_heavy_cuda("conv_pool.cu conv_pool", tile, "sm_80")
    assert compiling.is_heavy_cuda("feature_distance.cu feature_distance", e4m3, "sm_89")
    assert compiling.is_heavy_cuda("autoencoder.cu convolve", "__half, TileShape<2, 16, 1, 1, 8, 3> ", "sm_80")
    assert not compiling.is_heavy_cuda("feature_distance.cu feature_distance", e4m3, "sm_80")
    assert not compiling.is_heavy_cuda("conv_pool.cu conv_pool", "Tile<(Number)0, 2, 2, true> ", "sm_90")
    assert not compiling.is_heavy_cuda("quantile.cu count_digits", "2", "sm_90")


def test_cuda_kernels_that_are_heavy_are_there() -> None:
    """A kernel of another name would no longer be looked at."""
    for one in compiling.HEAVY_CUDA:
        file, _, function = one.partition(" ")
        source = (ROOT / "csrc" / "cuda" / file).with_suffix("").name
        assert f" {function}(" in (ROOT / "csrc" / "cuda" / f"{source}_kernel.h").read_text(), one


def test_names_of_the_same_kernels_share_a_table() -> None:
    ampere = replace(FINE, name="a", alike=("b", "c"))
    hopper = replace(FINE, name="a", alike=("c",), architecture="sm_90")
    other = replace(FINE, name="b", architecture="sm_90")
    assert kernel_report.by_names([ampere, hopper, other]) == [(["a", "c"], [ampere, hopper]), (["b"], [ampere, other])]


def test_summary_is_from_the_least_to_the_largest() -> None:
    convolution = replace(FINE, function="x.cu x", made_for="half", counts={"HMMA": 64, "LDGSTS": 8})
    kernels = [convolution, replace(convolution, counts={"HMMA": 128}), replace(convolution, architecture="sm_100")]
    table = kernel_report.summary([replace(kernels[0], resources=replace(FINE.resources, registers=96)), *kernels[1:]])
    cells = [list(column.cells) for column in table.columns]
    assert [str(cell) for cell in cells[0]] == ["x.cu x", "x.cu x"] and cells[2] == ["sm_80", "sm_100"]
    assert [column[0] for column in cells[3:]] == ["2", "32-96", "0", "163", "12", "HMMA 64-128", "LDGSTS 0-8"]


def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> list[Kernel]:
        raise RuntimeError("nvcc x.cu failed:\nnvcc fatal   : Unsupported gpu architecture 'compute_120'\n")

    waiting = [Job("x.cu", "cuda", "sm_80", lambda: [FINE]), Job("x.cu", "cuda", "sm_120", failing)]
    monkeypatch.setattr(kernel_report, "jobs", lambda *compilers, models: waiting)
    monkeypatch.setattr(kernel_report, "CudaCompiler", lambda: Mock(NAME="nvcc", version=lambda: "13.0"))
    monkeypatch.setattr(kernel_report, "TritonCompiler", unavailable)
    left_out = "CUDA C++ kernels for sm_120 are left out: nvcc fatal   : Unsupported gpu architecture 'compute_120'"
    assert kernel_report.main(["--all", "--check"]) == 0
    assert left_out in capsys.readouterr().out.splitlines()
    # Not one that was asked for, nor where others were compiled.
    failed = "x.cu, sm_120: is not compiled: nvcc fatal   : Unsupported gpu architecture 'compute_120'"
    assert kernel_report.main(["--all", "--check", "--arch", "sm_120"]) == 1
    assert failed in capsys.readouterr().out.splitlines()
    waiting.append(Job("y.cu", "cuda", "sm_120", lambda: [replace(FINE, name="y", architecture="sm_120")]))
    assert kernel_report.main(["--all", "--check"]) == 1
    assert failed in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "said, reason",
    [
        ("PassManager::run failed", "PassManager::run failed"),
        ("at 3:8:\n    y = zz\n        ^\nzz is not defined", "zz is not defined"),
        ("PTXAS error: it failed\n`ptxas` stderr:\nptxas fatal   : no\nRepro command: ptxas\n", "ptxas fatal   : no"),
        ("nvcc failed:\nx.cu(3): error: no\n1 error detected", "x.cu(3): error: no"),
        ("", "ValueError"),
    ],
)
def test_reasons(said: str, reason: str) -> None:
    def failing() -> list[Kernel]:
        raise ValueError(said)

    assert Job("x", "triton", "sm_90", failing)() == Failure("x", "triton", "sm_90", reason)


def test_rows_of_the_table() -> None:
    found = kernel_report.rows(FINE)
    assert found["threads of a block"] == "256?"
    assert found["shared bytes, static + dynamic"] == "1024 + 165888"
    assert found["LDG"] == "4 (25% of 128 bits)"
    assert found["instructions"] == "100"


def test_dynamic_shared_memory_is_what_the_files_state(tmp_path: Path) -> None:
    source = tmp_path / "x.cu"
    source.write_text('#include "x_kernel.h"\n#include "not_here.h"\n')
    (tmp_path / "x_kernel.h").write_text("struct Nothing {};\n")
    assert compiling.most_dynamic_shared(source, 99 * 1024) is None
    (tmp_path / "x_kernel.h").write_text(
        "inline constexpr int kLeftSharedBytes = 46 * 1024;\nconstexpr std::size_t kSharedBytes = 1000;\n"
    )
    assert compiling.most_dynamic_shared(source, 99 * 1024) == 46 * 1024
    with (tmp_path / "x_kernel.h").open("a") as file:
        file.write("constexpr int kLargeOptinSharedBytes = 144 * 1024;\n")
    assert compiling.most_dynamic_shared(source, 99 * 1024) == 46 * 1024
    assert compiling.most_dynamic_shared(source, 163 * 1024) == 144 * 1024
    assert compiling.most_dynamic_shared(source, 1024) == 46 * 1024


def test_names_are_readable() -> None:
    mangled = "_ZN16efficientad_fast4cuda11resize_mapsIfEEvNS0_16AnomalyMapLaunchIT_EE"
    assert compiling.readable(mangled) in ("resize_maps<float>", mangled)
    assert compiling.readable("plain") == "plain"


def unavailable(*given: Any) -> Any:
    raise Unavailable("it was hidden")


def test_nothing_to_compile_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel_report, "CudaCompiler", unavailable)
    monkeypatch.setattr(kernel_report, "TritonCompiler", unavailable)
    assert kernel_report.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "CUDA C++ kernels are left out: it was hidden.",
        "Triton kernels are left out: it was hidden.",
        "There is nothing to report.",
    ]


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match="nvcc was not found"):
        CudaCompiler()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="Triton is not installed"):
        TritonCompiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="nvdisasm was not found"):
        compiling.find_disassembler(None)


def test_unknown_architectures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernel_report.main(["--arch", "sm_10"])
    assert "architecture must be one of sm_80" in capsys.readouterr().err


CUDA_KERNELS = """\
extern "C" __global__ void __launch_bounds__(256, 8) spilling(const float* x, float* y) {
  float held[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) held[i] = x[threadIdx.x + 256 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) held[i] = held[i] * held[63 - i] + held[(i * 7) % 64];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[threadIdx.x + 256 * i] = held[i];
}
extern "C" __global__ void __launch_bounds__(32) indexing(const int* at, float* y) {
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = y[i];
  for (int i = 0; i < 64; ++i) held[at[i]] += 1;
  for (int i = 0; i < 64; ++i) y[i] = held[i];
}
extern "C" __global__ void silent(float* y) {
  extern __shared__ float buffer[];
  buffer[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = buffer[threadIdx.x ^ 1];
}
extern "C" __global__ void fine(float* y) { y[threadIdx.x] += 1; }
"""


def test_faults_of_cuda_kernels_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        CudaCompiler()
    except Unavailable as reason:
        pytest.skip(str(reason))
    source = tmp_path / "broken.cu"
    source.write_text(CUDA_KERNELS)
    monkeypatch.setattr(kernel_report, "TritonCompiler", unavailable)
    monkeypatch.setattr(compiling, "cuda_sources", lambda: [source])
    assert kernel_report.main(["--arch", "sm_80"]) == 0, "faults are no failure without --check"
    capsys.readouterr()
    written = tmp_path / "report.json"
    assert kernel_report.main(["--check", "--arch", "sm_80", "--json", str(written)]) == 1
    output = capsys.readouterr().out
    assert "broken.cu spilling, sm_80: spills registers (" in output
    assert "broken.cu indexing, sm_80: uses local memory (256 bytes of stack)" in output
    assert "broken.cu silent, sm_80: has dynamic shared memory, and no constant" in output
    assert "broken.cu fine, sm_80:" not in output
    kernels = {kernel["name"].split()[1]: kernel for kernel in json.loads(written.read_text())["kernels"]}
    assert set(kernels) == {"spilling", "indexing", "silent", "fine"}
    assert kernels["spilling"]["threads"] == 256 and kernels["fine"]["threads"] is None
    assert kernels["spilling"]["counts"]["STL"] > 0 and kernels["fine"]["counts"]["STG"] == 1
    assert kernels["silent"]["dynamic_shared"] is None and kernels["fine"]["dynamic_shared"] == 0


TRITON_KERNELS = """\
from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from efficientad_fast.triton_kernels.launching import launch

HEAVY = {"multiply"}


@triton.jit
def spilling(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count)
    tl.store(y_ptr + at, x / tl.sum(x), mask=at < count)


@triton.jit
def multiply(x, y, out_ptr, taken_ptr, exponents_ptr, offset, one, FLAT: tl.constexpr, DOT: tl.constexpr):
    m, n = tl.arange(0, 64), tl.arange(0, 32)
    left, right = x.load([0, offset]), y.load([0, offset])
    if DOT:
        sums = tl.dot(left, right.T)
    else:
        sums = tl.sum(left.to(tl.float32), 1)[:, None] * tl.sum(right.to(tl.float32), 1)[None, :]
    sums = tl.where(tl.load(taken_ptr + m)[:, None], sums, one)
    sums *= tl.exp2(tl.load(exponents_ptr + n).to(tl.float32))[None, :]
    tl.store(out_ptr + m[:, None] * 32 + n[None, :], sums.to(out_ptr.dtype.element_ty))


def product(dtype, count=1, *, flat=False, dot=True):
    depth = 64 // dtype.itemsize
    x = torch.empty(64, count * 64, dtype=dtype, device="meta")
    y = torch.empty(32, count * 64, dtype=dtype, device="meta")
    out = torch.empty(64, 32, dtype=torch.float16 if dtype == torch.float32 else dtype, device="meta")
    taken = torch.empty(64, dtype=torch.bool, device="meta")
    exponents = torch.empty(32, dtype=torch.int8, device="meta")
    descriptors = [TensorDescriptor.from_tensor(one, [len(one), depth]) for one in (x, y)]
    launch(multiply, count, x.device, [*descriptors, out, taken, exponents, 7, 1], FLAT=flat, DOT=dot, num_warps=4)


def twice(dtype):
    product(dtype)
    product(dtype, dot=False, flat=True)


def model_calls(model_size, dtype):
    return {"conv, batch 1": partial(product, dtype), "conv, batch 32": partial(product, dtype, 32)}


def representative_calls():
    return {"wrong": partial(product, torch.float16, dot=False), "right": partial(product, torch.float16)}
"""


@pytest.fixture(scope="module")
def triton_compiler() -> TritonCompiler:
    try:
        return TritonCompiler()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def module(triton_compiler: TritonCompiler, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("kernels") / "tiny.py"
    path.write_text(TRITON_KERNELS)
    spec = importlib.util.spec_from_file_location("tiny", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module's name, as the only one there is."""
    monkeypatch.setitem(sys.modules, "efficientad_fast.triton_kernels.tiny", module)
    monkeypatch.setattr(compiling, "triton_modules", lambda: ["tiny"])
    monkeypatch.setattr(kernel_report, "CudaCompiler", unavailable)
    return "tiny"


def recorded(call: Callable[[], object]) -> list[Any]:
    from efficientad_fast.triton_kernels import launching

    with launching.recorded() as launches:
        call()
    return launches


def test_a_spill_of_a_triton_kernel_is_found(triton_compiler: TritonCompiler, module: ModuleType) -> None:
    from efficientad_fast.triton_kernels.launching import Launch

    tensors = {name: torch.empty(4096, device="meta") for name in ("x_ptr", "y_ptr")}
    launch = Launch(module.spilling, tensors | {"count": 4000, "BLOCK": 4096}, {"num_warps": 1, "maxnreg": 32})
    tight = triton_compiler.compile_launch("tight", launch, "sm_90")
    roomy = triton_compiler.compile_launch("roomy", replace(launch, options={"num_warps": 8}), "sm_90")
    assert [fault.partition(" (")[0] for fault in tight.faults()] == ["spills registers"]
    assert (tight.threads, roomy.threads) == (32, 256)
    assert roomy.faults() == [] and roomy.resources.registers > 0


@pytest.mark.parametrize(
    "dtype, name", [(torch.float8_e4m3fn, "fp8e4nv"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")]
)
def test_arguments_are_as_in_a_launch(module: ModuleType, dtype: torch.dtype, name: str) -> None:
    (launch,) = recorded(lambda: module.product(dtype))
    asked = compiling.compilation("product", launch, "sm_90")
    depth = 64 // dtype.itemsize
    assert asked.source.signature == {
        "x": f"tensordesc<{name}[64, {depth}]>",
        "y": f"tensordesc<{name}[32, {depth}]>",
        "out_ptr": f"*{name}",
        "taken_ptr": "*u1",
        "exponents_ptr": "*i8",
        "offset": "i32",
        **dict.fromkeys(("one", "FLAT", "DOT"), "constexpr"),
    }
    assert asked.source.constants == {(6,): 1, (7,): False, (8,): True}
    assert [path for path, facts in asked.source.attrs.items() if facts] == [(2,), (3,), (4,)]
    assert asked.made_for == str(dtype).removeprefix("torch.")


def test_what_is_heavy(module: ModuleType) -> None:
    from efficientad_fast.triton_kernels.implicit_gemm import FLAT

    def heavy(dtype: torch.dtype, functions: set[str] = module.HEAVY, *, flat: bool = False) -> bool:
        (launch,) = recorded(lambda: module.product(dtype, flat=flat))
        return compiling.compilation("product", launch, "sm_90", heavy=functions).heavy

    assert heavy(torch.float16) and heavy(torch.float8_e4m3fn)
    assert not heavy(torch.float16, flat=True)
    assert not heavy(torch.float32)
    assert not heavy(torch.float16, {"another"})
    loads = {"LOADS": FLAT}, {"LOADS": FLAT - 1}, {"A_LOADS": FLAT, "B_LOADS": 0}, {}
    few = [compiling.has_few_channels(Mock(arguments=arguments)) for arguments in loads]
    assert few == [True, False, False, False]


def test_products_past_the_tensor_cores_are_found(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_report.main(["--check"]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if "heavy" in line]
    assert faults == [
        "tiny.py wrong, sm_80: is a heavy convolution and has no HMMA",
        "tiny.py wrong, sm_90: is a heavy convolution and has no HGMMA or QGMMA",
    ]


def test_all_compiles_what_is_the_same_once(
    triton_compiler: TritonCompiler, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [one for name in ("sm_80", "sm_89") for one in triton_compiler.of_models("tiny", name)]
    assert len(asked) == 2 * 2 * (2 + 3), "sizes, batches, dtypes; no float8 for sm_80"
    waiting = kernel_report.jobs(None, triton_compiler, ["sm_80", "sm_89"], models=True)
    assert [(job.name, job.architecture) for job in waiting] == [
        (f"tiny.py S {dtype} conv, batch 1", architecture)
        for architecture, dtypes in (("sm_80", 2), ("sm_89", 3))
        for dtype in ("float16", "bfloat16", "float8_e4m3fn")[:dtypes]
    ]
    written = tmp_path / "all.json"
    assert kernel_report.main(["--all", "--check", "--arch", "sm_90", "--json", str(written)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "multiply" in line]
    assert [line[:5] for line in lines] == [
        ["tiny.py", "multiply", dtype, "sm_90", "1"] for dtype in ("bfloat16", "float16", "float8_e4m3fn")
    ]
    kernels = json.loads(written.read_text())["kernels"]
    assert [("HGMMA" in one["counts"], "QGMMA" in one["counts"]) for one in kernels] == [(1, 0), (1, 0), (0, 1)]
    assert all(one["counts"]["UTMALDG"] == 2 and one["heavy"] for one in kernels)
    others = ("S float16 conv, batch 32", "M float16 conv, batch 1", "M float16 conv, batch 32")
    assert kernels[0]["alike"] == [f"tiny.py {call}" for call in others]


def test_launches_of_a_call_are_told_from_each_other(
    triton_compiler: TritonCompiler, tiny: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "representative_calls", lambda: {"both": lambda: module.twice(torch.float16)})
    asked = triton_compiler.representative("tiny", "sm_90")
    assert [one.name for one in asked] == ["tiny.py both multiply 1", "tiny.py both multiply 2"]
    assert [one.heavy for one in asked] == [True, False]
    monkeypatch.delattr(module, "model_calls")
    assert [one.key for one in triton_compiler.of_models("tiny", "sm_90")] == [one.key for one in asked]


def test_triton_kernels_have_no_faults(triton_compiler: TritonCompiler) -> None:
    """One of each function, of the operators without products; ``--check`` has them all."""
    for module in ("anomaly_map", "preprocess", "quantile"):
        asked = {one.function: one for one in triton_compiler.representative(module, "sm_90")}
        kernels = [triton_compiler.compiled(one) for one in asked.values()]
        assert kernels and [fault for kernel in kernels for fault in kernel.faults()] == []
        assert all(kernel.counts["LDG"] and kernel.occupancy > 0 for kernel in kernels)
        # A histogram is written by atomics alone.
        assert all({"STG", "RED", "REDG"} & kernel.counts.keys() for kernel in kernels)


@pytest.mark.parametrize("architecture, instructions", [("sm_80", {"HMMA", "LDGSTS"}), ("sm_90", {"HGMMA", "UTMALDG"})])
def test_convolutions_load_as_their_architecture_does(
    triton_compiler: TritonCompiler, architecture: str, instructions: set[str]
) -> None:
    asked = [one for one in triton_compiler.representative("conv_pool", architecture) if one.heavy]
    kernel = triton_compiler.compiled(asked[0])
    assert kernel.faults() == [] and instructions <= kernel.counts.keys()


@pytest.mark.parametrize("architecture, dtype", [("sm_80", torch.bfloat16), ("sm_90", torch.float8_e4m3fn)])
def test_models_are_compiled_as_their_plans_launch_them(
    triton_compiler: TritonCompiler, architecture: str, dtype: torch.dtype
) -> None:
    from efficientad_fast.triton_kernels import launching

    from benchmarks.gpu.work import Call, meta_steps

    modules = ("conv_pool", "feature_distance", "autoencoder")
    reported = {one.key for name in modules for one in triton_compiler.of_models(name, architecture)}
    seen = set()
    for size in compiling.MODEL_SIZES:
        for step in (step for batch in (1, 32) for step in meta_steps(size, dtype, batch)):  # type: ignore[arg-type]
            call = Call.of(step)
            if call.operator not in modules:
                continue
            run = importlib.import_module(f"efficientad_fast.triton_kernels.{call.operator}").overloads["mixed"]
            with launching.as_if_on(capability(architecture) / 10):
                launches = recorded(lambda run=run, call=call: run(**call.arguments))
            for launch in launches:
                key = compiling.compilation(step.layer, launch, architecture).key
                assert key in reported, f"{size}, {step.layer}: {dict(launch.arguments)}"
                seen.add(key)
    assert len(seen) > 20
