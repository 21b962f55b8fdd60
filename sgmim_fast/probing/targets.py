"""What tokens are to predict, and how predictions are scored in full size: depth, or classes."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.config import IGNORED_LABEL, DepthCrop
from sgmim_fast.data.dense.crops import Crop, resized_labels
from sgmim_fast.data.dense.evaluation import EvaluationSample
from sgmim_fast.probing.grid import cell_sums, to_pixels
from sgmim_fast.tasks.depth_metrics import DepthMetrics
from sgmim_fast.tasks.segmentation_metrics import SegmentationMetrics


class Cells(NamedTuple):
    """The target on the grid."""

    values: Tensor
    """(T, h, w) float32: means over the pixels of each cell that have a target; 0 where none has."""
    weight: Tensor
    """(h, w) float32: how many have."""


class Scores(ABC):
    """Metrics of one predictor."""

    @abstractmethod
    def update(self, prediction: Tensor, sample: EvaluationSample) -> None:
        """Count an image, of which (T, H, W) was predicted."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Figures by name.

        Raises:
            UserError: if nothing could be counted.
        """


class Target(ABC):
    """A kind of target."""

    size: int
    """Numbers a token (T)."""

    @abstractmethod
    def cells(self, sample: EvaluationSample, stride: int) -> Cells:
        """A sample's target on the grid of its image."""

    @abstractmethod
    def scores(self) -> Scores:
        """A new count."""


class DepthTarget(Target):
    """The logarithm of depth.

    A token's target is the mean over its valid pixels and its weight their number, so that weighted least squares on
    tokens is least squares on pixels that all have their token's features.

    Args:
        min_depth: metres; nearer pixels are not valid.
        max_depth: metres; pixels from there on are not valid.
        crop: the part of each image that counts in the scores.
    """

    size = 1

    def __init__(self, min_depth: float, max_depth: float, crop: DepthCrop) -> None:
        self.min_depth, self.max_depth, self.crop = min_depth, max_depth, crop

    def cells(self, sample: EvaluationSample, stride: int) -> Cells:
        depth = sample.target
        valid = (depth > self.min_depth) & (depth < self.max_depth)
        logs = torch.where(valid, depth, 1).log()
        sums = cell_sums(torch.stack([logs, valid.float()]), stride)
        return Cells(sums[:1] / sums[1].clamp(min=1), sums[1])

    def scores(self) -> Scores:
        return _DepthScores(DepthMetrics(self.min_depth, self.max_depth, self.crop))


class _DepthScores(Scores):
    def __init__(self, metrics: DepthMetrics) -> None:
        self.metrics = metrics

    def update(self, prediction: Tensor, sample: EvaluationSample) -> None:
        self.metrics.update(prediction[None].exp(), sample.target[None, None])

    def compute(self) -> dict[str, float]:
        return self.metrics.compute()


class ClassTarget(Target):
    """The classes of pixels.

    A token's target is the share of each class among its labelled pixels and its weight their number, so that weighted
    cross-entropy on tokens is cross-entropy on pixels that all have their token's features.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        self.size = classes

    def cells(self, sample: EvaluationSample, stride: int) -> Cells:
        label = sample.target
        height, width = sample.image.shape[-2:]
        if label.shape != (height, width):  # the image was resized to be predicted from
            whole = Crop(slice(0, height), slice(0, width))
            label = torch.from_numpy(resized_labels(label.numpy(), (height, width), whole))
        rows, columns = -(-height // stride), -(-width // stride)
        cell = (torch.arange(height) // stride * columns)[:, None] + torch.arange(width) // stride
        labelled = label != IGNORED_LABEL
        places = (cell * self.size + label)[labelled]
        counts = places.bincount(minlength=rows * columns * self.size).float()
        values = counts.view(rows, columns, self.size).movedim(-1, 0)
        weight = values.sum(0)
        return Cells(values / weight.clamp(min=1), weight)

    def scores(self) -> Scores:
        return _ClassScores(SegmentationMetrics(self.size))


class _ClassScores(Scores):
    def __init__(self, metrics: SegmentationMetrics) -> None:
        self.metrics = metrics

    def update(self, prediction: Tensor, sample: EvaluationSample) -> None:
        self.metrics.update(prediction[None], sample.target[None])

    def compute(self) -> dict[str, float]:
        return self.metrics.compute()


def best_on_grid(cells: Cells, stride: int, image: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The target on the grid, brought to pixels as predictions are: (T, *size).

    Between cells of which one has no target the others count alone.
    """
    known = (cells.weight > 0).float()[None]
    share = to_pixels(known, stride, image, size)
    return to_pixels(cells.values * known, stride, image, size) / share.clamp(min=1e-6)
