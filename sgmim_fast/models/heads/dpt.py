"""Depth from all four maps: the decoder of DPT (arXiv 2103.13413), as segmentation_models_pytorch builds it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgmim_fast.errors import UserError
from sgmim_fast.models.batch_norm import sync_batch_norms
from sgmim_fast.models.heads.maps import at_least_float32, cut

_STRIDES = (4, 8, 16, 32)  # what the decoder brings its maps to


class DPTHead(nn.Module):
    """Maps brought to strides 4 to 32, fused from the coarsest to the finest, and three convolutions.

    Args:
        channels: of the backbone's four maps.
        strides: of those, in pixels, divisors of 32: 4, 8, 16, 32, or a ViT's own of 8 or 16 for all.
        filters: channels of the last hidden layer; the fusion has eight times and the layer after it four times as
            many. DPT has 32, 256 and 128.
        max_depth: metres that the sigmoid's 1 stands for.

    Raises:
        UserError: if there are not four maps, or a stride is another.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], filters: int, max_depth: float) -> None:
        super().__init__()
        # Imported here: it loads timm, which nothing else of the models needs.
        from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder

        if len(strides) != len(_STRIDES) or any(_STRIDES[-1] % stride for stride in strides):
            raise UserError(
                f'head "dpt" takes four maps whose strides divide 32, not {tuple(strides)}; choose four out_indices, '
                'or head "glp"'
            )
        self.strides, self.max_depth = tuple(strides), max_depth
        fused = 8 * filters
        self.decoder = DPTDecoder(
            encoder_out_channels=channels,
            encoder_output_strides=strides,
            encoder_has_prefix_tokens=False,
            readout="ignore",
            intermediate_channels=channels,
            fusion_channels=fused,
        )
        sync_batch_norms(self.decoder)
        self.narrow = nn.Conv2d(fused, 4 * filters, 3, padding=1)
        self.last = nn.Sequential(
            nn.Conv2d(4 * filters, filters, 3, padding=1), nn.ReLU(True), nn.Conv2d(filters, 1, 1)
        )

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Depth (B, 1, H, W) in metres, float32 or wider, for an image of ``size``."""
        # Fusion doubles exactly, so every map must cover the same whole number of the coarsest one's pixels.
        cells = [-(-side // _STRIDES[-1]) for side in size]
        maps = [
            _complete(x, (cells[0] * _STRIDES[-1] // stride, cells[1] * _STRIDES[-1] // stride))
            for x, stride in zip(features, self.strides, strict=True)
        ]
        x = self.narrow(self.decoder(maps, [None] * len(maps)))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return torch.sigmoid(at_least_float32(cut(self.last(x), size))) * self.max_depth


def _complete(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat the last row and column until (B, C, h, w) has that size."""
    down, right = size[0] - x.shape[-2], size[1] - x.shape[-1]
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
