"""The section of a page that shows a run beside another."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from sgmim_fast.probing.data import Kind
from sgmim_fast.probing.probes import CONSTANT, GRID_TARGET
from sgmim_fast.probing.record import SHOWN, ProbeRecord
from sgmim_fast.probing.settings import PROBES
from sgmim_fast.report.comparison import Comparison, pairs_a_step
from sgmim_fast.report.curves import Chart, Series, format_value, render_overlay
from sgmim_fast.report.gallery import Gallery, Sample, count_parameters
from sgmim_fast.report.gallery_page import Panel, figure, hatched, outlined
from sgmim_fast.report.words import final_value, format_duration, notice, plain

KEYS = ("first", "second")
"""Classes of what belongs to the one run and to the other; they have colours in the style sheet."""
_PROBES = {
    "depth": "Linear depth",
    "segmentation": "Linear segmentation",
    "knn-depth": "Nearest neighbours, depth",
    "knn-segmentation": "Nearest neighbours, segmentation",
}
_HIGHER = ("d1", "mIoU", "mAcc", "aAcc")


def render_comparison(comparison: Comparison, galleries: tuple[Gallery, Gallery] | None, why_none: str) -> str:
    """Everything between the section's title and its end.

    Args:
        galleries: of the same samples and masks; None if there is nothing to show, then ``why_none`` says why.
    """
    return (
        notice(
            "Each of the two is one run with one seed. Another seed alone moves every figure below; a difference "
            "smaller than that says nothing about the method. docs/claim.md of the project has the comparison over "
            "several seeds.",
            "Read with care.",
        )
        + "".join(map(notice, comparison.notes))
        + f'<ul class="shared">{"".join(f"<li>{escape(line)}</li>" for line in _shared(comparison))}</ul>'
        + _probes(comparison)
        + "<h3>The loss that both have</h3>"
        + _curves(comparison)
        + "<h3>What each paints into the hidden cells</h3>"
        + (notice(why_none, "No pictures.") if galleries is None else _pictures(comparison, galleries))
        + "<h3>What the runs are</h3>"
        + _facts(comparison)
    )


def _shared(comparison: Comparison) -> Iterator[str]:
    """What is equal, and what is not."""
    models = [run.settings.model for run in comparison.runs]
    seed = comparison.runs[0].settings.train.seed
    if comparison.same_start:
        yield f"Both encoders began with equal weights, those of seed {seed}." + (
            " The heads did not: they are drawn after the guidance, which SimMIM lacks."
            if comparison.guided_apart
            else ""
        )
    else:
        yield "The encoders did not begin with equal weights: seed, shape or PyTorch is another."
    if comparison.same_batches:
        pairs = pairs_a_step(comparison.runs[0])
        size = f", {pairs:,} a step" if pairs else ""
        yield f"Both saw the same crops of the same images under the same masks in the same order{size}."
    else:
        yield "The two did not see the same batches: seed, pairs a step or settings of the data are others."
    if not comparison.guided_apart:
        return
    yield (
        "SG-MIM was given structure maps besides. Where they are depth, as those of rendered scenes, the depth probes "
        "ask for something near what it was trained to tell; the segmentation probes do not."
    )
    if not comparison.same_encoder:
        return
    extra = abs(count_parameters(models[0]) - count_parameters(models[1]))
    yield (
        f"SG-MIM has {extra / 1e6:.2g} M more parameters outside the encoder and computes more for an image: equal "
        "steps are not equal time. Gradients are clipped by the norm over all parameters, the guidance's included."
    )


# -- probes


def _probes(comparison: Comparison) -> str:
    known = [record for record in (*comparison.records, *comparison.baselines.values()) if record is not None]
    if not known:
        return ""
    tables = "".join(_table(comparison, known, probe) for probe in PROBES if any(_has(each, probe) for each in known))
    conditions = known[0].conditions
    images = dict.fromkeys(
        f"Fitted on {conditions[f'{kind}.train_images']} images of {conditions[f'{kind}.train']}; scored on "
        f"{conditions[f'{kind}.val_images']} of {conditions[f'{kind}.val']}."
        for kind in known[0].figures
    )
    return (
        '<h3>What the frozen features tell</h3><p class="hint">Probes of <code>sgmim probe</code>; nothing of an '
        f"encoder is trained. {escape(' '.join(images))} ↑ more is better, ↓ less is better. "
        "row-colour is told a token's row, on which depth depends much.</p>"
        f'<div class="figures">{tables}</div>'
    )


def _has(record: ProbeRecord, probe: str) -> bool:
    return any(probe in results for results in record.figures.values())


def _table(comparison: Comparison, known: Sequence[ProbeRecord], probe: str) -> str:
    kind: Kind = "depth" if probe.endswith("depth") else "segmentation"
    names = SHOWN[kind]
    head = "".join(f'<th scope="col">{name} {"↑" if name in _HIGHER else "↓"}</th>' for name in names)
    body = _line(CONSTANT, "the training mean everywhere", _figures(known, kind, CONSTANT), names)
    for name, record in comparison.baselines.items():
        body += _line(name, _baseline(comparison, name, record), _figures([record], kind, probe), names)
    for place in (0, 1):
        body += _line(
            comparison.labels[place], "", _figures([comparison.records[place]], kind, probe), names, KEYS[place]
        )
    body += _line(GRID_TARGET, "about what the grid allows", _figures(known, kind, GRID_TARGET), names)
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return f"<table><caption>{_PROBES[probe]}</caption>{head}<tbody>{body}</tbody></table>"


def _baseline(comparison: Comparison, name: str, record: ProbeRecord) -> str:
    if name != "random":
        return "place and mean colour, no encoder"
    if comparison.same_start and record.conditions.get("settings.seed") == comparison.runs[0].settings.train.seed:
        return "the weights that both began with"
    return "an encoder that learnt nothing"


def _figures(records: Sequence[ProbeRecord | None], kind: str, name: str) -> Mapping[str, float]:
    for record in records:
        for found, results in record.figures.items() if record is not None else ():
            if found == kind and name in results:
                return results[name]
    return {}


def _line(label: str, note: str, figures: Mapping[str, float], names: Sequence[str], key: str = "") -> str:
    values = "".join(f"<td>{f'{figures[name]:.3f}' if name in figures else '–'}</td>" for name in names)
    swatch = f'<i class="swatch {key}"></i>' if key else ""
    small = f" <small>{escape(note)}</small>" if note else ""
    return f'<tr{f" class={key}" if key else ""}><th scope="row">{swatch}{escape(label)}{small}</th>{values}</tr>'


# -- curves and pictures


def _curves(comparison: Comparison) -> str:
    for run in comparison.runs:
        if all(row["image_loss"] is None for row in run.rows):
            return notice(f"{run.folder / 'metrics.jsonl'} is missing or holds no image loss yet.", "No curves.")
    first, second = (Series(key, label) for key, label in zip(KEYS, comparison.labels, strict=True))
    chart = Chart("Image loss", "mean absolute error of the hidden cells", (first, second), wide=True)
    return render_overlay(chart, "image_loss", [run.rows for run in comparison.runs])


def _pictures(comparison: Comparison, galleries: tuple[Gallery, Gallery]) -> str:
    labels, ours = comparison.labels, galleries[0]
    total = ours.grid[0] * ours.grid[1]
    how = (
        "The same samples of the training set under the same masks: each run sees the same "
        f"{total - ours.hidden} of {total} cells of the image, and nothing else, and paints the others."
    )
    if ours.window is not None:
        how += " Brightness and contrast are the true image's, not the models'."
    cards = "".join(
        _card(number, samples, labels, ours)
        for number, samples in enumerate(zip(*(gallery.samples for gallery in galleries), strict=True), start=1)
    )
    return f'<p class="hint">{escape(how)}</p><div class="cards single">{cards}</div>'


def _card(number: int, samples: Sequence[Sample], labels: Sequence[str], gallery: Gallery) -> str:
    strips = [sample.strips[0] for sample in samples]
    given, mask, alt = strips[0].given, strips[0].predicted, f"Sample {number}"
    panels = [
        Panel("image", "image", "original", strips[0].original, f"{alt}: the original"),
        Panel("image", "image", "given", given, f"{alt}: what both are given; the rest is hatched", hatched(mask)),
    ]
    for key, label, strip in zip(KEYS, labels, strips, strict=True):
        loss = f"loss {format_value(strip.loss)}"
        panels.append(Panel(key, label, loss, strip.completed, f"{alt}, completed by {label}", outlined(mask)))
    figures = "".join(figure(panel, gallery) for panel in panels)
    return (
        f'<article class="card" aria-label="{alt}, both runs"><header><h4>{escape(samples[0].name)}</h4></header>'
        f'<div class="pictures">{figures}</div></article>'
    )


# -- facts


def _facts(comparison: Comparison) -> str:
    runs = comparison.runs
    lines: list[tuple[str, tuple[Any, Any]]] = [
        ("parameters", _both(f"{count_parameters(run.settings.model) / 1e6:,.1f} M" for run in runs)),
        ("ranks", _both(run.environment.get("world_size") for run in runs)),
        ("steps", _both(f"{int(run.rows[-1]['step'] or 0):,}" if run.rows else None for run in runs)),
        ("duration of training", _both(format_duration(run.rows) for run in runs)),
        ("final image loss", _both(final_value(run.rows, "image_loss") for run in runs)),
        *comparison.differing.items(),
    ]
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in comparison.labels)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(plain(value))}</td>" for value in values)}</tr>'
        for name, values in lines
    )
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        '<p class="hint">Settings of model, data, optimizer, schedule and training that are not listed are the same.'
        f'</p><div class="figures facts">{table}</div>'
    )


def _both(values: Iterable[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second
