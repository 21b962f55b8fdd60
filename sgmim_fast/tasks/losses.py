"""Losses of the dense tasks. Each is a mean over the valid pixels of the rank's own batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast.config import IGNORED_LABEL


def silog_loss(prediction: Tensor, target: Tensor, lambd: float, min_depth: float, max_depth: float) -> Tensor:
    """Scale-invariant logarithmic loss, sqrt(mean(g^2) - lambda mean(g)^2) with g = log(prediction) - log(target).

    The means are over all valid pixels of the batch. MIM-Depth-Estimation has this form with lambda 0.5 and counts
    every target above 0; BTS has lambda 0.85 and ten times the value. Without a valid pixel, and where the root's
    argument is 0, the loss is 0 and so is its gradient.

    Args:
        prediction: (B, 1, H, W) metres; 0 counts as the smallest normal number.
        target: (B, 1, H, W) metres; valid strictly between ``min_depth`` and ``max_depth``, so 0 is not.
        lambd: between 0 and 1.
        min_depth: metres.
        max_depth: metres.

    Returns:
        A scalar in float32 or wider.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    target = target.to(prediction.dtype)
    valid = (target > min_depth) & (target < max_depth)
    count = valid.sum().clamp_min(1)
    tiny = torch.finfo(prediction.dtype).tiny
    # Masked before the logarithm: what is not valid must not reach the gradient as 0 times infinity.
    ratio = torch.where(valid, prediction, 1.0).clamp_min(tiny).log() - torch.where(valid, target, 1.0).log()
    mean = ratio.sum() / count
    # The same number as in the formula, without its cancellation.
    variance = torch.where(valid, (ratio - mean).square(), 0.0).sum() / count + (1 - lambd) * mean.square()
    return torch.where(variance == 0, 0.0, variance.clamp_min(tiny).sqrt())


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels whose label is not 255; 0, with a gradient of 0, where there is none.

    mmsegmentation divides by the ignored pixels too unless told otherwise (``avg_non_ignore``).

    Args:
        logits: (B, classes, H, W).
        label: (B, H, W) int64.

    Returns:
        A scalar in float32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, label, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (label != IGNORED_LABEL).sum().clamp_min(1)
