"""Time and memory of one training step (forward and backward), implementation against implementation.

    python -m benchmarks.train_step --model sgmim_swin_base --batch 8 --backends reference torch

Steps of all implementations alternate on the same weights and inputs, so that whatever else the machine does falls
on all alike; memory peaks are taken in a process for each. Every row goes to
``benchmarks/results/train_step.jsonl`` with the environment it was measured in and the deviation of its loss and
gradients from the first backend's.
"""

import argparse
import ast
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sgmim_fast.errors import one_line_errors
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, mask_indices, sample_rng
from sgmim_fast.models.registry import create_model
from sgmim_fast.train.environment import describe_environment

RESULTS = Path(__file__).parent / "results" / "train_step.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgmim_swin_base", help="a name of sgmim_fast.config.MODELS")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of ModelConfig")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--backends", nargs="+", default=["reference", "torch"], help="the first is the yardstick")
    parser.add_argument("--steps", type=int, default=11, help="timed steps of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    parser.add_argument("--memory-of", metavar="BACKEND", help=argparse.SUPPRESS)  # a child process
    options = parser.parse_args()
    with one_line_errors():
        if options.memory_of:
            print(step_memory(options))
        else:
            compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure every backend; write and print a row for each."""
    timed = time_steps(options)
    memory = {}
    for backend in options.backends:
        child = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--memory-of", backend]
        memory[backend] = int(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
    environment = describe_environment(torch.device(options.device), 1)
    first = timed[options.backends[0]]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as file:
        for backend, found in timed.items():
            times = percentiles(found["seconds"])
            row = {
                "benchmark": "train_step",
                "model": options.model,
                "override": options.override,
                "batch": options.batch,
                "device": options.device,
                "threads": torch.get_num_threads(),
                "precision": "fp32",
                "backend": backend,
                "steps": options.steps,
                **times,
                # Step by step against the yardstick's neighbour: slow spells of the machine cancel out.
                "p50_time_ratio": median([a / b for a, b in zip(found["seconds"], first["seconds"], strict=True)]),
                "images_per_second": options.batch / times["p50_seconds"],
                "activation_bytes": found["activation_bytes"],
                "step_memory_bytes": memory[backend],
                "loss_deviation": abs(found["loss"] - first["loss"]) / abs(first["loss"]),
                "gradient_norm_deviation": abs(found["grad_norm"] - first["grad_norm"]) / first["grad_norm"],
                "environment": environment,
            }
            file.write(json.dumps(row) + "\n")
            print(
                f"{options.model} {backend:>9}: {row['p50_seconds']:.3f} s a step of {options.batch} "
                f"({row['images_per_second']:.2f} images/s, x{row['p50_time_ratio']:.3f}), "
                f"{row['activation_bytes'] / 1e6:.0f} MB of activations, peak {row['step_memory_bytes'] / 1e9:.2f} GB, "
                f"gradient norm off by {row['gradient_norm_deviation']:.1e}"
            )


def time_steps(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of each step, activation bytes, loss and gradient norm, of every backend in turns."""
    device = torch.device(options.device)
    model, step = build(options)
    found: dict[str, dict[str, Any]] = {backend: {"seconds": []} for backend in options.backends}
    for backend, results in found.items():  # counted and warmed up
        model.set_backend(backend)
        results["activation_bytes"] = activation_bytes(model, step)
    for _ in range(options.steps):
        for backend, results in found.items():
            model.set_backend(backend)
            model.zero_grad(set_to_none=False)
            synchronize(device)
            start = time.perf_counter()
            loss = step()
            synchronize(device)
            results["seconds"].append(time.perf_counter() - start)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results |= {"loss": loss.item(), "grad_norm": torch.nn.utils.get_total_norm(gradients).item()}
    return found


def activation_bytes(model: torch.nn.Module, step: Callable[[], torch.Tensor]) -> int:
    """Bytes of the tensors that forward keeps for backward, each storage once, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())


def step_memory(options: argparse.Namespace) -> int:
    """Peak bytes that steps of one backend need beyond weights, gradients and inputs."""
    device = torch.device(options.device)
    model, step = build(options)
    model.set_backend(options.memory_of)
    before = resident(device)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        step()
    return peak(device) - before


def build(options: argparse.Namespace) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The model with its gradients allocated, and a function that runs forward and backward."""
    device = torch.device(options.device)
    fields = {name: ast.literal_eval(value) for name, value in (word.split("=", 1) for word in options.override)}
    torch.manual_seed(0)
    model = create_model(options.model, **{"drop_path_rate": 0.0, **fields}).to(device)
    config = model.config
    image = torch.randn(options.batch, 3, *config.hw, device=device)
    structure = torch.randn(options.batch, config.structure_channels, *config.hw, device=device)
    rngs = [sample_rng(0, 0, index, STREAM_MASK) for index in range(options.batch)]
    mask = torch.stack([torch.from_numpy(draw_cell_mask(rng, config.grid, 0.6)) for rng in rngs])
    masked, visible = (index.to(device) for index in mask_indices(mask))
    mask = mask.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> torch.Tensor:
        loss = model(image, structure, mask, masked, visible).loss
        loss.backward()
        return loss.detach()

    return model, step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak(device: torch.device) -> int:
    """Most bytes in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def percentiles(seconds: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    values = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {f"p{name}_seconds": value for name, value in zip((20, 50, 80), values.tolist(), strict=True)}


if __name__ == "__main__":
    main()
