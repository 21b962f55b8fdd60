"""Geometry of attention windows, shared by the forward and backward kernels.

A window has KH x KW tokens; its token n is at row n // KW, column n % KW. Windows tile the map after a cyclic shift
towards the origin, which here is index arithmetic. With a class token there is one window, token 0 is the class token
and token n > 0 is at row (n - 1) // KW, column (n - 1) % KW.

Shape letters: B batch, H W rows and columns of the map, T heads, D head size (BD: its block), N tokens of a window,
P rows of the bias table, BM BN block of queries, of keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.launch import block, ceil_div

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-100.0 * 1.4426950408889634)
"""Added between tokens of different regions of a shifted map, to logits in base 2."""


class Windows(NamedTuple):
    """How tokens are grouped; plain integers, so that launch choices are functions of it."""

    rows: int
    """Tokens a column of the map."""
    columns: int
    height: int
    """Tokens a column of one window (KH)."""
    width: int
    shift: int
    class_token: bool

    @property
    def tokens(self) -> int:
        """N."""
        return self.height * self.width + self.class_token

    @property
    def table_rows(self) -> int:
        """P."""
        return (2 * self.height - 1) * (2 * self.width - 1) + 3 * self.class_token

    @property
    def per_map(self) -> int:
        return 1 if self.class_token else self.rows // self.height * (self.columns // self.width)

    @property
    def padded_side(self) -> int:
        """Columns of a tile whose rows begin at powers of two."""
        return block(self.width, 4)

    @property
    def whole(self) -> bool:
        """Whether a tile of at most 64 tokens holds the window."""
        return not self.class_token and max(self.height, self.width) <= 8 and self.height == self.width


def of_map(qkv: Tensor, window: int, shift: int) -> Windows:
    """Windows of a map (B, H, W, ...)."""
    return Windows(qkv.shape[1], qkv.shape[2], window, window, shift, False)


def of_class_token(grid: tuple[int, int]) -> Windows:
    """The one window of a class token and a grid of tokens, laid out as a map of one row."""
    return Windows(1, 1 + grid[0] * grid[1], *grid, 0, True)


def statistics(dtype: torch.dtype) -> torch.dtype:
    """What sums and log-sum-exps of ``dtype`` are kept in, and what kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


PROGRAMS = 2048
"""How many programs keep a GPU busy; with more windows than that, one program works through several."""


def group_size(windows: int, heads: int) -> int:
    """Windows that one program works through, so that what it keeps for its head pays."""
    return min(16, max(1, windows * heads // PROGRAMS))


def groups(windows: int, heads: int) -> int:
    """Programs a head."""
    return ceil_div(windows, group_size(windows, heads))


def tiles(kernel: str, head_size: int, dtype: torch.dtype, cosine: bool) -> dict[str, int]:
    """Blocks of queries and keys, warps and stages of a kernel for larger windows: "forward", "queries" or "keys"."""
    if dtype == torch.float32:  # exact products take no matrix instructions and many registers
        return {"BM": 32, "BN": 16, "num_warps": 4, "num_stages": 1}
    wide = head_size > 64
    if kernel == "keys":  # keeps two sums
        return {"BM": 32, "BN": 64, "num_warps": 4 if head_size <= 32 else 8, "num_stages": 2}
    narrow = wide if kernel == "forward" else head_size > 32 or cosine
    return {"BM": 64, "BN": 32 if narrow else 64, "num_warps": 8 if wide else 4, "num_stages": 2}


def diagonal_tile(windows: Windows, head_size: int, dtype: torch.dtype) -> int:
    """Rows of a tile of the table's gradient."""
    tokens = 32 if dtype == torch.float32 or head_size > 64 else 64
    return max(1, tokens // windows.padded_side)


def whole_warps(backward: bool, windows: Windows, head_size: int, dtype: torch.dtype) -> int:
    """Warps of the kernels that keep a window in one tile."""
    if windows.padded_side == 4:
        return 1  # sixteen tokens: with more warps a thread has less than 16 bytes to load
    if dtype == torch.float32:  # exact products take no matrix instructions and many registers
        return 16 if backward else 8
    return 8 if backward or head_size > 64 else 4


@triton.jit
def window_position(o_n, KW: tl.constexpr, CLASS: tl.constexpr):
    """Row and column in the window of tokens o_n; the class token's are of no meaning."""
    o_t = o_n - 1 if CLASS else o_n
    return o_t // KW, o_t % KW


@triton.jit
def map_position(
    o_n, o_r, o_c, i_w, H, W, KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, CLASS: tl.constexpr
):
    """Row and column in the map, int64, of tokens at (o_r, o_c) in window i_w of their map."""
    if CLASS:
        o_y = o_n * 0
        o_x = o_n
    else:
        o_y = i_w // (W // KW) * KH + o_r + SHIFT
        o_x = i_w % (W // KW) * KW + o_c + SHIFT
        if SHIFT > 0:
            o_y = tl.where(o_y >= H, o_y - H, o_y)
            o_x = tl.where(o_x >= W, o_x - W, o_x)
    return o_y.to(tl.int64), o_x.to(tl.int64)


@triton.jit
def region(o_r, o_c, i_w, H, W, KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr):
    """A number for each region that the cyclic shift leaves apart: only equal ones see each other."""
    o_y = i_w // (W // KW) * KH + o_r
    o_x = i_w % (W // KW) * KW + o_c
    i_y = (o_y >= H - KH).to(tl.int32) + (o_y >= H - SHIFT).to(tl.int32)
    i_x = (o_x >= W - KW).to(tl.int32) + (o_x >= W - SHIFT).to(tl.int32)
    return i_y * 3 + i_x


@triton.jit
def load_bias(
    p_bias, s_p, o_m, o_rm, o_cm, m_m, o_n, o_rn, o_cn, m_n,
    KH: tl.constexpr, KW: tl.constexpr, CLASS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Bias of tokens o_m asking tokens o_n by their relative position, in base 2; -inf for keys that are none.

    What describes queries is a column (BM, 1) and what describes keys a row (1, BN), or the other way round.
    """
    o_p = (o_rm - o_rn + KH - 1) * (2 * KW - 1) + (o_cm - o_cn + KW - 1)
    if CLASS:
        FIRST: tl.constexpr = (2 * KH - 1) * (2 * KW - 1)
        o_p = tl.where(o_n == 0, FIRST + 1, o_p)
        o_p = tl.where(o_m == 0, tl.where(o_n == 0, FIRST + 2, FIRST), o_p)
    b_bias = tl.load(p_bias + o_p * s_p, mask=m_m & m_n, other=0.0).to(ACC) * LOG2E
    return tl.where(m_n, b_bias, float("-inf"))


@triton.jit
def load_rows(p_x, o_n, o_d, s_d, m_n, D: tl.constexpr, BD: tl.constexpr):
    """Rows at offsets o_n, zero where m_n is False and beyond the head's size."""
    p = p_x + o_n[:, None] + o_d[None, :] * s_d
    if D == BD:
        return tl.load(p, mask=m_n[:, None], other=0.0)
    return tl.load(p, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p_x, o_n, o_d, b_x, m_n, D: tl.constexpr, BD: tl.constexpr):
    """The inverse of load_rows for memory whose last dimension is contiguous."""
    p = p_x + o_n[:, None] + o_d[None, :]
    b_x = b_x.to(p_x.dtype.element_ty)
    if D == BD:
        tl.store(p, b_x, mask=m_n[:, None])
    else:
        tl.store(p, b_x, mask=m_n[:, None] & (o_d < D)[None, :])


@triton.jit
def unit_rows(b_x, ACC: tl.constexpr):
    """Rows of length 1, in the dtype of b_x, and one over their lengths."""
    b_x32 = b_x.to(ACC)
    b_r = 1.0 / tl.maximum(tl.sqrt(tl.sum(b_x32 * b_x32, 1)), 1e-12)
    return (b_x32 * b_r[:, None]).to(b_x.dtype), b_r


@triton.jit
def unit_rows_gradient(b_x, b_r, b_dx, ACC: tl.constexpr):
    """Gradient of rows from that of their unit rows b_x."""
    b_x32 = b_x.to(ACC)
    return (b_dx - b_x32 * tl.sum(b_x32 * b_dx, 1)[:, None]) * b_r[:, None]
