"""What ``autoencoder`` is tested with: few channels, for images cannot be small.

Of `ENOUGH` channels, kernels in mixed precision read some in vectors, and some layers' sums are deeper than a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from convolution_cases import (
    Change,
    channels_last,
    narrowed,
    planes_first,
    signed,
    some_channels,
    turned,
    weights,
    window,
    with_value,
    workspace,
    written,
)
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal
from torch import Tensor

from efficientad_fast.ops import autoencoder, conv_pool, packing

FLOAT16, BFLOAT16, FLOAT8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn

FEW = (3, 2, 5, 3, 4, 3, 4, 2, 3, 5, 3, 2, 5)
"""Outputs of each layer."""

ENOUGH = (2, 3, 2, 3, 2, 16, 17, 16, 16, 3, 16, 3, 33)
"""With which some layers of the decoder read enough channels for Winograd, and others do not."""


def parameters(
    channels: Sequence[int], image_channels: int = autoencoder.IMAGE_CHANNELS
) -> tuple[list[Tensor], list[Tensor]]:
    read = (image_channels, *channels[:-1])
    kernels = [layer.kernel for layer in autoencoder.layers((256, 256), (1, 1))]
    # ReLU leaves half of the squares.
    made = [
        math.sqrt(2) * weights((outputs, inputs, kernel, kernel), seed)
        for seed, (outputs, inputs, kernel) in enumerate(zip(channels, read, kernels, strict=True))
    ]
    return made, [0.3 * signed((outputs,), 20 + index) for index, outputs in enumerate(channels)]


def case(
    name: str,
    images: int,
    image_size: tuple[int, int],
    size: tuple[int, int],
    channels: Sequence[int] = FEW,
    *,
    change: Change = channels_last,
) -> Case:
    def make() -> Arguments:
        return (change(signed((images, 3, *image_size), 99)), *parameters(channels), list(size)), {}

    return Case(name, "autoencoder", make)


def into(
    name: str,
    images: int,
    image_size: tuple[int, int],
    size: tuple[int, int],
    channels: Sequence[int] = FEW,
    *,
    algorithms: dict[int, str] | None = None,
    threads: int = 1,
    change: Change = channels_last,
) -> Case:
    """``algorithms``: of layers other than the encoder's, by index, where it is not ``"auto"``."""
    same = case(name, images, image_size, size, channels, change=change)

    def make() -> Arguments:
        (image, given, biases, _), _ = same.make()
        packed = []
        for index, weight in enumerate(given):
            algorithm = (algorithms or {}).get(index, "auto") if index >= autoencoder.ENCODER_LAYERS else "direct"
            packed.append(conv_pool.reference_pack(weight, algorithm=algorithm))
        out = written((images, channels[-1], *size))
        room = workspace(threads, autoencoder.workspace_size(image_size, size, channels))
        return (image, packed, biases), {"out": out, "workspace": room}

    row = "autoencoder, F(6x6, 4x4)" if "winograd6" in (algorithms or {}).values() else ""
    return Case(f"into, {name}", "autoencoder.out", make, quantity=row, same_as=same)


def mixed(
    name: str,
    images: int,
    image_size: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    channels: Sequence[int] = FEW,
    *,
    out_dtype: torch.dtype | None = None,
    image_channels: int = 4,
    larger: float = 1.0,
    change: Change = channels_last,
    change_weight: Change = channels_last,
) -> Case:
    """In mixed precision. ``larger``: how much weights of the last layer are than usual."""

    def make() -> Arguments:
        image = narrowed(change(signed((images, image_channels, *image_size), 99)), dtype)
        given, biases = parameters(channels, image_channels)
        given[-1] *= larger
        numbers = autoencoder.mixed_workspace_size(images, image_size, size, channels)
        room = torch.full((numbers + 5,), math.nan, dtype=dtype)
        out = written((images, channels[-1], *size), out_dtype or dtype)
        placed = [narrowed(change_weight(one), dtype) for one in given]
        return (image, placed, biases), {"out": out, "workspace": room}

    return Case(f"mixed, {name}", "autoencoder.mixed", make, quantity="autoencoder, mixed")


CASES = [
    case("as 256 x 256 makes it", 1, (256, 256), (56, 56)),
    case("as 256 x 256 makes it, padded", 2, (256, 256), (64, 64)),
    case("enough channels for Winograd", 1, (256, 256), (56, 56), ENOUGH),
    case("a channel each", 1, (256, 256), (5, 6), (1,) * 13),
    case("one pixel", 1, (256, 256), (1, 1)),
    case("larger than the last step", 1, (256, 256), (129, 150)),
    case("no longer than the last step", 1, (256, 256), (128, 128), ENOUGH),
    case("prime sides", 1, (257, 331), (57, 75)),
    case("just below the next step", 1, (319, 287), (72, 64), ENOUGH),
    case("three images, more than one place inside", 3, (256, 300), (56, 67)),
    case("planes first", 2, (256, 256), (9, 7), change=planes_first),
    case("turned", 1, (256, 259), (9, 7), change=turned),
    case("some channels", 2, (256, 257), (9, 7), change=some_channels),
    case("NaN", 2, (256, 256), (9, 7), change=with_value(math.nan)),
    case("empty", 0, (256, 256), (56, 56)),
    into("as 256 x 256 makes it", 1, (256, 256), (56, 56), threads=2),
    into("enough channels for Winograd", 3, (257, 256), (56, 55), ENOUGH, threads=2),
    into("direct alone", 1, (256, 260), (56, 57), ENOUGH, algorithms=dict.fromkeys(range(6, 13), "direct")),
    into("all in tiles of 4", 1, (256, 256), (17, 23), algorithms=dict.fromkeys(range(6, 13), "winograd4")),
    into(
        "tiles of 4 and 6",
        2,
        (256, 256),
        (17, 23),
        ENOUGH,
        algorithms={6: "winograd4", 7: "direct", 12: "winograd4", 8: "winograd4"},
    ),
    into("all in tiles of 6", 1, (256, 256), (60, 59), ENOUGH, algorithms=dict.fromkeys(range(6, 13), "winograd6")),
    into("window, more threads than images", 2, (256, 256), (9, 7), threads=3, change=window),
    into("NaN", 2, (256, 256), (9, 7), ENOUGH, change=with_value(math.nan)),
    into("empty", 0, (256, 256), (9, 7)),
    into("native, one pixel", 1, (256, 256), (1, 1)),
    mixed("float16, as 256 x 256 makes it", 2, (256, 256), (56, 56), FLOAT16, ENOUGH),
    mixed("bfloat16, prime sides", 1, (257, 331), (57, 75), BFLOAT16, ENOUGH),
    mixed("float32, larger than the last step", 1, (256, 256), (129, 150), torch.float32, image_channels=3),
    mixed("float16, three channels", 3, (256, 300), (56, 67), FLOAT16, image_channels=3),
    mixed("float16 to float8, beyond its largest", 1, (256, 256), (9, 7), FLOAT16, out_dtype=FLOAT8, larger=700.0),
    mixed("bfloat16 to float8", 1, (256, 256), (56, 56), BFLOAT16, out_dtype=FLOAT8),
    mixed("float32 to float8", 1, (256, 256), (9, 7), torch.float32, out_dtype=FLOAT8),
    mixed("one pixel", 1, (256, 256), (1, 1), FLOAT16),
    mixed("empty", 0, (256, 256), (56, 56), FLOAT16),
    mixed("window", 1, (256, 256), (9, 7), FLOAT16, change=window),
    mixed("planes first", 1, (256, 257), (9, 7), FLOAT16, change=planes_first, change_weight=planes_first),
    mixed("NaN", 2, (256, 256), (9, 7), FLOAT16, change=with_value(math.nan)),
    mixed("NaN to float8", 2, (256, 256), (9, 7), FLOAT16, out_dtype=FLOAT8, change=with_value(math.nan)),
]


@st.composite
def strategy(draw: Any) -> Case:
    images = draw(st.integers(0, 2))
    image_size = (draw(st.integers(256, 330)), draw(st.integers(256, 330)))
    size = (draw(st.integers(1, 90)), draw(st.integers(1, 90)))
    channels = draw(st.sampled_from((FEW, ENOUGH)))
    name = f"drawn, {images} of {image_size} to {size}, {channels}"
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(autoencoder.MIXED_DTYPES))
        options = {"out_dtype": draw(st.sampled_from((dtype, FLOAT8))), "image_channels": draw(st.integers(3, 4))}
        return mixed(f"{name}, {options}", images, image_size, size, dtype, channels, **options)
    if draw(st.booleans()):
        return case(name, images, image_size, size, channels)
    return into(name, images, image_size, size, channels, threads=draw(st.integers(1, 3)))


def expected(
    case: Case, image: Tensor, given: list[Tensor], biases: list[Tensor], size: Sequence[int] = (), **written_to: Tensor
) -> tuple[Tensor, ...]:
    out = written_to.get("out")
    size = size if out is None else out.shape[2:]
    if image.shape[0] == 0:
        return (torch.empty(0, given[-1].shape[0], *size, dtype=torch.float64),)
    exact, exact_biases = ([one.double() for one in some] for some in (given, biases))
    if out is None:
        return (autoencoder.compute(image.double(), exact, exact_biases, size),)
    result = autoencoder.compute_mixed(image.double(), exact, exact_biases, size, image.dtype)
    return (result.clamp(max=packing.LARGEST_E4M3) if out.dtype == FLOAT8 else result,)


def refusal(name: str, message: str, overload: str = "autoencoder", **changes: Any) -> Refusal:
    """A change is of an argument, or a pair (index, tensor) of one of its tensors."""

    def make() -> Arguments:
        given, biases = parameters(FEW)
        arguments: dict[str, Any] = {"image": torch.zeros(2, 3, 256, 260), "weights": given, "biases": biases}
        if overload == "autoencoder.mixed":
            arguments["image"] = arguments["image"].half()
            arguments["weights"] = [one.half() for one in given]
            out, room = written((2, FEW[-1], 9, 7), FLOAT16), torch.zeros(MIXED_NEEDED, dtype=FLOAT16)
            arguments |= {"out": out, "workspace": room}
        elif overload == "autoencoder.out":
            arguments["packed"] = [
                conv_pool.reference_pack(one, algorithm="direct") for one in arguments.pop("weights")
            ]
            arguments |= {"out": written((2, FEW[-1], 9, 7)), "workspace": workspace(1, NEEDED)}
        else:
            arguments["size"] = [9, 7]
        for argument, value in changes.items():
            if isinstance(value, tuple):
                arguments[argument][value[0]] = value[1]
            else:
                arguments[argument] = value
        return (), arguments

    return Refusal(name, overload, make, f"autoencoder: {message}")


NEEDED = autoencoder.workspace_size((256, 260), (9, 7), FEW)
OUT = "autoencoder.out"
MIXED_NEEDED = autoencoder.mixed_workspace_size(2, (256, 260), (9, 7), FEW)
MIXED = "autoencoder.mixed"


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def _elsewhere(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


REFUSALS = [
    refusal("three dimensions", r"image must be \(N, 3, H, W\), got \(3, 256, 260\)", image=torch.zeros(3, 256, 260)),
    refusal("four channels", r"image must be \(N, 3, H, W\), got \(2, 4, 256, 2", image=torch.zeros(2, 4, 256, 260)),
    refusal("image in half", "image must be float32, got torch.float16", image=_half(2, 3, 256, 260)),
    refusal("low", "image must be at least 256x256 pixels, got 255x260", image=torch.zeros(2, 3, 255, 260)),
    refusal("narrow", "image must be at least 256x256 pixels, got 300x255", image=torch.zeros(2, 3, 300, 255)),
    refusal("size 0", r"size must be a height and a width of at least 1, got \[0, 7\]", size=[0, 7]),
    refusal("no weights", "weights must be 13 tensors, of enconv1 to .*, got 0", weights=[]),
    refusal("twelve biases", "biases must be 13 tensors, of enconv1 to .*, got 12", biases=parameters(FEW)[1][1:]),
    refusal(
        "weight of another kernel",
        r"weights\[5\] must be \(outputs, 4, 8, 8\), got \(3, 4, 4, 4\)",
        weights=(5, torch.zeros(3, 4, 4, 4)),
    ),
    refusal(
        "weight of other channels",
        r"weights\[12\] must be \(outputs, 2, 3, 3\), got \(5, 3, 3, 3\)",
        weights=(12, torch.zeros(5, 3, 3, 3)),
    ),
    refusal("flat weight", r"weights\[0\] must be \(outputs, 3, 4, 4\), got \(9,\)", weights=(0, torch.zeros(9))),
    refusal("no outputs", r"weights\[0\] must be .*got \(0, 3, 4, 4\)", weights=(0, torch.zeros(0, 3, 4, 4))),
    refusal("weight in half", r"weights\[1\] must be float32, got torch.float16", weights=(1, _half(2, 3, 4, 4))),
    refusal("weight elsewhere", r"weights\[1\] must be on .*got", weights=(1, _elsewhere(2, 3, 4, 4))),
    refusal("bias of five", r"biases\[3\] must be \(3,\), got \(5,\)", biases=(3, torch.zeros(5))),
    refusal("bias in half", r"biases\[3\] must be float32, got torch.float16", biases=(3, _half(3))),
    refusal("bias elsewhere", r"biases\[3\] must be on .*got", biases=(3, _elsewhere(3))),
    refusal("into, of no image", r"image must be \(N, 3, H, W\), got", OUT, image=torch.zeros(256, 256)),
    refusal("into, of half", "image must be float32, got", OUT, image=_half(2, 3, 256, 260)),
    refusal("into, low", "image must be at least 256x256 pixels, got 32x", OUT, image=torch.zeros(2, 3, 32, 260)),
    refusal("no packed weights", "packed must be 13 tensors, of enconv1 to .*, got 0", OUT, packed=[]),
    refusal("no biases", "biases must be 13 tensors, of enconv1 to .*, got 0", OUT, biases=[]),
    refusal(
        "weights of another layer",
        r"packed\[6\] must be \(1, 1, 1, 48, 32\) or \(1, 1, 49, 16, 32\) or \(1, 1, 81, 16, 32\), got \(1, 1, 36, 16",
        OUT,
        packed=(6, torch.zeros(1, 1, 36, 16, 32)),
    ),
    refusal(
        "encoder in tiles",
        r"packed\[1\] must be \(1, 1, 1, 48, 32\), got \(1, 1, 49, 16, 32\)",
        OUT,
        packed=(1, torch.zeros(1, 1, 49, 16, 32)),
    ),
    refusal("packed in half", r"packed\[1\] must be float32, got", OUT, packed=(1, _half(1, 1, 1, 48, 32))),
    refusal(
        "packed with gaps",
        r"packed\[1\] must be contiguous, got strides",
        OUT,
        packed=(1, torch.zeros(1, 1, 1, 48, 64)[..., ::2]),
    ),
    refusal("packed elsewhere", r"packed\[1\] must be on .*got", OUT, packed=(1, _elsewhere(1, 1, 1, 48, 32))),
    refusal("bias of two axes", r"biases\[4\] must be \(outputs,\) .*got \(4, 1\)", OUT, biases=(4, torch.zeros(4, 1))),
    refusal(
        "empty bias", r"biases\[4\] must be \(outputs,\) with at least 1, got \(0,\)", OUT, biases=(4, torch.zeros(0))
    ),
    refusal("into, bias in half", r"biases\[4\] must be float32, got", OUT, biases=(4, _half(4))),
    refusal("into, bias elsewhere", r"biases\[4\] must be on .*got", OUT, biases=(4, _elsewhere(4))),
    refusal(
        "output of other channels",
        r"out must be \(2, C, h, w\) with C outputs as biases\[12\] has, got \(2, 6, 9, 7\)",
        OUT,
        out=written((2, 6, 9, 7)),
    ),
    refusal("output of another batch", r"out must be \(2, C, h, w\) .*got \(3, 5", OUT, out=written((3, 5, 9, 7))),
    refusal("output without rows", r"out must be \(2, C, h, w\) .*got \(2, 5, 0", OUT, out=written((2, 5, 0, 7))),
    refusal("output in half", "out must be float32, got", OUT, out=channels_last(_half(2, 5, 9, 7))),
    refusal(
        "output with planes first", "out must be dense and channels-last, got strides", OUT, out=torch.zeros(2, 5, 9, 7)
    ),
    refusal("output elsewhere", "out must be on .*got", OUT, out=channels_last(_elsewhere(2, 5, 9, 7))),
    refusal(
        "small workspace",
        rf"workspace must be \(threads, numbers\) of at least \(1, {NEEDED}\), got \(1, {NEEDED - 1}\)",
        OUT,
        workspace=torch.zeros(1, NEEDED - 1),
    ),
    refusal("workspace elsewhere", "workspace must be on .*got", OUT, workspace=_elsewhere(1, NEEDED)),
    refusal(
        "mixed, five channels",
        r"image must be \(N, 3, H, W\) or \(N, 4, H, W\), got \(2, 5, 256, 260\)",
        MIXED,
        image=_half(2, 5, 256, 260),
    ),
    refusal(
        "mixed, image in float8",
        "image must be float32, float16 or bfloat16, got torch.float8_e4m3fn",
        MIXED,
        image=torch.zeros(2, 3, 256, 260, dtype=FLOAT8),
    ),
    refusal("mixed, low", "image must be at least 256x256 pixels, got 32x260", MIXED, image=_half(2, 3, 32, 260)),
    refusal("mixed, no weights", "weights must be 13 tensors, of enconv1 to .*, got 0", MIXED, weights=[]),
    refusal("mixed, no biases", "biases must be 13 tensors, of enconv1 to .*, got 0", MIXED, biases=[]),
    refusal(
        "mixed, fourth channel without weights",
        r"weights\[0\] must be \(outputs, 4, 4, 4\), got \(3, 3, 4, 4\)",
        MIXED,
        image=_half(2, 4, 256, 260),
    ),
    refusal(
        "mixed, weight in float32",
        r"weights\[1\] must be torch.float16 as image is, got torch.float32",
        MIXED,
        weights=(1, torch.zeros(2, 3, 4, 4)),
    ),
    refusal(
        "mixed, weight elsewhere", r"weights\[1\] must be on .*got", MIXED, weights=(1, _elsewhere(2, 3, 4, 4).half())
    ),
    refusal("mixed, bias of five", r"biases\[3\] must be \(3,\), got \(5,\)", MIXED, biases=(3, torch.zeros(5))),
    refusal("mixed, bias in half", r"biases\[3\] must be float32, got torch.float16", MIXED, biases=(3, _half(3))),
    refusal("mixed, output of no image", r"out must be \(N, C, h, w\) with C, h and w of", MIXED, out=_half(9, 7)),
    refusal(
        "mixed, output of other channels",
        r"out must be \(2, 5, 9, 7\), got \(2, 6, 9, 7\)",
        MIXED,
        out=written((2, 6, 9, 7), FLOAT16),
    ),
    refusal(
        "mixed, output in another dtype",
        "out must be torch.float16 as image is, or float8_e4m3fn, got torch.float32",
        MIXED,
        out=written((2, 5, 9, 7)),
    ),
    refusal(
        "mixed, output with planes first",
        "out must be dense and channels-last, got strides",
        MIXED,
        out=_half(2, 5, 9, 7),
    ),
    refusal("mixed, output elsewhere", "out must be on .*got", MIXED, out=channels_last(_elsewhere(2, 5, 9, 7).half())),
    refusal(
        "mixed, small workspace",
        rf"workspace must be \(numbers,\) of at least \({MIXED_NEEDED},\), got \({MIXED_NEEDED - 1},\)",
        MIXED,
        workspace=_half(MIXED_NEEDED - 1),
    ),
    refusal(
        "mixed, workspace in float32",
        "workspace must be torch.float16 as image is, got torch.float32",
        MIXED,
        workspace=torch.zeros(MIXED_NEEDED),
    ),
    refusal(
        "mixed, workspace with gaps",
        "workspace must be contiguous, got strides",
        MIXED,
        workspace=_half(2 * MIXED_NEEDED)[::2],
    ),
    refusal(
        "mixed, workspace elsewhere", "workspace must be on .*got", MIXED, workspace=_elsewhere(MIXED_NEEDED).half()
    ),
]
