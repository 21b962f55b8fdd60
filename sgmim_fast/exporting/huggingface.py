"""Folders that transformers loads: ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sgmim_fast.config import BackboneConfig
from sgmim_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.exporting.source import sides_of, source_of
from sgmim_fast.hf_layout import name_of_stage_norm
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.weight_files import write_tensors
from sgmim_fast.weights import tensors_of

_MODELS = {"swin": "Swin", "swinv2": "Swinv2", "vit": "Beit"}
_TYPES = {"swin": "swin", "swinv2": "swinv2", "vit": "beit"}
_FIXED_EPS = 1e-5  # of the norms after patch embedding and in mergings, in transformers' Swin


@dataclass(frozen=True)
class HuggingFaceExport:
    """A folder for transformers."""

    folder: Path
    classes: tuple[str, ...]
    """Those of transformers whose outputs are the model's: the whole of what they load is in the folder."""
    notes: tuple[str, ...]
    """Where transformers does otherwise, one sentence each."""


def export_huggingface(
    model: nn.Module, folder: str | Path, image_size: int | tuple[int, int] | None = None
) -> HuggingFaceExport:
    """Writes a folder that ``from_pretrained`` of transformers' classes loads.

    As SwinModel, Swinv2Model or BeitModel; where the maps are the same, as SwinBackbone, Swinv2Backbone or
    BeitBackbone; a pre-training Swin also for masked image modelling. AutoBackbone itself loads from the Hub alone.
    AutoImageProcessor gives images as the model has seen them: of that size, normalised.

    Args:
        model: a pre-training model, its encoder, or a backbone that gives its last map.
        folder: made if it is not there; the three files in it are replaced.
        image_size: side or (height, width) in pixels that transformers is told; unless given, that of the
            configuration. BEiT takes no other.

    Raises:
        UserError: if transformers' model cannot hold it, or the files cannot be written.
    """
    source = source_of(model)
    source.check_whole("a folder for transformers")
    size = source.image_size if image_size is None else sides_of(image_size)
    config = _beit_config(source.shape, size) if source.shape.encoder == "vit" else _swin_config(source.shape, size)
    tensors = tensors_of(model, "hf")
    classes, notes = _classes(model, source.shape, source.encoder.norm is not None)
    if source.shape.encoder == "swinv2":
        side = config["image_size"]
        here = "windows are, on any map" if source.shape.shift_covered else "each map decides, of any image"
        notes += (f"Swinv2 decides for images of {side} where windows are shifted; here {here}",)
    if "SwinBackbone" in classes:
        # It norms the last map by another norm than its model's; here they are one.
        for part in ("weight", "bias"):
            name = name_of_stage_norm(source.shape.levels - 1, part)
            tensors[name] = tensors[f"swin.layernorm.{part}"].clone()
    if "beit.embeddings.mask_token" in tensors:
        config["use_mask_token"] = True
    config["architectures"] = list(classes[:1])
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config["out_features"] = [f"stage{index + 1}" for index in sorted(set(source.shape.out_indices))]
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        preprocessing = _preprocessing(sides_of(config["image_size"]))
        for name, content in (("config", config), ("preprocessor_config", preprocessing)):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({first_line(error)}); choose another folder") from error
    return HuggingFaceExport(folder, classes, notes)


def _preprocessing(size: tuple[int, int]) -> dict[str, Any]:
    """Of images with 8 bits a channel, for transformers' image processor of ViT, which its Swin has too."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": 2,  # bilinear, as PIL counts
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _classes(model: nn.Module, shape: BackboneConfig, normed: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes that give what the model gives, the nearest first, and notes on those that do not."""
    name = _MODELS[shape.encoder]
    classes, notes = [], []
    same_maps = not isinstance(model, Backbone) or (shape.norm == "none" and not shape.has_pyramid)
    if isinstance(model, Backbone) and shape.encoder == "swin":
        same_maps = shape.norm == "all"
    if isinstance(model, SGMIM) and shape.encoder != "vit":
        classes.append(f"{name}ForMaskedImageModeling")
    if shape.encoder == "swin" and not isinstance(model, Backbone):
        notes.append("SwinBackbone puts a LayerNorm on every map; backbones of norm='all' alone have them")
    elif same_maps:
        classes.append(f"{name}Backbone")
    else:
        wants = {"swin": "norm='all'", "swinv2": "norm='none'", "vit": "norm='none' and pyramid=False"}[shape.encoder]
        notes.append(f"{name}Backbone gives other maps than this backbone; those of {wants} are its")
    if normed:
        classes.append(f"{name}Model")
    else:
        notes.append(f"{name}Model ends with a norm that this backbone lacks")
    if "SwinBackbone" in classes and not shape.shift_covered:
        notes.append(
            "SwinBackbone shifts windows also on maps no larger than a window on one side; here they are not, without "
            "shift_covered=True"
        )
    if "SwinModel" in classes and shape.shift_covered:
        notes.append("SwinModel shifts no windows on maps no larger than a window on one side; here they are")
    return tuple(classes), tuple(notes)


def _swin_config(shape: BackboneConfig, size: tuple[int, int] | None) -> dict[str, Any]:
    name = _MODELS[shape.encoder]
    if shape.norm_eps != _FIXED_EPS:
        raise UserError(f"transformers' {name} has an epsilon of {_FIXED_EPS} in its norms, not {shape.norm_eps}")
    stages = [shape.window_of(stage) for stage in range(shape.levels)]
    windows = tuple(window for window, _, _ in stages)
    largest = max(windows)
    if shape.encoder == "swin":
        if len(set(windows)) > 1:
            raise UserError(f"transformers' {name} has one window for all stages; this one has {windows}")
        size = size or (largest * shape.patch_size * 2**shape.levels,) * 2
    else:
        size = size or _size_for(windows, shape)
        _check_windows(shape, size)
    for number, (_, shifted, _) in enumerate(stages):
        free = shape.encoder == "swinv2" and size[0] // (shape.patch_size * 2**number) <= windows[number]
        if not shifted and shape.depths[number] > 1 and not free:
            raise UserError(f"transformers' {name} shifts windows in every stage; stage {number} here does not")
    config: dict[str, Any] = {
        "model_type": _TYPES[shape.encoder],
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "embed_dim": shape.embed_dim,
        "depths": list(shape.depths),
        "num_heads": list(shape.num_heads),
        "window_size": largest,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": shape.drop_path_rate,
        "use_absolute_embeddings": False,
        "layer_norm_eps": shape.norm_eps,
        "encoder_stride": shape.patch_size * 2 ** (shape.levels - 1),
    }
    if shape.encoder == "swinv2":
        # 0 stands for the stage's own window.
        trained = [0 if window == pretrained else pretrained for window, _, pretrained in stages]
        if 1 in trained:
            raise UserError(f"transformers' {name} cannot measure offsets by windows of one token, as here")
        config["pretrained_window_sizes"] = trained
    return config


def _size_for(windows: tuple[int, ...], shape: BackboneConfig) -> tuple[int, int]:
    """Images for which transformers reduces no window."""
    if len(set(windows)) > 1:
        raise UserError(
            f"image_size is needed: transformers' Swinv2 has one window, which it reduces where maps are smaller; here "
            f"they are {windows}"
        )
    return (2 * windows[0] * shape.patch_size * 2 ** (shape.levels - 1),) * 2


def _check_windows(shape: BackboneConfig, size: tuple[int, int]) -> None:
    """Swinv2 reduces windows, and does without shifts, by the sizes of maps that its configured image has."""
    for stage in range(shape.levels):
        window, _, _ = shape.window_of(stage)
        rows, columns = (side // shape.patch_size // 2**stage for side in size)
        largest = max(shape.window_of(other)[0] for other in range(shape.levels))
        shifted = shape.shift_covered or min(rows, columns) > window
        if min(rows, largest) != window or (rows > window) != shifted:
            raise UserError(
                f"transformers' Swinv2 for images of {size} has windows of {min(rows, largest)} in stage {stage}, and "
                f"here they are {window}; name an image_size that reduces and shifts them so"
            )


def _beit_config(shape: BackboneConfig, size: tuple[int, int] | None) -> dict[str, Any]:
    rows, columns = shape.stage_map(0)
    made_for = (rows * shape.patch_size, columns * shape.patch_size)
    if size is not None and size != made_for:
        raise UserError(
            f"transformers' Beit takes images of one size, and the position table here is for {made_for}, not {size}; "
            "build the backbone for it"
        )
    return {
        "model_type": _TYPES[shape.encoder],
        "image_size": made_for[0] if rows == columns else list(made_for),
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.depths[0],
        "num_attention_heads": shape.num_heads[0],
        "intermediate_size": 4 * shape.embed_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": shape.drop_path_rate,
        "layer_norm_eps": shape.norm_eps,
        "layer_scale_init_value": shape.layer_scale_init or 0.0,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
        "use_mean_pooling": False,
        "add_fpn": False,
        "reshape_hidden_states": True,
    }
