"""An endless, seeded source of images to learn local features from, free of anyone's terms.

A teacher distilled from a backbone, and the pretraining penalty of the student, need images that have
nothing to do with the product under test but whose statistics are wide. Here every image is computed:
occluding shapes whose radii follow a power law (the dead-leaves model of natural images: Lee, Mumford, Huang,
"Occlusion models for natural images", 2001), 1/f noise, gratings, cells, warped noise, strokes, meshes,
weaves and brushed metal, which are coloured, lit, photographed (perspective, blur, tone) and given noise.

Every field function takes a generator and a size and returns float32 (size, size) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from efficientad_fast.errors import InputError

Field = NDArray[np.float32]
Picture = NDArray[np.float32]
Rng = np.random.Generator


def synthetic_image(index: int, *, seed: int, size: int = 512) -> NDArray[np.uint8]:
    """Return image number ``index`` of the endless sequence that ``seed`` names.

    The image depends on nothing but ``index``, ``seed`` and ``size``: several workers can share a sequence.

    Args:
        index: position in the sequence, at least 0.
        seed: which sequence, at least 0.
        size: height and width in pixels, at least 16. Objects scale with the image, fine patterns keep their
            period in pixels.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        InputError: an argument is out of range.
    """
    if index < 0 or seed < 0:
        raise InputError(f"index and seed must be at least 0, got index {index} and seed {seed}.")
    if size < 16:
        raise InputError(f"size must be at least 16 pixels, got {size}.")
    rng = np.random.default_rng((seed, index))
    compositions = (_leaves_over_texture, _single_texture, _patches_of_textures, _objects_on_texture)
    composition = compositions[rng.choice(len(compositions), p=(0.4, 0.25, 0.15, 0.2))]
    image = composition(rng, size)
    if rng.random() < 0.25:
        image = _with_strokes(rng, image)
    if rng.random() < 0.3:
        image = _in_perspective(rng, image)
    return _photographed(rng, image)


# Fields: one scalar per pixel.


def _unit(values: NDArray[np.float32]) -> Field:
    low, high = float(values.min()), float(values.max())
    scaled: Field = (values - low) * np.float32(1.0 / max(high - low, 1e-6))
    return scaled


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _grid(size: int) -> tuple[Field, Field]:
    axis = np.arange(size, dtype=np.float32)
    return axis[None, :], axis[:, None]


def _rotated_grid(rng: Rng, size: int) -> tuple[Field, Field]:
    """Pixel coordinates along and across a random direction."""
    angle = rng.uniform(0, math.pi)
    x, y = _grid(size)
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def _spectral_noise(rng: Rng, size: int, exponent: float, stretch: float = 1.0) -> Field:
    """Zero-mean, unit-variance noise of amplitude 1 / f**exponent, ``stretch`` times longer one way."""
    fx = np.fft.rfftfreq(size).astype(np.float32)[None, :]
    fy = np.fft.fftfreq(size).astype(np.float32)[:, None]
    if stretch != 1.0:
        angle = rng.uniform(0, math.pi)
        cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        fx, fy = (fx * cosine + fy * sine) * np.float32(stretch), fy * cosine - fx * sine
    squared = fx * fx + fy * fy
    squared[0, 0] = 1.0
    amplitude = squared ** np.float32(-exponent / 2)
    amplitude[0, 0] = 0.0
    white = rng.standard_normal((size, size), dtype=np.float32)
    noise = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(size, size)).astype(np.float32)
    normalised: Field = noise / np.float32(max(float(noise.std()), 1e-6))
    return normalised


def _clouds(rng: Rng, size: int) -> Field:
    return _unit(_spectral_noise(rng, size, rng.uniform(0.6, 2.2)))


def _grain(rng: Rng, size: int) -> Field:
    """Noise within a band of scales: sand, plaster, leather, felt."""
    centre = _log_uniform(rng, 0.02, 0.3)
    fx = np.fft.rfftfreq(size).astype(np.float32)[None, :]
    fy = np.fft.fftfreq(size).astype(np.float32)[:, None]
    squared = (fx * fx + fy * fy) * np.float32(centre**-2)
    amplitude = squared ** np.float32(rng.uniform(0.5, 2.0)) * np.exp(-squared)
    white = rng.standard_normal((size, size), dtype=np.float32)
    band = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(size, size)).astype(np.float32)
    limit = np.float32(3.0 * max(float(band.std()), 1e-6))
    return _unit(np.clip(band, -limit, limit))


def _ridges(rng: Rng, size: int) -> Field:
    """Creases where noise crosses zero: veins, cracked earth, creased cloth."""
    noise = np.abs(_spectral_noise(rng, size, rng.uniform(1.2, 2.0), _log_uniform(rng, 1.0, 3.0)))
    return _unit(np.minimum(noise, 1.5) ** np.float32(rng.uniform(0.3, 1.0)))


def _grating(rng: Rng, size: int) -> Field:
    """One to three oriented waves, sinusoidal to square, with a slow phase drift."""
    total = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(1, 4)):
        along, _ = _rotated_grid(rng, size)
        phase = along * np.float32(2 * math.pi / _log_uniform(rng, 3.0, 64.0))
        if rng.random() < 0.5:
            phase = phase + np.float32(rng.uniform(0.2, 2.0)) * _spectral_noise(rng, size, 2.2)
        wave = np.sin(phase + np.float32(rng.uniform(0, 2 * math.pi)))
        total += np.tanh(wave * np.float32(_log_uniform(rng, 0.5, 12.0))) * np.float32(rng.uniform(0.3, 1.0))
    return _unit(total)


def _wood(rng: Rng, size: int) -> Field:
    """Rings or layers bent by noise: wood, agate, marble."""
    along, across = _rotated_grid(rng, size)
    if rng.random() < 0.5:
        centre = rng.uniform(-0.5, 1.5, 2) * size
        flattening = np.float32(rng.uniform(0.1, 1.0))
        base = np.hypot(along - np.float32(centre[0]), (across - np.float32(centre[1])) * flattening)
    else:
        base = along + np.zeros_like(across)
    bend = _spectral_noise(rng, size, rng.uniform(1.5, 2.4), _log_uniform(rng, 1.0, 6.0))
    period = _log_uniform(rng, 6.0, 80.0)
    phase = base / np.float32(period) + bend * np.float32(rng.uniform(0.1, 1.5))
    if rng.random() < 0.5:
        return _unit(phase - np.floor(phase))
    return _unit(np.sin(phase * np.float32(2 * math.pi)))


def _cells(rng: Rng, size: int) -> Field:
    """Voronoi cells of a jittered lattice: distance, border, or one value per cell."""
    pitch = _log_uniform(rng, 6.0, 90.0)
    along, across = _rotated_grid(rng, size)
    u = along / np.float32(pitch * rng.uniform(0.6, 1.6))
    v = across / np.float32(pitch)
    column, row = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    jitter = np.float32(rng.uniform(0.2, 1.0))
    table = rng.random((3, 4096), dtype=np.float32)
    nearest = np.full((size, size), np.inf, np.float32)
    second = nearest.copy()
    owner = np.zeros((size, size), np.int32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            key = ((column + dx) * 73 + (row + dy) * 1531) & 4095
            px = u - column - np.float32(dx + 0.5) + jitter * (table[0][key] - np.float32(0.5))
            py = v - row - np.float32(dy + 0.5) + jitter * (table[1][key] - np.float32(0.5))
            distance = px * px + py * py
            closer = distance < nearest
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
            owner = np.where(closer, key, owner)
    kind = rng.integers(4)
    if kind == 0:
        return _unit(np.sqrt(nearest))
    border = np.sqrt(second) - np.sqrt(nearest)
    edge = np.minimum(border / np.float32(rng.uniform(0.05, 0.4)), np.float32(1))
    if kind == 1:
        return _unit(edge)
    value = table[2][owner]
    if kind == 2:
        owned: Field = value
        return owned
    return _unit(value * edge + (1 - edge) * np.float32(rng.random()))


def _lattice(rng: Rng, size: int) -> Field:
    """A periodic array of holes, studs or tiles: perforated sheet, mesh, bricks, keys."""
    pitch = _log_uniform(rng, 6.0, 70.0)
    aspect = float(rng.choice((1.0, 1.0, 1.0, 1.732, 2.0)))
    along, across = _rotated_grid(rng, size)
    v = across / np.float32(pitch)
    row = np.floor(v)
    offset = np.float32(rng.choice((0.0, 0.5))) * (row % 2)
    u = along / np.float32(pitch * aspect) + offset
    x = np.abs(u - np.floor(u) - np.float32(0.5)) * np.float32(2)
    y = np.abs(v - row - np.float32(0.5)) * np.float32(2)
    power = float(rng.choice((1.0, 2.0, 2.0, 6.0)))
    reach = (x**power + y**power) ** np.float32(1 / power)
    softness = np.float32(max(2.0 / pitch, rng.uniform(0.0, 0.5)))
    shape = np.clip((np.float32(rng.uniform(0.4, 0.95)) - reach) / softness, 0, 1)
    if rng.random() < 0.5:
        values = rng.random(4096, dtype=np.float32)
        key = (np.floor(u).astype(np.int32) * 73 + row.astype(np.int32) * 1531) & 4095
        shape = shape * (np.float32(1 - 0.6 * rng.random()) + np.float32(0.5) * values[key])
    return _unit(shape)


def _weave(rng: Rng, size: int) -> Field:
    """Threads that pass over and under each other: cloth, baskets, wire mesh, carbon fibre."""
    pitch = _log_uniform(rng, 4.0, 40.0)
    along, across = _rotated_grid(rng, size)
    if rng.random() < 0.6:
        wobble = np.float32(rng.uniform(0.05, 0.4) * pitch)
        along = along + wobble * _spectral_noise(rng, size, 1.8)
        across = across + wobble * _spectral_noise(rng, size, 1.8)
    u, v = along / np.float32(pitch), across / np.float32(pitch)
    column, row = np.floor(u), np.floor(v)
    twill = int(rng.choice((2, 2, 3, 4)))
    over = ((column + row).astype(np.int32) % twill) == 0
    round_u = 1 - (2 * (u - column) - 1) ** 2
    round_v = 1 - (2 * (v - row) - 1) ** 2
    gloss = np.float32(rng.uniform(0.2, 0.8))
    warp = round_u * (gloss + (1 - gloss) * round_v)
    weft = round_v * (gloss + (1 - gloss) * round_u)
    shade = np.float32(rng.uniform(0.5, 1.0))
    return _unit(np.where(over, warp, weft * shade))


def _brushed(rng: Rng, size: int) -> Field:
    """Long fine streaks: brushed metal, rolled sheet, hair, rain."""
    streaks = _spectral_noise(rng, size, rng.uniform(0.2, 1.0), _log_uniform(rng, 15.0, 150.0))
    limit = np.float32(2.5)
    return _unit(np.clip(streaks, -limit, limit))


def _fibres(rng: Rng, size: int) -> Field:
    """Many thin lines lying over each other: fur, grass, needles, scratches, chips."""
    canvas = Image.new("L", (size, size), int(rng.integers(0, 256)))
    draw = ImageDraw.Draw(canvas)
    count = int(_log_uniform(rng, 100, 2500))
    direction, spread = rng.uniform(0, 2 * math.pi), _log_uniform(rng, 0.05, 3.0)
    length = _log_uniform(rng, 5.0, 120.0)
    start = rng.uniform(-20, size + 20, (count, 2))
    angle = direction + spread * rng.standard_normal(count)
    reach = length * rng.uniform(0.3, 1.5, count)
    end = start + reach[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    values = rng.integers(0, 256, count)
    width = int(rng.integers(1, 4))
    for (x0, y0), (x1, y1), value in zip(start.tolist(), end.tolist(), values.tolist(), strict=True):
        draw.line((x0, y0, x1, y1), fill=value, width=width)
    return _unit(np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), np.float32))


def _contours(rng: Rng, size: int) -> Field:
    """Noise cut at a few levels: camouflage, maps, flaking paint, rust."""
    noise = _unit(_spectral_noise(rng, size, rng.uniform(1.1, 2.0)))
    levels = np.float32(rng.integers(2, 9))
    scaled = noise * levels
    step = np.floor(scaled)
    sharpness = np.float32(_log_uniform(rng, 3.0, 30.0))
    return _unit(step + np.clip((scaled - step - np.float32(0.5)) * sharpness + np.float32(0.5), 0, 1))


_FIELDS: tuple[Callable[[Rng, int], Field], ...] = (
    _clouds,
    _grain,
    _ridges,
    _grating,
    _wood,
    _cells,
    _lattice,
    _weave,
    _brushed,
    _fibres,
    _contours,
)


def _random_field(rng: Rng, size: int) -> Field:
    return _FIELDS[rng.integers(len(_FIELDS))](rng, size)


# Colours, and light on a surface. A picture is float32 (size, size, 3), about [0, 255].


def _palette(rng: Rng, count: int) -> NDArray[np.float32]:
    """Colours (count, 3) in [0, 255] around one or two hues, most of them muted, a few vivid."""
    complement = rng.choice((0.0, 0.0, 0.5)) * rng.integers(0, 2, count)
    hue = (rng.random() + complement + 0.12 * rng.standard_normal(count)) % 1
    if rng.random() < 0.2:
        hue = rng.random(count)
    saturation = np.clip(rng.beta(1.2, 2.5) + 0.2 * rng.standard_normal(count), 0, 1)
    value = rng.uniform(0.05, 1.0, count)
    distance = np.abs(((hue[:, None] * 6 + np.array((0.0, 4.0, 2.0))) % 6) - 3) - 1
    colours: NDArray[np.float64] = 255 * value[:, None] * (1 - saturation[:, None] * (1 - np.clip(distance, 0, 1)))
    return colours.astype(np.float32)


def _coloured(rng: Rng, field: Field) -> Picture:
    """Map a field through a random ramp of two to six colours."""
    colours = _palette(rng, int(rng.integers(2, 7)))
    stops = np.sort(np.concatenate(((0.0, 1.0), rng.random(len(colours) - 2))))
    positions = np.linspace(0, 1, 256)
    ramp = np.stack([np.interp(positions, stops, colours[:, c]) for c in range(3)], axis=1).astype(np.float32)
    coloured: Picture = ramp[np.clip(field * np.float32(255), 0, 255).astype(np.uint8)]
    return coloured


def _relief(rng: Rng, field: Field) -> Field:
    """Brightness factor of the field seen as a height map under a grazing light."""
    height = field.copy()
    height[1:-1] = (field[:-2] + field[1:-1] + field[2:]) * np.float32(1 / 3)
    angle = rng.uniform(0, 2 * math.pi)
    slope = np.zeros_like(height)
    slope[:, 1:] += np.float32(math.cos(angle)) * (height[:, 1:] - height[:, :-1])
    slope[1:] += np.float32(math.sin(angle)) * (height[1:] - height[:-1])
    scale = np.float32(rng.uniform(0.2, 0.7) / max(3.0 * float(slope.std()), 1e-6))
    brightness: Field = 1 + np.clip(slope * scale, np.float32(-0.7), np.float32(0.9))
    return brightness


def _texture(rng: Rng, size: int) -> Picture:
    """A coloured surface of one kind, possibly weathered by a second one and lit from the side."""
    field = _random_field(rng, size)
    image = _coloured(rng, field)
    if rng.random() < 0.4:
        image *= _relief(rng, field)[..., None]
    if rng.random() < 0.4:
        weathering = _random_field(rng, size)
        strength = np.float32(rng.uniform(0.1, 0.6))
        image *= (1 + strength * (weathering - np.float32(weathering.mean())))[..., None]
    return image


def _single_texture(rng: Rng, size: int) -> Picture:
    return _texture(rng, size)


def _patches_of_textures(rng: Rng, size: int) -> Picture:
    """Two surfaces with an irregular border between them."""
    first, second = _texture(rng, size), _texture(rng, size)
    noise = _spectral_noise(rng, size, rng.uniform(1.3, 2.2))
    sharpness = np.float32(_log_uniform(rng, 1.0, 40.0))
    weight = np.clip(noise * sharpness + np.float32(0.5), 0, 1)[..., None]
    mixed: Picture = first + (second - first) * weight
    return mixed


def _leaf_outline(rng: Rng, kind: int, radius: float) -> NDArray[np.float64]:
    """Vertices (n, 2) of a shape about the origin: ellipse, box, polygon, star, blob or bar."""
    if kind == 0:
        turn = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        points = np.stack((np.cos(turn), rng.uniform(0.3, 1.0) * np.sin(turn)), axis=1)
    elif kind == 1:
        half = rng.uniform(0.25, 1.0)
        points = np.array(((-1, -half), (1, -half), (1, half), (-1, half)))
    elif kind == 2:
        turn = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 9))))
        points = np.stack((np.cos(turn), np.sin(turn)), axis=1)
    elif kind == 3:
        spikes = int(rng.integers(4, 10))
        turn = np.linspace(0, 2 * math.pi, 2 * spikes, endpoint=False)
        reach = np.where(np.arange(2 * spikes) % 2 == 0, 1.0, rng.uniform(0.3, 0.8))
        points = reach[:, None] * np.stack((np.cos(turn), np.sin(turn)), axis=1)
    elif kind == 4:
        turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        phases = rng.uniform(0, 2 * math.pi, 4)[:, None]
        waves = rng.normal(0, 0.15, 4)[:, None] * np.sin(np.arange(2, 6)[:, None] * turn + phases)
        points = (0.8 + waves.sum(axis=0))[:, None] * np.stack((np.cos(turn), np.sin(turn)), axis=1)
    else:
        half = rng.uniform(0.03, 0.15)
        points = np.array(((-1.5, -half), (1.5, -half), (1.5, half), (-1.5, half)))
    angle = rng.uniform(0, 2 * math.pi)
    rotation = np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
    outline: NDArray[np.float64] = radius * points @ rotation
    return outline


def _drawn_leaves(rng: Rng, background: Picture, radii: NDArray[np.float64], textures: int) -> Picture:
    """Lay shapes of the given radii (pixels) over the background, first to last, some with a texture."""
    size = background.shape[0]
    count = len(radii)
    # Outlines are rasterised at twice the resolution, so that edges are as soft as a camera makes them.
    labels_image = Image.new("I", (2 * size, 2 * size), 0)
    draw = ImageDraw.Draw(labels_image)
    centres = rng.uniform(0, size, (count, 2))
    kinds = rng.choice(6, size=count, p=rng.dirichlet(np.ones(6)))
    for i in range(count):
        outline = 2 * (centres[i] + _leaf_outline(rng, int(kinds[i]), float(radii[i])))
        draw.polygon(outline.ravel().tolist(), fill=i + 1)
    labels = np.asarray(labels_image)

    palette = _palette(rng, int(rng.integers(4, 20)))
    colours = palette[rng.integers(len(palette), size=count)] + rng.normal(0, 12, (count, 3))
    colour_table = np.zeros((count + 1, 4), np.uint8)
    colour_table[1:, :3] = np.clip(colours, 0, 255)
    colour_table[1:, 3] = 255
    flat = np.asarray(Image.fromarray(colour_table[labels], "RGBA").reduce(2), np.float32)
    coverage = flat[..., 3:] * np.float32(1 / 255)

    inner = labels[::2, ::2]
    x, y = _grid(size)
    table = np.zeros((4, count + 1), np.float32)
    table[0, 1:], table[1, 1:] = centres[:, 0], centres[:, 1]
    slope = rng.uniform(0.0, 0.5) * rng.standard_normal((2, count)) / np.maximum(radii, 4.0)
    table[2:, 1:] = slope
    factor = 1 + table[2][inner] * (x - table[0][inner]) + table[3][inner] * (y - table[1][inner])
    if textures:
        fields = np.stack([f - f.mean() for f in (_random_field(rng, size) for _ in range(textures))])
        choice = np.concatenate(((0,), rng.integers(textures, size=count)))
        amplitude = np.zeros(count + 1, np.float32)
        amplitude[1:] = rng.uniform(0.0, 1.2, count) * (rng.random(count) < 0.75)
        picked = np.take_along_axis(fields, choice[inner][None], axis=0)[0]
        factor += amplitude[inner] * picked
    # The colour table gives black outside of every leaf, so that ``flat`` is already weighted by coverage.
    leaves = flat[..., :3] * np.clip(factor, np.float32(0.2), np.float32(1.8))[..., None]
    picture: Picture = background * (1 - coverage) + leaves
    return picture


def _power_law_radii(rng: Rng, count: int, smallest: float, largest: float) -> NDArray[np.float64]:
    """Radii whose density falls as r**-3, which makes the statistics of leaves independent of scale."""
    low, high = smallest**-2.0, largest**-2.0
    return np.asarray((low - rng.random(count) * (low - high)) ** -0.5)


def _leaves_over_texture(rng: Rng, size: int) -> Picture:
    """Dead leaves that fill the frame."""
    count = int(_log_uniform(rng, 120, 900))
    radii = _power_law_radii(rng, count, _log_uniform(rng, 0.008, 0.04) * size, rng.uniform(0.2, 0.5) * size)
    return _drawn_leaves(rng, _texture(rng, size), radii, int(rng.integers(0, 4)))


def _objects_on_texture(rng: Rng, size: int) -> Picture:
    """A few objects of similar size in front of a surface."""
    background = _texture(rng, size)
    count = int(_log_uniform(rng, 2, 60))
    radii = rng.uniform(0.6, 1.4, count) * size * 0.45 / math.sqrt(count)
    return _drawn_leaves(rng, background, radii, int(rng.integers(0, 3)))


def _with_strokes(rng: Rng, image: Picture) -> Picture:
    """Print rows of made-up characters: strokes and arcs on a grid, like labels, displays and handwriting."""
    size = image.shape[0]
    ink = Image.new("L", (2 * size, 2 * size), 0)
    draw = ImageDraw.Draw(ink)
    height = 2 * _log_uniform(rng, 7.0, 40.0)
    width = height * rng.uniform(0.45, 0.8)
    pen = max(1, round(height * rng.uniform(0.06, 0.2)))
    slant = rng.uniform(-0.3, 0.3)
    alphabet = [rng.integers(0, 3, (int(rng.integers(2, 5)), 4)) for _ in range(int(rng.integers(6, 30)))]
    left, top = rng.uniform(0, 0.8 * size, 2)
    right, bottom = left + rng.uniform(0.4, 2.0) * size, top + rng.uniform(0.1, 2.0) * size
    y = top
    while y < min(bottom, 2 * size):
        x = left
        while x < min(right, 2 * size):
            if rng.random() < 0.15:
                x += width
                continue
            for x0, y0, x1, y1 in alphabet[rng.integers(len(alphabet))].tolist():
                a = (x + (x0 / 2) * width * 0.75 - slant * y0 / 2 * height, y + y0 / 2 * height)
                b = (x + (x1 / 2) * width * 0.75 - slant * y1 / 2 * height, y + y1 / 2 * height)
                if x0 != x1 and y0 != y1:
                    box = (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1]))
                    draw.arc(box, 90 * x0, 90 * x0 + 180 + 90 * y1, fill=255, width=pen)
                else:
                    draw.line((*a, *b), fill=255, width=pen)
            x += width
        y += height * 1.5
    if rng.random() < 0.5:
        ink = ink.rotate(rng.uniform(-180, 180), Image.Resampling.BILINEAR)
    weight = np.asarray(ink.reduce(2), np.float32) * np.float32(rng.uniform(0.5, 1.0) / 255)
    printed: Picture = image + (_palette(rng, 1)[0] - image) * weight[..., None]
    return printed


def _as_uint8(image: Picture) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)
    return rounded


def _in_perspective(rng: Rng, image: Picture) -> Picture:
    """View the image from an angle, through a quadrilateral inside it."""
    size = image.shape[0]
    inset = rng.uniform(0, 0.3, (4, 2)) * size
    corners = np.array(((0, 0), (0, size), (size, size), (size, 0)))
    inward = np.array(((1, 1), (1, -1), (-1, -1), (-1, 1)))
    quad = corners + inward * inset
    view = Image.fromarray(_as_uint8(image)).transform(
        (size, size), Image.Transform.QUAD, quad.ravel().tolist(), Image.Resampling.BICUBIC
    )
    return np.asarray(view, np.float32)


def _photographed(rng: Rng, image: Picture) -> NDArray[np.uint8]:
    """Uneven light, focus, contrast, colour cast and sensor noise."""
    size = image.shape[0]
    if rng.random() < 0.6:
        x, y = _grid(size)
        cx, cy = (np.float32(v) for v in rng.uniform(-0.3, 1.3, 2) * size)
        radius = np.float32(rng.uniform(0.6, 1.6) * size)
        falloff = ((x - cx) ** 2 + (y - cy) ** 2) / (radius * radius)
        brightest, steepness = rng.uniform(1.0, 1.3), rng.uniform(0.2, 1.2)
        light = (brightest / (1 + steepness * falloff)).astype(np.float32)
        image = image * light[..., None]
    # The blur works on 8 bits a channel, several times faster than on floats, and cameras do no better.
    picture = Image.fromarray(_as_uint8(image))
    focus = rng.random()
    if focus < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(_log_uniform(rng, 0.4, 3.0)))
    elif focus < 0.4:
        reach = rng.uniform(0, 4)
        picture = picture.filter(ImageFilter.BoxBlur((reach, 0) if rng.random() < 0.5 else (0, reach)))
    elif focus < 0.5:
        picture = picture.filter(ImageFilter.UnsharpMask(1.0, int(rng.integers(30, 150)), 0))
    if rng.random() < 0.12:
        picture = picture.convert("L").convert("RGB")
    gain = rng.uniform(0.9, 1.1, 3) if rng.random() < 0.5 else np.ones(3)
    tone = np.linspace(0, 1, 256) ** _log_uniform(rng, 0.6, 1.6)
    black, white = rng.uniform(0, 0.15), rng.uniform(0.8, 1.0)
    curves = 255 * np.clip((black + (white - black) * tone)[None] * gain[:, None], 0, 1)
    picture = picture.point([round(v) for v in curves.ravel().tolist()])
    pixels = np.asarray(picture, np.float32)
    noise = _log_uniform(rng, 0.5, 10.0) if rng.random() < 0.6 else 0.5
    if rng.random() < 0.5:
        sensor = rng.standard_normal(pixels.shape, dtype=np.float32)
    else:
        sensor = rng.standard_normal((*pixels.shape[:2], 1), dtype=np.float32)
    return _as_uint8(pixels + sensor * np.float32(noise))
