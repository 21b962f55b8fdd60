"""Values of a run in words, and notes."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sgmim_fast.report.curves import format_value
from sgmim_fast.report.run import Row

LAST_ROWS = 5
"""Final values are means over so many logged steps."""


def known(rows: Sequence[Row], key: str) -> list[float]:
    """The values that are there."""
    return [value for row in rows if (value := row[key]) is not None]


def first_value(rows: Sequence[Row], key: str) -> str:
    """The first known value."""
    return format_value(next(iter(known(rows, key)), float("nan")))


def final_value(rows: Sequence[Row], key: str) -> str:
    """Mean of the last known values."""
    values = known(rows, key)[-LAST_ROWS:]
    return format_value(sum(values) / len(values)) if values else "–"


def median_value(rows: Sequence[Row], key: str, percent: bool = False) -> str:
    """Of the known values."""
    values = sorted(known(rows, key))
    return format_value(values[len(values) // 2], percent) if values else "–"


def format_duration(rows: Sequence[Row]) -> str:
    """Sum over the stretches between resumes: a clock that goes back has been started anew."""
    total = previous = 0.0
    for now in known(rows, "time"):
        total += now - previous if now >= previous else now
        previous = now
    seconds = round(total)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def plain(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def notice(text: str, start: str = "") -> str:
    """A note as HTML, in a box."""
    return f'<p class="notice" role="note"><strong>{escape(start)}</strong> {escape(text)}</p>'
