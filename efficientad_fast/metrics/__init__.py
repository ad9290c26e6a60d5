"""Figures of merit for anomaly detection: image AUROC, pixel AUROC and AU-PRO.

All are exact: every distinct score is a threshold, and ties are handled as ties. They need numpy alone.
"""

from __future__ import annotations

from efficientad_fast.metrics.aupro import au_pro, label_regions
from efficientad_fast.metrics.auroc import image_auroc, pixel_auroc, roc_curve

__all__ = ["au_pro", "image_auroc", "label_regions", "pixel_auroc", "roc_curve"]
