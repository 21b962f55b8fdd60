"""Mask cells of a picture, cut out and laid out as rows of patches.

A cell is 32 x 32 pixels, that is SIDE x SIDE patches of P x P. Nothing here is differentiated: pictures are data.

Shape letters: B batch, V cells of a sample, G cells of the picture (W a row), T = SIDE * SIDE patches of a cell,
X = C * P * P numbers of a patch in the order (channel, row, column).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import launch
from sgmim_fast.kernels.launch import ceil_div
from sgmim_fast.kernels.masked_tokens import tile, unravel

CELL = 32  # pixels


@triton.jit
def pixels(b_cell, o_t, o_x, W, s_c, s_y, s_x, P: tl.constexpr):
    """Offsets in a picture, (tokens, inputs) int64, of inputs o_x of tokens o_t of cells b_cell."""
    SIDE: tl.constexpr = 32 // P
    o_row = (b_cell // W * 32 + o_t // SIDE * P).to(tl.int64) * s_y
    o_column = (b_cell % W * 32 + o_t % SIDE * P).to(tl.int64) * s_x
    o_channel = (o_x // (P * P)).to(tl.int64) * s_c
    o_inner = (o_x // P % P).to(tl.int64) * s_y + o_x % P * s_x
    return (o_row + o_column)[:, None] + (o_channel + o_inner)[None, :]


@triton.jit
def _patches(
    p_image, p_index, p_out, X, G, V, W, s_b, s_c, s_y, s_x, s_ib, s_iv,
    P: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = (32 // P) * (32 // P)
    i_b, i_m, i_x = unravel(tl.cdiv(V * T, BM), tl.cdiv(X, BX))
    o_m = i_m * BM + tl.arange(0, BM)
    o_x = i_x * BX + tl.arange(0, BX)
    m_m = o_m < V * T
    m_x = o_x < X
    b_cell = tl.load(p_index + i_b * s_ib + o_m // T * s_iv, mask=m_m, other=-1)
    m_ok = (b_cell >= 0) & (b_cell < G)
    p_pixels = p_image + i_b * s_b + pixels(b_cell, o_m % T, o_x, W, s_c, s_y, s_x, P)  # [BM, BX]
    b_x = tl.load(p_pixels, mask=m_ok[:, None] & m_x[None, :], other=float("nan"))
    o_out = (i_b * V * T + o_m) * X
    b_x = b_x.to(p_out.dtype.element_ty)
    tl.store(p_out + o_out[:, None] + o_x[None, :], b_x, mask=m_m[:, None] & m_x[None, :])


def _launch_patches(image: Tensor, index: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = image.shape
    cells, inputs = index.shape[1], channels * patch**2
    tokens = cells * (CELL // patch) ** 2
    out = torch.empty((batch, tokens, inputs), dtype=dtype, device=image.device)
    bm, bx = tile(inputs, max(image.element_size(), out.element_size()))
    with launch.on_device(image):
        _patches[(batch * ceil_div(tokens, bm) * ceil_div(inputs, bx),)](
            image, index, out, inputs, height // CELL * (width // CELL), cells, width // CELL, *image.stride(),
            *index.stride(), P=patch, BM=bm, BX=bx, num_warps=4,
        )  # fmt: skip
    return out


def gather_cells(x: Tensor, index: Tensor) -> Tensor:
    """Cells ``index`` (B, V) of pictures (B, C, H, W) -> (B, V, C, 32, 32)."""
    return gather_patches(x, index, CELL, x.dtype).unflatten(2, (x.shape[1], CELL, CELL))


@torch.library.custom_op("sgmim_fast::gather_patches", mutates_args=())
def gather_patches(image: Tensor, index: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Patches of the cells ``index`` (B, V) of pictures (B, C, H, W), cast to ``dtype``: (B, V * T, X)."""
    return _launch_patches(image, index, patch, dtype)


@gather_patches.register_fake
def _(image: Tensor, index: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    tokens = index.shape[1] * (CELL // patch) ** 2
    return image.new_empty(image.shape[0], tokens, image.shape[1] * patch**2, dtype=dtype)
