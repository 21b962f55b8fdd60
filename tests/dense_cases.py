"""What the tests of dense tasks share: a small stand-in for a backbone."""

import torch
from torch import Tensor, nn


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
