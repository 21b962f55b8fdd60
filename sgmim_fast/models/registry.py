"""Models by name."""

from dataclasses import replace
from typing import Any

from sgmim_fast.config import Attention, Backend, ModelConfig
from sgmim_fast.config.checks import known_fields
from sgmim_fast.errors import UserError
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.recipes import MODELS


def create_model(
    model: str | ModelConfig, backend: Backend = "auto", attention: Attention = "auto", **overrides: Any
) -> SGMIM:
    """A freshly initialised pre-training model.

    Args:
        model: a name such as ``"sgmim_swin_base"`` (see ``sgmim_fast.recipes.MODELS``) or a configuration.
        backend: which implementation runs; see ``SGMIM.set_backend``.
        attention: whose attention runs; see ``SGMIM.set_attention``.
        **overrides: fields of ``ModelConfig`` to change.

    Raises:
        UserError: for an unknown name or field, or a combination that cannot be built.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise UserError(f"model {model!r} is unknown; choose one of {', '.join(MODELS)}")
        model = MODELS[model]
    known_fields(ModelConfig, overrides)
    return SGMIM(replace(model, **overrides), backend, attention)
