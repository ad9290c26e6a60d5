"""A detector with few channels and random weights: everything but the channel counts is as in a real one."""

from __future__ import annotations

from typing import Any

import torch

from efficientad_fast import Detector
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.reference.networks import Autoencoder, PatchDescriptionNetwork

CHANNELS = 8


def small_detector(*, seed: int = 0, padding: bool = False, **fields: Any) -> Detector:
    """PDN-S with 8 output channels; quantiles and statistics drawn at random. ``fields`` go to :class:`Detector`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = PatchDescriptionNetwork("s", CHANNELS, padding=padding)
        student = PatchDescriptionNetwork("s", 2 * CHANNELS, padding=padding)
        autoencoder = Autoencoder(CHANNELS, padding=padding)
        mean, std = torch.randn(CHANNELS) * 0.1, torch.rand(CHANNELS) + 0.5
    fields.setdefault("quantiles", Quantiles(0.1, 0.3, 0.05, 0.15))
    fields.setdefault("threshold", 0.25)
    return Detector(teacher, student, autoencoder, mean, std, **fields)
