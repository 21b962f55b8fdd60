"""Curves over the steps of a run: inline SVG that needs no script, and the numbers for its read-out.

The plot area is stretched to whatever width there is; all text is HTML beside it, so it keeps its size.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from sgmim_fast.report.run import Row

POINTS = 600
"""More logged rows than this are averaged in groups."""
_SCALE = 1000  # coordinates of the plot area run from 0 to this


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    key: str
    """Column of the metrics; also names its colour in the style sheet."""
    label: str


@dataclass(frozen=True)
class Chart:
    """Lines that share an axis."""

    title: str
    unit: str
    series: tuple[Series, ...]
    wide: bool = False
    zero: bool = False
    """The axis starts at zero, unless it is logarithmic."""
    spikes: bool = False
    """The axis is logarithmic if the largest value dwarfs the usual one."""
    percent: bool = False
    exact: bool = False
    """The values are set, not measured: nothing to smooth."""


CHARTS = (
    Chart(
        "Loss",
        "mean absolute error",
        (Series("loss", "total"), Series("image_loss", "image"), Series("structure_loss", "map")),
        wide=True,
    ),
    Chart("Learning rate", "of the optimizer", (Series("lr", "rate"),), zero=True, exact=True),
    Chart("Gradient norm", "before clipping", (Series("grad_norm", "norm"),), zero=True, spikes=True),
    Chart("Throughput", "images per second", (Series("images_per_second", "images/s"),), zero=True),
    Chart("Waiting for data", "share of the time", (Series("data_wait", "share"),), zero=True, percent=True),
    Chart("Utilisation", "model FLOPs, share of the peak (MFU)", (Series("mfu", "MFU"),), zero=True, percent=True),
)


@dataclass(frozen=True)
class _Line:
    """Where a series is drawn."""

    series: Series
    x: NDArray[np.float64]
    """Shares of the axis of steps."""
    values: NDArray[np.float64]


def render_charts(rows: Sequence[Row]) -> str:
    """All charts and the numbers behind them; ``rows`` must not be empty."""
    keys = {"step", "epoch", *(line.key for chart in CHARTS for line in chart.series)}
    grouped = _grouped(rows, keys)
    steps = grouped["step"]
    start, x = _positions(steps)
    shown = [chart for chart in CHARTS if np.isfinite([grouped[line.key] for line in chart.series]).any()]
    figures = "".join(
        _render_chart(chart, [_Line(line, x, grouped[line.key]) for line in chart.series], steps, start)
        for chart in shown
    )
    values = {
        line.key: [format_value(value, chart.percent) for value in grouped[line.key]]
        for chart in shown
        for line in chart.series
        if np.isfinite(grouped[line.key]).any()
    }
    at = [f"step {int(s):,}, epoch {e:.2f}" for s, e in zip(steps, grouped["epoch"], strict=True)]
    return _with_readout(figures, x, at, values, _merged(len(rows), len(steps)))


def render_overlay(chart: Chart, column: str, runs: Sequence[Sequence[Row]]) -> str:
    """One column of several runs over the steps of the longest.

    Args:
        chart: with a series for each run.
        column: of the metrics, known at some step of each.
        runs: rows, none empty.
    """
    found = [_grouped(rows, {"step", column}) for rows in runs]
    steps = np.unique(np.concatenate([run["step"] for run in found]))
    start, x = _positions(steps)
    lines, values = [], {}
    for series, run in zip(chart.series, found, strict=True):
        at = np.searchsorted(steps, run["step"])
        lines.append(_Line(series, x[at], run[column]))
        # Between the rows of one run that another has logged at, the last value holds; after the last there is none.
        latest = np.searchsorted(run["step"], steps, side="right") - 1
        known = (latest >= 0) & (steps <= run["step"][-1])
        values[series.key] = [format_value(run[column][i]) if k else "–" for i, k in zip(latest, known, strict=True)]
    merged = _merged(*max((len(rows), len(run["step"])) for rows, run in zip(runs, found, strict=True)))
    figure = _render_chart(chart, lines, steps, start)
    return _with_readout(figure, x, [f"step {int(step):,}" for step in steps], values, merged)


def _grouped(rows: Sequence[Row], keys: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """Columns; where there are many rows, means of groups, named by their last step: that is when a mean is known."""
    groups = np.array_split(np.arange(len(rows)), min(len(rows), POINTS))
    table = {key: _column(rows, key) for key in keys}
    found = {key: np.array([_mean(column[group]) for group in groups]) for key, column in table.items()}
    found["step"] = np.array([table["step"][group[-1]] for group in groups])
    return found


def _merged(rows: int, points: int) -> str:
    if points == rows:
        return ""
    return f" Each point is the mean of about {round(rows / points)} of the {rows:,} logged rows."


def _with_readout(
    figures: str, x: NDArray[np.float64], at: Sequence[str], values: Mapping[str, Sequence[str]], merged: str
) -> str:
    """Charts of which one step is read at a time."""
    readout = {"x": [round(float(value), 5) for value in x], "at": at, "values": values}
    # "<" could end the script element early; JSON may spell it this way.
    numbers = json.dumps(readout, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    return (
        f'<p class="hint">Bold: smoothed; faint: as logged.{merged} <span class="script-only">Point at a curve, or '
        "focus it and use the arrow keys, to read all of them at one step.</span></p>"
        f'<div class="charts">{figures}<script type="application/json" class="readout">{numbers}</script></div>'
    )


def format_value(value: float, percent: bool = False) -> str:
    """Three significant digits, or a dash for no number."""
    if not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.1f} %"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:,.0f}" if size >= 100 else f"{value:.{2 - math.floor(math.log10(size))}f}"


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that enclose ``low``..``high``, roughly ``about`` intervals; a lone number gets room around it."""
    if low == high:
        low, high = low - 0.5 * abs(low), high + 0.5 * abs(high) or 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred Gaussian mean over about a fortieth of the run; missing values (NaN) stay out, and stay missing."""
    sigma = len(values) / 80
    if sigma < 0.3:
        return values
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    known = np.isfinite(values)
    pad = len(reach) // 2
    total = np.convolve(np.pad(np.where(known, values, 0), pad), kernel, "valid")
    weight = np.convolve(np.pad(known.astype(float), pad), kernel, "valid")
    return np.where(known, total / np.maximum(weight, 1e-12), np.nan)


def _column(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    values = (row.get(key) for row in rows)
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _positions(steps: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Where the axis starts (zero if that is near), and the steps as shares of it; a single one is in the middle."""
    if len(steps) == 1:
        return float(steps[0]), np.full(1, 0.5)
    start = 0.0 if steps[0] <= 0.1 * steps[-1] else float(steps[0])
    return start, (steps - start) / (steps[-1] - start)


def _render_chart(chart: Chart, given: Sequence[_Line], steps: NDArray[np.float64], start: float) -> str:
    """
    Args:
        given: the chart's lines; those without a finite value are left out.
        steps: of the axis, which ends at the last.
        start: step at which the axis begins.
    """
    lines = [line for line in given if np.isfinite(line.values).any()]
    everything = np.concatenate([line.values for line in lines])
    ticks, height, logarithmic = _axis(chart, everything[np.isfinite(everything)])

    grid = "".join(f'<path class="rule" d="M0 {_SCALE * height(tick):.1f}H{_SCALE}"/>' for tick in ticks)
    y_labels = "".join(
        f'<span style="top:{100 * height(tick):.2f}%">{_tick_label(tick, ticks, chart.percent)}</span>'
        for tick in ticks
    )
    x_ticks = _step_ticks(start, float(steps[-1]))
    x_labels = "".join(f'<span style="left:{100 * share:.2f}%">{label}</span>' for share, label in x_ticks)
    grid += "".join(f'<path class="rule" d="M{_SCALE * share:.1f} 0V{_SCALE}"/>' for share, _ in x_ticks)
    curves = ""
    for line in lines:
        key, even = line.series.key, line.values
        if not chart.exact:
            even = np.exp(smooth(np.log(even))) if logarithmic else smooth(even)
            curves += f'<path class="raw {key}" d="{_path(line.x, height, line.values)}"/>'
        curves += f'<path class="line {key}" d="{_path(line.x, height, even)}"/>'
    legend = "".join(
        f'<span class="entry"><i class="swatch {line.series.key}"></i>{escape(line.series.label)} '
        f'<span class="value" data-key="{line.series.key}">{_last(line.values, chart.percent)}</span></span>'
        for line in lines
    )
    unit = f"{chart.unit}, logarithmic" if logarithmic else chart.unit
    name = f"{chart.title}, {unit}"
    summary = f"{name}, from step {int(steps[0]):,} to {int(steps[-1]):,}. " + " ".join(
        f"{line.series.label}: {_first(line.values, chart.percent)} at first, "
        f"{_last(line.values, chart.percent)} at last."
        for line in lines
    )
    return (
        f'<figure class="chart{" wide" if chart.wide else ""}"><figcaption>'
        f'<h3>{chart.title} <small>{unit}</small></h3><div class="legend">{legend}</div></figcaption>'
        f'<div class="frame"><div class="y-axis" aria-hidden="true">{y_labels}</div>'
        f'<div class="plot" data-name="{escape(name)}"><svg viewBox="0 0 {_SCALE} {_SCALE}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(summary)}">{grid}{curves}</svg><div class="cursor" hidden></div></div>'
        f'<div class="x-axis" aria-hidden="true">{x_labels}</div></div></figure>'
    )


def _axis(chart: Chart, values: NDArray[np.float64]) -> tuple[list[float], Callable[[float], float], bool]:
    """Ticks, the height of a value as a share from the top, and whether the axis is logarithmic."""
    low, high = float(values.min()), float(values.max())
    if chart.spikes and low > 0 and high > 20 * float(np.median(values)):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        powers = range(first, max(last, first + 1) + 1)
        span = powers[-1] - first
        ticks = [10.0**power for power in powers[:: math.ceil(span / 6)]]
        return ticks, lambda value: (powers[-1] - math.log10(value)) / span, True
    ticks = nice_ticks(min(low, 0.0) if chart.zero else low, high, 5 if chart.wide else 4)
    return ticks, lambda value: (ticks[-1] - value) / (ticks[-1] - ticks[0]), False


def _path(x: NDArray[np.float64], height: Callable[[float], float], values: NDArray[np.float64]) -> str:
    """SVG path that lifts the pen over missing values; a lone point becomes a dot through the round line cap."""
    out, down = [], False
    for share, value in zip(x, values, strict=True):
        if not math.isfinite(value):
            down = False
            continue
        out.append(f"{'L' if down else 'M'}{_SCALE * share:.1f} {_SCALE * height(float(value)):.1f}")
        if not down:
            out.append("h0")
        down = True
    return "".join(out)


def _step_ticks(first: float, last: float) -> list[tuple[float, str]]:
    """(share of the axis, label) of round steps inside the range."""
    if first == last:
        return [(0.5, f"step {int(first):,}")]
    inside = [tick for tick in nice_ticks(first, last, 6) if first <= tick <= last and tick == int(tick)]
    label = "{:.0f}" if last < 10_000 else "{:g}k"
    return [((tick - first) / (last - first), label.format(tick if last < 10_000 else tick / 1000)) for tick in inside]


def _tick_label(tick: float, ticks: list[float], percent: bool) -> str:
    if percent:
        return f"{100 * tick:.4g} %"
    if tick and max(map(abs, ticks)) < 1e-2:
        mantissa, exponent = f"{tick:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{tick:,.6g}"


def _first(values: NDArray[np.float64], percent: bool) -> str:
    return format_value(float(values[np.isfinite(values)][0]), percent)


def _last(values: NDArray[np.float64], percent: bool) -> str:
    return format_value(float(values[np.isfinite(values)][-1]), percent)
