"""Parameter groups, optimizer and learning-rate schedule of pre-training (SimMIM's, arXiv 2111.09886)."""

import contextlib
import io
import math
from bisect import bisect_right
from importlib import import_module
from typing import Any

import torch
from torch import nn

from sgmim_fast import nvidia_apex
from sgmim_fast.config import OptimizerConfig, OptimizerName, ScheduleConfig
from sgmim_fast.errors import UserError, first_line

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


def check_optimizer(implementation: OptimizerName, device: torch.device) -> None:
    """Refuse an implementation that cannot step parameters on ``device``.

    Raises:
        UserError: with the reason and the remedy.
    """
    reason = None if implementation == "adamw" else _objection(implementation, device)
    if reason is not None:
        raise UserError(f'optimizer.implementation "{implementation}" cannot run here: {reason}; or choose "adamw"')


def _objection(implementation: OptimizerName, device: torch.device) -> str | None:
    on_cpu = None if device.type == "cuda" else f"its FusedAdam needs a GPU, this run is on the {device.type.upper()}"
    if implementation == "deepspeed":
        return on_cpu or _deepspeed_objection()
    try:
        fused_adam = nvidia_apex.load("optimizers", "FusedAdam")
        if on_cpu is None:
            fused_adam([nn.Parameter(torch.zeros(1))])  # it looks for its CUDA extensions when it is made
    except Exception as error:
        return first_line(error)
    return on_cpu


def _deepspeed_objection() -> str | None:
    """Why DeepSpeed cannot build its FusedAdam on a GPU machine, without building it (which takes minutes)."""
    try:
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.op_builder.builder import assert_no_cuda_mismatch
        from torch.utils.cpp_extension import verify_ninja_availability

        if installed_ops.get("fused_adam"):
            return None
        with contextlib.redirect_stdout(io.StringIO()):
            assert_no_cuda_mismatch("fused_adam")
        verify_ninja_availability()
    except Exception as error:  # its own exceptions, and those of a DeepSpeed that cannot be imported
        return f"DeepSpeed cannot build it ({first_line(error)}); install nvcc of PyTorch's CUDA version, and ninja"
    return None


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; its rate is set before every step, so the initial one is a placeholder.

    Args:
        groups: of parameters, each with its weight decay.
        config: whose AdamW, and its constants.
        device: where the steps are taken; the parameters may get there later.

    Raises:
        UserError: if the implementation cannot run there.
    """
    check_optimizer(config.implementation, device)
    options: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if config.implementation == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)  # one kernel a step, on CPUs as on GPUs
    if config.implementation == "apex":
        fused_adam = nvidia_apex.load("optimizers", "FusedAdam")
    else:
        fused_adam = import_module("deepspeed.ops.adam").FusedAdam
    try:
        optimizer: torch.optim.Optimizer = fused_adam(groups, adam_w_mode=True, **options)
    except Exception as error:
        raise UserError(
            f'optimizer.implementation "{config.implementation}" failed to start: {first_line(error)}; choose "adamw"'
        ) from error
    return optimizer


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
