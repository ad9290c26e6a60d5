"""A sample set to try the package on: rendered parts in the layout of MVTec AD, with defects and their masks.

The part is a brushed metal plate with screws, holes, a connector, a relay, a label, three fuses and a capacitor,
lying on a conveyor belt. From image to image its pose, the light, the grain of the metal, the turn of the screws and
the printed number change, as they do on a production line, so that no fixed picture tells good from bad.

Lengths are in units of the image width with the origin in the middle of the part, x to the right and y down, so that
a set looks the same at any size. The part is drawn on a canvas of twice the image's resolution as a surface: colour,
height, gloss and coverage. Light falls on that surface, the result is turned into its pose, and a camera records it.
A defect changes the arrangement of the parts before they are drawn (logical) or the finished surface (structural).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from efficientad_fast.errors import DatasetError, InputError
from efficientad_fast.files import atomic_path

Floats = NDArray[np.float32]
Rng = np.random.Generator
Shape = Callable[[Floats, Floats], Floats]
Point = tuple[float, float]
Colour = tuple[float, float, float]

DESCRIPTION_FILE = "sample_set.json"
# Changes with every change of the images, so that an older set is not taken for the current one.
GENERATOR_VERSION = 1

_OVERSAMPLING = 2
_PLATE_HALF = (0.36, 0.28)
_CANVAS_HALF = (0.38, 0.30)
_SCREW_PLACES: tuple[Point, ...] = ((-0.315, -0.235), (0.315, -0.235), (-0.315, 0.235), (0.315, 0.235))
_HOLE_PLACES: tuple[Point, ...] = ((-0.165, 0.215), (-0.055, 0.215), (0.055, 0.215), (0.165, 0.215))
_FUSE_PLACES: tuple[Point, ...] = ((0.140, -0.085), (0.208, -0.085), (0.276, -0.085))
_FUSE_HALF = (0.025, 0.072)
_FUSE_COLOURS: tuple[Colour, ...] = ((0.86, 0.66, 0.10), (0.78, 0.16, 0.13), (0.16, 0.36, 0.74))
_WASHER_RADIUS = 0.037
_HOLE_RADIUS = 0.021
_DIGITS = ("757575757", "", "")
