"""The gallery of a run as HTML: pictures, and what is drawn above them."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from sgmim_fast.masking import CELL
from sgmim_fast.report.curves import format_value
from sgmim_fast.report.gallery import IMAGE_ERROR, STRUCTURE_ERROR, Gallery, Sample, Strip


class Panel(NamedTuple):
    """A picture with a caption."""

    kind: str
    """Class of the figure."""
    name: str
    """Begins the caption, in the colour of the class."""
    title: str
    """The rest of the caption."""
    uri: str
    alt: str
    marks: str = ""
    """SVG above it, in cells."""


def render_gallery(gallery: Gallery) -> str:
    """What was hidden, what was filled in, and how to read it."""
    rows, columns = gallery.grid
    guided = len(gallery.samples[0].strips) > 1
    visible = rows * columns - gallery.hidden
    how = (
        f"<p>Each picture is cut into {rows * columns} cells of {CELL} × {CELL} pixels. In {gallery.hidden} of them "
        f"the <b>image</b> is hidden and the model has to paint it from the {visible} cells that it sees. "
    )
    if guided:
        how += (
            "The <b>map</b> is dealt out the other way round: it is given exactly where the image is hidden, and has "
            "to be predicted exactly where the image is seen. So of each cell the model gets one of the two and fills "
            "in the other. "
        )
    how += (
        "<b>Completed</b> keeps what was given and puts the prediction into the outlined cells; <b>error</b> is the "
        "distance of the prediction from the original there.</p>"
    )
    small = (
        "Pairs at even distances in the training set, whole rather than cropped, with the masks of epoch 0; weights "
        f"of {escape(gallery.checkpoint)}. Losses are mean absolute errors over the predicted cells, in the units of "
        "training."
    )
    if gallery.window is not None:
        small += (
            f" The model predicts pixels relative to the mean and deviation of the {gallery.window} × {gallery.window} "
            "pixels around them; for display the true image's mean and deviation are put back, so brightness and "
            "contrast of the completed image are not the model's own."
        )
    if guided and gallery.structure_channels == 3:
        small += " The map's three channels are shown as red, green and blue, each from its minimum to its maximum."
    elif guided and gallery.structure_channels > 1:
        small += (
            f" Of the map's {gallery.structure_channels} channels the first is shown; its error is the mean of all."
        )
    scales = _scale("error", "image error", "0", f"{100 * IMAGE_ERROR:.0f} % of full brightness")
    if guided:
        scales += _scale("error", "map error", "0", f"{STRUCTURE_ERROR:g} standard deviations")
        if gallery.structure_channels != 3:
            scales = _scale("structure", "map", "low value", "high value") + scales
    cards = "".join(_card(sample, gallery, number) for number, sample in enumerate(gallery.samples, start=1))
    return (
        f'<div class="how">{how}<p class="hint">{small}</p></div><div class="tools"><div class="scales">{scales}</div>'
        '<div class="choices script-only"><label><input type="checkbox" id="large"> large pictures</label>'
        '<label><input type="checkbox" id="outline" checked> outline predicted cells</label></div></div>'
        f'<div class="cards{"" if guided else " single"}">{cards}</div>'
    )


def _scale(name: str, label: str, low: str, high: str) -> str:
    return (
        f'<div class="scale"><span>{label}</span><i class="{name}" role="img" aria-label="colour scale of the {label}, '
        f'from {low} to {high}"></i><span class="ends"><span>{low}</span><span>{high}</span></span></div>'
    )


def _card(sample: Sample, gallery: Gallery, number: int) -> str:
    losses = " · ".join(f"{strip.kind} loss {format_value(strip.loss)}" for strip in sample.strips)
    strips = "".join(_strip(strip, gallery, number) for strip in sample.strips)
    return (
        f'<article class="card" aria-label="Sample {number}">'
        f'<header><h3>{escape(sample.name)}</h3><p>{losses}</p></header><div class="pictures">{strips}</div></article>'
    )


def _strip(strip: Strip, gallery: Gallery, number: int) -> str:
    count = sum(map(sum, strip.predicted))
    total = gallery.grid[0] * gallery.grid[1]
    alt = f"Sample {number}, {strip.kind}: "
    panels = (
        ("original", strip.original, "the original", ""),
        (
            "given",
            strip.given,
            f"what the model is given, {total - count} of {total} cells; the rest is hatched",
            hatched(strip.predicted),
        ),
        (
            "completed",
            strip.completed,
            f"the given cells, completed by the prediction of the other {count}",
            outlined(strip.predicted),
        ),
        (
            "error",
            strip.error,
            f"error of the {count} predicted cells, mean {format_value(strip.loss)}",
            f'<path class="veil" d="{_cells(strip.predicted, False)}"/>',
        ),
    )
    return "".join(
        figure(Panel(strip.kind, strip.kind, title, uri, alt + what, marks), gallery)
        for title, uri, what, marks in panels
    )


def figure(panel: Panel, gallery: Gallery) -> str:
    """A picture of a gallery's samples."""
    height, width = gallery.size
    view = f"0 0 {gallery.grid[1]} {gallery.grid[0]}"
    over = ""
    if panel.marks:
        over = f'<svg viewBox="{view}" preserveAspectRatio="none" aria-hidden="true">{panel.marks}</svg>'
    return (
        f'<figure class="{panel.kind}"><div class="picture"><img src="{panel.uri}" width="{width}" height="{height}" '
        f'alt="{escape(panel.alt)}">{over}</div>'
        f"<figcaption><b>{escape(panel.name)}</b> {escape(panel.title)}</figcaption></figure>"
    )


def hatched(mask: Sequence[Sequence[bool]]) -> str:
    """Marks that cover the cells of a mask."""
    cells = _cells(mask, True)
    return f'<path class="veil" d="{cells}"/><path class="hatch" d="{cells}"/>'


def outlined(mask: Sequence[Sequence[bool]]) -> str:
    """Marks around the cells of a mask."""
    borders = _borders(mask)
    return f'<path class="outline under" d="{borders}"/><path class="outline" d="{borders}"/>'


def _cells(mask: Sequence[Sequence[bool]], wanted: bool) -> str:
    """SVG path over the wanted cells; neighbours in a row are one rectangle."""
    out = []
    for y, row in enumerate(mask):
        x = 0
        while x < len(row):
            end = x
            while end < len(row) and row[end] == wanted:
                end += 1
            if end > x:
                out.append(f"M{x} {y}h{end - x}v1h-{end - x}z")
            x = max(end, x + 1)
    return "".join(out)


def _borders(mask: Sequence[Sequence[bool]]) -> str:
    """SVG path around the predicted cells, the picture's own edge included."""
    grid = np.pad(np.array(mask), 1)
    across = np.argwhere(grid[1:-1, :-1] != grid[1:-1, 1:])
    along = np.argwhere(grid[:-1, 1:-1] != grid[1:, 1:-1])
    return "".join([f"M{x} {y}v1" for y, x in across] + [f"M{x} {y}h1" for y, x in along])
