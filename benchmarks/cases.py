"""One operation at one shape: inputs, what a call must at least move and multiply, the plain truth.

Shape letters as in ``sgmim_fast.reference``. ``benchmarks.shapes`` has the shapes of the recipes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast import reference

Inputs = dict[str, Tensor]
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Work:
    """The least that one pass must do: bytes read and written once each, floating-point operations of products."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    op: str
    """Its name in ``sgmim_fast.ops``, or a piece of the model that is none of its."""
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    """Of floating inputs by keyword, in the dtype under test unless ``single`` names them."""
    forward: Callable[[int], Work]
    """By bytes of a number in the dtype under test."""
    backward: Callable[[int], Work] | None = None
    """None where there is no gradient."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords, the same for every set of inputs."""
    index: tuple[str, int, int] | None = None
    """Keyword of an index list, its length and how many places there are."""
    single: tuple[str, ...] = ()
    """Inputs that are float32 whatever the rest is."""
    fixed: tuple[str, ...] = ()
    """Floating inputs that get no gradient."""
    whole: bool = False
    """Whether the result mixes samples, so that all of them are needed to check any."""

    @property
    def batch(self) -> int:
        return next(iter(self.shapes.values()))[0]

    def wanted(self) -> list[str]:
        """Inputs that get a gradient."""
        return [] if self.backward is None else [name for name in self.shapes if name not in self.fixed]

    def is_batched(self, name: str) -> bool:
        """Whether an input holds something of each sample."""
        return name not in SHARED

    def make(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Fresh random inputs."""
        generator = torch.Generator(device).manual_seed(seed)
        inputs = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            value = SCALES.get(name, lambda x: x)(value)
            value = value if name in self.single else value.to(dtype)
            inputs[name] = value.requires_grad_(name in self.wanted())
        if self.index is not None:
            name, count, places = self.index
            order = torch.rand(self.batch, places, generator=generator, device=device).argsort(1)
            inputs[name] = order[:, :count].sort(1).values.to(torch.int32)
        return inputs

    def truth(self, **inputs: Tensor) -> Result:
        """The plain function, in the dtype of the inputs."""
        return PLAIN[self.op](**inputs, **self.constants)


def tensors(result: Result) -> tuple[Tensor, ...]:
    """All that an operation gives."""
    return (result,) if isinstance(result, Tensor) else result


# -- the plain truth


def attention_layer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    table: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    window: int,
    shift: int,
    attend: Callable[..., Tensor] = reference.window_attention,
) -> Tensor:
    """Window attention with the projections around it, (B, H, W, C) -> (B, H, W, C): what other libraries offer."""
    heads = table.shape[1]
    qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, heads, -1))
    return F.linear(attend(qkv, table, window, shift), proj_weight, proj_bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def residual_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a residual path and a branch, and its norm, which the next branch begins with."""
    total = x + branch
    return total, layer_norm(total, weight, bias)


def standardize_structure(maps: Tensor) -> Tensor:
    found = reference.trimmed_stats_by_selection(maps.flatten(2).flatten(0, 1))
    return reference.standardize(maps, *found)


PARAMETERS = (
    *("weight", "bias", "norm_weight", "norm_bias", "mask_token"),
    *("qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
)
SHARED = ("table", "logit_scale", "null_k", "null_v", "fill", *PARAMETERS)
"""Inputs that all samples have in common."""
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "logit_scale": lambda x: x.abs() * 5 + 5,  # learned ones lie around 10
    "weight": lambda x: x * 0.1,
    "qkv_weight": lambda x: x * x.shape[1] ** -0.5,
    "proj_weight": lambda x: x * x.shape[1] ** -0.5,
    "norm_weight": lambda x: 1 + 0.1 * x,
}
PLAIN: dict[str, Callable[..., Result]] = {
    "window_attention": reference.window_attention,
    "class_token_attention": reference.class_token_attention,
    "guidance_attention": reference.guidance_attention,
    "gather_rows": reference.gather_rows,
    "scatter_rows": reference.scatter_rows,
    "gather_cells": reference.gather_cells,
    "embed_visible": reference.embed_visible,
    "masked_l1": reference.masked_l1,
    "standardize_structure": standardize_structure,
    "attention_layer": attention_layer,
    "layer_norm": layer_norm,
    "residual_norm": residual_norm,
}
