"""Parameter groups, optimizer and learning-rate schedule of pre-training (SimMIM's, arXiv 2111.09886)."""

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from sgmim_fast.config import OptimizerConfig, ScheduleConfig

NOT_DECAYED = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "mask_token",
    "cls_token",
    "logit_scale",
    "cpb_mlp",
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; 1-d parameters, tables, tokens and scales without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # ZeRO-3 keeps partitioned parameters flat; their true shape is ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        skip = len(shape) <= 1 or any(word in name for word in NOT_DECAYED)
        (plain if skip else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``; its rate is set before every step, so the initial one is a placeholder."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)


def learning_rate(
    step: int, steps_per_epoch: int, total_batch: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> float:
    """The rate of optimizer step ``step`` (from 0): linear warm-up, then cosine or steps.

    All rates of the configuration are for 512 images and scale with ``total_batch``. As in SimMIM the
    cosine counts from step 0, so warm-up covers its beginning.
    """
    scale = total_batch / 512
    peak, start, floor = optimizer.lr * scale, schedule.warmup_lr * scale, schedule.min_lr * scale
    warmup = int(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return start + (peak - start) * step / warmup
    if schedule.kind == "multistep":
        passed = bisect_right([milestone * steps_per_epoch for milestone in schedule.milestones], step)
        return peak * schedule.gamma**passed
    total = schedule.epochs * steps_per_epoch
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(step / total, 1.0)))
