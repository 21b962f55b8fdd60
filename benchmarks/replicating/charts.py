"""Charts as SVG files that stand alone: lines of arms over an axis, with whiskers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from sgmim_fast.report.curves import nice_ticks

COLOURS = {
    "scratch": "#6b7280",
    "simmim": "#b45309",
    "sgmim": "#1d4ed8",
    "sgmim-visible": "#0891b2",
    "structure-same-cells": "#7c3aed",
    "structure-loss-everywhere": "#be185d",
    "structure-weight-0.1": "#65a30d",
    "structure-weight-10": "#166534",
    "fourth-channel": "#dc2626",
    "sgmim-normals": "#0f172a",
    "row-colour": "#d1b000",
}
_OTHER = "#333333"
_WIDTH, _HEIGHT = 340, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 28, 34
_LINE = 16  # of the legend
_LEGEND = 190


@dataclass(frozen=True)
class Point:
    """A value, and how far it spreads to either side."""

    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True)
class Panel:
    """Lines that share axes."""

    title: str
    x_label: str
    lines: Mapping[str, Sequence[Point]]
    """By arm, each in order of x."""
    scale: Literal["log", "linear"] = "log"
    ticks: Sequence[float] | None = None
    """Of the x axis; None marks every x there is."""


def render_panels(panels: Sequence[Panel], columns: int = 2) -> str:
    """An SVG document of panels in rows, with one legend to their right.

    Lines whose name begins with the name of an arm have its colour.
    """
    shown = [panel for panel in panels if any(panel.lines.values())]
    if not shown:
        raise ValueError("there is nothing to draw")
    columns = min(columns, len(shown))
    names = list(dict.fromkeys(name for panel in shown for name in panel.lines))
    rows = math.ceil(len(shown) / columns)
    width = columns * _WIDTH + _LEGEND
    height = max(rows * _HEIGHT, 24 + _LINE * len(names))
    parts = [
        _panel(panel, number % columns * _WIDTH, number // columns * _HEIGHT) for number, panel in enumerate(shown)
    ]
    legend = "".join(
        f'<g transform="translate({columns * _WIDTH + 10} {20 + _LINE * number})">'
        f'<path d="M0 0h18" stroke="{colour(name)}" stroke-width="3"/><text x="24" y="4">{escape(name)}</text></g>'
        for number, name in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" fill="#222"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}{legend}</svg>\n"
    )


def colour(name: str) -> str:
    """Of a line."""
    return COLOURS.get(name.split(" ")[0], _OTHER)


def _panel(panel: Panel, left: float, top: float) -> str:
    points = [point for line in panel.lines.values() for point in line]
    bounds = [point.y + sign * (point.spread or 0) for point in points for sign in (-1, 1)]
    ticks = nice_ticks(min(bounds), max(bounds))
    place = math.log if panel.scale == "log" else float
    x_ticks = panel.ticks or sorted({point.x for point in points})
    xs = [place(x) for x in (*(point.x for point in points), *x_ticks)]
    low, high = min(xs), max(xs)
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(x: float) -> float:
        share = 0.5 if high == low else (place(x) - low) / (high - low)
        return _LEFT + inner_width * (0.04 + 0.92 * share)

    def down(y: float) -> float:
        return _TOP + inner_height * (ticks[-1] - y) / (ticks[-1] - ticks[0])

    out = [f'<text x="8" y="16" font-weight="bold">{escape(panel.title)}</text>']
    for tick in ticks:
        out.append(f'<path d="M{_LEFT} {down(tick):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
    for tick in x_ticks:
        out.append(f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:,.6g}</text>')
    middle = _LEFT + inner_width / 2
    out.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(panel.x_label)}</text>')
    for name, line in panel.lines.items():
        out.append(_line(name, [(across(point.x), down(point.y)) for point in line]))
        for point in line:
            if point.spread:
                ends = f"{down(point.y - point.spread):.1f}V{down(point.y + point.spread):.1f}"
                out.append(f'<path d="M{across(point.x):.1f} {ends}" stroke="{colour(name)}" opacity="0.5"/>')
    return f'<g transform="translate({left} {top})">{"".join(out)}</g>'


def _line(name: str, places: Sequence[tuple[float, float]]) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour(name)}"/>' for x, y in places)
    marks = dots if len(places) <= 8 else ""
    return f'<path d="M{path}" fill="none" stroke="{colour(name)}" stroke-width="1.6"/>{marks}'
