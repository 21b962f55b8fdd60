"""Tables of relative positions, made for another window or map than they were trained for.

A table of shape ((2 H - 1) (2 W - 1) + k, heads) has a row for every offset between two tokens of H x W, row by row
from -(H - 1), -(W - 1) upward, and k rows more (three in a ViT, for its class token), which are kept as they are.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resampling = Literal["bicubic", "geometric"]
"""``"bicubic"``: the offsets stretched evenly, as official Swin's fine-tuning does. ``"geometric"``: near offsets stay
near, far ones are spread in a geometric series, as BEiT's and SimMIM's fine-tuning does."""

_SERIES = (1.01, 1.5)  # ratios of the geometric series, as BEiT's code has them
_SERIES_TOLERANCE = 1e-6


def square_side(rows: int) -> int | None:
    """The side H of the square window whose offsets fill so many rows, (2 H - 1) ** 2; None if no window does."""
    side = math.isqrt(max(rows, 0))
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def resize_table(
    table: Tensor, source: tuple[int, int], target: tuple[int, int], how: Resampling = "bicubic"
) -> Tensor:
    """The table for a window or map of ``target`` (height, width) tokens of one for ``source``; itself if those agree.

    In the table's dtype, and differentiable.

    Args:
        table: ((2 H - 1) (2 W - 1) + k, heads), a float tensor.
        source: (H, W).
        target: likewise.
        how: see ``Resampling``. Bicubic is calculated in the table's dtype, at least float32, as the official code
            does; geometric in float64, by the interpolating cubic spline (not-a-knot) of BEiT's code.
    """
    if source == target:
        return table
    height, width = 2 * source[0] - 1, 2 * source[1] - 1
    grid = table[: height * width].transpose(0, 1).reshape(-1, height, width)  # (heads, 2 H - 1, 2 W - 1)
    if how == "bicubic":
        size = (2 * target[0] - 1, 2 * target[1] - 1)
        wide = grid if grid.dtype == torch.float64 else grid.float()
        grid = F.interpolate(wide.unsqueeze(0), size=size, mode="bicubic").squeeze(0)
    else:
        rows, columns = (_geometric(a, b).to(grid.device) for a, b in zip(source, target, strict=True))
        grid = rows @ grid.double() @ columns.transpose(0, 1)
    return torch.cat((grid.flatten(1).transpose(0, 1).to(table.dtype), table[height * width :]))


def _geometric(source: int, target: int) -> Tensor:
    """(2 target - 1, 2 source - 1): from values at the spread offsets of ``source`` to those of ``target``."""
    spread = [0.0]
    ratio = _series_ratio(source - 1, target - 1)
    for step in range(source - 1):
        spread.append(spread[-1] + ratio**step)
    places = torch.tensor([-place for place in spread[:0:-1]] + spread, dtype=torch.float64)
    wanted = torch.arange(1 - target, target, dtype=torch.float64)
    return _spline(places, wanted.clamp(places[0].item(), places[-1].item()))


def _series_ratio(terms: int, total: int) -> float:
    """The ratio of the geometric series 1 + q + q**2 + ... whose first ``terms`` sum up to ``total``, by bisection."""
    low, high = _SERIES
    middle = high
    while high - low > _SERIES_TOLERANCE:
        middle = (low + high) / 2
        if (1 - middle**terms) / (1 - middle) > total:
            high = middle
        else:
            low = middle
    return middle


def _spline(places: Tensor, wanted: Tensor) -> Tensor:
    """(wanted, places): values of the interpolating spline. Cubic and not-a-knot; of fewer than four places, the
    polynomial through all of them."""
    degree = min(3, len(places) - 1)
    inner = places[2:-2] if degree == 3 else places[:0]
    knots = torch.cat((places[:1].expand(degree + 1), inner, places[-1:].expand(degree + 1)))
    at_places, at_wanted = _basis(knots, degree, places), _basis(knots, degree, wanted)
    return torch.linalg.solve(at_places, at_wanted, left=False)


def _basis(knots: Tensor, degree: int, at: Tensor) -> Tensor:
    """(points, splines): B-splines over ``knots`` at points within them, by the recursion of Cox and de Boor."""
    last = len(knots) - degree - 2  # the interval that holds the upper end
    interval = torch.searchsorted(knots, at, right=True).sub(1).clamp(max=last)
    values = F.one_hot(interval, len(knots) - 1).double()
    for order in range(1, degree + 1):
        count = len(knots) - 1 - order
        rise, fall = knots[order : order + count] - knots[:count], knots[order + 1 :] - knots[1 : count + 1]
        # An empty interval has no share in a spline.
        left = torch.where(rise > 0, (at[:, None] - knots[:count]) / rise, 0.0)
        right = torch.where(fall > 0, (knots[order + 1 :] - at[:, None]) / fall, 0.0)
        values = left * values[:, :-1] + right * values[:, 1:]
    return values
