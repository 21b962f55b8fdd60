"""Tables and plots of what structured guidance does to features, from the rows of ``benchmarks.replication``."""

from collections.abc import Callable, Iterable
from functools import partial

from benchmarks.recorded import Results
from benchmarks.replicating.arms import ARMS, COMPARED, METHOD, ROW_COLOUR
from benchmarks.replicating.pieces import BENCHMARK, Row
from benchmarks.replicating.reporting import (
    baselines,
    costs,
    label_efficiency,
    length_curves,
    pretraining_curves,
    rows_of,
)
from benchmarks.replicating.reporting import table as every_table
from benchmarks.replicating.sizes import SIZES, USUAL
from benchmarks.replicating.statistics import FINETUNED, LEVEL, PROBED, Metric, Summary, summarise
from benchmarks.tables import NOT_MEASURED, reproduce, table

SIZE = SIZES["micro"]
UNMEASURED = f"Size {SIZE.name}: {NOT_MEASURED}."
COMMAND = f"python -m benchmarks.replication --size {SIZE.name}"
MAIN = (
    "linear depth SILog",
    "linear depth RMSE",
    "k-NN depth SILog",
    "linear mIoU",
    "k-NN mIoU",
    "fine-tuned depth RMSE",
    "fine-tuned depth AbsRel",
    "fine-tuned depth d1",
    "fine-tuned depth SILog",
    "fine-tuned mIoU",
)
FEW = ("linear depth SILog", "k-NN depth SILog", "linear mIoU", "k-NN mIoU", "fine-tuned depth RMSE", "fine-tuned mIoU")


def recorded(results: Results) -> list[Row]:
    """Rows of the size as its settings are now."""
    return rows_of(results.of(BENCHMARK), SIZE, USUAL)


def metrics(names: Iterable[str], scenes: str) -> list[Metric]:
    """Metrics by their names, on one set of test scenes."""
    labels = {metric.label: metric for metric in (*FINETUNED, *PROBED)}
    return [labels[f"{name}, {scenes}"] for name in names]


# -- tables


def main(results: Results, scenes: str = "unseen") -> list[str]:
    """The method beside SimMIM and no pre-training, at every number of labels."""
    rows, lines = recorded(results), []
    for metric in metrics(MAIN, scenes):
        found = {(summary.arm, summary.labels): summary for summary in summarise(rows, [metric])}
        for labels in SIZE.labels:
            if (METHOD, labels) in found:
                cells = [_spread(found.get((arm, labels)), metric) for arm in COMPARED]
                lines.append((_named(metric), f"{labels:,}", *cells, _difference(found[METHOD, labels])))
    if not lines:
        return [UNMEASURED]
    titles = (f"{scenes} scenes", "labels", "from scratch", "SimMIM", "SG-MIM", f"SG-MIM less SimMIM, {LEVEL:.0%}")
    return table(titles, lines)


def ablations(results: Results) -> list[str]:
    """Every arm with the fewest labels, and in brackets its mean difference to the method on the same seeds."""
    rows, chosen = recorded(results), metrics(FEW, "unseen")
    columns = []
    for metric in chosen:
        found = summarise(rows, [metric], METHOD)
        columns.append({summary.arm: summary for summary in found if summary.labels == SIZE.labels[0]})
    lines = []
    for arm in (*ARMS, ROW_COLOUR):
        cells = [
            _against(column.get(arm), metric, arm == METHOD) for column, metric in zip(columns, chosen, strict=True)
        ]
        if any(cells):
            lines.append((arm, *cells))
    return table(("arm", *map(_named, chosen)), lines) if lines else [UNMEASURED]


def floor(results: Results) -> list[str]:
    """What needs no features, and the truth on the grid of tokens."""
    return baselines(recorded(results))[:-1] or [UNMEASURED]


def cost(results: Results) -> list[str]:
    """Of pre-training."""
    return costs(recorded(results)) or [UNMEASURED]


def everything(results: Results) -> list[str]:
    """All metrics of all arms."""
    rows = recorded(results)
    return every_table(rows, SIZE).splitlines() if rows else [UNMEASURED]


def origin(results: Results) -> list[str]:
    """Where and by which commands the rows were made."""
    rows = [row for row in results.of(BENCHMARK) if row["size"] == SIZE.name]
    places = {
        f"Measured in {row['precision']}, one process a core, on an {row['environment']['cpu']}, torch "
        f"{row['environment']['torch']}, commit {row['environment']['commit'][:7]}."
        for row in rows
    }
    return [*(sorted(places) or [UNMEASURED]), *reproduce(rows, COMMAND)]


def _named(metric: Metric) -> str:
    arrow = "↓" if metric.better == "lower" else "↑"
    return f"{metric.label.split(',')[0]} {arrow}"


def _places(metric: Metric) -> int:
    return 2 if metric.label.split(",")[0].endswith("SILog") else 3


def _spread(summary: Summary | None, metric: Metric) -> str:
    """Mean and standard deviation over seeds."""
    if summary is None:
        return ""
    places = _places(metric)
    text = f"{summary.mean:.{places}f}"
    return text if summary.deviation is None else f"{text} ± {summary.deviation:.{places}f}"


def _difference(summary: Summary) -> str:
    """Mean and interval; bold where the interval leaves no doubt about the sign."""
    gap, places = summary.difference, _places(summary.metric)
    if gap is None:
        return ""
    text = f"{gap.mean:+.{places}f}"
    if gap.interval is None:
        return text
    low, high = gap.interval
    text += f" [{low:+.{places}f}, {high:+.{places}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _against(summary: Summary | None, metric: Metric, is_method: bool) -> str:
    text = _spread(summary, metric)
    if summary is None or is_method or summary.difference is None:
        return text
    gap = summary.difference
    more = f"{gap.mean:+.{_places(metric)}f}"
    sure = gap.interval is not None and (gap.interval[0] > 0 or gap.interval[1] < 0)
    return f"{text} ({f'**{more}**' if sure else more})"


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "claim": main,
    "claim-familiar": partial(main, scenes="familiar"),
    "claim-ablations": ablations,
    "claim-floor": floor,
    "claim-cost": cost,
    "claim-origin": origin,
    "claim-everything": everything,
}


# -- plots


def labels(results: Results) -> str | None:
    """Figures of the main arms over the number of labels."""
    rows = [row for row in recorded(results) if row["arm"] in (*COMPARED, ROW_COLOUR) and row["stage"] != "pretrain"]
    return label_efficiency(rows) if rows else None


def losses(results: Results) -> str | None:
    """Over pre-training, of the arms whose two losses weigh the same."""
    rows = [row for row in recorded(results) if row["figures"].get("curve") and "weight" not in row["arm"]]
    return pretraining_curves(rows) if rows else None


PLOTS: dict[str, Callable[[Results], str | None]] = {
    "claim-labels": labels,
    "claim-pretraining": losses,
    "claim-length": lambda results: length_curves(results.of(BENCHMARK), SIZE, USUAL),
}
