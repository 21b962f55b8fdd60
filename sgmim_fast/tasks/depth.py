"""Monocular depth estimation: a backbone, a head, and what happens to a loader's batch until its loss."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from sgmim_fast.config import DepthConfig
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.models.heads.dpt import DPTHead
from sgmim_fast.models.heads.glp import GLPHead
from sgmim_fast.tasks.losses import silog_loss


class DepthOutput(NamedTuple):
    """Scalar loss of one batch."""

    loss: Tensor


class DepthTask(nn.Module):
    """Depth in metres of images of any size.

    Args:
        backbone: images to maps; its ``channels`` and ``strides`` say of which shape.
        config: the head, the range of depths and the loss.
    """

    def __init__(self, backbone: Backbone, config: DepthConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = make_depth_head(backbone.channels, backbone.strides, config)

    def forward(self, batch: Mapping[str, Tensor]) -> DepthOutput:
        """SILog of a batch: ``image`` (B, 3, H, W) normalised, ``depth`` (B, 1, H, W) metres, 0 where unknown."""
        config = self.config
        depth = self._depth(batch["image"])
        return DepthOutput(silog_loss(depth, batch["depth"], config.silog_lambda, config.min_depth, config.max_depth))

    def predict(self, image: Tensor) -> Tensor:
        """Depth (B, 1, H, W) in metres, float32, of (B, 3, H, W); in the mode, training or not, the module is in."""
        return self._depth(image).float()

    def _depth(self, image: Tensor) -> Tensor:
        dtype = next(self.head.parameters()).dtype
        return self.head(self.backbone(image.to(dtype)), (image.shape[-2], image.shape[-1]))


def make_depth_head(channels: tuple[int, ...], strides: tuple[int, ...], config: DepthConfig) -> nn.Module:
    """The head that ``config`` names, for maps of those channels and strides."""
    if config.head == "dpt":
        return DPTHead(channels, strides, config.head_channels, config.max_depth)
    return GLPHead(channels, strides[-1], config.head_channels, config.max_depth)
