"""Every wrapper of csrc/cuda/ptx.h: what the emulator does in its place, and on a GPU whether the GPU does the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simt_build
import torch
from conftest import ROOT

from efficientad_fast import ops

FOLDER = ROOT / "tests" / "ptx_kernels"
THREADS = 64
RESULT = np.dtype(
    [
        ("copied", "u4", 4),
        ("copied_later", "u4", 4),
        ("halves", "u4", 2),
        ("words", "u4", 1),
        ("four", "u4", 4),
        ("two", "u4", 2),
        ("sums", "f4", (3, 4)),
        ("e4m3", "u4"),
        ("larger", "f4"),
        ("handed", "u4"),
    ]
)
EXACT = ("copied", "copied_later", "halves", "words", "four", "two", "e4m3", "handed")


def given() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Numbers to copy and multiply, ``(8, 64, 4)`` uint32, and pairs to narrow."""
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 2**32, (8, THREADS, 4), dtype=np.uint32)
    for product, dtype in enumerate((torch.float16, torch.bfloat16, torch.float8_e4m3fn)):
        narrow = torch.from_numpy(generator.standard_normal(THREADS * 16 // dtype.itemsize)).to(dtype)
        numbers[product] = np.frombuffer(bytes(narrow.view(torch.uint8).tolist()), np.uint32).reshape(THREADS, 4)
    pairs = generator.standard_normal((THREADS, 2)).astype(np.float32) * 10.0 ** generator.integers(-4, 4, (THREADS, 2))
    pairs[:4] = [[0.0, -0.0], [1e9, -1e9], [np.nan, 448.0], [1.0625, 1.1875]]  # the last two are ties
    return numbers, pairs.astype(np.float32)


def emulated(has_e4m3: bool) -> np.ndarray[Any, Any]:
    module = simt_build.load("ptx_check", FOLDER / "ptx_check.cpp", folders=(FOLDER,))
    assert module.result_bytes == RESULT.itemsize
    numbers, pairs = given()
    results = np.zeros(THREADS, RESULT)
    out = simt_build.buffer(module, "results", results, writable=True, initialised=False)
    arrays = [simt_build.buffer(module, name, one) for name, one in (("numbers", numbers), ("pairs", pairs))]
    simt_build.run(module.check, *arrays, out, has_e4m3)
    assert out.unwritten == 0
    return results


def test_copies_and_matrices_in_the_emulator() -> None:
    results = emulated(has_e4m3=True)
    numbers, pairs = given()
    thread = np.arange(THREADS)
    from_memory = numbers[4:]
    copied = np.where((thread % 5 != 0)[:, None], from_memory[0], 0)
    assert (results["copied"] == copied[thread ^ 1]).all()
    assert (results["copied_later"] == from_memory[1][thread ^ 2]).all()
    halves = np.where((thread % 3 != 0)[:, None], from_memory[2].reshape(-1, 2)[:THREADS], 0)
    assert (results["halves"] == halves[thread ^ 4]).all()
    words = np.where(thread % 7 != 0, from_memory[3].reshape(-1)[:THREADS], 0)
    assert (results["words"][:, 0] == words[thread ^ 8]).all()
    for name, count, step, start in (("four", 4, 5, 3), ("two", 2, 7, 1)):
        for matrix in range(count):
            # Lane i gives row i % 8 of matrix i / 8, and gets 4 bytes, i % 4, of row i / 4.
            lane, warp = thread % 32, thread // 32 * 32
            giver = warp + 8 * matrix + lane // 4
            row = (giver * step + start) % THREADS
            assert (results[name][:, matrix] == from_memory[1][row, lane % 4]).all(), (name, matrix)
    narrow = (
        torch.from_numpy(pairs).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint32)
    )
    assert (results["e4m3"] == narrow[:, 0] | narrow[:, 1] << 8).all()
    np.testing.assert_array_equal(results["larger"], np.maximum(pairs[:, 0], pairs[:, 1]))
    assert not np.signbit(results["larger"][0])


def test_named_barriers_in_the_emulator() -> None:
    thread = np.arange(THREADS)
    assert (emulated(has_e4m3=True)["handed"] == np.where(thread < 32, 0, 3 * (thread - 32) + 1)).all()


def test_products_in_the_emulator() -> None:
    """By the layouts of the PTX ISA, as they are written down there for each element."""
    results = emulated(has_e4m3=True)
    numbers, _ = given()
    for product, dtype in enumerate((torch.float16, torch.bfloat16, torch.float8_e4m3fn)):
        depth = 32 // dtype.itemsize
        in_register = 4 // dtype.itemsize
        registers = torch.from_numpy(numbers[product].view(np.uint8)).view(dtype).double()
        registers = registers.reshape(THREADS, 4, in_register)
        for warp in range(2):
            left, right = torch.zeros(16, depth, dtype=torch.float64), torch.zeros(depth, 8, dtype=torch.float64)
            for lane in range(32):
                group, member = lane // 4, lane % 4
                mine, others = registers[32 * warp + lane], registers[(32 * warp + lane) ^ 3]
                for register in range(4):
                    row = group + 8 * (register % 2)
                    first = in_register * member + (depth // 2) * (register // 2)
                    left[row, first : first + in_register] = mine[register]
                for register, its in enumerate((1, 3)):
                    first = in_register * member + (depth // 2) * register
                    right[first : first + in_register, group] = others[its]
            expected = 2 * (left @ right)
            sums = results["sums"][32 * warp : 32 * warp + 32, product]
            for lane in range(32):
                for register in range(4):
                    row, column = lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2
                    right_one = float(expected[row, column]) + 32 * warp + lane + register
                    assert abs(sums[lane, register] - right_one) <= 1e-5 * (1 + abs(right_one)), (dtype, lane, register)


def compiler() -> Any:
    """What build_backend says of nvcc."""
    sys.path.insert(0, str(ROOT))
    try:
        import build_backend
    finally:
        sys.path.pop(0)
    nvcc = build_backend.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
    return build_backend.Nvcc(nvcc)


def compile_for(number: int, *options: str | Path) -> None:
    nvcc = compiler()
    if number not in nvcc.capabilities():
        pytest.skip(f"{nvcc.path} does not compile for sm_{number}")
    command = [nvcc.path, "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch=sm_{number}", FOLDER / "ptx_check.cu", *options]
    subprocess.run([str(word) for word in command], check=True)


@pytest.mark.parametrize("number", [75, 80, 89, 90])
def test_every_wrapper_compiles_also_for_gpus_that_have_none(number: int, tmp_path: Path) -> None:
    compile_for(number, "-cubin", "-o", tmp_path / "ptx_check.cubin")


def included(file: Path) -> set[str]:
    """Names of the headers of csrc/cuda that a file includes, and that these include."""
    text = file.read_text(encoding="utf-8")
    found = {name for name in re.findall(r'#include "(\w+\.h)"', text) if (file.parent / name).is_file()}
    return found.union(*(included(file.parent / name) for name in found))


@pytest.mark.parametrize("operator", ops.names())
def test_operators_that_need_them_are_refused_and_passed_over_on_older_gpus(operator: str) -> None:
    source = ROOT / "csrc" / "cuda" / f"{operator}.cu"
    if "ptx.h" in included(source):
        assert "require_products(" in source.read_text(encoding="utf-8")
        assert ops.least_capability("cuda", operator) == "8.0"
    else:
        assert ops.least_capability("cuda", operator) == "0.0"


@pytest.mark.gpu
def test_a_gpu_does_what_the_emulator_does(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU that PyTorch can use")
    major, minor = torch.cuda.get_device_capability()
    numbers, pairs = given()
    (tmp_path / "given").write_bytes(numbers.tobytes() + pairs.tobytes())
    compile_for(10 * major + minor, "-o", tmp_path / "ptx_check")
    subprocess.run([str(tmp_path / "ptx_check"), str(tmp_path / "given"), str(tmp_path / "results")], check=True)
    results = np.frombuffer((tmp_path / "results").read_bytes(), RESULT)
    has_e4m3 = (major, minor) >= (8, 9)
    expected = emulated(has_e4m3)
    for name in EXACT:
        assert (results[name] == expected[name]).all(), name
    np.testing.assert_array_equal(results["larger"], expected["larger"])
    # Tensor cores add in another order and cut off what is small beside the largest; in e4m3 (Ada's) 13 bits below it.
    for product, allowed in enumerate((1e-4, 1e-4, 5e-2)):
        wrong = np.abs(results["sums"][:, product] - expected["sums"][:, product])
        assert (wrong <= allowed * (1 + np.abs(expected["sums"][:, product]))).all(), product
