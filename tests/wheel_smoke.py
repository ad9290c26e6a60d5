"""Uses an installed wheel as a stranger would: run with that environment's Python, outside the checkout.

Not collected by pytest. Needs the package and nothing else.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

import efficientad_fast
from efficientad_fast import native, ops, triton_kernels


def check_installed() -> None:
    package = Path(efficientad_fast.__file__).resolve().parent
    assert "site-packages" in package.parts, f"not the installed package but {package}"
    assert Path(triton_kernels.__file__).parent == package / "triton_kernels"


def check_operators() -> None:
    """The CPU library loads under this PyTorch and gives right values."""
    assert native.is_built("cpu"), native.why_not_built("cpu")
    assert native.extension().build_info()["version"] == efficientad_fast.__version__
    ops.load()
    x = torch.randn(3, 5, 7).transpose(0, 2)
    for operator in (torch.ops.efficientad_fast.identity, torch.ops.efficientad_fast_cpu.identity):
        y = operator(x)
        assert torch.equal(y, x)
        assert y.is_contiguous()


def check_prediction() -> None:
    """A detector of random weights predicts, before and after a round through its file."""
    from efficientad_fast import Detector
    from efficientad_fast.reference.networks import FEATURE_CHANNELS, Autoencoder, PatchDescriptionNetwork

    torch.manual_seed(0)
    detector = Detector(
        teacher=PatchDescriptionNetwork("s"),
        student=PatchDescriptionNetwork("s", 2 * FEATURE_CHANNELS),
        autoencoder=Autoencoder(),
        teacher_mean=torch.zeros(FEATURE_CHANNELS),
        teacher_std=torch.ones(FEATURE_CHANNELS),
    )
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    prediction = detector.predict(image)
    assert prediction.error is None, prediction.error
    assert math.isfinite(prediction.score)
    assert prediction.anomaly_map is not None
    assert prediction.anomaly_map.shape == detector.size
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "detector.safetensors"
        detector.save(file)
        again = Detector.load(file).predict(image)
    assert again.score == prediction.score


if __name__ == "__main__":
    check_installed()
    check_operators()
    check_prediction()
    print(f"the wheel predicts under PyTorch {torch.__version__}")
