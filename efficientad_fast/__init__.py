"""EfficientAD as fast as the hardware allows: visual anomaly detection from good images alone.

``Detector.load(path).predict(images)`` uses a trained detector, ``predict`` is a drop-in for the function of that
name in plain PyTorch implementations, ``accelerate`` lets a model of anomalib predict by this package's plans, and the
command ``efficientad-fast`` trains, evaluates and predicts.
"""

from efficientad_fast.detector import Detector, Prediction
from efficientad_fast.dropin import predict
from efficientad_fast.errors import EfficientADError
from efficientad_fast.interop.accelerate import accelerate
from efficientad_fast.preprocessing import Preprocessing
from efficientad_fast.reference.maps import Quantiles
from efficientad_fast.version import __version__

__all__ = [
    "Detector",
    "EfficientADError",
    "Prediction",
    "Preprocessing",
    "Quantiles",
    "__version__",
    "accelerate",
    "predict",
]
