"""Configuration: keyword-only dataclasses that validate themselves.

Sizes are in pixels, learning rates are per 512 images of total batch, durations in epochs unless a
name says steps.
"""

from sgmim_fast.config.backbone import BackboneConfig, OutputNorm
from sgmim_fast.config.data import DataConfig, Loader
from sgmim_fast.config.dense import DepthDataConfig, DepthDataset, LabelDataset, SegmentationDataConfig
from sgmim_fast.config.finetune import (
    FROM_SCRATCH,
    FROM_WEIGHTS,
    DepthRunConfig,
    FinetuneBackboneConfig,
    FinetuneConfig,
    FinetuneOptimizerConfig,
    FinetuneScheduleConfig,
    SegmentationRunConfig,
)
from sgmim_fast.config.model import GUIDANCE_HEADS, Encoder, Guidance, ModelConfig
from sgmim_fast.config.optimization import OptimizerConfig, OptimizerName, ScheduleConfig
from sgmim_fast.config.pretrain import PretrainConfig
from sgmim_fast.config.run import RunConfig
from sgmim_fast.config.tasks import (
    IGNORED_LABEL,
    DepthConfig,
    DepthCrop,
    DepthEvalConfig,
    DepthHead,
    SegmentationConfig,
    SegmentationEvalConfig,
    SegmentationMode,
)
from sgmim_fast.config.training import Attention, Backend, FaultConfig, Float8, MonitorConfig, Norm, TrainConfig

__all__ = [
    "FROM_SCRATCH",
    "FROM_WEIGHTS",
    "GUIDANCE_HEADS",
    "IGNORED_LABEL",
    "Attention",
    "BackboneConfig",
    "Backend",
    "DataConfig",
    "DepthConfig",
    "DepthCrop",
    "DepthDataConfig",
    "DepthDataset",
    "DepthEvalConfig",
    "DepthHead",
    "DepthRunConfig",
    "Encoder",
    "FaultConfig",
    "FinetuneBackboneConfig",
    "FinetuneConfig",
    "FinetuneOptimizerConfig",
    "FinetuneScheduleConfig",
    "Float8",
    "Guidance",
    "LabelDataset",
    "Loader",
    "ModelConfig",
    "MonitorConfig",
    "Norm",
    "OptimizerConfig",
    "OptimizerName",
    "OutputNorm",
    "PretrainConfig",
    "RunConfig",
    "ScheduleConfig",
    "SegmentationConfig",
    "SegmentationDataConfig",
    "SegmentationEvalConfig",
    "SegmentationMode",
    "SegmentationRunConfig",
    "TrainConfig",
]
