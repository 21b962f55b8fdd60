"""Attention in (shifted) windows of a token map, or over a class token and a map, with a relative position bias.

``qkv`` is read where the projection wrote it, in image order: shift, partition and their reverse are index arithmetic.
Kept for backward: qkv, the output, and one log-sum-exp a row. Nothing of N x N is written.
Sources: Swin (arXiv 2103.14030), Swin V2 (2111.09883), BEiT (2106.08254); the running softmax is FlashAttention's
(2205.14135).
"""

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.kernels.window_backward import launch_backward
from sgmim_fast.kernels.window_forward import launch_forward
from sgmim_fast.kernels.window_tiles import Windows, of_class_token, of_map, statistics


def window_attention(qkv: Tensor, table: Tensor, window: int, shift: int, logit_scale: Tensor | None) -> Tensor:
    """qkv (B, H, W, 3, T, D), table (P, T), logit_scale (T,) or None -> (B, H, W, T * D)."""
    return _attend(qkv, table, logit_scale, of_map(qkv, window, shift))


def class_token_attention(qkv: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """qkv (B, 1 + H * W, 3, T, D), table (P, T) -> (B, 1 + H * W, T * D)."""
    return _attend(qkv.unsqueeze(1), table, None, of_class_token(grid)).squeeze(1)


def _attend(qkv: Tensor, table: Tensor, scale: Tensor | None, windows: Windows) -> Tensor:
    # A head's biases side by side: kernels read them many times, each for neighbouring positions.
    bias = table.t().contiguous()
    return window_attention_forward(qkv, bias, None if scale is None else scale.contiguous(), list(windows))[0]


@torch.library.custom_op("sgmim_fast::window_attention", mutates_args=())
def window_attention_forward(
    qkv: Tensor, bias: Tensor, scale: Tensor | None, windows: list[int]
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, T * D) and base-2 log-sum-exps (windows, T, N); ``windows`` is ``Windows`` as a list."""
    return launch_forward(qkv, bias, scale, _windows(windows))


@window_attention_forward.register_fake
def _(qkv: Tensor, bias: Tensor, scale: Tensor | None, windows: list[int]) -> tuple[Tensor, Tensor]:
    batch, height, width, _, heads, size = qkv.shape
    group = _windows(windows)
    out = qkv.new_empty(batch, height, width, heads * size)
    return out, qkv.new_empty(batch * group.per_map, heads, group.tokens, dtype=statistics(qkv.dtype))


@torch.library.custom_op("sgmim_fast::window_attention_backward", mutates_args=())
def window_attention_backward(
    qkv: Tensor, bias: Tensor, scale: Tensor | None, windows: list[int], out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias and scale; the last is (0,) where there is no scale."""
    return launch_backward(qkv, bias, scale, _windows(windows), out, lse, dout)


@window_attention_backward.register_fake
def _(
    qkv: Tensor, bias: Tensor, scale: Tensor | None, windows: list[int], out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dscale = qkv.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape), dscale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, scale, windows = inputs
    ctx.windows, ctx.scaled = windows, scale is not None
    ctx.save_for_backward(qkv, bias, *([scale] if ctx.scaled else []), *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, bias, *scale, out, lse = ctx.saved_tensors
    dqkv, dbias, dscale = window_attention_backward(qkv, bias, scale[0] if scale else None, ctx.windows, out, lse, dout)
    return dqkv, dbias, dscale if ctx.scaled else None, None


window_attention_forward.register_autograd(_gradients, setup_context=_keep)


def _windows(numbers: list[int]) -> Windows:
    return Windows._make((*numbers[:-1], bool(numbers[-1])))
