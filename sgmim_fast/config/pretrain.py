"""All settings of a pre-training run."""

from dataclasses import dataclass, field

from sgmim_fast.config.data import DataConfig
from sgmim_fast.config.model import ModelConfig
from sgmim_fast.config.optimization import ScheduleConfig
from sgmim_fast.config.run import RunConfig
from sgmim_fast.masking import masked_cell_count


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """One pre-training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    output: str = "runs/pretrain"
    """Folder of the run: configuration, metrics, TensorBoard files, checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self.model.grid
        masked_cell_count(rows * columns, self.data.mask_ratio)
        self.check_stages(self.model.encoder, self.model.depths)
