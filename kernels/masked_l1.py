"""Mean absolute error over selected cells of a picture, whose pixels are read where they lie.

A cell is 32 x 32 pixels. Its prediction is t x t rows of C * s * s values, t * s = 32, ordered (C, row, column) as
pixel shuffle has them. A program takes runs of RUN neighbouring values; s at a time they are neighbouring pixels too,
so both sides are read in wide vectors. A cell index out of range shows as NaN.

Shape letters: B batch, K cells of a sample, C channels, H W rows and columns of the picture.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import launch

CELL = 32  # pixels
RUN = 1024  # divides the C * 32 * 32 values of a cell; 8 a thread, that is 16 bytes of 16-bit values


@triton.jit
def _cell(p_prediction, s_prediction, p_picture, s_picture, p_index, s_index, i_cell, K, columns, cells):
    """Where a cell's predictions and pixels begin, and whether it is one of the picture's."""
    i_b, i_k = (i_cell // K).to(tl.int64), (i_cell % K).to(tl.int64)
    cell = tl.load(p_index + i_b * s_index[0] + i_k * s_index[1])
    inside = (cell >= 0) & (cell < cells)
    cell = tl.where(inside, cell, 0).to(tl.int64)
    p_prediction += i_b * s_prediction[0] + i_k * s_prediction[1]
    p_picture += i_b * s_picture[0] + cell // columns * 32 * s_picture[2] + cell % columns * 32 * s_picture[3]
    return p_prediction, p_picture, inside


@triton.jit
def _difference(
    p_prediction, s_prediction, p_picture, s_picture, o, C: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr
):
    """Predictions less pixels, [RUN], of values o of a cell."""
    T: tl.constexpr = 32 // S
    o_token, o_value = o // (C * S * S), o % (C * S * S)
    o_y, o_x = o_token // T, o_token % T
    b_prediction = tl.load(p_prediction + o_y * s_prediction[2] + o_x * s_prediction[3] + o_value * s_prediction[4])
    o_c, o_h, o_w = o // (S * S) % C, o_y * S + o // S % S, o_x * S + o % S
    b_pixel = tl.load(p_picture + o_c.to(tl.int64) * s_picture[1] + o_h * s_picture[2] + o_w * s_picture[3])
    return b_prediction.to(ACC) - b_pixel.to(ACC)


@triton.jit
def _forward(
    p_prediction, s_prediction, p_picture, s_picture, p_index, s_index, p_partials, K, columns, cells,
    C: tl.constexpr, S: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program's sum of absolute errors."""
    PARTS: tl.constexpr = C * 1024 // (RUN * RUNS)  # programs of a cell
    i_p = tl.program_id(0)
    p_prediction, p_picture, inside = _cell(
        p_prediction, s_prediction, p_picture, s_picture, p_index, s_index, i_p // PARTS, K, columns, cells
    )
    b_error = tl.zeros([RUN], ACC)
    for i in tl.static_range(RUNS):
        o = (i_p % PARTS * RUNS + i) * RUN + tl.arange(0, RUN)  # [RUN]
        b_error += tl.abs(_difference(p_prediction, s_prediction, p_picture, s_picture, o, C, S, ACC))
    tl.store(p_partials + i_p, tl.where(inside, tl.sum(b_error), float("nan")))


@triton.jit
def _mean(p_partials, p_loss, programs, count, C: tl.constexpr, BP: tl.constexpr):
    """Partial sums to the loss, by one program; in float64, which costs nothing here."""
    o_p = tl.arange(0, BP)
    b_sum = tl.zeros([BP], tl.float64)
    for start in range(0, programs, BP):
        b_sum += tl.load(p_partials + start + o_p, mask=start + o_p < programs, other=0.0).to(tl.float64)
    loss = tl.sum(b_sum) / (count.to(tl.float64) + 1e-5) / C
    tl.store(p_loss, loss.to(p_loss.dtype.element_ty))


@triton.jit
def _backward(
    p_upstream, p_prediction, s_prediction, p_picture, s_picture, p_index, s_index, p_gradient, K, columns, cells,
    count, C: tl.constexpr, S: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sign of each difference, 0 where equal, times one scale."""
    PARTS: tl.constexpr = C * 1024 // (RUN * RUNS)
    i_p = tl.program_id(0)
    p_prediction, p_picture, inside = _cell(
        p_prediction, s_prediction, p_picture, s_picture, p_index, s_index, i_p // PARTS, K, columns, cells
    )
    scale = tl.load(p_upstream).to(ACC) / C / (count.to(ACC) + 1e-5)
    p_gradient += i_p.to(tl.int64) * (RUN * RUNS)
    for i in tl.static_range(RUNS):
        o = (i_p % PARTS * RUNS + i) * RUN + tl.arange(0, RUN)  # [RUN]
        b_difference = _difference(p_prediction, s_prediction, p_picture, s_picture, o, C, S, ACC)
        b_gradient = tl.where(b_difference > 0, scale, tl.where(b_difference < 0, -scale, 0.0))
        b_gradient = tl.where(inside, b_gradient, float("nan"))
        tl.store(p_gradient + i * RUN + tl.arange(0, RUN), b_gradient.to(p_gradient.dtype.element_ty))


def runs_of_a_program(channels: int) -> int:
    """Up to four runs, all of one cell: their loads are under way at once."""
    return next(runs for runs in (4, 3, 2, 1) if channels % runs == 0)


def partials_block(programs: int) -> int:
    """Partial sums that are read at once."""
    return min(launch.block(programs, 128), 8192)


def _arguments(prediction: Tensor, picture: Tensor, index: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of programs, and what both passes are launched with."""
    batch, cells, side = prediction.shape[:3]
    channels, height, width = picture.shape[1:]
    runs = runs_of_a_program(channels)
    arguments = {
        "p_prediction": prediction, "s_prediction": prediction.stride(),
        "p_picture": picture, "s_picture": picture.stride(),
        "p_index": index, "s_index": index.stride(),
        "K": cells, "columns": width // CELL, "cells": height // CELL * (width // CELL),
        "C": channels, "S": CELL // side, "RUN": RUN, "RUNS": runs,
        "ACC": tl.float64 if torch.float64 in (prediction.dtype, picture.dtype) else tl.float32,
        "num_warps": 4,
    }  # fmt: skip
    return batch * cells * channels * CELL**2 // (RUN * runs), arguments


def _launch_forward(prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    programs, arguments = _arguments(prediction, picture, index)
    exact = torch.float64 if arguments["ACC"] == tl.float64 else torch.float32
    partials = torch.empty(programs, dtype=exact, device=picture.device)
    loss = torch.empty((), dtype=picture.dtype, device=picture.device)
    count, block = prediction.shape[0] * prediction.shape[1] * CELL**2, partials_block(programs)
    with launch.on_device(picture):
        _forward[(programs,)](p_partials=partials, **arguments)
        _mean[(1,)](partials, loss, programs, count, C=picture.shape[1], BP=block, num_warps=max(1, block // 256))
    return loss


def _launch_backward(upstream: Tensor, prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    programs, arguments = _arguments(prediction, picture, index)
    gradient = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    count = prediction.shape[0] * prediction.shape[1] * CELL**2
    with launch.on_device(picture):
        _backward[(programs,)](p_upstream=upstream, p_gradient=gradient, count=count, **arguments)
    return gradient


@torch.library.custom_op("sgmim_fast::masked_l1", mutates_args=())
def masked_l1(prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    """Mean absolute error of predictions (B, K, t, t, C * s * s) of cells ``index`` (B, K) of pictures (B, C, H, W).

    A scalar of the picture's dtype. Gradients reach the prediction only.
    """
    return _launch_forward(prediction, picture, index)


@masked_l1.register_fake
def _(prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    return picture.new_empty(())


@torch.library.custom_op("sgmim_fast::masked_l1_backward", mutates_args=())
def masked_l1_backward(upstream: Tensor, prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    """Gradient of the prediction for the gradient ``upstream`` () of the loss."""
    return _launch_backward(upstream, prediction, picture, index)


@masked_l1_backward.register_fake
def _(upstream: Tensor, prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
    wanted = ctx.needs_input_grad[0]
    return masked_l1_backward(upstream, *ctx.saved_tensors) if wanted else None, None, None


masked_l1.register_autograd(_gradients, setup_context=_keep)
