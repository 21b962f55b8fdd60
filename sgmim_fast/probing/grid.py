"""From pixels to a grid of square cells and back. A cell that an edge of the image cuts has its part inside alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast.errors import UserError


def cell_sums(values: Tensor, stride: int) -> Tensor:
    """Sums (T, ceil(H / stride), ceil(W / stride)) over the cells of (T, H, W)."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (0, -width % stride, 0, -height % stride))
    return F.avg_pool2d(padded[None], stride, divisor_override=1)[0]


def cell_means(values: Tensor, stride: int) -> Tensor:
    """Means (T, ceil(H / stride), ceil(W / stride)) over the part of each cell that lies in (T, H, W)."""
    return F.avg_pool2d(values[None], stride, ceil_mode=True)[0]


def onto_grid(features: Tensor, stride: int, grid: int) -> Tensor:
    """A map (C, h, w) of one stride brought to another: averaged to a coarser one, bilinear to a finer one.

    The finer map may have a row and a column more than the image needs.

    Raises:
        UserError: if neither stride divides the other.
    """
    if grid % stride == 0:
        return cell_means(features, grid // stride)
    if stride % grid == 0:
        return _enlarged(features, stride // grid)
    raise UserError(f"a grid of {grid} pixels and a map of {stride} do not divide each other; choose another stride")


def to_pixels(prediction: Tensor, stride: int, image: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Predictions (T, h, w) of cells, bilinear between their centres, as (T, *size).

    Args:
        stride: pixels of the image a cell.
        image: (height, width) that was predicted on.
        size: (height, width) of the target, whatever the image was resized to.
    """
    full = _enlarged(prediction, stride)[:, : image[0], : image[1]]
    if image == size:
        return full
    return F.interpolate(full[None], size=size, mode="bilinear", align_corners=False)[0]


def _enlarged(values: Tensor, factor: int) -> Tensor:
    size = (values.shape[-2] * factor, values.shape[-1] * factor)
    return F.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]


def tokens_of(grid: Tensor) -> Tensor:
    """(T, h, w) as rows (h * w, T)."""
    return grid.flatten(1).T


def grid_of(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Rows (h * w, T) as (T, h, w), with the shape's h and w."""
    return tokens.T.unflatten(1, tuple(shape[-2:]))
