"""Tables and plots of the recorded rows, written between markers of README.md and docs/*.md.

    python -m benchmarks.report            write what is out of date
    python -m benchmarks.report --check    write nothing; status 1, and names, where something is

A block is what stands between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->``. The same rows give the
same files. What has not been measured says so.
"""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import claim, harness, more_tables, plots, tables
from benchmarks.recorded import Results
from sgmim_fast.errors import UserError, one_line_errors

ROOT = Path(__file__).parents[1]
IMAGES = Path("docs/images/benchmarks")
MARKER = re.compile(r"^<!-- (/?)benchmarks:([a-z0-9-]+) -->$", re.MULTILINE)
TABLES: dict[str, Callable[[Results], list[str]]] = {
    "cpu-steps": tables.cpu_steps,
    "main-steps": tables.main_steps,
    "gpu-steps": tables.gpu_steps,
    "step-batches": tables.step_batches,
    "step-parts": tables.step_parts,
    "demands": tables.demands,
    "kernels": more_tables.kernels,
    "products": more_tables.products,
    "work": more_tables.work,
    "checkpointing": more_tables.checkpointing,
    "optimizers": more_tables.optimizers,
    "largest-batches": more_tables.largest_batches,
    "pipeline": more_tables.pipeline,
    "parity": more_tables.parity,
    **claim.TABLES,
}
PLOTS: dict[str, Callable[[Results], str | None]] = plots.PLOTS | claim.PLOTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a file is out of date")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds README.md and docs/")
    options = parser.parse_args()
    with one_line_errors():
        stale = outdated(options.root, Results(options.results))
        for path, content in stale.items():
            print(f"{'out of date' if options.check else 'written'}: {path}")
            if not options.check:
                write(options.root / path, content)
        if stale and options.check:
            raise SystemExit(1)


def outdated(root: Path, results: Results) -> dict[Path, str | None]:
    """Files whose content is to change, and to what; None for a plot of which nothing is recorded any more."""
    found: dict[Path, str | None] = {}
    plots = {IMAGES / f"{name}.svg": plot(results) for name, plot in PLOTS.items()}
    for path in sorted(set(plots) | {path.relative_to(root) for path in (root / IMAGES).glob("*")}):
        if read(root / path) != (content := plots.get(path)):
            found[path] = content
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root)
        if (filled := fill(text, name, results, plots)) != text:
            found[name] = filled
    return found


def fill(text: str, path: Path, results: Results, plots: dict[Path, str | None]) -> str:
    """The text with its blocks written anew.

    Raises:
        UserError: for markers that do not pair, or whose block is unknown.
    """
    parts, place, opened = [], 0, ""
    for match in MARKER.finditer(text):
        closing, name = bool(match[1]), match[2]
        if closing != bool(opened) or (closing and name != opened):
            raise UserError(f"{path}: {match[0]} has no partner; markers come in pairs, one after the other")
        if closing:
            parts.append("\n".join(block(name, path, results, plots)) + "\n")
            place, opened = match.start(), ""
        else:
            parts.append(text[place : match.end()] + "\n")
            opened = name
    if opened:
        raise UserError(
            f"{path}: <!-- benchmarks:{opened} --> has no partner; end it with <!-- /benchmarks:{opened} -->"
        )
    return "".join(parts) + text[place:]


def block(name: str, path: Path, results: Results, plots: dict[Path, str | None]) -> list[str]:
    """Lines of a table; or of a plot, named plot-NAME."""
    if (plot := name.removeprefix("plot-")) in PLOTS and plot != name:
        image = IMAGES / f"{plot}.svg"
        if plots[image] is None:
            return [f"(Plot: {tables.NOT_MEASURED}.)"]
        return [f"![{plot}]({os.path.relpath(image, path.parent)})"]
    if name not in TABLES:
        known = ", ".join([*TABLES, *(f"plot-{plot}" for plot in PLOTS)])
        raise UserError(f"{path}: <!-- benchmarks:{name} --> names no block; choose one of {known}")
    return TABLES[name](results)


def read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def write(path: Path, content: str | None) -> None:
    if content is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
