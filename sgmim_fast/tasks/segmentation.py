"""Semantic segmentation: a backbone, UPerNet and its auxiliary head, and a loader's batch until its losses."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from sgmim_fast.config import SegmentationConfig
from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.models.heads.upernet import FCNHead, UPerNetHead
from sgmim_fast.tasks.losses import pixel_cross_entropy

_AUXILIARY_MAP = 2


class SegmentationOutput(NamedTuple):
    """Scalar losses of one batch; ``auxiliary_loss``, not yet weighted, is None without that head."""

    loss: Tensor
    segmentation_loss: Tensor
    auxiliary_loss: Tensor | None


class SegmentationTask(nn.Module):
    """Classes of the pixels of images of any size.

    Args:
        backbone: images to maps, from the finest, each of them normalised; its ``channels`` and ``strides`` say of
            which shape.
        config: the heads and the weight of the auxiliary loss.

    Raises:
        UserError: if the backbone has fewer than three maps and an auxiliary head is asked for.
    """

    def __init__(self, backbone: Backbone, config: SegmentationConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        channels, strides = backbone.channels, backbone.strides
        self.head = UPerNetHead(channels, strides[0], config.head_channels, config.classes, config.dropout)
        self.auxiliary_head = None
        if config.auxiliary_weight:
            if len(channels) <= _AUXILIARY_MAP:
                raise UserError(
                    f"the auxiliary head reads the backbone's third map, and there are {len(channels)}; choose more "
                    "out_indices or segmentation.auxiliary_weight 0"
                )
            self.auxiliary_head = FCNHead(
                channels[_AUXILIARY_MAP],
                strides[_AUXILIARY_MAP],
                config.auxiliary_channels,
                config.classes,
                config.dropout,
            )

    def forward(self, batch: Mapping[str, Tensor]) -> SegmentationOutput:
        """Losses of a batch: ``image`` (B, 3, H, W) normalised, ``label`` (B, H, W) int64, 255 where ignored."""
        image, label = batch["image"], batch["label"]
        size = (image.shape[-2], image.shape[-1])
        features = self._features(image)
        loss = pixel_cross_entropy(self.head(features, size), label)
        if self.auxiliary_head is None:
            return SegmentationOutput(loss, loss, None)
        auxiliary = pixel_cross_entropy(self.auxiliary_head(features[_AUXILIARY_MAP], size), label)
        return SegmentationOutput(loss + self.config.auxiliary_weight * auxiliary, loss, auxiliary)

    def predict(self, image: Tensor) -> Tensor:
        """Logits (B, classes, H, W), float32, of (B, 3, H, W); in the mode, training or not, the module is in."""
        return self.head(self._features(image), (image.shape[-2], image.shape[-1])).float()

    def _features(self, image: Tensor) -> list[Tensor]:
        return self.backbone(image.to(next(self.head.parameters()).dtype))
