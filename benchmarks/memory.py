"""What activation checkpointing saves and costs: bytes and time of one step, stages against none.

    python -m benchmarks.memory --model sgmim_swin_base --batch 2 --stages none 0 0,1 0,1,2,3

Steps with each choice alternate on the same weights and batch. Every row goes to ``benchmarks/results/memory.jsonl``
with the environment it was measured in, whether its gradients are those of the first choice to the bit, and the bytes
that ``--dry-run`` says.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from sgmim_fast.config import PretrainConfig, TrainConfig
from sgmim_fast.errors import UserError, one_line_errors
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, mask_indices, sample_rng
from sgmim_fast.recipes import MODELS
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.activation_memory import meta_batch, step_memory
from sgmim_fast.train.dry_run import estimate
from sgmim_fast.train.pretrain_job import PretrainJob

RESULTS = harness.RESULTS / "memory.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgmim_swin_base", help="a name of sgmim_fast.recipes.MODELS")
    parser.add_argument("--batch", type=int, default=2, help="pairs a step")
    parser.add_argument("--stages", nargs="+", default=["none", "0"], metavar="N,N", help="choices; none for no stage")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    options = parser.parse_args()
    with one_line_errors():
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure every choice; write and print a row for each."""
    if options.model not in MODELS:
        raise UserError(f"--model {options.model!r} is unknown; choose one of {', '.join(MODELS)}")
    device = torch.device(options.device)
    rows = harness.Rows(options.output, device)
    model = replace(MODELS[options.model], drop_path_rate=0.0)
    choices = [() if word == "none" else tuple(map(int, word.split(","))) for word in options.stages]
    train = TrainConfig(batch_size=options.batch, precision=options.precision)
    configs = [PretrainConfig(model=model, train=replace(train, activation_checkpointing=stages)) for stages in choices]
    torch.manual_seed(0)
    task = PretrainTask(model, "torch", device=device)
    if options.precision == "bf16":
        task.bfloat16()
    batch = real_batch(configs[0], device)
    found: list[dict[str, Any]] = []
    for config in configs:
        task.model.set_activation_checkpointing(config.train.activation_checkpointing)
        step_memory(task, batch)  # constants that are kept from here on
        kept, peak = step_memory(task, batch)
        said = estimate(PretrainJob(config), 1)
        found.append(
            {"activation_bytes": kept, "step_memory_bytes": peak, "estimated_activation_bytes": said.activations}
            | {"estimated_step_memory_bytes": said.activations + said.temporaries, "seconds": []}
        )
        found[-1]["gradients"] = gradients(task, batch)
    for _ in range(options.steps):
        for config, row in zip(configs, found, strict=True):
            task.model.set_activation_checkpointing(config.train.activation_checkpointing)
            row["seconds"].append(timed_step(task, batch, device))
    first = found[0]
    for config, row in zip(configs, found, strict=True):
        same = all(map(torch.equal, row["gradients"], first["gradients"]))
        p20, p50, p80 = harness.percentiles(row["seconds"])
        # Step by step against the yardstick's neighbour: slow spells of the machine cancel out.
        ratios = [a / b for a, b in zip(row["seconds"], first["seconds"], strict=True)]
        stages = list(config.train.activation_checkpointing)
        name = {"benchmark": "memory", "model": options.model, "batch": options.batch, "device": options.device}
        name |= {"precision": options.precision, "threads": torch.get_num_threads(), "activation_checkpointing": stages}
        figures = {key: value for key, value in row.items() if key.endswith("bytes")}
        times = {"steps": options.steps, "p20_seconds": p20, "p50_seconds": p50, "p80_seconds": p80}
        rows.append(name | figures | times | {"p50_time_ratio": median(ratios), "gradients_equal": same})
        print(
            f"{options.model} {options.precision} stages {stages}: keeps {row['activation_bytes'] / 1e6:.1f} MB, "
            f"peak {row['step_memory_bytes'] / 1e6:.1f} MB, {p50:.3f} s a step (x{median(ratios):.3f}), gradients "
            f"{'equal' if same else 'differ'}",
            flush=True,
        )


def real_batch(config: PretrainConfig, device: torch.device) -> dict[str, Tensor]:
    """Random pictures with masks as a loader draws them."""
    batch = {name: torch.rand(x.shape) if x.is_floating_point() else x for name, x in meta_batch(config).items()}
    rngs = [sample_rng(0, 0, index, STREAM_MASK) for index in range(config.train.batch_size)]
    masks = [torch.from_numpy(draw_cell_mask(rng, config.model.grid, config.data.mask_ratio)) for rng in rngs]
    batch["mask"], batch["index"] = torch.stack(masks), torch.arange(len(masks))
    batch["masked"], batch["visible"] = mask_indices(batch["mask"])
    return {name: value.to(device) for name, value in batch.items()}


def gradients(task: PretrainTask, batch: dict[str, Tensor]) -> list[Tensor]:
    task.zero_grad()
    task(batch).loss.backward()
    return [parameter.grad.clone() for parameter in task.parameters() if parameter.grad is not None]


def timed_step(task: PretrainTask, batch: dict[str, Tensor], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    task(batch).loss.backward()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
