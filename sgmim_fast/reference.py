"""Every operation in plain PyTorch: the truth that faster implementations are measured against.

The first half holds the operations that kernels will replace, the second half the plain path of the
method (dense tokens, pixel shuffle, upsampled masks). See ``docs/method.md`` for the formulas.

Shape letters: B batch, C channels, H W rows and columns of a map, G mask cells (Gh x Gw), K masked cells,
N rows, L encoder tokens, T heads, D head size, S image side, s pixels of a token's side.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast.masking import CELL

KEPT = 64  # constant tensors of each kind
KEPT_BYTES = 2**28  # of each kind: images may come in many sizes
Made = TypeVar("Made", bound=Callable[..., Tensor])


def _kept(make: Made) -> Made:
    """Keep the tensors that ``make`` returns, by its arguments.

    A compiler does not see this: it traces what ``make`` computes. Tensors of a trace, and of inference mode, would
    be of no use to later callers and are not kept.
    """
    kept: dict[tuple[object, ...], Tensor] = {}

    @wraps(make)
    def get(*key: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*key)
        if key not in kept:
            with torch.inference_mode(False):
                made = make(*key)
            if type(made) is not Tensor:
                return made
            kept[key] = made
            while len(kept) > KEPT or sum(tensor.nbytes for tensor in kept.values()) > KEPT_BYTES:
                kept.pop(next(iter(kept)))
            return made
        return kept[key]

    return cast(Made, get)


# ---------------------------------------------------------------------------------------------
# Rows and cells


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, N, C) -> (B, K, C)."""
    return x.gather(1, index.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def scatter_rows(values: Tensor, index: Tensor, fill: Tensor, rows: int) -> Tensor:
    """The inverse of ``gather_rows``: (B, K, C) -> (B, rows, C); rows that no index names hold ``fill`` (C,)."""
    batch, _, channels = values.shape
    base = fill.to(values.dtype).expand(batch, rows, channels)
    return base.scatter(1, index.long().unsqueeze(-1).expand_as(values), values)


def gather_cells(x: Tensor, index: Tensor) -> Tensor:
    """Cells ``index`` (B, K) of pictures (B, C, H, W) -> (B, K, C, 32, 32)."""
    batch, channels, height, width = x.shape
    cells = x.reshape(batch, channels, height // CELL, CELL, width // CELL, CELL).permute(0, 2, 4, 1, 3, 5)
    index = index.long()
    columns = width // CELL
    return cells[torch.arange(batch, device=x.device).unsqueeze(1), index // columns, index % columns]


def embed_visible(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    mask_token: Tensor,
) -> Tensor:
    """Patch embedding of the visible cells alone; every other token is the mask token.

    Args:
        image: (B, C, H, W), cast to the dtype of the weights.
        visible: (B, V) cell indices.
        weight, bias: (E, C, p, p) and (E,) of the convolution, p dividing 32.
        norm_weight, norm_bias: (E,) of the LayerNorm after it; None for none.
        norm_eps: its epsilon.
        mask_token: (E,).

    Returns:
        (B, H / p, W / p, E).
    """
    patch = weight.shape[-1]
    rows, columns, side = image.shape[2] // CELL, image.shape[3] // CELL, CELL // patch
    cells = gather_cells(image, visible).flatten(0, 1).to(weight.dtype)
    x = F.conv2d(cells, weight, bias, stride=patch).permute(0, 2, 3, 1)
    if norm_weight is not None:
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, norm_eps)
    x = scatter_rows(x.reshape(*visible.shape, -1), visible, mask_token.repeat(side**2), rows * columns)
    x = x.reshape(image.shape[0], rows, columns, side, side, -1).transpose(2, 3)
    return x.reshape(image.shape[0], rows * side, columns * side, -1)


# ---------------------------------------------------------------------------------------------
# Attention


@_kept
def relative_position_index(height: int, width: int, class_token: bool, device: torch.device) -> Tensor:
    """Row of the bias table for each (query, key) pair of a window, (N, N) int64.

    With a class token it is token 0, and the table's last three rows serve class-to-token,
    token-to-class and class-to-class (BEiT's layout).
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    down = rows[:, None] - rows[None, :] + height - 1
    right = columns[:, None] - columns[None, :] + width - 1
    index = down * (2 * width - 1) + right
    if not class_token:
        return index
    distances = (2 * height - 1) * (2 * width - 1)
    index = F.pad(index, (1, 0, 1, 0))
    index[0, :] = distances
    index[:, 0] = distances + 1
    index[0, 0] = distances + 2
    return index


def table_bias(table: Tensor, height: int, width: int, class_token: bool = False) -> Tensor:
    """Bias of every (query, key) pair: table (distances, T) -> (T, N, N)."""
    index = relative_position_index(height, width, class_token, table.device)
    return table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)


def _windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, ...) -> (B, windows, window * window, ...)."""
    batch, height, width = x.shape[:3]
    tail = x.shape[3:]
    x = x.reshape(batch, height // window, window, width // window, window, *tail)
    return x.transpose(2, 3).reshape(batch, -1, window * window, *tail)


@_kept
def shifted_region_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """-100 between tokens that the cyclic shift brought into one window from different regions.

    Returns (windows, N, N) float32.
    """

    def regions(side: int) -> Tensor:
        position = torch.arange(side, device=device)
        return (position >= side - window).long() + (position >= side - shift).long()

    region = regions(height)[:, None] * 3 + regions(width)[None, :]
    region = _windows(region[None, :, :, None], window)[0, :, :, 0]
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)


def window_attention(qkv: Tensor, table: Tensor, window: int, shift: int, logit_scale: Tensor | None = None) -> Tensor:
    """Multi-head attention inside (shifted) windows of a token map.

    Args:
        qkv: (B, H, W, 3, T, D) in image order; the window divides H and W.
        table: ((2 * window - 1) ** 2, T) additive bias by relative position.
        window: tokens a window side.
        shift: cyclic shift towards the origin, 0 for none.
        logit_scale: (T,) for Swin V2's cosine attention (already clamped and exponentiated);
            None for scaled dot products.

    Returns:
        (B, H, W, T * D) in image order. Source: Swin (arXiv 2103.14030), Swin V2 (2111.09883).
    """
    batch, height, width, _, heads, size = qkv.shape
    if shift:
        qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
    q, k, v = _windows(qkv, window).permute(3, 0, 1, 4, 2, 5).unbind(0)  # each (B, windows, T, N, D)
    if logit_scale is None:
        logits = (q * size**-0.5) @ k.transpose(-2, -1)
    else:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * logit_scale[:, None, None]
    logits = logits + table_bias(table, window, window)
    if shift:
        mask = shifted_region_mask(height, width, window, shift, qkv.device)
        logits = logits + mask[:, None].to(logits.dtype)
    out = (logits.softmax(-1) @ v).transpose(2, 3)  # (B, windows, N, T, D)
    out = out.reshape(batch, height // window, width // window, window, window, heads * size)
    out = out.transpose(2, 3).reshape(batch, height, width, heads * size)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


def class_token_attention(qkv: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Global attention of a class token and a token map with a relative position bias.

    Args:
        qkv: (B, 1 + H * W, 3, T, D).
        table: ((2 H - 1) (2 W - 1) + 3, T).
        grid: (H, W).

    Returns:
        (B, 1 + H * W, T * D).
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + table_bias(table, *grid, class_token=True)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def guidance_attention(
    q: Tensor, k: Tensor, v: Tensor, null_k: Tensor | None = None, null_v: Tensor | None = None, count: int = 0
) -> Tensor:
    """Cross-attention to gathered context tokens plus one null token that stands for ``count`` equal ones.

    Args:
        q: (B, Nq, T, D).
        k, v: (B, Nk, T, D).
        null_k, null_v: (T, D); ``count`` equal keys are one key whose logit has log(count) added.
        count: how many context tokens the null token stands for; 0 drops it.

    Returns:
        (B, Nq, T * D).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q = q * q.shape[-1] ** -0.5
    logits = q @ k.transpose(-2, -1)  # (B, T, Nq, Nk)
    if count == 0 or null_k is None or null_v is None:
        out = logits.softmax(-1) @ v
    else:
        null_logit = q @ null_k[:, :, None] + math.log(count)
        weight = torch.cat((logits, null_logit), -1).softmax(-1)
        out = weight[..., :-1] @ v + weight[..., -1:] * null_v[:, None, :]
    return out.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------
# Losses and statistics


def masked_l1(prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    """Mean absolute error over the pixels of the selected cells, in token space.

    Args:
        prediction: (B, K, t, t, C * s * s), t * s = 32, channels ordered (C, row, column) as pixel shuffle has them.
        picture: (B, C, H, W) targets.
        index: (B, K) cell indices.
    """
    batch, cells, side = prediction.shape[:3]
    channels, size = picture.shape[1], CELL // side
    target = gather_cells(picture, index).reshape(batch, cells, channels, side, size, side, size)
    target = target.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    error = (prediction.to(target.dtype) - target).abs().sum()
    return error / (batch * cells * CELL**2 + 1e-5) / channels


def _trim(count: int) -> tuple[int, int]:
    return int(0.1 * count), int(0.9 * count)


def _nan_if_odd(values: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    whole = values.isfinite().all(1)
    return torch.where(whole, mean, torch.nan), torch.where(whole, variance, torch.nan)


def trimmed_stats(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each row between its 10 % and 90 % order statistics, by sorting.

    A row that holds a NaN or an infinity gets NaN for both, so that one among the values that are left out shows, too.

    Args:
        values: (R, n).

    Returns:
        Two tensors (R,).
    """
    start, stop = _trim(values.shape[1])
    kept = values.sort(1).values[:, start:stop]
    return _nan_if_odd(values, kept.mean(1), kept.var(1))


def trimmed_stats_by_selection(values: Tensor) -> tuple[Tensor, Tensor]:
    """``trimmed_stats`` without the sort: two order statistics bound the kept values, and ties are counted.

    Of the values equal to a bound only as many are kept as the sort would keep. A NaN or an infinity shows likewise.
    """
    start, stop = _trim(values.shape[1])
    low = values.kthvalue(start + 1, dim=1, keepdim=True).values
    high = values.kthvalue(stop, dim=1, keepdim=True).values
    inside = (values > low) & (values < high)
    kept = stop - start
    kept_low = (values <= low).sum(1, keepdim=True).clamp(max=stop) - start
    kept_high = (kept - kept_low - inside.sum(1, keepdim=True)).to(values.dtype)
    kept_low = kept_low.to(values.dtype)

    def total(x: Tensor, x_low: Tensor, x_high: Tensor) -> Tensor:
        return torch.where(inside, x, 0).sum(1, keepdim=True) + kept_low * x_low + kept_high * x_high

    mean = total(values, low, high) / kept
    square = total((values - mean) ** 2, (low - mean) ** 2, (high - mean) ** 2)
    return _nan_if_odd(values, mean.squeeze(1), (square / (kept - 1)).squeeze(1))


def standardize(maps: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``(d - mean) / sqrt(var + 1e-6)`` of maps (B, C, H, W) with statistics (B * C,)."""
    shape = (*maps.shape[:2], 1, 1)
    return (maps - mean.view(shape)) / (variance.view(shape) + 1e-6).sqrt()


def local_statistics(picture: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the window around each pixel of (B, C, H, W); padding is not counted.

    The variance is unbiased and at least 0; the deviation is sqrt(variance + 1e-6).
    """

    def pool(x: Tensor, padded: bool = False) -> Tensor:
        # Columns, then rows: as many additions a pixel as the window has pixels a side, twice.
        for sides, padding in (((window, 1), (window // 2, 0)), ((1, window), (0, window // 2))):
            x = F.avg_pool2d(x, sides, stride=1, padding=padding, count_include_pad=padded)
        return x

    mean = pool(picture)
    count = pool(torch.ones_like(picture[:1, :1]), padded=True) * window**2
    variance = (pool(picture**2) - mean**2) * (count / (count - 1))
    return mean, (variance.clamp(min=0) + 1e-6).sqrt()


def local_normalize(picture: Tensor, window: int) -> Tensor:
    """Each pixel less its window's mean, over the deviation. Source: SimMIM's target for Swin V2 (window 47)."""
    mean, deviation = local_statistics(picture, window)
    return (picture - mean) / deviation


# ---------------------------------------------------------------------------------------------
# The plain path


def upsample_mask(mask: Tensor, factor: int) -> Tensor:
    """Cell mask (B, Gh, Gw) -> (B, Gh * factor, Gw * factor), same dtype."""
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def pixel_l1(prediction: Tensor, picture: Tensor, selected: Tensor) -> Tensor:
    """Mean absolute error of (B, C, H, W) pictures where the cell mask ``selected`` (B, Gh, Gw) is True."""
    weight = upsample_mask(selected, CELL).unsqueeze(1).to(picture.dtype)
    error = (weight * (picture - prediction.to(picture.dtype)).abs()).sum()
    return error / (weight.sum() + 1e-5) / picture.shape[1]
