"""What the rows of one run must show for the kernels to be fast enough, and the table that says whether they do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.rows import Row

MEMORY_BOUND = (
    "gather_rows",
    "scatter_rows",
    "gather_cells",
    "embed_visible",
    "masked_l1",
    "standardize_structure",
)
SHORT = 20e-6  # seconds; below, what a launch costs decides
LAUNCH_MARGIN = 3e-6
SMALL_WINDOWS = (6, 7, 12)
LEAST_BATCH = 32  # below, attention of small maps is a matter of launches
ATTENTIONS = ("window_attention", "class_token_attention", "attention_layer")
PEERS = ("plain", "compiled", "max-autotune", "sdpa", "xformers", "flex", "timm", "timm-fused")
MAIN_MODEL, MODELS = "sgmim_swin_base", ("sgmim_swinv2_base", "sgmim_vit_base", "sgmim_swin_large")
STEP = {"precision": "bf16", "batch": 128, "override": [], "optimizer": "adamw"}


@dataclass(frozen=True)
class Bar:
    """One demand and the worst that was measured for it."""

    what: str
    demand: str
    measured: str
    met: bool | None
    """None where nothing was measured."""


def bars(rows: Iterable[Row]) -> list[Bar]:
    """All demands, held against the rows of GPUs; those on kernels first."""
    rows = [row for row in rows if "gpu" in row["environment"] and not row.get("smoke") and "p50_seconds" in row]
    kernels = [row for row in rows if row["benchmark"] == "kernels"]
    steps = [row for row in rows if row["benchmark"] == "train_step" and STEP.items() <= row.items()]
    return [*kernel_bars(kernels), *step_bars(steps)]


def kernel_bars(rows: list[Row]) -> list[Bar]:
    ours = [row for row in rows if row["implementation"] == "triton"]
    windows = [row for row in ours if row["op"] == "window_attention" and row["batch"] >= LEAST_BATCH]
    small = [row for row in windows if window_of(row) in SMALL_WINDOWS]
    found = []
    for part, least in (("forward", 0.7), ("backward", 0.6)):
        chosen = [row for row in small if row["pass"] == part]
        demand = f">= {least:.0%} of a copy of its bytes"
        name = f"window_attention {part}, windows 6, 7, 12, batch {LEAST_BATCH} and more"
        found.append(lowest(name, demand, chosen, share, least, "{:.0%}"))
    attention = [row for row in ours if row["op"] in ATTENTIONS]
    beside = [row for row in attention if peer_times(row, rows)]
    found.append(
        lowest("attention, every shape", "faster than every peer", beside, lambda row: lead(row, rows), 1.0, "x{:.2f}")
    )
    guidance = [row for row in ours if row["op"] == "guidance_attention" and peer_times(row, rows, ("dense",))]
    demand = ">= 2x SDPA over all tokens"
    found.append(
        lowest("guidance_attention", demand, guidance, lambda row: lead(row, rows, ("dense",)), 2.0, "x{:.2f}")
    )
    for op in MEMORY_BOUND:
        chosen = [row for row in ours if row["op"] == op and row["pass"] != "both"]
        large = [row for row in chosen if row["floor_seconds"] >= SHORT]
        short = [row for row in chosen if row["floor_seconds"] < SHORT]
        if large or not short:
            found.append(lowest(op, ">= 80% of a copy of its bytes", large, share, 0.8, "{:.0%}"))
        if short:
            demand = "<= 3 us beyond an empty launch"
            found.append(lowest(f"{op}, small", demand, short, lambda row: -beyond(row), -LAUNCH_MARGIN, beyond_text))
    return found


def step_bars(rows: list[Row]) -> list[Bar]:
    """Of whole steps, the optimizer included; the fastest arm of each side counts, those in FP8 aside."""
    rows = [row for row in rows if row.get("float8", "off") == "off"]
    found = []
    for model in (MAIN_MODEL, *MODELS):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["step_p50_seconds"])
        best = [row for row in mine if row["backend"] == "triton"][:1]
        plain = [row for row in mine if row["backend"] == "reference"]
        eager = [row for row in plain if not row["compiled"]][:1]
        compiled = [row for row in plain if row["compiled"]][:1]
        name = f"step of {model}"
        if model == MAIN_MODEL:
            found.append(against(name, ">= 3.0x plain, eager", best, eager, "step_p50_seconds", 3.0))
            found.append(against(name, ">= 1.4x plain, compiled", best, compiled, "step_p50_seconds", 1.4))
            found.append(memory(name, best, eager))
            demand = ">= 40% of the matrix rate"
            found.append(lowest(name, demand, best, lambda row: row["step_share_of_matrix"], 0.4, "{:.0%}"))
        else:
            found.append(against(name, ">= 1.2x plain, compiled", best, compiled, "step_p50_seconds", 1.2))
    return found


def against(what: str, demand: str, ours: list[Row], plain: list[Row], key: str, least: float) -> Bar:
    """How many times more than ours plain takes."""
    if not ours or not plain:
        return Bar(what, demand, "-", None)
    times = plain[0][key] / ours[0][key]
    return Bar(what, demand, f"x{times:.2f}", times >= least)


def memory(what: str, ours: list[Row], plain: list[Row]) -> Bar:
    """What the passes need beside weights and gradients."""
    demand, key = "<= 0.5x the memory of plain", "step_memory_bytes"
    if not ours or not plain:
        return Bar(what, demand, "-", None)
    share_of_plain = ours[0][key] / plain[0][key]
    return Bar(what, demand, f"x{share_of_plain:.2f}", share_of_plain <= 0.5)


def lowest(
    what: str,
    demand: str,
    rows: list[Row],
    value: Callable[[Row], float],
    least: float,
    text: str | Callable[[Row], str],
) -> Bar:
    """The row that is furthest below.

    Args:
        text: of its value, or of all of it.
    """
    if not rows:
        return Bar(what, demand, "-", None)
    worst = min(rows, key=value)
    measured = text.format(value(worst)) if isinstance(text, str) else text(worst)
    where = f" ({worst['case']}, batch {worst['batch']}, {worst['pass']})" if "case" in worst else ""
    return Bar(what, demand, measured + where, value(worst) >= least)


def share(row: Row) -> float:
    return row["share_of_copy"]


def beyond(row: Row) -> float:
    """Seconds beyond an empty launch."""
    return row["p50_seconds"] - row["ceilings"]["launch_seconds"]


def beyond_text(row: Row) -> str:
    """With what the bytes alone take, which no kernel undercuts."""
    return f"{beyond(row) * 1e6:.1f} us, of which {row['floor_seconds'] * 1e6:.1f} us for its bytes"


def window_of(row: Row) -> int:
    return round((row["shapes"]["table"][0] ** 0.5 + 1) / 2)


def peer_times(row: Row, rows: list[Row], peers: tuple[str, ...] = PEERS) -> list[float]:
    """Of the same pass of the same case."""
    keys = ("op", "case", "pass", "dtype", "batch")
    same = [other for other in rows if all(other[key] == row[key] for key in keys)]
    return [other["p50_seconds"] for other in same if other["implementation"] in peers]


def lead(row: Row, rows: list[Row], peers: tuple[str, ...] = PEERS) -> float:
    """How many times longer the fastest peer takes."""
    return min(peer_times(row, rows, peers)) / row["p50_seconds"]


def table(found: list[Bar]) -> str:
    """One line a demand."""
    words = {True: "pass", False: "FAIL", None: "not measured"}
    lines = [(words[bar.met], bar.what, bar.demand, bar.measured) for bar in found]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )
