"""Bytes that a GPU holds for weights, gradients and optimizer state, whatever the batch; activations come on top."""

from dataclasses import dataclass

from sgmim_fast.config import TrainConfig
from sgmim_fast.planning.parameters import ParameterSizes, Precision
from sgmim_fast.train.zero_layout import zero_layout


@dataclass(frozen=True)
class StateMemory:
    """Bytes a GPU at their peak."""

    weights: int
    """As stored, and for ZeRO-3 what is gathered for use."""
    gradients: int
    optimizer: int
    """AdamW's two moments, and the fp32 weights that it steps."""
    buckets: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def state_memory(
    parameters: ParameterSizes,
    *,
    stage: int,
    precision: Precision,
    gpus: int,
    bucket_size: int = 500_000_000,
    overlap: bool = False,
) -> StateMemory:
    """What ``zero_layout`` says of a run with these settings."""
    train = TrainConfig(
        zero_stage=stage,  # type: ignore[arg-type]
        precision=precision,
        bucket_size=bucket_size,
        overlap_comm="on" if overlap and stage > 0 else "off",
    )
    layout = zero_layout(train, parameters.groups, gpus)
    return StateMemory(
        layout.weights + layout.gathered, layout.gradients, layout.optimizer + layout.master, layout.buckets
    )
