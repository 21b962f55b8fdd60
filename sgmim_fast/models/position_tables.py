"""Tables of relative position biases for windows of another size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A bias table of windows ``old`` (H, W), stretched to windows ``new`` by bicubic interpolation.

    As the official Swin code does it when it loads weights: the picture of (2 H - 1) x (2 W - 1) offsets is resized,
    and its middle stays the offset 0.

    Args:
        table: ((2 H - 1) (2 W - 1) + n, heads); the n rows at the end (a class token's) stay as they are.

    Returns:
        The same for ``new``, in the dtype of ``table``; differentiable.
    """
    (height, width), size = (2 * side - 1 for side in old), [2 * side - 1 for side in new]
    picture = table[: height * width].t().reshape(1, -1, height, width)
    wide = torch.promote_types(table.dtype, torch.float32)
    picture = F.interpolate(picture.to(wide), size=size, mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat((picture.flatten(2)[0].t(), table[height * width :]))
