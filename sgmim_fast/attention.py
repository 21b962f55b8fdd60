"""The attention functions of ``reference`` through a library's fused attention instead of its plain formula.

``"sdpa"`` is PyTorch's scaled_dot_product_attention, ``"xformers"`` its memory_efficient_attention. Both take the bias
(position table, shift mask, the null token's count) as a tensor that is added to the logits. ``"auto"`` means none of
them: the backend's own attention.
"""

import math
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast import reference
from sgmim_fast.errors import UserError, first_line

ATTENTIONS = ("auto", "sdpa", "xformers")
XFORMERS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNED = 8  # numbers; what xformers asks of every stride of a bias


def check_attention(attention: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Refuse an attention that cannot run on such tensors, or not beside ``backend`` (resolved, never ``"auto"``).

    Raises:
        UserError: with the reason and the remedy.
    """
    if attention not in ATTENTIONS:
        raise UserError(f"attention {attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if attention == "auto":
        return
    if backend == "reference":
        raise UserError(
            f'attention "{attention}" cannot replace what backend "reference" computes: it is what the others are '
            'compared with; choose attention "auto", or backend "torch" or "triton"'
        )
    if attention == "xformers" and (reason := _xformers_objection(device, dtype)) is not None:
        raise UserError(f'attention "xformers" cannot run here: {reason}; or choose "auto" or "sdpa"')


@cache
def _xformers_objection(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cuda", "meta"):  # meta tensors only ask for shapes
        return f"it needs a GPU, and this is on the {device.type.upper()}; move it to one"
    if dtype not in XFORMERS_DTYPES:
        return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if find_spec("xformers") is None:
        return "it is not installed; install xformers 0.0.35 or newer"
    try:
        import xformers.ops
    except Exception as error:  # whatever a package built for another PyTorch raises
        return f"it cannot be imported ({first_line(error)}); install it again"
    if not hasattr(xformers.ops, "memory_efficient_attention"):
        return "its attention is missing; install it again"
    try:
        if device.type == "cuda":
            _try_xformers(device, dtype)
    except Exception as error:
        return f"its kernels do not run on this GPU ({first_line(error)})"
    return None


def _try_xformers(device: torch.device, dtype: torch.dtype) -> None:
    """A small attention with a bias, forward and backward."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, 8, 1, 32, device=device, dtype=dtype, requires_grad=True)
        bias = torch.zeros(1, 1, 8, 8, device=device, dtype=dtype, requires_grad=True)
        torch.autograd.grad(_xformers(x, x, x, bias, 1.0).sum(), (x, bias))


def window_attention(
    attention: str, qkv: Tensor, table: Tensor, window: int, shift: int, logit_scale: Tensor | None = None
) -> Tensor:
    """``reference.window_attention`` by ``attention``; arguments and result as there."""
    batch, height, width, _, heads, size = qkv.shape
    down, right = height // window, width // window
    q, k, v = qkv.unbind(3)  # each (B, H, W, T, D)
    scale = size**-0.5
    if logit_scale is not None:
        q = (F.normalize(q, dim=-1) * logit_scale[:, None]).to(v.dtype)
        k, scale = F.normalize(k, dim=-1).to(v.dtype), 1.0
    bias = reference.table_bias(table, window, window)[None]  # (1, T, N, N)
    if shift:
        # The bias differs from window to window. As heads of one sample they share it over the batch.
        mask = reference.shifted_region_mask(height, width, window, shift, qkv.device)
        bias = (bias + mask[:, None].to(bias.dtype)).flatten(0, 1)[None]  # (1, windows * T, N, N)
        order, shape = (0, 2, 4, 1, 3, 5, 6), (batch, window**2, down * right * heads, size)
    else:
        order, shape = (0, 1, 3, 2, 4, 5, 6), (batch * down * right, window**2, heads, size)

    def split(x: Tensor) -> Tensor:
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        return x.reshape(batch, down, window, right, window, heads, size).permute(order).reshape(shape)

    out = _attend(attention, split(q), split(k), split(v), bias, scale)
    split_shape = [(batch, down, window, right, window, heads, size)[place] for place in order]
    back = [order.index(place) for place in range(len(order))]
    out = out.reshape(split_shape).permute(back).reshape(batch, height, width, heads * size)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


def class_token_attention(attention: str, qkv: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """``reference.class_token_attention`` by ``attention``; arguments and result as there."""
    q, k, v = qkv.unbind(2)  # each (B, N, T, D)
    bias = reference.table_bias(table, *grid, class_token=True)[None]
    return _attend(attention, q, k, v, bias, q.shape[-1] ** -0.5).flatten(2)


def guidance_attention(
    attention: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    count: int = 0,
) -> Tensor:
    """``reference.guidance_attention`` by ``attention``: the null token is one key more, log(count) its bias."""
    bias = None
    if count and null_k is not None and null_v is not None:
        k, v = (torch.cat((x, null.expand(len(x), 1, -1, -1)), 1) for x, null in ((k, null_k), (v, null_v)))
        bias = F.pad(q.new_zeros(k.shape[1] - 1), (0, 1), value=math.log(count)).view(1, 1, 1, -1)
    return _attend(attention, q, k, v, bias, q.shape[-1] ** -0.5).flatten(2)


def _attend(attention: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k + bias) v of q (b, Nq, T, D), k and v (b, Nk, T, D) -> (b, Nq, T, D).

    ``bias`` is (1, T or 1, Nq or 1, Nk), the same for every sample.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if attention == "xformers":
        return _xformers(q, k, v, bias, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if bias is not None:
        keys = k.shape[1]
        room = bias.new_zeros(*bias.shape[:-1], -(-keys // ALIGNED) * ALIGNED)
        room[..., :keys] = bias
        bias = room[..., :keys].expand(q.shape[0], q.shape[2], q.shape[1], keys)
    try:
        return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    except NotImplementedError as error:
        what = f"heads of {q.shape[-1]} channels in {str(q.dtype).removeprefix('torch.')}"
        raise UserError(
            f'attention "xformers" has no kernel for {what} on this GPU; choose "auto" or "sdpa"'
        ) from error
