"""Mean and variance of each row between its 10 % and 90 % order statistics, without a sort; and standardised maps.

One program takes a row. It brackets both order statistics by those of a small sorted sample and reads the row once:
values between the brackets are summed up, values inside them are listed, the others only counted. Both order statistics
are then searched in the lists, by halving the range of bit patterns that can hold them, and what of the lists lies
between them is added. Luck decides only the speed: where the sample led astray, a second reading lists the whole row.

A row that holds a NaN or an infinity gets NaN for both.

Shape letters: R rows, n values of a row, W warps, S sampled values of each. Each warp fills a list of its own, so that
none waits for another, and always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import launch
from sgmim_fast.kernels.launch import ceil_div

WARPS = 16
REGISTERS = 96  # a thread; left to itself, the assembler spills some to make room for a second program
TILE = 1024  # values of a program of standardize


@triton.jit
def _key(x):
    """A float's bit pattern as an integer in the order of the floats."""
    size = tl.abs(x).to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    return tl.where(x < 0, -size, size)


@triton.jit
def _value(key):
    """The inverse of _key."""
    size = tl.abs(key).to(tl.float64 if key.dtype == tl.int64 else tl.float32, bitcast=True)
    return tl.where(key < 0, -size, size)


@triton.jit
def _middle(low, high):
    """Of two integers, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _pick(b_sorted, rank, S: tl.constexpr):
    """Values of ``rank`` [W] of sorted samples [W, S]."""
    return tl.sum(tl.where(tl.arange(0, S)[None, :] == rank, b_sorted, 0.0), 1)


@triton.jit
def _quarters(b_x, W: tl.constexpr):
    """Four blocks [W * 32] of a block [W, 128], such that no value leaves the thread that has loaded it."""
    b_0, b_1 = tl.split(tl.reshape(b_x, [W * 32, 2, 2]))
    return tl.split(b_0) + tl.split(b_1)


@triton.jit
def _collect(
    p_row, s_column, n, p_lists, o_lists, a, b, c, d, shift, W: tl.constexpr, LARGEST: tl.constexpr, ACC: tl.constexpr
):
    """Lists the values in [a, b] and [c, d].

    Returns the longest list's length and that of all, how many values are below a, how many in (b, c), the sum and the
    sum of squares of the latter less ``shift``, and a number that is NaN if the row holds a NaN or an infinity.
    """
    b_below = tl.zeros([W * 32], tl.int32)
    b_between = tl.zeros([W * 32], tl.int32)
    b_sum = tl.zeros([W * 32], tl.float64)
    b_square = tl.zeros([W * 32], tl.float64)
    b_odd = tl.zeros([W * 32], ACC)
    b_filled = tl.zeros([W], tl.int32)
    o_0 = tl.arange(0, W)[:, None] * 128 + tl.arange(0, 128)[None, :]  # [W, 128]
    o_1 = o_0 + W * 128
    # What fills up the last block is as large as any value, so it has no rank that matters, listed or not.
    b_0 = tl.load(p_row + o_0 * s_column, mask=o_0 < n, other=LARGEST)
    b_1 = tl.load(p_row + o_1 * s_column, mask=o_1 < n, other=LARGEST)
    for i in range(W * 256, n + W * 256, W * 256):
        b_values = _quarters(b_0.to(ACC), W) + _quarters(b_1.to(ACC), W)
        b_0 = tl.load(p_row + (i + o_0) * s_column, mask=i + o_0 < n, other=LARGEST)  # for the next turn
        b_1 = tl.load(p_row + (i + o_1) * s_column, mask=i + o_1 < n, other=LARGEST)
        b_codes = tl.zeros([W * 32], tl.int32)  # a count in each byte: listed, below, between
        b_off_sum = tl.zeros([W * 32], ACC)
        b_off_square = tl.zeros([W * 32], ACC)
        for j in tl.static_range(8):
            b_x = b_values[j]
            m_between = (b_x > b) & (b_x < c)
            b_codes += tl.where(m_between, 1 << 16, tl.where(b_x < a, 1 << 8, tl.where(b_x > d, 0, 1)))
            b_off = tl.where(m_between, b_x - shift, 0.0)
            b_off_sum += b_off
            b_off_square += b_off * b_off
            b_odd += b_x * 0.0
        b_sum += b_off_sum.to(tl.float64)
        b_square += b_off_square.to(tl.float64)
        b_between += b_codes >> 16
        b_below += (b_codes >> 8) & 255
        b_listed = tl.reshape(b_codes & 255, [W, 32])
        b_place = tl.reshape(o_lists + b_filled[:, None] + tl.cumsum(b_listed, 1) - b_listed, [W * 32])
        b_filled += tl.sum(b_listed, 1)
        for j in tl.static_range(8):
            b_x = b_values[j]
            m_listed = (b_x >= a) & (b_x <= d) & ((b_x <= b) | (b_x >= c))
            tl.store(p_lists + b_place, b_x, mask=m_listed)
            b_place += m_listed.to(tl.int32)
    longest, listed = tl.max(b_filled), tl.sum(b_filled)
    for i in range(0, longest, 256):  # NaN where other lists are longer
        o_l = i + tl.arange(0, 256)[None, :]
        tl.store(p_lists + o_lists + o_l, float("nan"), mask=o_l >= b_filled[:, None])
    tl.debug_barrier()  # what one warp has written all may read
    return longest, listed, tl.sum(b_below), tl.sum(b_between), tl.sum(b_sum), tl.sum(b_square), tl.sum(b_odd)


@triton.jit
def _listed(p_lists, o_lists, i, W: tl.constexpr):
    """Values i to i + 255 of each list, in eight blocks [W * 32]."""
    o = o_lists + i + tl.arange(0, 128)[None, :]
    return _quarters(tl.load(p_lists + o), W) + _quarters(tl.load(p_lists + o + 128), W)


@triton.jit
def _count(p_lists, o_lists, longest, low, high, W: tl.constexpr):
    """How many listed values are at most ``low``, and at most ``high``."""
    b_codes = tl.zeros([W * 32], tl.int32)  # a count in each half: at most low, at most high
    for i in range(0, longest, 256):
        b_values = _listed(p_lists, o_lists, i, W)
        for j in tl.static_range(8):
            b_codes += tl.where(b_values[j] <= low, 1, 0) + tl.where(b_values[j] <= high, 1 << 16, 0)
    return tl.sum(b_codes & 0xFFFF), tl.sum((b_codes >> 16) & 0xFFFF)


@triton.jit
def _statistics(
    p_values, p_lists, p_mean, p_variance, s_row, s_column, n, start, stop, capacity,
    S: tl.constexpr, W: tl.constexpr, LARGEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and unbiased variance of the values of ranks start to stop - 1 of one row."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row = p_values + i_r * s_row
    o_w = tl.arange(0, W)[:, None]
    p_lists += i_r * (W * capacity)
    o_lists = o_w * capacity  # [W, 1]

    # Brackets [a, b] and [c, d]: each warp guesses by a sample of its own, and all of them hardly ever guess too low or
    # too high. Multiples of the golden section, modulo 1, visit a row evenly.
    o_s = ((o_w * S + tl.arange(0, S)[None, :]) * -1640531527).to(tl.uint32)
    o_s = tl.umulhi(o_s, tl.full([W, S], n, tl.uint32)).to(tl.int32)
    b_sample = tl.sort(tl.load(p_row + o_s * s_column).to(ACC))  # [W, S]
    b_low, b_high = _pick(b_sample, S // 10, S), _pick(b_sample, S - 1 - S // 10, S)
    a, b, c, d = tl.min(b_low), tl.max(b_low), tl.min(b_high), tl.max(b_high)
    # Subtracted from what is summed up, so that no digits are lost; rounded, so that no rounding has a preference.
    coarse = (d - a) * 524288.0
    shift = (tl.sum(_pick(b_sample, S // 2, S)) / W + coarse) - coarse

    # Ranks in the lists are ranks in the row less what the lists leave out. In a second turn they leave out nothing.
    total, square, odd = shift.to(tl.float64), shift.to(tl.float64), shift
    between, listed, longest, upto_b, below_c, rank_low, rank_high = 0, 0, 0, 0, 0, 0, 0
    missed = 1
    while missed == 1:
        longest, listed, below, between, total, square, odd = _collect(
            p_row, s_column, n, p_lists, o_lists, a, b, c, d, shift, W, LARGEST, ACC
        )
        upto_b, below_c = _count(p_lists, o_lists, longest, b, _value(_key(c) - 1), W)
        rank_low, rank_high = start - below, stop - 1 - below - between
        found = (rank_low >= 0) & (rank_low < upto_b) & (rank_high >= below_c) & (rank_high < listed)
        missed = tl.where(found | (odd != odd), 0, 1)
        if missed == 1:
            a, c = tl.full([], float("-inf"), ACC), tl.full([], float("-inf"), ACC)
            b, d = tl.full([], float("inf"), ACC), tl.full([], float("inf"), ACC)
    odd = odd != odd

    # The search ends where one value, or one pattern, is left. Of ranks below ... upto - 1 are those in [0, 1].
    low_0, low_1, low_below, low_upto = _key(a), _key(b), 0, upto_b
    high_0, high_1, high_below, high_upto = _key(c), _key(d), below_c, listed
    while ((low_0 < low_1) & (low_upto > low_below + 1)) | ((high_0 < high_1) & (high_upto > high_below + 1)):
        low, high = _middle(low_0, low_1), _middle(high_0, high_1)
        upto_low, upto_high = _count(p_lists, o_lists, longest, _value(low), _value(high), W)
        if upto_low > rank_low:
            low_1, low_upto = low, upto_low
        else:
            low_0, low_below = low + 1, upto_low
        if upto_high > rank_high:
            high_1, high_upto = high, upto_high
        else:
            high_0, high_below = high + 1, upto_high

    # What lies above the lower one up to the upper one, plus the equals of the lower one that a sort would keep, less
    # those of the upper one that it would not.
    low_end, high_end = _value(low_1), _value(high_1)
    if between == 0:  # nothing is summed up yet, and the sample may have led astray here, too
        shift = low_end * 0.5 + high_end * 0.5
    b_low = tl.full([W * 32], float("-inf"), ACC)
    b_high = tl.full([W * 32], float("-inf"), ACC)
    b_sum = tl.zeros([W * 32], tl.float64)
    b_square = tl.zeros([W * 32], tl.float64)
    for i in range(0, longest, 256):
        b_values = _listed(p_lists, o_lists, i, W)
        b_off_sum = tl.zeros([W * 32], ACC)
        b_off_square = tl.zeros([W * 32], ACC)
        for j in tl.static_range(8):
            b_x = b_values[j]
            b_low = tl.maximum(b_low, tl.where(b_x <= low_end, b_x, float("-inf")))
            b_high = tl.maximum(b_high, tl.where(b_x <= high_end, b_x, float("-inf")))
            b_off = tl.where((b_x > low_end) & (b_x <= high_end), b_x - shift, 0.0)
            b_off_sum += b_off
            b_off_square += b_off * b_off
        b_sum += b_off_sum.to(tl.float64)
        b_square += b_off_square.to(tl.float64)
    low, high = tl.max(b_low).to(tl.float64), tl.max(b_high).to(tl.float64)
    more_low, less_high = tl.cast(low_upto - rank_low, tl.float64), tl.cast(high_upto - rank_high - 1, tl.float64)
    off_low, off_high = low - shift, high - shift
    total += tl.sum(b_sum) + more_low * off_low - less_high * off_high
    square += tl.sum(b_square) + more_low * off_low * off_low - less_high * off_high * off_high
    kept = (stop - start).to(tl.float64)
    mean = tl.where(low == high, low, shift + total / kept)
    variance = tl.where(low == high, 0.0, (square - total * total / kept) / (kept - 1))
    tl.store(p_mean + i_r, tl.where(odd, float("nan"), mean).to(ACC))
    tl.store(p_variance + i_r, tl.where(odd, float("nan"), variance).to(ACC))


@triton.jit
def _standardize(p_values, p_mean, p_variance, p_out, s_row, s_column, n, BN: tl.constexpr, ACC: tl.constexpr):
    """(x - mean) / sqrt(variance + 1e-6) of a run of BN values of a row."""
    i_p, blocks = tl.program_id(0), tl.cdiv(n, BN)
    i_r = (i_p // blocks).to(tl.int64)
    o_n = i_p % blocks * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < n
    b_x = tl.load(p_values + i_r * s_row + o_n * s_column, mask=m_n).to(ACC)
    mean, variance = tl.load(p_mean + i_r).to(ACC), tl.load(p_variance + i_r).to(ACC)
    scale = 1 / tl.sqrt(variance + 1e-6) if tl.float64 == ACC else tl.div_rn(1.0, tl.sqrt_rn(variance + 1e-6))
    tl.store(p_out + i_r * n + o_n, ((b_x - mean) * scale).to(p_out.dtype.element_ty), mask=m_n)


def sample(n: int) -> int:
    """Values that a warp samples of a row of n."""
    return 1 << (min(max(n // 256, 32), 256).bit_length() - 1)


def _launch_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    rows, n = values.shape
    exact = torch.float64 if values.dtype == torch.float64 else torch.float32
    mean, variance = (torch.empty(rows, dtype=exact, device=values.device) for _ in range(2))
    capacity = ceil_div(n, WARPS * 256) * 256
    lists = torch.empty((rows, WARPS, capacity), dtype=exact, device=values.device)
    with launch.on_device(values):
        _statistics[(rows,)](
            values, lists, mean, variance, *values.stride(), n, int(0.1 * n), int(0.9 * n), capacity,
            S=sample(n), W=WARPS, LARGEST=torch.finfo(values.dtype).max,
            ACC=tl.float64 if exact == torch.float64 else tl.float32, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return mean, variance


def _launch_standardize(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    rows, n = values.shape
    out = torch.empty((rows, n), dtype=values.dtype, device=values.device)
    with launch.on_device(values):
        _standardize[(rows * ceil_div(n, TILE),)](
            values, mean, variance, out, *values.stride(), n,
            BN=TILE, ACC=tl.float64 if values.dtype == torch.float64 else tl.float32, num_warps=4,
        )  # fmt: skip
    return out


@torch.library.custom_op("sgmim_fast::trimmed_stats", mutates_args=())
def trimmed_stats(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (R,), in float32, of the rows (R, n) between their 10 % and 90 % order statistics.

    Of values equal to a bound as many count as a sort would keep. Both are NaN for a row that holds a NaN or an
    infinity.
    """
    return _launch_statistics(values)


@trimmed_stats.register_fake
def _(values: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.new_empty(values.shape[0], dtype=exact), values.new_empty(values.shape[0], dtype=exact)


@torch.library.custom_op("sgmim_fast::standardize", mutates_args=())
def standardize(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``(d - mean) / sqrt(variance + 1e-6)`` of rows (R, n) with statistics (R,), in their dtype."""
    return _launch_standardize(values, mean, variance)


@standardize.register_fake
def _(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return values.new_empty(values.shape)
