"""``autoencoder``: the autoencoder up to its last convolution, which `feature_distance` computes with what follows it.

Source: SPEC "Autoencoder"; paper, table 9; `efficientad_fast.reference.networks` (Encoder, Decoder). 13 convolutions,
enconv1 to enconv6 and deconv1 to deconv7, with ReLU after all but enconv6; those of the decoder read what was resized
before (bilinear, ``align_corners=False``). Dropout does nothing. Three overloads:

``autoencoder(image, weights, biases, size)``

- image: ``(N, 3, H, W)`` float32, any strides, H and W at least 256; N may be 0.
- weights: 13 of ``(outputs, inputs, k, k)`` float32, the first of 3 inputs, each later one of the outputs before it. k
  is 4 for enconv1 to enconv5 and deconv1 to deconv6, 8 for enconv6, 3 for deconv7.
- biases: 13 of ``(outputs,)`` float32.
- size: height and width of the result in pixels, each at least 1: those of the features
  (`efficientad_fast.reference.networks.feature_size`). Plain numbers: `torch.compile` and `torch.export` fix them.

Returns ``(N, C, *size)``, dense and channels-last, with the outputs of deconv7 for C. A NaN or inf of an image reaches
all of its result that the formula says, perhaps more, and no other image's. There is no gradient.

``autoencoder.out(image, packed, biases, *, out, workspace)``

The same, written into ``out``, dense and channels-last, whose size decides. packed: 13 tensors, as ``conv_pool.pack``
makes them of the weights; the six of the encoder with ``algorithm="direct"``, for its strides. workspace is ``(threads,
numbers)`` in float32, contiguous, with ``numbers`` of at least :func:`workspace_size`: one row for each thread that may
work. What it holds before and after means nothing. Allocates nothing on a device where the image's channels are next to
each other in memory.

``autoencoder.mixed(image, weights, biases, *, out, workspace)``

The same in mixed precision, written into ``out``: image and weights are float32, float16 or bfloat16, all of them the
same; biases are float32. The image has 3 channels, or 4 where the first weight has 4 inputs: with a fourth of zeros, a
pixel in 16 bits fills 8 bytes. Sums are in float32, and products of float32 are not rounded to TF32. What a convolution
reads is rounded to the image's dtype: after ReLU, and again after resizing, which is done in float32. out, dense and
channels-last, has the image's dtype or float8_e4m3fn, in which what is beyond 448 becomes 448. workspace is
``(numbers,)`` in the image's dtype, contiguous, with ``numbers`` of at least :func:`mixed_workspace_size`; what it
holds before and after means nothing. Allocates nothing on a device where the image's channels are next to each other in
memory and weights are channels-last, which is how kernels read them.

Errors, in one sentence with argument, expected, got: `InputError` of the reference, RuntimeError of compiled kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad_fast.ops import packing
from efficientad_fast.ops.overload import Overload, require, require_one_device, require_positive_size
from efficientad_fast.ops.packing import Source
from efficientad_fast.reference.networks import SMALLEST_SIDE, Decoder

IMAGE_CHANNELS = 3
MIXED_CHANNELS = (3, 4)
"""Of images that ``mixed`` takes."""

MIXED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of what ``mixed`` multiplies."""

CHANNELS = (32, 32, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64)
"""Outputs of the layers in EfficientAD; the operator takes others too."""

ENCODER_LAYERS = 6


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Attributes:
        resized: whether the input is resized to ``size`` first.
        size: height and width of what the convolution reads.
    """

    kernel: int
    stride: int
    padding: int
    resized: bool
    relu: bool
    size: tuple[int, int]

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in self.size)
        return height, width


def layers(image_size: Sequence[int], size: Sequence[int]) -> list[Layer]:
    """The 13 layers for images and a result of these heights and widths."""
    found: list[Layer] = []
    current = (image_size[0], image_size[1])
    for _ in range(ENCODER_LAYERS - 1):
        found.append(Layer(4, 2, 1, False, True, current))
        current = found[-1].out_size
    found.append(Layer(8, 1, 0, False, False, current))
    found += [Layer(4, 1, 2, True, True, step) for step in Decoder.step_sizes(image_size)]
    found.append(Layer(3, 1, 1, True, True, (size[0], size[1])))
    return found


LAYERS = len(CHANNELS)


def workspace_size(image_size: Sequence[int], size: Sequence[int], channels: Sequence[int] = CHANNELS) -> int:
    """Numbers that a thread needs: ``packing.WORKSPACE``, and twice the largest activation of one image.

    That is the largest of what layers read (resized, where it is) and write, rounded up to a multiple of 16.

    Args:
        image_size, size: height and width of images and result.
        channels: outputs of each layer.
    """
    largest, read = 0, IMAGE_CHANNELS
    for layer, written in zip(layers(image_size, size), channels, strict=True):
        (height, width), (out_height, out_width) = layer.size, layer.out_size
        largest = max(largest, height * width * read, out_height * out_width * written)
        read = written
    return packing.WORKSPACE + 2 * packing.round_up(largest, packing.CHUNK)


def mixed_parts(
    images: int, image_size: Sequence[int], size: Sequence[int], channels: Sequence[int] = CHANNELS
) -> tuple[int, int, int]:
    """Numbers of the workspace's three parts: two into which layers write in turn, and one for what is resized.

    Each has room for the largest, and is a multiple of 16, so that the next begins at as many bytes as vectors have.

    Args:
        images: how many.
        image_size, size: height and width of images and result.
        channels: outputs of each layer; those of the last, which writes the result, do not matter.
    """
    largest, read = [0, 0, 0], 0
    for index, (layer, written) in enumerate(zip(layers(image_size, size), channels, strict=True)):
        height, width = layer.size
        if layer.resized:
            largest[2] = max(largest[2], images * height * width * read)
        height, width = layer.out_size
        if index < LAYERS - 1:
            largest[index % 2] = max(largest[index % 2], images * height * width * written)
        read = written
    even, odd, resized = (packing.round_up(one, packing.CHUNK) for one in largest)
    return even, odd, resized


def mixed_workspace_size(
    images: int, image_size: Sequence[int], size: Sequence[int], channels: Sequence[int] = CHANNELS
) -> int:
    """Numbers of the workspace of ``mixed``; arguments as of :func:`mixed_parts`."""
    return sum(mixed_parts(images, image_size, size, channels))


def check(image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], size: Sequence[int]) -> None:
    """What every implementation in Python refuses; csrc/autoencoder.h says the same for the compiled ones."""
    _check_image(image)
    require_positive_size("autoencoder", size)
    _check_parameters(image, weights, biases, size)


def check_outputs(
    image: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor], out: Tensor, workspace: Tensor
) -> list[int]:
    """What the overload refuses that writes into given outputs. Returns the outputs of each layer."""
    _check_image(image)
    _check_count("packed", packed)
    _check_count("biases", biases)
    images, shape, last = image.shape[0], tuple(out.shape), tuple(biases[-1].shape)
    fitting = len(shape) == 4 and shape[0] == images and shape[1:2] == last and min(shape[1:]) >= 1
    require(fitting, "autoencoder", "out", f"({images}, C, h, w) with C outputs as biases[12] has", shape)
    packing.check_activations("autoencoder", "out", out, "image", image)
    channels: list[int] = []
    for index, layer in enumerate(layers(image.shape[2:], shape[2:])):
        name, bias = f"biases[{index}]", biases[index]
        some = bias.dim() == 1 and bias.shape[0] >= 1
        require(some, "autoencoder", name, "(outputs,) with at least 1", tuple(bias.shape))
        outputs = bias.shape[0]
        packing.check_bias("autoencoder", name, bias, outputs, "image", image)
        sources = [Source(channels[-1] if channels else IMAGE_CHANNELS, layer.kernel)]
        encodes = index < ENCODER_LAYERS
        packing.check_packed(
            "autoencoder", f"packed[{index}]", packed[index], 1, outputs, sources, "image", image, direct_alone=encodes
        )
        channels.append(outputs)
    numbers = workspace_size(image.shape[2:], shape[2:], channels)
    packing.check_workspace("autoencoder", workspace, numbers, "image", image)
    return channels


def check_mixed(
    image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], out: Tensor, workspace: Tensor
) -> None:
    """What the overload in mixed precision refuses."""
    _check_image(image, mixed=True)
    shape = tuple(out.shape)
    fitting = len(shape) == 4 and min(shape[1:]) >= 1
    require(fitting, "autoencoder", "out", "(N, C, h, w) with C, h and w of at least 1", shape)
    _check_parameters(image, weights, biases, shape[2:], mixed=True)
    expected = (image.shape[0], weights[-1].shape[0], *shape[2:])
    require(shape == expected, "autoencoder", "out", str(expected), shape)
    narrow = out.dtype in (image.dtype, torch.float8_e4m3fn)
    require(narrow, "autoencoder", "out", f"{image.dtype} as image is, or float8_e4m3fn", out.dtype)
    packing.check_activations("autoencoder", "out", out, "image", image, mixed=True)
    channels = [one.shape[0] for one in weights]
    numbers = mixed_workspace_size(image.shape[0], image.shape[2:], shape[2:], channels)
    enough = workspace.dim() == 1 and workspace.shape[0] >= numbers
    require(enough, "autoencoder", "workspace", f"(numbers,) of at least ({numbers},)", tuple(workspace.shape))
    packing.check_same_dtype("autoencoder", "workspace", workspace, "image", image)
    contiguous = workspace.is_contiguous()
    require(contiguous, "autoencoder", "workspace", "contiguous", f"strides {workspace.stride()}")
    require_one_device("autoencoder", "image", image.device, {"workspace": workspace})


def _check_parameters(
    image: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    size: Sequence[int],
    *,
    mixed: bool = False,
) -> None:
    _check_count("weights", weights)
    _check_count("biases", biases)
    read = image.shape[1]
    for index, (layer, weight, bias) in enumerate(zip(layers(image.shape[2:], size), weights, biases, strict=True)):
        name, shape, kernel = f"weights[{index}]", tuple(weight.shape), layer.kernel
        fitting = len(shape) == 4 and shape[0] >= 1 and shape[1:] == (read, kernel, kernel)
        require(fitting, "autoencoder", name, f"(outputs, {read}, {kernel}, {kernel})", shape)
        if mixed:
            packing.check_same_dtype("autoencoder", name, weight, "image", image)
        else:
            packing.check_float32("autoencoder", name, weight)
        require_one_device("autoencoder", "image", image.device, {name: weight})
        read = shape[0]
        packing.check_bias("autoencoder", f"biases[{index}]", bias, read, "image", image)


def _check_image(image: Tensor, *, mixed: bool = False) -> None:
    shape = tuple(image.shape)
    fitting = len(shape) == 4 and shape[1] in (MIXED_CHANNELS if mixed else (IMAGE_CHANNELS,))
    expected = "(N, 3, H, W) or (N, 4, H, W)" if mixed else "(N, 3, H, W)"
    require(fitting, "autoencoder", "image", expected, shape)
    if mixed:
        known = image.dtype in MIXED_DTYPES
        require(known, "autoencoder", "image", "float32, float16 or bfloat16", image.dtype)
    else:
        packing.check_float32("autoencoder", "image", image)
    height, width = shape[2:]
    large = height >= SMALLEST_SIDE and width >= SMALLEST_SIDE
    require(large, "autoencoder", "image", f"at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels", f"{height}x{width}")


def _check_count(name: str, given: Sequence[Tensor]) -> None:
    expected = f"{LAYERS} tensors, of enconv1 to enconv6 and deconv1 to deconv7"
    require(len(given) == LAYERS, "autoencoder", name, expected, len(given))


def compute(image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The formula, in any floating dtype; checks nothing."""
    result = image
    for layer, weight, bias in zip(layers(image.shape[2:], size), weights, biases, strict=True):
        if layer.resized:
            result = F.interpolate(result, layer.size, mode="bilinear", align_corners=False)
        result = F.conv2d(result, weight, bias, stride=layer.stride, padding=layer.padding)
        if layer.relu:
            result = F.relu(result, inplace=True)
    return result


def reference(image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    result = fake(image, weights, biases, size)
    if image.shape[0] == 0:
        return result
    exact_weights, exact_biases = ([packing.exact(one) for one in given] for given in (weights, biases))
    return result.copy_(compute(packing.exact(image), exact_weights, exact_biases, size))


def fake(image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    check(image, weights, biases, size)
    return packing.dense((image.shape[0], weights[-1].shape[0], *size), image)


def reference_out(
    image: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor], *, out: Tensor, workspace: Tensor
) -> None:
    channels = check_outputs(image, packed, biases, out, workspace)
    found = layers(image.shape[2:], out.shape[2:])
    weights = []
    for layer, read, written, one in zip(found, [IMAGE_CHANNELS, *channels[:-1]], channels, packed, strict=True):
        weights += packing.unpack(one, written, [Source(read, layer.kernel)])
    out.copy_(reference(image, [weight.to(image.dtype) for weight in weights], biases, out.shape[2:]))


def fake_out(
    image: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor], *, out: Tensor, workspace: Tensor
) -> None:
    check_outputs(image, packed, biases, out, workspace)


def compute_mixed(
    image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The formula of ``mixed``, in any floating dtype; checks nothing.

    Args:
        dtype: to which is rounded what convolutions read. The result is not rounded.
    """
    result = image
    for layer, weight, bias in zip(layers(image.shape[2:], size), weights, biases, strict=True):
        result = _rounded(result, dtype)
        if layer.resized:
            result = _rounded(F.interpolate(result, layer.size, mode="bilinear", align_corners=False), dtype)
        result = F.conv2d(result, weight, bias, stride=layer.stride, padding=layer.padding)
        if layer.relu:
            result = F.relu(result, inplace=True)
    return result


def _rounded(given: Tensor, dtype: torch.dtype) -> Tensor:
    return given.to(dtype).to(given.dtype)


def reference_mixed(
    image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, out: Tensor, workspace: Tensor
) -> None:
    check_mixed(image, weights, biases, out, workspace)
    if image.shape[0] > 0:
        wide = packing.wide(image)
        wide_weights, wide_biases = ([one.to(wide.dtype) for one in given] for given in (weights, biases))
        packing.narrow_into(out, compute_mixed(wide, wide_weights, wide_biases, out.shape[2:], image.dtype))


def fake_mixed(
    image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, out: Tensor, workspace: Tensor
) -> None:
    check_mixed(image, weights, biases, out, workspace)


overloads = {
    "default": Overload(reference, fake),
    "out": Overload(reference_out, fake_out),
    "mixed": Overload(reference_mixed, fake_mixed),
}
