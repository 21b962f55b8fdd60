"""Predictions as pictures for people: bytes (H, W, 3) in sRGB."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sgmim_fast.colors import class_colors, colorize
from sgmim_fast.config import IGNORED_LABEL
from sgmim_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD

Picture = NDArray[np.uint8]
UNKNOWN = 96
"""Grey of pixels without a value."""


@dataclass(frozen=True)
class LegendEntry:
    """A class of a picture."""

    label: int
    name: str
    color: str
    """As CSS writes it, ``#rrggbb``."""
    share: float
    """Of the pixels that have a class."""


def image_picture(image: Tensor) -> Picture:
    """An ImageNet-normalised image (3, H, W) as it looked."""
    pixels = image.detach().float().cpu().permute(1, 2, 0).numpy()
    return np.rint(np.clip(pixels * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN), 0, 1) * 255).astype(np.uint8)


def depth_limits(*depths: Tensor) -> tuple[float, float]:
    """Metres from the nearest to the farthest two hundredths of what is known in all of (..., H, W).

    One scale for several maps, such as prediction and measurement, makes them comparable. (0, 1) if nothing is known.
    """
    known = np.concatenate([values[_known(values)] for values in map(_array, depths)])
    if not known.size:
        return 0.0, 1.0
    low, high = np.quantile(known, (0.02, 0.98))
    return float(low), float(high)


def depth_picture(depth: Tensor, limits: tuple[float, float] | None = None) -> Picture:
    """Depth (H, W) in colours from near, bright, to far, dark; grey where it is 0 or no finite number.

    Args:
        depth: metres.
        limits: depths of the two ends of the scale, ``depth_limits`` unless given.
    """
    values = _array(depth)
    low, high = limits or depth_limits(depth)
    known = _known(values)
    picture = colorize(-np.where(known, values, high), -high, -low, "structure")
    picture[~known] = UNKNOWN
    return picture


def class_picture(labels: Tensor, classes: int) -> Picture:
    """Classes (H, W) in one colour each; grey where the label is 255 or no class."""
    values = labels.detach().cpu().numpy()
    known = (values >= 0) & (values < classes)
    picture = class_colors(classes)[np.where(known, values, 0)]
    picture[~known] = UNKNOWN
    return picture


def class_legend(labels: Tensor, names: Sequence[str]) -> list[LegendEntry]:
    """The classes in (H, W), the largest first, in the colours of ``class_picture(labels, len(names))``."""
    values = labels.detach().cpu().numpy()
    counts = np.bincount(values[(values >= 0) & (values < len(names)) & (values != IGNORED_LABEL)].ravel())
    present = sorted(np.flatnonzero(counts).tolist(), key=lambda label: (-counts[label], label))
    colors = class_colors(len(names))
    return [
        LegendEntry(label, names[label], "#" + bytes(colors[label]).hex(), float(counts[label] / counts.sum()))
        for label in present
    ]


def overlay(image: Picture, picture: Picture, weight: float = 0.6) -> Picture:
    """``picture`` over ``image`` of the same size, with that share of the colour."""
    return np.rint((1 - weight) * image + weight * picture).astype(np.uint8)


def side_by_side(*pictures: Picture, gap: int = 8) -> Picture:
    """Pictures of the same height in a row, with white pixels between them."""
    parts: list[Picture] = []
    for picture in pictures:
        if parts:
            parts.append(np.full((picture.shape[0], gap, 3), 255, dtype=np.uint8))
        parts.append(picture)
    return np.concatenate(parts, axis=1)


def _array(depth: Tensor) -> NDArray[np.float32]:
    return depth.detach().float().cpu().numpy()


def _known(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.isfinite(values) & (values > 0)
