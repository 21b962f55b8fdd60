"""Curves over the steps of a run: inline SVG that needs no script, and the numbers for its read-out.

The plot area is stretched to whatever width there is; all text is HTML beside it, so it keeps its size.
"""

import json
import math
from collections.abc import Callable, Sequence
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


def render_charts(rows: Sequence[Row]) -> str:
    """All charts and the numbers behind them; ``rows`` must not be empty."""
    groups = np.array_split(np.arange(len(rows)), min(len(rows), POINTS))
    keys = {"step", "epoch", *(line.key for chart in CHARTS for line in chart.series)}
    table = {key: _column(rows, key) for key in keys}
    grouped = {key: np.array([_mean(column[group]) for group in groups]) for key, column in table.items()}
    # The last step of a group names it: that is when its mean is known.
    steps = np.array([table["step"][group[-1]] for group in groups])
    start, x = _positions(steps)
    shown = [chart for chart in CHARTS if np.isfinite([grouped[line.key] for line in chart.series]).any()]
    figures = "".join(_render_chart(chart, steps, start, x, grouped) for chart in shown)
    readout = {
        "x": [round(float(value), 5) for value in x],
        "at": [f"step {int(s):,}, epoch {e:.2f}" for s, e in zip(steps, grouped["epoch"], strict=True)],
        "values": {
            line.key: [format_value(value, chart.percent) for value in grouped[line.key]]
            for chart in shown
            for line in chart.series
            if np.isfinite(grouped[line.key]).any()
        },
    }
    # "<" could end the script element early; JSON may spell it this way.
    numbers = json.dumps(readout, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    merged = ""
    if len(groups) < len(rows):
        merged = f" Each point is the mean of about {round(len(rows) / len(groups))} of the {len(rows):,} logged rows."
    return (
        f'<p class="hint">Bold: smoothed; faint: as logged.{merged} <span class="script-only">Point at a curve, or '
        "focus it and use the arrow keys, to read all of them at one step.</span></p>"
        f'<div class="charts">{figures}</div>'
        f'<script type="application/json" id="readout">{numbers}</script>'
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


def _render_chart(
    chart: Chart,
    steps: NDArray[np.float64],
    start: float,
    x: NDArray[np.float64],
    columns: dict[str, NDArray[np.float64]],
) -> str:
    lines = [line for line in chart.series if np.isfinite(columns[line.key]).any()]
    everything = np.concatenate([columns[line.key] for line in lines])
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
        raw = columns[line.key]
        if chart.exact:
            even = raw
        else:
            even = np.exp(smooth(np.log(raw))) if logarithmic else smooth(raw)
            curves += f'<path class="raw {line.key}" d="{_path(x, height, raw)}"/>'
        curves += f'<path class="line {line.key}" d="{_path(x, height, even)}"/>'
    legend = "".join(
        f'<span class="entry"><i class="swatch {line.key}"></i>{escape(line.label)} '
        f'<span class="value" data-key="{line.key}">{_last(columns[line.key], chart.percent)}</span></span>'
        for line in lines
    )
    unit = f"{chart.unit}, logarithmic" if logarithmic else chart.unit
    name = f"{chart.title}, {unit}"
    summary = f"{name}, from step {int(steps[0]):,} to {int(steps[-1]):,}. " + " ".join(
        f"{line.label}: {_first(columns[line.key], chart.percent)} at first, "
        f"{_last(columns[line.key], chart.percent)} at last."
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
