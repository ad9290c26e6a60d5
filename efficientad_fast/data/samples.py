"""A sample set to try the package on: rendered parts in the layout of MVTec AD, with defects and their masks.

The part is a brushed metal plate with screws, holes, a connector, a relay, a label, three fuses and a capacitor,
lying on a conveyor belt. From image to image its pose, the light, the grain of the metal, the turn of the
screws and the printed number change, as they do on a production line: no fixed picture tells good from bad.

Lengths are in units of the image width with the origin in the middle of the part, x to the right and y down, so
that a set looks the same at any size. The part is drawn on a canvas of twice the image's resolution as a
surface: colour, height, gloss and coverage. Light falls on that surface, the result is turned into its pose, and
a camera records it. A logical defect changes the parts before they are drawn, a structural one the finished
surface.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

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
# Goes up with every change of the images, so that an older set is not taken for a current one.
GENERATOR_VERSION = 1

_OVERSAMPLING = 2
_PLATE_HALF = (0.36, 0.28)
_CANVAS_HALF = (0.375, 0.295)
_SCREW_PLACES: tuple[Point, ...] = ((-0.315, -0.235), (0.315, -0.235), (-0.315, 0.235), (0.315, 0.235))
_HOLE_PLACES: tuple[Point, ...] = ((-0.165, 0.215), (-0.055, 0.215), (0.055, 0.215), (0.165, 0.215))
_FUSE_PLACES: tuple[Point, ...] = ((0.140, -0.085), (0.208, -0.085), (0.276, -0.085))
_FUSE_HALF = (0.025, 0.072)
_FUSE_COLOURS: tuple[Colour, ...] = ((0.88, 0.68, 0.10), (0.78, 0.15, 0.12), (0.14, 0.36, 0.78))
_WASHER_RADIUS = 0.037
_HOLE_RADIUS = 0.020
# Digits of three by five cells; each character is a row in binary.
_BATCH = (4, 1, 7, 3)
_BAR_CODE = 0b1101001100101101110010011010110011
_DIGITS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71222", "75757", "75717")


# Shapes: signed distance to the outline, negative inside.


def _disc(radius: float) -> Shape:
    return lambda u, v: np.hypot(u, v) - np.float32(radius)


def _box(half_width: float, half_height: float, corner: float = 0.0) -> Shape:
    def distance(u: Floats, v: Floats) -> Floats:
        beyond_u = np.abs(u) - np.float32(half_width - corner)
        beyond_v = np.abs(v) - np.float32(half_height - corner)
        outside = np.hypot(np.maximum(beyond_u, 0), np.maximum(beyond_v, 0))
        inside = np.minimum(np.maximum(beyond_u, beyond_v), 0)
        signed: Floats = outside + inside - np.float32(corner)
        return signed

    return distance


@dataclass(frozen=True)
class _Window:
    """A rectangle of the canvas with coordinates about a centre, turned by the angle of what is drawn there."""

    area: tuple[slice, slice]
    u: Floats
    v: Floats
    shifted_u: Floats
    shifted_v: Floats


class _Surface:
    """What the camera will see of the part, before light: arrays (h, w) over the canvas, colour (h, w, 3)."""

    def __init__(self, size: int, shadow: Point) -> None:
        self.scale = float(_OVERSAMPLING * size)
        """Canvas pixels per unit."""
        self.shadow = shadow
        """Direction in which shadows fall, as long as a shadow of something one unit high."""
        width, height = (2 * round(half * self.scale) for half in _CANVAS_HALF)
        self.x: Floats = ((np.arange(width, dtype=np.float32) + 0.5) / self.scale - width / 2 / self.scale)[None, :]
        self.y: Floats = ((np.arange(height, dtype=np.float32) + 0.5) / self.scale - height / 2 / self.scale)[:, None]
        self.colour = np.zeros((height, width, 3), np.float32)
        self.height = np.zeros((height, width), np.float32)
        """In canvas pixels."""
        self.gloss = np.zeros((height, width), np.float32)
        self.shade = np.ones((height, width), np.float32)
        """Share of the light that shadows let through."""
        self.outline: Floats = self.inside(_box(*_PLATE_HALF, corner=0.03)(self.x, self.y))
        """The plate without holes and damage: what casts the shadow on the belt."""
        self.coverage = self.outline.copy()
        self.bare = np.ones((height, width), np.float32)
        """1 where the metal of the plate lies open."""

    def window(self, centre: Point, reach: float, angle: float = 0.0, rise: float = 0.0) -> _Window:
        """The part of the canvas within ``reach`` of ``centre``; ``rise`` is the height that casts a shadow."""
        columns = self._span(centre[0], reach, self.x.size)
        rows = self._span(centre[1], reach, self.y.size)
        x = self.x[:, columns] - np.float32(centre[0])
        y = self.y[rows] - np.float32(centre[1])
        cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        dx, dy = np.float32(rise * self.shadow[0]), np.float32(rise * self.shadow[1])
        return _Window(
            (rows, columns),
            x * cosine + y * sine,
            y * cosine - x * sine,
            (x - dx) * cosine + (y - dy) * sine,
            (y - dy) * cosine - (x - dx) * sine,
        )

    def _span(self, centre: float, reach: float, length: int) -> slice:
        middle = length / 2 + centre * self.scale
        return slice(
            max(0, math.floor(middle - reach * self.scale)),
            min(length, math.ceil(middle + reach * self.scale) + 1),
        )

    def inside(self, distance: Floats) -> Floats:
        """Share of each pixel that lies inside an outline, from the signed distance in units."""
        share: Floats = np.clip(np.float32(0.5) - distance * np.float32(self.scale), 0, 1)
        return share

    def lay(
        self,
        shape: Shape,
        centre: Point,
        reach: float,
        colour: Colour,
        *,
        angle: float = 0.0,
        base: float = 0.0,
        thickness: float = 0.0,
        bevel: float = 0.005,
        gloss: float = 0.1,
        casts: bool = True,
    ) -> None:
        """Put a solid of the given outline on the plate: its edge rises to ``thickness`` over ``bevel``."""
        top = base + thickness
        window = self.window(centre, reach + 0.5 * top, angle, top)
        area = window.area
        distance = shape(window.u, window.v)
        inside = self.inside(distance)
        if casts:
            softness = np.float32(1 / max(0.6 * top, 1 / self.scale))
            dark = np.clip(np.float32(0.5) - shape(window.shifted_u, window.shifted_v) * softness, 0, 1)
            self.shade[area] *= 1 - np.float32(0.5) * dark
        self.shade[area] += (1 - self.shade[area]) * inside
        inward = np.clip(-distance / np.float32(bevel), 0, 1)
        profile = np.float32(base * self.scale) + np.float32(thickness * self.scale) * inward * (2 - inward)
        self.height[area] += (profile - self.height[area]) * inside
        self.gloss[area] += (np.float32(gloss) - self.gloss[area]) * inside
        self.colour[area] += (np.asarray(colour, np.float32) - self.colour[area]) * inside[..., None]
        self.bare[area] *= 1 - inside

    def engrave(
        self, shape: Shape, centre: Point, reach: float, *, angle: float = 0.0, depth: float, dark: float
    ) -> None:
        """Sink an outline into what is there and darken it by the factor ``dark``."""
        window = self.window(centre, reach, angle)
        inside = self.inside(shape(window.u, window.v))
        self.height[window.area] -= np.float32(depth * self.scale) * inside
        self.colour[window.area] *= (1 - np.float32(1 - dark) * inside)[..., None]
        self.gloss[window.area] *= 1 - inside

    def pierce(self, centre: Point, radius: float) -> None:
        """Drill a hole with a countersunk rim."""
        window = self.window(centre, radius + 0.012)
        area = window.area
        distance = _disc(radius)(window.u, window.v)
        self.coverage[area] *= 1 - self.inside(distance)
        rim = np.clip(1 - distance / np.float32(0.008), 0, 1)
        self.height[area] -= np.float32(0.006 * self.scale) * rim
        self.bare[area] *= 1 - rim

    def print_cells(
        self, cells: NDArray[np.bool_], centre: Point, pitch: float, angle: float, ink: Colour, opacity: float
    ) -> None:
        """Print a bitmap whose cells are ``pitch`` wide, centred on ``centre``."""
        rows, columns = cells.shape
        window = self.window(centre, 0.75 * pitch * max(rows, columns), angle)
        column = np.floor(window.u / np.float32(pitch) + np.float32(columns / 2)).astype(np.int32)
        row = np.floor(window.v / np.float32(pitch) + np.float32(rows / 2)).astype(np.int32)
        within = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        inked = within & cells[np.clip(row, 0, rows - 1), np.clip(column, 0, columns - 1)]
        colour = self.colour[window.area]
        colour[inked] += (np.asarray(ink, np.float32) - colour[inked]) * np.float32(opacity)


# The part.


@dataclass
class _Arrangement:
    """What is mounted on one plate: everything a logical defect can change, and the play of a good one."""

    screws: list[bool]
    holes: list[bool]
    """Whether a screw sits in each of the holes that stay open on a good part."""
    fuses: list[int]
    screw_angles: list[float]
    offsets: NDArray[np.float64]
    """Small displacement (6, 2) of connector, relay, label, fuses, capacitor and plate print."""
    label_angle: float
    capacitor_angle: float
    serial: list[int]
    """The last two digits of the number on the label."""
    metal: float
    """Brightness of the plate's metal."""


def _good_arrangement(rng: Rng) -> _Arrangement:
    return _Arrangement(
        screws=[True] * len(_SCREW_PLACES),
        holes=[False] * len(_HOLE_PLACES),
        fuses=list(range(len(_FUSE_PLACES))),
        screw_angles=rng.uniform(0.3, 0.7, len(_SCREW_PLACES) + len(_HOLE_PLACES)).tolist(),
        offsets=rng.uniform(-0.003, 0.003, (6, 2)),
        label_angle=float(rng.uniform(-0.04, 0.04)),
        capacitor_angle=float(rng.uniform(-0.03, 0.03)),
        serial=rng.integers(0, 10, 2).tolist(),
        metal=float(rng.uniform(0.58, 0.62)),
    )


def _brushed(rng: Rng, height: int, width: int, length: int) -> Floats:
    """Streaks (height, width) along x of about ``length`` pixels, zero mean, unit variance."""
    white = rng.standard_normal((height, width + length), dtype=np.float32)
    summed = np.cumsum(white, axis=1, dtype=np.float64)
    streaks: Floats = ((summed[:, length:] - summed[:, :-length]) / math.sqrt(length)).astype(np.float32)
    return streaks


def _smooth_noise(rng: Rng, shape: tuple[int, ...], cells: int) -> Floats:
    """Noise of shape (height, width) with ``cells`` bumps across, about zero mean and unit variance."""
    height, width = shape
    rows = max(2, round(cells * height / width))
    coarse = Image.fromarray(rng.standard_normal((rows, cells), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)


def _digits(numbers: Sequence[int]) -> NDArray[np.bool_]:
    """The numbers as cells (5, 4 * n - 1)."""
    cells = np.zeros((5, 4 * len(numbers)), np.bool_)
    for position, number in enumerate(numbers):
        for row, code in enumerate(_DIGITS[number]):
            cells[row, 4 * position : 4 * position + 3] = [bool(int(code) & bit) for bit in (4, 2, 1)]
    return cells[:, :-1]


def _draw_plate(surface: _Surface, rng: Rng, metal: float) -> None:
    """Brushed metal with chamfered edges, a broad sheen and faint clouding."""
    height, width = surface.height.shape
    distance = _box(*_PLATE_HALF, corner=0.03)(surface.x, surface.y)
    chamfer = np.clip(-distance / np.float32(0.012), 0, 1)
    surface.height[:] = np.float32(0.010 * surface.scale) * (chamfer - 1)
    grain = np.float32(0.018) * _brushed(rng, height, width, max(2, round(0.16 * surface.scale)))
    grain += np.float32(0.010) * _brushed(rng, height, width, max(2, round(0.03 * surface.scale)))
    grain += np.float32(0.012) * _smooth_noise(rng, (height, width), 7)
    direction, place = rng.uniform(0, math.pi), rng.uniform(-0.3, 0.3)
    across = surface.x * np.float32(math.cos(direction)) + surface.y * np.float32(math.sin(direction))
    sheen = np.float32(rng.uniform(0.0, 0.06)) * np.exp(-(((across - np.float32(place)) / np.float32(0.16)) ** 2))
    brightness = np.float32(metal) + grain + sheen
    surface.colour[:] = brightness[..., None] * np.array((0.99, 1.0, 1.025), np.float32)
    surface.gloss[:] = 0.25


def _draw_screw(surface: _Surface, centre: Point, angle: float) -> None:
    """A cross-head screw on its washer."""
    surface.lay(_disc(_WASHER_RADIUS), centre, 0.05, (0.72, 0.72, 0.70), thickness=0.004, bevel=0.003, gloss=0.4)
    surface.lay(_disc(0.026), centre, 0.04, (0.50, 0.50, 0.51), base=0.004, thickness=0.009, bevel=0.018, gloss=0.5)
    for turn in (0.0, math.pi / 2):
        surface.engrave(_box(0.016, 0.0042), centre, 0.03, angle=angle + turn, depth=0.006, dark=0.35)


def _draw_connector(surface: _Surface, centre: Point) -> None:
    """A housing with two columns of five pins."""
    surface.lay(_box(0.056, 0.125, 0.008), centre, 0.15, (0.84, 0.83, 0.78), thickness=0.022, bevel=0.008, gloss=0.1)
    key = (centre[0] - 0.056, centre[1])
    surface.lay(_box(0.012, 0.035), key, 0.05, (0.80, 0.79, 0.74), thickness=0.016, bevel=0.006, casts=False)
    for row in range(5):
        for column in (-1, 1):
            pin = (centre[0] + 0.025 * column, centre[1] + 0.045 * (row - 2))
            surface.engrave(_box(0.0155, 0.0155, 0.003), pin, 0.025, depth=0.004, dark=0.22)
            surface.lay(
                _box(0.006, 0.006),
                pin,
                0.012,
                (0.85, 0.68, 0.30),
                base=0.010,
                thickness=0.006,
                gloss=0.5,
                casts=False,
            )


def _draw_relay(surface: _Surface, centre: Point) -> None:
    """A black block with a notch and printing."""
    surface.lay(_box(0.11, 0.082, 0.01), centre, 0.14, (0.13, 0.135, 0.15), thickness=0.03, bevel=0.012, gloss=0.25)
    surface.engrave(_disc(0.011), (centre[0] - 0.085, centre[1] - 0.055), 0.02, depth=0.004, dark=0.6)
    ink: Colour = (0.75, 0.75, 0.72)
    surface.print_cells(_digits([2, 4, 0, 5]), (centre[0] + 0.005, centre[1] - 0.03), 0.0072, 0.0, ink, 0.85)
    frame = np.ones((8, 22), np.bool_)
    frame[1:-1, 1:-1] = False
    frame[3:5, 5:9] = True
    frame[1:-1, 14] = True
    surface.print_cells(frame, (centre[0] + 0.005, centre[1] + 0.03), 0.0055, 0.0, ink, 0.7)


def _draw_label(surface: _Surface, centre: Point, arrangement: _Arrangement) -> None:
    """A white sticker with a bar code and a running number."""
    angle = arrangement.label_angle
    surface.lay(
        _box(0.115, 0.052, 0.006),
        centre,
        0.14,
        (0.90, 0.90, 0.87),
        angle=angle,
        thickness=0.0015,
        bevel=0.002,
        gloss=0.05,
    )
    cells = np.zeros((15, 34), np.bool_)
    cells[1:6, 1:24] = _digits([*_BATCH, *arrangement.serial])
    cells[1:6, 27:33] = True
    cells[2:5, 28:32] = False
    cells[8:14] = [bool(_BAR_CODE >> bit & 1) for bit in range(34)]
    surface.print_cells(cells, centre, 0.0058, angle, (0.22, 0.22, 0.24), 0.9)


def _draw_fuse(surface: _Surface, centre: Point, colour: Colour) -> None:
    """A blade fuse in its black holder."""
    half_width, half_height = _FUSE_HALF
    surface.lay(
        _box(half_width + 0.006, half_height + 0.006, 0.006),
        centre,
        0.11,
        (0.17, 0.17, 0.18),
        thickness=0.010,
    )
    surface.lay(
        _box(half_width, half_height, 0.010),
        centre,
        0.11,
        colour,
        base=0.010,
        thickness=0.018,
        bevel=0.014,
        gloss=0.35,
    )
    surface.engrave(_box(0.010, 0.026, 0.004), centre, 0.05, depth=0.003, dark=0.72)
    for end in (-1, 1):
        contact = (centre[0], centre[1] + end * 0.052)
        surface.lay(
            _disc(0.008),
            contact,
            0.015,
            (0.80, 0.80, 0.78),
            base=0.024,
            thickness=0.004,
            gloss=0.5,
            casts=False,
        )


def _draw_capacitor(surface: _Surface, centre: Point, angle: float) -> None:
    """A can seen from above: dark sleeve, bright top with a vent, a polarity mark."""
    surface.lay(_disc(0.062), centre, 0.08, (0.12, 0.20, 0.19), thickness=0.034, bevel=0.012, gloss=0.3)
    mark = (centre[0] + 0.054 * math.cos(angle), centre[1] + 0.054 * math.sin(angle))
    surface.lay(
        _box(0.006, 0.016),
        mark,
        0.03,
        (0.80, 0.82, 0.80),
        angle=angle,
        base=0.034,
        thickness=0.0005,
        casts=False,
    )
    surface.lay(_disc(0.046), centre, 0.06, (0.70, 0.71, 0.72), base=0.034, thickness=0.002, gloss=0.4, casts=False)
    for turn in (0.0, math.pi / 2):
        surface.engrave(_box(0.034, 0.0028), centre, 0.05, angle=angle + turn, depth=0.003, dark=0.55)


def _draw_part(surface: _Surface, rng: Rng, arrangement: _Arrangement) -> None:
    def place(x: float, y: float, item: int) -> Point:
        dx, dy = arrangement.offsets[item].tolist()
        return x + dx, y + dy

    _draw_plate(surface, rng, arrangement.metal)
    for centre, angle, present in zip(
        _SCREW_PLACES + _HOLE_PLACES,
        arrangement.screw_angles,
        arrangement.screws + arrangement.holes,
        strict=True,
    ):
        if present:
            _draw_screw(surface, centre, angle)
        else:
            surface.pierce(centre, _HOLE_RADIUS)
    _draw_connector(surface, place(-0.245, 0.0, 0))
    _draw_relay(surface, place(-0.045, -0.11, 1))
    _draw_label(surface, place(-0.04, 0.085, 2), arrangement)
    for fuse_place, fuse in zip(_FUSE_PLACES, arrangement.fuses, strict=True):
        _draw_fuse(surface, place(*fuse_place, 3), _FUSE_COLOURS[fuse])
    _draw_capacitor(surface, place(0.21, 0.095, 4), arrangement.capacitor_angle)


# Logical defects: every component is as it should be, the whole is not. Each changes the arrangement and returns the
# shapes and places that an inspector would mark.


@dataclass(frozen=True)
class _Mark:
    shape: Shape
    centre: Point
    reach: float


def _screw_mark(centre: Point) -> _Mark:
    return _Mark(_disc(_WASHER_RADIUS + 0.007), centre, 0.06)


def _missing_screw(arrangement: _Arrangement, rng: Rng) -> list[_Mark]:
    """One of the four corner screws was not put in: its hole is open, like the holes that should be."""
    place = int(rng.integers(len(_SCREW_PLACES)))
    arrangement.screws[place] = False
    return [_screw_mark(_SCREW_PLACES[place])]


def _extra_screw(arrangement: _Arrangement, rng: Rng) -> list[_Mark]:
    """A screw sits in one of the four holes that should stay open."""
    place = int(rng.integers(len(_HOLE_PLACES)))
    arrangement.holes[place] = True
    return [_screw_mark(_HOLE_PLACES[place])]


def _swapped_fuses(arrangement: _Arrangement, rng: Rng) -> list[_Mark]:
    """Two of the three fuses changed places."""
    first, second = rng.permutation(len(_FUSE_PLACES))[:2].tolist()
    fuses = arrangement.fuses
    fuses[first], fuses[second] = fuses[second], fuses[first]
    shape = _box(_FUSE_HALF[0] + 0.003, _FUSE_HALF[1] + 0.003)
    dx, dy = arrangement.offsets[3].tolist()
    return [_Mark(shape, (_FUSE_PLACES[i][0] + dx, _FUSE_PLACES[i][1] + dy), 0.11) for i in (first, second)]


# Structural defects: local damage unlike anything on a good part. Each changes the surface in place and returns the
# share (h, w) of every canvas pixel that it touched.


def _bare_place(surface: _Surface, rng: Rng, radius: float, tries: int) -> Point:
    """The one of ``tries`` random places on the plate where the metal lies most open."""
    best, openness = (0.0, 0.0), -1.0
    for _ in range(tries):
        centre = (
            float(rng.uniform(-_PLATE_HALF[0] + radius, _PLATE_HALF[0] - radius)),
            float(rng.uniform(-_PLATE_HALF[1] + radius, _PLATE_HALF[1] - radius)),
        )
        here = float(surface.bare[surface.window(centre, radius).area].mean())
        if here > openness:
            best, openness = centre, here
    return best


def _ragged_disc(rng: Rng, window: _Window, radius: float, raggedness: float, finest: int) -> Floats:
    """Signed distance, roughly, to a disc whose radius wavers by the share ``raggedness``."""
    angle = np.arctan2(window.v, window.u)
    waver = np.zeros_like(angle)
    for frequency in range(2, finest + 1):
        amplitude = raggedness * rng.normal() / math.sqrt(frequency)
        waver += np.float32(amplitude) * np.cos(frequency * angle + np.float32(rng.uniform(0, 2 * math.pi)))
    reach = np.float32(radius) * np.clip(1 + waver, np.float32(0.5), np.float32(1.5))
    distance: Floats = np.hypot(window.u, window.v) - reach
    return distance


def _scratch(surface: _Surface, rng: Rng) -> Floats:
    """One to three curved grooves with raised edges, bright on dark parts and dark on bright ones."""
    height, width = surface.height.shape
    canvas = Image.new("L", (4 * width, 4 * height), 0)
    draw = ImageDraw.Draw(canvas)
    start = np.array(_bare_place(surface, rng, 0.08, tries=3))
    # Along the grain of the metal a scratch would drown in it.
    direction = float(rng.uniform(0.5, math.pi - 0.5)) * float(rng.choice((-1.0, 1.0)))
    for stroke in range(int(rng.integers(1, 4))):
        length = float(rng.uniform(0.10, 0.30)) * (1.0 if stroke == 0 else 0.6)
        bend, thickness = float(rng.normal(0, 0.5)), float(rng.uniform(0.006, 0.011))
        steps = np.linspace(-0.5, 0.5, 24)
        angle = direction + float(rng.normal(0, 0.12)) + bend * steps
        points = start + np.cumsum(np.stack((np.cos(angle), np.sin(angle)), axis=1), axis=0) * length / 24
        points -= 0.5 * length * np.array((math.cos(direction), math.sin(direction)))
        points += np.array((width, height)) / (2 * surface.scale)
        pen = thickness * (1 - (2 * steps) ** 4)
        for (x0, y0), (x1, y1), w in zip(points[:-1].tolist(), points[1:].tolist(), pen.tolist(), strict=False):
            line = [4 * surface.scale * value for value in (x0, y0, x1, y1)]
            draw.line(line, fill=255, width=max(2, round(4 * surface.scale * w)))
        start = start + rng.normal(0, 0.03, 2)
    present = (surface.coverage > 0).astype(np.float32)
    groove = np.asarray(canvas.reduce(4), np.float32) / np.float32(255) * present
    # The metal pushed out of the groove stands on one side of it and catches the light.
    step = max(1, round(0.004 * surface.scale))
    burr = np.zeros_like(groove)
    burr[step:, step:] = groove[:-step, :-step]
    burr = np.maximum(burr * present - groove, 0)
    surface.height -= np.float32(rng.uniform(0.003, 0.005) * surface.scale) * groove
    luminance = surface.colour.mean(axis=2)
    strength = np.float32(rng.uniform(0.7, 0.95))
    target = np.where(luminance > np.float32(0.4), np.float32(0.20), np.float32(0.80))
    surface.colour += (strength * groove * (target - luminance))[..., None]
    surface.colour += (np.float32(0.3) * strength * burr)[..., None]
    surface.gloss *= 1 - groove
    touched: Floats = np.maximum(groove, burr)
    return touched


def _dent(surface: _Surface, rng: Rng) -> Floats:
    """A blow on the open metal: a bowl with a raised rim, its bottom scuffed dull."""
    radius = float(rng.uniform(0.045, 0.070))
    centre = _bare_place(surface, rng, radius, tries=24)
    window = surface.window(centre, 2.0 * radius)
    area = window.area
    from_edge = _ragged_disc(rng, window, radius, 0.06, 4) / np.float32(radius)
    metal = surface.bare[area] * (surface.coverage[area] > 0)
    bowl = np.clip(-from_edge, 0, 1)
    rim = np.exp(-((from_edge / np.float32(0.18)) ** 2)) * (np.abs(from_edge) < 0.5)
    depth = np.float32(radius * rng.uniform(0.55, 0.85) * surface.scale)
    surface.height[area] += depth * (np.float32(0.16) * rim - bowl * (2 - bowl)) * metal
    touched = np.clip((np.float32(0.4) - from_edge) * 8, 0, 1) * metal
    scuff = rng.standard_normal(bowl.shape, dtype=np.float32)
    dull = np.clip(bowl * 3, 0, 1) * metal
    surface.colour[area] *= (1 - dull * (np.float32(0.15) - np.float32(0.12) * scuff))[..., None]
    mask = np.zeros_like(surface.height)
    mask[area] = touched
    return mask


_STAINS: tuple[Colour, ...] = (
    (0.20, 0.13, 0.06),  # oil
    (0.50, 0.24, 0.08),  # rust
    (0.30, 0.36, 0.16),  # verdigris
    (0.92, 0.86, 0.62),  # flux
)


def _stain(surface: _Surface, rng: Rng) -> Floats:
    """A blot of oil, rust, verdigris or flux with a darker edge and drops around it."""
    radius = float(rng.uniform(0.050, 0.095))
    centre = _bare_place(surface, rng, radius, tries=2)
    window = surface.window(centre, 2.6 * radius)
    area = window.area
    distance = _ragged_disc(rng, window, radius, 0.08, 7)
    distance += np.float32(0.10 * radius) * _smooth_noise(rng, distance.shape, 12)
    for _ in range(int(rng.integers(0, 5))):
        turn, away = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(1.2, 1.9)) * radius
        drop = _disc(max(0.005, float(rng.uniform(0.08, 0.2)) * radius))
        u, v = window.u - np.float32(away * math.cos(turn)), window.v - np.float32(away * math.sin(turn))
        distance = np.minimum(distance, drop(u, v))
    covered = np.clip(np.float32(0.5) - distance * np.float32(1 / 0.006), 0, 1) * (surface.coverage[area] > 0)
    edge = np.exp(-((distance / np.float32(0.008)) ** 2))
    clouds = np.clip(1 + np.float32(0.15) * _smooth_noise(rng, distance.shape, 9), np.float32(0.6), np.float32(1.3))
    opacity = np.clip(np.float32(rng.uniform(0.55, 0.85)) * clouds + np.float32(0.15) * edge, 0, 1) * covered
    colour = np.asarray(_STAINS[rng.integers(len(_STAINS))], np.float32) * np.float32(rng.uniform(0.85, 1.15))
    tint = colour * (1 - np.float32(0.35) * edge)[..., None]
    surface.colour[area] += (tint - surface.colour[area]) * opacity[..., None]
    surface.gloss[area] *= 1 - opacity
    mask = np.zeros_like(surface.height)
    mask[area] = covered
    return mask


def _chip(surface: _Surface, rng: Rng) -> Floats:
    """A piece broken out of the edge of the plate; the fracture is rough and bright, the belt shows behind it."""
    radius = float(rng.uniform(0.045, 0.075))
    half_width, half_height = _PLATE_HALF
    side, along = int(rng.integers(4)), float(rng.uniform(-0.7, 0.7))
    inset = 0.2 * radius
    centre = (
        (along * half_width, half_height - inset),
        (along * half_width, inset - half_height),
        (half_width - inset, along * half_height),
        (inset - half_width, along * half_height),
    )[side]
    window = surface.window(centre, 2.0 * radius)
    area = window.area
    distance = _ragged_disc(rng, window, radius, 0.08, 14)
    fracture_width = 0.012
    touched = surface.inside(distance - np.float32(fracture_width)) * (surface.coverage[area] > 0)
    gone = surface.inside(distance)
    grains = np.clip(rng.standard_normal(distance.shape, dtype=np.float32), -2, 2)
    fracture = np.float32(0.55) + np.float32(0.20) * grains
    surface.colour[area] += (fracture[..., None] - surface.colour[area]) * touched[..., None]
    slope = np.clip(1 - distance / np.float32(fracture_width), 0, 1)
    surface.height[area] -= np.float32(0.02 * surface.scale) * slope * touched
    surface.coverage[area] *= 1 - gone
    mask = np.zeros_like(surface.height)
    mask[area] = touched
    return mask


_LOGICAL: dict[str, Callable[[_Arrangement, Rng], list[_Mark]]] = {
    "logical_extra_screw": _extra_screw,
    "logical_missing_screw": _missing_screw,
    "logical_swapped_fuses": _swapped_fuses,
}
_STRUCTURAL: dict[str, Callable[[_Surface, Rng], Floats]] = {
    "structural_chip": _chip,
    "structural_dent": _dent,
    "structural_scratch": _scratch,
    "structural_stain": _stain,
}
DEFECTS: tuple[str, ...] = (*_LOGICAL, *_STRUCTURAL)
"""Folder names of the kinds of defect; the part before the underscore is ``logical`` or ``structural``."""
_GROUPS = ("train", "good", *DEFECTS)


# The camera.


@dataclass(frozen=True)
class _Scene:
    """Pose of the part, light and camera of one image."""

    angle: float
    shift: Point
    zoom: float
    azimuth: float
    """Direction in the image from which the light comes, radians."""
    elevation: float
    gain: float
    falloff: float
    """How much brighter the lit side of the image is than the other."""
    vignette: float
    tint: tuple[float, ...]
    blur: float
    noise: float


def _random_scene(rng: Rng) -> _Scene:
    return _Scene(
        angle=math.radians(float(rng.uniform(-3, 3))),
        shift=(float(rng.uniform(-0.07, 0.07)), float(rng.uniform(-0.07, 0.07))),
        zoom=float(rng.uniform(0.985, 1.015)),
        azimuth=math.radians(float(rng.uniform(-105, -75))),
        elevation=math.radians(float(rng.uniform(47, 53))),
        gain=float(rng.uniform(0.85, 1.15)),
        falloff=float(rng.uniform(0.0, 0.25)),
        vignette=float(rng.uniform(0.05, 0.30)),
        tint=tuple(rng.uniform(0.975, 1.025, 3).tolist()),
        blur=float(rng.uniform(0.0008, 0.0016)),
        noise=float(rng.uniform(0.5, 1.2)),
    )


def _lit(surface: _Surface, scene: _Scene) -> Floats:
    """Colour (h, w, 3) of the surface under the light of the scene: diffuse, with highlights where it is glossy."""
    azimuth = scene.azimuth - scene.angle
    horizontal, vertical = math.cos(scene.elevation), math.sin(scene.elevation)
    light_x, light_y = np.float32(horizontal * math.cos(azimuth)), np.float32(horizontal * math.sin(azimuth))
    slope_x, slope_y = np.zeros_like(surface.height), np.zeros_like(surface.height)
    slope_x[:, 1:-1] = (surface.height[:, 2:] - surface.height[:, :-2]) * np.float32(0.5)
    slope_y[1:-1] = (surface.height[2:] - surface.height[:-2]) * np.float32(0.5)
    np.clip(slope_x, -1.2, 1.2, out=slope_x)
    np.clip(slope_y, -1.2, 1.2, out=slope_y)
    upright = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    along = slope_x * light_x + slope_y * light_y
    diffuse = np.maximum((np.float32(vertical) - along) * upright, 0) / np.float32(vertical)
    half = 1 / math.sqrt(horizontal**2 + (vertical + 1) ** 2)
    facing = np.clip((np.float32(vertical + 1) - along) * upright * np.float32(half), 0, 1)
    for _ in range(5):
        facing *= facing
    brightness = surface.shade * (np.float32(0.4) + np.float32(0.6) * diffuse)
    lit = surface.colour * brightness[..., None] + (surface.gloss * surface.shade * facing)[..., None]
    return lit.astype(np.float32, copy=False)


def _posed(layer: Image.Image, scene: _Scene, size: int) -> Image.Image:
    """Turn a canvas layer into the pose of the part, at the size of the image."""
    full = _OVERSAMPLING * size
    cosine, sine = math.cos(scene.angle) / scene.zoom, math.sin(scene.angle) / scene.zoom
    centre_x, centre_y = full * (0.5 + scene.shift[0]), full * (0.5 + scene.shift[1])
    matrix = (
        cosine,
        sine,
        layer.width / 2 - cosine * centre_x - sine * centre_y,
        -sine,
        cosine,
        layer.height / 2 + sine * centre_x - cosine * centre_y,
    )
    turned = layer.transform((full, full), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return turned.reduce(_OVERSAMPLING)


def _belt(rng: Rng, size: int) -> Floats:
    """Brightness (size, size) of a rubber belt with a fine diamond pattern and worn patches."""
    pixel = np.arange(size, dtype=np.float32) / np.float32(size)
    wave = np.float32(2 * math.pi / 0.042)
    phase_x, phase_y = (np.float32(value) for value in rng.uniform(0, 2 * math.pi, 2))
    rising = np.sin(wave * (pixel[None, :] + pixel[:, None]) + phase_x)
    falling = np.sin(wave * (pixel[None, :] - pixel[:, None]) + phase_y)
    belt: Floats = np.float32(rng.uniform(0.20, 0.24)) + np.float32(0.018) * rising * falling
    belt += np.float32(0.004) * rng.standard_normal((size, size), dtype=np.float32)
    belt += np.float32(0.010) * _smooth_noise(rng, (size, size), 9)
    return belt


def _as_layer(values: Floats) -> Image.Image:
    return Image.fromarray(np.clip(values * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8))


def _photograph(surface: _Surface, scene: _Scene, rng: Rng, size: int) -> NDArray[np.uint8]:
    """The image (size, size, 3) of the part on the belt."""
    lit = _lit(surface, scene) * surface.coverage[..., None]
    part = np.asarray(_posed(_as_layer(lit), scene, size), np.float32) / np.float32(255)
    covered = np.asarray(_posed(_as_layer(surface.coverage), scene, size), np.float32) / np.float32(255)
    shadow_layer = _posed(_as_layer(surface.outline), scene, size)
    away = (-0.022 * size * math.cos(scene.azimuth), -0.022 * size * math.sin(scene.azimuth))
    shadow_layer = shadow_layer.transform(
        shadow_layer.size, Image.Transform.AFFINE, (1, 0, -away[0], 0, 1, -away[1]), Image.Resampling.BILINEAR
    ).filter(ImageFilter.GaussianBlur(0.014 * size))
    shadow = np.asarray(shadow_layer, np.float32) / np.float32(255)

    belt = _belt(rng, size) * (1 - np.float32(0.7) * shadow)
    image = part + (belt * (1 - covered))[..., None] * np.array((0.96, 1.0, 1.02), np.float32)
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5)
    x, y = position[None, :], position[:, None]
    towards = x * np.float32(math.cos(scene.azimuth)) + y * np.float32(math.sin(scene.azimuth))
    light = 1 + np.float32(scene.falloff) * towards - np.float32(scene.vignette) * (x * x + y * y)
    image *= light[..., None] * (np.float32(scene.gain) * np.asarray(scene.tint, np.float32))
    focused = _as_layer(image).filter(ImageFilter.GaussianBlur(scene.blur * size))
    noise = np.float32(scene.noise) * rng.standard_normal((size, size, 3), dtype=np.float32)
    exposed = np.clip(np.asarray(focused, np.float32) + noise + np.float32(0.5), 0, 255)
    return exposed.astype(np.uint8)


@dataclass(frozen=True)
class Sample:
    """One image of the set: ``image`` uint8 (size, size, 3) RGB, ``mask`` bool (size, size), True on the defect."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def render_sample(group: str, index: int, *, seed: int = 0, size: int = 256, flawless: bool = False) -> Sample:
    """Render image ``index`` of a group of the sample set.

    Args:
        group: ``train`` or ``good`` (both without defect), or one of ``DEFECTS``.
        index: number of the image within its group.
        seed: seed of the set.
        size: height and width in pixels, at least 64.
        flawless: leave the defect out, everything else being the same.

    Returns:
        The image and the mask of its defect, which is empty where there is none.

    Raises:
        InputError: the group is unknown, or a number is out of range.
    """
    if group not in _GROUPS:
        raise InputError(f"Unknown group {group!r} of the sample set: expected one of {', '.join(_GROUPS)}.")
    if index < 0 or seed < 0 or size < 64:
        raise InputError(
            f"index and seed must be at least 0 and size at least 64, got index {index}, seed {seed}, size {size}."
        )
    # The defect has numbers of its own, so that everything else is the same with and without it.
    rng = np.random.default_rng((seed, _GROUPS.index(group), index))
    defect_rng = np.random.default_rng((seed, _GROUPS.index(group), index, 1))
    scene = _random_scene(rng)
    arrangement = _good_arrangement(rng)
    marks = _LOGICAL[group](arrangement, defect_rng) if group in _LOGICAL and not flawless else []
    cast = 1 / math.tan(scene.elevation)
    turn = scene.azimuth - scene.angle
    surface = _Surface(size, (-cast * math.cos(turn), -cast * math.sin(turn)))
    _draw_part(surface, rng, arrangement)
    defect = np.zeros_like(surface.height)
    for mark in marks:
        window = surface.window(mark.centre, mark.reach)
        np.maximum(defect[window.area], surface.inside(mark.shape(window.u, window.v)), out=defect[window.area])
    if group in _STRUCTURAL and not flawless:
        defect = _STRUCTURAL[group](surface, defect_rng)
    mask = np.asarray(_posed(_as_layer(defect), scene, size)) > 25
    return Sample(_photograph(surface, scene, rng, size), mask)


# The set.


def _planned_files(description: dict[str, int]) -> list[tuple[str, int, Path, Path | None]]:
    """Group, index, path of the image and path of the mask, if any, of every sample."""
    planned: list[tuple[str, int, Path, Path | None]] = []
    for index in range(description["train"]):
        planned.append(("train", index, Path("train/good", f"{index:03d}.png"), None))
    for index in range(description["good"]):
        planned.append(("good", index, Path("test/good", f"{index:03d}.png"), None))
    for defect in DEFECTS:
        for index in range(description["per_defect"]):
            image = Path("test", defect, f"{index:03d}.png")
            mask = Path("ground_truth", defect, f"{index:03d}_mask.png")
            planned.append((defect, index, image, mask))
    return planned


def _check_folder(out: Path, description: dict[str, int]) -> None:
    """Raise DatasetError unless ``out`` is absent, empty, or a set, whole or begun, of the same description."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DatasetError(f"{out} is a file: a sample set needs a folder. Name another place.")
    if not any(out.iterdir()):
        return
    try:
        found = json.loads((out / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DatasetError(
            f"{out} is not empty and holds no sample set: nothing was written. Name a new or an empty folder."
        )
    if found != description:
        differing = sorted(key for key in description.keys() | found.keys() if description.get(key) != found.get(key))
        changes = ", ".join(f"{key} {found.get(key)} there, {description.get(key)} asked for" for key in differing)
        raise DatasetError(f"{out} holds another sample set ({changes}). Name another folder, or remove that one.")


def _write_png(pixels: NDArray[np.uint8], target: Path) -> None:
    with atomic_path(target) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)


def generate_sample_set(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    train: int = 80,
    good: int = 40,
    per_defect: int = 10,
    size: int = 256,
) -> Path:
    """Render the sample set into a folder in the layout of MVTec AD.

    Writes ``train/good/000.png``, ``test/good/000.png``, and for each of ``DEFECTS`` ``test/<defect>/000.png`` with
    ``ground_truth/<defect>/000_mask.png`` (0 and 255), besides ``sample_set.json`` with the parameters. The images
    depend on the parameters alone, not on their number: image 3 of a small set is image 3 of a large one. A set that
    was begun with the same parameters is completed; what is there is kept.

    Args:
        out: the folder to make; may exist if it is empty or holds a set of the same parameters.
        seed: seed of the whole set, at least 0.
        train: number of good images to train on, at least 1.
        good: number of good images to test on, at least 0.
        per_defect: number of test images for each kind of defect, at least 0.
        size: height and width of the images in pixels, at least 64.

    Returns:
        The folder.

    Raises:
        InputError: a number is out of range.
        DatasetError: ``out`` is a file, or holds something else; nothing was written.
    """
    if train < 1 or min(seed, good, per_defect) < 0 or size < 64:
        raise InputError(
            "A sample set needs train >= 1, seed, good and per_defect >= 0, and size >= 64, "
            f"got train {train}, seed {seed}, good {good}, per_defect {per_defect} and size {size}."
        )
    out = Path(out)
    description = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "train": train,
        "good": good,
        "per_defect": per_defect,
        "size": size,
    }
    _check_folder(out, description)
    # Written first: a folder that holds it and not all of its images is a set that was interrupted.
    with atomic_path(out / DESCRIPTION_FILE) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for group, index, image_path, mask_path in _planned_files(description):
        if (out / image_path).exists() and (mask_path is None or (out / mask_path).exists()):
            continue
        sample = render_sample(group, index, seed=seed, size=size)
        if mask_path is not None:
            _write_png(np.where(sample.mask, np.uint8(255), np.uint8(0)), out / mask_path)
        _write_png(sample.image, out / image_path)
    return out


# The baseline that a set must not be solved by.


def _blurred(values: Floats, sigma: float) -> Floats:
    """Gaussian blur with reflected borders."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        margins = [(0, 0), (0, 0)]
        margins[axis] = (reach, reach)
        padded = np.pad(values, margins, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis)
        values = (windows @ weights.astype(np.float32)).astype(np.float32)
    return values


Reduction = Literal["max", "mean", "smoothed_max"]
"""How :func:`mean_image_baseline` turns differences of pixels into a score."""


def mean_image_baseline(
    train: Sequence[Path],
    test: Sequence[Path],
    *,
    reduction: Reduction = "smoothed_max",
) -> list[float]:
    """Score images by their difference from the mean training image: what a set without variation is solved by.

    Images are scaled to 256x256; the difference is absolute and averaged over the colours.

    Args:
        train: paths of the good images to average, at least one.
        test: paths of the images to score.
        reduction: how the difference (256, 256) becomes a score: its maximum, its mean, or its maximum after a
            Gaussian blur with a standard deviation of 4 pixels.

    Returns:
        One score for each test image, in [0, 255].

    Raises:
        InputError: ``train`` is empty, or the reduction is unknown.
        OSError: an image could not be read.
    """
    if not train:
        raise InputError("The mean training image needs at least one image, got none.")
    if reduction not in get_args(Reduction):
        raise InputError(f"Unknown reduction {reduction!r}: expected {', '.join(get_args(Reduction))}.")

    def pixels(path: Path) -> Floats:
        with Image.open(path) as image:
            scaled = image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
        return np.asarray(scaled, np.float32)

    mean = np.zeros((256, 256, 3), np.float64)
    for path in train:
        mean += pixels(path)
    mean_image = (mean / len(train)).astype(np.float32)
    scores: list[float] = []
    for path in test:
        difference: Floats = np.abs(pixels(path) - mean_image).mean(axis=2)
        if reduction == "smoothed_max":
            difference = _blurred(difference, 4.0)
        scores.append(float(difference.mean() if reduction == "mean" else difference.max()))
    return scores
