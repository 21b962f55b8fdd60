"""Testing a task on whole images, one after the other."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgmim_fast.config import DepthConfig, DepthEvalConfig, SegmentationConfig, SegmentationEvalConfig
from sgmim_fast.data.dense.evaluation import EvaluationSample
from sgmim_fast.tasks.depth_metrics import DepthMetrics
from sgmim_fast.tasks.inference import predict_classes, predict_depth
from sgmim_fast.tasks.segmentation_metrics import SegmentationMetrics


class Counts(ABC):
    """What an evaluation has counted so far. Those of several ranks add up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    @abstractmethod
    def state(self) -> Tensor:
        """To be added to that of other ranks, in place."""

    @abstractmethod
    def predict(self, task: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(1, c, H, W) as the protocol asks for, of an image (1, 3, h, w) on the device."""

    @abstractmethod
    def update(self, prediction: Tensor, sample: EvaluationSample) -> None:
        """Count one image."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Figures by name.

        Raises:
            UserError: if nothing could be counted.
        """

    def details(self, class_names: Sequence[str] | None) -> dict[str, float]:
        """More figures than ``compute`` gives, by name."""
        return {}

    @torch.no_grad()
    def count(self, task: Any, sample: EvaluationSample, *, counted: bool = True) -> Tensor:
        """Predict one image, and count it unless told not to. Returns the prediction."""
        height, width = sample.target.shape[-2:]
        prediction = self.predict(task, sample.image[None].to(self.device), (height, width))
        if counted:
            self.update(prediction, sample)
        return prediction


class DepthCounts(Counts):
    """Of ``DepthMetrics``."""

    def __init__(self, depth: DepthConfig, settings: DepthEvalConfig, device: torch.device) -> None:
        super().__init__(device)
        self.settings = settings
        self.metrics = DepthMetrics(depth.min_depth, depth.max_depth, settings.crop, device)

    @property
    def state(self) -> Tensor:
        return self.metrics.state

    def predict(self, task: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
        return predict_depth(task.predict, image, self.settings)

    def update(self, prediction: Tensor, sample: EvaluationSample) -> None:
        self.metrics.update(prediction, sample.target.to(self.device)[None, None])

    def compute(self) -> dict[str, float]:
        return {**self.metrics.compute(), "images": self.metrics.images, "skipped_images": self.metrics.skipped}


class SegmentationCounts(Counts):
    """Of ``SegmentationMetrics``."""

    def __init__(self, config: SegmentationConfig, settings: SegmentationEvalConfig, device: torch.device) -> None:
        super().__init__(device)
        self.settings = settings
        self.metrics = SegmentationMetrics(config.classes, device)

    @property
    def state(self) -> Tensor:
        return self.metrics.state

    def predict(self, task: Any, image: Tensor, size: tuple[int, int]) -> Tensor:
        return predict_classes(task.predict, image, self.settings, size)

    def update(self, prediction: Tensor, sample: EvaluationSample) -> None:
        self.metrics.update(prediction, sample.target.to(self.device)[None])

    def compute(self) -> dict[str, float]:
        return self.metrics.compute()

    def details(self, class_names: Sequence[str] | None) -> dict[str, float]:
        """Intersection over union of each class that is labelled or predicted."""
        names = class_names or [str(number) for number in range(self.metrics.classes)]
        found = zip(names, self.metrics.class_iou().tolist(), strict=True)
        return {f"IoU {name}": value for name, value in found if not math.isnan(value)}
