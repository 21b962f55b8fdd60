"""Cross-attention to context keys and one null key that stands for ``count`` equal ones.

Key number NK is the null token: one more row of the key tile, read from its own address, whose logit has log(count)
added. Where a tile holds all keys the backward is one kernel; longer contexts take a pass over queries and a pass over
keys. Not the log of the softmax denominator is kept but its two parts: in float32 their sum would lose a digit.

Shape letters: B batch, NQ queries, NK context keys without the null key, T heads, D head size; tiles of BM queries,
BN keys and BD >= D channels. Logits are in base 2: scaled by log2(e).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import launch
from sgmim_fast.kernels.language import dot

LARGEST_HEAD = 256
_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _place(NQ_TILES, T):
    """Sample, tile and head of this program: neighbouring heads share cache lines, so they run side by side."""
    i = tl.program_id(0)
    return (i // T // NQ_TILES).to(tl.int64), i // T % NQ_TILES, i % T


@triton.jit
def _rows(p_x, s_n, s_d, o_n, N, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``o_n`` of an (N, D) matrix; zeros past its ends."""
    o_d = tl.arange(0, BD)
    p_rows = p_x + o_n[:, None].to(tl.int64) * s_n + o_d[None, :] * s_d  # [BN, BD]
    return tl.load(p_rows, mask=(o_n[:, None] < N) & (o_d[None, :] < D), other=0.0)


@triton.jit
def _rows_and_null(p_x, s_n, s_d, p_null, s_null, o_n, NK, COUNTED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The same of keys or values, with the null token's (D,) as row NK if it is counted."""
    o_d = tl.arange(0, BD)
    p_rows = p_x + o_n[:, None].to(tl.int64) * s_n + o_d[None, :] * s_d  # [BN, BD]
    if COUNTED:
        p_rows = tl.where(o_n[:, None] == NK, p_null + o_d[None, :] * s_null, p_rows)
    return tl.load(p_rows, mask=(o_n[:, None] < NK + COUNTED) & (o_d[None, :] < D), other=0.0)


@triton.jit
def _key_weights(o_n, NK, count, COUNTED: tl.constexpr, ACC: tl.constexpr):
    """What is added to the logits of keys ``o_n``: 0, or -inf past the last key; and how many keys each stands for."""
    b_mask = tl.where(o_n < NK + COUNTED, tl.zeros_like(o_n).to(ACC), float("-inf"))  # [BN]
    # A factor, since log(count) added to the logit would cost float32 a digit.
    b_weight = tl.where(o_n == NK, count if COUNTED else 1.0, 1.0).to(ACC)  # [BN]
    return b_mask, b_weight


@triton.jit
def _store_rows(p_x, s_n, o_n, N, b_x, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a tile to rows ``o_n`` of a matrix (N, D) with contiguous rows ``s_n`` apart."""
    o_d = tl.arange(0, BD)
    p_rows = p_x + o_n[:, None].to(tl.int64) * s_n + o_d[None, :]
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=(o_n[:, None] < N) & (o_d[None, :] < D))


@triton.jit
def _store_rows_and_null(
    p_x, s_n, p_null, o_null, o_n, NK, b_x, COUNTED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """The same for keys or values, with row NK to the null token's ``p_null + o_null`` if it is counted."""
    if not COUNTED:
        _store_rows(p_x, s_n, o_n, NK, b_x, D, BD)
    else:
        o_d = tl.arange(0, BD)
        p_rows = p_x + o_n[:, None].to(tl.int64) * s_n + o_d[None, :]
        p_rows = tl.where(o_n[:, None] == NK, p_null + o_null + o_d[None, :], p_rows)
        tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=(o_n[:, None] <= NK) & (o_d[None, :] < D))


@triton.jit
def _forward(
    p_q, p_k, p_v, p_null_k, p_null_v, p_out, p_softmax,
    s_qb, s_qn, s_qt, s_qd, s_kb, s_kn, s_kt, s_kd, s_vb, s_vn, s_vt, s_vd, s_nkt, s_nkd, s_nvt, s_nvd,
    NQ, NK, T, count,
    COUNTED: tl.constexpr, ONE_TILE: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one sample and head: output; each row's largest logit and softmax denominator."""
    i_b, i_m, i_t = _place(tl.cdiv(NQ, BM), T)
    o_m = i_m * BM + tl.arange(0, BM)
    p_k += i_b * s_kb + i_t * s_kt
    p_v += i_b * s_vb + i_t * s_vt
    if COUNTED:
        p_null_k += i_t * s_nkt
        p_null_v += i_t * s_nvt
    b_q = _rows(p_q + i_b * s_qb + i_t * s_qt, s_qn, s_qd, o_m, NQ, D, BD)  # [BM, BD]
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    b_out = tl.zeros([BM, BD], ACC)
    for i_n in range(1 if ONE_TILE else tl.cdiv(NK + COUNTED, BN)):
        o_n = i_n * BN + tl.arange(0, BN)
        b_k = _rows_and_null(p_k, s_kn, s_kd, p_null_k, s_nkd, o_n, NK, COUNTED, D, BD).to(b_q.dtype)  # [BN, BD]
        b_v = _rows_and_null(p_v, s_vn, s_vd, p_null_v, s_nvd, o_n, NK, COUNTED, D, BD).to(b_q.dtype)
        b_mask, b_weight = _key_weights(o_n, NK, count, COUNTED, ACC)  # [BN]
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * (SCALE * _LOG2E) + b_mask[None, :]  # [BM, BN]
        # The largest weight becomes about 1, so that none overflows float16.
        b_new = tl.max(b_s + tl.log2(b_weight)[None, :], 1)  # [BM]
        if not ONE_TILE:
            b_new = tl.maximum(b_new, b_max)
            b_shrink = tl.exp2(b_max - b_new)
            b_sum *= b_shrink
            b_out *= b_shrink[:, None]
        b_max = b_new
        b_p = tl.exp2(b_s - b_max[:, None]) * b_weight[None, :]  # [BM, BN]
        b_sum += tl.sum(b_p, 1)
        b_out += dot(b_p.to(b_q.dtype), b_v, PRECISION)
    _store_rows(p_out + (i_b * NQ * T + i_t) * D, T * D, o_m, NQ, b_out / b_sum[:, None], D, BD)
    p_softmax += (i_b * T + i_t) * 2 * NQ
    tl.store(p_softmax + o_m, b_max, mask=o_m < NQ)
    tl.store(p_softmax + NQ + o_m, b_sum, mask=o_m < NQ)


@triton.jit
def _backward_keys(
    p_q, p_k, p_v, p_null_k, p_null_v, p_dout, p_softmax, p_delta, p_dq, p_dk, p_dv, p_part_k, p_part_v,
    s_qb, s_qn, s_qt, s_qd, s_kb, s_kn, s_kt, s_kd, s_vb, s_vn, s_vt, s_vd, s_nkt, s_nkd, s_nvt, s_nvd,
    s_ob, s_on, s_od,
    NQ, NK, T, count,
    COUNTED: tl.constexpr, WHOLE: tl.constexpr, ONE_TILE: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one sample and head, and of the queries if the tile is WHOLE."""
    i_b, i_n, i_t = _place(1 if WHOLE else tl.cdiv(NK + COUNTED, BN), T)
    o_n = i_n * BN + tl.arange(0, BN)
    p_q += i_b * s_qb + i_t * s_qt
    p_dout += i_b * s_ob + i_t * D * s_od
    p_softmax += (i_b * T + i_t) * 2 * NQ
    if COUNTED:
        p_null_k += i_t * s_nkt
        p_null_v += i_t * s_nvt
    b_k = _rows_and_null(p_k + i_b * s_kb + i_t * s_kt, s_kn, s_kd, p_null_k, s_nkd, o_n, NK, COUNTED, D, BD)
    b_v = _rows_and_null(p_v + i_b * s_vb + i_t * s_vt, s_vn, s_vd, p_null_v, s_nvd, o_n, NK, COUNTED, D, BD)
    b_k = b_k.to(p_q.dtype.element_ty)  # [BN, BD]
    b_v = b_v.to(p_q.dtype.element_ty)  # [BN, BD]
    b_mask, b_weight = _key_weights(o_n, NK, count, COUNTED, ACC)  # [BN]
    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BD], ACC)
    for i_m in range(1 if ONE_TILE else tl.cdiv(NQ, BM)):
        o_m = i_m * BM + tl.arange(0, BM)
        b_q = _rows(p_q, s_qn, s_qd, o_m, NQ, D, BD)  # [BM, BD]
        b_dout = _rows(p_dout, s_on, s_od, o_m, NQ, D, BD).to(b_q.dtype)  # [BM, BD]
        b_max = tl.load(p_softmax + o_m, mask=o_m < NQ, other=float("inf"))  # [BM]
        b_sum = tl.load(p_softmax + NQ + o_m, mask=o_m < NQ, other=1.0)  # [BM]
        # Keys down, queries across: weights and their gradients are then left operands straight from registers.
        b_s = dot(b_k, tl.trans(b_q), PRECISION) * (SCALE * _LOG2E) + b_mask[:, None]  # [BN, BM]
        b_e = tl.exp2(b_s - b_max[None, :]) * b_weight[:, None]
        b_p = b_e * (1 / b_sum)[None, :]
        b_dv += dot(b_p.to(b_q.dtype), b_dout, PRECISION)
        b_dp = dot(b_v, tl.trans(b_dout), PRECISION)  # [BN, BM]
        if WHOLE:
            b_delta = tl.sum(b_e * b_dp, 0) / b_sum  # [BM]
        else:
            b_delta = tl.load(p_delta + (i_b * T + i_t) * NQ + o_m, mask=o_m < NQ, other=0.0)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)  # [BN, BM]
        b_dk += dot(b_ds, b_q, PRECISION)
        if WHOLE:
            b_dq = dot(tl.trans(b_ds), b_k, PRECISION)  # [BM, BD]
            _store_rows(p_dq + (i_b * NQ * T + i_t) * D, T * D, o_m, NQ, b_dq * SCALE, D, BD)
    o_row = i_b * NK * T + i_t
    o_part = i_b * T + i_t
    _store_rows_and_null(p_dk + o_row * D, T * D, p_part_k, o_part * D, o_n, NK, b_dk * SCALE, COUNTED, D, BD)
    _store_rows_and_null(p_dv + o_row * D, T * D, p_part_v, o_part * D, o_n, NK, b_dv, COUNTED, D, BD)


@triton.jit
def _backward_queries(
    p_q, p_k, p_v, p_null_k, p_null_v, p_out, p_dout, p_softmax, p_delta, p_dq,
    s_qb, s_qn, s_qt, s_qd, s_kb, s_kn, s_kt, s_kd, s_vb, s_vn, s_vt, s_vd, s_nkt, s_nkd, s_nvt, s_nvd,
    s_ob, s_on, s_od,
    NQ, NK, T, count,
    COUNTED: tl.constexpr, ONE_TILE: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one sample and head; leaves its rows of gradient times output for the keys."""
    i_b, i_m, i_t = _place(tl.cdiv(NQ, BM), T)
    o_m = i_m * BM + tl.arange(0, BM)
    p_k += i_b * s_kb + i_t * s_kt
    p_v += i_b * s_vb + i_t * s_vt
    if COUNTED:
        p_null_k += i_t * s_nkt
        p_null_v += i_t * s_nvt
    b_q = _rows(p_q + i_b * s_qb + i_t * s_qt, s_qn, s_qd, o_m, NQ, D, BD)  # [BM, BD]
    b_dout = _rows(p_dout + i_b * s_ob + i_t * D * s_od, s_on, s_od, o_m, NQ, D, BD)  # [BM, BD]
    b_out = _rows(p_out + (i_b * NQ * T + i_t) * D, T * D, 1, o_m, NQ, D, BD)  # [BM, BD]
    b_delta = tl.sum(b_dout.to(ACC) * b_out.to(ACC), 1)  # [BM]
    tl.store(p_delta + (i_b * T + i_t) * NQ + o_m, b_delta, mask=o_m < NQ)
    b_dout = b_dout.to(b_q.dtype)
    p_softmax += (i_b * T + i_t) * 2 * NQ
    b_max = tl.load(p_softmax + o_m, mask=o_m < NQ, other=float("inf"))  # [BM]
    b_sum = tl.load(p_softmax + NQ + o_m, mask=o_m < NQ, other=1.0)  # [BM]
    b_dq = tl.zeros([BM, BD], ACC)
    for i_n in range(1 if ONE_TILE else tl.cdiv(NK + COUNTED, BN)):
        o_n = i_n * BN + tl.arange(0, BN)
        b_k = _rows_and_null(p_k, s_kn, s_kd, p_null_k, s_nkd, o_n, NK, COUNTED, D, BD).to(b_q.dtype)  # [BN, BD]
        b_v = _rows_and_null(p_v, s_vn, s_vd, p_null_v, s_nvd, o_n, NK, COUNTED, D, BD).to(b_q.dtype)
        b_mask, b_weight = _key_weights(o_n, NK, count, COUNTED, ACC)  # [BN]
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * (SCALE * _LOG2E) + b_mask[None, :]  # [BM, BN]
        b_p = tl.exp2(b_s - b_max[:, None]) * b_weight[None, :] / b_sum[:, None]
        b_dp = dot(b_dout, tl.trans(b_v), PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += dot(b_ds.to(b_q.dtype), b_k, PRECISION)
    _store_rows(p_dq + (i_b * NQ * T + i_t) * D, T * D, o_m, NQ, b_dq * SCALE, D, BD)


@triton.jit
def _sum_rows(p_x, p_sum, o_c, B, N, BR: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """Columns ``o_c`` of a contiguous matrix (B, N) summed over its rows."""
    b_sum = tl.zeros([BR, BC], ACC)
    for i_r in range(0, B, BR):
        o_r = i_r + tl.arange(0, BR)
        p_rows = p_x + o_r[:, None].to(tl.int64) * N + o_c[None, :]  # [BR, BC]
        b_sum += tl.load(p_rows, mask=(o_r[:, None] < B) & (o_c[None, :] < N), other=0.0).to(ACC)
    tl.store(p_sum + o_c, tl.sum(b_sum, 0).to(p_sum.dtype.element_ty), mask=o_c < N)


@triton.jit
def _sum_parts(p_part_k, p_part_v, p_dnull_k, p_dnull_v, B, N, BR: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """Gradients (B, N) of the null key and value in each sample, summed over samples, in the same order each time."""
    o_c = tl.program_id(0) // 2 * BC + tl.arange(0, BC)
    if tl.program_id(0) % 2 == 0:
        _sum_rows(p_part_k, p_dnull_k, o_c, B, N, BR, BC, ACC)
    else:
        _sum_rows(p_part_v, p_dnull_v, o_c, B, N, BR, BC, ACC)


class Blocks(NamedTuple):
    """Launch parameters: queries and keys of a tile, warps, and stages of a loop's loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def query_blocks(queries: int, keys: int, size: int, width: int) -> Blocks:
    """Launch parameters of the forward and of the backward's pass over queries.

    Args:
        queries, keys: rows of a sample, the null key counted.
        size: channels of a head.
        width: bytes of a number.
    """
    channels = launch.block(size)
    if width > 2:
        BM = min(launch.block(queries), 32 if channels <= 64 else 16)
        BN = min(launch.block(keys), 32 if channels <= 64 or keys <= 32 else 16)
        return Blocks(BM, BN, min(8, min(BM, BN) * channels // 128), 1)
    BM = min(launch.block(queries), 64 if channels <= 128 else 32)
    warps, stages = (BM // 16, 3) if channels <= 128 else (BM // 4, 2)
    return Blocks(BM, min(launch.block(keys), 32), warps, stages)


def key_blocks(queries: int, keys: int, size: int, width: int) -> Blocks:
    """Launch parameters of the backward's pass over keys, which is its only pass if a tile holds all keys."""
    channels = launch.block(size)
    if width > 2:
        BM = min(launch.block(queries), 32 if channels <= 64 else 16)
        BN = min(launch.block(keys), 32)
        return Blocks(BM, BN, min(8 if channels <= 128 else 16, min(BM, BN) * channels // 128), 1)
    BM = min(launch.block(queries), 32 if channels <= 128 else 16)
    BN = launch.block(keys)
    if BN > 128 or BN * channels > 64 * 128:
        BN = 64 if channels <= 128 else 32
    return Blocks(BM, BN, 8 if BN * channels >= 64 * 128 else BN // 16, 2)


def _inputs(q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None) -> tuple[Any, ...]:
    """The inputs as kernels take them: null token in the dtype of its peers, and all strides."""
    strides = (*q.stride(), *k.stride(), *v.stride())
    if null_k is None or null_v is None:
        return (q, k, v, None, None), (*strides, 0, 0, 0, 0)
    # One tile of loads has one dtype, so autocast's float32 tokens beside 16-bit keys are converted first.
    null_k, null_v = null_k.to(k.dtype), null_v.to(v.dtype)
    return (q, k, v, null_k, null_v), (*strides, *null_k.stride(), *null_v.stride())


def _options(q: Tensor, k: Tensor, count: int, blocks: Blocks) -> dict[str, Any]:
    """What every kernel is told besides its tensors."""
    return {
        "NQ": q.shape[1],
        "NK": k.shape[1],
        "T": q.shape[2],
        "count": float(count),
        "COUNTED": count > 0,
        "D": q.shape[3],
        "SCALE": q.shape[3] ** -0.5,
        "BM": blocks.queries,
        "BN": blocks.keys,
        "BD": launch.block(q.shape[3]),
        "ACC": _accumulator(q)[1],
        "PRECISION": launch.dot_precision(q.dtype),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _accumulator(q: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if q.dtype == torch.float64 else (torch.float32, tl.float32)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


@torch.library.custom_op("sgmim_fast::guidance_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """Output (B, NQ, T * D); largest logits and softmax denominators (B, T, 2, NQ)."""
    out, statistics = _attend_fake(q, k, v, null_k, null_v, count)
    inputs, strides = _inputs(q, k, v, null_k, null_v)
    (B, NQ, T, D), N = q.shape, k.shape[1] + (count > 0)
    blocks = query_blocks(NQ, N, D, q.element_size())
    with launch.on_device(q):
        _forward[(B * T * launch.ceil_div(NQ, blocks.queries),)](
            *inputs, out, statistics, *strides,
            ONE_TILE=blocks.keys >= N, **_options(q, k, count, blocks),
        )  # fmt: skip
    return out, statistics


@_attend.register_fake
def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    B, NQ, T, D = q.shape
    return _empty(q, B, NQ, T * D), _empty(q, B, T, 2, NQ, dtype=_accumulator(q)[0])


@torch.library.custom_op("sgmim_fast::guidance_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None, count: int,
    out: Tensor, statistics: Tensor, dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, null_k, null_v; the last two are empty if there is no null token."""
    gradients = _attend_backward_fake(q, k, v, null_k, null_v, count, out, statistics, dout)
    dq, dk, dv, dnull_k, dnull_v = gradients
    inputs, strides = _inputs(q, k, v, null_k, null_v)
    (B, NQ, T, D), N = q.shape, k.shape[1] + (count > 0)
    blocks = key_blocks(NQ, N, D, q.element_size())
    key_tiles = launch.ceil_div(N, blocks.keys)
    whole = key_tiles == 1
    strides += dout.stride()
    delta = None if whole else _empty(q, B, T, NQ, dtype=statistics.dtype)
    part_k = part_v = None
    if count:
        part_k, part_v = _empty(k, B, T, D), _empty(v, B, T, D)
    with launch.on_device(q):
        if not whole:
            of_queries = query_blocks(NQ, N, D, q.element_size())
            _backward_queries[(B * T * launch.ceil_div(NQ, of_queries.queries),)](
                *inputs, out, dout, statistics, delta, dq, *strides,
                ONE_TILE=of_queries.keys >= N, **_options(q, k, count, of_queries),
            )  # fmt: skip
        _backward_keys[(B * T * key_tiles,)](
            *inputs, dout, statistics, delta, dq, dk, dv, part_k, part_v, *strides,
            WHOLE=whole, ONE_TILE=blocks.queries >= NQ, **_options(q, k, count, blocks),
        )  # fmt: skip
        if count:
            _sum_parts[(2 * launch.ceil_div(T * D, 32),)](
                part_k, part_v, dnull_k, dnull_v, B, T * D, BR=128, BC=32, ACC=_accumulator(q)[1], num_warps=4
            )
    return gradients


@_attend_backward.register_fake
def _attend_backward_fake(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None, null_v: Tensor | None, count: int,
    out: Tensor, statistics: Tensor, dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    null = [_empty(q, 0) if x is None else _empty(x, *x.shape) for x in (null_k, null_v)]
    return _empty(q, *q.shape), _empty(k, *k.shape), _empty(v, *v.shape), null[0], null[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.count = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, null_k, null_v, out, statistics = ctx.saved_tensors
    if dout is None:
        return (None,) * 6
    dq, dk, dv, dnull_k, dnull_v = _attend_backward(q, k, v, null_k, null_v, ctx.count, out, statistics, dout)
    return dq, dk, dv, *((None, None) if null_k is None else (dnull_k, dnull_v)), None


_attend.register_autograd(_differentiate, setup_context=_save)


def guidance_attention(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None = None, null_v: Tensor | None = None, count: int = 0
) -> Tensor:
    """As ``reference.guidance_attention``: (B, NQ, T * D) in the dtype of q."""
    if count == 0:
        null_k = null_v = None
    return _attend(q, k, v, null_k, null_v, count)[0]
