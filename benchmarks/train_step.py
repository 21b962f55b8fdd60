"""Time and memory of one training step (forward and backward), implementation against implementation.

    python -m benchmarks.train_step --model sgmim_swin_base --batch 8 --backends reference torch

Every implementation runs in processes of its own, in turns, so that none profits from another's warm caches
or inherits its memory peak. Each row goes to ``benchmarks/results/train_step.jsonl`` with the environment it
was measured in and the deviation of its loss and gradients from the first backend's.
"""

import argparse
import ast
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
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
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="processes an implementation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    parser.add_argument("--measure", metavar="BACKEND", help=argparse.SUPPRESS)  # a child process: one backend
    options = parser.parse_args()
    with one_line_errors():
        if options.measure:
            print(json.dumps(measure(options)))
        else:
            compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure every backend in turns, then write and print a row for each."""
    rounds: dict[str, list[dict[str, Any]]] = {backend: [] for backend in options.backends}
    for _ in range(options.rounds):
        for backend in options.backends:
            child = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--measure", backend]
            done = subprocess.run(child, stdout=subprocess.PIPE)
            if done.returncode:
                raise SystemExit(done.returncode)
            rounds[backend].append(json.loads(done.stdout))
    environment = describe_environment(torch.device(options.device), 1)
    first = rounds[options.backends[0]][0]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as file:
        for backend, runs in rounds.items():
            times = percentiles([seconds for run in runs for seconds in run["seconds"]])
            row = {
                "benchmark": "train_step",
                "model": options.model,
                "override": options.override,
                "batch": options.batch,
                "device": options.device,
                "precision": "fp32",
                "backend": backend,
                **times,
                "images_per_second": options.batch / times["p50_seconds"],
                "step_memory_bytes": max(run["step_memory_bytes"] for run in runs),
                "loss_deviation": abs(runs[0]["loss"] - first["loss"]) / abs(first["loss"]),
                "gradient_norm_deviation": abs(runs[0]["grad_norm"] - first["grad_norm"]) / first["grad_norm"],
                "environment": environment,
            }
            file.write(json.dumps(row) + "\n")
            print(
                f"{options.model} {backend:>9}: {row['p50_seconds']:.3f} s a step of {options.batch} "
                f"({row['images_per_second']:.2f} images/s), {row['step_memory_bytes'] / 1e9:.2f} GB, "
                f"loss off by {row['loss_deviation']:.1e}"
            )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, memory that a step needs beyond weights, and loss and gradient norm to compare."""
    device, batch = torch.device(options.device), options.batch
    fields = {name: ast.literal_eval(value) for name, value in (word.split("=", 1) for word in options.override)}
    torch.manual_seed(0)
    model = create_model(options.model, backend=options.measure, **{"drop_path_rate": 0.0, **fields}).to(device)
    config = model.config
    image = torch.randn(batch, 3, *config.hw, device=device)
    structure = torch.randn(batch, config.structure_channels, *config.hw, device=device)
    masks = [draw_cell_mask(sample_rng(0, 0, index, STREAM_MASK), config.grid, 0.6) for index in range(batch)]
    mask = torch.stack([torch.from_numpy(m) for m in masks])
    masked, visible = (index.to(device) for index in mask_indices(mask))
    mask = mask.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients belong to the weights, not to the step
    before = resident(device)
    seconds = []
    loss = torch.tensor(0.0)
    for _ in range(options.steps + 1):
        model.zero_grad(set_to_none=False)
        synchronize(device)
        start = time.perf_counter()
        loss = model(image, structure, mask, masked, visible).loss
        loss.backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {
        "seconds": seconds[1:],
        "step_memory_bytes": peak(device) - before,
        "loss": loss.item(),
        "grad_norm": norm.item(),
    }


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
