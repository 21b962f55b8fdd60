"""The page of a run as HTML; everything that comes from outside is escaped here."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from sgmim_fast import __version__
from sgmim_fast.colors import css_gradient
from sgmim_fast.masking import CELL
from sgmim_fast.recipes import RECIPES
from sgmim_fast.report.curves import format_value, render_charts
from sgmim_fast.report.gallery import IMAGE_ERROR, STRUCTURE_ERROR, Gallery, Sample, Strip
from sgmim_fast.report.run import Checkpoint, Row, Run

ENCODERS = {"swin": "Swin", "swinv2": "Swin V2", "vit": "ViT"}
SECTIONS = ("model", "data", "optimizer", "schedule", "train", "fault", "monitor")
PLACES = ("path", "output", "resume")  # where a run is and how it was started is no part of a recipe
LAST_ROWS = 5  # the final losses are means over so many logged steps


def render_page(run: Run, parameters: int, gallery: Gallery | None, notice: str) -> str:
    """The whole page.

    Args:
        parameters: of the model.
        gallery: None if there is nothing to show; then ``notice`` says why.
    """
    template = files("sgmim_fast.report").joinpath("template.html").read_text(encoding="utf-8")
    found = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert found is not None
    # The browser runs this one script and loads nothing: whatever text the run holds stays text.
    digest = base64.b64encode(hashlib.sha256(found.group(1).encode()).digest()).decode()
    fields = {
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": escape(f"{run.folder.resolve().name} – {run.recipe}"),
        "structure_scale": css_gradient("structure"),
        "error_scale": css_gradient("error"),
        "headline": _headline(run, parameters),
        "gallery": _notice(notice, "No pictures.") if gallery is None else _gallery(gallery, run),
        "curves": _curves(run),
        "configuration": _configuration(run),
        "environment": _environment(run.environment),
        "checkpoints": _checkpoints(run.checkpoints),
        "written": f"sgmim_fast {escape(__version__)}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


# -- headline


def _headline(run: Run, parameters: int) -> str:
    model, last = run.settings.model, run.rows[-1] if run.rows else None
    kind = "SimMIM (image only)" if model.guidance == "none" else f"SG-MIM, {model.guidance} guidance"
    lead = f"{ENCODERS[model.encoder]} encoder · {kind} · {model.hw[1]} × {model.hw[0]} pixels"
    ranks = run.environment.get("world_size")
    tiles = [("Model", f"{parameters / 1e6:,.1f} M", "parameters")]
    if last:
        planned = run.settings.schedule.epochs
        tiles += [
            ("Steps", f"{int(last['step'] or 0):,}", f"logged every {run.settings.train.log_every}"),
            ("Epochs", format_value(last["epoch"] or 0), f"of {planned:,} planned"),
        ]
    if isinstance(ranks, int):
        batch = run.settings.train.batch_size * run.settings.train.accumulation_steps * ranks
        tiles.append(("Ranks", f"{ranks:,}", f"{batch:,} pairs a step"))
    if last:
        image, structure = (_final(run.rows, key) for key in ("image_loss", "structure_loss"))
        first_image, first_structure = (_first(run.rows, key) for key in ("image_loss", "structure_loss"))
        tiles.append(("Final image loss", image, f"{first_image} at first"))
        if structure != "–":
            tiles.append(("Final map loss", structure, f"{first_structure} at first"))
        tiles.append(("Duration", format_duration(run.rows), "of training"))
        tiles.append(("Throughput", _median(run.rows, "images_per_second"), "images/s, median"))
        if (share := _median(run.rows, "mfu", percent=True)) != "–":
            tiles.append(("Utilisation", share, "of the peak FLOP/s, median"))
        if (skipped := last["skipped_steps"]) is not None:
            tiles.append(("Skipped steps", f"{skipped:,.0f}", "gradient not finite"))
        memory = max((row["peak_memory_bytes"] or 0) for row in run.rows)
        if memory:
            tiles.append(("Peak memory", _bytes(memory), "a rank"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return (
        f'<p class="eyebrow">Pre-training run · recipe {escape(run.recipe)}</p>'
        f'<h1>{escape(run.folder.resolve().name)}</h1><p class="lead">{escape(lead)}</p><dl class="tiles">{cells}</dl>'
    )


def _known(rows: Sequence[Row], key: str) -> list[float]:
    return [value for row in rows if (value := row[key]) is not None]


def _first(rows: Sequence[Row], key: str) -> str:
    return format_value(next(iter(_known(rows, key)), float("nan")))


def _final(rows: Sequence[Row], key: str) -> str:
    values = _known(rows, key)[-LAST_ROWS:]
    return format_value(sum(values) / len(values)) if values else "–"


def _median(rows: Sequence[Row], key: str, percent: bool = False) -> str:
    values = sorted(_known(rows, key))
    return format_value(values[len(values) // 2], percent) if values else "–"


def format_duration(rows: Sequence[Row]) -> str:
    """Sum over the stretches between resumes: a clock that goes back has been started anew."""
    total = previous = 0.0
    for now in _known(rows, "time"):
        total += now - previous if now >= previous else now
        previous = now
    seconds = round(total)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _bytes(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{format_value(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _notice(text: str, start: str = "") -> str:
    return f'<p class="notice" role="note"><strong>{escape(start)}</strong> {escape(text)}</p>'


# -- gallery


def _gallery(gallery: Gallery, run: Run) -> str:
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
    strips = "".join(_strip(strip, sample, gallery, number) for strip in sample.strips)
    return (
        f'<article class="card" aria-label="Sample {number}">'
        f'<header><h3>{escape(sample.name)}</h3><p>{losses}</p></header><div class="pictures">{strips}</div></article>'
    )


def _strip(strip: Strip, sample: Sample, gallery: Gallery, number: int) -> str:
    height, width = gallery.size
    predicted, given = _cells(strip.predicted, True), _cells(strip.predicted, False)
    borders = _borders(strip.predicted)
    count = sum(map(sum, strip.predicted))
    total = gallery.grid[0] * gallery.grid[1]
    panels = (
        ("original", strip.original, "the original", ""),
        ("given", strip.given, f"what the model is given, {total - count} of {total} cells; the rest is hatched",
         f'<path class="veil" d="{predicted}"/><path class="hatch" d="{predicted}"/>'),
        ("completed", strip.completed, f"the given cells, completed by the prediction of the other {count}",
         f'<path class="outline under" d="{borders}"/><path class="outline" d="{borders}"/>'),
        ("error", strip.error, f"error of the {count} predicted cells, mean {format_value(strip.loss)}",
         f'<path class="veil" d="{given}"/>'),
    )  # fmt: skip
    view = f"0 0 {gallery.grid[1]} {gallery.grid[0]}"
    figures = []
    for title, uri, alt, marks in panels:
        over = f'<svg viewBox="{view}" preserveAspectRatio="none" aria-hidden="true">{marks}</svg>' if marks else ""
        figures.append(
            f'<figure class="{strip.kind}"><div class="picture"><img src="{uri}" width="{width}" height="{height}" '
            f'alt="Sample {number}, {strip.kind}: {alt}">{over}</div>'
            f"<figcaption><b>{strip.kind}</b> {title}</figcaption></figure>"
        )
    return "".join(figures)


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


# -- the rest


def _curves(run: Run) -> str:
    if not run.rows:
        return _notice("metrics.jsonl is missing or holds no row yet.", "No curves.")
    return "".join(map(_notice, run.notes)) + render_charts(run.rows)


def _configuration(run: Run) -> str:
    """One table a section; what differs from the recipe is marked."""
    recipe: dict[str, Any] = {}
    if run.recipe in RECIPES:
        recipe = json.loads(json.dumps(asdict(RECIPES[run.recipe]())))
    sections = [(name, run.config[name]) for name in SECTIONS if isinstance(run.config.get(name), dict)]
    rest = {key: value for key, value in run.config.items() if key not in dict(sections)}
    tables = [_section(name, f"{name}.", content, recipe.get(name, {})) for name, content in sections]
    tables.append(_section("run", "", rest, recipe))
    hint = '<p class="hint"><mark>Marked</mark> values differ from the recipe, whose own value follows.</p>'
    return (hint if "<mark>" in "".join(tables) else "") + f'<div class="tables">{"".join(tables)}</div>'


def _section(name: str, prefix: str, content: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    lines = []
    for key, value in content.items():
        text = escape(_plain(value))
        if key in recipe and key not in PLACES and recipe[key] != value:
            text = f"<mark>{text}</mark> <small>{escape(_plain(recipe[key]))}</small>"
        lines.append((escape(prefix + key), text))
    return _table(name, lines)


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return _notice("environment.json is missing.", "No environment.")
    return _table("", [(escape(str(key)), escape(_plain(value))) for key, value in environment.items()])


def _checkpoints(checkpoints: Sequence[Checkpoint]) -> str:
    if not checkpoints:
        return _notice("This run has not written a checkpoint yet.", "No checkpoints.")
    lines = []
    for checkpoint in reversed(checkpoints):
        state = "" if checkpoint.complete else " · incomplete, without model.safetensors"
        mark = " <mark>latest</mark>" if checkpoint.latest else ""
        lines.append((escape(checkpoint.name), _bytes(checkpoint.size) + state + mark))
    return _table("", lines)


def _table(caption: str, lines: Sequence[tuple[str, str]]) -> str:
    """Rows of (key, value), both HTML."""
    # A narrow screen may break a key after its dots and underscores.
    keys = [key.replace(".", ".<wbr>").replace("_", "_<wbr>") for key, _ in lines]
    body = "".join(
        f'<tr><th scope="row">{key}</th><td>{value}</td></tr>' for key, (_, value) in zip(keys, lines, strict=True)
    )
    return f"<table>{f'<caption>{escape(caption)}</caption>' if caption else ''}<tbody>{body}</tbody></table>"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
