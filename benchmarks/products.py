"""The matrix products of a training step, by shape: found without computing one, then measured alone.

    python -m benchmarks.products --model sgmim_swin_base --batch 128

How fast a GPU multiplies matrices depends on their shapes. A square product of 8192 says what is possible at all; the
rate at the model's own shapes says how long a step must take whose products run one by one and which does nothing else.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from benchmarks.clocks import clock_of
from benchmarks.harness import Rows
from sgmim_fast.config import ModelConfig
from sgmim_fast.errors import UserError, one_line_errors
from sgmim_fast.masking import masked_cell_count
from sgmim_fast.models.registry import create_model
from sgmim_fast.recipes import MODELS, RECIPES

RESULTS = harness.RESULTS / "products.jsonl"
RATIO = 0.6
SMOKE_ROWS = 64


class Product(NamedTuple):
    """(m, k) @ (k, n), each as it lies in memory: by rows, or transposed by columns."""

    m: int
    k: int
    n: int
    a_transposed: bool
    b_transposed: bool

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


class Watch(TorchDispatchMode):
    """Counts the products of two matrices; those of batches of matrices are attention's, and not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm"):
            a, b = args[-2:]
            self.products[Product(a.shape[0], a.shape[1], b.shape[1], _transposed(a), _transposed(b))] += 1
        return func(*args, **(kwargs or {}))


def _transposed(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.stride(-2) == 1


def products_of(config: ModelConfig, batch: int) -> Counter[Product]:
    """Of forward and backward of ``batch`` pairs on the gathered path, and how often each."""
    with torch.device("meta"):
        model = create_model(config, backend="torch").to(torch.bfloat16)
        cells = config.grid[0] * config.grid[1]
        masked = masked_cell_count(cells, RATIO)
        image = torch.empty(batch, 3, *config.hw, dtype=torch.bfloat16)
        structure = torch.empty(batch, config.structure_channels, *config.hw, dtype=torch.bfloat16)
        mask = torch.empty(batch, *config.grid, dtype=torch.bool)
        shown = [torch.empty(batch, count, dtype=torch.int32) for count in (masked, cells - masked)]
    with Watch() as watch:
        model(image, structure, mask, *shown).loss.backward()
    return watch.products


def measure_products(
    config: ModelConfig, batch: int, device: torch.device, seconds: float = 0.1, smoke: bool = False
) -> tuple[float, list[tuple[Product, int, harness.Times]]]:
    """FLOP/s of all products of a step, one after the other; and the times of each, the largest share first.

    Args:
        seconds: to time each kind of product.
        smoke: measure each once, and with few rows.
    """
    found = []
    for product, count in products_of(config, batch).items():
        if smoke:
            product = product._replace(m=min(product.m, SMOKE_ROWS), k=min(product.k, SMOKE_ROWS))
        found.append((product, count, measure_one(product, device, 0.0 if smoke else seconds, 1 if smoke else 3)))
    found.sort(key=lambda one: -one[1] * one[2].p50)
    flops = sum(count * product.flops for product, count, _ in found)
    return flops / sum(count * times.p50 for _, count, times in found), found


def measure_one(product: Product, device: torch.device, seconds: float, fewest: int) -> harness.Times:
    m, k, n, a_transposed, b_transposed = product
    size = 2 * (m * k + k * n)
    pairs = []
    for _ in range(harness.input_sets(size, harness.l2_bytes(device)) if device.type == "cuda" else 1):
        a = torch.randn((k, m) if a_transposed else (m, k), device=device, dtype=torch.bfloat16)
        b = torch.randn((n, k) if b_transposed else (k, n), device=device, dtype=torch.bfloat16)
        pairs.append((a.t() if a_transposed else a, b.t() if b_transposed else b))
    call = lambda number: pairs[number][0] @ pairs[number][1]  # noqa: E731
    return harness.measure(call, len(pairs), seconds, clock_of(device), fewest, harness.evictor(size, device))


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        run(options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgmim_swin_base", help="a name of sgmim_fast.recipes.MODELS")
    parser.add_argument("--batch", type=int, default=128, help="pairs a step")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything; each product gets its share")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once each, on any device: does it work?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure every product of a model's step; a row for each, and one line for all."""
    if options.model not in MODELS:
        raise UserError(f"--model {options.model!r} is unknown; choose one of {', '.join(MODELS)}")
    device = harness.device(options.smoke)
    rows = Rows(options.output, device)
    ceilings = harness.measure_ceilings(device, clock_of(device), options.smoke)
    config = RECIPES["demo"]().model if options.smoke else MODELS[options.model]
    each = min(0.1, options.seconds / 4 / len(products_of(config, options.batch)))
    rate, found = measure_products(config, options.batch, device, each, options.smoke)
    head = {"benchmark": "products", "model": options.model, "batch": options.batch, "smoke": options.smoke}
    for product, count, times in found:
        own = product.flops / times.p50
        row = {**product._asdict(), "count": count, **times.row(), "flops": product.flops, "flops_per_second": own}
        rows.append(head | row | {"share_of_matrix": own / ceilings.matrix, "ceilings": ceilings.row()})
    print(
        f"{options.model}, batch {options.batch}: {len(found)} kinds of products, {rate / 1e12:.3g} TFLOP/s over all, "
        f"{rate / ceilings.matrix:.0%} of a square product's"
    )


if __name__ == "__main__":
    main()
