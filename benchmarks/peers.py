"""Who else can do what the kernels do, from the same inputs: plain PyTorch, its compiler, and other libraries."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.cases import Case, Inputs, Result, attention_layer
from sgmim_fast import nvidia_apex, ops, reference
from sgmim_fast.attention import check_attention
from sgmim_fast.errors import UserError

OURS = "triton"
ATTENTIONS = ("window_attention", "class_token_attention", "guidance_attention")
NORMS = ("layer_norm", "residual_norm")
"""Operations without a kernel of ours."""
NAMES = {
    OURS: "the kernels",
    "plain": "plain PyTorch, eager",
    "sdpa": "PyTorch's scaled_dot_product_attention, the bias as a tensor",
    "xformers": "xformers' memory_efficient_attention, the bias padded to a stride of 8 and the padding counted",
    "dense": "guidance over all tokens by SDPA, which is what the gathered one replaces",
    "timm": "the attention of timm's Swin block",
    "timm-fused": "the same with timm's fused attention switched on",
    "apex": "NVIDIA Apex's FusedLayerNorm",
    "copy": "a copy of as many bytes",
    "compiled": "plain PyTorch under torch.compile",
    "flex": "FlexAttention under torch.compile",
    "max-autotune": "plain PyTorch under torch.compile, mode max-autotune",
}
"""Cheap ones first: the last three are compiled, which takes long."""
COMPILED = ("compiled", "flex", "max-autotune")


@dataclass(frozen=True)
class Contender:
    """One implementation of a case."""

    call: Callable[..., Result]
    prepare: Callable[[Inputs], Inputs] | None = None
    """Makes its own inputs of the case's, untimed; its result's first rows are then the case's."""


def expresses(name: str, case: Case) -> bool:
    """Whether an implementation is one of this operation at all."""
    attention = case.op in (*ATTENTIONS, "attention_layer")
    only = {
        OURS: case.op not in NORMS,
        "sdpa": attention,
        "xformers": attention,
        "dense": case.op == "guidance_attention",
        "timm": case.op == "attention_layer",
        "timm-fused": case.op == "attention_layer",
        "apex": case.op == "layer_norm",
        "flex": case.op in FLEX,
    }
    return only.get(name, True)


def contender(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Contender:
    """The implementation by name, of a case that it expresses.

    Raises:
        UserError: if its library is not there or does not run here.
    """
    if name == OURS:
        return Contender(_ours(case, backend="triton"))
    if name in ("sdpa", "xformers"):
        check_attention(name, "torch", device, dtype)
        return Contender(_ours(case, backend="torch", attention=name))
    if name == "compiled":
        return Contender(torch.compile(case.truth, dynamic=False))
    if name == "max-autotune":
        # CUDA graphs would copy every input to where the graph reads it, and that is not the operation.
        return Contender(torch.compile(case.truth, dynamic=False, mode="max-autotune-no-cudagraphs"))
    if name == "dense":
        return Contender(dense_attention, prepare=partial(dense_inputs, count=case.constants["count"]))
    if name == "flex":
        return Contender(torch.compile(partial(FLEX[case.op], **case.constants), dynamic=False))
    if name in ("timm", "timm-fused"):
        return Contender(timm_layer(case, device, dtype, fused=name == "timm-fused"))
    if name == "apex":
        return Contender(apex_layer_norm(case, device))
    assert name == "plain", name
    return Contender(case.truth)


def _ours(case: Case, **choice: str) -> Callable[..., Tensor]:
    """The operation of ``sgmim_fast.ops`` by the implementation chosen."""
    if case.op == "attention_layer":
        return partial(attention_layer, **case.constants, attend=partial(ops.window_attention, **choice))  # type: ignore[arg-type]
    return partial(getattr(ops, case.op), **case.constants, **choice)


# -- other libraries' layers


def timm_layer(case: Case, device: torch.device, dtype: torch.dtype, fused: bool) -> Callable[..., Tensor]:
    """The attention of timm's Swin block, from shift to shift, on the weights of the inputs."""
    try:
        from timm.models.swin_transformer import SwinTransformerBlock
    except ImportError as error:
        raise UserError("timm is not installed; install timm 1.0 or newer") from error
    _, height, width, channels = case.shapes["x"]
    heads, window, shift = case.shapes["table"][1], case.constants["window"], case.constants["shift"]
    with torch.device(device):
        block = SwinTransformerBlock(channels, (height, width), heads, window_size=window, shift_size=shift).to(dtype)
    block.attn.fused_attn = fused  # type: ignore[misc]
    layer = Attention(block)
    names = {
        "qkv_weight": "block.attn.qkv.weight",
        "qkv_bias": "block.attn.qkv.bias",
        "table": "block.attn.relative_position_bias_table",
        "proj_weight": "block.attn.proj.weight",
        "proj_bias": "block.attn.proj.bias",
    }

    def call(x: Tensor, **weights: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {names[name]: w for name, w in weights.items()}, (x,))
        return found

    return call


class Attention(nn.Module):
    """A block of timm's without its norms and its MLP."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block._attn(x)
        return found


def apex_layer_norm(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """Apex's norm on the weights of the inputs."""
    norm = nvidia_apex.load("normalization", "FusedLayerNorm")(case.shapes["weight"]).to(device)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return found

    return call


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


FLEX: dict[str, Callable[..., Tensor]] = {
    "window_attention": flex_window_attention,
    "class_token_attention": flex_class_token_attention,
}
