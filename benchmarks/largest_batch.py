"""The largest batch that a training step fits into a GPU's memory with, on this GPU and on smaller ones.

    python -m benchmarks.largest_batch --model sgmim_swin_base --memory-budget 24 80 141
    python -m benchmarks.largest_batch --backends reference triton triton+compile --memory-budget 80 --step 64

Batches are doubled until memory runs out, then the gap is halved down to ``--step``. Each trial is whole steps as in
training: passes, clipping, AdamW on float32 weights. A budget of N GB is N * 10^9 bytes, of which the allocator gets
what the driver's own context leaves (``torch.cuda.set_per_process_memory_fraction``); a GPU that has less is not asked.
Each arm has a process of its own, so that nothing of another is in its memory; a largest batch of an eager arm takes
about a minute, that of a compiled one compiles anew for every trial. What the file has from the same sources is not
searched again.

Rows of ``benchmarks/results/largest_batch.jsonl`` ("benchmark": "largest_batch"):

    model, override, precision, arm, backend, attention, compiled, compile_mode, float8, optimizer, step
    budget_gb, budget_bytes, context_bytes, allocator_bytes      what the step had
    largest_batch              None if not even the first trial fits
    smallest_failing_batch     None if the search ended at ``--most``
    trials                     [[batch, whether it fits], ...] in their order
    peak_allocated_bytes, peak_reserved_bytes                    at the largest batch
    step_p50_seconds, training_images_per_second                 there

An arm that cannot run leaves "benchmark": "largest_batch_skipped" with ``reason``.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import harness
from benchmarks.clocks import clock_of
from benchmarks.deadline import Deadline
from benchmarks.optimizers import NAMES as OPTIMIZERS
from benchmarks.processes import ROOT, end_with_parent
from benchmarks.rows import key_of
from benchmarks.step_arms import PRECISIONS, Runner, Variant, build, release
from benchmarks.step_turns import is_out_of_memory, reason_of
from sgmim_fast.errors import EXIT_PREEMPTED, UserError, one_line_errors

RESULTS = harness.RESULTS / "largest_batch.jsonl"
KEYS = ("benchmark", "model", "override", "precision", "arm", "optimizer", "step", "budget_gb")
GB = 10**9
STEPS = 3  # of a trial; the first makes the optimizer's state
Row = dict[str, Any]


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        harness.gpu()
        raise SystemExit(search_here(options) if options.in_child else search_all(options))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgmim_swin_base", help="a name of sgmim_fast.recipes.MODELS")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of ModelConfig")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["reference", "torch", "triton"],
        metavar="BACKEND[+WORD...]",
        help="arms, named as in benchmarks.train_step",
    )
    parser.add_argument("--memory-budget", nargs="+", type=float, default=[24, 80, 141], metavar="GB")
    parser.add_argument("--first", type=int, default=32, help="batch of the first trial (default: 32)")
    parser.add_argument("--step", type=int, default=32, help="how near the search goes (default: 32)")
    parser.add_argument("--most", type=int, default=4096, help="batch to end at (default: 4096)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--seconds", type=float, help="for everything; searches that are not over then are left out")
    parser.add_argument("--again", action="store_true", help="also what the file has from these sources")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    parser.add_argument("--in-child", action="store_true", help=argparse.SUPPRESS)
    return parser


# -- the search


@dataclass
class Search:
    """What a search has found."""

    largest: int | None = None
    failing: int | None = None
    trials: list[tuple[int, bool]] = field(default_factory=list)


def largest(fits: Callable[[int], bool], first: int, step: int, most: int) -> Search:
    """The largest batch that fits, found by doubling from ``first`` and then halving the gap down to ``step``.

    Where ``first`` does not fit, the gap below it is halved.
    """
    found = Search()

    def trial(batch: int) -> bool:
        fitting = fits(batch)
        found.trials.append((batch, fitting))
        if fitting:
            found.largest = batch
        else:
            found.failing = batch
        return fitting

    batch = min(first, most)
    while trial(batch) and batch < most:
        batch = min(2 * batch, most)
    while found.failing is not None and (gap := found.failing - (found.largest or 0)) > step:
        trial((found.largest or 0) + max(step, gap // 2 // step * step))
    return found


# -- in the process that asks


def search_all(options: argparse.Namespace) -> int:
    """A row for each arm and budget that is not known yet.

    Returns:
        1 if a search fails for another reason than that the arm cannot run; else 75 if the time did not suffice.
    """
    device = harness.gpu()
    rows, deadline = harness.Rows(options.output, device), Deadline(options.seconds)
    total = torch.cuda.get_device_properties(device).total_memory
    variants = [Variant.parse(name) for name in options.backends]
    done = set() if options.again else rows.finished(KEYS)
    failed, late = False, False
    for budget in options.memory_budget:
        for variant in variants:
            row = head_of(options, variant, budget)
            if key_of(row, KEYS) in done:
                print(f"{row['model']} {variant.name}, {budget:g} GB: found before from the same sources", flush=True)
                continue
            if budget * GB > total:
                found: Row = {"reason": f"this GPU has {total / GB:.1f} GB"}
            else:
                found = ask_child(variant, budget, deadline)
            if "reason" in found:
                row["benchmark"] = "largest_batch_skipped"
                failed |= found.pop("failed", False)
                late |= found.pop("late", False)
            rows.append(row | found)
            print(line_of(row | found), flush=True)
    return 1 if failed else EXIT_PREEMPTED if late else 0


def head_of(options: argparse.Namespace, variant: Variant, budget: float) -> Row:
    return {
        "benchmark": "largest_batch",
        "model": options.model,
        "override": options.override,
        "precision": options.precision,
        **variant.row(),
        "optimizer": options.optimizer,
        "step": options.step,
        "budget_gb": budget,
    }


def ask_child(variant: Variant, budget: float, deadline: Deadline) -> Row:
    """What one search finds; ``reason`` instead if it found nothing."""
    seconds = deadline.left()
    if seconds <= 0:
        return {"reason": "the time given by --seconds is over", "late": True}
    words = [*sys.argv[1:], "--backends", variant.name, "--memory-budget", str(budget), "--in-child"]
    command = [sys.executable, "-m", "benchmarks.largest_batch", *words]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            timeout=None if seconds == float("inf") else seconds,
            cwd=ROOT,
            preexec_fn=end_with_parent,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"it was not ready after {seconds:.0f} s, all that --seconds left", "late": True}
    lines = done.stdout.decode().splitlines()
    if not lines:
        return {"reason": f"its process ended with status {done.returncode}", "failed": True}
    found: Row = json.loads(lines[-1])
    return found


def line_of(row: Row) -> str:
    label = f"{row['model']} {row['precision']} {row['arm']}, {row['budget_gb']:g} GB"
    if "reason" in row:
        return f"{label}: none: {row['reason']}"
    if row["largest_batch"] is None:
        return f"{label}: not even {row['trials'][0][0]} fit"
    return (
        f"{label}: {row['largest_batch']} fit, peak {row['peak_reserved_bytes'] / GB:.1f} GB reserved, "
        f"{row['training_images_per_second']:.0f} images/s"
    )


# -- in the process that tries


def search_here(options: argparse.Namespace) -> int:
    """Prints one line of JSON: what the search finds."""
    try:
        found = search(options, harness.gpu(), Variant.parse(options.backends[0]), options.memory_budget[0])
    except UserError as refusal:
        found = {"reason": f"cannot run here: {refusal}"}
    except Exception as error:
        found = {"reason": reason_of(error), "failed": True}
    print(json.dumps(found))
    return 0


def search(options: argparse.Namespace, device: torch.device, variant: Variant, budget: float) -> Row:
    free, total = torch.cuda.mem_get_info(device)
    # What lies outside of PyTorch's allocator: the context, and on a shared GPU whatever others hold.
    context = total - free - torch.cuda.memory_reserved(device)
    room = int(budget * GB) - context
    torch.cuda.set_per_process_memory_fraction(min(room / total, 1.0), device)
    at: dict[int, Row] = {}

    def fits(batch: int) -> bool:
        try:
            at[batch] = trial(options, device, variant, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        release(device)
        return batch in at

    found = largest(fits, options.first, options.step, options.most)
    return {
        "budget_bytes": int(budget * GB),
        "context_bytes": context,
        "allocator_bytes": room,
        "largest_batch": found.largest,
        "smallest_failing_batch": found.failing,
        "trials": found.trials,
        **({} if found.largest is None else at[found.largest]),
    }


def trial(options: argparse.Namespace, device: torch.device, variant: Variant, batch: int) -> Row:
    """A few whole steps, if they fit."""
    runner = Runner(*build(options, batch, device), variant, options.precision, options.optimizer)
    runner.turn(STEPS, clock_of(device))
    torch.cuda.reset_peak_memory_stats(device)
    steps = [seconds.step for seconds in runner.turn(STEPS, clock_of(device))]
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "step_p50_seconds": median(steps),
        "training_images_per_second": batch / median(steps),
    }


if __name__ == "__main__":
    main()
