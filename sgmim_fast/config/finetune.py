"""All settings of fine-tuning a backbone on a dense task. Learning rates are as given, whatever the batch."""

from dataclasses import dataclass, field
from typing import Literal

from sgmim_fast.config.checks import one_of, require
from sgmim_fast.config.dense import DepthDataConfig, SegmentationDataConfig
from sgmim_fast.config.optimization import OptimizerConfig
from sgmim_fast.config.run import RunConfig
from sgmim_fast.config.tasks import DepthConfig, DepthEvalConfig, SegmentationConfig, SegmentationEvalConfig

FROM_SCRATCH = "none"
"""As ``backbone.weights``: initial ones."""
FROM_WEIGHTS = "auto"
"""As ``backbone.name``: what the weights were trained as."""


@dataclass(frozen=True, kw_only=True)
class FinetuneBackboneConfig:
    """Which backbone is fine-tuned, and what of it differs from pre-training."""

    weights: str = ""
    """Folder of a pre-training run, or a file of weights in any known layout; "none" begins with initial weights."""
    name: str = FROM_WEIGHTS
    """swin_base, swin_large, swinv2_base or vit_base; "auto" is what the weights say, which this project's files do."""
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels that position tables are made for (a ViT needs one); None is that of pre-training for
    a ViT."""
    window_size: tuple[int, ...] | None = None
    """Tokens a window side, one entry or one a stage; None is that of pre-training. Bias tables are resized."""
    use_shift: tuple[bool, ...] | None = None
    """Whether windows are shifted, one entry or one a stage; None shifts in every stage."""
    drop_path_rate: float = 0.3
    """Stochastic depth of the last block; earlier ones less, linearly."""

    def __post_init__(self) -> None:
        require(0.0 <= self.drop_path_rate < 1.0, f"backbone.drop_path_rate {self.drop_path_rate} must be in [0, 1)")
        require(
            self.weights != FROM_SCRATCH or self.name != FROM_WEIGHTS,
            f'backbone.name is "{FROM_WEIGHTS}", but backbone.weights "{FROM_SCRATCH}" say nothing; name a backbone',
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """AdamW with a learning rate that falls from the head to the patch embedding."""

    lr: float = 5e-4
    """Peak learning rate of the head, for the batch that it is used with."""
    layer_decay: float = 0.9
    """What the rate is multiplied by from each layer to the one before it; 1 gives all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.layer_decay <= 1, f"optimizer.layer_decay {self.layer_decay} must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class FinetuneScheduleConfig:
    """Learning rate by optimizer step: a triangle, or a polynomial after a linear warm-up."""

    kind: Literal["triangle", "poly"] = "triangle"
    """From min_lr up to optimizer.lr and back ("triangle"), or down from it after a warm-up ("poly")."""
    epochs: int = 25
    """Length of the whole schedule."""
    min_lr: float = 3e-5
    """Where the triangle begins and ends, and the polynomial ends."""
    power: float = 0.9
    """Of the position within the triangle's side, or the polynomial."""
    warmup_steps: int = 1500
    """Optimizer steps of the linear warm-up (poly)."""

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, ("triangle", "poly"))
        require(self.epochs >= 1, f"schedule.epochs {self.epochs} must be 1 or more")
        require(self.min_lr >= 0, f"schedule.min_lr {self.min_lr} must be 0 or more")
        require(self.power > 0, f"schedule.power {self.power} must be positive")
        require(self.warmup_steps >= 0, f"schedule.warmup_steps {self.warmup_steps} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """What fine-tuning runs of every task are told."""

    backbone: FinetuneBackboneConfig = field(default_factory=FinetuneBackboneConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    schedule: FinetuneScheduleConfig = field(default_factory=FinetuneScheduleConfig)
    evaluate_every: int = 1
    """Epochs between evaluations; there is always one at the end. 0 leaves out all but that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.evaluate_every >= 0, f"evaluate_every {self.evaluate_every} must be 0 or more")
        require(
            self.schedule.min_lr <= self.optimizer.lr,
            f"schedule.min_lr {self.schedule.min_lr} is above optimizer.lr {self.optimizer.lr}",
        )


@dataclass(frozen=True, kw_only=True)
class DepthRunConfig(FinetuneConfig):
    """One run that fine-tunes monocular depth."""

    depth: DepthConfig = field(default_factory=DepthConfig)
    data: DepthDataConfig = field(default_factory=DepthDataConfig)
    evaluation: DepthEvalConfig = field(default_factory=DepthEvalConfig)
    output: str = "runs/depth"
    """Folder of the run: configuration, metrics, TensorBoard files, checkpoints."""


@dataclass(frozen=True, kw_only=True)
class SegmentationRunConfig(FinetuneConfig):
    """One run that fine-tunes semantic segmentation."""

    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    evaluation: SegmentationEvalConfig = field(default_factory=SegmentationEvalConfig)
    output: str = "runs/segmentation"
    """Folder of the run: configuration, metrics, TensorBoard files, checkpoints."""
