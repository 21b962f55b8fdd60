"""Time and memory of one training step, implementation against implementation.

    python -m benchmarks.train_step --model sgmim_swin_base --batch 8 --backends reference torch
    python -m benchmarks.train_step --precision bf16 --batch 32 128 512 \\
        --backends reference reference+compile reference+autotune torch triton triton+compile triton+graphs
    python -m benchmarks.train_step --model simmim_swin_base --precision bf16 --batch 128 \\
        --backends reference timm timm+compile triton triton+compile

A backend is ``reference``, ``torch``, ``triton``, or ``timm``: timm's own encoder in SimMIM's wrapper, for simmim_*
models. ``+compile`` compiles model and losses with torch.compile, ``+autotune`` in its mode that times its choices,
``+graphs`` with CUDA graphs (reduce-overhead), ``+sdpa`` and ``+xformers`` exchange the attention, ``+float8``,
``+float8_rowwise`` and ``+float8_rowwise_with_gw_hp`` multiply the encoder's matrices in FP8 (bf16 otherwise).

Steps of all arms alternate on the same weights and inputs, so that whatever else the machine does falls on all alike;
ratios are taken step by step against the neighbour's. On a GPU a turn is a few steps without waiting between them, as
in training, and seconds are the device's, gaps that the host leaves included. An arm that fails, does not fit into
memory, or is not ready in ``--seconds`` leaves a row that says so, and the others go on.

Rows of ``benchmarks/results/train_step.jsonl``, each with its environment. "benchmark": "train_step":

    model, override, batch, device, threads, precision, arm, backend, attention, compiled, compile_mode, float8,
    optimizer
    steps, steps_a_turn           turns of the arm, and steps in each
    ready_seconds                 until the arm was warm, compilation included
    p20_, p50_, p80_seconds       forward and backward pass; images_per_second = batch / p50_seconds
    forward_, backward_, update_p50_seconds    parts
    step_p20_, step_p50_, step_p80_seconds     the whole step: passes, clipping, optimizer, new weights in the model's
                                  type; training_images_per_second = batch / step_p50_seconds
    p50_time_ratio, yardstick     median of each step's time over its neighbour's of the first arm that ran
    ratios, step_ratios           the same against each arm of backend "reference", passes alone and whole steps
    activation_bytes              what forward keeps for backward; None with CUDA graphs, whose pool hides it
    step_memory_bytes             the most that both passes need beside weights, gradients and inputs; with CUDA graphs
                                  what their pool has reserved, gradients included
    state_bytes                   weights, gradients, and what the optimizer holds
    loss_deviation, gradient_norm_deviation, gradient_deviation    from the yardstick, relative
    loss_error, gradient_norm_error, gradient_error                from the plain path in float64, relative
    model_flops                   of the matrix products that the losses need
    ceilings, share_of_matrix, share_of_datasheet     on a GPU: model_flops / p50_seconds against a large product
                                  measured in this run, and against the data sheet's dense peak (None if unknown)
    step_share_of_matrix, step_share_of_datasheet     the same of the whole step
    step_share_of_products        against the bf16 products of this step measured one by one in this run
    parts, parts_by, device_busy_seconds, kernel_launches, graph_launches, top_kernels    see step_profile
    cuda_graphs                   of arms that ask for them: whether a step ran as graphs
    cuda_graph_skips              how many graphs of the compiled program could not

"benchmark": "train_step_skipped" has the first line of that, and ``reason``.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.deadline import Deadline
from benchmarks.harness import Ceilings, Rows
from benchmarks.optimizers import NAMES as OPTIMIZERS
from benchmarks.products import measure_products
from benchmarks.step_arms import PRECISIONS, Runner, Variant, build, create, release
from benchmarks.step_parity import Result, truth_of
from benchmarks.step_profile import profiled
from benchmarks.step_rows import finished_row, line_of, model_flops, skipped_row
from benchmarks.step_turns import Arm, is_out_of_memory, peak_of_this_process, prepare, reason_of, take_turns
from sgmim_fast.errors import UserError, one_line_errors

RESULTS = harness.RESULTS / "train_step.jsonl"
CANNOT = "cannot run here: "
EXCUSED = (CANNOT, "out of memory", "the time", "it was not ready")
"""How the reasons begin that are no faults."""


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        complete(options)
        if options.memory_of:
            print(peak_of_host(options))
        else:
            raise SystemExit(compare(options))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgmim_swin_base", help="a name of sgmim_fast.recipes.MODELS")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of ModelConfig")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], metavar="PAIRS", help="pairs a step; one or more")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["reference", "torch"],
        metavar="BACKEND[+WORD...]",
        help="arms; the first that runs is the yardstick",
    )
    parser.add_argument("--steps", type=int, default=11, help="turns of each arm (default: 11)")
    parser.add_argument("--burst", type=int, help="steps a turn (default: 4 on a GPU, 1 on a CPU)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="bf16: of the weights as well; autocast: to bf16"
    )
    parser.add_argument("--optimizer", choices=(*OPTIMIZERS, "none"), default="adamw", help="of the whole step")
    parser.add_argument("--no-parts", action="store_true", help="profile nothing")
    parser.add_argument("--seconds", type=float, help="for everything; arms that are not ready then are skipped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    parser.add_argument("--memory-of", metavar="ARM", help=argparse.SUPPRESS)  # a child process
    return parser


def complete(options: argparse.Namespace) -> None:
    """Fill in what depends on other options.

    Raises:
        UserError: for what makes no sense.
    """
    if options.burst is None:
        options.burst = 4 if torch.device(options.device).type == "cuda" else 1
    for name in ("steps", "burst"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be 1 or more")
    if min(options.batch) < 1:
        raise UserError(f"--batch {min(options.batch)} must be 1 or more")
    for name in options.backends:
        Variant.parse(name)


def compare(options: argparse.Namespace) -> int:
    """Measure every arm at every batch size; write and print a row for each. 1 if one that can run fails."""
    device = torch.device(options.device)
    rows = Rows(options.output, device)
    ceilings = harness.measure_ceilings(device) if device.type == "cuda" else None
    deadline = Deadline(options.seconds)
    failed = False
    for size in options.batch:
        failed |= compare_at(size, options, device, rows, ceilings, deadline)
        release(device)
    return int(failed)


def compare_at(
    size: int,
    options: argparse.Namespace,
    device: torch.device,
    rows: Rows,
    ceilings: Ceilings | None,
    deadline: Deadline,
) -> bool:
    """One batch size; whether an arm failed for another reason than that it cannot run or does not fit."""
    failed = False

    def skip(name: str, reason: str) -> None:
        rows.append(skipped_row(options, size, Variant.parse(name), reason))
        print(f"{options.model} {name}, batch {size}: failed: {reason}", flush=True)

    if ceilings is not None:
        ceilings = replace(ceilings, products=products_rate(options, size, device))
    arms, truth, reasons = ready(size, options, device, deadline)
    reasons |= take_turns(arms, options.steps, options.burst, deadline)
    for name, reason in reasons.items():
        skip(name, reason)
        failed |= not reason.startswith(EXCUSED)
    flops = model_flops(options, size) if arms else 0
    for name in arms:
        assert truth is not None, "an arm ran"
        row = finished_row(options, size, arms, name, truth, flops, ceilings)
        if not options.no_parts:
            row |= where_time_goes(arms[name], deadline)
        rows.append(row)
        print(line_of(row), flush=True)
    return failed


def products_rate(options: argparse.Namespace, size: int, device: torch.device) -> float | None:
    """FLOP/s of the bf16 products of this model's step, one by one; None where their operands do not fit."""
    with torch.device("meta"):
        config = create(options).config
    try:
        return measure_products(config, size, device, seconds=0.005)[0]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        release(device)


def ready(
    size: int, options: argparse.Namespace, device: torch.device, deadline: Deadline
) -> tuple[dict[str, Arm], Result | None, dict[str, str]]:
    """Arms that can take turns, what a step should give, and why other arms cannot."""
    arms: dict[str, Arm] = {}
    reasons: dict[str, str] = {}
    truth: Result | None = None
    optimizer = None if options.optimizer == "none" else options.optimizer
    try:
        model, inputs = build(options, size, device)
        with deadline.limit():
            truth = truth_of(model, inputs)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        return {}, None, dict.fromkeys(options.backends, reason_of(error))
    for name in options.backends:
        variant = Variant.parse(name)
        try:
            with deadline.limit():
                make = partial(Runner, model, inputs, variant, options.precision, optimizer)
                arms[name] = prepare(make, partial(peak_in_child, name, size))
        except UserError as refusal:
            if not arms and not reasons:  # without a yardstick there is nothing to tell
                raise
            reasons[name] = f"{CANNOT}{refusal}"
        except Exception as error:
            reasons[name] = reason_of(error)
        if name in reasons and device.type == "cuda":
            torch.cuda.empty_cache()
    return arms, truth, reasons


def where_time_goes(arm: Arm, deadline: Deadline) -> dict[str, Any]:
    """What the profiler tells of one step more; a profiler that fails, or has no time left, leaves the times as they
    are."""
    if deadline.left() <= 0:
        return {"parts": None, "parts_failed": "the time given by --seconds is over"}
    try:
        found = profiled(arm.runner)
    except Exception as error:
        return {"parts": None, "parts_failed": reason_of(error)}
    if arm.runner.variant.graphs:
        found |= {"cuda_graphs": found.get("graph_launches", 0) > 0, "cuda_graph_skips": arm.graph_skips}
    return found


# -- the memory of a step on the host


def peak_in_child(name: str, size: int) -> int:
    """A process for each: the peak of one never falls."""
    words = [*sys.argv[1:], "--batch", str(size), "--memory-of", name]
    child = [sys.executable, "-m", "benchmarks.train_step", *words]
    return int(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)


def peak_of_host(options: argparse.Namespace) -> int:
    model, inputs = build(options, options.batch[0], torch.device("cpu"))
    return peak_of_this_process(Runner(model, inputs, Variant.parse(options.memory_of), options.precision))


if __name__ == "__main__":
    main()
