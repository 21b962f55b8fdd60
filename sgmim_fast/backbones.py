"""Backbones by name, with weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sgmim_fast.config import Attention, BackboneConfig, Backend, ModelConfig
from sgmim_fast.config.checks import known_fields
from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.recipes import MODELS
from sgmim_fast.weights import load_weights, read_config

NAMES = tuple(name.removeprefix("sgmim_") for name in MODELS if name.startswith("sgmim_"))


def create_backbone(
    backbone: str | BackboneConfig | None = None,
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
            ``"simmim_..."``), or a configuration. None takes the architecture that ``weights`` names, a file of
            ``save_weights``.
        image_size: side or (height, width) in pixels of the images to come; see ``BackboneConfig``. Others are taken.
        window_size: tokens a window side, for all stages or one entry a stage; None for those of pre-training.
        use_shift: whether windows are shifted, for all stages or one entry a stage.
        weights: what ``load_weights`` reads. What the encoder needs must be there.
        backend: which implementation runs; see ``Backbone.set_backend``.
        attention: whose attention runs; see ``Backbone.set_attention``.
        **overrides: further fields of ``BackboneConfig`` to change.

    Raises:
        UserError: for an unknown name or field, a combination that cannot be built, or weights that do not fit.
    """
    named = {"image_size": image_size, "window_size": window_size, "use_shift": use_shift}
    overrides |= {name: value for name, value in named.items() if value is not None}
    stored = read_config(weights) if isinstance(weights, str | Path) else None
    if isinstance(backbone, BackboneConfig):
        known_fields(BackboneConfig, overrides)
        config = replace(backbone, **overrides)
    else:
        config = _configured(_pretraining(backbone, stored, weights), stored, overrides)
    made = Backbone(config, backend, attention)
    if weights is not None:
        load_weights(made, weights)
    return made


def _pretraining(name: str | None, stored: ModelConfig | None, weights: Any) -> ModelConfig:
    if name is None:
        if stored is None:
            where = "no weights are given" if weights is None else f"{weights} does not say which it is"
            raise UserError(f"backbone is needed where {where}; choose one of {', '.join(NAMES)}")
        return stored
    if name not in NAMES and name not in MODELS:
        raise UserError(f"backbone {name!r} is unknown; choose one of {', '.join(NAMES)}")
    return MODELS[name if name in MODELS else f"sgmim_{name}"]


def _configured(model: ModelConfig, stored: ModelConfig | None, overrides: dict[str, Any]) -> BackboneConfig:
    found: dict[str, Any] = {}
    if stored is not None and stored.encoder == "swinv2" == model.encoder and len(stored.depths) == len(model.depths):
        # Swin V2 was trained on offsets measured by these, whatever windows the name stands for.
        found["pretrained_window_size"] = BackboneConfig.from_pretraining(stored).window_size
    return BackboneConfig.from_pretraining(model, **found | overrides)
