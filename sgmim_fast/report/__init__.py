"""One self-contained HTML page of a pre-training run: what it learned, how it went, what it was."""

import contextlib
import os
from pathlib import Path

from sgmim_fast.errors import UserError
from sgmim_fast.report.gallery import Gallery, build_gallery, count_parameters
from sgmim_fast.report.page import render_page
from sgmim_fast.report.run import Run, read_run


def write_report(run: Path, output: Path | None = None, *, samples: int = 6) -> Path:
    """Write the page of a run folder and return its path.

    The page needs no network and no other file. What cannot be shown (no data, no checkpoint, no
    metrics) is replaced by a notice that says why.

    Args:
        run: the folder that pre-training wrote.
        output: the HTML file; ``run / "report.html"`` if None. An existing file is replaced.
        samples: pairs in the gallery.

    Raises:
        UserError: if the folder is not a run, or the page cannot be written.
    """
    if samples < 1:
        raise UserError(f"samples {samples} must be 1 or more")
    record = read_run(Path(run))
    output = record.folder / "report.html" if output is None else Path(output)
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of an HTML file")
    gallery, notice = _gallery(record, samples)
    _replace(output, render_page(record, count_parameters(record.settings.model), gallery, notice))
    return output


def _gallery(run: Run, samples: int) -> tuple[Gallery | None, str]:
    """The gallery, or None and the reason."""
    if run.weights is None:
        return None, run.weights_notice
    try:
        return build_gallery(run.settings, run.weights, samples), ""
    except UserError as error:
        start = "" if Path(run.settings.data.path).is_absolute() else f"Looked up from {Path.cwd()}: "
        return None, f"{start}{error}."


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
