"""One pre-training run."""

from dataclasses import dataclass, field

from sgmim_fast.config.checks import require
from sgmim_fast.config.data import DataConfig
from sgmim_fast.config.model import ModelConfig
from sgmim_fast.config.optimization import OptimizerConfig, ScheduleConfig
from sgmim_fast.config.training import FaultConfig, MonitorConfig, TrainConfig
from sgmim_fast.masking import masked_cell_count


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pre-training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    output: str = "runs/pretrain"
    """Folder of the run: configuration, metrics, TensorBoard files, checkpoints."""
    resume: str = "none"
    """Go on from the output folder's newest intact checkpoint ("auto"; without one, begin anew) or from a path."""
    allow_changes: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's though they change the result, such as optimizer.lr."""

    dry_run: bool = False
    """Build everything without memory, print parameters, memory and FLOPs of a step, and end."""

    def __post_init__(self) -> None:
        rows, columns = self.model.grid
        masked_cell_count(rows * columns, self.data.mask_ratio)
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
        stages = len(self.model.depths)
        require(
            all(stage < stages for stage in self.train.activation_checkpointing),
            f"train.activation_checkpointing {' '.join(map(str, self.train.activation_checkpointing))} names a stage "
            f"that the {self.model.encoder} encoder lacks; it has {stages}, counted from 0",
        )
