"""Weights for other codes: one safetensors file in a layout, and the call of timm that reads it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sgmim_fast.config import BackboneConfig
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.exporting.source import (
    TOLERANCE,
    Source,
    beside,
    check_path,
    check_same,
    example,
    plain_copy,
    sides_of,
    source_of,
)
from sgmim_fast.weight_layouts import Layout
from sgmim_fast.weights import save_weights

_TIMM = {
    "swin": "swin_base_patch4_window7_224",
    "swinv2": "swinv2_base_window8_256",
    "vit": "beit_base_patch16_224",
}
"""The model of timm whose code is taken; its shape is told in the call."""
_TIMM_EPS = {"swin": 1e-5, "swinv2": 1e-5, "vit": 1e-6}


def export_weights(model: nn.Module, path: str | Path, layout: Layout) -> Path:
    """Writes weights as safetensors in a layout of ``save_weights``, whole as other codes expect them.

    Raises:
        UserError: if a part is missing, or the file cannot be written.
    """
    if layout != "sgmim":
        source_of(model).check_whole(f"layout {layout!r}")
    return save_weights(model, path, layout)


@dataclass(frozen=True)
class TimmExport:
    """A file for timm."""

    path: Path
    call: str
    """Python that builds timm's model with these weights; ``import timm`` before, and ``torch`` and ``partial`` where
    it names them."""
    difference: float
    """Largest absolute difference of its features from the encoder's, of a batch of noise in float32 on the CPU."""


def export_timm(
    model: nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> TimmExport:
    """Writes the encoder's weights for timm, and finds the ``create_model`` call that reads them.

    The call has been made, and what timm's model gives has been compared. Without the encoder's last norm, which
    backbones with ``norm="none"`` lack, it is one with ``features_only=True``, that gives the same maps.

    Args:
        model: a pre-training model, its encoder, or a backbone that gives its last map.
        path: ends in ``.safetensors``; its folder exists.
        image_size: side or (height, width) in pixels of the images for timm; unless given, that of the configuration.
        tolerance: see ``exporting.source.check_same``.

    Raises:
        UserError: if timm has no such model or its differs, or the file cannot be written.
    """
    source = source_of(model)
    source.check_whole("timm")
    if image_size is None and source.image_size is None:
        raise UserError(
            "image_size (--image-size) is needed: timm's models are made for one, and this backbone for none"
        )
    sides = sides_of(image_size if image_size is not None else source.image_size)  # type: ignore[arg-type]
    _check_sides(source.shape, sides)
    name, options = _TIMM[source.shape.encoder], _options(source, sides)
    path = check_path(path, ".safetensors")
    image, encoder = example(sides), plain_copy(source.encoder)
    with beside(path) as temporary, torch.no_grad():
        save_weights(source.encoder, temporary, "timm")
        theirs = _made(name, options | _reading(source, temporary))
        if encoder.norm is None:
            maps = dict(zip(source.shape.out_indices, encoder.maps_of(image), strict=True))
            ours, given = list(maps.values()), theirs(image)
            if source.shape.encoder == "vit":
                given = [x.permute(0, 2, 3, 1) for x in given]
        else:
            ours = [encoder(image)]
            tokens = theirs.forward_features(image)
            given = [tokens[:, 1:] if source.shape.encoder == "vit" else tokens.flatten(1, 2)]
        difference = check_same(ours, given, "timm's model", tolerance, _why_timm_differs(source.shape, sides))
    return TimmExport(path, _call(name, options | _reading(source, path)), difference)


def _check_sides(shape: BackboneConfig, sides: tuple[int, int]) -> None:
    """Refuses an image for which timm's model would be another."""
    rows, columns = (side // shape.patch_size for side in sides)
    if shape.encoder == "vit" and (rows, columns) != shape.stage_map(0):
        own = tuple(side * shape.patch_size for side in shape.stage_map(0))
        raise UserError(
            f"timm's Beit takes images of one size, and the position table here is for {own}, not {sides}; name that "
            "one, or build the backbone for the other"
        )


def _why_timm_differs(shape: BackboneConfig, sides: tuple[int, int]) -> str:
    """The stages whose windows timm pads, reduces or shifts otherwise; nothing where it does as here."""
    if shape.encoder == "vit":
        return ""
    stages = []
    for stage in range(shape.levels):
        rows, columns = (-(-side // (shape.patch_size * 2**stage)) for side in sides)
        window = shape.window_of(stage)[0]
        covered = [side <= window for side in (rows, columns)]
        if rows % window or columns % window or (any(covered) and (shape.shift_covered or not all(covered))):
            stages.append(f"{window} on {rows}x{columns} tokens in stage {stage}")
    if not stages:
        return ""
    return (
        f"timm pads, shifts and reduces windows otherwise where they do not divide a map or cover a side of it: here "
        f"{', '.join(stages)}; choose an image_size whose maps they divide"
    )


def _options(source: Source, sides: tuple[int, int]) -> dict[str, Any]:
    shape = source.shape
    options: dict[str, Any] = {"img_size": sides, "patch_size": shape.patch_size, "embed_dim": shape.embed_dim}
    if shape.norm_eps != _TIMM_EPS[shape.encoder]:
        options["norm_layer"] = partial(nn.LayerNorm, eps=shape.norm_eps)
    if shape.encoder == "vit":
        options |= {"depth": shape.depths[0], "num_heads": shape.num_heads[0], "init_values": shape.layer_scale_init}
        return options | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    windows, shifts, pretrained = zip(*(shape.window_of(stage) for stage in range(shape.levels)), strict=True)
    if not all(shift or depth == 1 for shift, depth in zip(shifts, shape.depths, strict=True)):
        raise UserError(f"timm's models shift windows in every stage; this one has use_shift {shifts}")
    options |= {"depths": shape.depths, "num_heads": shape.num_heads}
    # Two plain numbers would be one window's height and width.
    options["window_size"] = windows[0] if len(set(windows)) == 1 else tuple((side, side) for side in windows)
    if pretrained != windows and shape.encoder == "swinv2":
        options["pretrained_window_sizes"] = pretrained
    return options


def _reading(source: Source, path: Path) -> dict[str, Any]:
    """Options of timm that read a file."""
    if source.encoder.norm is None:
        overlay = {"file": str(path)}
        features = {"features_only": True, "out_indices": _outputs(source)}
        return features | {"pretrained": True, "pretrained_cfg_overlay": overlay}
    pooling = {"global_pool": "token"} if source.shape.encoder == "vit" else {}
    return {"num_classes": 0, **pooling, "checkpoint_path": str(path)}


def _outputs(source: Source) -> tuple[int, ...]:
    """Each map once, although a backbone of few blocks may give it twice."""
    return tuple(sorted(set(source.shape.out_indices)))


def _made(name: str, options: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, **options).eval()
    # Whatever timm cannot build or load, it tells by an exception of its own.
    except Exception as error:
        raise UserError(f"timm {timm.__version__} cannot load it ({first_line(error)})") from error


def _call(name: str, options: dict[str, Any]) -> str:
    written = [repr(name), *(f"{option}={_written(value)}" for option, value in options.items())]
    return f"timm.create_model({', '.join(written)})"


def _written(value: Any) -> str:
    if isinstance(value, partial):
        return f"partial(torch.nn.LayerNorm, eps={value.keywords['eps']})"
    return repr(value)
