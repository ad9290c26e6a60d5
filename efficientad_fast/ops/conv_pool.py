"""``conv_pool``: a convolution with bias, ReLU and 2x2 average pooling, in one pass.

Source: SPEC "Patch description network"; ``avg_pool2d(relu(conv2d(input, weight, bias, padding=padding)), 2)``. Four
overloads:

``conv_pool(input, weight, bias=None, *, padding=0, relu=True, pool=False, pool_padding=0, groups=1)``

- input: ``(N, C * groups, H, W)`` float32, any strides; N may be 0. Kernels read it in place where channels are next to
  each other in memory, as in some channels of a channels-last tensor, and copy it else.
- weight: ``(O * groups, C, k, k)`` float32, k from 1 to 16. Group g of the outputs reads group g of the channels.
- bias: ``(O * groups,)`` float32, or None.
- padding: zeros on each side, fewer than k. The stride is 1.
- relu: whether negative numbers become zero, before pooling.
- pool: whether to average 2x2 outputs with stride 2; a last row or column that has no other is left out.
- pool_padding: with pool, 0 or 1 zeros on each side of what is pooled, which count as ReLU's outputs do.

Returns ``(N, O * groups, h, w)``, dense and channels-last: ``h = H + 2 padding - k + 1``, and with pool half of ``h + 2
pool_padding``, rounded down. Images too small for one pixel are refused. A NaN or inf of the input reaches all that the
formula says, and may reach outputs of the same image beside them, as far as a tile of 6x6. There is no gradient.

``conv_pool.pack(weight, *, groups=1, algorithm="auto") -> packed``

Weights as kernels read them; `efficientad_fast.ops.packing` has algorithms and layout. Winograd's need 3 or 4 for k.

``conv_pool.out(input, packed, bias=None, *, kernel_size, padding=0, relu=True, pool=False, pool_padding=0, groups=1,
out, workspace)``

The same by packed weights, written into ``out``, of the shape above, dense and channels-last, float32. workspace is
``(threads, numbers)`` in float32, contiguous, with ``numbers`` of at least ``WORKSPACE``: one row for each thread that
may work. What it holds before and after means nothing. Allocates nothing on a device where input is read in place.

``conv_pool.mixed(input, weight, scale=None, bias=None, *, padding=0, relu=True, pool=False, pool_padding=0, groups=1,
out)``

The same in mixed precision: products of float32, float16, bfloat16 or float8_e4m3fn, which input and weight both have;
sums in float32, which are multiplied by ``scale`` (``(O * groups,)`` float32, or None for 1) before the bias, float32
too, is added. ``out``, dense and channels-last, has any of the four dtypes, and is rounded to once, after pooling; in
e4m3 what is beyond 448 becomes 448. Products of float32 are not rounded to TF32. Allocates nothing on a device where
input is read in place and weight is channels-last, which is how kernels read it.

Errors, in one sentence with argument, expected, got: `InputError` of the reference, RuntimeError of compiled kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad_fast.ops import packing
from efficientad_fast.ops.overload import Overload, require, require_one_device
from efficientad_fast.ops.packing import WORKSPACE, Source

__all__ = [
    "WORKSPACE",
    "check",
    "check_mixed",
    "check_outputs",
    "check_pack",
    "compute",
    "compute_mixed",
    "overloads",
]


def check(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: int, pool: bool, pool_padding: int, groups: int
) -> tuple[int, int]:
    """What every implementation in Python refuses; csrc/conv_pool.h says the same for the compiled ones.

    Returns:
        Height and width of the result.
    """
    packing.check_images("conv_pool", "input", input)
    packing.check_weight("conv_pool", "weight", weight)
    require_one_device("conv_pool", "input", input.device, {"weight": weight})
    outputs, channels, kernel, _ = weight.shape
    _check_groups(groups, outputs, "the outputs of weight")
    packing.check_channels("conv_pool", "input", input, channels * groups, "this weight and groups")
    size = _checked_size(input, kernel, padding, pool, pool_padding)
    if bias is not None:
        packing.check_bias("conv_pool", "bias", bias, outputs, "input", input)
    packing.checked_planes("conv_pool", "auto", [Source(channels, kernel)])
    return size


def check_pack(weight: Tensor, groups: int, algorithm: str) -> int:
    """Returns the number of planes."""
    packing.check_weight("conv_pool", "weight", weight)
    _check_groups(groups, weight.shape[0], "the outputs of weight")
    return packing.checked_planes("conv_pool", algorithm, [Source(weight.shape[1], weight.shape[2])])


def check_outputs(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    padding: int,
    pool: bool,
    pool_padding: int,
    groups: int,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """What the overload refuses that writes into given outputs."""
    packing.check_images("conv_pool", "input", input)
    packing.check_kernel("conv_pool", "kernel_size", kernel_size)
    _check_groups(groups, input.shape[1], "the channels of input")
    size = _checked_size(input, kernel_size, padding, pool, pool_padding)
    images, shape = input.shape[0], tuple(out.shape)
    fitting = len(shape) == 4 and shape[0] == images and shape[2:] == size
    fitting = fitting and shape[1] >= 1 and shape[1] % groups == 0
    expected = f"({images}, O, {size[0]}, {size[1]}) with O a multiple of groups, {groups}"
    require(fitting, "conv_pool", "out", expected, shape)
    packing.check_activations("conv_pool", "out", out, "input", input)
    sources = [Source(input.shape[1] // groups, kernel_size)]
    packing.check_packed("conv_pool", "packed", packed, groups, shape[1] // groups, sources, "input", input)
    if bias is not None:
        packing.check_bias("conv_pool", "bias", bias, shape[1], "input", input)
    packing.check_workspace("conv_pool", workspace, WORKSPACE, "input", input)


def check_mixed(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    padding: int,
    pool: bool,
    pool_padding: int,
    groups: int,
    out: Tensor,
) -> None:
    """What the overload in mixed precision refuses."""
    packing.check_images("conv_pool", "input", input, mixed=True)
    packing.check_weight("conv_pool", "weight", weight, mixed=True)
    packing.check_same_dtype("conv_pool", "weight", weight, "input", input)
    require_one_device("conv_pool", "input", input.device, {"weight": weight})
    outputs, channels, _, _ = weight.shape
    _check_groups(groups, outputs, "the outputs of weight")
    packing.check_channels("conv_pool", "input", input, channels * groups, "this weight and groups")
    height, width = _checked_size(input, weight.shape[2], padding, pool, pool_padding)
    for name, one in (("scale", scale), ("bias", bias)):
        if one is not None:
            packing.check_bias("conv_pool", name, one, outputs, "input", input)
    shape = (input.shape[0], outputs, height, width)
    require(tuple(out.shape) == shape, "conv_pool", "out", str(shape), tuple(out.shape))
    packing.check_activations("conv_pool", "out", out, "input", input, mixed=True)


def _check_groups(groups: int, divided: int, reason: str) -> None:
    divides = groups >= 1 and divided % groups == 0
    require(divides, "conv_pool", "groups", f"at least 1 and a divisor of {divided}, {reason}", groups)


def _checked_size(input: Tensor, kernel: int, padding: int, pool: bool, pool_padding: int) -> tuple[int, int]:
    packing.check_padding("conv_pool", "padding", padding, kernel)
    expected = "0 or 1" if pool else "0 without pool"
    require(pool_padding in ((0, 1) if pool else (0,)), "conv_pool", "pool_padding", expected, pool_padding)
    return packing.checked_size("conv_pool", "input", input, kernel, padding, pool=pool, pool_padding=pool_padding)


def compute(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """The formula, in any floating dtype; checks nothing."""
    result = F.conv2d(input, weight, bias, padding=padding, groups=groups)
    if relu:
        result = F.relu(result, inplace=True)
    return F.avg_pool2d(result, 2, padding=pool_padding, count_include_pad=True) if pool else result


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
) -> Tensor:
    options: dict[str, Any] = {"padding": padding, "relu": relu, "pool": pool, "pool_padding": pool_padding}
    options["groups"] = groups
    result = fake(input, weight, bias, **options)
    return result.copy_(compute(packing.exact(input), packing.exact(weight), packing.exact(bias), **options))


def fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
) -> Tensor:
    size = check(input, weight, bias, padding, pool, pool_padding, groups)
    return packing.dense((input.shape[0], weight.shape[0], *size), input)


def reference_pack(weight: Tensor, *, groups: int = 1, algorithm: str = "auto") -> Tensor:
    return packing.pack([weight], groups, check_pack(weight, groups, algorithm))


def fake_pack(weight: Tensor, *, groups: int = 1, algorithm: str = "auto") -> Tensor:
    planes = check_pack(weight, groups, algorithm)
    outputs, channels, kernel, _ = weight.shape
    return weight.new_empty(packing.packed_shape(groups, outputs // groups, planes, [Source(channels, kernel)]))


def reference_out(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
    out: Tensor,
    workspace: Tensor,
) -> None:
    check_outputs(input, packed, bias, kernel_size, padding, pool, pool_padding, groups, out, workspace)
    [weight] = packing.unpack(packed, out.shape[1] // groups, [Source(input.shape[1] // groups, kernel_size)])
    options: dict[str, Any] = {"padding": padding, "relu": relu, "pool": pool, "pool_padding": pool_padding}
    exact_weight = packing.exact(weight.to(input.dtype))
    out.copy_(compute(packing.exact(input), exact_weight, packing.exact(bias), groups=groups, **options))


def fake_out(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
    out: Tensor,
    workspace: Tensor,
) -> None:
    check_outputs(input, packed, bias, kernel_size, padding, pool, pool_padding, groups, out, workspace)


def reference_mixed(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
    out: Tensor,
) -> None:
    check_mixed(input, weight, scale, bias, padding, pool, pool_padding, groups, out)
    packing.narrow_into(
        out,
        compute_mixed(
            packing.wide(input),
            packing.wide(weight),
            packing.wide(scale),
            packing.wide(bias),
            padding=padding,
            relu=relu,
            pool=pool,
            pool_padding=pool_padding,
            groups=groups,
        ),
    )


def compute_mixed(
    input: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The formula with a scale, in any floating dtype; checks nothing."""
    if scale is not None:
        weight = weight * scale[:, None, None, None]
    return compute(input, weight, bias, **options)


def fake_mixed(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    relu: bool = True,
    pool: bool = False,
    pool_padding: int = 0,
    groups: int = 1,
    out: Tensor,
) -> None:
    check_mixed(input, weight, scale, bias, padding, pool, pool_padding, groups, out)


STEM_KERNEL, MOST_STEM_CHANNELS, FEWEST_STEM_PIXELS = 4, 4, 120_000


def case_mixed(
    input: Tensor, weight: Tensor, *_: object, pool: bool = False, groups: int = 1, out: Tensor, **others: object
) -> str | None:
    """``stem``: the networks' first layer, of eight images of 256 x 256 or more.

    Of fewer pixels the stem in CUDA C++ is as fast by itself as the one in Triton, but not beside the autoencoder.
    """
    is_stem = pool and groups == 1 and weight.shape[1] <= MOST_STEM_CHANNELS and weight.shape[2] == STEM_KERNEL
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    many = out.shape[0] * out.shape[2] * out.shape[3] >= FEWEST_STEM_PIXELS
    return "stem" if is_stem and narrow and many else None


overloads = {
    "default": Overload(reference, fake),
    "pack": Overload(reference_pack, fake_pack),
    "out": Overload(reference_out, fake_out),
    "mixed": Overload(reference_mixed, fake_mixed, case=case_mixed),
}
