"""A fine-tuning run's folder without the training: untrained tiny models, for the commands that read such folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sgmim_fast.backbones import create_backbone
from sgmim_fast.config import (
    BackboneConfig,
    DepthConfig,
    DepthDataConfig,
    DepthEvalConfig,
    DepthRunConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationEvalConfig,
    SegmentationRunConfig,
)
from sgmim_fast.tasks.finetuned import TaskConfig, backbone_options, make_task, save_finetuned
from sgmim_fast.train.arguments import config_to_json

TINY = BackboneConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)


def depth_run(folder: Path, data: DepthDataConfig, *, max_depth: float = 10.0, **evaluation: Any) -> Path:
    """A run of sgmim finetune depth."""
    config = DepthConfig(head_channels=8, max_depth=max_depth)
    settings = DepthRunConfig(depth=config, data=data, evaluation=DepthEvalConfig(**evaluation))
    return _write(folder, config, settings, {})


def segmentation_run(folder: Path, data: SegmentationDataConfig, classes: int = 4, **evaluation: Any) -> Path:
    """A run of sgmim finetune segmentation."""
    config = SegmentationConfig(classes=classes, head_channels=16, auxiliary_channels=16)
    settings = SegmentationRunConfig(segmentation=config, data=data, evaluation=SegmentationEvalConfig(**evaluation))
    return _write(folder, config, settings, {"class_names": [f"thing {number}" for number in range(classes)]})


def _write(folder: Path, config: TaskConfig, settings: Any, notes: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    shape = replace(TINY, **backbone_options(config))
    task = make_task(create_backbone(shape), config)
    weights = folder / "checkpoints" / "step_000002" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    save_finetuned(task.state_dict(), weights, shape, config, notes)
    (weights.parent / "state.json").write_text("{}")
    (weights.parents[1] / "latest").write_text("step_000002\n")
    kind = "depth" if isinstance(config, DepthConfig) else "segmentation"
    (folder / "config.json").write_text(config_to_json(settings, "folder", kind))
    return folder
