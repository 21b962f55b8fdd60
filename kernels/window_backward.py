"""Window attention, backward: gradients of queries, keys, values, bias and scale; logits are recomputed.

Windows that fit a tile take one kernel. Larger ones take three: by blocks of queries, by blocks of keys, and by
relative position (in ``window_bias``). What is summed over windows is summed a program at a time, then in one
reduction: the same bits in every run. Shape letters as in ``window_tiles``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.language import dot
from sgmim_fast.kernels.launch import block, ceil_div, dot_precision, on_device
from sgmim_fast.kernels.window_bias import diagonal_sums, launch_bias_gradient, sum_whole
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
    store_rows,
    tiles,
    unit_rows,
    unit_rows_gradient,
    whole_warps,
    window_position,
)


@triton.jit
def _backward_whole(
    p_qkv, p_bias, p_scale, p_out, p_lse, p_dout, p_dqkv, p_dbias, p_dscale,
    s_qb, s_qh, s_qw, s_q3, s_qt, s_qd, s_bt, s_bp, s_ob, s_oh, s_ow, s_oc,
    windows, per_map, per_group, H, W,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SHIFT: tl.constexpr,
    COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A group of windows of one head, each in one tile; gradients of bias and scale are summed over the group."""
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
    scale = tl.load(p_scale + i_t).to(ACC) if COSINE else D**-0.5
    b_dbias = tl.zeros([BM, BM], ACC)
    b_dscale = tl.zeros([BM], ACC)
    for i_a in range(i_g * per_group, tl.minimum((i_g + 1) * per_group, windows)):
        i_b = (i_a // per_map).to(tl.int64)
        i_w = i_a % per_map
        o_y, o_x = map_position(o_n, o_r, o_c, i_w, H, W, K, K, SHIFT, False)
        p_q = p_qkv + i_b * s_qb + i_t * s_qt
        o_q = o_y * s_qh + o_x * s_qw
        o_map = (i_b * H + o_y) * W + o_x
        # [BM, BD]
        b_q = load_rows(p_q, o_q, o_d, s_qd, m_i, D, BD)
        b_k = load_rows(p_q + s_q3, o_q, o_d, s_qd, m_i, D, BD)
        b_v = load_rows(p_q + 2 * s_q3, o_q, o_d, s_qd, m_i, D, BD)
        b_o = load_rows(p_out + i_t * D, o_map * (T * D), o_d, 1, m_i, D, BD)
        p_do = p_dout + i_b * s_ob + i_t * D * s_oc
        b_do = load_rows(p_do, o_y * s_oh + o_x * s_ow, o_d, s_oc, m_i, D, BD).to(b_q.dtype)
        b_lse = tl.load(p_lse + ((i_b * per_map + i_w) * T + i_t) * (K * K) + o_n, mask=m_i, other=0.0)
        b_delta = tl.sum(b_o.to(ACC) * b_do.to(ACC), 1)
        if COSINE:
            b_q, b_rq = unit_rows(b_q, ACC)
            b_k, b_rk = unit_rows(b_k, ACC)
        # [BM, BM]
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * (scale * LOG2E) + b_bias
        if SHIFT > 0:
            o_g = region(o_r, o_c, i_w, H, W, K, K, SHIFT)
            b_s += tl.where(o_g[:, None] == o_g[None, :], 0.0, HIDDEN)
        b_p = tl.exp2(b_s - b_lse[:, None])
        o_dq = o_map * (3 * T * D) + i_t * D
        b_dv = dot(tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
        store_rows(p_dqkv + 2 * T * D, o_dq, o_d, b_dv, m_i, D, BD)
        b_ds = b_p * (dot(b_do, tl.trans(b_v), PRECISION) - b_delta[:, None])
        b_dbias += b_ds
        b_ds = b_ds.to(b_q.dtype)
        b_dq = dot(b_ds, b_k, PRECISION) * scale
        if COSINE:
            b_dscale += tl.sum(b_q.to(ACC) * b_dq, 1)
            b_dq = unit_rows_gradient(b_q, b_rq, b_dq, ACC)
        store_rows(p_dqkv, o_dq, o_d, b_dq, m_i, D, BD)
        b_dk = dot(tl.trans(b_ds), b_q, PRECISION) * scale
        if COSINE:
            b_dk = unit_rows_gradient(b_k, b_rk, b_dk, ACC)
        store_rows(p_dqkv + T * D, o_dq, o_d, b_dk, m_i, D, BD)
    diagonal_sums(b_dbias, p_dbias + tl.program_id(0).to(tl.int64) * (4 * BM), KP, KP)
    if COSINE:
        tl.store(p_dscale + tl.program_id(0), tl.sum(b_dscale, 0) / scale)


@triton.jit
def _backward_queries(
    p_qkv, p_bias, p_scale, p_out, p_lse, p_dout, p_dqkv, p_delta, p_dscale, p_dclass,
    s_qb, s_qh, s_qw, s_q3, s_qt, s_qd, s_bt, s_bp, s_ob, s_oh, s_ow, s_oc,
    per_map, H, W,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SHIFT: tl.constexpr, CLASS: tl.constexpr, COSINE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries; sum(out * dout) of each; parts of the gradients of scale and class bias."""
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
    o_map = (i_b * H + o_y) * W + o_x
    o_row = ((i_b * per_map + i_w) * T + i_t) * N + o_m
    p_q = p_qkv + i_b * s_qb + i_t * s_qt
    p_do = p_dout + i_b * s_ob + i_t * D * s_oc
    # [BM, BD]
    b_q = load_rows(p_q, o_y * s_qh + o_x * s_qw, o_d, s_qd, m_m, D, BD)
    b_o = load_rows(p_out + i_t * D, o_map * (T * D), o_d, 1, m_m, D, BD)
    b_do = load_rows(p_do, o_y * s_oh + o_x * s_ow, o_d, s_oc, m_m, D, BD).to(b_q.dtype)
    # [BM]
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
    b_delta = tl.sum(b_o.to(ACC) * b_do.to(ACC), 1)
    tl.store(p_delta + o_row, b_delta, mask=m_m)
    if COSINE:
        b_q, b_rq = unit_rows(b_q, ACC)
    scale = tl.load(p_scale + i_t).to(ACC) if COSINE else D**-0.5
    b_dq = tl.zeros([BM, BD], ACC)
    b_first = tl.zeros([BM], ACC)
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
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * (scale * LOG2E) + load_bias(
            p_bias + i_t * s_bt, s_bp, o_m[:, None], o_rm[:, None], o_cm[:, None], m_m[:, None],
            o_n[None, :], o_rn[None, :], o_cn[None, :], m_n[None, :], KH, KW, CLASS, ACC,
        )  # fmt: skip
        if SHIFT > 0:
            o_gm = region(o_rm, o_cm, i_w, H, W, KH, KW, SHIFT)
            o_gn = region(o_rn, o_cn, i_w, H, W, KH, KW, SHIFT)
            b_s += tl.where(o_gm[:, None] == o_gn[None, :], 0.0, HIDDEN)
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_ds = b_p * (dot(b_do, tl.trans(b_v), PRECISION) - b_delta[:, None])
        if CLASS:
            b_first += tl.sum(tl.where(o_n[None, :] == 0, b_ds, 0.0), 1)
        b_dq += dot(b_ds.to(b_k.dtype), b_k, PRECISION)
    b_dq *= scale
    if COSINE:
        # In one go: Triton 3.6 cannot add up the rows' sums for compute capability 10.
        tl.store(p_dscale + tl.program_id(0), tl.sum(tl.reshape(b_q.to(ACC) * b_dq, [BM * BD]), 0) / scale)
        b_dq = unit_rows_gradient(b_q, b_rq, b_dq, ACC)
    if CLASS:
        # The class token asked itself; others asked it. Each row of logit gradients sums to 0, so what the class
        # token asked of others is the first, negated.
        p_dc = p_dclass + tl.program_id(0).to(tl.int64) * 2
        tl.store(p_dc, tl.sum(tl.where(o_m == 0, b_first, 0.0), 0))
        tl.store(p_dc + 1, tl.sum(tl.where((o_m > 0) & m_m, b_first, 0.0), 0))
    store_rows(p_dqkv, o_map * (3 * T * D) + i_t * D, o_d, b_dq, m_m, D, BD)


@triton.jit
def _backward_keys(
    p_qkv, p_bias, p_scale, p_lse, p_delta, p_dout, p_dqkv,
    s_qb, s_qh, s_qw, s_q3, s_qt, s_qd, s_bt, s_bp, s_ob, s_oh, s_ow, s_oc,
    per_map, H, W,
    T: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SHIFT: tl.constexpr, CLASS: tl.constexpr, COSINE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values; blocks of logits are held with keys as rows."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    TILES: tl.constexpr = (N + BN - 1) // BN
    i_t = tl.program_id(0) % T
    i_n = tl.program_id(0) // T % TILES
    i_a = tl.program_id(0) // (T * TILES)
    i_b = (i_a // per_map).to(tl.int64)
    i_w = i_a % per_map
    o_d = tl.arange(0, BD)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_rn, o_cn = window_position(o_n, KW, CLASS)
    o_y, o_x = map_position(o_n, o_rn, o_cn, i_w, H, W, KH, KW, SHIFT, CLASS)
    p_q = p_qkv + i_b * s_qb + i_t * s_qt
    p_do = p_dout + i_b * s_ob + i_t * D * s_oc
    o_k = o_y * s_qh + o_x * s_qw
    # [BN, BD]
    b_k = load_rows(p_q + s_q3, o_k, o_d, s_qd, m_n, D, BD)
    b_v = load_rows(p_q + 2 * s_q3, o_k, o_d, s_qd, m_n, D, BD)
    if COSINE:
        b_k, b_rk = unit_rows(b_k, ACC)
    scale = tl.load(p_scale + i_t).to(ACC) if COSINE else D**-0.5
    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BD], ACC)
    for i_m in range(0, N, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < N
        o_rm, o_cm = window_position(o_m, KW, CLASS)
        o_ym, o_xm = map_position(o_m, o_rm, o_cm, i_w, H, W, KH, KW, SHIFT, CLASS)
        o_row = ((i_b * per_map + i_w) * T + i_t) * N + o_m
        # [BM, BD]
        b_q = load_rows(p_q, o_ym * s_qh + o_xm * s_qw, o_d, s_qd, m_m, D, BD)
        b_do = load_rows(p_do, o_ym * s_oh + o_xm * s_ow, o_d, s_oc, m_m, D, BD).to(b_q.dtype)
        # [BM]
        b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
        b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
        if COSINE:
            b_q = unit_rows(b_q, ACC)[0]
        # [BN, BM]
        b_s = dot(b_k, tl.trans(b_q), PRECISION) * (scale * LOG2E) + load_bias(
            p_bias + i_t * s_bt, s_bp, o_m[None, :], o_rm[None, :], o_cm[None, :], m_m[None, :],
            o_n[:, None], o_rn[:, None], o_cn[:, None], m_n[:, None], KH, KW, CLASS, ACC,
        )  # fmt: skip
        if SHIFT > 0:
            o_gm = region(o_rm, o_cm, i_w, H, W, KH, KW, SHIFT)
            o_gn = region(o_rn, o_cn, i_w, H, W, KH, KW, SHIFT)
            b_s += tl.where(o_gn[:, None] == o_gm[None, :], 0.0, HIDDEN)
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv += dot(b_p.to(b_do.dtype), b_do, PRECISION)
        b_ds = b_p * (dot(b_v, tl.trans(b_do), PRECISION) - b_delta[None, :])
        b_dk += dot(b_ds.to(b_q.dtype), b_q, PRECISION)
    b_dk *= scale
    if COSINE:
        b_dk = unit_rows_gradient(b_k, b_rk, b_dk, ACC)
    o_dk = ((i_b * H + o_y) * W + o_x) * (3 * T * D) + i_t * D
    store_rows(p_dqkv + T * D, o_dk, o_d, b_dk, m_n, D, BD)
    store_rows(p_dqkv + 2 * T * D, o_dk, o_d, b_dv, m_n, D, BD)


def launch_backward(
    qkv: Tensor, bias: Tensor, scale: Tensor | None, windows: Windows, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv (contiguous), bias (T, P) and scale ((T,), or (0,) without one).

    Args:
        qkv, bias, scale, windows: as for ``launch_forward``; ``out`` and ``lse`` are what it gave.
        dout: (B, H, W, T * D), any strides.
    """
    batch, height, width, _, heads, size = qkv.shape
    total = batch * windows.per_map
    cosine = scale is not None
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    strides = (*qkv.stride(), *bias.stride(), *dout.stride())
    where: dict[str, Any] = {"dtype": lse.dtype, "device": qkv.device}
    common = {
        "T": heads, "D": size, "BD": block(size), "SHIFT": windows.shift, "COSINE": cosine,
        "PRECISION": dot_precision(qkv.dtype),
    }  # fmt: skip
    tensors = (qkv, bias, bias if scale is None else scale)  # without COSINE no scale is read
    with on_device(qkv):
        if windows.whole:
            count = groups(total, heads)
            dscale = torch.empty(count if cosine else 0, heads, **where)
            parts = torch.empty(count, heads, 2 * windows.padded_side, 2 * windows.padded_side, **where)
            _backward_whole[(heads * count,)](
                *tensors, out, lse, dout, dqkv, parts, dscale, *strides,
                total, windows.per_map, group_size(total, heads), height, width,
                K=windows.width, KP=windows.padded_side, num_stages=1,
                num_warps=whole_warps(True, windows, size, qkv.dtype), **common,
            )  # fmt: skip
            dbias = sum_whole(parts, windows)
        else:
            queries, keys = (tiles(kernel, size, qkv.dtype, cosine) for kernel in ("queries", "keys"))
            shape = {"N": windows.tokens, "KH": windows.height, "KW": windows.width, "CLASS": windows.class_token}
            blocks = ceil_div(windows.tokens, queries["BM"])
            dscale = torch.empty(total * blocks if cosine else 0, heads, **where)
            dclass = torch.empty(total * blocks if windows.class_token else 0, heads, 2, **where)
            delta = torch.empty_like(lse)
            _backward_queries[(heads * blocks * total,)](
                *tensors, out, lse, dout, dqkv, delta, dscale, dclass, *strides,
                windows.per_map, height, width, **shape, **queries, **common,
            )  # fmt: skip
            _backward_keys[(heads * ceil_div(windows.tokens, keys["BN"]) * total,)](
                *tensors, lse, delta, dout, dqkv, *strides,
                windows.per_map, height, width, **shape, **keys, **common,
            )  # fmt: skip
            dbias = launch_bias_gradient(tensors, strides, windows, lse, delta, dout, dclass, common)
    dscale = qkv.new_empty(0) if scale is None else dscale.sum(0).to(scale.dtype)
    return dqkv, dbias.to(bias.dtype).contiguous(), dscale
