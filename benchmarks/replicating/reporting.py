"""Plots and a table of rows. Whatever they show is computed from the rows, so they are drawn again at any time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.replicating.arms import ARMS, BASELINE, ROW_COLOUR
from benchmarks.replicating.charts import Panel, Point, render_panels
from benchmarks.replicating.pieces import Piece, Row, fingerprint, piece_of, variant_of
from benchmarks.replicating.sets import TEST_SETS
from benchmarks.replicating.sizes import Size, Variant
from benchmarks.replicating.statistics import (
    FEATURELESS,
    FINETUNED,
    LEVEL,
    PROBED,
    Metric,
    Summary,
    bootstrap_difference,
    depth_figure,
    mean_iou,
    summarise,
)
from sgmim_fast.errors import UserError
from sgmim_fast.tasks.depth_metrics import DEPTH_METRICS

_PLOTTED = (
    "linear depth SILog",
    "k-NN depth SILog",
    "linear mIoU",
    "k-NN mIoU",
    "fine-tuned depth RMSE",
    "fine-tuned depth SILog",
    "fine-tuned mIoU",
)
RMSE = DEPTH_METRICS.index("rmse")
_ORDER = (*ARMS, ROW_COLOUR)


def write_report(
    rows: Sequence[Row],
    size: Size,
    variant: Variant,
    folder: Path,
    images: Callable[[Piece], Path] | None = None,
) -> list[Path]:
    """Write ``claim_table.md`` and what there are rows for: ``claim_labels.svg``, ``claim_pretraining.svg``,
    ``claim_length.svg``. Returns what was written.

    Args:
        images: see ``resampled``, which the table then ends with; None leaves it out.

    Raises:
        UserError: if there are no rows of this size and variant.
    """
    own = rows_of(rows, size, variant)
    if not own:
        raise UserError(
            f"there are no rows of size {size.name}, as its settings are now, with rate x {variant.rate:g} and length "
            f"x {variant.length:g}; run it without --report"
        )
    folder.mkdir(parents=True, exist_ok=True)
    more = [] if images is None else resampled(own, size, images)
    files = {"claim_table.md": "\n".join([table(own, size), *more])}
    if any(row["stage"] != "pretrain" for row in own):
        files["claim_labels.svg"] = label_efficiency(own)
    if any(row["figures"].get("curve") for row in own):
        files["claim_pretraining.svg"] = pretraining_curves(own)
    if (lengths := length_curves(rows, size, variant)) is not None:
        files["claim_length.svg"] = lengths
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def rows_of(rows: Iterable[Row], size: Size, variant: Variant) -> list[Row]:
    """Rows of one size as its settings are now, and of one way to pre-train."""
    found = []
    for row in rows:
        if row["size"] != size.name or row["arm"] not in _ORDER:
            continue
        piece = piece_of(row)
        if piece.variant == variant_of(piece.arm, variant) and row["fingerprint"] == fingerprint(size, piece):
            found.append(row)
    return found


def length_curves(rows: Sequence[Row], size: Size, variant: Variant) -> str | None:
    """Figures over the steps of pre-training, with the fewest labels; None if there is one length only."""
    found = {length: rows_of(rows, size, replace(variant, length=length)) for length in size.lengths}
    found = {length: own for length, own in found.items() if any(row["arm"] == BASELINE for row in own)}
    if len(found) < 2:
        return None
    panels = []
    for metric in _plotted():
        lines: dict[str, list[Point]] = {}
        for length, own in sorted(found.items()):
            steps = size.steps(replace(variant, length=length))
            for summary in summarise(own, [metric]):
                if summary.labels == size.labels[0] and summary.arm in ARMS and summary.arm != "scratch":
                    lines.setdefault(summary.arm, []).append(Point(steps, summary.mean, summary.deviation))
        lines = {arm: points for arm, points in lines.items() if len(points) > 1}
        panels.append(Panel(f"{metric.label}, {size.labels[0]} labels", "steps of pre-training", lines))
    return render_panels(panels, columns=3)


def _plotted() -> list[Metric]:
    """On unseen scenes."""
    return [metric for metric in (*PROBED, *FINETUNED) if metric.label in [f"{name}, unseen" for name in _PLOTTED]]


def label_efficiency(rows: Sequence[Row]) -> str:
    """Figures over the number of labelled images, means with the standard deviation over seeds."""
    panels = []
    for metric in _plotted():
        found = summarise(rows, [metric])
        lines = {
            arm: sorted(
                (Point(s.labels, s.mean, s.deviation) for s in found if s.arm == arm), key=lambda point: point.x
            )
            for arm in _ORDER
        }
        title = f"{metric.label} ({metric.better} is better)"
        panels.append(Panel(title, "labelled images", {arm: line for arm, line in lines.items() if line}))
    return render_panels(panels, columns=3)


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
    out += baselines(rows)
    out += costs(rows)
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


def baselines(rows: Sequence[Row]) -> list[str]:
    """What can be said without features: the same for every arm, so one arm's rows hold it."""
    own = [row for row in rows if row["arm"] == ROW_COLOUR]
    found = [summary for metric in FEATURELESS for summary in summarise(own, [metric])]
    if not found:
        return []
    out = ["| without features | labels | value |", "|---|---|---|"]
    out += [f"| {s.metric.label} | {s.labels:,} | {s.mean:.4f} |" for s in sorted(found, key=lambda s: s.labels)]
    return [*out, ""]


def resampled(rows: Sequence[Row], size: Size, images: Callable[[Piece], Path], draws: int = 1000) -> list[str]:
    """Markdown of differences to the baseline with intervals over test images, the seeds as they are.

    Args:
        images: where a piece's figures of single images are; pieces without such a file are left out.
        draws: sets of images.
    """
    out = []
    for stage, figure, label in (("depth", depth_figure(RMSE), "depth RMSE"), ("segmentation", mean_iou, "mIoU")):
        pieces = [piece for piece in map(piece_of, rows) if piece.stage == stage and images(piece).is_file()]
        base = {(piece.seed, piece.labels): piece for piece in pieces if piece.arm == BASELINE}
        for arm in (arm for arm in _ORDER if arm != BASELINE):
            for labels in size.labels:
                own = [p for p in pieces if p.arm == arm and p.labels == labels and (p.seed, labels) in base]
                if not own:
                    continue
                for name in TEST_SETS:
                    one = [np.load(images(piece))[name].astype(np.float64) for piece in own]
                    other = [np.load(images(base[piece.seed, labels]))[name].astype(np.float64) for piece in own]
                    low, high = bootstrap_difference(one, other, figure, draws)
                    out.append(f"| {label}, {name} | {labels:,} | {arm} | {len(own)} | [{low:+.4f}, {high:+.4f}] |")
    head = [
        f"| fine-tuned, set | labels | arm | seeds | {LEVEL:.0%} interval of the difference to {BASELINE} |",
        "|---|---|---|---|---|",
    ]
    return [*head, *out, ""] if out else []


def costs(rows: Sequence[Row]) -> list[str]:
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
