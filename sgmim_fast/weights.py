"""Weights in and out of models, their encoders and backbones, in the layouts that ``weight_layouts`` describes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from sgmim_fast.config import BackboneConfig, Encoder, ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.models.swin import SwinEncoder
from sgmim_fast.models.vit import ViTEncoder
from sgmim_fast.position_tables import Resampling
from sgmim_fast.weight_files import check_target, read_metadata, read_tensors, write_tensors
from sgmim_fast.weight_layouts import EncoderShape, Layout, Target, encoder_shape, from_model, read_names
from sgmim_fast.weight_plan import Grid, fit_shapes, make_plan, problems, some

__all__ = ["LoadReport", "load_weights", "read_backbone_config", "read_config", "save_weights", "tensors_of"]

C = TypeVar("C", ModelConfig, BackboneConfig)


@dataclass(frozen=True)
class LoadReport:
    """What became of the parameters of a file and of a model."""

    source: str
    layout: Layout
    encoder: Encoder
    loaded: tuple[str, ...]
    """The model's names."""
    missing: tuple[str, ...]
    """The model's names of what the file lacks; left as it was."""
    unused: tuple[str, ...]
    """The file's names of what the model has no part for, or computes itself."""
    resized: tuple[str, ...] = ()
    """Among loaded, the position tables that were made for another window or image size and have been resized."""


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    resize: bool | Resampling | None = None,
) -> LoadReport:
    """Copies weights into a model, in its dtype and on its device. All or nothing.

    Args:
        model: a pre-training model, its encoder alone, or a backbone. An encoder alone may miss its mask token, a
            backbone what it has beside its encoder. What is left out at its end, by ``out_indices``, is not asked for.
        source: a ``.safetensors`` file, a ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` checkpoint, or a state dict. The
            layout is recognised by the names; ``{"model": ...}``, ``{"state_dict": ...}`` and the prefixes ``module.``,
            ``_orig_mod.``, ``model.`` and ``backbone.`` are undone.
        strict: False leaves what the source lacks at its initial value; the report names it.
        resize: whether position tables of another window or image size are resized: unless given, those of backbones
            are. True means ``"bicubic"`` for Swin and ``"geometric"`` for ViT, the ways of Swin's and BEiT's official
            fine-tuning; that of SimMIM and SG-MIM is ``"geometric"`` for both. Swin V2 has no table to resize.

    Raises:
        UserError: if the source cannot be read, lacks something, holds something unknown or of another shape.
    """
    target = _target(model)
    where, tensors = read_tensors(source)
    reading = read_names(tensors)
    if reading is None:
        raise UserError(
            f"{where}: holds no SG-MIM, SimMIM, Swin or timm weights of an encoder, nor Hugging Face or "
            f"MIM-Depth-Estimation ones; its first names are {some(list(tensors))}"
        )
    own: dict[str, Tensor] = model.state_dict()
    plan = make_plan(reading, tensors, own, target, _depths(model), _outputs(model))
    how = _resampling(resize, target, plan.held)
    if plan.fits:
        fit_shapes(plan, own, how, None if isinstance(source, Mapping) else _file_map(source), _own_map(model))
    else:
        fit_shapes(plan, own, None, None, None)
    lacking = [name for name in plan.missing if not _may_be_missing(name, target)] if strict else []
    if found := problems(plan, lacking, resizing=how is not None):
        raise UserError(f"{where}: {found}; nothing was loaded")
    with torch.no_grad():
        for name, value in plan.values.items():
            own[name].copy_(value)
    loaded = tuple(plan.values)
    return LoadReport(where, reading.layout, plan.held.kind, loaded, plan.missing, plan.unused, plan.resized)


def save_weights(model: nn.Module, path: str | Path, layout: Layout = "sgmim") -> Path:
    """Writes a model's weights as safetensors. A failure leaves what was there before.

    Args:
        model: a pre-training model, its encoder alone, or a backbone.
        path: ends in ``.safetensors``; its folder exists.
        layout: ``"sgmim"`` all of a guided model, or of a backbone; ``"simmim"`` a pre-training model's encoder and
            image head under SimMIM's names; ``"swin"`` the encoder as official Swin and Swin V2 checkpoints have it;
            ``"timm"`` the encoder for timm's SwinTransformer, SwinTransformerV2, or Beit with a shared relative
            position bias and ``global_pool="token"``; ``"hf"`` encoder and, for Swin, image head for transformers'
            Swin, Swin V2 or Beit models; ``"mim-depth"`` the encoder as MIM-Depth-Estimation has it. Others shift
            windows differently on maps that they do not divide, and on maps no larger than a window on one side.

    Raises:
        UserError: if the model does not have the layout's parts, or the file cannot be written.
    """
    path = Path(path)
    tensors = tensors_of(model, layout)
    check_target(path)
    metadata = {"format": "pt", "layout": layout, "encoder": _shape_of(model.state_dict()).kind}
    config = getattr(model, "config", None)
    # The configuration of what the file holds, so that it can be built again from the file alone.
    if isinstance(config, ModelConfig):
        config = config if layout == "sgmim" else replace(config, guidance="none")
        metadata["config"] = json.dumps(asdict(config))
    elif isinstance(config, BackboneConfig):
        metadata["backbone"] = json.dumps(asdict(config))
    write_tensors(path, tensors, metadata)
    return path


def tensors_of(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """What ``save_weights`` writes, by the layout's names, on the CPU.

    Raises:
        UserError: if the model does not have the layout's parts.
    """
    target = _target(model)
    own: dict[str, Tensor] = model.state_dict()
    held = _shape_of(own)
    _check_layout(layout, target, held.kind)
    tensors = {}
    for key, tensor in own.items():
        names = from_model(key, layout, target, held, _outputs(model))
        for name, part in zip(names, tensor.detach().chunk(len(names)) if names else (), strict=True):
            tensors[name] = part.cpu().contiguous()
    return tensors


def read_config(path: str | Path) -> ModelConfig | None:
    """The configuration that ``save_weights`` wrote beside the weights; None for files of another origin.

    Raises:
        UserError: if the file cannot be read, or its configuration is not one of this version.
    """
    return _read_config(path, "config", ModelConfig)


def read_backbone_config(path: str | Path) -> BackboneConfig | None:
    """Likewise of a file whose weights are a backbone's, or those of a model that was fine-tuned around one."""
    return _read_config(path, "backbone", BackboneConfig)


def _read_config(path: str | Path, entry: str, kind: type[C]) -> C | None:
    metadata = read_metadata(path)
    if entry not in metadata or not {"layout", "task"} & metadata.keys():
        return None
    try:
        return kind(**json.loads(metadata[entry]))
    except (TypeError, ValueError) as error:  # UserError and json's error are ValueErrors
        raise UserError(f"{path}: holds a model configuration that this version cannot use ({error})") from error


# -- the model


def _target(model: nn.Module) -> Target:
    if isinstance(model, SGMIM):
        return "plain" if model.config.guidance == "none" else "guided"
    if isinstance(model, Backbone):
        return "backbone"
    if isinstance(model, SwinEncoder | ViTEncoder):
        return "encoder"
    raise UserError(
        f"weights belong to a model made by create_model, to its encoder, or to a backbone made by create_backbone; "
        f"got {type(model).__name__} (unwrap a distributed or compiled model first)"
    )


def _depths(model: nn.Module) -> tuple[int, ...]:
    assert isinstance(model, SGMIM | Backbone | SwinEncoder | ViTEncoder), "else it is no target"
    return model.config.depths


def _outputs(model: nn.Module) -> tuple[int, ...]:
    return model.config.out_indices if isinstance(model, Backbone) else ()


def _shape_of(tensors: Mapping[str, Tensor]) -> EncoderShape:
    return encoder_shape({key: tuple(tensor.shape) for key, tensor in tensors.items()})


def _may_be_missing(name: str, target: Target) -> bool:
    return (target == "encoder" and name == "mask_token") or (target == "backbone" and not name.startswith("encoder."))


def _check_layout(layout: str, target: Target, encoder: Encoder) -> None:
    layouts = get_args(Layout)
    if layout not in layouts:
        raise UserError(f"layout {layout!r} is unknown; choose one of {', '.join(layouts)}")
    if need := _unmet_need(layout, target, encoder):
        others = [other for other in layouts if not _unmet_need(other, target, encoder)]
        raise UserError(f"layout {layout!r} {need}; save this one as {' or '.join(map(repr, others))}")


def _unmet_need(layout: str, target: Target, encoder: Encoder) -> str | None:
    """What keeps a layout from taking such a model; None if it does."""
    if layout == "sgmim" and target in ("plain", "encoder"):
        return "needs a model with guidance"
    if layout == "simmim" and target in ("encoder", "backbone"):
        return "needs the image head"
    if layout in ("swin", "mim-depth") and encoder == "vit":
        return "is for Swin and Swin V2"
    return None


# -- position tables


def _resampling(resize: bool | Resampling | None, target: Target, held: EncoderShape) -> Resampling | None:
    if isinstance(resize, str):
        if resize not in get_args(Resampling):
            raise UserError(f"resize {resize!r} is unknown; choose one of {', '.join(get_args(Resampling))}, or True")
        return resize
    if not (target == "backbone" if resize is None else resize):
        return None
    return "geometric" if held.kind == "vit" else "bicubic"


def _own_map(model: nn.Module) -> Grid | None:
    """(rows, columns) of the map that a ViT's position table is for."""
    encoder = getattr(model, "encoder", model)
    return encoder.rel_pos_bias.grid if isinstance(encoder, ViTEncoder) else None


def _file_map(source: str | Path) -> Grid | None:
    """The same of a file of ours; None for others, whose map is taken to be square."""
    model, backbone = read_config(source), read_backbone_config(source)
    shape = BackboneConfig.from_pretraining(model) if model is not None else backbone
    if shape is None or shape.encoder != "vit":
        return None
    rows, columns = shape.stage_map(0)
    return rows, columns
