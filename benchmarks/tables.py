"""Markdown tables of training steps, and of what is demanded. What has not been measured says so."""

import re
from collections.abc import Sequence

from benchmarks import bars
from benchmarks.recorded import SKIPPED_KEYS, WORDS, Results, arm_of, commands, model_name
from benchmarks.rows import Row, newest
from benchmarks.slices import FLOAT8_ARMS, PEER_MODEL

NOT_MEASURED = "not measured"
GPU_ARMS = (
    "reference",
    "reference+compile",
    "reference+autotune",
    "torch",
    "triton",
    "triton+compile",
    "triton+graphs",
)
MAIN_ARMS = ("reference", "reference+compile", "triton", "triton+compile")
PEER_ARMS = ("reference", "timm", "timm+compile", "triton")
MEASURE_STEPS = "make gpu-check SLICE=step"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (titles, *rows)]  # as some errors hold
    head, *others = (f"| {' | '.join(line)} |" for line in lines)
    return [head, "|" + "---|" * len(titles), *others]


def reproduce(rows: Sequence[Row], otherwise: str) -> list[str]:
    """The commands that made the rows, or the one that would."""
    return ["", *(f"    {command}" for command in commands(rows) or [otherwise])]


def digits(value: float, least: int = 3) -> str:
    """At least so many of them, without an exponent."""
    if value == 0:
        return "0"
    places = 0
    while places < 9 and round(abs(value), places) < 10 ** (least - 1 - places):
        places += 1
    return f"{value:,.{places}f}"


# -- training steps


def cpu_steps(results: Results) -> list[str]:
    """Steps on CPUs, the memory in bytes that forward keeps."""
    rows = results.steps(None)
    lines = []
    for row in sorted(rows, key=lambda row: (row["batch"], row["precision"], list(WORDS).index(row["model"]))):
        times = " / ".join(f"{row[f'{p}_seconds']:.2f}" for p in ("p20", "p50", "p80"))
        lines.append(
            (
                model_name(row),
                str(row["batch"]),
                f"`{arm_of(row)}`",
                f"{times} s",
                f"x {row['p50_time_ratio']:.3f}",
                f"{row['activation_bytes'] / 1e6:.0f} MB",
            )
        )
    titles = ("model", "batch", "backend", "step (p20 / p50 / p80)", "time", "activations")
    return [*where(rows), "", *table(titles, lines), *reproduce(rows, "python -m benchmarks.train_step")]


def where(rows: Sequence[Row]) -> list[str]:
    """Machine, versions and state of the code, a line for each that differs."""
    found = []
    for row in rows:
        seen = row["environment"]
        kind = f" in {row['precision']}" if "precision" in row else ""
        if gpu := seen.get("gpu"):
            place = f"{gpu} (driver {seen.get('driver_version', 'unknown')})"
            versions = f"torch {seen['torch']}, Triton {seen.get('triton', 'unknown')}"
        else:
            place, versions = f"{row.get('threads', seen['cores'])} cores of an {seen['cpu']}", f"torch {seen['torch']}"
        found.append(f"Measured{kind} on {place}, {versions}, {state(seen)}.")
    return list(dict.fromkeys(found))


def state(environment: Row) -> str:
    """Of the code that was measured: its commit, or the digest of the sources where no commit is all of it."""
    commit = str(environment["commit"])
    digest = f"sources {environment.get('sources', 'unknown')}"
    if not re.fullmatch(r"[0-9a-f]{7,}(\+changes)?", commit):
        return digest
    return f"commit {commit[:7]}" + (f" with changes ({digest})" if commit.endswith("+changes") else "")


def main_steps(results: Results) -> list[str]:
    """Of the main model on the first GPU, for the README."""
    return _gpu_steps(results, results.gpus("train_step")[0], [(bars.MAIN_MODEL, arm) for arm in MAIN_ARMS])


def gpu_steps(results: Results) -> list[str]:
    """Of every model on every GPU."""
    wanted = [(model, arm) for model in (bars.MAIN_MODEL, *bars.MODELS) for arm in GPU_ARMS]
    wanted += [(bars.MAIN_MODEL, arm) for arm in FLOAT8_ARMS] + [(PEER_MODEL, arm) for arm in PEER_ARMS]
    lines = []
    for gpu in results.gpus("train_step"):
        lines += [f"### {gpu}", "", *_gpu_steps(results, gpu, wanted), ""]
    return lines[:-1]


def _gpu_steps(results: Results, gpu: str, wanted: Sequence[tuple[str, str]]) -> list[str]:
    every = [row for row in results.steps(gpu) if bars.STEP.items() <= row.items()]
    skipped = [row for row in results.skipped_steps(gpu) if bars.STEP.items() <= row.items()]
    used, lines = [], []
    for model, arm in wanted:
        row = _of(every, model, arm)
        if row is None:
            reason = f": {why['reason']}" if (why := _of(skipped, model, arm)) else ""
            lines.append((WORDS[model], f"`{arm}`", NOT_MEASURED + reason, *("" for _ in range(6))))
            continue
        used.append(row)
        times = " / ".join(f"{row[f'step_{p}_seconds'] * 1e3:.1f}" for p in ("p20", "p50", "p80"))
        lines.append(
            (
                WORDS[model],
                f"`{arm}`",
                f"{times} ms",
                f"{row['p50_seconds'] * 1e3:.1f} ms",
                f"{row['training_images_per_second']:,.0f}",
                against(row, "reference"),
                against(row, "reference+compile"),
                f"{row['step_memory_bytes'] / 1e9:.2f} GB",
                _shares(row),
            )
        )
    titles = ("model", "arm", "step (p20 / p50 / p80)", "both passes", "images/s", "faster than `reference`",
              "than `reference+compile`", "memory of the passes", "of the matrix rate (of its shapes')")  # fmt: skip
    place = where(used) if used else [f"{gpu}, bf16, batch 128: {NOT_MEASURED}. To measure:"]
    return [*place, "", *table(titles, lines), *reproduce(used, MEASURE_STEPS)]


def _shares(row: Row) -> str:
    own = row["step_share_of_products"]
    return f"{row['step_share_of_matrix']:.0%}" + ("" if own is None else f" ({own:.0%})")


def _of(rows: Sequence[Row], model: str, arm: str) -> Row | None:
    return next((row for row in rows if row["model"] == model and arm_of(row) == arm), None)


def against(row: Row, arm: str) -> str:
    """How many times faster than an arm of the same run."""
    ratio = row.get("step_ratios", {}).get(arm)
    return "" if ratio is None else f"x {1 / ratio:.2f}"


def step_batches(results: Results) -> list[str]:
    """At other batch sizes than that of the demands, of every GPU; what did not fit or run says why."""
    found = []
    for gpu in results.gpus("train_step"):
        every = newest([*results.skipped_steps(gpu), *results.steps(gpu)], SKIPPED_KEYS)
        rows = [row for row in every if row["batch"] != bars.STEP["batch"]]
        if not rows:
            continue
        lines = [_batch_line(row) for row in sorted(rows, key=lambda row: (row["model"], row["batch"]))]
        titles = ("model", "batch", "arm", "step", "images/s", "faster than `reference`", "memory of the passes")
        found += [*where(rows), "", *table(titles, lines), *reproduce(rows, ""), ""]
    if not found:
        return [f"On a GPU: {NOT_MEASURED}. To measure:", *reproduce([], "make gpu-check SLICE=runs")]
    return found[:-1]


def _batch_line(row: Row) -> tuple[str, ...]:
    what = (model_name(row), str(row["batch"]), f"`{arm_of(row)}`")
    if "reason" in row:
        return (*what, row["reason"], "", "", "")
    rate, memory = f"{row['training_images_per_second']:,.0f}", f"{row['step_memory_bytes'] / 1e9:.2f} GB"
    return (*what, f"{row['step_p50_seconds'] * 1e3:.1f} ms", rate, against(row, "reference"), memory)


def step_parts(results: Results) -> list[str]:
    """Where the time of a step goes, as the profiler of a GPU tells."""
    lines, used = [], []
    for gpu in results.gpus("train_step"):
        for row in results.steps(gpu):
            if bars.STEP.items() <= row.items() and row.get("parts"):
                used.append(row)
                whole = sum(row["parts"].values())
                parts = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in row["parts"].items())
                lines.append((model_name(row), f"`{arm_of(row)}`", gpu, parts))
    if not lines:
        return [f"On a GPU: {NOT_MEASURED}. To measure:", *reproduce([], MEASURE_STEPS)]
    return [*table(("model", "arm", "GPU", "share of the device's time"), lines), *reproduce(used, MEASURE_STEPS)]


# -- what is demanded


def demands(results: Results) -> list[str]:
    """The bars, each with the worst that was measured for it."""
    lines = []
    gpu = results.gpus("kernels", "train_step")[0]
    words = {True: "met", False: "missed", None: NOT_MEASURED}
    for bar in bars.bars([*results.kernels(gpu), *results.steps(gpu)]):
        lines.append((bar.what, bar.demand, "" if bar.met is None else bar.measured, words[bar.met]))
    return [*table(("what", "demand", f"worst on an {gpu}", ""), lines), *reproduce([], "make gpu-check SLICE=all")]
