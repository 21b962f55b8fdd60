"""Plots as SVG, the same text for the same numbers: bars, stacked bars, lines and rooflines."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from sgmim_fast.report.curves import nice_ticks

COLORS = ("#3b6fb6", "#d9822b", "#4c9a5b", "#a65d9e", "#7f6a55", "#c4504b", "#6e7f8d", "#b59f2f")
WIDTH, LEFT, RIGHT, TOP, BAR = 760, 230, 90, 62, 22
LETTER, LINE = 7, 18  # about the width of a letter, and what a line of text takes
FONT = "font-family='system-ui, sans-serif'"


def document(height: float, title: str, body: Sequence[str], width: int = WIDTH) -> str:
    """A picture on white, whatever is around it."""
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height:.0f}' width='{width}' "
        f"height='{height:.0f}' role='img' {FONT} font-size='12'>",
        f"<title>{escape(title)}</title>",
        "<rect width='100%' height='100%' fill='#ffffff'/>",
        text(16, 24, title, size=15, weight="600"),
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(
    x: float, y: float, words: str, anchor: str = "start", size: int = 12, weight: str = "400", color: str = "#222222"
) -> str:
    look = f"text-anchor='{anchor}' font-size='{size}' font-weight='{weight}' fill='{color}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {look}>{escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, color: str = "#d5d5d5", width: float = 1, dash: str = "") -> str:
    look = f"stroke='{color}' stroke-width='{width:g}'" + (f" stroke-dasharray='{dash}'" if dash else "")
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' {look}/>"


def with_legend(height: float, title: str, names: Sequence[str], body: Sequence[str]) -> str:
    """The picture ``body``, moved down where its coloured names need more than one line; no names, no legend."""
    found = []
    x, y = 16.0, 46.0
    for number, name in enumerate(names):
        width = 34 + LETTER * len(name)
        if x > 16 and x + width - 18 > WIDTH:
            x, y = 16.0, y + LINE
        found.append(
            f"<rect x='{x:.1f}' y='{y - 10:.1f}' width='11' height='11' fill='{COLORS[number % len(COLORS)]}'/>"
        )
        found.append(text(x + 16, y, name))
        x += width
    if y == 46:
        return document(height, title, [*found, *body])
    return document(height + y - 46, title, [*found, f"<g transform='translate(0 {y - 46:g})'>", *body, "</g>"])


def stacked(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A bar for each row, in pieces by name; simple bars where each row has one piece."""
    pieces = list(dict.fromkeys(name for row in rows.values() for name in row))
    most = max((sum(row.values()) for row in rows.values()), default=1.0)
    ticks = nice_ticks(0.0, most)
    left = max(LEFT, 8 + LETTER * max(map(len, rows), default=0))
    scale = (WIDTH - left - RIGHT) / ticks[-1]
    bottom = TOP + BAR * 1.4 * len(rows)
    body = []
    for tick in ticks:
        x = left + tick * scale
        body += [line(x, TOP - 4, x, bottom), text(x, bottom + 16, f"{tick:g}", "middle", color="#666666")]
    body.append(text((left + WIDTH - RIGHT) / 2, bottom + 34, unit, "middle", color="#666666"))
    for number, (name, row) in enumerate(rows.items()):
        y, x = TOP + BAR * 1.4 * number, float(left)
        body.append(text(left - 8, y + BAR * 0.7, name, "end"))
        for piece, value in row.items():
            color = COLORS[pieces.index(piece) % len(COLORS)]
            body.append(
                f"<rect x='{x:.1f}' y='{y:.1f}' width='{value * scale:.1f}' height='{BAR}' fill='{color}'>"
                f"<title>{escape(f'{name}, {piece}: {value:.4g}')}</title></rect>"
            )
            x += value * scale
        body.append(text(x + 6, y + BAR * 0.7, f"{sum(row.values()):.3g}"))
    return with_legend(bottom + 46, title, pieces if len(pieces) > 1 else [], body)


def curves(title: str, x_name: str, y_name: str, x: Sequence[float], lines: Mapping[str, Sequence[float]]) -> str:
    """Lines over common points."""
    values = [value for one in lines.values() for value in one if math.isfinite(value)]
    ticks, marks = nice_ticks(min(values), max(values), 5), nice_ticks(0.0, max(x), 5)
    left, right, bottom = 70, WIDTH - 20, 400

    def at(a: float, b: float) -> tuple[float, float]:
        across = left + (right - left) * a / marks[-1]
        return across, bottom - (bottom - TOP) * (b - ticks[0]) / (ticks[-1] - ticks[0])

    body = []
    for tick in ticks:
        _, y = at(0, tick)
        body += [line(left, y, right, y), text(left - 8, y + 4, f"{tick:g}", "end", color="#666666")]
    for mark in marks:
        body.append(text(at(mark, 0)[0], bottom + 16, f"{mark:g}", "middle", color="#666666"))
    body.append(text((left + right) / 2, bottom + 34, f"{x_name}; {y_name} upward", "middle", color="#666666"))
    for number, one in enumerate(lines.values()):
        points = " ".join("{:.1f},{:.1f}".format(*at(a, b)) for a, b in zip(x, one, strict=True) if math.isfinite(b))
        color = COLORS[number % len(COLORS)]
        dash = " stroke-dasharray='5 3'" if number else ""
        body.append(f"<polyline points='{points}' fill='none' stroke='{color}' stroke-width='1.6'{dash}/>")
    return with_legend(bottom + 46, title, list(lines), body)


def roofline(title: str, copy: float, matrix: float, points: Mapping[str, Sequence[tuple[float, float, str]]]) -> str:
    """FLOP/s over FLOP a byte, both logarithmic, under the ceilings of copying and of multiplying.

    Args:
        copy, matrix: bytes and FLOP a second.
        points: by series: FLOP a byte, FLOP/s, and what it is.
    """
    every = [point for series in points.values() for point in series]
    ridge = matrix / copy
    low = 10 ** math.floor(math.log10(min([ridge / 10, *(p[0] for p in every)])))
    high = 10 ** math.ceil(math.log10(max([ridge * 10, *(p[0] for p in every)])))
    top = 10 ** math.ceil(math.log10(matrix))
    base = 10 ** math.floor(math.log10(min([low * copy, *(p[1] for p in every)])))
    left, right, bottom = 90, WIDTH - 20, 460

    def at(a: float, b: float) -> tuple[float, float]:
        across = left + (right - left) * math.log(a / low) / math.log(high / low)
        return across, bottom - (bottom - TOP) * math.log(b / base) / math.log(top / base)

    body = []
    for power in range(round(math.log10(base)), round(math.log10(top)) + 1):
        y = at(low, 10.0**power)[1]
        body += [
            line(left, y, right, y),
            text(left - 8, y + 4, f"{10.0 ** (power - 12):g} TFLOP/s", "end", 11, color="#666666"),
        ]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        x = at(10.0**power, base)[0]
        body += [line(x, TOP, x, bottom), text(x, bottom + 16, f"{10.0**power:g}", "middle", 11, color="#666666")]
    body.append(text((left + right) / 2, bottom + 34, "FLOP a byte that must move", "middle", color="#666666"))
    corner, start = at(ridge, matrix), max(low, base / copy)
    body += [line(*at(start, start * copy), *corner, "#444444", 2), line(*corner, *at(high, matrix), "#444444", 2)]
    for number, series in enumerate(points.values()):
        color = COLORS[number % len(COLORS)]
        for intensity, rate, what in series:
            x, y = at(intensity, rate)
            body.append(
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{color}' fill-opacity='0.8'>"
                f"<title>{escape(what)}</title></circle>"
            )
    return with_legend(bottom + 46, title, list(points), body)
