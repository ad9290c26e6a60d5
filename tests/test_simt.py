"""The emulator of CUDA C++: every kernel that is wrong on purpose is caught and its twin is not, and what it makes of
indices, warps, barriers, atomics and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import simt_build
import torch

KERNELS = Path(__file__).parent / "simt_kernels"


@pytest.fixture(scope="module")
def wrong() -> ModuleType:
    return simt_build.load("simt_wrong", KERNELS / "wrong.cpp")


@pytest.fixture(scope="module")
def _semantics() -> ModuleType:
    return simt_build.load("simt_semantics", KERNELS / "semantics.cpp")


@pytest.fixture
def semantics(_semantics: ModuleType) -> Iterator[ModuleType]:
    """The module, run as it is by default after the test."""
    yield _semantics
    _semantics.configure()


def written(module: ModuleType, array: Any, name: str = "out") -> Any:
    """Unwritten device memory that `array` is the host's side of."""
    return simt_build.buffer(module, name, array, writable=True, initialised=False)


# Kernels that are wrong on purpose: the thread that is blamed, and what for. The block is (0,0,0) where none is given.
BEYOND = "writes 4 bytes at out + 256, 0 bytes past its end of 256"
RACE = "with no barrier in between: race"
BLOCKS = "and nothing orders the blocks: race"
UNDER_WAY, NOT_WAITED = "where a copy is under way that", "has not waited for: race"
WRONG = {
    "read_past_end": ("block (1,0,0) thread (31,0,0)", "reads 4 bytes at in + 256, 0 bytes past its end of 256"),
    "read_before_begin": ("thread (0,0,0)", "reads 4 bytes at in - 4, 4 bytes before its begin"),
    "write_past_end": ("block (2,0,0) thread (0,0,0)", BEYOND),
    "stride_too_large": ("block (1,0,0) thread (0,0,0)", "reads 4 bytes at in + 256, 0 bytes past its end of 256"),
    "byte_past_end": ("thread (0,0,0)", "reads 1 byte at in + 256, 0 bytes past its end of 256"),
    "write_read_only": ("thread (0,0,0)", "writes 4 bytes at in + 0, which is read-only"),
    "null_pointer": ("thread (0,0,0)", "reads 4 bytes at address 12, behind a null pointer"),
    "wild_pointer": ("thread (0,0,0)", "reads 4 bytes where no buffer and no shared memory is"),
    "misaligned_vector": ("thread (0,0,0)", "reads 16 bytes at in + 4, whose address is not a multiple of 16"),
    "copy_past_end": ("thread (0,0,0)", "reads 260 bytes at in + 0, across its end of 256"),
    "fill_past_end": ("thread (0,0,0)", "writes 260 bytes at out + 0, across its end of 256"),
    "structure_past_end": ("thread (8,0,0)", "writes 32 bytes at out + 256, 0 bytes past its end of 256"),
    "shared_off_by_one": ("thread (63,0,0)", "writes 4 bytes at tile + 256, 0 bytes past its end of 256"),
    "shared_row_too_far": ("thread (56,0,0)", "reads 4 bytes at tile + 256, 0 bytes past its end of 256"),
    "dynamic_shared_too_small": (
        "thread (63,0,0)",
        "writes 4 bytes at dynamic shared memory + 256, 0 bytes past its end of 256",
    ),
    "local_of_another_thread": ("thread (0,0,0)", "reads 4 bytes of a local variable of thread (1,0,0)"),
    "too_much_local_memory": ("thread (0,0,0)", "needs more than 262144 bytes of local memory"),
    "unwritten_shared": ("thread (23,0,0)", "reads 4 bytes at tile + 160, which nothing has written"),
    "shared_of_another_block": (
        "block (1,0,0) thread (0,0,0)",
        "reads 4 bytes at tile + 0, which nothing has written",
    ),
    "unwritten_output": ("thread (0,0,0)", "reads 4 bytes at out + 0, which nothing has written"),
    "unwritten_counter": ("thread (0,0,0)", "updates 4 bytes atomically at out + 0, which nothing has written"),
    "missing_barrier": ("thread (1,0,0)", f"reads 4 bytes at tile + 0, which thread (0,0,0) wrote {RACE}"),
    "missing_second_barrier": ("thread (32,0,0)", f"reads 4 bytes at tile + 124, which thread (31,0,0) wrote {RACE}"),
    "write_after_read_in_warp": (
        "thread (1,0,0)",
        f"writes 4 bytes at tile + 4, which thread (0,0,0) read {RACE}",
    ),
    "write_after_read_in_block": (
        "thread (63,0,0)",
        f"writes 4 bytes at first + 0, which threads of several warps read {RACE}",
    ),
    "write_after_read_of_block": (
        "block (1,0,0) thread (5,0,0)",
        f"writes 4 bytes at out + 0, which block (0,0,0) thread (0,0,0) read, {BLOCKS}",
    ),
    "write_after_reads_of_blocks": (
        "block (3,0,0) thread (0,0,0)",
        f"writes 4 bytes at out + 0, which other blocks read, {BLOCKS}",
    ),
    "read_after_atomic": (
        "thread (32,0,0)",
        f"reads 4 bytes at out + 0, which thread (31,0,0) updated atomically {RACE}",
    ),
    "missing_syncwarp": ("thread (1,0,0)", f"reads 4 bytes at tile + 0, which thread (0,0,0) wrote {RACE}"),
    "syncwarp_for_syncthreads": ("thread (63,0,0)", f"reads 4 bytes at tile + 124, which thread (31,0,0) wrote {RACE}"),
    "half_a_syncwarp": ("thread (31,0,0)", f"reads 4 bytes at tile + 60, which thread (15,0,0) wrote {RACE}"),
    "same_byte": ("thread (1,0,0)", f"writes 1 byte at out + 0, which thread (0,0,0) wrote {RACE}"),
    "byte_of_a_word": ("thread (1,0,0)", f"reads 1 byte at out + 3, which thread (0,0,0) wrote {RACE}"),
    "race_in_global": ("thread (1,0,0)", f"reads 4 bytes at out + 0, which thread (0,0,0) wrote {RACE}"),
    "race_of_blocks_writing": (
        "block (1,0,0) thread (0,0,0)",
        f"writes 4 bytes at out + 0, which block (0,0,0) thread (0,0,0) wrote, {BLOCKS}",
    ),
    "race_of_blocks_reading": (
        "block (1,0,0) thread (0,0,0)",
        f"reads 4 bytes at out + 0, which block (0,0,0) thread (0,0,0) wrote, {BLOCKS}",
    ),
    "plain_and_atomic": (
        "block (1,0,0) thread (0,0,0)",
        f"updates 4 bytes atomically at out + 4, which block (0,0,0) thread (0,0,0) wrote, {BLOCKS}",
    ),
    "missing_fence": (
        "block (7,0,0) thread (0,0,0)",
        f"reads 4 bytes at out + 8, which block (0,0,0) thread (0,0,0) wrote, {BLOCKS}",
    ),
    "fence_too_early": (
        "block (1,0,0) thread (0,0,0)",
        f"reads 4 bytes at out + 8, which block (0,0,0) thread (0,0,0) wrote, {BLOCKS}",
    ),
    "fence_of_another_thread": (
        "block (1,0,0) thread (0,0,0)",
        f"reads 4 bytes at out + 8, which block (0,0,0) thread (1,0,0) wrote, {BLOCKS}",
    ),
    "divergent_barrier": (
        "thread (0,0,0)",
        "waits at __syncthreads, where 24 of 64 threads do not come: thread (40,0,0) has exited: divergent barrier",
    ),
    "different_barriers": (
        "thread (0,0,0)",
        "waits at __syncthreads_or, where 32 of 64 threads do not come: "
        "thread (32,0,0) waits at __syncthreads: divergent barrier",
    ),
    "warp_waits_for_barrier": (
        "thread (0,0,0)",
        "waits at __syncwarp(0xffffffff) for thread (7,0,0), which waits at __syncthreads: deadlock",
    ),
    "different_warp_operations": (
        "thread (0,0,0)",
        "waits at __shfl_xor_sync(0xffffffff) for thread (1,0,0), "
        "which waits at __shfl_down_sync(0xffffffff): deadlock",
    ),
    "shuffle_outside_mask": (
        "thread (0,0,0)",
        "reads lane 16 in __shfl_xor_sync(0xffff), which is not in the mask",
    ),
    "shuffle_from_exited": ("thread (0,0,0)", "reads lane 5 in __shfl_sync(0xffffffff), which has exited"),
    "shuffle_from_missing_lane": (
        "thread (32,0,0)",
        "reads lane 8 in __shfl_xor_sync(0xffffffff), which the block does not have",
    ),
    "not_in_own_mask": ("thread (16,0,0)", "calls __syncwarp(0xffff) and is not in the mask"),
    "waits_for_ever": ("thread (1,0,0)", "does not end: it has touched memory more than 16777216 times"),
    "trapped": ("thread (9,0,0)", "traps"),
    "missing_wait": ("thread (0,0,0)", f"reads 4 bytes at tile + 252, {UNDER_WAY} thread (63,0,0) {NOT_WAITED}"),
    "missing_commit": ("thread (0,0,0)", f"reads 4 bytes at tile + 0, {UNDER_WAY} it {NOT_WAITED}"),
    "missing_barrier_after_wait": ("thread (1,0,0)", f"reads 4 bytes at tile + 0, which thread (0,0,0) wrote {RACE}"),
    "too_few_groups_waited_for": (
        "thread (0,0,0)",
        f"reads 4 bytes at tile + 508, {UNDER_WAY} thread (63,0,0) {NOT_WAITED}",
    ),
    "ends_before_its_copy": ("thread (0,0,0)", "ends without having waited for its copy to tile + 0"),
    "stage_overwritten_too_early": (
        "thread (32,0,0)",
        f"reads 4 bytes at tile + 124, which thread (31,0,0) wrote {RACE}",
    ),
    "copy_over_what_others_read": (
        "thread (63,0,0)",
        f"writes 4 bytes at tile + 0, which thread (1,0,0) read {RACE}",
    ),
    "written_under_a_copy": ("thread (0,0,0)", f"writes 4 bytes at tile + 0, {UNDER_WAY} it {NOT_WAITED}"),
    "two_copies_to_one_place": ("thread (1,0,0)", f"writes 4 bytes at tile + 0, which thread (0,0,0) wrote {RACE}"),
    "source_changes_on_the_way": ("thread (0,0,0)", "has copied from out + 0, which changed on the way: race"),
    "unwritten_source": ("thread (40,0,0)", "reads 4 bytes at out + 160, which nothing has written"),
    "source_past_end": ("thread (16,0,0)", "reads 16 bytes at in + 256, 0 bytes past its end of 256"),
    "source_not_global": ("thread (0,0,0)", "copies from other + 0, which is not global memory"),
    "target_not_shared": ("thread (0,0,0)", "copies to out + 0, which is not shared memory"),
    "target_of_registers": ("thread (0,0,0)", "copies to a local variable, which is not shared memory"),
    "target_past_end": ("thread (16,0,0)", "writes 16 bytes at tile + 256, 0 bytes past its end of 256"),
    "misaligned_target": ("thread (1,0,0)", "copies to tile + 8, whose address is not a multiple of 16"),
    "misaligned_source": ("thread (1,0,0)", "copies from in + 4, whose address is not a multiple of 8"),
    "misaligned_source_not_taken": (
        "thread (0,0,0)",
        "copies from in + 4, whose address is not a multiple of 16",
    ),
    "misaligned_row": (
        "thread (1,0,0)",
        "loads a row of a matrix from rows + 12, whose address is not a multiple of 16",
    ),
    "row_past_end": ("thread (16,0,0)", "reads 16 bytes at rows + 256, 0 bytes past its end of 256"),
    "row_not_shared": ("thread (0,0,0)", "loads a row of a matrix from in + 0, which is not shared memory"),
    "unwritten_row": ("thread (5,0,0)", "reads 16 bytes at rows + 80, which nothing has written"),
    "rows_without_barrier": ("thread (32,0,0)", f"reads 16 bytes at rows + 0, which thread (0,0,0) wrote {RACE}"),
    "own_rows_without_syncwarp": ("thread (1,0,0)", f"reads 4 bytes at rows + 4, which thread (0,0,0) wrote {RACE}"),
    "rows_overwritten_without_syncwarp": (
        "thread (30,0,0)",
        f"writes 4 bytes at rows + 480, which thread (24,0,0) read {RACE}",
    ),
    "rows_under_way": ("thread (0,0,0)", f"reads 16 bytes at rows + 0, {UNDER_WAY} it {NOT_WAITED}"),
    "lane_missing_in_load": (
        "thread (32,0,0)",
        "calls load_matrices of two, for which lane 5 is needed, which has exited",
    ),
    "lane_elsewhere_in_load": (
        "thread (32,0,0)",
        "waits at load_matrices of two for thread (37,0,0), which waits at __syncwarp(0xffffffff): deadlock",
    ),
    "lane_missing_in_multiply": (
        "thread (0,0,0)",
        "calls multiply_add of float16, for which lane 5 is needed, which has exited",
    ),
    "lanes_that_do_not_exist": (
        "thread (32,0,0)",
        "calls multiply_add of e4m3, for which lane 8 is needed, which the block does not have",
    ),
    "products_of_two_kinds": (
        "thread (0,0,0)",
        "waits at multiply_add of bfloat16 for thread (16,0,0), which waits at multiply_add of float16: deadlock",
    ),
    "arrives_before_it_writes": ("thread (63,0,0)", f"reads 4 bytes at tile + 124, which thread (31,0,0) wrote {RACE}"),
    "reads_without_named_barrier": ("thread (64,0,0)", f"reads 4 bytes at tile + 0, which thread (0,0,0) wrote {RACE}"),
    "syncs_with_other_warps": ("thread (95,0,0)", f"reads 4 bytes at tile + 124, which thread (31,0,0) wrote {RACE}"),
    "arrives_and_learns_nothing": (
        "thread (63,0,0)",
        f"reads 4 bytes at tile + 124, which thread (31,0,0) wrote {RACE}",
    ),
    "overwrites_without_named_barrier": (
        "thread (63,0,0)",
        f"reads 4 bytes at tile + 124, which thread (31,0,0) wrote {RACE}",
    ),
    "overwrites_before_all_have_read": (
        "thread (0,0,0)",
        f"writes 4 bytes at tile + 0, which threads of several warps read {RACE}",
    ),
    "lane_missing_at_named_barrier": (
        "thread (0,0,0)",
        "calls named_barrier_sync(1, 64), for which lane 5 is needed, which has exited",
    ),
    "lane_elsewhere_at_named_barrier": (
        "thread (0,0,0)",
        "waits at named_barrier_arrive(1, 64) for thread (5,0,0), which waits at __syncthreads: deadlock",
    ),
    "lanes_without_threads_at_named_barrier": (
        "thread (32,0,0)",
        "calls named_barrier_sync(1, 32), for which lane 8 is needed, which the block does not have",
    ),
    "lanes_at_two_named_barriers": (
        "thread (0,0,0)",
        "calls named_barrier_sync(1, 64), and lane 16 of its warp calls named_barrier_sync(2, 64)",
    ),
    "named_barrier_zero": ("thread (0,0,0)", "calls named_barrier_sync(0, 64), and barriers are 1 to 15"),
    "named_barrier_sixteen": ("thread (0,0,0)", "calls named_barrier_sync(16, 64), and barriers are 1 to 15"),
    "named_barrier_of_part_of_a_warp": (
        "thread (0,0,0)",
        "calls named_barrier_sync(1, 40), and threads come in whole warps of 32",
    ),
    "named_barrier_of_more_than_the_block": (
        "thread (0,0,0)",
        "calls named_barrier_sync(1, 96), and the block has 64 threads",
    ),
    "named_barrier_of_two_sizes": (
        "thread (32,0,0)",
        "calls named_barrier_sync(1, 32), and thread (0,0,0) calls named_barrier_arrive(1, 64)",
    ),
    "named_barrier_of_too_many": (
        "thread (0,0,0)",
        "waits at named_barrier_sync(1, 96), to which only 64 threads come: deadlock",
    ),
    "arrives_and_nobody_else": (
        "thread (0,0,0)",
        "calls named_barrier_arrive(1, 64), to which only 32 threads come: the block ends",
    ),
    "arrives_twice": (
        "thread (0,0,0)",
        "calls named_barrier_arrive(1, 64), to which it has come before, and others have not come yet",
    ),
    "arrives_again_untold": (
        "thread (32,0,0)",
        "calls named_barrier_arrive(1, 64) again, "
        "and nothing has told it that thread (0,0,0) came the time before: race",
    ),
}
INITIALISED = {  # what they read there comes from outside
    *("missing_fence", "plain_and_atomic", "waits_for_ever", "read_after_atomic", "fence_too_early"),
    *("write_after_read_of_block", "write_after_reads_of_blocks", "fence_of_another_thread"),
}


def skip_what_clang_hides(kernel: str) -> None:
    if kernel == "misaligned_vector" and simt_build.is_clang():
        pytest.skip("clang loads the members of a vector one by one, so that its alignment does not show")


def memory_of(module: ModuleType, kernel: str) -> tuple[Any, Any, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    given, result = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    read = simt_build.buffer(module, "in", given)
    out = simt_build.buffer(module, "out", result, writable=True, initialised=kernel in INITIALISED)
    return read, out, given, result


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_caught(wrong: ModuleType, kernel: str) -> None:
    skip_what_clang_hides(kernel)
    where, what = WRONG[kernel]
    read, out, *_ = memory_of(wrong, kernel)
    with pytest.raises(wrong.KernelError) as error:
        getattr(wrong, kernel)(read, out, True)
    block = "" if where.startswith("block") else "block (0,0,0) "
    sentence, line = re.fullmatch(r"(.*) \(wrong\.cpp:(\d+)\)", str(error.value)).groups()
    assert sentence == f"{kernel}<true>: {block}{where} {what}"
    source = (KERNELS / "wrong.cpp").read_text(encoding="utf-8").splitlines()
    start = next(number for number, text in enumerate(source, 1) if f" {kernel}(" in text)
    assert kernel == "too_much_local_memory" or start < int(line) < start + 30


@pytest.mark.parametrize("kernel", WRONG)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_its_twin_is_not(wrong: ModuleType, kernel: str, order: int) -> None:
    read, out, *_ = memory_of(wrong, kernel)
    wrong.configure(order=order)
    try:
        getattr(wrong, kernel)(read, out, False)
    finally:
        wrong.configure()


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_caught_in_any_order_and_by_any_number_of_threads(wrong: ModuleType, kernel: str) -> None:
    skip_what_clang_hides(kernel)
    for settings in ({"order": 1}, {"order": 2}, {"threads": 2}, {"threads": 3, "order": 3}):
        read, out, *_ = memory_of(wrong, kernel)
        wrong.configure(**settings)
        try:
            with pytest.raises(wrong.KernelError, match=f"^{kernel}<true>: block"):
                getattr(wrong, kernel)(read, out, True)
        finally:
            wrong.configure()


def test_every_wrong_kernel_is_tested(wrong: ModuleType) -> None:
    own = {"Buffer", "KernelError", "configure", "take_counts", "unguarded_shared_variables", "launch_shape"}
    assert {name for name in dir(wrong) if not name.startswith("__")} - own == set(WRONG)


def test_shared_variables_lie_apart(wrong: ModuleType, _semantics: ModuleType) -> None:
    assert wrong.unguarded_shared_variables() == []
    assert _semantics.unguarded_shared_variables() == []


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((0, 32, 0), r"a grid of \(0,1,1\) blocks"),
        ((1, 0, 0), r"blocks of \(0,1,1\) threads"),
        ((1, 1025, 0), r"blocks of \(1025,1,1\) threads"),
        ((1, 32, 227 * 1024 + 1), "232449 bytes of dynamic shared memory"),
    ],
)
def test_a_launch_that_no_gpu_takes(wrong: ModuleType, shape: tuple[int, int, int], said: str) -> None:
    read, out, *_ = memory_of(wrong, "")
    with pytest.raises(wrong.KernelError, match=rf"^unwritten_output<false>: launched with {said}"):
        wrong.launch_shape(read, out, *shape)


def test_a_launch_after_a_failed_one(wrong: ModuleType) -> None:
    for _ in range(3):
        read, out, given, result = memory_of(wrong, "")
        with pytest.raises(wrong.KernelError, match="race"):
            wrong.missing_barrier(read, out, True)
        read, out, given, result = memory_of(wrong, "")
        simt_build.run(wrong.missing_barrier, read, out, False)
        assert (result == given[[0, *range(63)]]).all()


# Buffers


def test_a_buffer_keeps_the_alignment_of_its_array(wrong: ModuleType) -> None:
    skip_what_clang_hides("misaligned_vector")
    whole = np.zeros(68, np.float32)
    start = -(whole.ctypes.data // 4) % 4  # from here on a multiple of 16 bytes
    for offset in (0, 1):
        read = simt_build.buffer(wrong, "in", whole[start + offset : start + offset + 64])
        _, out, *_ = memory_of(wrong, "")
        if offset == 0:
            wrong.misaligned_vector(read, out, False)
        else:
            with pytest.raises(wrong.KernelError, match="reads 16 bytes at in \\+ 16, whose address"):
                wrong.misaligned_vector(read, out, False)


def test_only_what_was_written_comes_back(semantics: ModuleType) -> None:
    given, result = np.ones(64, np.float32), np.full(64, 9, np.float32)
    read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
    assert out.unwritten == 256
    simt_build.run(semantics.scale, read, out, 40, 3.0, 32)
    assert out.unwritten == 24 * 4
    assert (result == [3] * 40 + [9] * 24).all()


def test_a_later_launch_reads_what_an_earlier_one_wrote(semantics: ModuleType) -> None:
    given, between, result = np.ones(64, np.float32), np.zeros(64, np.float32), np.zeros(64, np.float32)
    read, middle = simt_build.buffer(semantics, "in", given), written(semantics, between, "middle")
    out = written(semantics, result)
    with pytest.raises(semantics.KernelError, match="reads 4 bytes at middle \\+ 0, which nothing has written"):
        semantics.scale(middle, out, 64, 3.0, 32)
    semantics.scale(read, middle, 64, 2.0, 32)
    simt_build.run(semantics.scale, middle, out, 64, 3.0, 32)
    assert (result == 6).all()


def test_a_buffer_that_nobody_can_fill_is_refused(wrong: ModuleType) -> None:
    with pytest.raises(ValueError, match="out is neither initialised nor writable"):
        simt_build.buffer(wrong, "out", np.zeros(4), initialised=False)


def test_empty_memory(semantics: ModuleType) -> None:
    nothing = np.zeros(0, np.float32)
    read, out = simt_build.buffer(semantics, "in", nothing), written(semantics, nothing)
    with pytest.raises(semantics.KernelError, match="0 bytes past its end of 0"):
        semantics.scale(read, out, 1, 1.0, 32)


# Indices, warps and barriers


@pytest.mark.parametrize(("grid", "block"), [((1, 1, 1), (1, 1, 1)), ((3, 2, 2), (4, 3, 5)), ((5, 1, 2), (33, 2, 1))])
@pytest.mark.parametrize("order", [0, 7])
def test_positions(semantics: ModuleType, grid: tuple[int, ...], block: tuple[int, ...], order: int) -> None:
    result = np.zeros((*grid[::-1], *block[::-1], 6), np.int32)
    out = written(semantics, result)
    semantics.configure(order=order)
    simt_build.run(semantics.positions, out, grid, block)
    assert out.unwritten == 0
    bz, by, bx, tz, ty, tx = np.indices(result.shape[:-1])
    assert (result == np.stack([tx, ty, tz, bx, by, bz], axis=-1)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [32, 16, 2, 1])
def test_shuffles(semantics: ModuleType, dtype: Any, width: int) -> None:
    given = np.random.default_rng(0).standard_normal(64).astype(dtype)
    lane = np.arange(64)
    within, first = lane % width, lane - lane % width
    for argument in (0, 1, 3, 15, 16, 31):
        wanted = {
            0: first + argument % width,
            1: np.where(within >= argument, lane - argument, lane),
            2: np.where(within + argument < width, lane + argument, lane),
            3: np.where(lane % 32 ^ argument < (first % 32) + width, lane // 32 * 32 + (lane % 32 ^ argument), lane),
        }
        for mode, source in wanted.items():
            result = np.zeros_like(given)
            read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
            simt_build.run(semantics.shuffles, read, out, mode, argument, width)
            assert (result == given[source]).all(), (mode, argument)


@pytest.mark.parametrize("threads", [32, 40, 96])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_votes(semantics: ModuleType, threads: int, share: float) -> None:
    given = (np.random.default_rng(1).random(threads) < share).astype(np.int32) * 5
    result = np.zeros((threads, 6), np.uint32)
    simt_build.run(semantics.votes, simt_build.buffer(semantics, "in", given), written(semantics, result))
    for thread in range(threads):
        warp = given[thread // 32 * 32 : thread // 32 * 32 + 32] != 0
        ballot = sum(int(vote) << lane for lane, vote in enumerate(warp))
        block = [(given != 0).any(), (given != 0).all(), (given != 0).sum()]
        assert result[thread].tolist() == [ballot, warp.any(), warp.all(), *block]


def test_lanes_that_have_left_are_not_waited_for_and_activemask_promises_nothing(semantics: ModuleType) -> None:
    result = np.zeros((20, 2), np.uint32)
    simt_build.run(semantics.lanes_that_stay, written(semantics, result))
    assert (result[:, 0] == 0x55555).all() and (result[:, 1] == 1 << np.arange(20)).all()


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000, 4096])
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_sums_of_blocks(semantics: ModuleType, count: int, threads: int) -> None:
    given = np.random.default_rng(2).integers(-1000, 1000, count).astype(np.int32)
    blocks = -(-count // threads)
    result = np.zeros(blocks, np.int32)
    read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
    simt_build.run(semantics.block_sums, read, out, count, threads, True)
    padded = np.pad(given, (0, blocks * threads - count)).reshape(blocks, threads)
    assert (result == padded.sum(axis=1)).all()


@pytest.mark.parametrize(("blocks", "threads"), [(1, 1), (3, 64), (2, 1024)])
def test_maxima_in_dynamic_shared_memory(semantics: ModuleType, blocks: int, threads: int) -> None:
    given = np.random.default_rng(3).standard_normal((blocks, threads)).astype(np.float32)
    given[0, threads // 2] = np.nan
    result = np.zeros(blocks, np.float32)
    read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
    simt_build.run(semantics.block_maxima, read, out, blocks, threads)
    np.testing.assert_array_equal(result, given.max(axis=1))


def test_lanes_ordered_by_syncwarp(semantics: ModuleType) -> None:
    given, result = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    simt_build.run(semantics.rotate_in_warp, simt_build.buffer(semantics, "in", given), written(semantics, result), 5)
    assert (result == np.roll(given.reshape(2, 32), -5, axis=1).ravel()).all()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows_handed_over_at_named_barriers(semantics: ModuleType, rows: int, order: int) -> None:
    given, result = np.random.default_rng(0).random((rows, 32)).astype(np.float32), np.zeros((rows, 3, 32), np.float32)
    read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
    semantics.configure(order=order)
    simt_build.run(semantics.handed_over, read, out, rows)
    assert (result == given[:, np.arange(32) ^ np.arange(1, 4)[:, None]]).all()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_groups_of_warps_with_named_barriers_of_their_own(semantics: ModuleType, order: int) -> None:
    given, result = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
    semantics.configure(order=order)
    simt_build.run(semantics.rotate_in_groups, read, out, 5)
    assert (result == np.concatenate([np.roll(given[:64], -5), np.roll(given[64:], -10)])).all()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_what_all_have_read_may_be_overwritten_after_a_named_barrier(semantics: ModuleType, order: int) -> None:
    given, result = np.arange(160, dtype=np.float32).reshape(5, 32), np.zeros((5, 3, 32), np.float32)
    read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
    semantics.configure(order=order)
    simt_build.run(semantics.overwritten_after_named_barrier, read, out, 5)
    assert (result == (given + given[:, np.arange(32) ^ 1] + 1)[:, None]).all()


@pytest.mark.parametrize("settings", [{}, {"order": 1}, {"order": 2}, {"threads": 3}])
def test_a_named_barrier_hands_on_what_blocks_release(semantics: ModuleType, settings: dict[str, int]) -> None:
    given, result = np.arange(512, dtype=np.float32).reshape(8, 64), np.zeros(64, np.float32)
    counter, parts = np.zeros(1, np.uint32), np.zeros(512, np.float32)
    read, out = simt_build.buffer(semantics, "in", given), written(semantics, result)
    semantics.configure(**settings)
    simt_build.run(
        semantics.sum_by_last_group,
        read,
        out,
        written(semantics, parts, "parts"),
        simt_build.buffer(semantics, "counter", counter, writable=True),
    )
    assert (result == given.sum(axis=0)[np.arange(64) ^ 33]).all()


def test_bytes_halves_and_words_of_the_same_memory(semantics: ModuleType) -> None:
    result = np.zeros(16, np.uint8)
    simt_build.run(semantics.parts_of_words, written(semantics, result))
    wanted = (np.arange(16) // 4 + 16 + (np.arange(16) % 2 == 0)).reshape(4, 4)
    wanted[3] = wanted[0]
    assert (result == wanted.ravel()).all()


# Atomics and fences


@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint64"])
@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (5, 64)])
def test_atomics(semantics: ModuleType, dtype: str, blocks: int, threads: int) -> None:
    count = blocks * threads
    start = [0, 0, 100, -1 if dtype == "int32" else np.iinfo(dtype).max, 0, 0, 0, 0, 0, 0]
    result = np.array(start, dtype)
    out = simt_build.buffer(semantics, "out", result, writable=True)
    simt_build.run(semantics.atomics, out, dtype, blocks, threads)
    cleared = (1 << min(threads, 31)) - 1
    odd = sum(1 << bit for bit in range(31) if blocks * sum(t % 31 == bit for t in range(threads)) % 2)
    everything = (1 << np.iinfo(dtype).bits) - 1
    kept = np.array([everything & ~cleared], np.uint64).astype(dtype)[0]
    wanted = [count * (count - 1) // 2, count - 1, 0, kept, cleared, odd, 7, 5, 1, count]
    assert result.tolist() == [int(value) for value in wanted]


def test_atomics_of_other_kinds(semantics: ModuleType) -> None:
    total, wide, counters = np.zeros(1, np.float32), np.zeros(1), np.array([0, 0, 0], np.uint32)
    buffers = [
        simt_build.buffer(semantics, name, array, writable=True)
        for name, array in (("sum", total), ("wide", wide), ("counters", counters))
    ]
    simt_build.run(semantics.other_atomics, *buffers, 3)
    down = 0
    for _ in range(96):
        down = 4 if down in (0, 5) else down - 1
    assert (total[0], wide[0]) == (24, 48)
    assert counters.tolist() == [96 % 5, down, 2**32 - 3 * 96]


@pytest.mark.parametrize("pattern", [0, 1, 2])
@pytest.mark.parametrize("blocks", [1, 2, 37])
def test_the_last_block_adds_up(semantics: ModuleType, pattern: int, blocks: int) -> None:
    given = np.random.default_rng(4).integers(0, 100, blocks * 32).astype(np.float32)
    workspace = np.zeros(2 + blocks * 32, np.float32)
    workspace[1] = 1
    read = simt_build.buffer(semantics, "in", given)
    kept = simt_build.buffer(semantics, "workspace", workspace, writable=True)
    for turn, settings in enumerate(({}, {"order": 5}, {"threads": 2}, {"threads": 3, "order": 6}), 1):
        result = np.zeros(1, np.float32)
        semantics.configure(**settings)
        simt_build.run(semantics.sum_of_all, read, written(semantics, result), kept, pattern, blocks)
        assert result[0] == turn * given.sum()
        assert workspace.view(np.uint32)[0] == 0


@pytest.mark.parametrize("order", range(4))
def test_the_last_warp_adds_up(semantics: ModuleType, order: int) -> None:
    given, result = np.arange(128, dtype=np.float32), np.zeros(1, np.float32)
    semantics.configure(order=order)
    simt_build.run(semantics.sum_by_last_warp, simt_build.buffer(semantics, "in", given), written(semantics, result))
    assert result[0] == given.sum()


# Asynchronous copies and matrices of a warp


@pytest.mark.parametrize("bytes_each", [4, 8, 16])
@pytest.mark.parametrize("order", [0, 3])
def test_asynchronous_copies(semantics: ModuleType, bytes_each: int, order: int) -> None:
    rng = np.random.default_rng(7)
    given, taken = rng.integers(0, 256, (128, bytes_each), np.uint8), (rng.random(128) < 0.7).astype(np.uint8)
    taken[[0, -1]] = 0
    result = np.zeros_like(given)
    inside = given[:-1]  # of a copy that is not taken the source may lie anywhere
    buffers = [simt_build.buffer(semantics, name, array) for name, array in (("in", inside), ("taken", taken))]
    semantics.configure(order=order)
    simt_build.run(semantics.copies, *buffers, written(semantics, result), bytes_each)
    assert (result == given * taken[:, None]).all()


def test_groups_without_copies_and_copies_without_a_group(semantics: ModuleType) -> None:
    given, result = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    simt_build.run(semantics.empty_groups, simt_build.buffer(semantics, "in", given), written(semantics, result))
    assert (result == given).all()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("stride", [16, 48, 144])
def test_matrices_are_loaded_as_the_ptx_isa_says(semantics: ModuleType, count: int, stride: int) -> None:
    rows = np.random.default_rng(8).integers(0, 2**32, (32, 4), np.uint32)
    result = np.zeros((32, count), np.uint32)
    read = simt_build.buffer(semantics, "in", rows)
    simt_build.run(semantics.loaded_matrices, read, written(semantics, result), count, stride)
    for lane in range(32):
        assert result[lane].tolist() == [rows[8 * matrix + lane // 4, lane % 4] for matrix in range(count)]


Layout = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # rows and columns of the numbers of every lane

PRODUCTS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}


def layouts_of_the_ptx_isa(bits: int) -> dict[str, Layout]:
    """The formulas of "Matrix Fragments for mma.m16n8k16 with floating point type" and "... for mma.m16n8k32"."""
    lane = np.arange(32)[:, None]
    group, within = lane >> 2, lane % 4
    if bits == 16:
        i, j = np.arange(8), np.arange(4)
        left = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8), within * 2 + (i & 1) + np.where(i < 4, 0, 8)
        right = within * 2 + (j & 1) + np.where(j < 2, 0, 8), group + 0 * j
    else:
        i, j = np.arange(16), np.arange(8)
        left = (
            np.where((i < 4) | ((i >= 8) & (i < 12)), group, group + 8),
            within * 4 + (i & 3) + np.where(i < 8, 0, 16),
        )
        right = within * 4 + (j & 3) + np.where(j < 4, 0, 16), group + 0 * j
    k = np.arange(4)
    return {"left": left, "right": right, "sums": (np.where(k < 2, group, group + 8), within * 2 + (k & 1))}


def layouts_of_triton(bits: int) -> dict[str, Layout]:
    """What Triton's compiler takes the registers of mma version 2 to hold."""
    libtriton = pytest.importorskip("triton._C.libtriton")
    gluon = pytest.importorskip("triton.experimental.gluon.language")
    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    builder = libtriton.gluon_ir.GluonOpBuilder(context)
    sums = gluon.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    left, right = (gluon.DotOperandLayout(side, sums, 32 // bits) for side in range(2))
    depth = 256 // bits
    layouts = {}
    for name, layout, shape in (("left", left, [16, depth]), ("right", right, [depth, 8]), ("sums", sums, [16, 8])):
        linear = builder.to_linear_layout(layout._to_ir(builder), shape)
        places = np.zeros((32, 2 ** len(linear.reg_bases), 2), np.int64)
        for axis, bases in ((0, linear.lane_bases), (1, linear.reg_bases)):
            for bit, base in enumerate(bases):
                chosen = np.arange(places.shape[axis]) >> bit & 1
                places ^= np.expand_dims(chosen[:, None] * np.array(base), 1 - axis)
        layouts[name] = places[..., 0], places[..., 1]
    return layouts


def multiply_fragments(
    module: ModuleType, product: str, layouts: dict[str, Layout], left: torch.Tensor, right: torch.Tensor, sums: Any
) -> np.ndarray[Any, Any]:
    """left @ right + sums by one multiply_add, of lanes whose registers hold what `layouts` says."""
    registers = {"left": left[layouts["left"]], "right": right[layouts["right"]], "sums": torch.tensor(sums)}
    registers["sums"] = registers["sums"][layouts["sums"]]
    buffers = [simt_build.buffer(module, name, array.contiguous()) for name, array in registers.items()]
    result, got = np.zeros((16, 8), np.float32), np.zeros((32, 4), np.float32)
    simt_build.run(module.multiplied_fragments, product, *buffers, written(module, got))
    result[layouts["sums"]] = got
    return result


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("source", [layouts_of_the_ptx_isa, layouts_of_triton])
def test_a_product_of_fragments(semantics: ModuleType, product: str, source: Any) -> None:
    dtype, rng = PRODUCTS[product], np.random.default_rng(9)
    depth = 32 // dtype.itemsize
    layouts = source(8 * dtype.itemsize)
    for name, shape in (("left", (16, depth)), ("right", (depth, 8)), ("sums", (16, 8))):
        places = {(int(row), int(column)) for row, column in zip(*map(np.ravel, layouts[name]), strict=True)}
        assert places == set(np.ndindex(shape)), name
    for order in range(3):
        left, right, sums = (rng.integers(-8, 9, s).astype(np.float32) for s in ((16, depth), (depth, 8), (16, 8)))
        semantics.configure(order=order)
        operands = [torch.tensor(one).to(dtype) for one in (left, right)]
        assert (multiply_fragments(semantics, product, layouts, *operands, sums) == left @ right + sums).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_added_one_after_the_other(semantics: ModuleType, product: str) -> None:
    dtype, generator = PRODUCTS[product], torch.Generator().manual_seed(10)
    depth = 32 // dtype.itemsize
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, depth), (depth, 8)))
    sums = torch.randn(16, 8, generator=generator).numpy()
    wanted = sums.copy()
    for k in range(depth):
        wanted += np.outer(left[:, k].float().numpy(), right[k].float().numpy())
    got = multiply_fragments(semantics, product, layouts_of_the_ptx_isa(8 * dtype.itemsize), left, right, sums)
    assert (got == wanted).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_number_of_a_product(semantics: ModuleType, product: str) -> None:
    dtype = PRODUCTS[product]
    bits, depth = 8 * dtype.itemsize, 32 // dtype.itemsize
    codes = np.arange(2**bits, dtype=f"u{bits // 8}")[:: 1 if bits == 8 else 257]
    every = torch.from_numpy(np.pad(codes, (0, -codes.size % 16)).view(f"i{bits // 8}")).view(dtype)
    layouts = layouts_of_the_ptx_isa(bits)
    one = torch.zeros(depth, 8).to(dtype)
    one[0] = torch.ones(8).to(dtype)
    for some in every.reshape(-1, 16):
        left = torch.zeros(16, depth).to(dtype)
        left[:, 0] = some
        got = multiply_fragments(semantics, product, layouts, left, one, np.zeros((16, 8), np.float32))
        np.testing.assert_array_equal(got, np.tile(some.float().numpy()[:, None], 8))


def test_products_beyond_the_numbers(semantics: ModuleType) -> None:
    left, right, sums = torch.zeros(16, 16), torch.zeros(16, 8), np.zeros((16, 8), np.float32)
    left[0, 0], left[1, 0], left[2, 0], left[3, :2] = torch.inf, torch.nan, -torch.inf, 1e38
    right[0], right[1] = 2.0, 2.0
    sums[2, 0], sums[3, 0] = np.inf, -np.inf
    operands = [one.bfloat16() for one in (left, right)]
    got = multiply_fragments(semantics, "bfloat16", layouts_of_the_ptx_isa(16), *operands, sums)
    assert (got[0] == np.inf).all() and np.isnan(got[1]).all()
    assert np.isnan(got[2, 0]) and (got[2, 1:] == -np.inf).all()
    assert got[3, 0] == -np.inf and (got[3, 1:] == np.inf).all()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("depth", [16, 64, 208])
@pytest.mark.parametrize("order", [0, 4])
def test_a_product_through_shared_memory(semantics: ModuleType, product: str, depth: int, order: int) -> None:
    dtype, generator = PRODUCTS[product], torch.Generator().manual_seed(11)
    left, right = (torch.randn(64, depth // dtype.itemsize, generator=generator).to(dtype) for _ in range(2))
    result = np.zeros((64, 64), np.float32)
    buffers = [simt_build.buffer(semantics, name, array) for name, array in (("left", left), ("right", right))]
    semantics.configure(order=order)
    simt_build.run(semantics.matrix_product, product, *buffers, written(semantics, result), depth)
    a, b = left.double().numpy(), right.double().numpy()
    largest = np.abs(a) @ np.abs(b).T
    assert (np.abs(result - a @ b.T) <= largest * a.shape[1] * 2.0**-24).all()


def test_conversion_to_e4m3(semantics: ModuleType) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[~every.isnan()].double().unique().numpy()
    middle = ((every[1:] + every[:-1]) / 2).astype(np.float32)
    beside = np.concatenate([np.nextafter(middle, np.float32(sign * np.inf)) for sign in (-1, 1)])
    ends = np.float32([448, 449, 463.99997, 464, 465, 480, 1e30, np.inf, 2**-10, 2**-10 * 1.0001, 1e-45, 0])
    given = np.concatenate([middle, beside, ends, -ends, awkward_floats()]).astype(np.float32)
    given = np.stack([given, np.roll(given, 1)], axis=1)
    result = np.zeros(len(given), np.uint16)
    read = simt_build.buffer(semantics, "in", given)
    simt_build.run(semantics.to_e4m3, read, written(semantics, result))
    wanted = torch.from_numpy(given).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    wanted = np.where(np.isnan(given), 0x7F, wanted)
    assert (result.view(np.uint8).reshape(wanted.shape) == wanted).all()


# The same with any number of system threads


def test_results_do_not_depend_on_the_number_of_threads(semantics: ModuleType) -> None:
    given = np.random.default_rng(5).standard_normal(100 * 64).astype(np.float32)
    read = simt_build.buffer(semantics, "in", given)
    results = []
    for threads in (1, 2, 5):
        result = np.zeros(100, np.float32)
        semantics.configure(threads=threads)
        simt_build.run(semantics.block_sums, read, written(semantics, result), given.size, 64, False)
        results.append(result)
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()
    np.testing.assert_allclose(results[0], given.reshape(100, 64).sum(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reads", [[0, 0, 0], [200_000, 0, 0], [100_000, 500_000, 0]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_failing_block_is_reported(semantics: ModuleType, reads: list[int], threads: int) -> None:
    given = simt_build.buffer(semantics, "reads", np.array(reads, np.float32))
    for _ in range(5):
        semantics.configure(threads=threads)
        with pytest.raises(semantics.KernelError, match=r"^fail_after: block \(0,0,0\) thread \(0,0,0\) reads 4 bytes"):
            semantics.fail_after(given, written(semantics, np.zeros(3, np.float32)))


def test_counts(semantics: ModuleType) -> None:
    read = simt_build.buffer(semantics, "in", np.ones(64, np.float32))
    out = written(semantics, np.zeros(64, np.float32))
    semantics.take_counts()
    semantics.scale(read, out, 64, 1.0, 32)
    counts = semantics.take_counts()
    assert counts["blocks"] == 2 and counts["accesses"] >= 128 and counts["switches"] >= 64
    assert semantics.take_counts() == {"accesses": 0, "switches": 0, "blocks": 0}


# Numbers


def test_the_larger_of_two(semantics: ModuleType) -> None:
    """NaN where one is, and zero without a sign where the two are zeros of both signs."""
    special = np.float32([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38])
    given = np.stack(np.meshgrid(special, special), axis=-1).reshape(-1, 2)
    result = np.zeros(len(given), np.float32)
    read = simt_build.buffer(semantics, "in", given)
    simt_build.run(semantics.larger, read, written(semantics, result))
    np.testing.assert_array_equal(result, np.maximum(given[:, 0], given[:, 1]))
    zeros = (given == 0).all(1)
    assert (np.signbit(result[zeros]) == np.signbit(given[zeros]).all(1)).all()


def awkward_floats() -> np.ndarray[Any, Any]:
    """Every half and bfloat16, the floats beside and between them, and NaN."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    bfloats = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    between = np.concatenate([bfloats.view(np.uint32) + 0x8000, halves.view(np.uint32) + 0x1000]).view(np.float32)
    exact = np.concatenate([halves, bfloats, between])
    return np.concatenate([exact, (exact.view(np.uint32) + 1).view(np.float32), (exact.view(np.uint32) - 1).view("f4")])


def test_conversion_to_half_and_bfloat16(semantics: ModuleType) -> None:
    given = awkward_floats()
    halves, bfloats = np.zeros(given.size, np.uint16), np.zeros(given.size, np.uint16)
    read = simt_build.buffer(semantics, "in", given)
    simt_build.run(semantics.to_halves, read, written(semantics, halves), written(semantics, bfloats))
    with np.errstate(over="ignore"):
        wanted_halves = given.astype(np.float16).view(np.uint16)
    wanted_bfloats = torch.from_numpy(given).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(given)
    assert (halves[~nan] == wanted_halves[~nan]).all() and (bfloats[~nan] == wanted_bfloats[~nan]).all()
    assert (halves[nan] == 0x7FFF).all() and (bfloats[nan] == 0x7FFF).all()


def test_conversion_from_half_and_bfloat16(semantics: ModuleType) -> None:
    given = np.arange(65536, dtype=np.uint16)
    result, result_bfloats = np.zeros(65536, np.float32), np.zeros(65536, np.float32)
    read = simt_build.buffer(semantics, "in", given)
    simt_build.run(semantics.from_halves, read, read, written(semantics, result), written(semantics, result_bfloats))
    np.testing.assert_array_equal(result, given.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(result_bfloats, (given.astype(np.uint32) << 16).view(np.float32))


def test_a_double_is_rounded_once(semantics: ModuleType) -> None:
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float64)
    middle = (halves[1:] + halves[:-1]) / 2
    nudge = middle * 2.0**-40
    given = np.concatenate([halves, middle, middle + nudge, middle - nudge])
    given = np.concatenate([given, -given, [np.inf, -np.inf, 1e300]])
    result = np.zeros(given.size, np.uint16)
    simt_build.run(semantics.double_to_half, simt_build.buffer(semantics, "in", given), written(semantics, result))
    with np.errstate(over="ignore"):
        assert (result == given.astype(np.float16).view(np.uint16)).all()


def test_arithmetic_of_halves(semantics: ModuleType) -> None:
    rng = np.random.default_rng(6)
    a, b = (rng.standard_normal((500, 2)).astype(np.float16) for _ in range(2))
    result = np.zeros((500, 4, 2), np.float16)
    simt_build.run(
        semantics.half_arithmetic,
        simt_build.buffer(semantics, "a", a),
        simt_build.buffer(semantics, "b", b),
        written(semantics, result),
    )
    assert (result == np.stack([a + b, a - b, a * b, a / b], axis=1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_of_pairs(semantics: ModuleType, dtype: torch.dtype) -> None:
    some = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e-6, 300.0, torch.inf, -torch.inf, torch.nan])
    a, b = (one.reshape(-1).to(dtype) for one in torch.meshgrid(some, some, indexing="ij"))
    a, b = (torch.cat([one, one[:1]]).reshape(-1, 2) for one in (a, b))
    result = torch.zeros(len(a), 5, 2, dtype=dtype)
    buffers = [simt_build.buffer(semantics, name, array) for name, array in (("a", a), ("b", b))]
    simt_build.run(semantics.pair_arithmetic, *buffers, written(semantics, result), dtype == torch.bfloat16)
    x, y = a.float(), b.float()
    zeros = (x == 0) & (y == 0)
    largest = torch.where(zeros, x + y, torch.fmax(x, y))
    least = torch.where(zeros, -(-x - y), torch.fmin(x, y))
    wanted = torch.stack([x + y, x - y, x * y, largest, least], dim=1).to(dtype)
    torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
    assert (torch.signbit(result) == torch.signbit(wanted))[~wanted.isnan()].all()


@pytest.mark.parametrize("selector", [0x3210, 0x7654, 0x5410, 0x0246, 0x8FB0])
def test_permuted_bytes(semantics: ModuleType, selector: int) -> None:
    given, result = np.random.default_rng(12).integers(0, 2**32, (16, 2), np.uint32), np.zeros(16, np.uint32)
    read = simt_build.buffer(semantics, "in", given)
    simt_build.run(semantics.permuted_bytes, read, written(semantics, result), selector)
    digits = np.array([selector >> 4 * i & 15 for i in range(4)])
    chosen = given.view(np.uint8)[:, digits & 7]
    wanted = np.where(digits & 8, np.where(chosen & 0x80, 0xFF, 0), chosen)
    assert (result.view(np.uint8).reshape(16, 4) == wanted).all()


def test_conversion_to_integers_saturates(semantics: ModuleType) -> None:
    given = np.array([0, 0.5, 1.5, -0.5, -2.5, 2.7, -2.7, 3e9, -3e9, 5e9, np.inf, -np.inf, np.nan], np.float32)
    result = np.zeros((given.size, 5), np.int32)
    simt_build.run(semantics.to_integers, simt_build.buffer(semantics, "in", given), written(semantics, result))
    wide = np.nan_to_num(given.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    rounded = [np.clip(f(wide), -(2**31), 2**31 - 1) for f in (np.rint, np.trunc, np.floor, np.ceil)]
    assert (result[:, :4] == np.stack(rounded, axis=1).astype(np.int64)).all()
    assert (result[:, 4].view(np.uint32) == np.clip(np.rint(wide), 0, 2**32 - 1).astype(np.uint32)).all()


def test_bits(semantics: ModuleType) -> None:
    given = np.array([0, 1, 2, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x00F00000], np.uint32)
    result = np.zeros((given.size, 6), np.int32)
    simt_build.run(semantics.bit_counts, simt_build.buffer(semantics, "in", given), written(semantics, result))
    for value, own in zip(given.tolist(), result.view(np.uint32).tolist(), strict=True):
        text = f"{value:032b}"
        lowest = 0 if value == 0 else len(text) - text.rindex("1")
        highest = 32 if value == 0 else text.index("1")
        assert own == [
            text.count("1"), lowest, highest, int(text[::-1], 2), value * value >> 32, value & 0x7F7FFFFF
        ]  # fmt: skip


def test_extremes_prefer_numbers_to_nan(semantics: ModuleType) -> None:
    a = np.array([1, np.nan, 2, np.nan], np.float32)
    b = np.array([3, 4, np.nan, np.nan], np.float32)
    result = np.zeros((4, 2), np.float32)
    simt_build.run(
        semantics.extremes,
        simt_build.buffer(semantics, "a", a),
        simt_build.buffer(semantics, "b", b),
        written(semantics, result),
    )
    np.testing.assert_array_equal(result, np.stack([np.fmin(a, b), np.fmax(a, b)], axis=1))


def test_constant_memory(semantics: ModuleType) -> None:
    given, result = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    simt_build.run(semantics.weighted, simt_build.buffer(semantics, "in", given), written(semantics, result))
    assert (result == given * np.tile(np.float32([0.5, 1, 2, 4]), 8)).all()
