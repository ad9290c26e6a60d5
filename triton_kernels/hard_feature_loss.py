"""``hard_feature_loss`` in Triton. efficientad_fast/ops/hard_feature_loss.py is the contract.

The quantile's three passes count digits of squares that each makes of both tensors; a fourth adds those that reach it.
Both tensors are read as rows of numbers that are next to each other, in tiles of some rows and columns: a slice of
channels has a row for each pixel, or for each image. Sums are of tiles that do not depend on what runs first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientad_fast.ops import hard_feature_loss as contract
from efficientad_fast.ops import quantile as quantile_contract
from efficientad_fast.reference.losses import HARD_FRACTION

from .launching import launch, require_runnable, tiles
from .quantile import _add_counts, _histogram, _keys, _share, select

BLOCK = 4096  # numbers of a tile
GRADIENT_BLOCK = 1024
NARROW = (128, 16)  # columns of tiles where rows have fewer numbers than a tile
UNIT = 16  # of columns and strides that are multiples of it: the compiler knows then, and loads vectors
SIZES = ["rows", "columns", "teacher_stride", "student_stride"]


class _Pairs(NamedTuple):
    """Both tensors in the order of the gradient's memory; strides are from row to row."""

    teacher: Tensor
    student: Tensor
    rows: int
    columns: int
    teacher_stride: int
    student_stride: int

    @property
    def unit(self) -> int:
        """What columns and strides are multiples of, as far as it helps."""
        multiples = (self.columns, self.teacher_stride, self.student_stride)
        return UNIT if all(one % UNIT == 0 for one in multiples) else 1

    def sizes(self) -> list[int]:
        """Rows, columns and strides as the kernels take them."""
        unit = self.unit
        return [self.rows, self.columns // unit, self.teacher_stride // unit, self.student_stride // unit]

    def tiled(self, block: int) -> tuple[int, int]:
        """How many tiles of ``block`` numbers, and the columns of one."""
        width = next((one for one in (block, *NARROW) if one <= self.columns), NARROW[-1])
        return tiles(self.columns, width) * tiles(self.rows, block // width), width


@triton.jit
def _differences(
    teacher_ptr,
    student_ptr,
    tile,
    rows,
    columns,
    teacher_stride,
    student_stride,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """student - teacher of a tile in float32, which of its numbers there are, and where they are if rows touch."""
    all_columns = tl.full((), columns, tl.int64) * UNIT
    across = tl.cdiv(all_columns, WIDTH).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    row = (tile // across).to(tl.int64) * (BLOCK // WIDTH) + lane // WIDTH
    column = (tile % across).to(tl.int64) * WIDTH + lane % WIDTH
    taken = (row < rows) & (column < all_columns)
    teacher_at = row * (tl.full((), teacher_stride, tl.int64) * UNIT) + column
    student_at = row * (tl.full((), student_stride, tl.int64) * UNIT) + column
    teacher = tl.load(teacher_ptr + teacher_at, mask=taken, other=0).to(tl.float32)
    student = tl.load(student_ptr + student_at, mask=taken, other=0).to(tl.float32)
    return student - teacher, taken, row * all_columns + column


@triton.jit(do_not_specialize=[*SIZES, "all_tiles", "step"])
def _count_digits_of_squares(
    teacher_ptr,  # rows of columns numbers
    student_ptr,  # likewise
    workspace_ptr,  # of the quantile's contract
    rows,
    columns,  # in units
    teacher_stride,  # from row to row, in units
    student_stride,
    all_tiles,
    step,  # tiles that all programs of a slot read in a round
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,  # lowest bit of this digit
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    slot, part, prefix, counting = _share(workspace_ptr, DIGIT, SLOTS, BINS)
    if counting:
        counts = tl.zeros((BINS,), tl.int32)
        tile = part
        while tile < all_tiles:
            difference, taken, _ = _differences(
                teacher_ptr, student_ptr, tile, rows, columns, teacher_stride, student_stride, UNIT, BLOCK, WIDTH
            )
            keys = _keys(difference * difference)
            counts += _histogram(keys, taken, prefix, DIGIT, SHIFT, BITS, BINS)
            tile += step
        _add_counts(workspace_ptr, slot, counts, DIGIT, SLOTS, BINS)


@triton.jit(do_not_specialize=[*SIZES, "all_tiles", "step"], do_not_specialize_on_alignment=["threshold_ptr"])
def _add_selected(
    teacher_ptr,  # rows of columns numbers
    student_ptr,  # likewise
    threshold_ptr,  # one, float32
    parts_ptr,  # (2, PARTS), int64: of each part the bits of a float64 sum, and how many numbers it is of
    rows,
    columns,  # in units
    teacher_stride,  # from row to row, in units
    student_stride,
    all_tiles,
    step,  # tiles that all programs read in a round
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    threshold = tl.load(threshold_ptr)
    sums = tl.zeros((BLOCK,), tl.float32)
    numbers = tl.zeros((BLOCK,), tl.int32)
    part = tl.program_id(0)
    tile = part
    while tile < all_tiles:
        difference, taken, _ = _differences(
            teacher_ptr, student_ptr, tile, rows, columns, teacher_stride, student_stride, UNIT, BLOCK, WIDTH
        )
        squared = difference * difference
        selected = taken & (squared >= threshold)
        sums += tl.where(selected, squared, 0)
        numbers += selected.to(tl.int32)
        tile += step
    total = tl.sum(sums.to(tl.float64))
    tl.store(parts_ptr + part, total.to(tl.int64, bitcast=True))
    tl.store(parts_ptr + PARTS + part, tl.sum(numbers.to(tl.int64)))


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["loss_ptr", "count_ptr"])
def _mean_of_parts(
    parts_ptr,  # (2, PARTS), int64
    loss_ptr,  # one, float32
    count_ptr,  # one, int64
    parts,  # how many there are
    PARTS: tl.constexpr,
):
    part = tl.arange(0, PARTS)
    there = part < parts
    sums = tl.load(parts_ptr + part, mask=there, other=0).to(tl.float64, bitcast=True)
    count = tl.sum(tl.load(parts_ptr + PARTS + part, mask=there, other=0))
    mean = tl.sum(sums) / tl.maximum(count, 1).to(tl.float64)
    tl.store(loss_ptr, tl.where(count > 0, mean, float("nan")).to(tl.float32))
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["threshold_ptr", "count_ptr", "grad_loss_ptr"])
def _gradient_of_squares(
    teacher_ptr,  # rows of columns numbers
    student_ptr,  # likewise
    threshold_ptr,  # one, float32
    count_ptr,  # one, int64
    grad_loss_ptr,  # one, float32
    gradient_ptr,  # rows of columns numbers, contiguous
    rows,
    columns,  # in units
    teacher_stride,  # from row to row, in units
    student_stride,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    count = tl.maximum(tl.load(count_ptr), 1)  # where it is 0 nothing is selected
    factor = (tl.load(grad_loss_ptr).to(tl.float64) / count.to(tl.float64)).to(tl.float32)
    difference, taken, at = _differences(
        teacher_ptr, student_ptr, tl.program_id(0), rows, columns, teacher_stride, student_stride, UNIT, BLOCK, WIDTH
    )
    # A difference that is not finite makes NaN of zero, as the contract says.
    gradient = tl.where(difference * difference >= tl.load(threshold_ptr), factor, 0.0) * (2 * difference)
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=taken)


def _row_stride(features: Tensor, axes: int) -> int | None:
    """From row to row, where the first ``axes`` axes are rows of what is contiguous; None where they are not."""
    shape, strides = features.shape, features.stride()
    size = 1
    for axis in range(features.dim() - 1, axes - 1, -1):
        if shape[axis] > 1 and strides[axis] != size:
            return None
        size *= shape[axis]
    between, rows = 0, 1
    for axis in range(axes - 1, -1, -1):
        if shape[axis] > 1:
            between = between or strides[axis]
            if strides[axis] != between * rows:
                return None
            rows *= shape[axis]
    return between


def _pairs(teacher: Tensor, student: Tensor) -> _Pairs:
    """In place where they have rows in common; else one is copied, or both."""
    require_runnable("hard_feature_loss", "teacher", teacher)
    if contract.has_channels_innermost(student):
        teacher, student = teacher.permute(0, 2, 3, 1), student.permute(0, 2, 3, 1)
    copies: list[Callable[[], tuple[Tensor, Tensor]]] = [
        lambda: (teacher, student),
        lambda: (teacher.contiguous(), student),
        lambda: (teacher, student.contiguous()),
    ]
    for copy in copies:
        both = copy()
        for axes in range(teacher.dim()):
            strides = [_row_stride(one, axes) for one in both]
            if None not in strides:
                rows = both[0].shape[:axes].numel()
                return _Pairs(*both, rows, both[0].numel() // rows, *strides)  # type: ignore[arg-type]
    both = teacher.contiguous(), student.contiguous()
    return _Pairs(*both, 1, teacher.numel(), 0, 0)


def _loss_into(
    teacher: Tensor, student: Tensor, fraction: float, loss: Tensor, threshold: Tensor, count: Tensor, workspace: Tensor
) -> None:
    pairs, device = _pairs(teacher, student), teacher.device
    all_tiles, width = pairs.tiled(BLOCK)
    programs = min(all_tiles, contract.MOST_PARTS)
    for_quantile, parts = workspace[: quantile_contract.WORKSPACE], workspace[quantile_contract.WORKSPACE :]
    sizes = [*pairs.sizes(), all_tiles, programs]
    tile = {"UNIT": pairs.unit, "BLOCK": BLOCK, "WIDTH": width}

    def count_digits(slots: int, **constants: int) -> None:
        arguments = [*pairs[:2], for_quantile, *sizes]
        launch(_count_digits_of_squares, programs * slots, device, arguments, **constants, **tile, num_warps=8)

    select([fraction], teacher.numel(), threshold, for_quantile, count_digits)
    arguments = [*pairs[:2], threshold, parts, *sizes]
    launch(_add_selected, programs, device, arguments, PARTS=contract.MOST_PARTS, **tile, num_warps=8)
    launch(_mean_of_parts, 1, device, [parts, loss, count, programs], PARTS=contract.MOST_PARTS, num_warps=4)


def hard_feature_loss(
    teacher: Tensor, student: Tensor, fraction: float = HARD_FRACTION
) -> tuple[Tensor, Tensor, Tensor]:
    """``hard_feature_loss`` of the catalogue."""
    results = contract.fake(teacher, student, fraction)
    workspace = torch.empty(contract.WORKSPACE, dtype=torch.int64, device=teacher.device)
    _loss_into(teacher, student, fraction, *results, workspace)
    return results


def hard_feature_loss_out(
    teacher: Tensor,
    student: Tensor,
    fraction: float = HARD_FRACTION,
    *,
    loss: Tensor,
    threshold: Tensor,
    count: Tensor,
    workspace: Tensor,
) -> None:
    """``hard_feature_loss.out`` of the catalogue."""
    results = {"loss": loss, "threshold": threshold, "count": count, "workspace": workspace}
    contract.fake_out(teacher, student, fraction, **results)
    _loss_into(teacher, student, fraction, **results)


def hard_feature_loss_gradient(
    teacher: Tensor, student: Tensor, threshold: Tensor, count: Tensor, grad_loss: Tensor
) -> Tensor:
    """``hard_feature_loss.gradient`` of the catalogue."""
    gradient = contract.fake_gradient(teacher, student, threshold, count, grad_loss)
    pairs = _pairs(teacher, student)
    programs, width = pairs.tiled(GRADIENT_BLOCK)
    arguments = [*pairs[:2], threshold, count, grad_loss, gradient, *pairs.sizes()]
    tile = {"UNIT": pairs.unit, "BLOCK": GRADIENT_BLOCK, "WIDTH": width}
    launch(_gradient_of_squares, programs, teacher.device, arguments, **tile, num_warps=4)
    return gradient


def representative_calls() -> dict[str, Callable[[], object]]:
    """What the kernel report compiles, with meta tensors inside `launching.recorded`: one image of 256 x 256 pixels."""

    def features(dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        both = torch.empty(1, 768, 56, 56, dtype=dtype, device="meta").contiguous(memory_format=layout)
        teacher = torch.empty(1, 384, 56, 56, device="meta").contiguous(memory_format=layout)
        return teacher, both[:, :384]

    def gradient(teacher: Tensor, student: Tensor) -> Tensor:
        loss, threshold, count = contract.fake(teacher, student)
        return hard_feature_loss_gradient(teacher, student, threshold, count, loss)

    plain = features(torch.float32, torch.contiguous_format)
    single = features(torch.float32, torch.channels_last)
    half = features(torch.float16, torch.channels_last)
    return {
        "float32": lambda: hard_feature_loss(*plain),
        "float32, channels-last slice": lambda: hard_feature_loss(*single),
        "float16, channels-last slice": lambda: hard_feature_loss(*half),
        "gradient, float32, channels-last slice": lambda: gradient(*single),
        "gradient, float16, channels-last slice": lambda: gradient(*half),
    }


overloads = {
    "default": hard_feature_loss,
    "out": hard_feature_loss_out,
    "gradient": hard_feature_loss_gradient,
}
