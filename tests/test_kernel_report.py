"""`benchmarks.kernel_report`: the tools' texts, the limits of GPUs, and faults that it must find in real kernels."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT))

from benchmarks import kernel_report
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
        "all": 11,
    }
    assert listings.counts(found["second"]) == {"LDL": 1, "STL": 1, "FFMA": 1, "all": 3}
    assert listings.counts(Counter()) == {"all": 0}


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
    ],
)
def test_occupancy(architecture: int, threads: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(ARCHITECTURES[architecture], threads, registers, shared) == pytest.approx(expected)


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
    }
    for expected, changes in cases.items():
        (fault,) = replace(FINE, **changes).faults()
        assert fault.startswith(expected)


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
    assert compiling.most_dynamic_shared(source) is None
    (tmp_path / "x_kernel.h").write_text(
        "inline constexpr int kLeftSharedBytes = 46 * 1024;\nconstexpr std::size_t kSharedBytes = 1000;\n"
    )
    assert compiling.most_dynamic_shared(source) == 46 * 1024


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


TRITON_KERNEL = """\
import triton
import triton.language as tl


@triton.jit
def spilling(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count)
    tl.store(y_ptr + at, x / tl.sum(x), mask=at < count)
"""


@pytest.fixture(scope="module")
def triton_compiler() -> TritonCompiler:
    try:
        return TritonCompiler()
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_a_spill_of_a_triton_kernel_is_found(triton_compiler: TritonCompiler, tmp_path: Path) -> None:
    from efficientad_fast.triton_kernels.launching import Launch

    path = tmp_path / "spilling.py"
    path.write_text(TRITON_KERNEL)
    spec = importlib.util.spec_from_file_location("spilling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors = {name: torch.empty(4096, device="meta") for name in ("x_ptr", "y_ptr")}
    launch = Launch(module.spilling, tensors | {"count": 4000, "BLOCK": 4096}, {"num_warps": 1, "maxnreg": 32})
    tight = triton_compiler.compile_launch("tight", launch, "sm_90")
    roomy = triton_compiler.compile_launch("roomy", replace(launch, options={"num_warps": 8}), "sm_90")
    assert [fault.partition(" (")[0] for fault in tight.faults()] == ["spills registers"]
    assert (tight.threads, roomy.threads) == (32, 256)
    assert roomy.faults() == [] and roomy.resources.registers > 0


def test_triton_kernels_have_no_faults(triton_compiler: TritonCompiler) -> None:
    modules = compiling.triton_modules()
    assert {"anomaly_map", "preprocess"} <= set(modules)
    for module in modules:
        kernels = triton_compiler.compile(module, "sm_90")
        assert kernels and [fault for kernel in kernels for fault in kernel.faults()] == []
        assert all(kernel.counts["LDG"] and kernel.occupancy > 0 for kernel in kernels)
        # A histogram is written by atomics alone.
        assert all({"STG", "RED", "REDG"} & kernel.counts.keys() for kernel in kernels)
