"""One picture that shows what a detector finds: an image of each kind of defect, its anomaly map, and the truth."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from efficientad_fast.data.folders import load_mask
from efficientad_fast.evaluation import Evaluation
from efficientad_fast.files import atomic_path
from efficientad_fast.report.overlays import colour_range, displayable, overlay

_GAP = 6


def save_overview(evaluation: Evaluation, path: str | os.PathLike[str], *, side: int = 192) -> Path:
    """Write a grid with a column for each kind, good images first; rows are image, overlay and ground truth.

    Each kind is shown by the image whose score is the kind's median. Kinds without a scored image are left out.

    Args:
        path: the file; its suffix chooses the format.
        side: pixels of each cell, to which images are resized.

    Returns:
        The path.
    """
    colours = colour_range(np.array([image.score for image in evaluation.images]), evaluation.threshold)
    columns = []
    for kind in ("good", *evaluation.kinds):
        scored = sorted(
            (image for image in evaluation.images if image.defect == kind and image.anomaly_map is not None),
            key=lambda image: image.score,
        )
        if not scored:
            continue
        shown = scored[len(scored) // 2]
        pixels = displayable(evaluation.preprocessing.decode(shown.path).numpy())
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
        assert shown.anomaly_map is not None
        heat = overlay(np.asarray(image), shown.anomaly_map, *colours)
        truth = load_mask(shown.masks, (side, side)) if shown.masks else np.zeros((side, side), bool)
        mask = np.repeat(truth[..., np.newaxis], 3, axis=2).astype(np.uint8) * 255
        gap = np.full((_GAP, side, 3), 255, np.uint8)
        columns.append(np.concatenate([np.asarray(image), gap, heat, gap, mask]))
    gap = np.full((columns[0].shape[0], _GAP, 3), 255, np.uint8)
    grid = np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=1)
    with atomic_path(path) as temporary:
        Image.fromarray(grid).save(temporary)
    return Path(path)
