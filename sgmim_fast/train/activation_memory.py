"""What a forward and a backward pass need beyond weights and gradients, measured on any device, "meta" included."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgmim_fast.config import PretrainConfig
from sgmim_fast.masking import masked_cell_count


def meta_batch(config: PretrainConfig) -> dict[str, Tensor]:
    """A micro-batch as a loader makes it, without memory."""
    model, size = config.model, config.train.batch_size
    cells = model.grid[0] * model.grid[1]
    masked = masked_cell_count(cells, config.data.mask_ratio)
    with torch.device("meta"):
        batch = {
            "image": torch.empty(size, 3, *model.hw),
            "mask": torch.empty(size, *model.grid, dtype=torch.bool),
            "masked": torch.empty(size, masked, dtype=torch.int32),
            "visible": torch.empty(size, cells - masked, dtype=torch.int32),
            "index": torch.empty(size, dtype=torch.int64),
        }
        if model.guidance != "none":
            batch["structure"] = torch.empty(size, model.structure_channels, *model.hw)
    return batch


def step_memory(task: nn.Module, batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes that ``task``'s forward pass keeps for the backward pass, and the most that both need at any time.

    Weights and the batch are not counted, nor are gradients of weights once they are whole: DeepSpeed takes each then.
    A view counts as the whole of what it looks at. What an operation needs inside itself does not show.
    """
    outside = {_address(x) for x in (*task.parameters(), *task.buffers(), *batch.values())}
    kept: dict[int, Any] = {}  # storages, so that none gives its address to another while they are counted

    def keep(tensor: Tensor) -> Tensor:
        if _address(tensor) not in outside:
            kept[_address(tensor)] = tensor.untyped_storage()
        return tensor

    def hand_over(parameter: Tensor) -> None:
        parameter.grad = None

    taken = [p.register_post_accumulate_grad_hook(hand_over) for p in task.parameters() if p.requires_grad]
    try:
        with _LiveBytes(outside) as live:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = task(batch).loss
            activations = sum(storage.nbytes() for storage in kept.values())
            kept.clear()
            loss.backward()
    finally:
        for hook in taken:
            hook.remove()
    return activations, live.peak


def _address(tensor: Tensor) -> int:
    """What tells storages apart, those without memory too."""
    return tensor.untyped_storage()._cdata


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as each is alive."""

    def __init__(self, outside: set[int]) -> None:
        super().__init__()
        self.outside, self.alive = outside, set[int]()
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if address in self.outside or address in self.alive:
            return
        size = storage.nbytes()
        self.alive.add(address)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.bytes -= size
