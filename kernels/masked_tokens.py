"""Rows moved by an index list: gathered from a map of tokens, or scattered into one that holds a fill token elsewhere.

An index names mask cells. A cell is a square of SIDE x SIDE tokens of a map of W cells a row; its tokens follow one
another in the gathered order, rows before columns. With SIDE 1 a cell is a row, and W does not matter.

Every kernel writes its output in one pass: the row to write looks for itself in the index list, so nothing is zeroed
first and no two programs write to one place. An index out of range shows as NaN.

Shape letters: B batch, K entries of the index list, G cells, N = G * SIDE * SIDE tokens, C channels, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import launch
from sgmim_fast.kernels.launch import ceil_div

WARPS = 4


@triton.jit
def unravel(blocks_n, blocks_c):
    """This program's sample (int64), block of rows and block of channels; neighbours share rows."""
    i_p = tl.program_id(0)
    i_n = i_p // blocks_c
    return (i_n // blocks_n).to(tl.int64), i_n % blocks_n, i_p % blocks_c


@triton.jit
def cell_of_token(o_n, W, SIDE: tl.constexpr):
    """Cell of each token of the map, and its place among the cell's tokens."""
    if SIDE == 1:
        return o_n, o_n * 0
    o_y = o_n // (W * SIDE)
    o_x = o_n - o_y * (W * SIDE)
    return o_y // SIDE * W + o_x // SIDE, o_y % SIDE * SIDE + o_x % SIDE


@triton.jit
def token_of_cell(b_cell, o_t, W, SIDE: tl.constexpr):
    """The inverse of cell_of_token, int64."""
    if SIDE == 1:
        return b_cell.to(tl.int64)
    o_y = b_cell // W * SIDE + o_t // SIDE
    o_x = b_cell % W * SIDE + o_t % SIDE
    return o_y.to(tl.int64) * (W * SIDE) + o_x


@triton.jit
def find(p_index, s_k, K, G, b_cell, BK: tl.constexpr):
    """The last entry of an index list that names each cell (-1: none), how many do, and how many are out of range."""
    b_place = b_cell * 0 - 1
    b_times = b_cell * 0
    bad = 0
    for start in range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        m_k = o_k < K
        b_index = tl.load(p_index + o_k * s_k, mask=m_k, other=0)
        m_same = (b_index[None, :] == b_cell[:, None]) & m_k[None, :]  # [BN, BK]
        b_place = tl.maximum(b_place, tl.max(tl.where(m_same, o_k[None, :], -1), 1))
        b_times += tl.sum(m_same.to(tl.int32), 1)
        bad += tl.sum((m_k & ((b_index < 0) | (b_index >= G))).to(tl.int32), 0)
    return b_place, b_times, bad


@triton.jit
def _gather(
    p_x, p_index, p_out, N, C, K, W, s_xb, s_xn, s_xc, s_ib, s_ik,
    SIDE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = SIDE * SIDE
    i_b, i_m, i_c = unravel(tl.cdiv(K * TOKENS, BN), tl.cdiv(C, BC))
    o_m = i_m * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    m_m = o_m < K * TOKENS
    m_c = o_c < C
    b_cell = tl.load(p_index + i_b * s_ib + o_m // TOKENS * s_ik, mask=m_m, other=-1)
    m_ok = (b_cell >= 0) & (b_cell < N // TOKENS)
    b_n = token_of_cell(b_cell, o_m % TOKENS, W, SIDE)
    p_rows = p_x + i_b * s_xb + b_n[:, None] * s_xn + o_c[None, :] * s_xc  # [BN, BC]
    b_x = tl.load(p_rows, mask=m_ok[:, None] & m_c[None, :], other=float("nan"))
    o_out = (i_b * K * TOKENS + o_m) * C
    tl.store(p_out + o_out[:, None] + o_c[None, :], b_x, mask=m_m[:, None] & m_c[None, :])


@triton.jit
def _gather_backward(
    p_g, p_index, p_dx, N, C, K, W, s_gb, s_gk, s_gc, s_ib, s_ik,
    SIDE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = SIDE * SIDE
    i_b, i_n, i_c = unravel(tl.cdiv(N, BN), tl.cdiv(C, BC))
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_cell, b_t = cell_of_token(o_n, W, SIDE)
    b_place, b_times, _ = find(p_index + i_b * s_ib, s_ik, K, N // TOKENS, b_cell, BK)
    p_g += i_b * s_gb
    p_dx += (i_b * N + o_n)[:, None] * C + o_c[None, :]
    m_out = (o_n < N)[:, None] & m_c[None, :]  # [BN, BC]
    o_gc = o_c[None, :] * s_gc
    if tl.max(b_times, 0) <= 1:
        b_row = (b_place * TOKENS + b_t).to(tl.int64)
        b_g = tl.load(p_g + b_row[:, None] * s_gk + o_gc, mask=(b_place >= 0)[:, None] & m_c[None, :], other=0.0)
        tl.store(p_dx, b_g, mask=m_out)
    else:  # a cell is named twice: add its gradients up in the order of the list
        b_sum = tl.zeros([BN, BC], ACC)
        for i_k in range(0, K):
            m_n = b_cell == tl.load(p_index + i_b * s_ib + i_k * s_ik)
            b_row = (i_k * TOKENS + b_t).to(tl.int64)
            b_g = tl.load(p_g + b_row[:, None] * s_gk + o_gc, mask=m_n[:, None] & m_c[None, :], other=0.0)
            b_sum += b_g.to(ACC)
        tl.store(p_dx, b_sum.to(p_dx.dtype.element_ty), mask=m_out)


@triton.jit
def _scatter(
    p_values, p_index, p_fill, p_out, N, C, K, W, s_vb, s_vk, s_vc, s_ib, s_ik, s_f,
    SIDE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = SIDE * SIDE
    i_b, i_n, i_c = unravel(tl.cdiv(N, BN), tl.cdiv(C, BC))
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_cell, b_t = cell_of_token(o_n, W, SIDE)
    b_place, _, bad = find(p_index + i_b * s_ib, s_ik, K, N // TOKENS, b_cell, BK)
    m_named = (b_place >= 0) & (bad == 0)
    b_row = (b_place * TOKENS + b_t).to(tl.int64)
    p_rows = p_values + i_b * s_vb + b_row[:, None] * s_vk + o_c[None, :] * s_vc  # [BN, BC]
    b_values = tl.load(p_rows, mask=m_named[:, None] & m_c[None, :], other=0.0)
    b_fill = tl.load(p_fill + o_c * s_f, mask=m_c, other=0.0).to(ACC)
    b_fill = tl.where(bad > 0, float("nan"), b_fill).to(b_values.dtype)
    b_out = tl.where(m_named[:, None], b_values, b_fill[None, :])
    o_out = (i_b * N + o_n) * C
    tl.store(p_out + o_out[:, None] + o_c[None, :], b_out, mask=(o_n < N)[:, None] & m_c[None, :])


@triton.jit
def _fill_partials(
    p_g, p_index, p_partials, B, N, C, K, W, s_gb, s_gn, s_gc, s_ib, s_ik,
    SIDE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program sums the unnamed rows of every P-th block of rows: (P, C)."""
    blocks_c = tl.cdiv(C, BC)
    blocks_n = tl.cdiv(N, BN)
    i_p = tl.program_id(0) // blocks_c
    o_c = tl.program_id(0) % blocks_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_sum = tl.zeros([BN, BC], ACC)
    for i_tile in range(i_p, B * blocks_n, tl.num_programs(0) // blocks_c):
        i_b = (i_tile // blocks_n).to(tl.int64)
        o_n = i_tile % blocks_n * BN + tl.arange(0, BN)
        b_cell, _ = cell_of_token(o_n, W, SIDE)
        b_place, _, _ = find(p_index + i_b * s_ib, s_ik, K, N // (SIDE * SIDE), b_cell, BK)
        m_n = (o_n < N) & (b_place < 0)
        p_rows = p_g + i_b * s_gb + o_n.to(tl.int64)[:, None] * s_gn + o_c[None, :] * s_gc  # [BN, BC]
        b_sum += tl.load(p_rows, mask=m_n[:, None] & m_c[None, :], other=0.0).to(ACC)
    tl.store(p_partials + i_p.to(tl.int64) * C + o_c, tl.sum(b_sum, 0), mask=m_c)


def tile(channels: int, element_size: int) -> tuple[int, int]:
    """Rows and channels of a program's tile of 8 KiB: four accesses of 16 bytes a thread.

    Channels are a divisor of all of them where that leaves at least 64, so that no lane idles.
    """
    divisor = channels & -channels
    columns = min(1024, divisor if divisor >= 64 else launch.block(channels))
    return max(1, min(32, 8192 // element_size // columns)), columns


def list_block(entries: int, rows: int) -> int:
    """Entries of the index list that ``rows`` rows are compared with at a time."""
    return min(launch.block(entries), max(16, 2048 // rows))


def fill_programs(tiles: int) -> int:
    """Programs that share ``tiles`` tiles of rows: three a multiprocessor of a large GPU; each leaves partial sums."""
    return min(tiles, 396)


def sums(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc(dtype: torch.dtype) -> Any:
    """The same as kernels name it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _launch_gather(x: Tensor, index: Tensor, side: int, columns: int) -> Tensor:
    batch, rows, channels = x.shape
    entries = index.shape[1]
    out = torch.empty((batch, entries * side**2, channels), dtype=x.dtype, device=x.device)
    bn, bc = tile(channels, x.element_size())
    grid = (batch * ceil_div(entries * side**2, bn) * ceil_div(channels, bc),)
    with launch.on_device(x):
        _gather[grid](
            x, index, out, rows, channels, entries, columns, *x.stride(), *index.stride(),
            SIDE=side, BN=bn, BC=bc, num_warps=WARPS,
        )  # fmt: skip
    return out


def _launch_gather_backward(grad: Tensor, index: Tensor, rows: int, side: int, columns: int) -> Tensor:
    batch, _, channels = grad.shape
    entries = index.shape[1]
    dx = torch.empty((batch, rows, channels), dtype=grad.dtype, device=grad.device)
    bn, bc = tile(channels, grad.element_size())
    grid = (batch * ceil_div(rows, bn) * ceil_div(channels, bc),)
    with launch.on_device(grad):
        _gather_backward[grid](
            grad, index, dx, rows, channels, entries, columns, *grad.stride(), *index.stride(),
            SIDE=side, BN=bn, BC=bc, BK=list_block(entries, bn), ACC=acc(grad.dtype), num_warps=WARPS,
        )  # fmt: skip
    return dx


def _launch_scatter(values: Tensor, index: Tensor, fill: Tensor, rows: int, side: int, columns: int) -> Tensor:
    batch, _, channels = values.shape
    entries = index.shape[1]
    out = torch.empty((batch, rows, channels), dtype=values.dtype, device=values.device)
    bn, bc = tile(channels, values.element_size())
    grid = (batch * ceil_div(rows, bn) * ceil_div(channels, bc),)
    with launch.on_device(values):
        _scatter[grid](
            values, index, fill, out, rows, channels, entries, columns, *values.stride(), *index.stride(),
            *fill.stride(), SIDE=side, BN=bn, BC=bc, BK=list_block(entries, bn), ACC=acc(values.dtype),
            num_warps=WARPS,
        )  # fmt: skip
    return out


def launch_fill_partials(grad: Tensor, index: Tensor, side: int, columns: int) -> Tensor:
    """Sums of gradient rows (B, N, C) that no index names, (P, C) in fp32 or fp64: add up its rows."""
    batch, rows, channels = grad.shape
    entries = index.shape[1]
    bn, bc = tile(channels, grad.element_size())
    bn *= 2  # few programs, so that what they leave is soon added up, of many threads
    programs = fill_programs(batch * ceil_div(rows, bn))
    partials = torch.empty((programs, channels), dtype=sums(grad.dtype), device=grad.device)
    with launch.on_device(grad):
        _fill_partials[(programs * ceil_div(channels, bc),)](
            grad, index, partials, batch, rows, channels, entries, columns, *grad.stride(), *index.stride(),
            SIDE=side, BN=bn, BC=bc, BK=list_block(entries, bn), ACC=acc(grad.dtype), num_warps=2 * WARPS,
        )  # fmt: skip
    return partials


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, N, C) -> (B, K, C)."""
    return gather_tokens(x, index, 1, 1)


def scatter_rows(values: Tensor, index: Tensor, fill: Tensor, rows: int) -> Tensor:
    """Rows (B, K, C) to places ``index`` (B, K), each named once, of (B, rows, C); others hold ``fill`` (C,)."""
    return scatter_tokens(values, index, fill, rows, 1, 1)


@torch.library.custom_op("sgmim_fast::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, index: Tensor, side: int, columns: int) -> Tensor:
    """Tokens of the cells ``index`` (B, K) of a map (B, N, C) -> (B, K * side * side, C)."""
    return _launch_gather(x, index, side, columns)


@gather_tokens.register_fake
def _(x: Tensor, index: Tensor, side: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[1] * side**2, x.shape[2])


@torch.library.custom_op("sgmim_fast::gather_tokens_backward", mutates_args=())
def gather_tokens_backward(grad: Tensor, index: Tensor, rows: int, side: int, columns: int) -> Tensor:
    """Gradient (B, rows, C) of the map that ``gather_tokens`` took tokens from."""
    return _launch_gather_backward(grad, index, rows, side, columns)


@gather_tokens_backward.register_fake
def _(grad: Tensor, index: Tensor, rows: int, side: int, columns: int) -> Tensor:
    return grad.new_empty(grad.shape[0], rows, grad.shape[2])


@torch.library.custom_op("sgmim_fast::scatter_tokens", mutates_args=())
def scatter_tokens(values: Tensor, index: Tensor, fill: Tensor, rows: int, side: int, columns: int) -> Tensor:
    """Tokens (B, K * side * side, C) to the cells ``index`` (B, K) of a map (B, rows, C); elsewhere ``fill`` (C,)."""
    return _launch_scatter(values, index, fill, rows, side, columns)


@scatter_tokens.register_fake
def _(values: Tensor, index: Tensor, fill: Tensor, rows: int, side: int, columns: int) -> Tensor:
    return values.new_empty(values.shape[0], rows, values.shape[2])


@torch.library.custom_op("sgmim_fast::fill_gradient", mutates_args=())
def fill_gradient(grad: Tensor, index: Tensor, dtype: torch.dtype, side: int, columns: int) -> Tensor:
    """Gradient (C,) of the token that ``scatter_tokens`` writes where no index points."""
    return launch_fill_partials(grad, index, side, columns).sum(0).to(dtype)


@fill_gradient.register_fake
def _(grad: Tensor, index: Tensor, dtype: torch.dtype, side: int, columns: int) -> Tensor:
    return grad.new_empty(grad.shape[2], dtype=dtype)


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.side, ctx.columns = inputs
    ctx.rows = x.shape[1]
    ctx.save_for_backward(index)


def _gather_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return gather_tokens_backward(grad, index, ctx.rows, ctx.side, ctx.columns), None, None, None


def _keep_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, fill, _, ctx.side, ctx.columns = inputs
    ctx.dtype = fill.dtype
    ctx.save_for_backward(index)


def _scatter_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    values = fill = None
    if ctx.needs_input_grad[0]:
        values = gather_tokens(grad, index, ctx.side, ctx.columns)
    if ctx.needs_input_grad[2]:
        fill = fill_gradient(grad, index, ctx.dtype, ctx.side, ctx.columns)
    return values, None, fill, None, None, None


gather_tokens.register_autograd(_gather_gradients, setup_context=_keep_gather)
scatter_tokens.register_autograd(_scatter_gradients, setup_context=_keep_scatter)
