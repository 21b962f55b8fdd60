"""Fine-tuning monocular depth."""

import torch
from torch import Tensor

from sgmim_fast.config import DepthConfig, DepthRunConfig
from sgmim_fast.data.dense.folders import Split
from sgmim_fast.data.dense.opening import open_depth
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.tasks.evaluation import DepthCounts
from sgmim_fast.train.finetune_job import FinetuneJob


class DepthJob(FinetuneJob[DepthRunConfig]):
    """Images with depth in metres."""

    kind = "depth"
    losses = ("loss",)
    sources = ("image", "depth")
    fixed = ("depth.head", "backbone.name", "backbone.window_size", "backbone.image_size")

    @property
    def head(self) -> DepthConfig:
        return self.config.depth

    @property
    def crop(self) -> tuple[int, int]:
        return self.config.data.crop

    def open_split(self, split: Split) -> DenseSamples:
        return open_depth(self.config.data, split, max_depth=self.config.depth.max_depth)

    def target(self, size: int, height: int, width: int) -> dict[str, Tensor]:
        return {"depth": torch.empty(size, 1, height, width)}

    def counts(self, device: torch.device) -> DepthCounts:
        return DepthCounts(self.config.depth, self.config.evaluation, device)
