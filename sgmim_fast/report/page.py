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

from sgmim_fast import __version__
from sgmim_fast.colors import css_gradient
from sgmim_fast.recipes import RECIPES
from sgmim_fast.report.curves import format_value, render_charts
from sgmim_fast.report.gallery import Gallery
from sgmim_fast.report.gallery_page import render_gallery
from sgmim_fast.report.run import Checkpoint, Run
from sgmim_fast.report.words import final_value, first_value, format_duration, median_value, notice, plain

ENCODERS = {"swin": "Swin", "swinv2": "Swin V2", "vit": "ViT"}
SECTIONS = ("model", "data", "optimizer", "schedule", "train", "fault", "monitor")
PLACES = ("path", "output", "resume")  # where a run is and how it was started is no part of a recipe


def render_page(
    run: Run, parameters: int, gallery: Gallery | None, why_none: str, compared: tuple[str, str] | None = None
) -> str:
    """The whole page.

    Args:
        parameters: of the model.
        gallery: None if there is nothing to show; then ``why_none`` says why.
        compared: title, as text, and content, as HTML, of the section that shows the run beside another.
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
        "compared_link": "" if compared is None else '<a href="#compared">Comparison</a>',
        "compared": "" if compared is None else _compared(*compared),
        "gallery": notice(why_none, "No pictures.") if gallery is None else render_gallery(gallery),
        "curves": _curves(run),
        "configuration": _configuration(run),
        "environment": _environment(run.environment),
        "checkpoints": _checkpoints(run.checkpoints),
        "written": f"sgmim_fast {escape(__version__)}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _compared(title: str, content: str) -> str:
    return (
        '<section id="compared" aria-labelledby="compared-title">'
        f'<h2 id="compared-title">{escape(title)}</h2>{content}</section>'
    )


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
        image, structure = (final_value(run.rows, key) for key in ("image_loss", "structure_loss"))
        first_image, first_structure = (first_value(run.rows, key) for key in ("image_loss", "structure_loss"))
        tiles.append(("Final image loss", image, f"{first_image} at first"))
        if structure != "–":
            tiles.append(("Final map loss", structure, f"{first_structure} at first"))
        tiles.append(("Duration", format_duration(run.rows), "of training"))
        tiles.append(("Throughput", median_value(run.rows, "images_per_second"), "images/s, median"))
        if (share := median_value(run.rows, "mfu", percent=True)) != "–":
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


def _bytes(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{format_value(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# -- the rest


def _curves(run: Run) -> str:
    if not run.rows:
        return notice("metrics.jsonl is missing or holds no row yet.", "No curves.")
    return "".join(map(notice, run.notes)) + render_charts(run.rows)


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
        text = escape(plain(value))
        if key in recipe and key not in PLACES and recipe[key] != value:
            text = f"<mark>{text}</mark> <small>{escape(plain(recipe[key]))}</small>"
        lines.append((escape(prefix + key), text))
    return _table(name, lines)


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return notice("environment.json is missing.", "No environment.")
    return _table("", [(escape(str(key)), escape(plain(value))) for key, value in environment.items()])


def _checkpoints(checkpoints: Sequence[Checkpoint]) -> str:
    if not checkpoints:
        return notice("This run has not written a checkpoint yet.", "No checkpoints.")
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
