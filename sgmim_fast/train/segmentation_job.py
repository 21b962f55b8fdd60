"""Fine-tuning semantic segmentation."""

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.config import SegmentationConfig, SegmentationRunConfig
from sgmim_fast.data.dense.folders import Split
from sgmim_fast.data.dense.opening import open_labels
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.tasks.evaluation import SegmentationCounts
from sgmim_fast.train.finetune_job import FinetuneJob


class SegmentationJob(FinetuneJob[SegmentationRunConfig]):
    """Images with a class a pixel."""

    kind = "segmentation"
    losses = ("loss", "segmentation_loss", "auxiliary_loss")
    sources = ("image",)
    fixed = (
        "segmentation.classes",
        "segmentation.head_channels",
        "segmentation.auxiliary",
        "backbone.name",
        "backbone.window_size",
        "backbone.image_size",
    )

    @property
    def head(self) -> SegmentationConfig:
        return self.config.segmentation

    @property
    def crop(self) -> tuple[int, int]:
        return self.config.data.crop_size

    def open_split(self, split: Split) -> DenseSamples:
        return open_labels(self.config.data, split, classes=self.config.segmentation.classes)

    def target(self, size: int, height: int, width: int) -> dict[str, Tensor]:
        return {"label": torch.zeros(size, height, width, dtype=torch.int64)}

    def counts(self, device: torch.device) -> SegmentationCounts:
        return SegmentationCounts(self.config.segmentation, self.config.evaluation, device)

    def notes(self) -> dict[str, Any]:
        return {"class_names": self.train_split.class_names}
