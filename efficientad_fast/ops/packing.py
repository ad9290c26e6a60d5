"""Packed weights, workspaces and layouts of activations: what the operators that convolve have in common.

Packed weights are ``(groups, panels, planes, depth, 32)`` float32, contiguous: ``[g, p, f, k, o]`` belongs to output
``32 p + o`` of group g, and what is no output is zero. By algorithm:

- ``"direct"``: one plane; ``k = (ky * kernel + kx) * C + c`` of C input channels, then zeros up to a multiple of 16;
- ``"winograd4"``, ``"winograd6"``: F(M x M, R x R), M = 4 or 6, for R = 3 or 4 (`efficientad_fast.ops.winograd`):
  ``(M + R - 1)^2`` planes, of which ``i * (M + R - 1) + j`` holds ``(G w G^T)[i, j]``, computed in float64 and rounded
  once; ``k = c``, then zeros up to a multiple of 16;
- ``"auto"``: ``"direct"`` for kernels other than 3 and 4 and for fewer than 16 input channels, else ``"winograd6"`` for
  3 and ``"winograd4"`` for 4.

Several convolutions whose results are added have their depths one after the other, and R is that of the largest kernel;
a smaller one lies top left in it. The number of planes tells the algorithm; nothing tells how many channels filled the
depth up to a multiple of 16. Weights are at most ``2^19 / planes - 128`` deep.

A workspace is ``(threads, numbers)`` in float32, contiguous: one row for each thread that may work. What it holds
before and after means nothing.

csrc/packing.h says the same for compiled kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from efficientad_fast.ops import winograd
from efficientad_fast.ops.overload import require, require_one_device

CHUNK = 16
PANEL = 32
LARGEST_KERNEL = 16
WORKSPACE = 1 << 21
"""Numbers of a workspace that a convolution needs for each thread."""

MIXED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
"""Of the ``mixed`` overloads: products of narrow numbers, sums in float32."""

_MIXED_NAMES = "float32, float16, bfloat16 or float8_e4m3fn"

LARGEST_E4M3 = 448.0

TILES = {"winograd4": 4, "winograd6": 6}
ALGORITHMS = ("auto", "direct", *TILES)


@dataclass(frozen=True)
class Source:
    """What a convolution reads: channels (of one group), and the side of its kernel."""

    channels: int
    kernel: int


def round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def largest_kernel(sources: Sequence[Source]) -> int:
    return max(source.kernel for source in sources)


def planes_by_algorithm(kernel: int) -> dict[str, int]:
    """Of the algorithms that fit a kernel."""
    winograds = {name: (tile + kernel - 1) ** 2 for name, tile in TILES.items()}
    return {"direct": 1} | (winograds if kernel in (3, 4) else {})


def packed_shape(groups: int, outputs: int, planes: int, sources: Sequence[Source]) -> tuple[int, ...]:
    """``outputs``: of a group."""
    depths = [source.channels * (source.kernel**2 if planes == 1 else 1) for source in sources]
    return groups, -(-outputs // PANEL), planes, sum(round_up(depth, CHUNK) for depth in depths), PANEL


def checked_planes(operator: str, algorithm: str, sources: Sequence[Source]) -> int:
    """The number of planes that an algorithm gives."""
    kernel = largest_kernel(sources)
    known = "'auto', 'direct', 'winograd4' or 'winograd6'"
    require(algorithm in ALGORITHMS, operator, "algorithm", known, repr(algorithm))
    fitting = planes_by_algorithm(kernel)
    if algorithm == "auto":
        direct = kernel not in (3, 4) or sources[0].channels < CHUNK or any(source.kernel == 1 for source in sources)
        algorithm = "direct" if direct else "winograd6" if kernel == 3 else "winograd4"
    fits = algorithm in fitting
    require(fits, operator, "algorithm", f"'auto' or 'direct' for a {kernel}x{kernel} kernel", repr(algorithm))
    planes = fitting[algorithm]
    check_depth(operator, planes, packed_shape(1, 1, planes, sources)[3])
    return planes


def check_depth(operator: str, planes: int, depth: int) -> None:
    """A block of one place, with four outputs where they are pooled, must fit into a thread's workspace."""
    most = WORKSPACE // (4 * planes) - 128
    require(depth <= most, operator, "packed", f"at most {most} deep for {planes} planes", depth)


def pack(weights: Sequence[Tensor], groups: int, planes: int) -> Tensor:
    """Weights ``(outputs, channels, k, k)`` of convolutions whose results are added, packed."""
    outputs = weights[0].shape[0] // groups
    sources = [Source(*weight.shape[1:3]) for weight in weights]
    r = largest_kernel(sources)
    shape = packed_shape(groups, outputs, planes, sources)
    parts = []
    for weight in weights:
        by_group = weight.unflatten(0, (groups, outputs))
        if planes > 1:
            by_group = winograd.transform_weights(by_group, _tile(planes, r), r).float()
            part = by_group.flatten(3).transpose(2, 3)
        else:
            part = by_group.movedim(2, 4).flatten(2).unsqueeze(2)
        parts.append(torch.nn.functional.pad(part, (0, round_up(part.shape[3], CHUNK) - part.shape[3])))
    filled = torch.nn.functional.pad(torch.cat(parts, 3), (0, 0, 0, 0, 0, shape[1] * PANEL - outputs))
    packed: Tensor = filled.unflatten(1, (shape[1], PANEL)).movedim(2, 4).contiguous()
    return packed


def unpack(packed: Tensor, outputs: int, sources: Sequence[Source]) -> list[Tensor]:
    """What :func:`pack` was given: exactly from direct weights, to a rounding or so from Winograd's (in float64)."""
    planes, r = packed.shape[2], largest_kernel(sources)
    by_output = packed.movedim(4, 2).flatten(1, 2)[:, :outputs]
    weights = []
    first = 0
    for source in sources:
        kernel = source.kernel
        depth = source.channels * (kernel**2 if planes == 1 else 1)
        part = by_output[..., first : first + depth]
        if planes > 1:
            side = _tile(planes, r) + r - 1
            transformed = part.transpose(2, 3).unflatten(3, (side, side))
            weight = winograd.recover_weights(transformed, _tile(planes, r), r)[..., :kernel, :kernel]
        else:
            weight = part.squeeze(2).unflatten(2, (kernel, kernel, source.channels)).movedim(4, 2)
        weights.append(weight.flatten(0, 1))
        first += round_up(depth, CHUNK)
    return weights


def _tile(planes: int, r: int) -> int:
    return next(tile for tile in TILES.values() if (tile + r - 1) ** 2 == planes)


_Given = TypeVar("_Given", Tensor, Tensor | None)


def exact(given: _Given) -> _Given:
    """For the references: in float64 on a GPU, where float32 convolutions may be done in TF32."""
    return given.double() if given is not None and given.is_cuda else given


def wide(given: _Given) -> _Given:
    """For the references: in float32, in which products of narrower numbers are exact; on a GPU as :func:`exact`."""
    if given is None or given.dtype == torch.float64:
        return given
    return exact(given.float())


def narrow_into(out: Tensor, result: Tensor) -> None:
    """Rounds to the nearest of ``out``'s numbers; in e4m3, which has no inf, what is too large is the largest."""
    if out.dtype == torch.float8_e4m3fn:
        result = result.float().clamp(-LARGEST_E4M3, LARGEST_E4M3)
    out.copy_(result)


def mixed(given: Tensor) -> Tensor:
    """For kernels: as it is where channels are next to each other in memory, else a channels-last copy."""
    if given.stride(1) == 1 or given.shape[1] == 1:
        return given
    return given.contiguous(memory_format=torch.channels_last)


def dense(shape: Sequence[int], like: Tensor) -> Tensor:
    """Activations to be written: channels-last, in the dtype and on the device of ``like``."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def check_float32(operator: str, name: str, given: Tensor) -> None:
    require(given.dtype == torch.float32, operator, name, "float32", given.dtype)


def check_mixed(operator: str, name: str, given: Tensor) -> None:
    require(given.dtype in MIXED_DTYPES, operator, name, _MIXED_NAMES, given.dtype)


def check_same_dtype(operator: str, name: str, given: Tensor, first_name: str, first: Tensor) -> None:
    require(given.dtype == first.dtype, operator, name, f"{first.dtype} as {first_name} is", given.dtype)


def check_images(operator: str, name: str, given: Tensor, *, mixed: bool = False) -> None:
    """``mixed``: for an overload that takes narrower numbers too."""
    shape = tuple(given.shape)
    fitting = len(shape) == 4 and min(shape[1:]) >= 1
    require(fitting, operator, name, "(N, C, H, W) with C, H and W of at least 1", shape)
    (check_mixed if mixed else check_float32)(operator, name, given)


def check_channels(operator: str, name: str, given: Tensor, channels: int, reason: str) -> None:
    require(given.shape[1] == channels, operator, name, f"(N, {channels}, H, W) for {reason}", tuple(given.shape))


def check_weight(operator: str, name: str, given: Tensor, *, mixed: bool = False) -> None:
    shape = tuple(given.shape)
    square = len(shape) == 4 and min(shape) >= 1 and shape[2] == shape[3] and shape[3] <= LARGEST_KERNEL
    require(square, operator, name, "(outputs, channels, k, k) with all of at least 1 and k at most 16", shape)
    (check_mixed if mixed else check_float32)(operator, name, given)


def check_kernel(operator: str, name: str, kernel: int) -> None:
    require(1 <= kernel <= LARGEST_KERNEL, operator, name, f"from 1 to {LARGEST_KERNEL}", kernel)


def check_padding(operator: str, name: str, padding: int, kernel: int) -> None:
    expected = f"from 0 to {kernel - 1} for a {kernel}x{kernel} kernel"
    require(0 <= padding < kernel, operator, name, expected, padding)


def checked_size(
    operator: str, name: str, images: Tensor, kernel: int, padding: int, *, pool: bool = False, pool_padding: int = 0
) -> tuple[int, int]:
    """Height and width of a convolution's result, pooled if asked for; too small an image is refused."""
    height, width = images.shape[2:]
    least = max(kernel - 2 * padding + (1 if pool and pool_padding == 0 else 0), 1)
    pooling = " and pooling" if pool else ""
    require(
        height >= least and width >= least,
        operator,
        name,
        f"at least {least}x{least} pixels for a {kernel}x{kernel} kernel with padding {padding}{pooling}",
        f"{height}x{width}",
    )
    height, width = (side + 2 * padding - kernel + 1 for side in (height, width))
    return ((height + 2 * pool_padding) // 2, (width + 2 * pool_padding) // 2) if pool else (height, width)


def check_bias(operator: str, name: str, given: Tensor, outputs: int, first_name: str, first: Tensor) -> None:
    require(given.shape == (outputs,), operator, name, f"({outputs},)", tuple(given.shape))
    check_float32(operator, name, given)
    require_one_device(operator, first_name, first.device, {name: given})


def check_packed(
    operator: str,
    name: str,
    given: Tensor,
    groups: int,
    outputs: int,
    sources: Sequence[Source],
    first_name: str,
    first: Tensor,
    *,
    direct_alone: bool = False,
) -> None:
    """``outputs``: of a group. ``direct_alone``: whether no other algorithm will do."""
    fitting = [1] if direct_alone else list(planes_by_algorithm(largest_kernel(sources)).values())
    shapes = [packed_shape(groups, outputs, planes, sources) for planes in fitting]
    require(tuple(given.shape) in shapes, operator, name, " or ".join(map(str, shapes)), tuple(given.shape))
    check_float32(operator, name, given)
    require(given.is_contiguous(), operator, name, "contiguous", f"strides {given.stride()}")
    check_depth(operator, given.shape[2], given.shape[3])
    require_one_device(operator, first_name, first.device, {name: given})


def check_workspace(operator: str, given: Tensor, numbers: int, first_name: str, first: Tensor) -> None:
    shape = tuple(given.shape)
    fitting = len(shape) == 2 and shape[0] >= 1 and shape[1] >= numbers
    require(fitting, operator, "workspace", f"(threads, numbers) of at least (1, {numbers})", shape)
    check_float32(operator, "workspace", given)
    require(given.is_contiguous(), operator, "workspace", "contiguous", f"strides {given.stride()}")
    require_one_device(operator, first_name, first.device, {"workspace": given})


def check_activations(
    operator: str, name: str, given: Tensor, first_name: str, first: Tensor, *, mixed: bool = False
) -> None:
    """Of activations to be written, all but their shape."""
    (check_mixed if mixed else check_float32)(operator, name, given)
    laid_out = given.is_contiguous(memory_format=torch.channels_last)
    require(laid_out, operator, name, "dense and channels-last", f"strides {given.stride()}")
    require_one_device(operator, first_name, first.device, {name: given})
