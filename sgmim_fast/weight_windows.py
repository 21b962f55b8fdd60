"""Windows that a file's Swin or Swin V2 was trained with, as far as its tables tell."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sgmim_fast.position_tables import square_side
from sgmim_fast.weight_files import read_tensors
from sgmim_fast.weight_layouts import read_names

_TABLE = re.compile(r"^encoder\.layers\.(\d+)\.blocks\.0\.attn\.relative_position_bias_table$")
_COORDINATES = re.compile(r"\blayers\.(\d+)\.blocks\.0\.attn\.relative_coords_table$")


def read_windows(source: str | Path | Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Tokens a window side and those that offsets are measured by, both stage by stage; None where nothing tells.

    Swin's position tables have a row for every offset. Swin V2 has none, but official checkpoints keep its coordinates.

    Args:
        source: what ``load_weights`` reads.

    Raises:
        UserError: if it cannot be read.
    """
    _, tensors = read_tensors(source)
    reading = read_names(tensors)
    if reading is None:
        return None
    found: dict[int, tuple[int, int] | None] = {}
    for name, keys in reading.held.items():
        if match := _TABLE.match(name):
            side = square_side(len(tensors[keys[0]]))
            found[int(match[1])] = None if side is None else (side, side)
    for key, tensor in tensors.items():
        if match := _COORDINATES.search(key):
            found[int(match[1])] = _measured(tensor)
    stages = [found.get(stage) for stage in range(len(found))]
    told = [stage for stage in stages if stage is not None]
    if not told or len(told) < len(stages):
        return None
    windows, measures = zip(*told, strict=True)
    return windows, measures


def _measured(coordinates: Tensor) -> tuple[int, int] | None:
    """Window, and the one that offsets are measured by, of (1, 2 W - 1, 2 W - 1, 2) log-spaced coordinates.

    The largest is log2(8 (W - 1) / (P - 1) + 1) / log2(8) for offsets measured by windows of P.
    """
    if coordinates.dim() != 4 or coordinates.shape[1] % 2 == 0:
        return None
    window = (coordinates.shape[1] + 1) // 2
    if window == 1:
        return 1, 1
    largest = float(coordinates.double().max())
    if not 0 < largest < math.inf:
        return None
    return window, 1 + round(8 * (window - 1) / (8**largest - 1))
