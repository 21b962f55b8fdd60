"""The encoder's matrix products in 8-bit floating point, by torchao: an opt-in of training.

Operands of a product, in the forward and in the backward pass, are rounded to FP8 with scales of the moment; weights,
gradients, optimizer and everything between the products keep their types. One recipe differs from another in how many
numbers share a scale, and in what is left in the model's own type.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433); torchao's ``Float8LinearRecipeName``.
"""

import functools
from dataclasses import replace
from importlib import import_module
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sgmim_fast.config import Float8
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.library_noise import without_torchao_complaints
from sgmim_fast.models.layers import QkvLinear, qkv_bias

MULTIPLE = 16
"""Of the widths of both sides of a product; the number of rows is filled up."""
CAPABILITY = (8, 9)
"""Of a GPU that multiplies FP8."""
LEFT_OUT = "cpb_mlp"
"""Swin V2's table of position biases: a few hundred rows whose result every window sees."""


def check_float8(float8: Float8, device: torch.device) -> None:
    """Refuse a recipe that cannot run on ``device``.

    Raises:
        UserError: with the reason and the remedy.
    """
    if float8 not in get_args(Float8):
        raise UserError(f"float8 {float8!r} is unknown; choose one of {', '.join(get_args(Float8))}")
    if float8 != "off" and (reason := _objection(device)) is not None:
        raise UserError(f'float8 "{float8}" cannot run here: {reason}; or choose "off"')


def _objection(device: torch.device) -> str | None:
    try:
        _torchao()
    except ModuleNotFoundError as error:
        if error.name == "torchao":
            return "torchao is not installed; pip install 'sgmim-fast[float8]'"
        return f"torchao cannot be imported ({first_line(error)}); install it again"
    except Exception as error:  # whatever a package built for another PyTorch raises
        return f"torchao cannot be imported ({first_line(error)}); install it again"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            here, least = (".".join(map(str, numbers)) for numbers in (capability, CAPABILITY))
            return f"this GPU has compute capability {here}, products of FP8 need {least} or more"
    return None


def _torchao() -> Any:
    with without_torchao_complaints():
        return import_module("torchao.float8")


def use_float8(model: nn.Module, float8: Float8) -> None:
    """Let the linear layers of the encoder's blocks, and of its mergings, multiply in FP8; parameters stay as they are.

    Heads, guidance, patch embedding and Swin V2's table of position biases are left alone, as are layers of a width
    that is no multiple of 16. It is for training: a model is converted once.

    Args:
        model: holds encoders as its submodules, or is one.
        float8: "off" does nothing; otherwise a recipe of torchao.

    Raises:
        UserError: if the recipe is unknown, cannot run where the model is, or finds no layer.
    """
    check_float8(float8, next(model.parameters()).device)
    if float8 == "off":
        return
    library = _torchao()
    # The product that gives a weight's gradient runs over the tokens of a batch, of which there may be any number.
    recipe = replace(library.Float8LinearConfig.from_recipe_name(float8), pad_inner_dim=True)
    found = [(parent, name, layer) for parent, name, layer in _layers(model) if _fits(layer)]
    if not found:
        raise UserError(
            f'float8 "{float8}" finds no linear layer whose widths are multiples of {MULTIPLE}; choose another '
            'model.embed_dim, or float8 "off"'
        )
    for parent, name, layer in found:
        new = library.convert_to_float8_training(layer, config=recipe)
        if isinstance(layer, QkvLinear):
            kind: Any = type(new)
            new.__class__ = _with_outside_bias(kind)
        new.train(layer.training)
        setattr(parent, name, new)


def _layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers of encoders' stages or blocks, each with its parent and its name there."""
    found = []
    for path, parent in model.named_modules():
        words = path.split(".")
        if LEFT_OUT in words or not {"layers", "blocks"} & set(words):
            continue
        found += [(parent, name, child) for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    return found


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


@functools.cache
def _with_outside_bias(linear: type[nn.Linear]) -> type[nn.Linear]:
    """``linear`` that is called as ``QkvLinear`` is."""

    class Float8QkvLinear(linear):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor, q_bias: Tensor, v_bias: Tensor) -> Tensor:
            product: Tensor = super().forward(x)
            return product + qkv_bias(q_bias, v_bias).to(product.dtype)

    return Float8QkvLinear
