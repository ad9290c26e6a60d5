"""``feature_distance``: the last convolutions of two networks as one, squared and averaged over their channels.

Source: SPEC "Maps and score"; paper, sections 3.2 and 3.3. ``mean over channels of (conv2d(first, weight_first) -
conv2d(second, weight_second) + bias)^2``: a raw map, for which no features are written. Four overloads:

``feature_distance(first, weight_first, second=None, weight_second=None, bias=None, *, padding_first=0,
padding_second=0)``

- first, second: ``(N, C, H, W)`` float32, any strides, each with its own C, H and W; N may be 0. Kernels read them in
  place where channels are next to each other in memory, and copy them else.
- weight_first, weight_second: ``(outputs, C, k, k)`` float32 with as many outputs, k from 1 to 16, each its own.
  second and weight_second come together, or neither: then the first convolution is squared.
- bias: ``(outputs,)`` float32, or None: the difference of both networks' biases.
- padding_first, padding_second: zeros on each side, fewer than k. Both convolutions must have the same size.

Returns ``(N, 1, h, w)``, ``h = H + 2 padding - k + 1``, contiguous. A NaN or inf reaches all that the formula says, and
may reach pixels of the same image beside them, as far as a tile of 6x6. There is no gradient.

``feature_distance.pack(weight_first, weight_second=None, *, algorithm="auto") -> packed``

Weights as kernels read them, the second's negated; `efficientad_fast.ops.packing` has algorithms and layout. Winograd's
need 3 or 4 as the larger kernel; ``"auto"`` is direct too where one of the kernels is 1.

``feature_distance.out(first, second, packed, bias=None, *, channels, kernel_first, kernel_second=0, padding_first=0,
padding_second=0, out, workspace)``

The same by packed weights, written into ``out``, contiguous. channels: how many outputs are averaged. kernel_second is
0 without second. workspace is ``(threads, numbers)`` in float32, contiguous, with ``numbers`` of at least
``WORKSPACE``: one row for each thread that may work. What it holds before and after means nothing. Allocates nothing on
a device where first and second are read in place.

``feature_distance.mixed(first, weight_first, second=None, weight_second=None, scale=None, bias=None, *,
padding_first=0, padding_second=0, out, workspace)``

The same in mixed precision: products of float32, float16, bfloat16 or float8_e4m3fn, which all four have; sums in
float32. The difference of both convolutions is multiplied by ``scale`` (``(outputs,)`` float32, or None for 1) before
the bias, float32 too, is added. out is float32, contiguous. Products of float32 are not rounded to TF32. workspace is
``(numbers,)`` in float32, contiguous, with ``numbers`` of at least :func:`mixed_workspace_size`: all zeros when it is
first used, and as a call leaves it for the next, of whatever shapes. Two calls at a time must not share it. Allocates
nothing on a device where first and second are read in place and weights are channels-last, which is how kernels read
them.

Errors, in one sentence with argument, expected, got: `InputError` of the reference, RuntimeError of compiled kernels.
"""

from __future__ import annotations

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
    "mixed_workspace_size",
    "overloads",
]

FEWEST_OUTPUTS = 32
"""Of a kernel's program where several divide a pixel's outputs: see :func:`mixed_workspace_size`."""


def check(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None,
    weight_second: Tensor | None,
    bias: Tensor | None,
    padding_first: int,
    padding_second: int,
) -> tuple[int, int]:
    """What every implementation in Python refuses; csrc/feature_distance.h says the same for the compiled ones.

    Returns:
        Height and width of the result.
    """
    size = _checked_given(first, weight_first, second, weight_second, padding_first, padding_second)
    if bias is not None:
        packing.check_bias("feature_distance", "bias", bias, weight_first.shape[0], "first", first)
    weights = [weight_first] if weight_second is None else [weight_first, weight_second]
    packing.checked_planes("feature_distance", "auto", [Source(*weight.shape[1:3]) for weight in weights])
    return size


def check_pack(weight_first: Tensor, weight_second: Tensor | None, algorithm: str) -> tuple[int, ...]:
    """Returns the shape of the packed weights."""
    packing.check_weight("feature_distance", "weight_first", weight_first)
    sources = [Source(weight_first.shape[1], weight_first.shape[2])]
    if weight_second is not None:
        _check_second_weight(weight_first, weight_second)
        require_one_device("feature_distance", "weight_first", weight_first.device, {"weight_second": weight_second})
        sources.append(Source(weight_second.shape[1], weight_second.shape[2]))
    planes = packing.checked_planes("feature_distance", algorithm, sources)
    return packing.packed_shape(1, weight_first.shape[0], planes, sources)


def mixed_workspace_size(images: int, height: int, width: int, outputs: int) -> int:
    """Numbers of the workspace for maps of that size.

    Twice as many as there can be sums: each of a pixel's programs writes one, and has :data:`FEWEST_OUTPUTS` or more.
    Four times as many as there can be counts, of which no pixel needs two. So sums are in the first half of any
    workspace, counts in its last quarter, and no call takes another's sums for counts.

    Args:
        outputs: of the convolutions, which are averaged.
    """
    return images * height * width * (1 + -(-outputs // (FEWEST_OUTPUTS // 2)))


def check_mixed(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None,
    weight_second: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    padding_first: int,
    padding_second: int,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """What the overload in mixed precision refuses."""
    size = _checked_given(first, weight_first, second, weight_second, padding_first, padding_second, mixed=True)
    outputs = weight_first.shape[0]
    for name, one in (("scale", scale), ("bias", bias)):
        if one is not None:
            packing.check_bias("feature_distance", name, one, outputs, "first", first)
    shape = (first.shape[0], 1, *size)
    require(tuple(out.shape) == shape, "feature_distance", "out", str(shape), tuple(out.shape))
    packing.check_float32("feature_distance", "out", out)
    require(out.is_contiguous(), "feature_distance", "out", "contiguous", f"strides {out.stride()}")
    require_one_device("feature_distance", "first", first.device, {"out": out, "workspace": workspace})
    numbers = mixed_workspace_size(first.shape[0], *size, outputs)
    fitting = workspace.dim() == 1 and workspace.shape[0] >= numbers
    expected = f"(numbers,) of at least ({numbers},)"
    require(fitting, "feature_distance", "workspace", expected, tuple(workspace.shape))
    packing.check_float32("feature_distance", "workspace", workspace)
    contiguous = workspace.is_contiguous()
    require(contiguous, "feature_distance", "workspace", "contiguous", f"strides {workspace.stride()}")


def check_outputs(
    first: Tensor,
    second: Tensor | None,
    packed: Tensor,
    bias: Tensor | None,
    channels: int,
    kernel_first: int,
    kernel_second: int,
    padding_first: int,
    padding_second: int,
    out: Tensor,
    workspace: Tensor,
) -> list[Source]:
    """What the overload refuses that writes into given outputs. Returns what the convolutions read."""
    _check_activations(first, second)
    require(channels >= 1, "feature_distance", "channels", "at least 1", channels)
    packing.check_kernel("feature_distance", "kernel_first", kernel_first)
    sources = [Source(first.shape[1], kernel_first)]
    if second is not None:
        packing.check_kernel("feature_distance", "kernel_second", kernel_second)
        sources.append(Source(second.shape[1], kernel_second))
    else:
        require(kernel_second == 0, "feature_distance", "kernel_second", "0 without second", kernel_second)
    size = _checked_size(first, second, kernel_first, kernel_second, padding_first, padding_second)
    packing.check_packed("feature_distance", "packed", packed, 1, channels, sources, "first", first)
    if bias is not None:
        packing.check_bias("feature_distance", "bias", bias, channels, "first", first)
    shape = (first.shape[0], 1, *size)
    require(out.shape == shape, "feature_distance", "out", str(shape), tuple(out.shape))
    packing.check_float32("feature_distance", "out", out)
    require(out.is_contiguous(), "feature_distance", "out", "contiguous", f"strides {out.stride()}")
    require_one_device("feature_distance", "first", first.device, {"out": out})
    packing.check_workspace("feature_distance", workspace, WORKSPACE, "first", first)
    return sources


def _checked_given(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None,
    weight_second: Tensor | None,
    padding_first: int,
    padding_second: int,
    *,
    mixed: bool = False,
) -> tuple[int, int]:
    """Activations and weights that are not packed. Returns height and width of the result."""
    _check_activations(first, second, mixed=mixed)
    packing.check_weight("feature_distance", "weight_first", weight_first, mixed=mixed)
    require_one_device("feature_distance", "first", first.device, {"weight_first": weight_first})
    packing.check_channels("feature_distance", "first", first, weight_first.shape[1], "this weight_first")
    given = second is not None or weight_second is None
    require(given, "feature_distance", "second", "given where weight_second is", "None")
    given = weight_second is not None or second is None
    require(given, "feature_distance", "weight_second", "given where second is", "None")
    kernel_second = 0
    same = {"weight_first": weight_first}
    if second is not None and weight_second is not None:
        _check_second_weight(weight_first, weight_second, mixed=mixed)
        require_one_device("feature_distance", "first", first.device, {"weight_second": weight_second})
        packing.check_channels("feature_distance", "second", second, weight_second.shape[1], "this weight_second")
        kernel_second = weight_second.shape[2]
        same |= {"second": second, "weight_second": weight_second}
    for name, one in same.items():
        packing.check_same_dtype("feature_distance", name, one, "first", first)
    return _checked_size(first, second, weight_first.shape[2], kernel_second, padding_first, padding_second)


def _check_activations(first: Tensor, second: Tensor | None, *, mixed: bool = False) -> None:
    packing.check_images("feature_distance", "first", first, mixed=mixed)
    if second is not None:
        packing.check_images("feature_distance", "second", second, mixed=mixed)
        require_one_device("feature_distance", "first", first.device, {"second": second})


def _check_second_weight(weight_first: Tensor, weight_second: Tensor, *, mixed: bool = False) -> None:
    packing.check_weight("feature_distance", "weight_second", weight_second, mixed=mixed)
    outputs, shape = weight_first.shape[0], tuple(weight_second.shape)
    expected = f"of {outputs} outputs as weight_first is"
    require(shape[0] == outputs, "feature_distance", "weight_second", expected, shape)


def _checked_size(
    first: Tensor,
    second: Tensor | None,
    kernel_first: int,
    kernel_second: int,
    padding_first: int,
    padding_second: int,
) -> tuple[int, int]:
    packing.check_padding("feature_distance", "padding_first", padding_first, kernel_first)
    size = packing.checked_size("feature_distance", "first", first, kernel_first, padding_first)
    if second is None:
        require(padding_second == 0, "feature_distance", "padding_second", "0 without second", padding_second)
        return size
    images = first.shape[0]
    as_many = second.shape[0] == images
    require(as_many, "feature_distance", "second", f"of {images} images as first is", tuple(second.shape))
    packing.check_padding("feature_distance", "padding_second", padding_second, kernel_second)
    other = packing.checked_size("feature_distance", "second", second, kernel_second, padding_second)
    expected = f"such that its convolution has {size[0]}x{size[1]} pixels as that of first has"
    require(other == size, "feature_distance", "second", expected, f"{other[0]}x{other[1]}")
    return size


def compute(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
) -> Tensor:
    """The formula, in any floating dtype; checks nothing."""
    difference = F.conv2d(first, weight_first, bias, padding=padding_first)
    if second is not None and weight_second is not None:
        difference -= F.conv2d(second, weight_second, padding=padding_second)
    return difference.square_().mean(1, keepdim=True)


def reference(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
) -> Tensor:
    paddings = {"padding_first": padding_first, "padding_second": padding_second}
    result = fake(first, weight_first, second, weight_second, bias, **paddings)
    given = (packing.exact(first), packing.exact(weight_first), packing.exact(second), packing.exact(weight_second))
    exact_bias = packing.exact(bias)
    return result.copy_(compute(*given, exact_bias, padding_first=padding_first, padding_second=padding_second))


def fake(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
) -> Tensor:
    size = check(first, weight_first, second, weight_second, bias, padding_first, padding_second)
    return first.new_empty((first.shape[0], 1, *size))


def reference_pack(weight_first: Tensor, weight_second: Tensor | None = None, *, algorithm: str = "auto") -> Tensor:
    shape = check_pack(weight_first, weight_second, algorithm)
    weights = [weight_first] if weight_second is None else [weight_first, -weight_second]
    return packing.pack(weights, 1, shape[2])


def fake_pack(weight_first: Tensor, weight_second: Tensor | None = None, *, algorithm: str = "auto") -> Tensor:
    return weight_first.new_empty(check_pack(weight_first, weight_second, algorithm))


def reference_out(
    first: Tensor,
    second: Tensor | None,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    channels: int,
    kernel_first: int,
    kernel_second: int = 0,
    padding_first: int = 0,
    padding_second: int = 0,
    out: Tensor,
    workspace: Tensor,
) -> None:
    sources = check_outputs(
        first,
        second,
        packed,
        bias,
        channels,
        kernel_first,
        kernel_second,
        padding_first,
        padding_second,
        out,
        workspace,
    )
    weights = [weight.to(first.dtype) for weight in packing.unpack(packed, channels, sources)]
    weight_second = None if second is None else packing.exact(-weights[1])
    given = (packing.exact(first), packing.exact(weights[0]), packing.exact(second), weight_second, packing.exact(bias))
    out.copy_(compute(*given, padding_first=padding_first, padding_second=padding_second))


def fake_out(
    first: Tensor,
    second: Tensor | None,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    channels: int,
    kernel_first: int,
    kernel_second: int = 0,
    padding_first: int = 0,
    padding_second: int = 0,
    out: Tensor,
    workspace: Tensor,
) -> None:
    check_outputs(
        first,
        second,
        packed,
        bias,
        channels,
        kernel_first,
        kernel_second,
        padding_first,
        padding_second,
        out,
        workspace,
    )


def compute_mixed(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
) -> Tensor:
    """The formula with a scale, in any floating dtype; checks nothing."""
    if scale is not None:
        weight_first = weight_first * scale[:, None, None, None]
        weight_second = None if weight_second is None else weight_second * scale[:, None, None, None]
    paddings = {"padding_first": padding_first, "padding_second": padding_second}
    return compute(first, weight_first, second, weight_second, bias, **paddings)


def reference_mixed(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
    out: Tensor,
    workspace: Tensor,
) -> None:
    given = (first, weight_first, second, weight_second, scale, bias)
    check_mixed(*given, padding_first, padding_second, out, workspace)
    wide = (packing.wide(one) for one in given)
    out.copy_(compute_mixed(*wide, padding_first=padding_first, padding_second=padding_second))  # type: ignore[arg-type]


def fake_mixed(
    first: Tensor,
    weight_first: Tensor,
    second: Tensor | None = None,
    weight_second: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    padding_first: int = 0,
    padding_second: int = 0,
    out: Tensor,
    workspace: Tensor,
) -> None:
    given = (first, weight_first, second, weight_second, scale, bias)
    check_mixed(*given, padding_first, padding_second, out, workspace)


overloads = {
    "default": Overload(reference, fake),
    "pack": Overload(reference_pack, fake_pack),
    "out": Overload(reference_out, fake_out),
    "mixed": Overload(reference_mixed, fake_mixed),
}
