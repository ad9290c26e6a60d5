"""Plots of an evaluation, as SVG to stand inside an HTML page.

Colours of text and lines are CSS variables of the page (``--ink``, ``--muted``, ``--line``, ``--good`` and ``--kind-1``
to ``--kind-8``), so that a plot follows the page into dark mode and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efficientad_fast.data.folders import GOOD
from efficientad_fast.evaluation import Evaluation
from efficientad_fast.files import printable
from efficientad_fast.metrics import roc_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_COLOURS = 8
"""Colours for kinds of defects; with more kinds they repeat."""

# matplotlib wants colours of its own: these stand for the page's variables until the SVG is written.
_STAND_INS = {
    "--ink": "#010101",
    "--muted": "#020202",
    "--line": "#030303",
    "--good": "#040404",
    **{f"--kind-{number}": f"#05050{number}" for number in range(1, KIND_COLOURS + 1)},
}

_WIDTH = 4.9
_BINS = 48
_WIDE_SPREAD = 20.0
"""Scores that reach this many times the median of the first kind get a logarithmic axis."""


def kind_colour(index: int) -> str:
    """CSS variable of the ``index``-th kind of defect, from 0."""
    return f"--kind-{index % KIND_COLOURS + 1}"


def score_histogram(evaluation: Evaluation) -> str:
    """One small histogram of scores for each kind, good images on top, on one axis with the threshold across.

    Each is scaled to its own highest bar: the shapes are compared, not the counts. The axis is logarithmic where all
    scores are positive and the highest is far above those of good images.

    Returns:
        An ``<svg>`` element, or an empty string where no image has a finite score.
    """
    rows = [(GOOD, "--good", _scores(evaluation, GOOD))]
    rows += [(kind, kind_colour(index), _scores(evaluation, kind)) for index, kind in enumerate(evaluation.kinds)]
    rows = [row for row in rows if row[2].size]
    everything = np.concatenate([scores[np.isfinite(scores)] for _, _, scores in rows]) if rows else np.empty(0)
    if everything.size == 0:
        return ""
    threshold = evaluation.threshold
    marks = np.append(everything, threshold) if np.isfinite(threshold) else everything
    low, high = float(marks.min()), float(marks.max())
    logarithmic = low > 0 and high > _WIDE_SPREAD * float(np.median(rows[0][2]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)

    from matplotlib.ticker import LogLocator, NullLocator

    with _figure("histogram", 0.8 + 0.46 * len(rows)) as (figure, svg):
        axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"hspace": 0.25})[:, 0]
        for axis, (name, colour, scores) in zip(axes, rows, strict=True):
            counts = np.histogram(np.clip(scores, low, high), edges)[0]
            axis.bar(
                edges[:-1],
                counts / counts.max(),
                width=np.diff(edges),
                align="edge",
                color=_STAND_INS[colour],
                linewidth=0,
            )
            if np.isfinite(threshold):
                axis.axvline(threshold, color=_STAND_INS["--ink"], linewidth=1.1, linestyle=(0, (3, 2)))
            axis.set_ylim(0, 1.08)
            axis.set_yticks([])
            axis.set_ylabel(
                f"{_shortened(name)}\n{scores.size}", rotation=0, ha="right", va="center", color=_STAND_INS["--ink"]
            )
            axis.tick_params(axis="x", length=0)
            _quiet(axis)
        bottom = axes[-1]
        if logarithmic:
            bottom.set_xscale("log")
            bottom.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bottom.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            bottom.xaxis.set_minor_locator(NullLocator())
        bottom.set_xlim(low, high)
        bottom.tick_params(axis="x", length=3)
        bottom.set_xlabel("image score" + (" (logarithmic)" if logarithmic else ""))
        if np.isfinite(threshold):
            place = axes[0].transLimits.transform((axes[0].transScale.transform((threshold, 0))[0], 0))[0]
            axes[0].annotate(
                f"threshold {threshold:.4g}",
                (threshold, 1.08),
                xycoords=("data", "data"),
                xytext=(4 if place < 0.5 else -4, 3),
                textcoords="offset points",
                ha="left" if place < 0.5 else "right",
                color=_STAND_INS["--ink"],
                annotation_clip=False,
            )
    return svg[0]


def roc_plot(evaluation: Evaluation) -> str:
    """ROC curve of all defects, a thin one for each kind, and the point that the threshold chooses.

    Returns:
        An ``<svg>`` element, or an empty string where good or anomalous images are missing.
    """
    if evaluation.auroc is None:
        return ""
    good = _scores(evaluation, GOOD)
    with _figure("roc", 3.5) as (figure, svg):
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=_STAND_INS["--line"], linewidth=1)
        everything = []
        for index, (kind, result) in enumerate(evaluation.kinds.items()):
            scores = _scores(evaluation, kind)
            everything.append(scores)
            if result.auroc is not None and len(evaluation.kinds) > 1:
                _curve(
                    axis, good, scores, _STAND_INS[kind_colour(index)], f"{_shortened(kind)}  {result.auroc:.3f}", 1.2
                )
        label = f"all defects  {evaluation.auroc:.3f}"
        _curve(axis, good, np.concatenate(everything), _STAND_INS["--ink"], label, 2.2)
        false_alarms, recall = evaluation.confusion.false_positive_rate, evaluation.confusion.recall
        if false_alarms is not None and recall is not None:
            axis.plot(
                [false_alarms],
                [recall],
                "o",
                color=_STAND_INS["--ink"],
                markersize=8,
                label="threshold",
                clip_on=False,
                zorder=4,
            )
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.005)
        axis.set_xlabel("share of good images flagged")
        axis.set_ylabel("share of defects found")
        axis.grid(color=_STAND_INS["--line"], linewidth=0.6)
        axis.legend(loc="lower right", frameon=False, labelcolor=_STAND_INS["--ink"], handlelength=1.4)
        _quiet(axis)
    return svg[0]


def _curve(
    axis: Axes, good: NDArray[np.float64], anomalous: NDArray[np.float64], colour: str, label: str, width: float
) -> None:
    labels = np.repeat([False, True], [good.size, anomalous.size])
    fpr, tpr, _ = roc_curve(np.concatenate([good, anomalous]), labels)
    axis.plot(fpr, tpr, color=colour, label=label, linewidth=width, solid_joinstyle="round", clip_on=False, zorder=3)


def _scores(evaluation: Evaluation, kind: str) -> NDArray[np.float64]:
    chosen = (image.score for image in evaluation.images if image.error is None and image.defect == kind)
    return np.fromiter(chosen, dtype=np.float64)


def _shortened(name: str, length: int = 22) -> str:
    # A dollar sign would begin a formula, and what is no character cannot be drawn.
    name = printable(name)
    name = name if len(name) <= length else f"{name[: length - 1]}…"
    return name.replace("$", r"\$")


def _quiet(axis: Axes) -> None:
    for side in ("left", "top", "right"):
        axis.spines[side].set_visible(False)


@contextmanager
def _figure(name: str, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw in, and a list that holds its SVG afterwards."""
    # Imported here: it takes half a second, which whoever wants an overlay should not wait for.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    muted, line = _STAND_INS["--muted"], _STAND_INS["--line"]
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 8.5,
        "text.color": muted,
        "axes.labelcolor": muted,
        "axes.edgecolor": line,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    written: list[str] = []
    with rc_context(settings):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, written
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    written.append(_for_page(buffer.getvalue()))


def _for_page(svg: str) -> str:
    """The ``<svg>`` element of a matplotlib file, in the page's colours and font, sized by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Names that nothing refers to would occur twice on a page with two plots.
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|legend|matplotlib|xtick|ytick)[\w.]*"', "", svg)
    for variable, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1; font-family: inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
