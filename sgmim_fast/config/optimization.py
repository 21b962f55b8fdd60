"""Optimizer and schedule. Learning rates are per 512 images of total batch, durations in epochs."""

from dataclasses import dataclass
from typing import Literal, get_args

from sgmim_fast.config.checks import one_of, require

OptimizerName = Literal["adamw", "apex", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, with learning rates as for a total batch of 512."""

    implementation: OptimizerName = "adamw"
    """Whose AdamW: PyTorch's fused "adamw", or the FusedAdam of NVIDIA "apex" or "deepspeed", which need CUDA."""
    lr: float = 1e-4
    """Peak learning rate for 512 images a step; the real one scales with the total batch."""
    weight_decay: float = 0.05
    """On matrices only; norms, biases, bias tables, tokens and logit scales have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    clip_grad_norm: float = 5.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        one_of("optimizer.implementation", self.implementation, get_args(OptimizerName))
        require(self.lr > 0, f"optimizer.lr {self.lr} must be positive")
        require(self.weight_decay >= 0, f"optimizer.weight_decay {self.weight_decay} must be 0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas {self.betas} must be in [0, 1)")
        require(self.clip_grad_norm > 0, f"optimizer.clip_grad_norm {self.clip_grad_norm} must be positive")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine or steps; evaluated at every optimizer step."""

    kind: Literal["cosine", "multistep"] = "cosine"
    """Shape after the warm-up."""
    epochs: int = 100
    """Length of the whole schedule."""
    warmup_epochs: float = 10.0
    """Length of the linear warm-up."""
    warmup_lr: float = 1e-6
    """Where the warm-up begins."""
    min_lr: float = 1e-5
    """Where the cosine ends."""
    milestones: tuple[float, ...] = ()
    """Epochs at which the rate is multiplied by gamma (multistep)."""
    gamma: float = 0.1
    """Factor at each milestone."""

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, ("cosine", "multistep"))
        require(self.epochs >= 1, f"schedule.epochs {self.epochs} must be 1 or more")
        require(
            0 <= self.warmup_epochs <= self.epochs,
            f"schedule.warmup_epochs {self.warmup_epochs} must be between 0 and schedule.epochs {self.epochs}",
        )
