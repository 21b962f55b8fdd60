"""Rows of a training step, and what is printed of them. The fields are described in ``benchmarks.train_step``."""

import argparse
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Ceilings, percentiles
from benchmarks.step_arms import RATIO, Variant, create
from benchmarks.step_parity import Result, deviations
from benchmarks.step_turns import Arm
from sgmim_fast.masking import masked_cell_count
from sgmim_fast.train.peaks import device_peak_tflops

Row = dict[str, Any]


def head_of(options: argparse.Namespace, size: int, variant: Variant) -> Row:
    """What was measured."""
    return {
        "benchmark": "train_step",
        "model": options.model,
        "override": options.override,
        "batch": size,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "precision": options.precision,
        **variant.row(),
        "optimizer": options.optimizer,
        "steps": options.steps,
        "steps_a_turn": options.burst,
    }


def skipped_row(options: argparse.Namespace, size: int, variant: Variant, reason: str) -> Row:
    return head_of(options, size, variant) | {"benchmark": "train_step_skipped", "reason": reason}


def finished_row(
    options: argparse.Namespace,
    size: int,
    arms: dict[str, Arm],
    name: str,
    truth: Result,
    flops: int,
    ceilings: Ceilings | None,
) -> Row:
    """Times, ratios, memory and errors of one arm; the first of ``arms`` is the yardstick."""
    arm = arms[name]
    yardstick, first = next(iter(arms.items()))
    p20, p50, p80 = percentiles([turn.passes for turn in arm.turns])
    step_p20, step, step_p80 = percentiles([turn.step for turn in arm.turns])
    forward, backward, update = (
        median(getattr(turn, part) for turn in arm.turns) for part in ("forward", "backward", "update")
    )
    off, error = deviations(arm.result, first.result), deviations(arm.result, truth)
    row = head_of(options, size, arm.runner.variant) | {
        "steps": len(arm.turns),
        "ready_seconds": arm.ready_seconds,
        "p20_seconds": p20,
        "p50_seconds": p50,
        "p80_seconds": p80,
        "forward_p50_seconds": forward,
        "backward_p50_seconds": backward,
        "update_p50_seconds": update,
        "step_p20_seconds": step_p20,
        "step_p50_seconds": step,
        "step_p80_seconds": step_p80,
        "p50_time_ratio": ratio(arm, first, "passes"),
        "yardstick": yardstick,
        "ratios": ratios(arms, arm, "passes"),
        "step_ratios": ratios(arms, arm, "step"),
        "images_per_second": size / p50,
        "training_images_per_second": size / step,
        "activation_bytes": arm.activation_bytes,
        "step_memory_bytes": arm.step_memory_bytes,
        "state_bytes": arm.runner.state_bytes(),
        **{f"{what}_deviation": value for what, value in off.items()},
        **{f"{what}_error": value for what, value in error.items()},
        "model_flops": flops,
    }
    if ceilings is not None:
        row |= {"ceilings": ceilings.row(), "share_of_matrix": flops / p50 / ceilings.matrix}
        row |= {"step_share_of_matrix": flops / step / ceilings.matrix} | datasheet_shares(options, flops, p50, step)
        row["step_share_of_products"] = flops / step / ceilings.products if ceilings.products else None
    return row


def ratio(arm: Arm, other: Arm, part: str) -> float:
    """Step by step against the neighbour: slow spells of the machine cancel out."""
    return median(getattr(a, part) / getattr(b, part) for a, b in zip(arm.turns, other.turns, strict=True))


def ratios(arms: dict[str, Arm], arm: Arm, part: str) -> dict[str, float]:
    """Against each plain arm that ran."""
    plain = {name: other for name, other in arms.items() if other.runner.variant.backend == "reference"}
    return {name: ratio(arm, other, part) for name, other in plain.items()}


def datasheet_shares(options: argparse.Namespace, flops: int, passes: float, step: float) -> Row:
    precision: Any = "fp32" if options.precision == "fp32" else "bf16"
    peak = device_peak_tflops(torch.device(options.device), precision, None)
    names = ("share_of_datasheet", "step_share_of_datasheet")
    return {
        name: None if peak is None else flops / seconds / (peak * 1e12)
        for name, seconds in zip(names, (passes, step), strict=True)
    }


def model_flops(options: argparse.Namespace, size: int) -> int:
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
    return int(counter.get_total_flops()) * size


def line_of(row: Row) -> str:
    """For people."""
    text = f"{row['model']} {row['precision']} {row['arm']:>9}: {row['p50_seconds']:.3f} s a step of {row['batch']} "
    text += f"({row['images_per_second']:.2f} images/s, x{row['p50_time_ratio']:.3f}), "
    if row["update_p50_seconds"]:
        text += f"{row['step_p50_seconds']:.3f} s with {row['optimizer']}, "
    if row["activation_bytes"] is not None:
        text += f"{row['activation_bytes'] / 1e6:.0f} MB of activations, "
    text += f"peak {row['step_memory_bytes'] / 1e9:.2f} GB, loss off by {row['loss_error']:.1e}, gradient "
    text += "norm off by " if row["gradient_error"] is None else "off by "
    text += f"{row['gradient_norm_error' if row['gradient_error'] is None else 'gradient_error']:.1e}"
    if "share_of_matrix" in row:
        text += f", {row['share_of_matrix']:.0%} of the matrix rate"
    if "cuda_graphs" in row:
        text += f", CUDA graphs {'taken' if row['cuda_graphs'] else 'not taken'}"
    if row.get("parts"):
        total = sum(row["parts"].values())
        text += "; " + ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in row["parts"].items())
    return text
