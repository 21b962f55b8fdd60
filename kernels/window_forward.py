"""Window attention, forward: one kernel for windows that fit a tile, one that walks through larger ones.

Logits are kept in base 2. Shape letters as in ``window_tiles``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.language import dot
from sgmim_fast.kernels.launch import block, ceil_div, dot_precision, on_device
from sgmim_fast.kernels.window_tiles import (
    HIDDEN,
    LOG2E,
    Windows,
    group_size,
    groups,
    load_bias,
    load_rows,
    map_position,
    region,
    statistics,
    store_rows,
    tiles,
    unit_rows,
    whole_warps,
    window_position,
)


@triton.jit
def _forward_whole(
    p_qkv, p_bias, p_scale, p_out, p_lse,
    s_qb, s_qh, s_qw, s_q3, s_qt, s_qd, s_bt, s_bp,
    windows, per_map, per_group, H, W,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SHIFT: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A group of windows of one head, each in one tile of KP x KP tokens; the bias stays in registers."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    i_t = tl.program_id(0) % T
    i_g = tl.program_id(0) // T
    BM: tl.constexpr = KP * KP
    o_i = tl.arange(0, BM)
    o_r, o_c = o_i // KP, o_i % KP
    m_i = (o_r < K) & (o_c < K)
    o_n = o_r * K + o_c
    o_d = tl.arange(0, BD)
    # [BM, BM]
    b_bias = load_bias(
        p_bias + i_t * s_bt, s_bp, o_n[:, None], o_r[:, None], o_c[:, None], m_i[:, None],
        o_n[None, :], o_r[None, :], o_c[None, :], m_i[None, :], K, K, False, ACC,
    )  # fmt: skip
    scale = tl.load(p_scale + i_t).to(ACC) * LOG2E if COSINE else LOG2E * D**-0.5
    for i_a in range(i_g * per_group, tl.minimum((i_g + 1) * per_group, windows)):
        i_b = (i_a // per_map).to(tl.int64)
        i_w = i_a % per_map
        o_y, o_x = map_position(o_n, o_r, o_c, i_w, H, W, K, K, SHIFT, False)
        p_q = p_qkv + i_b * s_qb + i_t * s_qt
        o_q = o_y * s_qh + o_x * s_qw
        # [BM, BD]
        b_q = load_rows(p_q, o_q, o_d, s_qd, m_i, D, BD)
        b_k = load_rows(p_q + s_q3, o_q, o_d, s_qd, m_i, D, BD)
        b_v = load_rows(p_q + 2 * s_q3, o_q, o_d, s_qd, m_i, D, BD)
        if COSINE:
            b_q = unit_rows(b_q, ACC)[0]
            b_k = unit_rows(b_k, ACC)[0]
        # [BM, BM]
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * scale + b_bias
        if SHIFT > 0:
            o_g = region(o_r, o_c, i_w, H, W, K, K, SHIFT)
            b_s += tl.where(o_g[:, None] == o_g[None, :], 0.0, HIDDEN)
        b_max = tl.max(b_s, 1)
        b_p = tl.exp2(b_s - b_max[:, None])
        b_sum = tl.sum(b_p, 1)
        b_o = dot(b_p.to(b_v.dtype), b_v, PRECISION) / b_sum[:, None]
        o_o = ((i_b * H + o_y) * W + o_x) * (T * D) + i_t * D
        store_rows(p_out, o_o, o_d, b_o, m_i, D, BD)
        tl.store(p_lse + ((i_b * per_map + i_w) * T + i_t) * (K * K) + o_n, b_max + tl.log2(b_sum), mask=m_i)


@triton.jit
def _forward_tiled(
    p_qkv, p_bias, p_scale, p_out, p_lse,
    s_qb, s_qh, s_qw, s_q3, s_qt, s_qd, s_bt, s_bp,
    per_map, H, W,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SHIFT: tl.constexpr, CLASS: tl.constexpr, COSINE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one window and head, walking through the keys with a running softmax."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    TILES: tl.constexpr = (N + BM - 1) // BM
    i_t = tl.program_id(0) % T
    i_m = tl.program_id(0) // T % TILES
    i_a = tl.program_id(0) // (T * TILES)
    i_b = (i_a // per_map).to(tl.int64)
    i_w = i_a % per_map
    o_d = tl.arange(0, BD)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < N
    o_rm, o_cm = window_position(o_m, KW, CLASS)
    o_y, o_x = map_position(o_m, o_rm, o_cm, i_w, H, W, KH, KW, SHIFT, CLASS)
    p_q = p_qkv + i_b * s_qb + i_t * s_qt
    # [BM, BD]
    b_q = load_rows(p_q, o_y * s_qh + o_x * s_qw, o_d, s_qd, m_m, D, BD)
    if COSINE:
        b_q = unit_rows(b_q, ACC)[0]
    scale = tl.load(p_scale + i_t).to(ACC) * LOG2E if COSINE else LOG2E * D**-0.5
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    b_o = tl.zeros([BM, BD], ACC)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        o_rn, o_cn = window_position(o_n, KW, CLASS)
        o_yn, o_xn = map_position(o_n, o_rn, o_cn, i_w, H, W, KH, KW, SHIFT, CLASS)
        o_k = o_yn * s_qh + o_xn * s_qw
        # [BN, BD]
        b_k = load_rows(p_q + s_q3, o_k, o_d, s_qd, m_n, D, BD)
        b_v = load_rows(p_q + 2 * s_q3, o_k, o_d, s_qd, m_n, D, BD)
        if COSINE:
            b_k = unit_rows(b_k, ACC)[0]
        # [BM, BN]
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * scale + load_bias(
            p_bias + i_t * s_bt, s_bp, o_m[:, None], o_rm[:, None], o_cm[:, None], m_m[:, None],
            o_n[None, :], o_rn[None, :], o_cn[None, :], m_n[None, :], KH, KW, CLASS, ACC,
        )  # fmt: skip
        if SHIFT > 0:
            o_gm = region(o_rm, o_cm, i_w, H, W, KH, KW, SHIFT)
            o_gn = region(o_rn, o_cn, i_w, H, W, KH, KW, SHIFT)
            b_s += tl.where(o_gm[:, None] == o_gn[None, :], 0.0, HIDDEN)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_o = b_o * b_old[:, None] + dot(b_p.to(b_v.dtype), b_v, PRECISION)
        b_max = b_new
    o_o = ((i_b * H + o_y) * W + o_x) * (T * D) + i_t * D
    store_rows(p_out, o_o, o_d, b_o / b_sum[:, None], m_m, D, BD)
    tl.store(p_lse + ((i_b * per_map + i_w) * T + i_t) * N + o_m, b_max + tl.log2(b_sum), mask=m_m)


def launch_forward(qkv: Tensor, bias: Tensor, scale: Tensor | None, windows: Windows) -> tuple[Tensor, Tensor]:
    """Attention output (B, H, W, T * D) and base-2 log-sum-exps (windows, T, N).

    Args:
        qkv: (B, H, W, 3, T, D), any strides.
        bias: (T, P), any strides.
        scale: (T,) contiguous, for cosine logits; None for scaled dot products.
        windows: how tokens are grouped.
    """
    batch, height, width, _, heads, size = qkv.shape
    total = batch * windows.per_map
    out = torch.empty(batch, height, width, heads * size, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(total, heads, windows.tokens, dtype=statistics(qkv.dtype), device=qkv.device)
    common = {
        "T": heads, "D": size, "BD": block(size), "SHIFT": windows.shift, "COSINE": scale is not None,
        "PRECISION": dot_precision(qkv.dtype),
    }  # fmt: skip
    # The kernel reads no scale without COSINE; any pointer will do.
    tensors = (qkv, bias, bias if scale is None else scale, out, lse)
    with on_device(qkv):
        if windows.whole:
            _forward_whole[(heads * groups(total, heads),)](
                *tensors, *qkv.stride(), *bias.stride(),
                total, windows.per_map, group_size(total, heads), height, width,
                K=windows.width, KP=windows.padded_side, num_stages=2,
                num_warps=whole_warps(False, windows, size, qkv.dtype), **common,
            )  # fmt: skip
        else:
            choice = tiles("forward", size, qkv.dtype, scale is not None)
            _forward_tiled[(heads * ceil_div(windows.tokens, choice["BM"]) * total,)](
                *tensors, *qkv.stride(), *bias.stride(), windows.per_map, height, width,
                N=windows.tokens, KH=windows.height, KW=windows.width, CLASS=windows.class_token, **choice, **common,
            )  # fmt: skip
    return out, lse
