"""Patch embedding of the visible cells, read straight from the picture, with one token in place of the others.

Small patches (Swin): one kernel projects, normalises and writes the token map; backward reads the pixels again and
recomputes the tokens instead of keeping them. Large patches (ViT): a kernel writes the matrix of patches, the product
is the vendor's, and ``scatter_tokens`` writes the map. A cell is 32 x 32 pixels, that is SIDE x SIDE patches of P x P.

Shape letters: B batch, V visible cells of a sample, G cells (W a row), T = SIDE * SIDE tokens of a cell, E channels of
a token, X = C * P * P inputs of a patch, R programs; BM BE BX blocks of tokens, channels, inputs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import launch
from sgmim_fast.kernels.cell_patches import CELL, gather_patches, pixels
from sgmim_fast.kernels.language import dot
from sgmim_fast.kernels.launch import ceil_div
from sgmim_fast.kernels.masked_tokens import acc, launch_fill_partials, scatter_tokens, sums


@triton.jit
def _weights(p_w, p_bias, o_e, o_x, E, X):
    """The weight matrix with the bias as input X, [BE, BX]."""
    m_e = o_e < E
    b_w = tl.load(p_w + o_e[:, None] * X + o_x[None, :], mask=m_e[:, None] & (o_x < X)[None, :], other=0.0)
    b_bias = tl.load(p_bias + o_e, mask=m_e, other=0.0).to(b_w.dtype)
    return tl.where((o_x == X)[None, :], b_bias[:, None], b_w)


@triton.jit
def _inputs(p_image, i_cell, o_t, o_x, X, W, s_c, s_y, s_x, P: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr):
    """Pixels of a cell's tokens, with a one that the bias is multiplied by, [BM, BX]."""
    p_pixels = p_image + pixels(i_cell, o_t, o_x, W, s_c, s_y, s_x, P)
    b_x = tl.load(p_pixels, mask=(o_x < X)[None, :], other=0.0)
    return tl.where((o_x == X)[None, :], 1.0, b_x.to(ACC)).to(DTYPE)


@triton.jit
def _embed(
    p_image, p_index, p_w, p_bias, p_scale, p_shift, p_token, p_out, p_r, eps,
    X, E, G, V, W, s_b, s_c, s_y, s_x, s_ib, s_iv,
    P: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program writes BM tokens of one cell, and with a norm keeps one over their deviations, (B, V, T)."""
    SIDE: tl.constexpr = 32 // P
    PARTS: tl.constexpr = SIDE * SIDE // BM
    DTYPE: tl.constexpr = p_w.dtype.element_ty
    i_part = tl.program_id(0) % PARTS
    i_cell = tl.program_id(0) // PARTS % G
    i_b = (tl.program_id(0) // PARTS // G).to(tl.int64)
    place = -1
    bad = 0
    for start in range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        b_index = tl.load(p_index + i_b * s_ib + o_v * s_iv, mask=o_v < V, other=0)
        place = tl.maximum(place, tl.max(tl.where((b_index == i_cell) & (o_v < V), o_v, -1), 0))
        bad += tl.sum(((b_index < 0) | (b_index >= G)).to(tl.int32), 0)
    o_t = i_part * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    o_row = i_cell // W * SIDE + o_t // SIDE
    o_column = i_cell % W * SIDE + o_t % SIDE
    o_out = (i_b * G * (SIDE * SIDE) + o_row * (W * SIDE) + o_column) * E
    p_out += o_out[:, None] + o_e[None, :]  # [BM, BE]
    if (place >= 0) & (bad == 0):
        o_x = tl.arange(0, BX)
        b_x = _inputs(p_image + i_b * s_b, i_cell, o_t, o_x, X, W, s_c, s_y, s_x, P, ACC, DTYPE)
        b_y = dot(b_x, tl.trans(_weights(p_w, p_bias, o_e, o_x, E, X)), "ieee").to(ACC)  # [BM, BE]
        if NORM:
            b_y = tl.where(m_e[None, :], b_y - (tl.sum(b_y, 1) / E)[:, None], 0.0)
            b_r = tl.rsqrt(tl.sum(b_y * b_y, 1) / E + eps)
            tl.store(p_r + (i_b * V + place) * (SIDE * SIDE) + o_t, b_r)
            b_y *= b_r[:, None] * tl.load(p_scale + o_e, mask=m_e, other=0.0).to(ACC)[None, :]
            b_y += tl.load(p_shift + o_e, mask=m_e, other=0.0).to(ACC)[None, :]
        tl.store(p_out, b_y.to(p_out.dtype.element_ty), mask=m_e[None, :])
    else:
        b_token = tl.load(p_token + o_e, mask=m_e, other=0.0).to(ACC)
        b_token = tl.where(bad > 0, float("nan"), b_token).to(p_out.dtype.element_ty)
        tl.store(p_out, tl.broadcast_to(b_token[None, :], [BM, BE]), mask=m_e[None, :])


@triton.jit
def _embed_backward(
    p_g, p_image, p_index, p_w, p_bias, p_scale, p_r, p_partials, s_partials, tiles, X, E, G, V, W,
    s_gb, s_gy, s_gx, s_ge, s_b, s_c, s_y, s_x, s_ib, s_iv,
    P: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program sums over every R-th tile of visible tokens.

    No tile of tokens x channels is computed. Let x be a token's inputs (the bias has a one), z = x / deviation, g its
    gradient, w the weights less their mean over the channels, and c = (g * scale) . (w z) / E. All gradients follow
    from U = sum(g z^T), S = sum(c z z^T) and sum(g): the weights' is scale * U - w S less its mean over the channels,
    the norm's scale's is the sum of each row of w * U. Without a norm the weights' is sum(g x^T).

    A program's row of the partials holds U, (E, BX), column X for the bias and column X + 1 for sum(g), then S,
    (X + 1, BX).
    """
    SIDE: tl.constexpr = 32 // P
    PARTS: tl.constexpr = SIDE * SIDE // BM
    DTYPE: tl.constexpr = p_w.dtype.element_ty
    o_e = tl.arange(0, BE)
    o_x = tl.arange(0, BX)
    m_e = o_e < E
    m_one = (o_x == X + 1)[None, :]
    if NORM:
        b_scale = tl.load(p_scale + o_e, mask=m_e, other=0.0).to(ACC)
        b_a = (_centred(_weights(p_w, p_bias, o_e, o_x, E, X).to(ACC), m_e, E) * b_scale[:, None]).to(DTYPE)
        b_s = tl.zeros([BX, BX], ACC)
    b_u = tl.zeros([BE, BX], ACC)
    for i_tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_b = (i_tile // PARTS // V).to(tl.int64)
        i_v = i_tile // PARTS % V
        o_t = i_tile % PARTS * BM + tl.arange(0, BM)
        i_cell = tl.load(p_index + i_b * s_ib + i_v * s_iv)
        i_cell = tl.minimum(tl.maximum(i_cell, 0), G - 1)  # what is out of range has made this sample NaN
        b_z = _inputs(p_image + i_b * s_b, i_cell, o_t, o_x, X, W, s_c, s_y, s_x, P, ACC, DTYPE)  # [BM, BX]
        o_row = (i_cell // W * SIDE + o_t // SIDE).to(tl.int64)
        o_column = (i_cell % W * SIDE + o_t % SIDE).to(tl.int64)
        p_rows = p_g + i_b * s_gb + (o_row * s_gy + o_column * s_gx)[:, None] + o_e[None, :] * s_ge
        b_g = tl.load(p_rows, mask=m_e[None, :], other=0.0).to(DTYPE)  # [BM, BE]
        if NORM:
            b_z *= tl.load(p_r + (i_b * V + i_v) * (SIDE * SIDE) + o_t)[:, None]
            b_c = tl.sum(b_z * dot(b_g, b_a, "ieee").to(ACC), 1) / E
            b_s += dot(tl.trans(b_z.to(DTYPE)), (b_z * b_c[:, None]).to(DTYPE), "ieee").to(ACC)
            b_z = tl.where(m_one, 1.0, b_z).to(DTYPE)
        b_u += dot(tl.trans(b_g), b_z, "ieee").to(ACC)
    p_partials += tl.program_id(0).to(tl.int64) * s_partials
    tl.store(p_partials + o_e[:, None] * BX + o_x[None, :], b_u, mask=m_e[:, None])
    if NORM:
        tl.store(p_partials + (E + o_x)[:, None] * BX + o_x[None, :], b_s, mask=(o_x <= X)[:, None])


@triton.jit
def _centred(b_w, m_e, E):
    """Less the mean over the E channels, which are its rows."""
    return tl.where(m_e[:, None], b_w - (tl.sum(b_w, 0) / E)[None, :], 0.0)


@triton.jit
def _column_sums(
    p_partials, p_tokens, p_sums, R, R_TOKENS, s_partials, E, BR: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr
):
    """Sums of the partials (R, s_partials), followed by those of the mask token's, (R_TOKENS, E)."""
    i_n = tl.program_id(0)
    blocks = tl.cdiv(s_partials, BN)
    N = s_partials
    if i_n >= blocks:
        i_n -= blocks
        p_partials = p_tokens
        p_sums += s_partials
        R = R_TOKENS
        N = E
    o_n = i_n * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BR, BN], ACC)
    for start in range(0, R, BR):
        o_r = start + tl.arange(0, BR)
        m = (o_r < R)[:, None] & (o_n < N)[None, :]
        b_sum += tl.load(p_partials + o_r.to(tl.int64)[:, None] * N + o_n[None, :], mask=m, other=0.0)
    tl.store(p_sums + o_n, tl.sum(b_sum, 0), mask=o_n < N)


@triton.jit
def _finish(
    p_sums, p_w, p_bias, p_scale, p_dw, p_dbias, p_dscale, p_dshift, p_dtoken, s_partials, X, E,
    NORM: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients from the sums: program i <= X of all weights of input i, the last of everything else."""
    i_x = tl.program_id(0)
    o_e = tl.arange(0, BE)
    o_x = tl.arange(0, BX)
    m_e = o_e < E
    if i_x <= X:
        b_dw = tl.load(p_sums + o_e * BX + i_x, mask=m_e, other=0.0)
        if NORM:
            b_w = _weights(p_w, p_bias, o_e, o_x, E, X).to(ACC)
            b_s = tl.load(p_sums + (E + i_x) * BX + o_x, mask=o_x <= X, other=0.0)
            b_dw *= tl.load(p_scale + o_e, mask=m_e, other=0.0).to(ACC)
            b_dw -= tl.sum(b_w * b_s[None, :], 1)
            b_dw -= tl.sum(b_dw, 0) / E
        tl.store(p_dw + o_e * X + i_x, b_dw.to(p_dw.dtype.element_ty), mask=m_e & (i_x < X))
        tl.store(p_dbias + o_e, b_dw.to(p_dbias.dtype.element_ty), mask=m_e & (i_x == X))
    else:
        b_dtoken = tl.load(p_sums + s_partials + o_e, mask=m_e, other=0.0)
        tl.store(p_dtoken + o_e, b_dtoken.to(p_dtoken.dtype.element_ty), mask=m_e)
        if NORM:
            b_w = _centred(_weights(p_w, p_bias, o_e, o_x, E, X).to(ACC), m_e, E)
            p_u = p_sums + o_e[:, None] * BX + o_x[None, :]
            b_u = tl.load(p_u, mask=m_e[:, None] & (o_x <= X)[None, :], other=0.0)
            tl.store(p_dscale + o_e, tl.sum(b_u * b_w, 1).to(p_dscale.dtype.element_ty), mask=m_e)
            b_dshift = tl.load(p_sums + o_e * BX + X + 1, mask=m_e, other=0.0)
            tl.store(p_dshift + o_e, b_dshift.to(p_dshift.dtype.element_ty), mask=m_e)


class Tile(NamedTuple):
    """Launch choice of a fused kernel."""

    tokens: int
    """BM, at most: a tile does not reach beyond its cell."""
    warps: int


def forward_tile(channels: int) -> Tile:
    return Tile(64 if channels <= 128 else 32, 4 if channels <= 64 else 8)


def backward_tile(channels: int) -> Tile:
    return Tile(32 if channels <= 128 else 16, 8)


def backward_programs(tiles: int, channels: int) -> int:
    """Programs that share the tiles: what a large GPU holds at once, as each leaves partial sums to be read again."""
    return min(tiles, 264 if channels <= 128 else 132)


def fits_one_tile(inputs: int, channels: int, patch: int, dtype: torch.dtype) -> bool:
    """Whether one tile holds all weights; if not, or without matrix instructions, the product is left to cuBLAS."""
    return dtype.itemsize == 2 and patch <= 8 and launch.block(inputs + 2) * launch.block(channels) <= 16384


def embed_visible(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    mask_token: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Token map (B, H / p, W / p, E) of ``dtype``; see ``ops.embed_visible``. Products are taken in weight's dtype."""
    channels, _, _, patch = weight.shape
    if fits_one_tile(weight[0].numel(), channels, patch, weight.dtype):
        norm = (norm_weight, norm_bias)
        out, _ = embed_visible_forward(image, visible, weight, bias, *norm, mask_token, norm_eps, dtype)
        return out
    rows, columns, side = image.shape[2] // patch, image.shape[3] // patch, CELL // patch
    values = F.linear(gather_patches(image, visible, patch, weight.dtype), weight.flatten(1), bias)
    if norm_weight is not None:
        values = F.layer_norm(values, (channels,), norm_weight, norm_bias, norm_eps)
    x = scatter_tokens(values, visible, mask_token, rows * columns, side, columns // side)
    return x.unflatten(1, (rows, columns))


def _constants(image: Tensor, visible: Tensor, weight: Tensor, norm: bool, chosen: Tile) -> dict[str, Any]:
    """What both kernels are told about their inputs and how they are launched."""
    height, width = image.shape[2:]
    channels, patch, inputs = weight.shape[0], weight.shape[-1], weight[0].numel()
    s_b, s_c, s_y, s_x = image.stride()
    return {
        "X": inputs, "E": channels, "G": height // CELL * (width // CELL), "V": visible.shape[1], "W": width // CELL,
        "s_b": s_b, "s_c": s_c, "s_y": s_y, "s_x": s_x, "s_ib": visible.stride(0), "s_iv": visible.stride(1),
        "P": patch, "BM": min((CELL // patch) ** 2, chosen.tokens), "BE": launch.block(channels),
        "BX": launch.block(inputs + 2), "NORM": norm, "ACC": acc(weight.dtype), "num_warps": chosen.warps,
    }  # fmt: skip


def _launch_embed(
    image: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor | None, Tensor | None],
    mask_token: Tensor, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, height, width = image.shape
    channels, patch = weight.shape[0], weight.shape[-1]
    constants = _constants(image, visible, weight, norm[0] is not None, forward_tile(channels))
    out = torch.empty((batch, height // patch, width // patch, channels), dtype=dtype, device=image.device)
    rstd = torch.empty(_rstd_shape(visible, weight, norm[0]), dtype=sums(weight.dtype), device=image.device)
    with launch.on_device(image):
        _embed[(batch * (height // patch) * (width // patch) // constants["BM"],)](
            image, visible, weight, bias, *norm, mask_token, out, rstd, eps,
            BV=min(128, launch.block(visible.shape[1])), **constants,
        )  # fmt: skip
    return out, rstd


def _rstd_shape(visible: Tensor, weight: Tensor, norm_weight: Tensor | None) -> tuple[int, ...]:
    """Of one over the deviation of each visible token; kept only where there is a norm."""
    return (0,) if norm_weight is None else (*visible.shape, (CELL // weight.shape[-1]) ** 2)


def _launch_embed_backward(
    grad: Tensor, image: Tensor, visible: Tensor, weight: Tensor, bias: Tensor,
    norm_weight: Tensor | None, rstd: Tensor, gradients: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill ``gradients``, those of weight, bias, the norm's scale and shift, and the mask token."""
    channels, inputs, side = weight.shape[0], weight[0].numel(), CELL // weight.shape[-1]
    norm = norm_weight is not None
    constants = _constants(image, visible, weight, norm, backward_tile(channels))
    tiles = visible.numel() * (side**2 // constants["BM"])
    programs = backward_programs(tiles, channels)
    wide = constants["BX"] * (channels + (inputs + 1) * norm)
    dtype, device = sums(weight.dtype), image.device
    partials = torch.empty((programs, wide), dtype=dtype, device=device)
    totals = torch.empty(wide + channels, dtype=dtype, device=device)
    blocks = {"BE": constants["BE"], "BX": constants["BX"], "ACC": constants["ACC"]}
    with launch.on_device(image):
        _embed_backward[(programs,)](
            grad, image, visible, weight, bias, norm_weight, rstd, partials, wide, tiles, s_gb=grad.stride(0),
            s_gy=grad.stride(1), s_gx=grad.stride(2), s_ge=grad.stride(3), **constants, num_stages=5,
        )  # fmt: skip
        tokens = launch_fill_partials(grad.flatten(1, 2), visible, side, image.shape[3] // CELL)
        _column_sums[(ceil_div(wide, 32) + ceil_div(channels, 32),)](
            partials, tokens, totals, programs, tokens.shape[0], wide, channels, BR=128, BN=32,
            ACC=blocks["ACC"], num_warps=8,
        )  # fmt: skip
        _finish[(inputs + 2,)](
            totals, weight, bias, norm_weight, *gradients, wide, inputs, channels, NORM=norm, **blocks, num_warps=8
        )  # fmt: skip


@torch.library.custom_op("sgmim_fast::embed_visible", mutates_args=())
def embed_visible_forward(
    image: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, mask_token: Tensor, norm_eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token map (B, H / p, W / p, E) of ``dtype``, and one over the deviations (B, V, T); (0,) without a norm."""
    norm = (_dense(norm_weight), _dense(norm_bias))
    return _launch_embed(
        image, visible, weight.contiguous(), bias.contiguous(), norm, mask_token.contiguous(), norm_eps, dtype
    )  # fmt: skip


@embed_visible_forward.register_fake
def _(
    image: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, mask_token: Tensor, norm_eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    patch = weight.shape[-1]
    shape = (image.shape[0], image.shape[2] // patch, image.shape[3] // patch, weight.shape[0])
    rstd = image.new_empty(_rstd_shape(visible, weight, norm_weight), dtype=sums(weight.dtype))
    return image.new_empty(shape, dtype=dtype), rstd


@torch.library.custom_op("sgmim_fast::embed_visible_backward", mutates_args=())
def embed_visible_backward(
    grad: Tensor, image: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, mask_token: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of weight, bias, norm_weight, norm_bias and mask_token; of an absent norm (0,)."""
    wanted = _or_nothing(weight, bias, norm_weight, norm_bias, mask_token)
    dw, dbias, dscale, dshift, dtoken = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted)
    gradients = (dw, dbias, dscale, dshift, dtoken)
    _launch_embed_backward(
        grad, image, visible, weight.contiguous(), bias.contiguous(), _dense(norm_weight), rstd, gradients
    )  # fmt: skip
    return gradients


@embed_visible_backward.register_fake
def _(
    grad: Tensor, image: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, mask_token: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wanted = _or_nothing(weight, bias, norm_weight, norm_bias, mask_token)
    dw, dbias, dscale, dshift, dtoken = (x.new_empty(x.shape) for x in wanted)
    return dw, dbias, dscale, dshift, dtoken


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _or_nothing(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with (0,) in place of those that are None."""
    first = next(x for x in tensors if x is not None)
    return [first.new_empty(0) if x is None else x for x in tensors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = embed_visible_backward(grad, *ctx.saved_tensors)
    given = ctx.saved_tensors[2:7]
    return None, None, *(None if x is None else dx for x, dx in zip(given, found, strict=True)), None, None


embed_visible_forward.register_autograd(_gradients, setup_context=_keep)
