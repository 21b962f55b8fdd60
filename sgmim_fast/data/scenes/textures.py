"""Surface patterns for synthetic scenes, filtered by the size of a pixel on the surface.

A pattern is a function of metric surface coordinates. Without filtering, a distant checkerboard
would be noise that no model can predict; so every edge is averaged over the pixel's footprint.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

PATTERNS = (
    "plain",
    "checker",
    "stripes",
    "bricks",
    "planks",
    "noise",
    "camouflage",
    "wood",
    "marble",
    "spots",
    "patchwork",
)

UNSEEN_PATTERNS = ("rings", "zigzag", "weave", "hexagons")
"""Those that only scenes of the test split show."""

_HUE_SHIFTS = np.array([0.0, 4.0, 2.0])
_LATTICE = 64  # period of the noise, in cells; a power of two


@dataclass(frozen=True, eq=False)
class Material:
    """How one surface looks; drawn without regard to what it covers."""

    pattern: str
    colors: F32
    """(3, 3), three linear RGB colours as rows."""
    period: float
    """Metres of one repetition."""
    angle: float
    shift: tuple[float, float]
    """Metres by which the pattern is moved."""
    knobs: tuple[float, float, float]
    """Uniform draws in [0, 1) that a pattern uses as it likes."""
    grime: float
    """Strength of the fractal noise over everything."""
    gloss: float
    shininess: float
    wrapped: bool
    """On round solids: the pattern runs around the axis; otherwise it is projected onto them."""


def draw_material(rng: np.random.Generator, size: float) -> Material:
    """A random material for a surface of about ``size`` metres."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    return Material(
        pattern=pattern,
        colors=draw_colors(rng, 3),
        period=float(size * np.exp(rng.uniform(np.log(0.18), np.log(1.2)))),
        angle=(0.0, np.pi / 2, rng.uniform(0, np.pi))[rng.integers(3)],
        shift=(float(rng.uniform(0, 50)), float(rng.uniform(0, 50))),
        knobs=(float(rng.uniform()), float(rng.uniform()), float(rng.uniform())),
        grime=float(rng.uniform(0.0, 0.45) if rng.uniform() < 0.6 else 0.0),
        gloss=float(rng.uniform(0.1, 0.7) if rng.uniform() < 0.4 else 0.0),
        shininess=float(np.exp(rng.uniform(np.log(6), np.log(120)))),
        wrapped=bool(rng.uniform() < 0.6),
    )


def draw_colors(rng: np.random.Generator, count: int) -> F32:
    """Random linear RGB albedos (count, 3): any hue or an earthy one; vivid, muted or grey; dark to light."""
    kind, depth, value, hue, earthy = rng.uniform(size=(5, count, 1))
    hue = np.where(earthy < 0.35, 0.05 + 0.08 * hue, hue)
    low, high = (
        np.select([kind < 0.35, kind < 0.8], [0.5, 0.1]),
        np.select([kind < 0.35, kind < 0.8], [0.95, 0.5], 0.06),
    )
    saturation, value = low + (high - low) * depth, 0.15 + 0.8 * value
    wheel = np.clip(np.abs((hue * 6 + _HUE_SHIFTS) % 6 - 3) - 1, 0, 1)
    display = value * (1 - saturation * (1 - wheel))
    return (0.02 + 0.9 * display**2.2).astype(np.float32)


def albedo(material: Material, u: F32, v: F32, footprint: F32) -> F32:
    """Linear RGB (3, N) at surface coordinates ``u``, ``v`` in metres.

    Args:
        footprint: (N,) metres that a pixel covers on the surface.
    """
    cosine, sine = np.float32(np.cos(material.angle)), np.float32(np.sin(material.angle))
    scale = np.float32(1 / material.period)
    x = (cosine * u + sine * v + np.float32(material.shift[0])) * scale
    y = (cosine * v - sine * u + np.float32(material.shift[1])) * scale
    width = np.maximum(footprint * scale, np.float32(0.02))
    first, second, tint = _PATTERNS[material.pattern](material.knobs, x, y, width)
    a, b, c = (color[:, None] for color in material.colors)
    color = a + (b - a) * first
    if second is not None:
        color = color + (c - color) * second
    if material.grime > 0:
        dirt = fractal_noise(x * np.float32(1.7) + 11, y * np.float32(1.7) + 5, width * np.float32(1.7), 3)
        tint = tint * (1 + np.float32(2 * material.grime) * (dirt - np.float32(0.5)))
    return color * tint


def fractal_noise(x: F32, y: F32, width: F32, octaves: int) -> F32:
    """Noise (N,) in about [0, 1] whose octaves fade out where a pixel is wider than their cells."""
    total = np.full(x.shape, 0.5, dtype=np.float32)
    for octave in range(octaves):
        frequency = np.float32(2**octave)
        fade = np.clip(2 - 2 * width * frequency, 0, 1)
        if not fade.any():
            break
        shift = np.float32(17.3 * octave)
        total += fade * (_value_noise(x * frequency + shift, y * frequency - shift) - np.float32(0.5)) / frequency
    return total


@functools.cache
def _lattice() -> F32:
    """(4, 64 * 64) uniform numbers: one table of noise, three of cell hashes."""
    return np.random.default_rng(20240902).random((4, _LATTICE * _LATTICE), dtype=np.float32)


def _value_noise(x: F32, y: F32) -> F32:
    """Smoothly interpolated lattice of random values, cells of side 1."""
    table = _lattice()[0]
    left, top = np.floor(x), np.floor(y)
    fx, fy = x - left, y - top
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    i0, j0 = left.astype(np.int32) & (_LATTICE - 1), top.astype(np.int32) & (_LATTICE - 1)
    i1, j1 = (i0 + 1) & (_LATTICE - 1), ((j0 + 1) & (_LATTICE - 1)) * _LATTICE
    j0 = j0 * _LATTICE
    upper = table.take(i0 + j0)
    upper += (table.take(i1 + j0) - upper) * fx
    lower = table.take(i0 + j1)
    lower += (table.take(i1 + j1) - lower) * fx
    return upper + (lower - upper) * fy


def _cell_value(x: F32, y: F32, channel: int) -> F32:
    """One uniform number for every cell of side 1."""
    i, j = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    return _lattice()[1 + channel].take(((i + 29 * (j >> 6)) & (_LATTICE - 1)) + (j & (_LATTICE - 1)) * _LATTICE)


def _wave(x: F32, duty: float, width: F32) -> F32:
    """A wave of period 1 that is 1 during the first ``duty`` of it, averaged over ``width``."""

    share = np.float32(duty)
    x = x - np.floor(x)  # whole periods cancel in the difference; small numbers keep float32 exact
    low, high = x - width / 2, x + width / 2
    from_low, from_high = np.floor(low), np.floor(high)
    covered = (from_high - from_low) * share
    covered += np.minimum(high - from_high, share) - np.minimum(low - from_low, share)
    return covered / width


_Layers = tuple[F32, F32 | None, F32]  # blend towards the second colour, towards the third, brightness
_ONE = np.ones((), dtype=np.float32)


def _plain(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    return np.zeros_like(x), None, _ONE


def _checker(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    across, along = _wave(x, 0.5, width), _wave(y, 0.5, width)
    return across * along + (1 - across) * (1 - along), None, _ONE


def _stripes(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    broad = _wave(x, 0.2 + 0.6 * knobs[0], width)
    narrow = _wave(x + np.float32(knobs[1]), 0.08, width) if knobs[2] < 0.4 else None
    return broad, narrow, _ONE


def _courses(knobs: tuple[float, float, float], x: F32, y: F32, width: F32, length: float, joint: float) -> _Layers:
    """Rows of blocks with joints, every other row shifted; each block has a tint of its own."""
    rows = y * 2
    shift = np.floor(rows) * np.float32(0.5 if knobs[0] < 0.7 else 0.0)
    along = x / np.float32(length) + shift
    joints = 1 - (1 - _wave(along, joint / length, width / length)) * (1 - _wave(rows, 2 * joint, width * 2))
    sharp = np.clip(2 - 2 * width, 0, 1)
    spread = 0.2 + 0.8 * knobs[1]
    tint = 1 + np.float32(spread) * sharp * (_cell_value(along, rows, 0) - np.float32(0.5))
    mix = sharp * _cell_value(along, rows, 1) * np.float32(knobs[2])
    return mix, joints, tint


def _bricks(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    return _courses(knobs, x, y, width, length=1.0, joint=0.05)


def _planks(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    mix, joints, tint = _courses(knobs, x, y, width, length=4.0, joint=0.02)
    grain = fractal_noise(x, y * np.float32(14), width * np.float32(10), 2)
    return mix, joints, tint * (np.float32(0.6) + np.float32(0.8) * grain)


def _noise(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    broad = fractal_noise(x, y, width, 5)
    return np.clip(broad * 2 - np.float32(0.5), 0, 1), None, _ONE


def _camouflage(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    steep = 1 / np.maximum(width, np.float32(0.06))
    first = fractal_noise(x, y, width, 3)
    second = fractal_noise(x + 31, y + 7, width, 3)
    level = np.float32(0.4 + 0.2 * knobs[0])
    return np.clip((first - level) * steep + np.float32(0.5), 0, 1), np.clip((second - level) * steep, 0, 1), _ONE


def _wood(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    bend = fractal_noise(x * np.float32(0.4), y * np.float32(1.2), width, 2)
    phase = (y + np.float32(0.5 + 1.5 * knobs[0]) * bend) * np.float32(3)
    rings = (1 + np.cos(2 * np.float32(np.pi) * phase) * np.clip(2 - 12 * width, 0, 1)) / 2
    grain = fractal_noise(x * np.float32(2), y * np.float32(24), width * np.float32(16), 2)
    return rings * np.float32(0.8), None, np.float32(0.75) + np.float32(0.5) * grain


def _marble(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    bend = fractal_noise(x, y, width, 5)
    vein = np.abs(np.sin(np.float32(np.pi) * (x + np.float32(2 + 4 * knobs[0]) * bend)))
    return np.sqrt(vein), None, np.float32(0.8) + np.float32(0.4) * bend


def _spots(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    row = np.floor(y)
    x = np.add(x, row * np.float32(0.5))
    away = np.sqrt((x - np.floor(x) - np.float32(0.5)) ** 2 + (y - row - np.float32(0.5)) ** 2)
    radius = np.float32(0.15 + 0.3 * knobs[0])
    disc = np.clip((radius - away) / width + np.float32(0.5), 0, 1)
    share = np.float32(np.pi) * radius**2
    disc = disc + (share - disc) * np.clip(width * 2 - 1, 0, 1)
    return disc, disc * _cell_value(x, y, 2) * np.float32(knobs[1]), _ONE


def _patchwork(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    sharp = np.clip(2 - 2 * width, 0, 1)
    first, second, third = (sharp * (_cell_value(x, y, channel) - np.float32(0.5)) for channel in range(3))
    return first + np.float32(0.5), second + np.float32(0.5), 1 + third


def _rings(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    away = np.sqrt((x - np.floor(x) - np.float32(0.5)) ** 2 + (y - np.floor(y) - np.float32(0.5)) ** 2)
    return _wave(away * np.float32(4), 0.3 + 0.4 * knobs[0], width * np.float32(4)), None, _ONE


def _zigzag(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    bend = np.abs(x - np.floor(x) - np.float32(0.5)) * np.float32(0.6 + 1.2 * knobs[0])
    steep = np.float32(1.4)  # the slanted bands are narrower across than along y
    return _wave((y + bend) * 2, 0.3 + 0.4 * knobs[1], width * 2 * steep), None, _ONE


def _weave(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    duty = 0.55 + 0.3 * knobs[0]
    across, along = _wave(x * 2, duty, width * 2), _wave(y * 2, duty, width * 2)
    square = np.add(np.floor(x * 2), np.floor(y * 2), dtype=np.float32)
    over = _wave(square * np.float32(0.5), 0.5, np.full_like(width, 0.02))
    first = across * (over + (1 - over) * (1 - along))
    return first, along * (1 - first), _ONE


def _hexagons(knobs: tuple[float, float, float], x: F32, y: F32, width: F32) -> _Layers:
    scaled = y * np.float32(2 / np.sqrt(3))
    row = np.floor(scaled)
    u = np.abs(np.add(x, row * np.float32(0.5)) - np.floor(np.add(x, row * np.float32(0.5))) - np.float32(0.5))
    v = np.abs(scaled - row - np.float32(0.5))
    edge = np.maximum(u, u * np.float32(0.5) + v * np.float32(0.75))
    joint = np.clip((edge - np.float32(0.4)) / np.maximum(width, np.float32(0.02)) + np.float32(0.5), 0, 1)
    fade = np.clip(2 - 2 * width, 0, 1)
    shade = fade * _cell_value(x + row * np.float32(0.5), scaled, 0) * np.float32(knobs[0])
    return shade, joint * fade, _ONE


_PATTERNS = {
    "plain": _plain,
    "checker": _checker,
    "stripes": _stripes,
    "bricks": _bricks,
    "planks": _planks,
    "noise": _noise,
    "camouflage": _camouflage,
    "wood": _wood,
    "marble": _marble,
    "spots": _spots,
    "patchwork": _patchwork,
    "rings": _rings,
    "zigzag": _zigzag,
    "weave": _weave,
    "hexagons": _hexagons,
}
