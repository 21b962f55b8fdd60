"""One self-contained HTML page of a pre-training run: what it learned, how it went, what it was."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from sgmim_fast.config import PretrainConfig
from sgmim_fast.errors import UserError
from sgmim_fast.report.comparison import Comparison, read_comparison
from sgmim_fast.report.comparison_page import render_comparison
from sgmim_fast.report.gallery import Gallery, build_gallery, count_parameters
from sgmim_fast.report.page import render_page
from sgmim_fast.report.run import Run, read_run


def write_report(run: Path, output: Path | None = None, *, samples: int = 6, against: Path | None = None) -> Path:
    """Write the page of a run folder and return its path.

    The page needs no network and no other file. What cannot be shown (no data, no checkpoint, no
    metrics) is replaced by a notice that says why.

    Args:
        run: the folder that pre-training wrote.
        output: the HTML file; ``run / "report.html"`` if None. An existing file is replaced.
        samples: pairs in the gallery.
        against: the folder of another run, which a section of the page shows beside this one.

    Raises:
        UserError: if a folder is not a run, the two runs cannot be compared, or the page cannot be written.
    """
    if samples < 1:
        raise UserError(f"samples {samples} must be 1 or more")
    record = read_run(Path(run))
    output = record.folder / "report.html" if output is None else Path(output)
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of an HTML file")
    comparison = None if against is None else read_comparison(record, Path(against))
    gallery, notice = _gallery(record.settings, record, samples)
    section = None
    if comparison is not None:
        title = f"{comparison.labels[0]} beside {comparison.labels[1]}"
        section = title, render_comparison(comparison, *_galleries(comparison, gallery, notice, samples))
    _replace(output, render_page(record, count_parameters(record.settings.model), gallery, notice, section))
    return output


def _gallery(settings: PretrainConfig, run: Run, samples: int) -> tuple[Gallery | None, str]:
    """The gallery, or None and the reason.

    Args:
        settings: of the samples and masks, and of the run's model.
    """
    if run.weights is None:
        return None, run.weights_notice
    try:
        return build_gallery(settings, run.weights, samples), ""
    except UserError as error:
        start = "" if Path(settings.data.path).is_absolute() else f"Looked up from {Path.cwd()}: "
        return None, f"{start}{error}."


def _galleries(
    comparison: Comparison, ours: Gallery | None, why_none: str, samples: int
) -> tuple[tuple[Gallery, Gallery] | None, str]:
    """Both runs' galleries of the first's samples and masks, or None and the reason."""
    run, other = comparison.runs
    if ours is None:
        return None, f"{run.folder}: {why_none}"
    theirs, why_none = _gallery(replace(run.settings, model=other.settings.model), other, samples)
    if theirs is None:
        return None, f"{other.folder}: {why_none}"
    if [sample.name for sample in ours.samples] != [sample.name for sample in theirs.samples]:
        return None, "With and without maps the data set holds other images."
    return (ours, theirs), ""


def _replace(path: Path, text: str) -> None:
    """Write to a temporary name first, so that a failure leaves an older page whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another file") from error
