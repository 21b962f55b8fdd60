"""Cell masks and their index lists, made on the host together with the batch.

A cell is a square of 32 x 32 pixels. Masks are functions of (seed, epoch, dataset index), so any
number of ranks or workers draws the same ones, and a resumed run continues with them. The index
lists travel with the batch so that no ``nonzero`` has to wait for the device.
"""

import math

import numpy as np
import torch

from sgmim_fast.errors import UserError

CELL = 32  # pixels; SimMIM's mask patch size, and the largest encoder stride

# Separate streams for one sample's decisions: drawing more numbers for one never shifts another.
STREAM_CROP = 0
STREAM_MASK = 1
STREAM_ORDER = 2  # of an epoch as a whole, drawn as if about sample 0
STREAM_SUBSTITUTE = 3
STREAM_COLOR = 4
STREAM_CUTDEPTH = 5


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """The random generator of one decision (``STREAM_*``) about one sample in one epoch."""
    return np.random.default_rng((seed, epoch, index, stream))


def masked_cell_count(cells: int, ratio: float) -> int:
    """How many of ``cells`` cells are masked: ``ceil(ratio * cells)``, the same for every sample.

    Raises:
        UserError: if no cell or every cell would be masked; both losses need at least one.
    """
    if not 0.0 < ratio < 1.0:
        raise UserError(f"mask_ratio {ratio} must lie strictly between 0 and 1 (the method uses 0.6)")
    count = math.ceil(ratio * cells)
    if count >= cells:
        raise UserError(
            f"mask_ratio {ratio} masks all {cells} cells of {CELL}x{CELL} pixels; lower it or use larger images"
        )
    return count


def draw_cell_mask(rng: np.random.Generator, grid: tuple[int, int], ratio: float) -> np.ndarray:
    """One sample's mask, (Gh, Gw) bool; True where the image is masked."""
    cells = grid[0] * grid[1]
    mask = np.zeros(cells, dtype=bool)
    mask[rng.permutation(cells)[: masked_cell_count(cells, ratio)]] = True
    return mask.reshape(grid)


def mask_indices(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cell indices of a mask batch: ``masked`` (B, K) and ``visible`` (B, G - K), int32, ascending.

    Args:
        mask: (B, Gh, Gw) bool. Reading the count waits for the device, so loaders call this on the host.

    Raises:
        UserError: if the samples mask different numbers of cells, or none, or all.
    """
    flat = mask.flatten(1)
    counts = flat.sum(1)
    count = int(counts[0])
    if bool((counts != count).any()):
        raise UserError(
            f"the samples of a batch mask different numbers of cells ({counts.unique().tolist()}); "
            'the gathered path needs equal numbers: redraw the masks, or use backend="reference"'
        )
    if not 0 < count < flat.shape[1]:
        raise UserError(f"a mask must hide some but not all of its {flat.shape[1]} cells; this one hides {count}")
    order = torch.argsort(~flat, dim=1, stable=True).to(torch.int32)
    return order[:, :count].contiguous(), order[:, count:].contiguous()
