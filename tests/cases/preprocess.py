"""What ``preprocess`` is tested with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from operator_cases import Arguments, Case, Refusal, numbers
from torch import Tensor

from efficientad_fast.reference.preprocess import preprocess

FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


def case(
    name: str,
    shape: tuple[int, int, int],
    size: tuple[int, int],
    *,
    resize: str = "antialias",
    source: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    change: Callable[[Tensor], Tensor] = lambda image: image,
    into: bool = False,
    of_four: bool = False,
    **options: Any,
) -> Case:
    """``shape``: (N, H, W) of the images. ``change`` is applied to them. ``of_four``: into three of four channels."""

    def make() -> Arguments:
        image = numbers((*shape, 3))
        image = change((256 * image).to(source) if source == torch.uint8 else image.to(source))
        if not into:
            chosen = {"resize": resize, "channels_last": channels_last, "dtype": dtype}
            return (image, list(size)), chosen | options
        out = torch.full((shape[0], 4 if of_four else 3, *size), math.nan, dtype=dtype)
        out = out.contiguous(memory_format=FORMATS[channels_last])[:, :3]
        return (image,), {"resize": resize, "out": out} | options

    return Case(f"{resize}, {name}", "preprocess.out" if into else "preprocess", make)


def planes_first(image: Tensor) -> Tensor:
    """The same numbers with the channels far apart, as a decoder for NCHW leaves them."""
    return image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def window(image: Tensor) -> Tensor:
    """A window of a larger image."""
    large = torch.zeros((image.shape[0], image.shape[1] + 3, image.shape[2] + 5, 3), dtype=image.dtype)
    large[:, 2:-1, 1:-4] = image
    return large[:, 2:-1, 1:-4]


def out_of_range(image: Tensor) -> Tensor:
    """What a camera's float pipeline may hand over: beyond [0, 1] on both sides."""
    return 3 * image - 1


def cases_of(resize: str) -> list[Case]:
    def one(name: str, shape: tuple[int, int, int], size: tuple[int, int], **options: Any) -> Case:
        return case(name, shape, size, resize=resize, **options)

    return [
        one("half", (1, 64, 48), (32, 24)),
        one("a third, not whole", (2, 37, 53), (13, 17)),
        one("larger", (1, 9, 7), (31, 33)),
        one("wider and lower", (1, 41, 5), (7, 29)),
        one("same size", (2, 16, 19), (16, 19)),
        one("same height", (1, 16, 19), (16, 7)),
        one("same width", (1, 16, 19), (7, 19)),
        one("one pixel", (1, 1, 1), (5, 3)),
        one("to one pixel", (1, 23, 29), (1, 1)),
        one("a row", (1, 1, 67), (3, 8)),
        one("a column", (1, 67, 1), (8, 3)),
        one("much smaller", (1, 300, 280), (2, 3)),
        one("off by one from blocks", (1, 65, 129), (33, 63)),
        one("empty", (0, 9, 7), (4, 4)),
        one("float", (2, 37, 53), (13, 17), source=torch.float32),
        one("float, beyond the range", (1, 21, 15), (10, 11), source=torch.float32, change=out_of_range),
        one("channels last", (2, 20, 30), (9, 11), channels_last=True),
        one("channels last, half", (2, 20, 30), (9, 11), channels_last=True, dtype=torch.float16),
        one("float16", (1, 20, 30), (9, 12), dtype=torch.float16),
        one("bfloat16", (1, 20, 30), (9, 13), dtype=torch.bfloat16),
        one("planes first", (2, 20, 30), (9, 11), change=planes_first),
        one("window", (2, 20, 30), (9, 11), change=window),
        one("mean and std", (1, 20, 30), (9, 11), mean=[0.0, 0.5, 0.25], std=[1.0, -0.5, 2.0]),
        one("into", (2, 20, 30), (9, 11), into=True),
        one("into, channels last, half", (2, 20, 30), (9, 11), channels_last=True, dtype=torch.float16, into=True),
        one(
            "into three of four, half",
            (3, 20, 30),
            (9, 11),
            channels_last=True,
            dtype=torch.float16,
            into=True,
            of_four=True,
        ),
        one("into three of four, a column", (2, 9, 5), (9, 1), channels_last=True, into=True, of_four=True),
        one("into, empty", (0, 20, 30), (9, 11), into=True),
    ]


CASES = [*cases_of("antialias"), *cases_of("pillow")]


@st.composite
def strategy(draw: Any) -> Case:
    side = st.integers(1, 40)
    shape, size = (draw(st.integers(0, 2)), draw(side), draw(side)), (draw(side), draw(side))
    options = {
        "resize": draw(st.sampled_from(("antialias", "pillow"))),
        "source": draw(st.sampled_from((torch.uint8, torch.float32))),
        "channels_last": draw(st.booleans()),
        "into": draw(st.booleans()),
    }
    return case(f"drawn, {shape} to {size}, {options}", shape, size, **options)


def expected(
    case: Case,
    image: Tensor,
    size: list[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    height, width = size if out is None else out.shape[-2:]
    images = [preprocess(one, (height, width), dtype=torch.float64, **options) for one in image.movedim(3, 1)]
    return (torch.stack(images) if images else torch.empty((0, 3, height, width), dtype=torch.float64),)


def refusal(name: str, message: str, overload: str = "preprocess", **changes: Any) -> Refusal:
    def make() -> Arguments:
        image = torch.zeros(2, 5, 5, 3, dtype=torch.uint8)
        target: dict[str, Any] = {"size": [8, 8]} if overload == "preprocess" else {"out": torch.empty(2, 3, 8, 8)}
        return (), {"image": image} | target | changes

    return Refusal(name, overload, make, f"preprocess: {message}")


REFUSALS = [
    refusal(
        "one image", r"image must be \(N, H, W, 3\).*got \(5, 5, 3\)", image=torch.zeros(5, 5, 3, dtype=torch.uint8)
    ),
    refusal("planes", r"image must be .*got \(1, 3, 5, 5\)", image=torch.zeros(1, 3, 5, 5, dtype=torch.uint8)),
    refusal("no rows", r"image must be .*got \(1, 0, 5, 3\)", image=torch.zeros(1, 0, 5, 3, dtype=torch.uint8)),
    refusal("float64", "image must be uint8, or float32.*got torch.float64", image=torch.zeros(1, 5, 5, 3).double()),
    refusal("size 0", r"size must be .*got \[8, 0\]", size=[8, 0]),
    refusal("resize", "resize must be 'antialias' or 'pillow', got 'cubic'", resize="cubic"),
    refusal("two means", r"mean must be three finite numbers, got \[0", mean=[0.5, 0.5]),
    refusal("NaN mean", "mean must be three finite numbers, got", mean=[0.5, 0.5, math.nan]),
    refusal("std 0", "std must be three numbers other than zero, got", std=[1.0, 0.0, 1.0]),
    refusal("dtype", "dtype must be float32, float16 or bfloat16, got torch.int32", dtype=torch.int32),
    refusal("two channels out", r"out must be \(2, 3, h, w\), got", "preprocess.out", out=torch.empty(2, 2, 8, 8)),
    refusal(
        "output dtype",
        "out must be float32, .*got torch.float64",
        "preprocess.out",
        out=torch.empty(2, 3, 8, 8).double(),
    ),
    refusal(
        "output with gaps",
        "out must be contiguous, channels-last, or the first three of four channels, channels-last, got strides",
        "preprocess.out",
        out=torch.empty(2, 3, 8, 16)[..., ::2],
    ),
    refusal("other device", "out must be on .*got meta", "preprocess.out", out=torch.empty(2, 3, 8, 8, device="meta")),
]
