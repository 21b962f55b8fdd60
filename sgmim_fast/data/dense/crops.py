"""Geometry of training samples: the same for an image and its target, which is never interpolated."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sgmim_fast.config import IGNORED_LABEL, SegmentationDataConfig
from sgmim_fast.data.augment import normalize_image

_ATTEMPTS = 10  # crops that are drawn again for cat_max_ratio


class Crop(NamedTuple):
    """Rows and columns of an image, up to the crop's size; less where the image is smaller."""

    rows: slice
    columns: slice


def draw_crop(rng: np.random.Generator, height: int, width: int, size: tuple[int, int]) -> Crop:
    """A crop anywhere in an image; a side of the image that is shorter than the crop's is taken whole."""
    top = int(rng.integers(max(height - size[0], 0) + 1))
    left = int(rng.integers(max(width - size[1], 0) + 1))
    return Crop(slice(top, min(top + size[0], height)), slice(left, min(left + size[1], width)))


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """A copy in one piece; what Pillow hands out cannot be written to."""
    return torch.from_numpy(np.array(values, order="C"))


def finish(
    pixels: np.ndarray, target: np.ndarray, flip: bool, size: tuple[int, int], fill: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror, normalise, and pad at the bottom and the right to the crop's size.

    Args:
        pixels: (h, w, 3) uint8, RGB, not larger than the size; target: (h, w).
        fill: target of padded pixels; the image has the ImageNet mean there, which is 0.

    Returns:
        (3, height, width) float32, and the target (height, width) in its own type; both contiguous.
    """
    if flip:
        pixels, target = pixels[:, ::-1], target[:, ::-1]
    image = normalize_image(as_tensor(pixels).permute(2, 0, 1))
    values = as_tensor(target)
    height, width = target.shape
    if (height, width) != size:
        padding = (0, size[1] - width, 0, size[0] - height)
        image, values = F.pad(image, padding), F.pad(values, padding, value=fill)
    return image, values


def cut_depth(
    pixels: np.ndarray, metres: np.ndarray, rng: np.random.Generator, max_depth: float, width_share: float
) -> np.ndarray:
    """The image with a strip from top to bottom replaced by its depth as grey: 255 is ``max_depth`` or more, 0 invalid.

    The left edge is anywhere; the strip takes up to ``width_share`` of what lies right of it. Source: vertical CutDepth
    of GLPDepth (arXiv 2201.07436). Its code assigns stored units to 8-bit pixels, which wrap at 256; here they do not.

    Args:
        pixels: (H, W, 3) uint8; metres: (H, W) float32.
        rng: of ``STREAM_CUTDEPTH``.
    """
    total = pixels.shape[1]
    left = rng.random() * total
    width = max(int((total - left) * rng.random() * width_share), 1)
    strip = slice(int(left), int(left) + width)
    pixels = pixels.copy()
    pixels[:, strip] = np.rint(np.clip(metres[:, strip] / max_depth, 0, 1) * 255).astype(np.uint8)[..., None]
    return pixels


def fitted_size(height: int, width: int, bounds: tuple[float, float]) -> tuple[int, int]:
    """(height, width) of an image fitted into a (long, short) side, whichever way round it lies.

    The ratio of the sides is kept and one of the bounds is met, as mmsegmentation's keep_ratio does.
    """
    scale = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class ResizedCrop(NamedTuple):
    """What segmentation does to the geometry of a sample."""

    size: tuple[int, int]
    """(height, width) that the image is resized to."""
    crop: Crop
    """Of the resized image."""
    flip: bool


def draw_resized_crop(rng: np.random.Generator, labels: np.ndarray, config: SegmentationDataConfig) -> ResizedCrop:
    """Draw one sample's size, crop and flip.

    Args:
        rng: of ``STREAM_CROP``.
        labels: (H, W) uint8; a crop in which one class has ``cat_max_ratio`` of what is labelled is drawn again.
    """
    height, width = labels.shape
    flip = config.flip and bool(rng.random() < 0.5)
    factor = rng.uniform(*config.ratio_range)
    if config.resize is None:
        size = max(1, round(height * factor)), max(1, round(width * factor))
    else:
        size = fitted_size(height, width, (int(config.resize[0] * factor), int(config.resize[1] * factor)))
    crop = draw_crop(rng, *size, config.crop_size)
    if config.cat_max_ratio < 1:
        for _ in range(_ATTEMPTS):
            if _varied(resized_labels(labels, size, crop), config.cat_max_ratio):
                break
            crop = draw_crop(rng, *size, config.crop_size)
    return ResizedCrop(size, crop, flip)


def _varied(labels: np.ndarray, limit: float) -> bool:
    counts = np.bincount(labels.ravel(), minlength=IGNORED_LABEL + 1)[:IGNORED_LABEL]
    return int(np.count_nonzero(counts)) > 1 and int(counts.max()) < limit * int(counts.sum())


def resized_labels(labels: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    """A crop of labels (H, W) resized to a size: each pixel has the label nearest to its centre."""
    picked = [
        ((np.arange(part.start, part.stop) + 0.5) * (stored / side)).astype(np.int64)
        for part, stored, side in zip(crop, labels.shape, size, strict=True)
    ]
    return labels[np.ix_(*picked)]


def resized_pixels(pixels: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    """A crop of an image (H, W, 3) uint8 resized to a size: bilinear with half-pixel centres, as the recipe's."""
    whole = as_tensor(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(whole, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    return resized[crop.rows, crop.columns].contiguous().numpy()
