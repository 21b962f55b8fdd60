"""Who else can do what the kernels do, from the same inputs: plain PyTorch, its compiler, its fused attentions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.cases import Case, Inputs
from sgmim_fast import ops, reference

OURS = "triton"
ATTENTIONS = ("window_attention", "class_token_attention", "guidance_attention")
NAMES = (OURS, "plain", "sdpa", "dense", "copy", "compiled", "flex", "max-autotune")
"""Cheap ones first: the last three are compiled, which takes long."""
COMPILED = ("compiled", "flex", "max-autotune")


@dataclass(frozen=True)
class Contender:
    """One implementation of a case."""

    call: Callable[..., Tensor]
    prepare: Callable[[Inputs], Inputs] | None = None
    """Makes its own inputs of the case's, untimed; its result's first rows are then the case's."""


def contender(name: str, case: Case) -> Contender | None:
    """The implementation by name; None if it cannot express the case."""
    function = partial(getattr(ops, case.op), **case.constants)
    if name == OURS:
        return Contender(partial(function, backend="triton"))
    if name == "plain":
        return Contender(case.truth)
    if name == "compiled":
        return Contender(torch.compile(case.truth, dynamic=False))
    if name == "max-autotune":
        return Contender(torch.compile(case.truth, dynamic=False, mode="max-autotune-no-cudagraphs"))
    if name == "sdpa" and case.op in ATTENTIONS:
        return Contender(partial(function, backend="torch", attention="sdpa"))
    if name == "dense" and case.op == "guidance_attention":
        return Contender(dense_attention, prepare=partial(dense_inputs, count=case.constants["count"]))
    if name == "flex" and case.op == "window_attention":
        return Contender(torch.compile(partial(flex_window_attention, **case.constants), dynamic=False))
    if name == "flex" and case.op == "class_token_attention":
        return Contender(torch.compile(partial(flex_class_token_attention, **case.constants), dynamic=False))
    return None


# -- guidance over all tokens, which is what it replaces


def dense_inputs(inputs: Inputs, count: int) -> Inputs:
    """Queries and keys of every token, in the layout of fused attention: (B, T, L, D)."""
    q, k, v = inputs["q"].detach(), inputs["k"].detach(), inputs["v"].detach()
    batch, missing = len(q), k.shape[1]
    more = q.new_zeros(batch, missing, *q.shape[2:]).normal_()
    parts = {"q": torch.cat((q, more), 1)}
    for name, x in (("k", k), ("v", v)):
        null = inputs[f"null_{name}"].detach().expand(batch, count, -1, -1)
        parts[name] = torch.cat((x, null), 1)
    return {name: x.transpose(1, 2).contiguous().requires_grad_() for name, x in parts.items()}


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, L, D) each -> (B, L, T * D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# -- FlexAttention


def flex_window_attention(
    qkv: Tensor, table: Tensor, window: int, shift: int, logit_scale: Tensor | None = None
) -> Tensor:
    """``reference.window_attention``: windows as samples, bias and shift mask as a function of the positions."""
    batch, height, width, _, heads, size = qkv.shape
    down, right = height // window, width // window
    if shift:
        qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
    parts = qkv.reshape(batch, down, window, right, window, 3, heads, size).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = parts.reshape(3, batch * down * right, heads, window**2, size).unbind(0)
    scale = size**-0.5
    if logit_scale is not None:
        q = (F.normalize(q, dim=-1) * logit_scale[:, None, None]).to(v.dtype)
        k, scale = F.normalize(k, dim=-1).to(v.dtype), 1.0
    middle, row = window - 1, 2 * window - 1

    def score(value: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (i // window - j // window + middle) * row + i % window - j % window + middle
        value = value + table[distance, head]
        if not shift:
            return value
        low, left = b // right % down == down - 1, b % right == right - 1
        edge = window - shift
        apart = (low & ((i // window < edge) != (j // window < edge))) | (
            left & ((i % window < edge) != (j % window < edge))
        )
        return torch.where(apart, value - 100.0, value)

    out = flex_attention(q, k, v, score_mod=score, scale=scale)
    assert isinstance(out, Tensor)
    out = out.reshape(batch, down, right, heads, window, window, size).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, height, width, heads * size)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


def flex_class_token_attention(qkv: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """``reference.class_token_attention``: the bias by a lookup."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    index = reference.relative_position_index(*grid, True, qkv.device)

    def score(value: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return value + table[index[i, j], head]

    out = flex_attention(q, k, v, score_mod=score)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2)
