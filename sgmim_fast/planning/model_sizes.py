"""The sizes of a model's parameters, counted without the model's memory."""

from typing import Any

import torch
from torch import nn

from sgmim_fast.models.registry import create_model
from sgmim_fast.planning.parameters import ParameterSizes
from sgmim_fast.train.optim import parameter_groups


def parameter_sizes(model: nn.Module) -> ParameterSizes:
    """Of a model before DeepSpeed has it; the groups are those that the optimizer gets."""
    groups = (tuple(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.0))
    return ParameterSizes(tuple(group for group in groups if group))


def sizes_of(name: str, overrides: dict[str, Any]) -> ParameterSizes:
    """Of a named model with some fields of ``ModelConfig`` changed, built on the meta device.

    Raises:
        UserError: for an unknown name or field.
    """
    with torch.device("meta"):
        return parameter_sizes(create_model(name, **overrides))
