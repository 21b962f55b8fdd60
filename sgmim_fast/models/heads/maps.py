"""What heads share: bringing maps to the image's size, and the dtype of predictions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast.errors import UserError


def cut(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The upper left part of (..., H, W) that has the given size.

    A backbone completes the last patches and windows to the right and below, so the rest lies outside the image.

    Raises:
        UserError: if the map is smaller than that.
    """
    if x.shape[-2] < size[0] or x.shape[-1] < size[1]:
        raise UserError(
            f"a map of {x.shape[-2]} x {x.shape[-1]} pixels does not cover the image of {size[0]} x {size[1]}; the "
            "backbone's strides must be those of its maps"
        )
    return x[..., : size[0], : size[1]]


def upsample_to_image(x: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Bilinear enlargement by ``stride``, corners not aligned, cut to the image: (B, C, h, w) -> (B, C, H, W)."""
    scaled = (x.shape[-2] * stride, x.shape[-1] * stride)
    return cut(F.interpolate(x, scaled, mode="bilinear", align_corners=False), size)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
