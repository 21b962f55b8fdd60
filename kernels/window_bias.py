"""Window attention: the gradient of the bias table, sums of logit gradients over pairs of equal relative position.

Tiles whose rows begin at powers of two (R rows of KP >= KW columns) have one relative position a diagonal, whatever
the window: sums over windows are taken of whole tiles, in registers, and only their diagonals are written.
Shape letters as in ``window_tiles``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.language import dot
from sgmim_fast.kernels.launch import ceil_div
from sgmim_fast.kernels.window_tiles import (
    HIDDEN,
    LOG2E,
    Windows,
    diagonal_tile,
    group_size,
    groups,
    load_bias,
    load_rows,
    map_position,
    region,
    unit_rows,
)


@triton.jit
def diagonal_sums(b_x, p_sums, R: tl.constexpr, KP: tl.constexpr):
    """Sums of a tile (R * KP, R * KP) over pairs of equal offset, to (2 R, 2 KP) places beginning at p_sums.

    The pair of tokens (r, c) and (r', c') belongs to place (r - r' + R - 1, c - c' + KP - 1); the last row and column
    of places have no pairs and hold 0.
    """
    BM: tl.constexpr = R * KP
    o_m = tl.arange(0, BM)
    for i_p in range(0, 4 * BM, BM):
        o_p = i_p + tl.arange(0, BM)
        # [BM, BM]: the row and column of the token at that offset from o_m
        o_r = (o_m // KP)[:, None] - (o_p // (2 * KP))[None, :] + (R - 1)
        o_c = (o_m % KP)[:, None] - (o_p % (2 * KP))[None, :] + (KP - 1)
        m_p = (o_r >= 0) & (o_r < R) & (o_c >= 0) & (o_c < KP)
        b_y = tl.gather(b_x, tl.where(m_p, o_r * KP + o_c, 0), 1)
        tl.store(p_sums + o_p, tl.sum(tl.where(m_p, b_y, 0.0), 0))


@triton.jit
def _bias_gradient(
    p_qkv, p_bias, p_scale, p_lse, p_delta, p_dout, p_sums,
    s_qb, s_qh, s_qw, s_q3, s_qt, s_qd, s_bt, s_bp, s_ob, s_oh, s_ow, s_oc,
    windows, per_map, per_group, H, W,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    KP: tl.constexpr, R: tl.constexpr, SHIFT: tl.constexpr, CLASS: tl.constexpr, COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logit gradients of one head and a group of windows, summed over the tiles that lie i_q tiles off the diagonal."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    TILES: tl.constexpr = (KH + R - 1) // R
    BM: tl.constexpr = R * KP
    i_t = tl.program_id(0) % T
    i_q = tl.program_id(0) // T % (2 * TILES - 1) - (TILES - 1)
    i_g = tl.program_id(0) // (T * (2 * TILES - 1))
    o_i = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_c = o_i % KP
    scale = tl.load(p_scale + i_t).to(ACC) if COSINE else D**-0.5
    b_sum = tl.zeros([BM, BM], ACC)
    for i_a in range(i_g * per_group, tl.minimum((i_g + 1) * per_group, windows)):
        i_b = (i_a // per_map).to(tl.int64)
        i_w = i_a % per_map
        p_q = p_qkv + i_b * s_qb + i_t * s_qt
        p_do = p_dout + i_b * s_ob + i_t * D * s_oc
        for i_m in range(tl.maximum(i_q, 0), TILES + tl.minimum(i_q, 0)):
            o_rm = i_m * R + o_i // KP
            o_rn = (i_m - i_q) * R + o_i // KP
            m_m = (o_rm < KH) & (o_c < KW)
            m_n = (o_rn < KH) & (o_c < KW)
            o_m = o_rm * KW + o_c + (1 if CLASS else 0)
            o_n = o_rn * KW + o_c + (1 if CLASS else 0)
            o_ym, o_xm = map_position(o_m, o_rm, o_c, i_w, H, W, KH, KW, SHIFT, CLASS)
            o_yn, o_xn = map_position(o_n, o_rn, o_c, i_w, H, W, KH, KW, SHIFT, CLASS)
            o_k = o_yn * s_qh + o_xn * s_qw
            o_row = ((i_b * per_map + i_w) * T + i_t) * N + o_m
            # [BM, BD]
            b_q = load_rows(p_q, o_ym * s_qh + o_xm * s_qw, o_d, s_qd, m_m, D, BD)
            b_k = load_rows(p_q + s_q3, o_k, o_d, s_qd, m_n, D, BD)
            b_v = load_rows(p_q + 2 * s_q3, o_k, o_d, s_qd, m_n, D, BD)
            b_do = load_rows(p_do, o_ym * s_oh + o_xm * s_ow, o_d, s_oc, m_m, D, BD).to(b_q.dtype)
            # [BM]
            b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
            b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
            if COSINE:
                b_q = unit_rows(b_q, ACC)[0]
                b_k = unit_rows(b_k, ACC)[0]
            # [BM, BM]
            b_s = dot(b_q, tl.trans(b_k), PRECISION) * (scale * LOG2E) + load_bias(
                p_bias + i_t * s_bt, s_bp, o_m[:, None], o_rm[:, None], o_c[:, None], m_m[:, None],
                o_n[None, :], o_rn[None, :], o_c[None, :], m_n[None, :], KH, KW, False, ACC,
            )  # fmt: skip
            if SHIFT > 0:
                o_gm = region(o_rm, o_c, i_w, H, W, KH, KW, SHIFT)
                o_gn = region(o_rn, o_c, i_w, H, W, KH, KW, SHIFT)
                b_s += tl.where(o_gm[:, None] == o_gn[None, :], 0.0, HIDDEN)
            b_p = tl.exp2(b_s - b_lse[:, None])
            b_sum += b_p * (dot(b_do, tl.trans(b_v), PRECISION) - b_delta[:, None])
    diagonal_sums(b_sum, p_sums + tl.program_id(0).to(tl.int64) * (4 * BM), R, KP)


def launch_bias_gradient(
    tensors: tuple[Tensor, Tensor, Tensor],
    strides: tuple[int, ...],
    windows: Windows,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    dclass: Tensor,
    common: dict[str, Any],
) -> Tensor:
    """Gradient (T, P) of the bias of larger windows.

    Args:
        tensors, strides, common: arguments that all backward kernels take alike, strides those of qkv, bias and dout.
        windows: how tokens are grouped.
        lse, delta: (windows, T, N) base-2 log-sum-exp, and sum(out * dout), of each query.
        dout: (B, H, W, T * D).
        dclass: (parts, T, 2) logit gradients of the pairs (class, class) and (token, class); not read without a
            class token.
    """
    total, heads, tokens = lse.shape
    side = windows.padded_side
    rows = diagonal_tile(windows, tensors[0].shape[-1], tensors[0].dtype)
    blocks = ceil_div(windows.height, rows)
    diagonals = 2 * blocks - 1
    per_group, count = group_size(total, heads * diagonals), groups(total, heads * diagonals)
    parts = torch.empty(count, diagonals, heads, 2 * rows, 2 * side, dtype=lse.dtype, device=lse.device)
    _bias_gradient[(heads * diagonals * count,)](
        *tensors, lse, delta, dout, parts, *strides, total, windows.per_map, per_group, windows.rows, windows.columns,
        N=tokens, KH=windows.height, KW=windows.width, KP=side, R=rows, CLASS=windows.class_token,
        num_warps=8, num_stages=1, **common,
    )  # fmt: skip
    sums = parts.sum(0)
    # A diagonal's places reach into the next one's: rows of the table are sums of two halves.
    first, second = sums.movedim(0, 1).split(rows, 2)  # (T, diagonals, rows, 2 * side) each
    table = torch.nn.functional.pad(first, (0, 0, 0, 0, 0, 1)) + torch.nn.functional.pad(second, (0, 0, 0, 0, 1, 0))
    middle = blocks * rows
    table = _around(table.flatten(1, 2), middle, windows.height).movedim(1, 2)
    table = _around(table, side, windows.width).movedim(1, 2).flatten(1)
    if not windows.class_token:
        return table
    own, asked = dclass.sum(0).unbind(1)
    return torch.cat((table, torch.stack((-own, asked, own), 1)), 1)


def sum_whole(parts: Tensor, windows: Windows) -> Tensor:
    """Gradient (T, P) of the bias of windows that fit a tile, from the places (groups, T, 2 KP, 2 KP) of each group."""
    low, high = windows.padded_side - windows.width, windows.padded_side + windows.width - 1
    return parts.sum(0)[:, low:high, low:high].flatten(1)


def _around(x: Tensor, middle: int, side: int) -> Tensor:
    """Places (T, places, ...) of offsets -side < d < side; offset 0 is at place ``middle`` - 1."""
    return x[:, middle - side : middle + side - 1]
