"""``autoencoder`` in Triton. efficientad_fast/ops/autoencoder.py is the contract.

A launch for each of the 13 layers, a convolution as a product of matrices: pixels of all images by outputs, summed over
the taps and channels of a window, in the order in which weights lie in memory. What the decoder resizes is not written
where it is small: a program blends, of four pixels of the layer before, what it is about to multiply. It does so anew
for every tap, 16 times, and keeps tensor cores waiting. So where there are many pixels, resizing is a launch of its
own, and the convolution that of `conv_pool`: the rules for ``autoencoder.resize`` say where.

Most layers are small, and a program of theirs waits for memory more than it computes. So tiles are small, which makes
programs many, and deep, so that few loads wait for one another. Where there are but a few pixels, of which a tile for
tensor cores would leave most empty, a program has one pixel and multiplies without them: ``pixels`` of its tile is 1.

Tensor cores add one product of a small tile to another's sum, of which each waits for the one before. ``slices`` of the
depth have sums of their own, each in other warps, which are added in the end, in the same order every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficientad_fast.ops import autoencoder as contract
from efficientad_fast.ops import packing
from efficientad_fast.ops.autoencoder import MIXED_CHANNELS, Layer
from efficientad_fast.reference.networks import feature_size

from . import tiles as table
from .conv_pool import conv_pool_mixed, narrowed
from .implicit_gemm import require_products
from .launching import capability, launch, require_runnable, tiles
from .models import SIDE, ModelSize, channels_last

LEAST = 16
"""Of each side of what tensor cores multiply, in Triton."""

MOST_SINGLE_PIXELS = 256
"""With more pixels in all images, tiles of one are not worth trying."""

NAMES = (*(f"enconv{step}" for step in range(1, 7)), *(f"deconv{step}" for step in range(1, 8)))


@triton.jit
def _source(place, scale, length, SAME: tl.constexpr):
    """Of resized rows or columns: the ones before in what was resized, those after, and how near to these they are.

    ``SAME`` places beside each other, from multiples of it on, are one: in floats the compiler does not see it.
    """
    position = tl.maximum((place.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    # Rounding may reach beyond the last one.
    before = tl.max_constancy(tl.minimum(position.to(tl.int32), length - 1), [1, SAME])
    after = tl.minimum(before + 1, length - 1)
    return before, after, tl.minimum(position - before.to(tl.float32), 1.0)


@triton.jit
def _blended(
    images_ptr,
    row,
    column,
    channel,
    taken,
    scale_y,
    scale_x,
    height,
    width,
    row_stride,
    pixel_stride,
    SAME: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What resized images hold in these rows and columns, rounded to ``DTYPE``; zeros where nothing is ``taken``."""
    above, below, down = _source(row, scale_y, height, SAME)
    before, after, right_of = _source(column, scale_x, width, SAME)
    above_ptr = images_ptr + above * row_stride
    below_ptr = images_ptr + below * row_stride
    before = before * pixel_stride + channel
    after = after * pixel_stride + channel
    upper_left = tl.load(above_ptr + before, mask=taken, other=0.0).to(tl.float32)
    upper_right = tl.load(above_ptr + after, mask=taken, other=0.0).to(tl.float32)
    lower_left = tl.load(below_ptr + before, mask=taken, other=0.0).to(tl.float32)
    lower_right = tl.load(below_ptr + after, mask=taken, other=0.0).to(tl.float32)
    blended = upper_left * ((1 - down) * (1 - right_of)) + upper_right * ((1 - down) * right_of)
    blended += lower_left * (down * (1 - right_of)) + lower_right * (down * right_of)
    return blended.to(DTYPE)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def _resize(
    images_ptr,  # (N, H, W, CHANNELS), contiguous
    out_ptr,  # (N, h, w, CHANNELS), contiguous
    scale_y,  # rows of an image for a row of the result
    scale_x,
    pixels,  # N * h * w
    height,
    width,
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels, rounded up
    PIXELS: tl.constexpr,
):
    # 64 bits for what counts pixels of all images or numbers of one, 32 for the pixels of one.
    first = tl.program_id(0).to(tl.int64) * PIXELS
    of_image = out_height * out_width
    place = (first % of_image).to(tl.int32) + tl.arange(0, PIXELS)
    image = first // of_image + place // of_image
    place = place % of_image
    is_pixel = first + tl.arange(0, PIXELS) < pixels
    channel = tl.arange(0, BLOCK)[None, :]
    taken = is_pixel[:, None]
    if BLOCK != CHANNELS:
        taken = taken & (channel < CHANNELS)
    row_stride = width.to(tl.int64) * CHANNELS
    images_ptr += (image * (height * row_stride))[:, None]
    row = (place // out_width)[:, None]
    column = (place % out_width)[:, None]
    blended = _blended(
        images_ptr,
        row,
        column,
        channel,
        taken,
        scale_y,
        scale_x,
        height,
        width,
        row_stride,
        CHANNELS,
        1,
        out_ptr.dtype.element_ty,
    )
    places = (first + tl.arange(0, PIXELS))[:, None] * CHANNELS + channel
    tl.store(out_ptr + places, blended, mask=taken)


@triton.jit(
    do_not_specialize=[
        *("image_count", "height", "width", "read_height", "read_width", "out_height", "out_width"),
        *("stride_n", "stride_h", "stride_w", "output_tiles"),
    ]
)
def _convolve(
    images_ptr,  # (N, H, W, CHANNELS), with strides where not DENSE
    weights_ptr,  # (WRITTEN, KERNEL, KERNEL, CHANNELS), contiguous
    bias_ptr,  # (WRITTEN,), float32
    out_ptr,  # (N, h, w, WRITTEN), contiguous
    scale_y,  # rows of an image for a row of what the convolution reads
    scale_x,
    image_count,
    height,
    width,
    read_height,  # of what the convolution reads, which is larger or smaller where it is resized
    read_width,
    out_height,
    out_width,
    stride_n,
    stride_h,
    stride_w,
    output_tiles,
    CHANNELS: tl.constexpr,
    WRITTEN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RESIZED: tl.constexpr,
    RELU: tl.constexpr,
    DENSE: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
):
    TOTAL: tl.constexpr = KERNEL * KERNEL * CHANNELS
    SAME: tl.constexpr = 1 if CHANNELS % DEPTH == 0 else CHANNELS & -CHANNELS  # so many numbers are of one tap
    # Programs beside each other read the same pixels.
    program = tl.program_id(0)
    output = (program % output_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < WRITTEN

    # 64 bits for what counts pixels of all images or numbers of one, 32 for the pixels of one.
    first = (program // output_tiles).to(tl.int64) * PIXELS
    of_image = out_height * out_width
    place = (first % of_image).to(tl.int32) + tl.arange(0, PIXELS)
    image = first // of_image + place // of_image
    place = place % of_image
    is_pixel = image < image_count
    y = (place // out_width * STRIDE - PADDING)[:, None]
    x = (place % out_width * STRIDE - PADDING)[:, None]

    if DENSE:  # of which the compiler knows that pixels lie at multiples of CHANNELS
        pixel_stride: tl.constexpr = CHANNELS
        row_stride = width.to(tl.int64) * CHANNELS
        image_stride = height * row_stride
    else:
        pixel_stride = stride_w
        row_stride = stride_h.to(tl.int64)
        image_stride = stride_n.to(tl.int64)
    images_ptr += (image * image_stride)[:, None]
    weights_ptr += output.to(tl.int64)[:, None] * TOTAL

    if PIXELS == 1:
        sums = tl.zeros((OUTPUTS, DEPTH), tl.float32)
    elif SLICES > 1:
        sums = tl.zeros((SLICES, PIXELS, OUTPUTS), tl.float32)
    else:
        sums = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for step in tl.range(0, (TOTAL + DEPTH - 1) // DEPTH):
        depth = (step * DEPTH + tl.arange(0, DEPTH))[None, :]
        # One tap for all of a step makes a row or column of its places one number for each pixel.
        tap = step * DEPTH // CHANNELS if CHANNELS % DEPTH == 0 else depth // CHANNELS
        channel = depth % CHANNELS
        row = y + tap // KERNEL
        column = x + tap % KERNEL
        taken = is_pixel[:, None] & (row >= 0) & (row < read_height) & (column >= 0) & (column < read_width)
        is_weight = is_output[:, None]
        if TOTAL % DEPTH != 0:
            taken = taken & (depth < TOTAL)
            is_weight = is_weight & (depth < TOTAL)
        right = tl.load(weights_ptr + depth, mask=is_weight, other=0.0)
        if RESIZED:
            left = _blended(
                images_ptr,
                row,
                column,
                channel,
                taken,
                scale_y,
                scale_x,
                height,
                width,
                row_stride,
                pixel_stride,
                SAME,
                right.dtype,
            )
        else:
            left = tl.load(images_ptr + (row * row_stride + (column * pixel_stride + channel)), mask=taken, other=0.0)
        if PIXELS == 1:
            sums += left.to(tl.float32) * right.to(tl.float32)
        elif SLICES > 1:
            left = left.reshape(PIXELS, SLICES, DEPTH // SLICES).permute(1, 0, 2)
            right = right.reshape(OUTPUTS, SLICES, DEPTH // SLICES).permute(1, 2, 0)
            sums = tl.dot(left, right, sums, input_precision="ieee")
        else:
            sums = tl.dot(left, right.T, sums, input_precision="ieee")
    if PIXELS == 1:
        sums = tl.sum(sums, 1)[None, :]
    elif SLICES > 1:
        sums = tl.sum(sums, 0)

    sums += tl.load(bias_ptr + output, mask=is_output, other=0.0)[None, :]
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    places = (first + tl.arange(0, PIXELS))[:, None] * WRITTEN + output[None, :]
    written = is_pixel[:, None] & is_output[None, :]
    tl.store(out_ptr + places, narrowed(sums, out_ptr.dtype.element_ty), mask=written)


def facts(layer: Layer, read: Tensor, weight: Tensor) -> dict[str, int | float | bool | str]:
    """What the rules for tiles may ask of a layer.

    ``capability``; ``dtype`` of products and its ``bits``; ``kernel``, ``channels``, ``outputs``, ``resized``; how many
    products a sum has, its ``depth``; ``images``, and ``pixels`` of the result in all of them.
    """
    outputs, channels, kernel, _ = weight.shape
    height, width = layer.out_size
    return {
        "capability": capability(read.device),
        "dtype": str(read.dtype).removeprefix("torch."),
        "bits": 8 * read.element_size(),
        "kernel": kernel,
        "channels": channels,
        "outputs": outputs,
        "depth": kernel * kernel * channels,
        "resized": layer.resized,
        "images": read.shape[0],
        "pixels": read.shape[0] * height * width,
    }


def chosen_tile(stated: Mapping[str, int | float | bool | str]) -> dict[str, int]:
    """The tile of the table's rules, with ``outputs`` and ``depth`` not many more than there are.

    Where ``pixels`` is not 1, it is at least 16, as are ``outputs`` and the part of ``depth`` that a slice has: tensor
    cores, as Triton uses them, multiply no less.
    """
    tile = table.choose("autoencoder", stated)
    least = 1 if tile["pixels"] == 1 else LEAST
    for name in ("outputs", "depth"):
        tile[name] = min(tile[name], max(triton.next_power_of_2(int(stated[name])), least))
    tile["slices"] = min(tile["slices"], max(tile["depth"] // LEAST, 1))
    return tile


def candidates(stated: Mapping[str, int | float | bool | str]) -> list[dict[str, int]]:
    """Tiles worth timing for a layer of which :func:`facts` says that."""
    total, outputs_in_all = int(stated["depth"]), max(int(stated["outputs"]), LEAST)
    found = []
    if int(stated["pixels"]) <= MOST_SINGLE_PIXELS:
        for outputs, depth, warps in itertools.product((1, 2, 4), (512, 1024, 2048, 4096), (2, 4, 8)):
            if outputs * depth <= 4096 and depth < 2 * total:
                found.append(_tile(1, outputs, depth, 1, warps, 1))
    for pixels, outputs, depth in itertools.product((16, 32, 64, 128), (16, 32, 64), (32, 64, 128, 256, 512)):
        if outputs >= 2 * outputs_in_all or depth >= 2 * total:
            continue
        for warps, stages in itertools.product((4, 8), (1, 2, 3)):
            # What is loaded for one step passes through registers where it is blended.
            held = (pixels * (4 if stated["resized"] else 1) + outputs) * depth * int(stated["bits"]) // 8
            slices = (1, warps) if stated["bits"] == 16 and depth >= LEAST * warps else (1,)
            sums = pixels * outputs // (32 * warps)
            found += [
                _tile(pixels, outputs, depth, many, warps, stages)
                for many in slices
                if held <= (384 if stages == 1 else 768) * 32 * warps and sums * many <= 64
            ]
    return found


def candidates_resize(stated: Mapping[str, int | float | bool | str]) -> list[dict[str, int]]:
    """Both ways to resize."""
    return [{"apart": 0}, {"apart": 1}]


def _tile(pixels: int, outputs: int, depth: int, slices: int, warps: int, stages: int) -> dict[str, int]:
    given = {"pixels": pixels, "outputs": outputs, "depth": depth, "slices": slices}
    return {**given, "warps": warps, "stages": stages}


def _launch(layer: Layer, read: Tensor, weight: Tensor, bias: Tensor, out: Tensor, resized: Tensor) -> None:
    """``resized``: room for what is resized, if it is apart."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = read.shape
    outputs = weight.shape[0]
    stated = facts(layer, read, weight)
    if layer.resized and table.choose("autoencoder.resize", stated)["apart"]:
        resized = _channels_last(resized, (images, channels, *layer.size))
        _launch_resize(read, resized)
        conv_pool_mixed(resized, weight, None, bias, padding=layer.padding, relu=layer.relu, out=out)
        return
    tile = chosen_tile(stated)
    counts = (tiles(images * out.shape[2] * out.shape[3], tile["pixels"]), tiles(outputs, tile["outputs"]))
    launch(
        _convolve,
        counts[0] * counts[1],
        read.device,
        [
            *(read, weight, bias, out, height / layer.size[0], width / layer.size[1]),
            *(images, height, width, *layer.size, *out.shape[2:]),
            *(read.stride(0), read.stride(2), read.stride(3), counts[1]),
        ],
        CHANNELS=channels,
        WRITTEN=outputs,
        KERNEL=layer.kernel,
        STRIDE=layer.stride,
        PADDING=layer.padding,
        RESIZED=layer.resized,
        RELU=layer.relu,
        DENSE=read.is_contiguous(memory_format=torch.channels_last),
        PIXELS=tile["pixels"],
        OUTPUTS=tile["outputs"],
        DEPTH=tile["depth"],
        SLICES=tile["slices"],
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )


RESIZED_NUMBERS, RESIZE_WARPS = 2048, 4
"""That a program blends: a thread 16, of two vectors. Too little work to choose among tiles."""


def _launch_resize(read: Tensor, out: Tensor) -> None:
    images, channels, height, width = out.shape
    block = triton.next_power_of_2(channels)
    pixels = max(RESIZED_NUMBERS // block, 1)
    launch(
        _resize,
        tiles(images * height * width, pixels),
        read.device,
        [
            *(read, out, read.shape[2] / height, read.shape[3] / width, images * height * width),
            *(*read.shape[2:], height, width),
        ],
        CHANNELS=channels,
        BLOCK=block,
        PIXELS=pixels,
        num_warps=RESIZE_WARPS,
    )


def _channels_last(room: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The first numbers of some room as a tensor ``(N, C, H, W)``, channels-last."""
    _, channels, height, width = shape
    return room.as_strided(shape, (height * width * channels, 1, width * channels, channels))


def autoencoder_mixed(
    image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, out: Tensor, workspace: Tensor
) -> None:
    """``autoencoder.mixed`` of the catalogue."""
    contract.check_mixed(image, weights, biases, out, workspace)
    require_runnable("autoencoder", "image", image)
    require_products("autoencoder", "out", out)
    channels = [one.shape[0] for one in weights]
    sizes = contract.mixed_parts(image.shape[0], image.shape[2:], out.shape[2:], channels)
    *parts, resized = workspace[: sum(sizes)].split(sizes)
    read = packing.mixed(image)
    for index, layer in enumerate(contract.layers(image.shape[2:], out.shape[2:])):
        written = out
        if index < contract.LAYERS - 1:
            written = _channels_last(parts[index % 2], (image.shape[0], channels[index], *layer.out_size))
        _launch(layer, read, weights[index], biases[index], written, resized)
        read = written


def autoencoder(image: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """``autoencoder`` of the catalogue."""
    out = contract.fake(image, weights, biases, size)
    channels = [one.shape[0] for one in weights]
    numbers = contract.mixed_workspace_size(image.shape[0], image.shape[2:], size, channels)
    autoencoder_mixed(image, weights, biases, out=out, workspace=image.new_empty(numbers))
    return out


def model_calls(model_size: ModelSize, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What EfficientAD-S and -M ask for at 256 x 256, in batches of 1 and 32, for the kernel report: both the same."""
    narrow = torch.float16 if dtype == torch.float8_e4m3fn else dtype
    image_size = (SIDE, SIDE)

    def call(index: int, images: int, size: tuple[int, int]) -> None:
        layers = contract.layers(image_size, size)
        layer = layers[index]
        channels, outputs = (MIXED_CHANNELS[1], *contract.CHANNELS)[index : index + 2]
        read_size = layers[index - 1].out_size if layer.resized else layer.size
        read = torch.empty(images, channels, *read_size, dtype=narrow, device="meta")
        weight = torch.empty(outputs, channels, layer.kernel, layer.kernel, dtype=narrow, device="meta")
        last = index == contract.LAYERS - 1
        out = torch.empty(images, outputs, *layer.out_size, dtype=dtype if last else narrow, device="meta")
        bias = torch.empty(outputs, device="meta")
        resized = torch.empty(images * channels * layer.size[0] * layer.size[1], dtype=narrow, device="meta")
        _launch(layer, channels_last(read), channels_last(weight), bias, channels_last(out), resized)

    return {
        f"{name}{', padded' if padded else ''}, batch {images}": partial(
            call, index, images, feature_size(image_size, padding=padded)
        )
        for padded in (False, True)
        for index, name in enumerate(NAMES)
        if not padded or index == contract.LAYERS - 1
        for images in (1, 32)
    }


def representative_calls() -> dict[str, Callable[[], object]]:
    """What the kernel report compiles, with meta tensors inside `launching.recorded`: one image, in float16."""
    calls = model_calls("s", torch.float16)
    return {name: calls[f"{name}, batch 1"] for name in NAMES}


overloads = {"default": autoencoder, "mixed": autoencoder_mixed}
