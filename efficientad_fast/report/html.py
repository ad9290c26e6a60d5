"""The HTML report: one file that opens anywhere, with nothing to fetch and nothing to run."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from efficientad_fast.data.folders import GOOD, load_mask
from efficientad_fast.errors import ImageError, InputError
from efficientad_fast.evaluation import Evaluation, ImageResult, KindResult
from efficientad_fast.files import atomic_path
from efficientad_fast.report.overlays import colour_range, displayable, overlay
from efficientad_fast.report.plots import kind_colour, roc_plot, score_histogram

MAX_MISTAKES = 1000
"""Misses and false alarms beyond this many are counted and not shown; the worst are."""

_LARGEST_SIDE, _SMALLEST_SIDE = 256, 96
_PIXEL_BUDGET = 16_000_000
"""Thumbnail pixels of a whole report, 3 to 8 MB as JPEG in base64; with many rows thumbnails shrink to keep to it."""

_JPEG_QUALITY = 82

_ABSENT = "\N{EN DASH}"
"""Shown for a figure that does not exist."""


@dataclass(frozen=True)
class _Card:
    """One image of the report, ready for the template."""

    name: str
    kind: str
    colour: str
    score: str
    ratio: str
    bar: float  # percent of the colour range
    verdict: str
    picture: str  # data URIs; empty where there is none
    heat: str
    mask: str
    extent: str
    note: str


def write_report(
    evaluation: Evaluation,
    out: str | os.PathLike[str],
    *,
    detector_summary: Mapping[str, object],
    max_per_kind: int = 8,
) -> Path:
    """Write an evaluation as one self-contained HTML file, atomically.

    It shows the figures, the distribution of scores, the ROC curve, every miss and false alarm (the worst first, up
    to :data:`MAX_MISTAKES`) and some correct decisions of each kind, evenly spaced by score, each as the image, its
    map on one colour scale for the whole report (:func:`~efficientad_fast.report.overlays.colour_range`), and its
    ground truth.

    Args:
        evaluation: what to show. Its images and masks are read again, and must still be where they were: one that
            is gone is shown without its picture.
        out: the file to write; its folder is created where it is missing.
        detector_summary: facts about the detector, shown as they are in this order; mappings inside it are indented.
        max_per_kind: correctly judged images shown of each kind.

    Returns:
        The path of the file.

    Raises:
        InputError: ``out`` is a folder, or ``max_per_kind`` is negative.
    """
    target = Path(out)
    if target.is_dir():
        raise InputError(
            f"{target} is a folder, expected the name of a file to write, such as {target / 'report.html'}."
        )
    if max_per_kind < 0:
        raise InputError(f"max_per_kind must be 0 or more, got {max_per_kind}.")
    page = _render(evaluation, detector_summary, max_per_kind)
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return target


def _render(evaluation: Evaluation, detector_summary: Mapping[str, object], max_per_kind: int) -> str:
    # Imported here, for whoever wants an overlay and no page.
    from jinja2 import Environment, StrictUndefined

    misses = sorted(_with_verdict(evaluation, "missed"), key=lambda image: image.score)
    false_alarms = sorted(_with_verdict(evaluation, "false alarm"), key=lambda image: -image.score)
    shown_misses, shown_alarms = _share(misses, false_alarms, MAX_MISTAKES)
    examples = {}
    for kind in (GOOD, *evaluation.kinds):
        correct = sorted(
            (image for image in _with_verdict(evaluation, "correct") if image.defect == kind),
            key=lambda image: -image.score,
        )
        if correct:
            examples[kind] = (_evenly(correct, max_per_kind), len(correct))

    rows = len(shown_misses) + len(shown_alarms) + sum(len(chosen) for chosen, _ in examples.values())
    side = int(math.sqrt(_PIXEL_BUDGET / (2 * max(rows, 1))))
    side = min(max(side, _SMALLEST_SIDE), _LARGEST_SIDE)
    scores = np.array([image.score for image in evaluation.images], dtype=np.float64)
    colours = colour_range(scores, evaluation.threshold)

    def cards(images: Iterable[ImageResult]) -> list[_Card]:
        return [_card(evaluation, image, colours, side) for image in images]

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["percent"] = _percent
    source = resources.files("efficientad_fast.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        evaluation=evaluation,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        facts=_facts(detector_summary),
        rows=_kind_rows(evaluation),
        groups=list(evaluation.groups.items()),
        histogram=score_histogram(evaluation),
        roc=roc_plot(evaluation),
        mistakes=[
            ("Missed defects", "missed", cards(shown_misses), len(misses)),
            ("False alarms", "alarm", cards(shown_alarms), len(false_alarms)),
        ],
        examples=[(kind, cards(chosen), total) for kind, (chosen, total) in examples.items()],
        failed=[(evaluation.relative_path(image), image.error) for image in evaluation.failed],
        legend=_legend(*colours),
        vmin=colours[0],
        vmax=colours[1],
        threshold_at=_position(evaluation.threshold, colours),
    )


def _with_verdict(evaluation: Evaluation, verdict: str) -> list[ImageResult]:
    return [image for image in evaluation.images if image.verdict == verdict]


def _share(
    first: Sequence[ImageResult], second: Sequence[ImageResult], limit: int
) -> tuple[Sequence[ImageResult], Sequence[ImageResult]]:
    """The beginnings of two lists, ``limit`` in all; where one is short, the other gets its room."""
    room = max(limit // 2, limit - len(second))
    first = first[:room]
    return first, second[: limit - len(first)]


def _evenly(images: Sequence[ImageResult], count: int) -> list[ImageResult]:
    """``count`` of the images at even distances, the first and the last among them."""
    if len(images) <= count:
        return list(images)
    return [images[round(place)] for place in np.linspace(0, len(images) - 1, count)]


def _card(evaluation: Evaluation, image: ImageResult, colours: tuple[float, float], side: int) -> _Card:
    picture = heat = mask = extent = note = ""
    try:
        pixels = displayable(evaluation.preprocessing.decode(image.path).numpy())
    except ImageError as error:
        note = f"The image can no longer be read: {error}"
    else:
        small = _thumbnail(Image.fromarray(pixels), side)
        picture = _data_uri(small, "JPEG")
        if image.anomaly_map is not None:
            heat = _data_uri(Image.fromarray(overlay(np.asarray(small), image.anomaly_map, *colours)), "JPEG")
        if image.masks:
            try:
                truth = load_mask(image.masks, (pixels.shape[0], pixels.shape[1]))
            except ImageError as error:
                note = f"The mask can no longer be read: {error}"
            else:
                extent = f", {100 * truth.mean():.2g} %"
                mask = _data_uri(_thumbnail(Image.fromarray(truth.astype(np.uint8) * 255), side), "PNG")
    colour = kind_colour(list(evaluation.kinds).index(image.defect)) if image.anomalous else "--good"
    threshold = evaluation.threshold
    comparable = math.isfinite(threshold) and threshold > 0
    return _Card(
        name=evaluation.relative_path(image),
        kind=image.defect,
        colour=colour,
        score=_number(image.score),
        ratio=f"{image.score / threshold:.2f} x threshold" if comparable else "",
        bar=_position(image.score, colours) or 0.0,
        verdict=image.verdict,
        picture=picture,
        heat=heat,
        mask=mask,
        extent=extent,
        note=note,
    )


def _thumbnail(picture: Image.Image, side: int) -> Image.Image:
    """Shrunk to ``side`` pixels on its longer side; smaller ones are left as they are."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def _data_uri(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    if kind == "JPEG":
        picture.save(buffer, kind, quality=_JPEG_QUALITY, optimize=True)
    else:
        picture.save(buffer, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _legend(vmin: float, vmax: float) -> str:
    """The colour scale as it looks over middle grey."""
    ramp = np.linspace(vmin, vmax, 256)[np.newaxis]
    return _data_uri(Image.fromarray(overlay(np.full((1, 256, 3), 128, dtype=np.uint8), ramp, vmin, vmax)), "PNG")


def _position(value: float, colours: tuple[float, float]) -> float | None:
    """Place on the colour scale in percent, held inside it; ``None`` for NaN."""
    if math.isnan(value):
        return None
    share = (value - colours[0]) / (colours[1] - colours[0])
    return 100.0 * min(max(share, 0.0), 1.0)


def _facts(summary: Mapping[str, object], depth: int = 0) -> list[tuple[int, str, str]]:
    """Mappings as (depth, name, text) lines; a mapping inside is a heading and its own lines."""
    lines = []
    for name, value in summary.items():
        if isinstance(value, Mapping):
            lines.append((depth, str(name), ""))
            lines += _facts(value, depth + 1)
        elif isinstance(value, (list, tuple)):
            lines.append((depth, str(name), ", ".join(str(item) for item in value)))
        else:
            lines.append((depth, str(name), str(value)))
    return lines


def _kind_rows(evaluation: Evaluation) -> list[tuple[str, str, KindResult]]:
    """(name, colour, result) for each kind, the good images first."""
    kinds = [(kind, kind_colour(index), result) for index, (kind, result) in enumerate(evaluation.kinds.items())]
    return [(GOOD, "--good", evaluation.good), *kinds]


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{100 * value:.1f} %"
