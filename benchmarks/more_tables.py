"""Markdown tables of kernels, of what a step must compute and move, and of whole runs."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.arithmetic import NAMED, PARTS
from benchmarks.parity import spread_of
from benchmarks.peers import NAMES, OURS
from benchmarks.recorded import WORDS, Results, model_name, on_gpu
from benchmarks.rows import Row, newest
from benchmarks.tables import NOT_MEASURED, digits, reproduce, table, where

EVERYTHING = "make gpu-check SLICE=all"


# -- kernels


def unmeasured(command: str) -> list[str]:
    return [f"On a GPU: {NOT_MEASURED}. To measure:", *reproduce([], command)]


def kernels(results: Results) -> list[str]:
    """Every operation, forward and backward, beside the fastest peer; a table for each GPU."""
    found = []
    for gpu in results.gpus("kernels"):
        every = results.kernels(gpu)
        rows = [row for row in every if "p50_seconds" in row]
        ours = [row for row in rows if row["implementation"] == OURS]
        found += told(KERNEL_TITLES, [_kernel_line(row, rows) for row in ours], ours)
        found += _without_times([row for row in every if "p50_seconds" not in row])
    return found[:-1] or unmeasured(EVERYTHING)


KERNEL_TITLES = (
    *("operation", "batch", "pass", "time", "of a copy", "TFLOP/s", "error (plain's)"),
    "fastest peer, its time",
)


def _without_times(rows: Sequence[Row]) -> list[str]:
    """Who was tried and has no times, why, and at how many shapes."""
    reasons = Counter((row["implementation"], row.get("failed") or f"wrong: {row['pass']}") for row in rows)
    lines = [f"- `{name}` at {count} shapes: {reason}" for (name, reason), count in reasons.items()]
    return ["Tried and without times:", "", *lines, ""] if lines else []


def _kernel_line(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    same = [r for r in rows if all(r[key] == row[key] for key in ("op", "case", "pass", "dtype", "batch"))]
    peers = [r for r in same if r["implementation"] in NAMES and r["implementation"] not in (OURS, "copy")]
    best = min(peers, key=lambda r: r["p50_seconds"], default=None)
    return (
        f"`{row['op']}` {row['case']}",
        f"{row['batch']} {row['dtype']}",
        row["pass"],
        f"{row['p50_seconds'] * 1e6:.1f} us",
        f"{row['share_of_copy']:.0%}",
        f"{row['flops_per_second'] / 1e12:.0f}" if row["flops"] else "",
        f"{row['error']:.1e} ({row['plain_error']:.1e})",
        "" if best is None else f"{best['implementation']}, x {best['p50_seconds'] / row['p50_seconds']:.2f}",
    )


# -- what is counted


def work(results: Results) -> list[str]:
    """Operations and bytes of a step, by part and backend."""
    rows = results.newest("arithmetic", None, "model", "batch", "precision", "backend")
    lines = []
    for model in NAMED:
        mine = {row["backend"]: row["parts"] for row in rows if row["model"] == model}
        if not mine:
            lines.append((WORDS[model], "not counted", *("" for _ in range(4))))
            continue
        empty = {"flops": 0, "bytes": 0, "operations": 0}
        total = {b: {key: sum(part[key] for part in parts.values()) for key in empty} for b, parts in mine.items()}
        for part in (*PARTS, "all"):
            one = {backend: total[backend] if part == "all" else parts[part] for backend, parts in mine.items()}
            name = WORDS[model] if part == PARTS[0] else ""
            size = [f"{one[backend]['bytes'] / 1e9:.1f} GB" for backend in ("reference", "torch", "triton")]
            lines.append((name, part, f"{one['torch']['flops'] / 1e12:.2f} TFLOP", *size))
    titles = ("batch 128, bf16", "part", "products", "moved by `reference`", "by `torch`", "by `triton`")
    return [*table(titles, lines), *reproduce(rows, "python -m benchmarks.arithmetic")]


def checkpointing(results: Results) -> list[str]:
    """Bytes that activation checkpointing saves."""
    rows = results.newest("memory", None, "model", "batch", "precision", "activation_checkpointing")
    lines = []
    for row in rows:
        stages = " ".join(map(str, row["activation_checkpointing"])) or "none"
        kept, peak = (f"{row[key] / 1e6:.1f} MB" for key in ("activation_bytes", "step_memory_bytes"))
        lines.append((model_name(row), stages, kept, peak, f"x {row['p50_time_ratio']:.2f}"))
    titles = ("model, batch 2, fp32", "stages", "kept for backward", "peak of the step", "time")
    return [*where(rows), "", *table(titles, lines), *reproduce(rows, "python -m benchmarks.memory")]


# -- whole runs


def missing(rows: Sequence[Row], command: str) -> list[str]:
    """What to say, before rows of CPUs, where none is of a GPU."""
    return [] if any(map(on_gpu, rows)) else [*unmeasured(command), ""]


def told(titles: Sequence[str], lines: Sequence[Sequence[str]], rows: Sequence[Row]) -> list[str]:
    """Where, what and how, and an empty line; nothing without rows."""
    return [*where(rows), "", *table(titles, lines), *reproduce(rows, ""), ""] if rows else []


def products(results: Results) -> list[str]:
    """Matrix products of a step, those that take longest first; a table for each GPU and model."""
    found = []
    for gpu in results.gpus("products"):
        rows = results.newest("products", gpu, *PRODUCT_KEYS)
        for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
            mine = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
            mine.sort(key=lambda row: -row["count"] * row["p50_seconds"])
            found += told(PRODUCT_TITLES, [_product_line(row) for row in mine[:12]], mine[:12])
    return found[:-1] or unmeasured("python -m benchmarks.products")


PRODUCT_KEYS = ("model", "batch", "m", "k", "n", "a_transposed", "b_transposed")
PRODUCT_TITLES = ("model", "m x k x n", "in a step", "time of one", "TFLOP/s", "of a square product's")


def _product_line(row: Row) -> tuple[str, ...]:
    return (
        f"{model_name(row)}, batch {row['batch']}",
        f"{row['m']} x {row['k']} x {row['n']}",
        str(row["count"]),
        f"{row['p50_seconds'] * 1e6:.1f} us",
        f"{row['flops_per_second'] / 1e12:.0f}",
        f"{row['share_of_matrix']:.0%}",
    )


def optimizers(results: Results) -> list[str]:
    """A step of AdamW by each library; a table for each GPU."""
    found = []
    keys = ("model", "implementation")
    for gpu in results.gpus("optimizers"):
        ran, skipped = results.newest("optimizers", gpu, *keys), results.newest("optimizers_skipped", gpu, *keys)
        rows = newest([*skipped, *ran], keys)
        found += told(("model", "AdamW", "step", "of a copy", "error"), [_optimizer_line(row) for row in rows], rows)
    return found[:-1] or unmeasured("python -m benchmarks.optimizers")


def _optimizer_line(row: Row) -> tuple[str, ...]:
    what = (model_name(row), f"`{row['implementation']}`")
    if "reason" in row:
        return (*what, row["reason"], "", "")
    return (*what, f"{row['p50_seconds'] * 1e3:.3f} ms", f"{row['share_of_copy']:.0%}", f"{row['error']:.1e}")


def largest_batches(results: Results) -> list[str]:
    """What fits into 24, 80 and 141 GB; a table for each GPU."""
    found = []
    for gpu in results.gpus("largest_batch"):
        rows = results.newest("largest_batch", gpu, "model", "override", "precision", "arm", "budget_gb")
        rows.sort(key=lambda row: (row["model"], row["budget_gb"]))
        found += told(("model", "arm", "memory", "largest batch", "images/s"), [_largest_line(r) for r in rows], rows)
    return found[:-1] or unmeasured("python -m benchmarks.largest_batch")


def _largest_line(row: Row) -> tuple[str, ...]:
    what = (model_name(row), f"`{row['arm']}`", f"{row['budget_gb']:g} GB")
    if row["largest_batch"] is None:
        return (*what, "none", "")
    return (*what, str(row["largest_batch"]), f"{row['training_images_per_second']:,.0f}")


def pipeline(results: Results) -> list[str]:
    """Files to gradients, and the share of the time that waits for data."""
    rows = [
        row
        for gpu in (*results.gpus("pipeline"), None)
        for row in results.newest(
            "pipeline", gpu, "model", "override", "precision", "batch", "arm", "loader", "data", "workers"
        )
    ]
    lines = [
        (
            ", ".join([model_name(row), *row["override"], f"batch {row['batch']}", row["precision"]]),
            row["environment"].get("gpu") or f"CPU, {row['environment']['cores']} cores",
            f"`{row['arm']}`",
            f"{row['loader']}, {row['workers']} workers",
            f"{digits(row['p50_images_per_second'])}",
            f"{digits(row['step_images_per_second'])}",
            f"{digits(row['loader_images_per_second'])}",
            f"{row['waiting_share']:.1%}",
        )
        for row in rows
    ]
    titles = ("model", "on", "arm", "loader", "images/s from files", "step alone", "loader alone", "waiting for data")
    return [*missing(rows, "python -m benchmarks.pipeline"), *told(titles, lines, rows)][:-1]


def parity(results: Results) -> list[str]:
    """How far a training on a fast path ends from the plain one's, beside the plain one nudged, and its seeds."""
    keys = ("model", "override", "backends", "batch", "precision", "device", "planned_steps", "seeds")
    lines, used = [], []
    for gpu in (*results.gpus("parity"), None):
        for row in results.newest("parity", gpu, *keys):
            used.append(row)
            seeds = f"seeds {' '.join(map(str, row['seeds']))}"
            spread = spread_of(row["curves"], row["final"])["loss"]
            rounding = row.get("rounding")
            for arm, differences in row["differences"].items():
                lines.append(
                    (
                        ", ".join(
                            [model_name(row), *row["override"], row["precision"], f"{row['steps']} steps", seeds]
                        ),
                        row["environment"].get("gpu") or "CPU",
                        f"`{arm}`",
                        f"{differences['loss']:.2e}",
                        "" if rounding is None else f"{rounding['loss']:.2e}",
                        f"{spread:.2e}",
                        "yes" if differences["loss"] <= spread else "NO",
                    )
                )
    titles = ("model", "on", "arm", "final loss from `reference`'s", "`reference` nudged, from itself",
              "seeds from each other", "within the spread of seeds")  # fmt: skip
    return [*missing(used, "python -m benchmarks.parity"), *told(titles, lines, used)][:-1]
