"""Segmentation heads: UPerNet (arXiv 1807.10221) as segmentation_models_pytorch builds it, and an auxiliary one."""

from collections.abc import Sequence

from torch import Tensor, nn

from sgmim_fast.models.batch_norm import SyncedBatchNorm, sync_batch_norms
from sgmim_fast.models.heads.maps import at_least_float32, upsample_to_image


class UPerNetHead(nn.Module):
    """Pooled pyramid on the last map, top-down fusion of all maps at the first one's stride, and a classifier.

    The backbone is to normalise all of its maps (``norm="all"``); the LayerNorms that the decoder has for this are left
    out.

    Args:
        channels: of the backbone's maps, from the finest.
        stride: of the first map, in pixels.
        width: channels of the decoder.
        classes: channels of the logits.
        dropout: share of channels dropped before the classifier in training.
    """

    def __init__(self, channels: Sequence[int], stride: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        # Imported here: it loads timm, which nothing else of the models needs.
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        self.stride = stride
        # The library's encoders give two finer maps first, which its decoder skips.
        self.decoder = UPerNetDecoder((0, 0, *channels), len(channels) + 1, width)
        self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in channels)
        sync_batch_norms(self.decoder)
        self.classifier = _classifier(width, classes, dropout)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, H, W) in float32 or wider for an image of ``size``."""
        finest = features[0]
        logits = self.classifier(self.decoder([finest, finest, *features]))
        return upsample_to_image(at_least_float32(logits), self.stride, size)


class FCNHead(nn.Module):
    """mmsegmentation's auxiliary head: a 3 x 3 convolution on one map and a classifier.

    Args:
        channels: of the map.
        stride: of the map, in pixels.
        width: channels of the convolution.
        classes: channels of the logits.
        dropout: share of channels dropped before the classifier in training.
    """

    def __init__(self, channels: int, stride: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.stride = stride
        self.convolve = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), SyncedBatchNorm(width), nn.ReLU(True)
        )
        self.classifier = _classifier(width, classes, dropout)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, H, W) in float32 or wider for an image of ``size``, from one map."""
        return upsample_to_image(at_least_float32(self.classifier(self.convolve(x))), self.stride, size)


def _classifier(width: int, classes: int, dropout: float) -> nn.Sequential:
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)
