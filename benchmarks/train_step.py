"""Time and memory of one training step (forward and backward), implementation against implementation.

    python -m benchmarks.train_step --model sgmim_swin_base --batch 8 --backends reference torch
    python -m benchmarks.train_step --precision bf16 --batch 128 --backends reference torch+compile triton+compile

Steps of all implementations alternate on the same weights and inputs, so that whatever else the machine does falls
on all alike. Every row goes to ``benchmarks/results/train_step.jsonl`` with the environment it was measured in and the
deviation of its loss and gradients from the first implementation's.
"""

import argparse
import ast
import copy
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from sgmim_fast.attention import ATTENTIONS
from sgmim_fast.errors import UserError, first_line, one_line_errors
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, mask_indices, masked_cell_count, sample_rng
from sgmim_fast.models.registry import create_model
from sgmim_fast.models.sgmim import SGMIM

RESULTS = harness.RESULTS / "train_step.jsonl"
PRECISIONS = ("fp32", "bf16", "autocast")
RATIO = 0.6
WARM_UP = 3  # steps
Batch = tuple[torch.Tensor, ...]


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        if options.memory_of:
            print(peak_of_host(options))
        else:
            raise SystemExit(compare(options))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgmim_swin_base", help="a name of sgmim_fast.recipes.MODELS")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of ModelConfig")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["reference", "torch"],
        metavar="BACKEND[+sdpa][+compile]",
        help="the first is the yardstick",
    )
    parser.add_argument("--steps", type=int, default=11, help="timed steps of each")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="bf16: of the weights as well; autocast: to bf16"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    parser.add_argument("--memory-of", metavar="BACKEND", help=argparse.SUPPRESS)  # a child process
    return parser


@dataclass(frozen=True)
class Variant:
    """One implementation of the step."""

    name: str
    backend: str
    attention: str
    compiled: bool

    @classmethod
    def parse(cls, name: str) -> "Variant":
        backend, *more = name.split("+")
        attention = next((word for word in more if word in ATTENTIONS), "auto")
        if unknown := [word for word in more if word not in (*ATTENTIONS, "compile")]:
            raise UserError(f"{unknown[0]!r} in {name!r} is unknown; add +compile, +sdpa or +xformers to a backend")
        return cls(name, backend, attention, "compile" in more)


def compare(options: argparse.Namespace) -> int:
    """Measure every implementation; write and print a row for each. 1 if one of them fails."""
    device = torch.device(options.device)
    rows = harness.Rows(options.output, device)
    flops = model_flops(options)
    ceilings = harness.measure_ceilings(device) if device.type == "cuda" else None
    found, failed = measure(options, device)
    first = next(iter(found.values()))
    for name, results in found.items():
        variant = Variant.parse(name)
        p20, p50, p80 = harness.percentiles(results["seconds"])
        row = {
            "benchmark": "train_step",
            "model": options.model,
            "override": options.override,
            "batch": options.batch,
            "device": options.device,
            "threads": torch.get_num_threads(),
            "precision": options.precision,
            "backend": variant.backend,
            "attention": variant.attention,
            "compiled": variant.compiled,
            "steps": options.steps,
            "p20_seconds": p20,
            "p50_seconds": p50,
            "p80_seconds": p80,
            # Step by step against the yardstick's neighbour: slow spells of the machine cancel out.
            "p50_time_ratio": median([a / b for a, b in zip(results["seconds"], first["seconds"], strict=True)]),
            "images_per_second": options.batch / p50,
            "activation_bytes": results["activation_bytes"],
            "step_memory_bytes": results["step_memory_bytes"],
            "loss_deviation": abs(results["loss"] - first["loss"]) / abs(first["loss"]),
            "gradient_norm_deviation": abs(results["grad_norm"] - first["grad_norm"]) / first["grad_norm"],
            "model_flops": flops,
        }
        if ceilings:
            row |= {"ceilings": ceilings.row(), "share_of_matrix": flops / p50 / ceilings.matrix}
        rows.append(row)
        print(
            f"{options.model} {options.precision} {name:>9}: {p50:.3f} s a step of {options.batch} "
            f"({row['images_per_second']:.2f} images/s, x{row['p50_time_ratio']:.3f}), "
            f"{row['activation_bytes'] / 1e6:.0f} MB of activations, peak {row['step_memory_bytes'] / 1e9:.2f} GB, "
            f"gradient norm off by {row['gradient_norm_deviation']:.1e}"
            + (f", {row['share_of_matrix']:.0%} of the matrix rate" if ceilings else "")
        )
    return int(failed)


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, dict[str, Any]], bool]:
    """Seconds of each step, bytes, loss and gradient norm, of every implementation in turns; whether one failed."""
    model, inputs = build(options, device)
    runners: dict[str, Runner] = {}
    found: dict[str, dict[str, Any]] = {}
    failed = False
    for name in options.backends:
        runner = Runner(model, inputs, Variant.parse(name), options.precision)
        try:
            runner.warm_up()
            activations = runner.activation_bytes()
            memory = peak_of_gpu(runner) if device.type == "cuda" else peak_in_child(name)
        except UserError:
            raise
        except Exception as error:
            if not runners:  # without a yardstick there is nothing to tell
                raise
            print(f"{options.model} {name}: failed: {type(error).__name__}: {first_line(error)}", flush=True)
            failed = True
            continue
        runners[name] = runner
        found[name] = {"seconds": [], "activation_bytes": activations, "step_memory_bytes": memory}
    for _ in range(options.steps):
        for name, runner in runners.items():
            runner.clear()
            synchronize(device)
            start = time.perf_counter()
            loss = runner.step()
            synchronize(device)
            found[name]["seconds"].append(time.perf_counter() - start)
            norm = torch.nn.utils.get_total_norm(runner.gradients())
            found[name] |= {"loss": loss.item(), "grad_norm": norm.item()}
    return found, failed


class Runner:
    """Runs steps of one implementation on weights of its own, equal to ``model``'s."""

    def __init__(self, model: SGMIM, inputs: Batch, variant: Variant, precision: str) -> None:
        self.model, self.inputs, self.autocast = copy.deepcopy(model), inputs, precision == "autocast"
        self.model.set_backend(variant.backend)  # type: ignore[arg-type]
        self.model.set_attention(variant.attention)  # type: ignore[arg-type]
        self.run = torch.compile(self.model, dynamic=False) if variant.compiled else self.model
        self.device = inputs[0].device
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.run(*self.inputs).loss

    def step(self) -> torch.Tensor:
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def warm_up(self) -> None:
        for _ in range(WARM_UP if self.device.type == "cuda" else 1):
            self.step()
        synchronize(self.device)

    def activation_bytes(self) -> int:
        """Bytes that forward keeps for backward, weights not counted."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            loss = self.forward()
            kept = torch.cuda.memory_allocated(self.device) - before
            loss.backward()
            return kept
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.step()
        return sum(sizes.values())


def build(options: argparse.Namespace, device: torch.device) -> tuple[SGMIM, Batch]:
    """The model, and a batch as a loader gives it."""
    torch.manual_seed(0)
    model = create(options).to(device)
    config = model.config
    image = torch.randn(options.batch, 3, *config.hw, device=device)
    structure = torch.randn(options.batch, config.structure_channels, *config.hw, device=device)
    rngs = [sample_rng(0, 0, index, STREAM_MASK) for index in range(options.batch)]
    mask = torch.stack([torch.from_numpy(draw_cell_mask(rng, config.grid, RATIO)) for rng in rngs])
    masked, visible = (index.to(device) for index in mask_indices(mask))
    return model, (image, structure, mask.to(device), masked, visible)


def create(options: argparse.Namespace) -> SGMIM:
    fields = {name: ast.literal_eval(value) for name, value in (word.split("=", 1) for word in options.override)}
    model = create_model(options.model, **{"drop_path_rate": 0.0, **fields})
    return model.to(torch.bfloat16) if options.precision == "bf16" else model


def model_flops(options: argparse.Namespace) -> int:
    """Floating-point operations of a step's matrix products, without what no loss sees; counted on one pair."""
    with torch.device("meta"):
        model = create(options)
        config = model.config
        cells = config.grid[0] * config.grid[1]
        masked = masked_cell_count(cells, RATIO)
        image = torch.empty(1, 3, *config.hw)
        structure = torch.empty(1, config.structure_channels, *config.hw)
        mask = torch.empty(1, *config.grid, dtype=torch.bool)
        shown = [torch.empty(1, count, dtype=torch.int32) for count in (masked, cells - masked)]
    model.set_backend("torch")
    with FlopCounterMode(display=False) as counter:
        model(image, structure, mask, *shown).loss.backward()
    return counter.get_total_flops() * options.batch


# -- memory


def peak_of_gpu(runner: Runner) -> int:
    """Most bytes that a step needs beyond weights, gradients and inputs."""
    runner.clear()
    return harness.peak_bytes(runner.step)


def peak_in_child(name: str) -> int:
    """Likewise on the host, where the peak of a process never falls: a process for each."""
    child = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--memory-of", name]
    return int(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)


def peak_of_host(options: argparse.Namespace) -> int:
    runner = Runner(*build(options, torch.device("cpu")), Variant.parse(options.memory_of), options.precision)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    for _ in range(3):
        runner.clear()
        runner.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
