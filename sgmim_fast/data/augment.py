"""Crop, flip, resize and normalise: the same geometry for an image and its map, in every loader."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sgmim_fast.config import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_ATTEMPTS = 10

Box = tuple[int, int, int, int]


class Augmentation(NamedTuple):
    """A box in pixels of the stored image, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def random_resized_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a crop box (top, left, height, width) as torchvision's RandomResizedCrop does.

    Ten attempts at a uniform share of the area and a log-uniform aspect ratio; if none fits, the
    largest central box whose aspect ratio is allowed.

    Args:
        height: of the image, in pixels; so is width.
        scale: bounds of the share of the area.
        ratio: bounds of width / height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _central_box(height, width, aspect)


def _central_box(height: int, width: int, aspect: float) -> Box:
    """The largest central box of the given width / height."""
    h = max(1, min(height, round(width / aspect)))
    w = max(1, min(width, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_augmentation(rng: np.random.Generator, height: int, width: int, data: DataConfig) -> Augmentation:
    """Draw one pair's crop and flip for training, from ``sample_rng(..., STREAM_CROP)``."""
    box = random_resized_crop(rng, height, width, data.crop_scale, data.crop_ratio)
    return Augmentation(*box, flip=data.flip and bool(rng.random() < 0.5))


def central_augmentation(height: int, width: int, size: tuple[int, int]) -> Augmentation:
    """The largest central box of the target's shape, not flipped: short side to size, then centre crop."""
    return Augmentation(*_central_box(height, width, size[1] / size[0]), flip=False)


def crop(values: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """The box of an array (H, W, ...), a view."""
    top, left, height, width, _ = augmentation
    return values[top : top + height, left : left + width]


def finish_image(pixels: torch.Tensor, flip: bool, size: tuple[int, int]) -> torch.Tensor:
    """Resize (bilinear, antialiased, to 8 bits), flip and normalise a crop.

    Args:
        pixels: (h, w, 3) uint8, RGB.
        size: (height, width) of the result in pixels.

    Returns:
        (3, height, width) float32, contiguous, ImageNet mean and std removed.
    """
    # Channels last is what PyTorch's 8-bit kernel is fast for.
    resized = F.interpolate(pixels.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True)[0]
    return normalize_image(resized.flip(-1) if flip else resized)


def normalize_image(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) uint8 RGB to float32, contiguous, less the ImageNet mean and over its std."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    values = image.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def finish_structure(values: torch.Tensor, flip: bool, size: tuple[int, int]) -> torch.Tensor:
    """Resize (bilinear with half-pixel centres, not antialiased) and flip the crop of a map.

    Antialiasing would average depths across edges into depths that nothing in the scene has.

    Args:
        values: (C, h, w) float32.
        size: (height, width) of the result in pixels.

    Returns:
        (C, height, width) float32, contiguous.
    """
    resized = F.interpolate(values[None], size=size, mode="bilinear", align_corners=False, antialias=False)[0]
    return resized.flip(-1) if flip else resized.contiguous()
