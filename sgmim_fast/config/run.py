"""What every training run is told, whatever it trains."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sgmim_fast.config.checks import require
from sgmim_fast.config.optimization import OptimizerConfig
from sgmim_fast.config.training import FaultConfig, MonitorConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run is executed, watched and continued."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    output: str = "runs/one"
    """Folder of the run: configuration, metrics, TensorBoard files, checkpoints."""
    resume: str = "none"
    """Go on from the output folder's newest intact checkpoint ("auto"; without one, begin anew) or from a path."""
    allow_changes: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's though they change the result, such as optimizer.lr."""
    dry_run: bool = False
    """Build everything without memory, print parameters, memory and FLOPs of a step, and end."""

    def __post_init__(self) -> None:
        require(
            self.optimizer.implementation != "apex" or self.train.zero_stage < 3,
            "optimizer.implementation apex counts one step for each piece that train.zero_stage 3 hands it; choose "
            "adamw or deepspeed, or a lower stage",
        )
        require(
            self.optimizer.implementation == "adamw" or not self.train.offload_optimizer,
            f"optimizer.implementation {self.optimizer.implementation} steps on a GPU alone, and "
            "train.offload_optimizer keeps its state in the host's memory; choose adamw, or leave the offload out",
        )

    def check_stages(self, encoder: str, depths: Sequence[int]) -> None:
        """Refuse activation checkpointing of a stage that an encoder lacks."""
        stages = self.train.activation_checkpointing
        require(
            all(stage < len(depths) for stage in stages),
            f"train.activation_checkpointing {' '.join(map(str, stages))} names a stage "
            f"that the {encoder} encoder lacks; it has {len(depths)}, counted from 0",
        )
