"""Backbones by name, with weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sgmim_fast.config import Attention, BackboneConfig, Backend, Encoder, ModelConfig
from sgmim_fast.config.checks import known_fields
from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.recipes import MODELS
from sgmim_fast.weight_windows import read_windows
from sgmim_fast.weights import load_weights, read_backbone_config, read_config

NAMES = tuple(name.removeprefix("sgmim_") for name in MODELS if name.startswith("sgmim_"))


def create_backbone(
    backbone: str | BackboneConfig | ModelConfig | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | tuple[int, ...] | None = None,
    use_shift: bool | tuple[bool, ...] | None = None,
    weights: str | Path | Mapping[str, Any] | None = None,
    backend: Backend = "auto",
    attention: Attention = "auto",
    **overrides: Any,
) -> Backbone:
    """A backbone, with weights if they are given.

    Args:
        backbone: ``"swin_base"``, ``"swin_large"``, ``"swinv2_base"``, ``"vit_base"`` (also as ``"sgmim_..."`` and
            ``"simmim_..."``), a configuration, or one of pre-training. None takes the architecture that ``weights``
            names, a file of ``save_weights``.
        image_size: side or (height, width) in pixels of the images to come; see ``BackboneConfig``. Others are taken.
        window_size: tokens a window side, for all stages or one entry a stage; None for those of pre-training, which
            are the weights' where they tell (``weight_windows``), and else those that the name stands for.
        use_shift: whether windows are shifted, for all stages or one entry a stage.
        weights: what ``load_weights`` reads; position tables of other windows are resized. What the encoder needs must
            be there.
        backend: which implementation runs; see ``Backbone.set_backend``.
        attention: whose attention runs; see ``Backbone.set_attention``.
        **overrides: further fields of ``BackboneConfig`` to change.

    Raises:
        UserError: for an unknown name or field, a combination that cannot be built, or weights that do not fit.
    """
    named = {"image_size": image_size, "window_size": window_size, "use_shift": use_shift}
    overrides |= {name: value for name, value in named.items() if value is not None}
    known_fields(BackboneConfig, overrides)
    stored = _stored_shape(weights) if isinstance(weights, str | Path) else None
    if backbone is None:
        if stored is None:
            where = "no weights are given" if weights is None else "the weights do not say which they are of"
            raise UserError(f"backbone is needed where {where}; choose one of {', '.join(NAMES)}")
        config = replace(stored, **overrides)
    elif isinstance(backbone, BackboneConfig):
        config = replace(backbone, **overrides)
    elif isinstance(backbone, ModelConfig):
        config = BackboneConfig.from_pretraining(backbone, **overrides)
    else:
        config = _named_shape(backbone, stored, weights, overrides)
    made = Backbone(config, backend, attention)
    if weights is not None:
        load_weights(made, weights)
    return made


def _stored_shape(path: str | Path) -> BackboneConfig | None:
    """The shape of the backbone, or of the pre-trained encoder, in a file of ours."""
    model = read_config(path)
    return read_backbone_config(path) if model is None else BackboneConfig.from_pretraining(model)


def _named_shape(name: str, stored: BackboneConfig | None, weights: Any, overrides: dict[str, Any]) -> BackboneConfig:
    """The shape that a name stands for, position tables and offsets as the weights have them unless told otherwise."""
    model = MODELS.get(f"sgmim_{name}", MODELS.get(name)) if isinstance(name, str) else None
    if model is None:
        raise UserError(f"backbone {name!r} is unknown; choose one of {', '.join(NAMES)}")
    depths = overrides.get("depths", model.depths)
    told = _told_windows(model.encoder, stored, weights)
    if isinstance(depths, tuple | list) and all(len(windows) == len(depths) for windows in told.values()):
        overrides = told | overrides
    if model.encoder == "vit" and stored is not None and stored.encoder == "vit":
        overrides = {"image_size": stored.image_size} | overrides
    return BackboneConfig.from_pretraining(model, **overrides)


def _told_windows(encoder: Encoder, stored: BackboneConfig | None, weights: Any) -> dict[str, tuple[int, ...]]:
    """Windows and measure of offsets of the weights for a Swin, whichever those are that a name stands for."""
    if encoder == "vit" or weights is None:
        return {}
    if stored is None:
        found = read_windows(weights)
    elif stored.encoder == encoder:
        stages = [stored.window_of(stage) for stage in range(stored.levels)]
        found = tuple(window for window, _, _ in stages), tuple(measure for _, _, measure in stages)
    else:
        found = None
    return {} if found is None else dict(zip(("window_size", "pretrained_window_size"), found, strict=True))
