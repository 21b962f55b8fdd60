"""Colour scales whose lightness rises evenly, as byte tables, and colours for classes.

Both are points in OKLCh (Ottosson's perceptual space). Between the knots of a scale lightness, chroma and hue are
interpolated, so equal steps of a value look like equal steps.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SCALES = {
    # lightness, chroma, hue in degrees, at even distances
    "structure": ((0.17, 0.07, 285), (0.37, 0.17, 308), (0.56, 0.20, 365), (0.76, 0.16, 415), (0.96, 0.09, 465)),
    "error": ((0.20, 0.03, 265), (0.40, 0.10, 255), (0.60, 0.12, 220), (0.80, 0.12, 170), (0.97, 0.09, 120)),
}
_LMS = np.array(((1, 0.3963377774, 0.2158037573), (1, -0.1055613458, -0.0638541728), (1, -0.0894841775, -1.2914855480)))
_RGB = np.array(
    (
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    )
)


@lru_cache(maxsize=8)
def color_table(name: str) -> NDArray[np.uint8]:
    """A scale of ``SCALES`` in 256 steps of sRGB, (256, 3)."""
    knots = np.array(SCALES[name])
    at = np.linspace(0, len(knots) - 1, 256)
    lightness, chroma, hue = (np.interp(at, np.arange(len(knots)), column) for column in knots.T)
    return _srgb(_linear(_lab(lightness, chroma, hue)))


@lru_cache(maxsize=8)
def class_colors(count: int) -> NDArray[np.uint8]:
    """(count, 3): one colour a class, each as far as can be from those before it; all counts begin alike."""
    grid = np.meshgrid(np.linspace(0.45, 0.93, 9), np.linspace(0.05, 0.25, 5), np.arange(0.0, 360.0, 10.0))
    lab = _lab(*(axis.ravel() for axis in grid))
    linear = _linear(lab)
    shown = ((linear >= 0) & (linear <= 1)).all(1)
    lab, linear = lab[shown], linear[shown]
    chosen = [0]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.square(lab - lab[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return _srgb(linear[chosen[:count]])


def _lab(lightness: NDArray[np.float64], chroma: NDArray[np.float64], hue: NDArray[np.float64]) -> NDArray[np.float64]:
    """OKLCh, hue in degrees, to OKLab (N, 3)."""
    return np.stack((lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))), 1)


def _linear(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """OKLab to linear sRGB (N, 3), which is outside 0 to 1 where no screen shows the colour."""
    return (lab @ _LMS.T) ** 3 @ _RGB.T


def _srgb(linear: NDArray[np.float64]) -> NDArray[np.uint8]:
    linear = np.clip(linear, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


def colorize(values: NDArray[np.float32], low: float, high: float, name: str) -> NDArray[np.uint8]:
    """Values (H, W) to colours (H, W, 3); what lies outside ``low``..``high`` takes the end's colour."""
    span = max(high - low, 1e-6)
    steps = np.clip((values - low) / span, 0, 1) * 255
    return color_table(name)[np.rint(steps).astype(np.intp)]


def css_gradient(name: str) -> str:
    """The scale as a CSS background, from left to right."""
    stops = ", ".join("#" + bytes(row).hex() for row in color_table(name)[:: 255 // 15])
    return f"linear-gradient(to right, {stops})"
