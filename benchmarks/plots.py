"""Plots of recorded rows, each by the name of its file; one for which nothing is recorded is not there."""

from collections.abc import Callable

from benchmarks import bars, svg
from benchmarks.arithmetic import NAMED, PARTS
from benchmarks.peers import OURS
from benchmarks.recorded import Results, arm_of, model_name, on_gpu
from benchmarks.rows import Row


def steps_cpu(results: Results) -> str | None:
    rows = results.steps(None)
    title = "Forward and backward pass on a CPU, seconds a step"
    found = {_name(row): {"step": row["p50_seconds"]} for row in rows}
    return svg.stacked(title, "p50", found) if rows else None


def steps_gpu(results: Results) -> str | None:
    gpu = results.gpus("train_step")[0]
    rows = [row for row in results.steps(gpu) if bars.STEP.items() <= row.items()]
    parts = ("forward", "backward", "update")
    found = {_name(row): {part: row[f"{part}_p50_seconds"] * 1e3 for part in parts} for row in rows}
    return svg.stacked(f"A step, batch 128, bf16, {gpu}: milliseconds", "p50", found) if rows else None


def _name(row: Row) -> str:
    return f"{model_name(row)}, {arm_of(row)}"


def memory_gpu(results: Results) -> str | None:
    gpu = results.gpus("train_step")[0]
    rows = [row for row in results.steps(gpu) if bars.STEP.items() <= row.items()]
    bars_of = {_name(row): {"peak": row["step_memory_bytes"] / 1e9} for row in rows}
    title = f"Memory of both passes beside weights and gradients, batch 128, bf16, {gpu}"
    return svg.stacked(title, "GB", bars_of) if rows else None


def memory_checkpointing(results: Results) -> str | None:
    rows = results.newest("memory", None, "model", "batch", "precision", "activation_checkpointing")
    found = {}
    for row in rows:
        stages = " ".join(map(str, row["activation_checkpointing"])) or "none"
        kept, peak = row["activation_bytes"] / 1e6, row["step_memory_bytes"] / 1e6
        found[f"{model_name(row)}, stages {stages}"] = {"kept for backward": kept, "more at the peak": peak - kept}
    return svg.stacked("Memory of a step by activation checkpointing, batch 2, fp32", "MB", found) if found else None


def traffic(results: Results) -> str | None:
    """Bytes by part, counted without a GPU."""
    rows = results.newest("arithmetic", None, "model", "batch", "precision", "backend")
    found = {
        f"{model_name(row)}, {row['backend']}": {part: row["parts"][part]["bytes"] / 1e9 for part in PARTS}
        for model in NAMED
        for row in rows
        if row["model"] == model
    }
    return svg.stacked("Bytes that a step moves, counted: batch 128, bf16", "GB", found) if found else None


def roofline(results: Results) -> str | None:
    """Kernels that multiply, under the ceilings of their run."""
    gpu = results.gpus("kernels")[0]
    rows = [r for r in results.kernels(gpu) if r["implementation"] == OURS and r.get("flops") and r["pass"] != "both"]
    points: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        what = f"{row['case']}, batch {row['batch']}, {row['pass']}: {row['p50_seconds'] * 1e6:.1f} us"
        point = (row["flops"] / row["floor_bytes"], row["flops_per_second"], what)
        points.setdefault(f"{row['op']} {row['pass']}", []).append(point)
    if not rows:
        return None
    copy, matrix = (rows[-1]["ceilings"][f"{name}_per_second"] for name in ("copy_bytes", "matrix_flops"))
    return svg.roofline(f"The attention kernels on an {gpu}", copy, matrix, points)


def parity(results: Results) -> str | None:
    """Losses of the newest comparison of implementations, on a GPU if there is one."""
    return _curves(results, [row for row in results.of("parity") if not _float8(row)])


def float8(results: Results) -> str | None:
    """Losses of the newest comparison of products in FP8 with those in bf16, on a GPU if there is one."""
    return _curves(results, [row for row in results.of("parity") if _float8(row)])


def _float8(row: Row) -> bool:
    return any("float8" in arm for arm in row["differences"])


def _curves(results: Results, every: list[Row]) -> str | None:
    gpu = results.gpus("parity")[0]
    rows = [row for row in every if row["environment"].get("gpu") == gpu] or [r for r in every if not on_gpu(r)]
    if not rows:
        return None
    row = rows[-1]
    lines = {}
    for curve in row["curves"]:
        nudged = ", nudged" if curve.get("nudged", False) else ""
        lines[f"{curve['arm']}, seed {curve['seed']}{nudged}"] = curve["loss"]
    place = row["environment"].get("gpu", "a CPU")
    title = f"Loss of {row['steps']} steps in {row['precision']} on {place}"
    return svg.curves(title, "steps", "loss", row["points"], lines)


PLOTS: dict[str, Callable[[Results], str | None]] = {
    "steps-cpu": steps_cpu,
    "steps-gpu": steps_gpu,
    "memory-gpu": memory_gpu,
    "memory-checkpointing": memory_checkpointing,
    "traffic": traffic,
    "roofline": roofline,
    "parity": parity,
    "float8": float8,
}
