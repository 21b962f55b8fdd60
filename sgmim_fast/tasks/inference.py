"""How predictions are made in tests: mirrored images, windows, crops.

Pure functions over a callable that predicts images (B, 3, H, W) as maps (B, c, H, W). Windows and mirror images are
averaged where they meet, so what a pixelwise predictor says does not change.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast.config import DepthEvalConfig, SegmentationEvalConfig
from sgmim_fast.errors import UserError

Predict = Callable[[Tensor], Tensor]
Place = tuple[int, int]
"""Row and column of a window's upper left pixel."""


def predict_depth(predict: Predict, image: Tensor, settings: DepthEvalConfig, at_once: int = 8) -> Tensor:
    """Depth (B, 1, H, W) of (B, 3, H, W) as ``settings`` ask for it.

    Args:
        predict: images to depth in metres.
        image: normalised.
        settings: windows and mirror images.
        at_once: windows of each image that are predicted together.
    """
    mirrored = flip_average(predict) if settings.flip else predict
    return shifted_windows(mirrored, image, settings.windows, at_once)


def predict_classes(
    predict: Predict,
    image: Tensor,
    settings: SegmentationEvalConfig,
    size: tuple[int, int] | None = None,
    at_once: int = 8,
) -> Tensor:
    """Probabilities (B, classes, H, W) of (B, 3, H, W) as ``settings`` ask for them.

    As in mmsegmentation, windows average logits and mirror images average probabilities.

    Args:
        predict: images to logits.
        image: normalised.
        settings: windows and mirror images.
        size: height and width that the logits are brought to, bilinearly, such as those of the label map; None for the
            image's.
        at_once: windows of each image that are predicted together.
    """

    def probabilities(image: Tensor) -> Tensor:
        if settings.mode == "whole":
            logits = predict(image)
        else:
            logits = sliding_window(predict, image, settings.crop, settings.stride, at_once)
        if size is not None and size != tuple(logits.shape[-2:]):
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits.softmax(1)

    return flip_average(probabilities)(image) if settings.flip else probabilities(image)


def flip_average(predict: Predict) -> Predict:
    """A predictor that averages what is said of an image and of its mirror image, mirrored back."""

    def averaged(image: Tensor) -> Tensor:
        return (predict(image) + predict(image.flip(-1)).flip(-1)) / 2

    return averaged


def shifted_places(size: tuple[int, int], count: int) -> list[Place]:
    """Places of ``count`` windows as wide as the image is high, evenly spread over its width.

    MIM-Depth-Estimation steps by the whole pixels in (width - height) / (count - 1). Where that leaves columns over at
    the right, 9 of KITTI's 1216, nothing is predicted there; here the last window ends with the image.

    Raises:
        UserError: if so few windows cannot cover the image.
    """
    slack = size[1] - size[0]
    if count == 1 or slack <= 0:
        return [(0, 0)]
    lefts = _lefts(slack, count)
    if _widest_step(lefts) > size[0]:
        enough = next(more for more in itertools.count(count) if _widest_step(_lefts(slack, more)) <= size[0])
        raise UserError(
            f"evaluation.windows {count} leaves columns of an image of {size[0]} x {size[1]} pixels out; choose "
            f"{enough}, or 1 for the whole image"
        )
    return [(0, left) for left in lefts]


def _lefts(slack: int, count: int) -> list[int]:
    step = slack // (count - 1)
    return sorted({*(number * step for number in range(count - 1)), slack})


def _widest_step(lefts: list[int]) -> int:
    return max(after - before for before, after in itertools.pairwise(lefts))


def shifted_windows(predict: Predict, image: Tensor, count: int, at_once: int = 8) -> Tensor:
    """MIM-Depth-Estimation's test: the averages over ``count`` square windows; see ``shifted_places``.

    One window, and an image that is not wider than high, is predicted whole.
    """
    height, width = image.shape[-2:]
    if count == 1 or width <= height:
        return predict(image)
    return _averaged(predict, image, shifted_places((height, width), count), (height, height), at_once)


def sliding_places(size: tuple[int, int], crop: int, stride: int) -> list[Place]:
    """mmsegmentation's grid: windows every ``stride`` pixels, the last ones moved back to end with the image."""

    def starts(side: int) -> list[int]:
        count = max(side - crop + stride - 1, 0) // stride + 1
        return [min(number * stride, max(side - crop, 0)) for number in range(count)]

    return [(top, left) for top in starts(size[0]) for left in starts(size[1])]


def sliding_window(predict: Predict, image: Tensor, crop: int, stride: int, at_once: int = 8) -> Tensor:
    """The averages over square windows of side ``crop``; see ``sliding_places``.

    An image smaller than that on a side is completed with zeros to the right and below, and the prediction cut back.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, max(crop - width, 0), 0, max(crop - height, 0)))
    places = sliding_places((padded.shape[-2], padded.shape[-1]), crop, stride)
    return _averaged(predict, padded, places, (crop, crop), at_once)[..., :height, :width]


def _averaged(
    predict: Predict, image: Tensor, places: Sequence[Place], window: tuple[int, int], at_once: int
) -> Tensor:
    batch, _, height, width = image.shape
    total: Tensor | None = None
    count = image.new_zeros(height, width, dtype=torch.float32)
    for first in range(0, len(places), at_once):
        some = places[first : first + at_once]
        parts = [image[..., top : top + window[0], left : left + window[1]] for top, left in some]
        predicted = predict(torch.cat(parts))
        if total is None:
            total = predicted.new_zeros(batch, predicted.shape[1], height, width)
        for (top, left), part in zip(some, predicted.split(batch), strict=True):
            total[..., top : top + window[0], left : left + window[1]] += part
            count[top : top + window[0], left : left + window[1]] += 1
    assert total is not None  # there is always a window
    return total / count.to(total.dtype)
