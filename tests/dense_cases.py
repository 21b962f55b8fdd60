"""What the tests of dense tasks share: small backbones, and a stand-in where what is in one does not matter."""

import torch
from torch import Tensor, nn

from sgmim_fast.config import BackboneConfig, Encoder
from sgmim_fast.models.backbone import Backbone

SWIN_DEPTHS = (2, 1, 3, 1)


class Maps(nn.Module):
    """Maps at strides 4, 8, 16 and 32 of images of any size, whose sizes are rounded up."""

    def __init__(self, channels: tuple[int, ...] = (8, 16, 16, 32), strides: tuple[int, ...] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.channels, self.strides = channels, strides
        self.blocks = nn.ModuleList(nn.Conv2d(3, width, 1) for width in channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        pool = torch.nn.functional.avg_pool2d
        return [
            block(pool(image, stride, ceil_mode=True)) for block, stride in zip(self.blocks, self.strides, strict=True)
        ]


def tiny_image(seed: int = 0, size: tuple[int, int] = (64, 96), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def tiny_backbone(encoder: Encoder, **fields: object) -> Backbone:
    """A Swin of ``SWIN_DEPTHS``, or a ViT of four blocks."""
    torch.manual_seed(0)
    shape: dict[str, object] = {"embed_dim": 8, "depths": SWIN_DEPTHS, "num_heads": (1, 2, 4, 8)}
    shape["window_size"] = (2,) * len(SWIN_DEPTHS)
    if encoder == "vit":
        shape = {"image_size": 64, "embed_dim": 8, "depths": (4,), "num_heads": (2,)}
    return Backbone(BackboneConfig(encoder=encoder, **shape | fields), "reference")  # type: ignore[arg-type]
