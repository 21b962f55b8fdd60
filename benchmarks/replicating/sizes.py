"""How large an experiment is: everything that its figures depend on besides the arm and the seed."""

from dataclasses import dataclass, field
from typing import Literal

from sgmim_fast.config import DepthConfig, ModelConfig, OptimizerConfig, ScheduleConfig, SegmentationConfig

VERSION = 1
"""Raised whenever the same settings give other figures, so that rows of two versions are never mixed."""
CLASSES = 8


@dataclass(frozen=True)
class Variant:
    """How pre-training differs from what the size says, alike in all arms that are compared."""

    rate: float = 1.0
    """Factor of the learning rate."""
    length: float = 1.0
    """Factor of the steps."""

    @property
    def name(self) -> str:
        """For files and people; nothing where nothing differs."""
        rate = "" if self.rate == 1 else f"-rate{self.rate:g}"
        return rate + ("" if self.length == 1 else f"-length{self.length:g}")


USUAL = Variant()


@dataclass(frozen=True, kw_only=True)
class Size:
    """Settings that all arms share."""

    name: str
    model: ModelConfig
    """Of the arms without a change of their own; guidance, weight and channels are the arm's."""
    scenes: int
    """For pre-training, and those labelled are among them."""
    test_scenes: int
    scene_seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    """Of PyTorch on the CPU: sums are rounded otherwise with another number."""
    loading_threads: int = 1
    pretrain_batch: int = 32
    pretrain_steps: int
    pretrain: OptimizerConfig
    """The rate is for 512 images, as in the package."""
    lr_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """The grid, the same for every arm: factors of the rate of pre-training. 1 is used unless others are asked for."""
    lengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Likewise of the steps of pre-training, each with a whole schedule."""
    labels: tuple[int, ...]
    """Labelled images, ascending; the smaller sets are part of the larger ones."""
    finetune_batch: int = 16
    finetune_steps: int
    """The same for every number of labels."""
    depth_lr: float = 1e-3
    segmentation_lr: float = 1e-3
    layer_decay: float = 0.9
    depth: DepthConfig = field(default_factory=lambda: DepthConfig(max_depth=30.0))
    segmentation: SegmentationConfig = field(
        default_factory=lambda: SegmentationConfig(classes=CLASSES, head_channels=32, auxiliary_channels=32)
    )
    probe_tokens: int = 4096
    probe_folds: int = 5

    def steps(self, variant: Variant) -> int:
        """Of pre-training."""
        return max(1, round(self.pretrain_steps * variant.length))

    @property
    def schedule(self) -> ScheduleConfig:
        """Of pre-training, as one epoch: a tenth warm-up, then a cosine to a hundredth."""
        return ScheduleConfig(
            epochs=1, warmup_epochs=0.1, warmup_lr=0.01 * self.pretrain.lr, min_lr=0.01 * self.pretrain.lr
        )


def _dpt(channels: int) -> DepthConfig:
    """Of a head that reads all maps: "glp" reads the last alone, and hardly got better than a constant on scenes."""
    return DepthConfig(head="dpt", head_channels=channels, max_depth=30.0)


SIZES = {
    size.name: size
    for size in (
        Size(
            name="smoke",
            model=ModelConfig(image_size=64, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 2), window_size=4),
            scenes=24,
            test_scenes=6,
            pretrain_batch=8,
            pretrain_steps=6,
            pretrain=OptimizerConfig(lr=0.016),
            labels=(8, 24),
            finetune_batch=4,
            finetune_steps=4,
            segmentation=SegmentationConfig(classes=CLASSES, head_channels=8, auxiliary_channels=8),
            probe_tokens=256,
            probe_folds=2,
        ),
        Size(
            name="micro",
            model=ModelConfig(image_size=96, embed_dim=32, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), window_size=6),
            scenes=2000,
            test_scenes=200,
            pretrain_steps=800,
            pretrain=OptimizerConfig(lr=0.024),
            labels=(200, 1000, 2000),
            finetune_steps=120,
            depth=_dpt(8),
        ),
        Size(
            name="small",
            model=ModelConfig(
                image_size=128, embed_dim=64, depths=(2, 2, 6, 2), num_heads=(2, 4, 8, 16), window_size=8
            ),
            scenes=10_000,
            test_scenes=200,
            device="cuda",
            precision="bf16",
            threads=8,
            loading_threads=12,
            pretrain_batch=256,
            pretrain_steps=600,
            pretrain=OptimizerConfig(lr=2e-3),
            labels=(200, 1000, 10_000),
            finetune_batch=32,
            finetune_steps=150,
            depth=_dpt(16),
            probe_tokens=8192,
        ),
    )
}
