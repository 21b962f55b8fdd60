"""Depth from the last map alone: the decoder of MIM-Depth-Estimation (arXiv 2205.13543)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgmim_fast.errors import UserError
from sgmim_fast.models.batch_norm import SyncedBatchNorm
from sgmim_fast.models.heads.maps import at_least_float32, cut

DECONVOLUTIONS = 3
_MIM_DEPTH_NAMES = {
    "decoder.deconv_layers.": "deconvolve.",
    "decoder.conv_layers.": "convolve.",
    "last_layer_depth.": "last.",
}


class GLPHead(nn.Module):
    """Three transposed convolutions, a convolution, bilinear doublings to the image's size and two convolutions.

    Args:
        channels: of the backbone's maps; the last one is read, the first one sets the width of the convolutions. Where
            all are as wide, as a ViT's are, that is four times ``filters``.
        stride: of the last map, in pixels: 32 as in the original, or another power of two from 8 on, which takes
            fewer or more doublings.
        filters: channels of the transposed convolutions.
        max_depth: metres that the sigmoid's 1 stands for.

    Raises:
        UserError: if the stride is another.
    """

    def __init__(self, channels: Sequence[int], stride: int, filters: int, max_depth: float) -> None:
        super().__init__()
        if stride < 8 or stride & (stride - 1):
            raise UserError(f'the last map\'s stride {stride} must be 8, 16, 32 or more for head "glp"; choose "dpt"')
        self.max_depth = max_depth
        self.doublings = stride.bit_length() - 1 - DECONVOLUTIONS
        layers: list[nn.Module] = []
        for width in (channels[-1], filters, filters):
            layers += [
                nn.ConvTranspose2d(width, filters, 2, stride=2, bias=False),
                SyncedBatchNorm(filters),
                nn.ReLU(True),
            ]
        self.deconvolve = nn.Sequential(*layers)
        width = channels[0] if channels[0] < channels[-1] else 4 * filters
        self.convolve = nn.Sequential(nn.Conv2d(filters, width, 3, padding=1), SyncedBatchNorm(width), nn.ReLU(True))
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Depth (B, 1, H, W) in metres, float32 or wider, for an image of ``size``.

        Where the size is no multiple of the stride, what lies to the right of the image and below it is cut off.
        """
        x = self.convolve(self.deconvolve(features[-1]))
        for _ in range(self.doublings):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        logits = cut(self.last(x), size)
        return torch.sigmoid(at_least_float32(logits)) * self.max_depth


def from_mim_depth(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a MIM-Depth-Estimation checkpoint that a ``GLPHead`` has, under its names.

    Args:
        state: the checkpoint's ``model``, with or without the prefix ``module.`` of DataParallel; what belongs to the
            encoder is left out.
    """
    found = {}
    for key, value in state.items():
        bare = key.removeprefix("module.")
        for theirs, ours in _MIM_DEPTH_NAMES.items():
            if bare.startswith(theirs):
                found[ours + bare.removeprefix(theirs)] = value
    return found
