"""Plots and a table of rows. Whatever they show is computed from the rows, so they are drawn again at any time."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.replicating.arms import ARMS, BASELINE, ROW_COLOUR
from benchmarks.replicating.charts import Panel, Point, render_panels
from benchmarks.replicating.pieces import Row
from benchmarks.replicating.sizes import Size
from benchmarks.replicating.statistics import FEATURELESS, FINETUNED, LEVEL, PROBED, Metric, Summary, summarise
from sgmim_fast.errors import UserError

_PLOTTED = ("RMSE", "mIoU")
_ORDER = (*ARMS, ROW_COLOUR)


def write_report(rows: Sequence[Row], size: Size, factor: float, folder: Path) -> list[Path]:
    """Write ``claim_labels.svg``, ``claim_pretraining.svg`` and ``claim_table.md``. Returns what was written.

    Raises:
        UserError: if there are no rows of this size and rate.
    """
    own = rows_of(rows, size, factor)
    if not own:
        raise UserError(f"there are no rows of size {size.name} with rates x {factor:g} yet; run it without --report")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"claim_table.md": table(own, size)}
    if any(row["stage"] != "pretrain" for row in own):
        files["claim_labels.svg"] = label_efficiency(own)
    if any(row["figures"].get("curve") for row in own):
        files["claim_pretraining.svg"] = pretraining_curves(own)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def rows_of(rows: Iterable[Row], size: Size, factor: float) -> list[Row]:
    """Rows of one size and rate; those that no rate enters belong to every rate."""
    return [
        row
        for row in rows
        if row["size"] == size.name and (row["lr_factor"] == factor or row["arm"] in ("scratch", ROW_COLOUR))
    ]


def label_efficiency(rows: Sequence[Row]) -> str:
    """Figures over the number of labelled images, means with the standard deviation over seeds."""
    panels = []
    for metric in (*FINETUNED, *PROBED):
        if metric.label.startswith("k-NN") or not metric.label.split(",")[0].endswith(_PLOTTED):
            continue
        found = summarise(rows, [metric])
        lines = {
            arm: sorted(
                (Point(s.labels, s.mean, s.deviation) for s in found if s.arm == arm), key=lambda point: point.x
            )
            for arm in _ORDER
        }
        title = f"{metric.label} ({metric.better} is better)"
        panels.append(Panel(title, "labelled images", {arm: line for arm, line in lines.items() if line}))
    return render_panels(panels)


def pretraining_curves(rows: Sequence[Row]) -> str:
    """The loss of every arm over its pre-training, mean of the seeds; losses of different arms are different things."""
    lines: dict[str, list[Point]] = {}
    for arm in _ORDER:
        curves = [
            row["figures"]["curve"]
            for row in rows
            if row["arm"] == arm and row["stage"] == "pretrain" and row["figures"]
        ]
        if curves:
            means = [fmean(values) for values in zip(*curves, strict=True)]
            lines[arm] = [Point(100 * (place + 0.5) / len(means), value) for place, value in enumerate(means)]
    return render_panels([Panel("loss of pre-training", "% of the steps", lines, "linear", (0, 25, 50, 75, 100))])


def table(rows: Sequence[Row], size: Size) -> str:
    """Markdown: what was run, a table for each metric, and what each arm cost."""
    seeds = sorted({row["seed"] for row in rows})
    out = [
        f"Size {size.name}, seeds {', '.join(map(str, seeds))}; {size.test_scenes} test scenes of each set: unseen "
        "textures, furniture and cameras, and familiar ones. A cell is the mean over seeds ± their standard deviation, "
        f"then the mean difference to {BASELINE} on the same seeds with its {LEVEL:.0%} interval (Student's t).",
        "",
    ]
    for metric in (*FINETUNED, *PROBED):
        out += _metric_table(summarise(rows, [metric]), metric)
    out += _baselines(rows)
    out += _costs(rows)
    return "\n".join(out).rstrip() + "\n"


def _metric_table(found: Sequence[Summary], metric: Metric) -> list[str]:
    if not found:
        return []
    labels = sorted({summary.labels for summary in found})
    cells = {(summary.arm, summary.labels): _cell(summary) for summary in found}
    head = (
        f"| {metric.label}, {metric.better} is better | " + " | ".join(f"{count:,} labels" for count in labels) + " |"
    )
    out = [head, "|---" * (len(labels) + 1) + "|"]
    for arm in (arm for arm in _ORDER if any((arm, count) in cells for count in labels)):
        out.append(f"| {arm} | " + " | ".join(cells.get((arm, count), "") for count in labels) + " |")
    return [*out, ""]


def _cell(summary: Summary) -> str:
    text = f"{summary.mean:.4f}"
    if summary.deviation is not None:
        text += f" ± {summary.deviation:.4f}"
    gap = summary.difference
    if gap is None:
        return text
    text += f"; {gap.mean:+.4f}"
    return text if gap.interval is None else f"{text} [{gap.interval[0]:+.4f}, {gap.interval[1]:+.4f}]"


def _baselines(rows: Sequence[Row]) -> list[str]:
    """What can be said without features: the same for every arm, so one arm's rows hold it."""
    own = [row for row in rows if row["arm"] == ROW_COLOUR]
    found = [summary for metric in FEATURELESS for summary in summarise(own, [metric])]
    if not found:
        return []
    out = ["| without features | labels | value |", "|---|---|---|"]
    out += [f"| {s.metric.label} | {s.labels:,} | {s.mean:.4f} |" for s in sorted(found, key=lambda s: s.labels)]
    return [*out, ""]


def _costs(rows: Sequence[Row]) -> list[str]:
    """Of pre-training."""
    out = ["| arm | seconds of pre-training | images | images a step | images a second |", "|---|---|---|---|---|"]
    for arm in _ORDER:
        own = [
            row["cost"] for row in rows if row["arm"] == arm and row["stage"] == "pretrain" and "images" in row["cost"]
        ]
        if own:
            seconds, rate = (fmean(cost[key] for cost in own) for key in ("train_seconds", "images_per_second"))
            first = own[0]
            out.append(f"| {arm} | {seconds:.1f} | {first['images']:,} | {first['images_per_step']} | {rate:.1f} |")
    return out if len(out) > 2 else []
