"""``anomaly_map``: from the two raw maps to the anomaly map and the image score, in one pass.

Source: SPEC "Maps and score"; paper, sections 3.3 and 3.4. ``map' = 0.1 (map - start) / (end - start)`` for each map
with its own quantiles, ``anomaly_map = 0.5 map_st' + 0.5 map_ae'``, score = its maximum. Three overloads:

``anomaly_map(map_st, map_ae, size, quantiles=None, *, border=0, convention="resized") -> (anomaly_map, score)``

- map_st, map_ae: ``(N, 1, h, w)``, h and w at least 1, of one shape, float32, float16, bfloat16 or float64, on one
  device; any strides. Squared feature units. N may be 0.
- size: height and width of the anomaly map in pixels, each at least 1. Plain numbers: `torch.compile` and
  `torch.export` fix them, while batch and size of the maps may be dynamic.
- quantiles: ``[st_start, st_end, ae_start, ae_end]``, finite, each end other than its start; None leaves the maps as
  they are.
- border: zeros added to each side before the resize (4 with ``pad_maps``), at most 65,536.
- convention: ``"resized"`` pads and resizes the raw maps, then normalises and combines them; ``"native"``
  normalises and combines, then pads and resizes. They differ in the border alone.

anomaly_map is ``(N, 1, *size)`` and score ``(N,)``, contiguous: float64 where both maps are, else float32. The resize
is bilinear with pixel areas aligned (``align_corners=False``) and no antialiasing. A NaN in a map makes the score NaN;
backends agree on which pixels it reaches up to neighbours with weight zero. There is no gradient.

``anomaly_map.out(map_st, map_ae, quantiles=None, *, border=0, convention="resized", anomaly_map, score)``

The same, written into ``anomaly_map`` ``(N, 1, H, W)``, whose size decides, and ``score`` ``(N,)``, both contiguous and
of the dtype above. Allocates nothing on a device.

``anomaly_map.drop_in(map_st, map_ae, st_quantiles=None, ae_quantiles=None) -> (map_combined, map_st, map_ae)``

At feature resolution and without a score, as the function `efficientad_fast.predict` returns them. Quantiles are
tensors ``(2,)`` on the device of the maps, (start, end), of any floating dtype, so that a GPU is not waited for; equal
ones divide by zero. Each map keeps its dtype, map_combined has that which both promote to; the arithmetic is in
float64 where either map is, else in float32.

Errors, in one sentence with argument, expected, got: `InputError` of the reference, RuntimeError of compiled kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from efficientad_fast.ops.overload import Overload, require, require_one_device, require_positive_size
from efficientad_fast.reference import maps

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CONVENTIONS = ("resized", "native")
MOST_BORDER = 65536


def result_dtype(map_st: Tensor, map_ae: Tensor) -> torch.dtype:
    """Of anomaly map and score; the arithmetic is in it."""
    return torch.float64 if map_st.dtype == map_ae.dtype == torch.float64 else torch.float32


def check(
    map_st: Tensor, map_ae: Tensor, size: Sequence[int], quantiles: Sequence[float] | None, border: int, convention: str
) -> None:
    """What every implementation in Python refuses; csrc/anomaly_map.h says the same for the compiled ones."""
    check_maps(map_st, map_ae)
    require_positive_size("anomaly_map", size)
    require(0 <= border <= MOST_BORDER, "anomaly_map", "border", f"from 0 to {MOST_BORDER}", border)
    require(convention in CONVENTIONS, "anomaly_map", "convention", "'resized' or 'native'", repr(convention))
    if quantiles is not None:
        given = list(quantiles)
        four = len(given) == 4 and all(map(math.isfinite, given))
        require(four, "anomaly_map", "quantiles", "four finite numbers [st_start, st_end, ae_start, ae_end]", given)
        different = given[0] != given[1] and given[2] != given[3]
        require(different, "anomaly_map", "quantiles", "such that each end differs from its start", given)


def check_maps(map_st: Tensor, map_ae: Tensor) -> None:
    """The part of :func:`check` that is about the tensors."""
    shape = tuple(map_st.shape)
    one_map = len(shape) == 4 and shape[1] == 1 and shape[2] >= 1 and shape[3] >= 1
    require(one_map, "anomaly_map", "map_st", "(N, 1, h, w) with h and w of at least 1", shape)
    require(map_ae.shape == map_st.shape, "anomaly_map", "map_ae", f"{shape} as map_st is", tuple(map_ae.shape))
    for name, given in (("map_st", map_st), ("map_ae", map_ae)):
        require(given.dtype in DTYPES, "anomaly_map", name, "float32, float16, bfloat16 or float64", given.dtype)
    require_one_device("anomaly_map", "map_st", map_st.device, {"map_ae": map_ae})


def check_outputs(map_st: Tensor, map_ae: Tensor, anomaly_map: Tensor, score: Tensor) -> None:
    """What :func:`check` does not know of the overload that writes into given outputs."""
    images, dtype = map_st.shape[0], result_dtype(map_st, map_ae)
    shape = tuple(anomaly_map.shape)
    fitting = len(shape) == 4 and shape[:2] == (images, 1)
    require(fitting, "anomaly_map", "anomaly_map", f"({images}, 1, H, W)", shape)
    require(score.shape == (images,), "anomaly_map", "score", f"({images},)", tuple(score.shape))
    for name, given in (("anomaly_map", anomaly_map), ("score", score)):
        require(given.dtype == dtype, "anomaly_map", name, str(dtype), given.dtype)
        require(given.is_contiguous(), "anomaly_map", name, "contiguous", f"strides {given.stride()}")
    require_one_device("anomaly_map", "map_st", map_st.device, {"anomaly_map": anomaly_map, "score": score})


def check_drop_in(map_st: Tensor, map_ae: Tensor, st_quantiles: Tensor | None, ae_quantiles: Tensor | None) -> None:
    check_maps(map_st, map_ae)
    for name, given in (("st_quantiles", st_quantiles), ("ae_quantiles", ae_quantiles)):
        if given is not None:
            pair = given.shape == (2,) and given.is_floating_point()
            got = f"{tuple(given.shape)} of {given.dtype}"
            require(pair, "anomaly_map", name, "(2,) of a floating dtype: start and end", got)
            require_one_device("anomaly_map", "map_st", map_st.device, {name: given})


def reference(
    map_st: Tensor,
    map_ae: Tensor,
    size: Sequence[int],
    quantiles: Sequence[float] | None = None,
    *,
    border: int = 0,
    convention: str = "resized",
) -> tuple[Tensor, Tensor]:
    check(map_st, map_ae, size, quantiles, border, convention)
    dtype = result_dtype(map_st, map_ae)
    if map_st.shape[0] == 0:
        return map_st.new_empty((0, 1, *size), dtype=dtype), map_st.new_empty(0, dtype=dtype)
    both = (map_st.to(dtype), map_ae.to(dtype))
    known = None if quantiles is None else maps.Quantiles(*quantiles)
    if convention == "resized":
        resized = [maps.resize_map(maps.pad_map(one, border), size) for one in both]
        anomaly_map = maps.combine(resized[0], resized[1], known)
    else:
        anomaly_map = maps.resize_map(maps.pad_map(maps.combine(*both, known), border), size)
    return anomaly_map.contiguous(), maps.image_score(anomaly_map)


def fake(
    map_st: Tensor,
    map_ae: Tensor,
    size: Sequence[int],
    quantiles: Sequence[float] | None = None,
    *,
    border: int = 0,
    convention: str = "resized",
) -> tuple[Tensor, Tensor]:
    check(map_st, map_ae, size, quantiles, border, convention)
    dtype = result_dtype(map_st, map_ae)
    images = map_st.shape[0]
    return map_st.new_empty((images, 1, *size), dtype=dtype), map_st.new_empty(images, dtype=dtype)


def reference_out(
    map_st: Tensor,
    map_ae: Tensor,
    quantiles: Sequence[float] | None = None,
    *,
    border: int = 0,
    convention: str = "resized",
    anomaly_map: Tensor,
    score: Tensor,
) -> None:
    fake_out(map_st, map_ae, quantiles, border=border, convention=convention, anomaly_map=anomaly_map, score=score)
    size = anomaly_map.shape[-2:]
    results = reference(map_st, map_ae, size, quantiles, border=border, convention=convention)
    anomaly_map.copy_(results[0])
    score.copy_(results[1])


def fake_out(
    map_st: Tensor,
    map_ae: Tensor,
    quantiles: Sequence[float] | None = None,
    *,
    border: int = 0,
    convention: str = "resized",
    anomaly_map: Tensor,
    score: Tensor,
) -> None:
    check_maps(map_st, map_ae)
    check_outputs(map_st, map_ae, anomaly_map, score)
    check(map_st, map_ae, anomaly_map.shape[-2:], quantiles, border, convention)


def reference_drop_in(
    map_st: Tensor, map_ae: Tensor, st_quantiles: Tensor | None = None, ae_quantiles: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_drop_in(map_st, map_ae, st_quantiles, ae_quantiles)

    def normalised(raw: Tensor, quantiles: Tensor | None) -> Tensor:
        placed = raw.to(dtype)
        if quantiles is None:
            return placed
        start, end = quantiles.double().unbind()
        return 0.1 * (placed - start.to(dtype)) / (end - start).to(dtype)

    exact = torch.float64 in (map_st.dtype, map_ae.dtype)
    dtype = torch.float64 if exact else torch.float32
    st, ae = normalised(map_st, st_quantiles), normalised(map_ae, ae_quantiles)
    combined = (0.5 * st + 0.5 * ae).to(torch.promote_types(map_st.dtype, map_ae.dtype))
    results = (combined, st.to(map_st.dtype), ae.to(map_ae.dtype))
    return tuple(one.clone(memory_format=torch.contiguous_format) for one in results)  # type: ignore[return-value]


def fake_drop_in(
    map_st: Tensor, map_ae: Tensor, st_quantiles: Tensor | None = None, ae_quantiles: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_drop_in(map_st, map_ae, st_quantiles, ae_quantiles)
    dtypes = (torch.promote_types(map_st.dtype, map_ae.dtype), map_st.dtype, map_ae.dtype)
    return tuple(map_st.new_empty(map_st.shape, dtype=dtype) for dtype in dtypes)  # type: ignore[return-value]


overloads = {
    "default": Overload(reference, fake),
    "out": Overload(reference_out, fake_out),
    "drop_in": Overload(reference_drop_in, fake_drop_in),
}
