"""What a person looks at: the HTML report of an evaluation, and anomaly maps laid over their images."""

from __future__ import annotations

from efficientad_fast.report.html import write_report
from efficientad_fast.report.overlays import overlay, save_overlay
from efficientad_fast.report.overview import save_overview

__all__ = ["overlay", "save_overlay", "save_overview", "write_report"]
