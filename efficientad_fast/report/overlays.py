"""Anomaly maps laid over the images they belong to."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from efficientad_fast.errors import InputError
from efficientad_fast.files import atomic_path

ALPHA = 0.75
"""Opacity of the hottest colour."""

# From dim to hot, growing lighter all the way: it reads without colour vision and in greyscale print too.
_COLOURS = np.array(
    [(52, 22, 148), (128, 14, 165), (190, 44, 134), (231, 96, 92), (250, 158, 59), (252, 224, 72)], dtype=np.float32
)

# Below this share of the range a pixel fades out, so that where nothing is wrong the image itself is seen.
_FADE = 0.5


def overlay(
    image: NDArray[np.uint8], anomaly_map: NDArray[np.floating], vmin: float, vmax: float, alpha: float = ALPHA
) -> NDArray[np.uint8]:
    """Lay an anomaly map over its image.

    The map is resized bilinearly to the image. Values at or below ``vmin`` leave the image as it is; from there the
    colour runs from indigo to yellow at ``vmax`` and above, and its opacity rises to ``alpha`` over the first half of
    the range.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        anomaly_map: ``(h, w)`` real numbers. NaN is shown as ``vmax``: where the map is not a number, look.
        vmin: value where colour begins.
        vmax: value of the hottest colour, above ``vmin``.
        alpha: opacity of the hottest colour, in [0, 1].

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        InputError: a shape, a dtype or a range is off.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}.")
    if anomaly_map.ndim != 2 or anomaly_map.size == 0:
        raise InputError(f"anomaly_map must be (h, w), got shape {anomaly_map.shape}.")
    if not (math.isfinite(vmin) and math.isfinite(vmax) and vmin < vmax):
        raise InputError(f"vmin and vmax must be finite and vmin below vmax, got {vmin} and {vmax}.")
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}.")
    # Scaled and clipped first: interpolating between an infinity and its neighbour would give NaN.
    heat = np.clip((anomaly_map.astype(np.float64) - vmin) / (vmax - vmin), 0.0, 1.0)
    heat = np.nan_to_num(heat, nan=1.0).astype(np.float32)
    height, width = image.shape[:2]
    if heat.shape != (height, width):
        heat = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR))
    stops = np.linspace(0.0, 1.0, len(_COLOURS))
    colour = np.stack([np.interp(heat, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    fade = np.minimum(heat / _FADE, 1.0)
    opacity = (alpha * fade * fade * (3.0 - 2.0 * fade))[..., np.newaxis]
    return np.rint(image * (1.0 - opacity) + colour * opacity).astype(np.uint8)


def save_overlay(
    path: str | os.PathLike[str],
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.floating],
    vmin: float,
    vmax: float,
    alpha: float = ALPHA,
) -> Path:
    """Write an :func:`overlay` to an image file, atomically; the suffix chooses the format.

    Args:
        path: the file; its folder is created where it is missing.
        image, anomaly_map, vmin, vmax, alpha: as for :func:`overlay`.

    Returns:
        The path.

    Raises:
        InputError: as :func:`overlay`, or the suffix is not one of an image format that Pillow writes.
    """
    target = Path(path)
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{target} must end in the suffix of an image format, such as .png or .jpg.")
    picture = Image.fromarray(overlay(image, anomaly_map, vmin, vmax, alpha))
    with atomic_path(target) as temporary:
        picture.save(temporary)
    return target


def displayable(image: NDArray[Any]) -> NDArray[np.uint8]:
    """``(3, H, W)`` uint8, or float in [0, 1], to ``(H, W, 3)`` uint8."""
    pixels = image.transpose(1, 2, 0)
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def colour_range(scores: NDArray[np.floating], threshold: float) -> tuple[float, float]:
    """Range of values for :func:`overlay` that suits a set of images, so that all of them share one scale.

    The range begins at 0, which quantile normalisation gives to the 0.9 quantile of normal pixels, and ends at the
    median score of the images above the threshold, held between 1.5 and 3 times the threshold: the threshold then
    lies in the middle third of the range, and neither a weak nor a strong defect is lost. Where the threshold is not
    a positive number, the range is that of the scores, from 0 where they are all positive.

    Args:
        scores: ``(N,)`` image scores; those that are not finite are ignored.
        threshold: the detector's.

    Returns:
        ``(vmin, vmax)``, finite, ``vmin < vmax``.
    """
    finite = scores[np.isfinite(scores)]
    if math.isfinite(threshold) and threshold > 0:
        above = finite[finite > threshold]
        middle = float(np.median(above)) if above.size else 0.0
        return 0.0, min(max(middle, 1.5 * threshold), 3.0 * threshold)
    low = min(0.0, float(finite.min(initial=0.0)))
    high = float(finite.max(initial=low))
    return low, high if high > low else low + 1.0
