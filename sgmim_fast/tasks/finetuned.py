"""A fine-tuned model as one file: weights, and what it takes to build the model again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgmim_fast.config import Attention, BackboneConfig, Backend, DepthConfig, SegmentationConfig
from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.tasks.depth import DepthTask
from sgmim_fast.tasks.segmentation import SegmentationTask
from sgmim_fast.weight_files import read_metadata, read_tensors, write_tensors

DenseTask = DepthTask | SegmentationTask
TaskConfig = DepthConfig | SegmentationConfig
_KINDS: dict[str, Any] = {"depth": (DepthTask, DepthConfig), "segmentation": (SegmentationTask, SegmentationConfig)}


def kind_of(config: TaskConfig) -> str:
    """``"depth"`` or ``"segmentation"``."""
    return "depth" if isinstance(config, DepthConfig) else "segmentation"


def backbone_options(config: TaskConfig) -> dict[str, Any]:
    """What the head of ``config`` asks of a backbone: fields of ``BackboneConfig``."""
    if isinstance(config, DepthConfig) and config.head == "glp":  # it reads the last map alone, at its own resolution
        return {"norm": "last", "pyramid": False}
    return {"norm": "all"}


def make_task(backbone: Backbone, config: TaskConfig) -> DenseTask:
    """The task of ``config`` on a backbone."""
    task: DenseTask = _KINDS[kind_of(config)][0](backbone, config)
    return task


def save_finetuned(
    state: dict[str, Tensor], path: Path, backbone: BackboneConfig, config: TaskConfig, notes: dict[str, Any]
) -> None:
    """Write a task's fp32 state as safetensors.

    Args:
        notes: what readers of predictions want to know besides, such as names of classes; JSON.

    Raises:
        UserError: if the file cannot be written.
    """
    metadata = {
        "format": "pt",
        "task": kind_of(config),
        "backbone": json.dumps(asdict(backbone)),
        "head": json.dumps(asdict(config)),
        "notes": json.dumps(notes),
    }
    write_tensors(path, state, metadata)


def load_finetuned(
    path: Path, backend: Backend = "auto", attention: Attention = "auto"
) -> tuple[DenseTask, dict[str, Any]]:
    """The model that ``save_finetuned`` wrote, in evaluation mode on the CPU, and its notes.

    Raises:
        UserError: if the file cannot be read, holds no fine-tuned model, or is damaged.
    """
    metadata = read_metadata(path)
    if "task" not in metadata:
        raise UserError(
            f"{path}: holds no fine-tuned model; name one that sgmim finetune wrote, the run's folder or its "
            "model.safetensors"
        )
    try:
        make, head = _KINDS[metadata["task"]]
        shape = BackboneConfig(**json.loads(metadata["backbone"]))
        config = head(**json.loads(metadata["head"]))
        notes = json.loads(metadata["notes"])
    except (KeyError, TypeError, ValueError) as error:  # UserError and json's error are ValueErrors
        raise UserError(f"{path}: holds a model that this version cannot build ({error})") from error
    _, tensors = read_tensors(path)
    with torch.device("meta"):
        backbone = Backbone(shape)
        task: DenseTask = make(backbone, config)
    try:
        task.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"{path}: its weights do not fit its configuration ({' '.join(str(error).split())[:200]}); copy it again"
        ) from error
    backbone.set_backend(backend)
    backbone.set_attention(attention)
    return task.eval(), notes
