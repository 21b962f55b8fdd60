"""Floating-point operations that the method asks for, whichever way they are carried out."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sgmim_fast.config import Backend, ModelConfig
from sgmim_fast.masking import masked_cell_count
from sgmim_fast.models.sgmim import SGMIM


@cache
def training_flops_per_image(model: ModelConfig, backend: Backend = "torch", mask_ratio: float = 0.6) -> int:
    """Model FLOPs of one image's forward and backward pass, 2 for each multiply-add.

    Counted by PyTorch's counter on tensors without memory, so exact, and the same for every precision, attention and
    batch: it is what one more image adds to a batch. Takes about a second for a base model, once a process.

    Counted are matrix products and convolutions, those of both gradients included. Not counted are element-wise work,
    norms, softmax and reductions; the optimizer; what activation checkpointing computes again; and what a step
    computes once whatever its batch: the hidden cells' token, Swin V2's position MLP.

    Args:
        model: the model.
        backend: ``"reference"`` counts the plain path, every other one the gathered path, which all of them share.
        mask_ratio: share of the cells that is masked.

    Raises:
        UserError: if the ratio masks none or all of the model's cells.
    """
    with torch.device("meta"):
        twin = SGMIM(model, "reference" if backend == "reference" else "torch")
    return _flops(twin, 2, mask_ratio) - _flops(twin, 1, mask_ratio)


def task_flops_per_image(task: nn.Module, batch_of: Callable[[int], Mapping[str, Tensor]]) -> int:
    """The same of a task on tensors without memory.

    Args:
        task: on meta; ``task(batch).loss``.
        batch_of: a batch of so many images, on meta.
    """

    def flops(images: int) -> int:
        with FlopCounterMode(display=False) as counter:
            task(batch_of(images)).loss.backward()
        return int(counter.get_total_flops())

    return flops(3) - flops(2)  # a single image would leave batch norms of pooled maps without a variance


def _flops(twin: SGMIM, batch: int, mask_ratio: float) -> int:
    config = twin.config
    cells = config.grid[0] * config.grid[1]
    masked = masked_cell_count(cells, mask_ratio)
    with torch.device("meta"):
        image = torch.empty(batch, 3, *config.hw)
        structure = torch.empty(batch, config.structure_channels, *config.hw)
        mask = torch.empty(batch, *config.grid, dtype=torch.bool)
        shown = [torch.empty(batch, count, dtype=torch.int32) for count in (masked, cells - masked)]
    with FlopCounterMode(display=False) as counter:
        twin(image, structure, mask, *shown).loss.backward()
    return int(counter.get_total_flops())
