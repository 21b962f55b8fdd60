"""Random changes of colour, on 8-bit RGB.

Brightness, contrast and gamma are tables of 256 entries. Hue, saturation and value are moved in Pillow's 8-bit HSV, as
the recipes move them in OpenCV's.
"""

import numpy as np
from PIL import Image

from sgmim_fast.config import DepthDataConfig

_LEVELS = np.arange(256, dtype=np.float64)
_HUES = 255  # steps of Pillow's full circle: 255 is red again


def _table(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def linear_table(factor: float, offset: float) -> np.ndarray:
    """value * factor + offset for each of 256 values, (256,) uint8."""
    return _table(_LEVELS * factor + offset)


def gamma_table(power: float) -> np.ndarray:
    """Values in 0..1 raised to a power, (256,) uint8."""
    return _table(255 * (_LEVELS / 255) ** power)


def change_hsv(pixels: np.ndarray, degrees: float, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Turn the hue and map saturation and value, each of 0..255, by tables.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        saturation: (256,) uint8; so is ``value``.
    """
    hsv = Image.fromarray(pixels).convert("HSV")
    hue = (np.arange(256) + round(degrees / 360 * _HUES)) % _HUES
    turned = hsv.point([*hue.tolist(), *saturation.tolist(), *value.tolist()])
    return np.asarray(turned.convert("RGB"))


def change_depth_colors(pixels: np.ndarray, rng: np.random.Generator, config: DepthDataConfig) -> np.ndarray:
    """Contrast and brightness, then gamma, then hue, saturation and value: each in half of the samples.

    Source of the order, shares and default strengths: MIM-Depth-Estimation and GLPDepth, which take albumentations'.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        rng: of ``STREAM_COLOR``; the same numbers are drawn whatever is switched off.
    """
    coins = rng.random(3) < 0.5
    shares = rng.uniform(-1, 1, 6)
    if coins[0] and config.brightness_contrast:
        contrast, brightness = config.brightness_contrast * shares[:2]
        pixels = linear_table(1 + contrast, 255 * brightness)[pixels]
    if coins[1] and config.gamma:
        pixels = gamma_table(1 + config.gamma * shares[2])[pixels]
    if coins[2] and any(config.hue_saturation_value):
        hue, saturation, value = config.hue_saturation_value * shares[3:]
        pixels = change_hsv(pixels, hue, linear_table(1, saturation), linear_table(1, value))
    return pixels


BRIGHTNESS, HUE = 32.0, 36.0  # levels of 255; degrees
CONTRAST = SATURATION = (0.5, 1.5)


def distort_photometrically(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation, hue: each in half of the samples, contrast second or last.

    Source: mmsegmentation's PhotoMetricDistortion, with its strengths.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        rng: of ``STREAM_COLOR``.
    """
    brighter, contrasted, saturated, turned, contrast_last = (rng.random(5) < 0.5).tolist()
    brightness, hue = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(-HUE, HUE)
    contrast, saturation = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    if brighter:
        pixels = linear_table(1, brightness)[pixels]
    if contrasted and not contrast_last:
        pixels = linear_table(contrast, 0)[pixels]
    if saturated or turned:
        stronger = linear_table(saturation if saturated else 1, 0)
        pixels = change_hsv(pixels, hue if turned else 0, stronger, linear_table(1, 0))
    if contrasted and contrast_last:
        pixels = linear_table(contrast, 0)[pixels]
    return pixels
