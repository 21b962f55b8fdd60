"""Pieces of kernels that more than one of them uses."""

import triton
import triton.language as tl

from sgmim_fast.kernels import launch

_INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a (M, K) times b (K, N), summed in float32 (float64 for float64)."""
    # Triton's interpreter returns garbage for products of bfloat16.
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)
