"""What a training step must compute and move, counted on tensors without memory: no GPU, and no time, is involved.

    python -m benchmarks.arithmetic --models sgmim_swin_base --batch 128

Every operation that PyTorch starts is seen with the module it is of, in the backward pass as well. Its operands and
results count once each, whatever a cache may save; views move nothing. An operation of the kernels counts as one, and
its products are not counted. Rows go to ``benchmarks/results/arithmetic.jsonl``.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import harness
from benchmarks.harness import Rows
from benchmarks.step_profile import ATTENTION, ENCODER, GUIDANCE, HEADS, NORMS, PRODUCTS, REST, part_of_module
from sgmim_fast.config import ModelConfig
from sgmim_fast.errors import one_line_errors
from sgmim_fast.masking import masked_cell_count
from sgmim_fast.models.registry import create_model
from sgmim_fast.recipes import MODELS

RESULTS = harness.RESULTS / "arithmetic.jsonl"
RATIO = 0.6
NAMED = ("sgmim_swin_base", "sgmim_swinv2_base", "sgmim_vit_base", "sgmim_swin_large")
PARTS = (PRODUCTS, ATTENTION, NORMS, ENCODER, GUIDANCE, HEADS, REST)
PRODUCTS_OF = ("aten::mm", "aten::addmm", "aten::convolution", "aten::convolution_backward")
BACKENDS = ("reference", "torch", "triton")


@dataclass
class Amount:
    """Of one part of a step."""

    flops: int = 0
    bytes: int = 0
    operations: int = 0


@dataclass
class Count:
    """Of a step."""

    parts: dict[str, Amount] = field(default_factory=lambda: {part: Amount() for part in PARTS})


class Watch(TorchDispatchMode):
    """Counts operations into the part of the module that is at work; in the backward pass, that made the node at work.

    Args:
        model: its modules' forward passes are told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count, self.places, self.makers = Count(), [REST], dict[int, str]()
        for name, module in model.named_modules():
            if part := part_of_module(name):
                module.register_forward_pre_hook(partial(self._enter, part))
                module.register_forward_hook(self._leave)

    def _enter(self, part: str, *_: Any) -> None:
        self.places.append(part)

    def _leave(self, *_: Any) -> None:
        self.places.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        place = self._place()
        before, after = tensors((args, kwargs)), tensors(out)
        if not after or func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            return out
        owners = {x.untyped_storage()._cdata for x in before}
        if not func._schema.is_mutable and all(x.untyped_storage()._cdata in owners for x in after):
            return out  # views of what is there
        node = torch._C._current_autograd_node()
        amount = self.count.parts[part_of(func._schema.name, place, "" if node is None else node.name())]
        amount.operations += 1
        amount.bytes += sum(map(moved, before)) + sum(map(moved, after))
        packet = getattr(func, "overloadpacket", None)
        if packet in flop_registry:
            amount.flops += int(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        return out

    def _place(self) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:
            return self.makers.get(node._sequence_nr(), REST)
        # A node is made, and numbered, before the operation that it is of gets here; some make none.
        self.makers.setdefault(torch._C._autograd._get_sequence_nr() - 1, self.places[-1])
        return self.places[-1]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def moved(x: Tensor) -> int:
    """Bytes of a tensor's numbers; those of one that is expanded are there once."""
    numbers = math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return numbers * x.element_size()


def part_of(operation: str, place: str, node: str) -> str:
    """As ``benchmarks.step_profile`` tells the parts of eager steps apart: gradients of biases are of the products."""
    if place in (GUIDANCE, HEADS, REST):
        return place
    if "layer_norm" in operation:
        return NORMS
    if operation in PRODUCTS_OF or node.startswith(("AddmmBackward", "MmBackward", "ConvolutionBackward")):
        return PRODUCTS
    return place


def count_step(config: ModelConfig, batch: int, backend: str, dtype: torch.dtype = torch.bfloat16) -> Count:
    """Forward and backward of ``batch`` pairs; the optimizer is not among it."""
    with torch.device("meta"):
        model = create_model(config, backend=backend).to(dtype)  # type: ignore[arg-type]
        cells = config.grid[0] * config.grid[1]
        masked = masked_cell_count(cells, RATIO)
        image = torch.empty(batch, 3, *config.hw)
        structure = torch.empty(batch, config.structure_channels, *config.hw)
        mask = torch.empty(batch, *config.grid, dtype=torch.bool)
        shown = [torch.empty(batch, count, dtype=torch.int32) for count in (masked, cells - masked)]
    with Watch(model) as watch:
        model(image, structure, mask, *shown).loss.backward()
    return watch.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=NAMED, metavar="NAME")
    parser.add_argument("--batch", type=int, default=128, help="pairs a step")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    options = parser.parse_args()
    with one_line_errors():
        rows = Rows(options.output, torch.device("cpu"))
        for model in options.models:
            for backend in BACKENDS:
                parts = count_step(MODELS[model], options.batch, backend).parts
                print(f"{model}, batch {options.batch}, bf16, {backend}")
                for part, amount in parts.items():
                    print(
                        f"  {part:16} {amount.flops / 1e12:8.2f} TFLOP {amount.bytes / 1e9:8.2f} GB "
                        f"{amount.operations:6} operations"
                    )
                head = {"benchmark": "arithmetic", "model": model, "batch": options.batch, "precision": "bf16"}
                rows.append(head | {"backend": backend, "parts": {part: asdict(one) for part, one in parts.items()}})


if __name__ == "__main__":
    main()
