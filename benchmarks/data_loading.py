"""Pairs a second, CPU time a pair and memory of both loaders, and of `sgmim verify`.

    python -m benchmarks.data_loading                              every kind of map, in folders and in shards
    python -m benchmarks.data_loading --maps png --storage folder --seconds 2
    python -m benchmarks.data_loading --data photos photos-shards  sets of your own, as they are stored
    python -m benchmarks.data_loading --appetite 1500              and which share of that each loader feeds

Without --data, photograph-like pairs are made in a temporary folder, the same ones in every run. Every file is read
once before, so that no disk is measured. First, both loaders must give the same batches; if they do not, nothing is
timed. Each loader then has a process of its own, and they take turns, so that whatever else the machine does falls on
both alike. What was ready before a turn is not counted in it, nor is the start, which is told on its own.

A training step's appetite comes from the newest run of benchmarks.train_step with the same model beside --results, if
there is one. Every row goes to --results with the environment it was measured in. Columns of the table:

    pairs/s    median over the turns, and from the 20th to the 80th percentile
    CPU ms     user and system time a pair, of all processes and threads
    RSS        sum over the processes of the most that each held; pages that they share count in each
    held       data that they hold together, pages that they share counted once, code of libraries left out
    start      seconds from building the loader to its first batch
    feeds      share of the training step's appetite
    to load    how many times the loader's own rate, for what `sgmim verify` checks with the loader's decoder
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import harness
from benchmarks.loading_contender import Contender, Job
from benchmarks.loading_pairs import KINDS, open_part, warm, write_pairs
from benchmarks.loading_parity import compare_loaders
from sgmim_fast.data.sharding.shard_pairs import shard_pairs
from sgmim_fast.data.shards import SHARD_LIST
from sgmim_fast.data.verification.checks import decoder_version
from sgmim_fast.errors import UserError, one_line_errors
from sgmim_fast.recipes import MODELS

RESULTS = harness.RESULTS / "data_loading.jsonl"
STORAGES = ("folder", "shards")
LOADERS = ("dali", "torch")
Row = dict[str, Any]


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        compare(options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="SET", help="folders, lists or shards")
    parser.add_argument("--pairs", type=int, default=600, help="to make, or to take of each --data (default: 600)")
    parser.add_argument("--size", type=size_of, default=(500, 375), metavar="WxH", help="of pairs made (500x375)")
    parser.add_argument("--maps", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds to make: all")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES), help="of pairs made: both")
    models = [name for name, model in MODELS.items() if model.guidance != "none"]
    parser.add_argument("--model", choices=models, default="sgmim_swin_base", help="whose batches; decides their size")
    parser.add_argument("--batch", type=int, default=64, help="pairs a batch (default: 64)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (torch) or threads (dali) of each loader (default: one a core)",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn (default: 5)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the training; cuda: dali uses it")
    parser.add_argument("--no-verify", action="store_true", help="leave out `sgmim verify`")
    parser.add_argument("--appetite", type=float, metavar="PAIRS_PER_SECOND", help="of one rank's training step")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="JSONL file to append to")
    return parser


def size_of(text: str) -> tuple[int, int]:
    """Width and height, from "500x375"."""
    width, height = map(int, text.split("x"))
    return width, height


@dataclass(frozen=True)
class Case:
    """One set of pairs."""

    data: str
    """What the pairs are, for people."""
    maps: str
    """Their kind."""
    storage: str
    path: Path


def compare(options: argparse.Namespace) -> None:
    """Measure everything; write a row for each and show a table."""
    check(options)
    if options.device == "cuda":
        harness.gpu()
    rows = harness.Rows(options.results, torch.device(options.device))
    appetite, origin = find_appetite(options)
    found: list[Row] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        for case in cases(options, Path(folder), progress):
            for row in measure(case, options, progress):
                if appetite:
                    row |= {"appetite_pairs_per_second": appetite}
                    if row["work"] == "load":
                        row |= {"share_of_appetite": row["p50_pairs_per_second"] / appetite}
                rows.append(row)
                found.append(row)
    # Where nobody reads along, a narrow default would break lines.
    Console(width=None if sys.stdout.isatty() else 140).print(table(found, options.device))
    print(origin)


def check(options: argparse.Namespace) -> None:
    for name in ("batch", "workers", "repetitions", "pairs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be 1 or more")
    if options.seconds <= 0:
        raise UserError(f"--seconds {options.seconds} must be more than 0")
    if options.appetite is not None and options.appetite <= 0:
        raise UserError(f"--appetite {options.appetite} must be more than 0")
    if not options.data and options.pairs < options.batch:
        raise UserError(f"--pairs {options.pairs} do not fill one batch of {options.batch}; raise it or lower --batch")
    if min(options.size) < 1:
        raise UserError(f"--size {options.size[0]}x{options.size[1]} must be 1x1 or more")


def cases(options: argparse.Namespace, folder: Path, progress: Progress) -> Iterator[Case]:
    """The user's sets, or those made in ``folder``."""
    for path in options.data:
        storage = "shards" if (path / SHARD_LIST).is_file() else "folder"
        structure = open_part(path, 1).members(0)[1]
        assert structure is not None, "it was opened with maps"
        suffix = Path(structure.inner or structure.path).suffix
        yield Case(path.absolute().name, suffix.removeprefix("."), storage, path.absolute())
    if options.data:
        return
    task = progress.add_task("making pairs", total=options.pairs)
    folders = write_pairs(folder, options.pairs, options.size, options.maps, lambda: progress.advance(task))
    name = "synthetic {}x{}".format(*options.size)
    for kind, path in folders.items():
        if "folder" in options.storage:
            yield Case(name, kind, "folder", path)
        if "shards" in options.storage:
            packed = folder / f"{kind}-shards"
            shard_pairs(path, packed, workers=1)
            yield Case(name, kind, "shards", packed)


# -- one case


def measure(case: Case, options: argparse.Namespace, progress: Progress) -> list[Row]:
    """A row for each loader, and for each decoder of `sgmim verify` where it can read what is stored so."""
    jobs = [job(case, "load", loader, options) for loader in LOADERS]
    if case.storage == "folder" and not options.no_verify:
        jobs += [job(case, "verify", loader, options) for loader in LOADERS]
    task = progress.add_task(f"{case.maps} {case.storage}", total=len(jobs) * (1 + options.repetitions))
    pairs = open_part(case.path, options.pairs)
    image_bytes, map_bytes = warm(pairs)
    parity = compare_loaders(*(job(case, "load", loader, options) for loader in LOADERS))
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(job)) for job in jobs]
        starts = []
        for contender in contenders:
            starts.append(contender.start())
            progress.advance(task)
        turns: list[list[dict[str, float]]] = [[] for _ in jobs]
        for _ in range(options.repetitions):
            for mine, contender in zip(turns, contenders, strict=True):
                mine.append(contender.measure(options.seconds))
                progress.advance(task)
    common = {
        "benchmark": "data_loading",
        "data": case.data,
        "maps": case.maps,
        "storage": case.storage,
        "pairs": len(pairs),
        "image_bytes": image_bytes,
        "map_bytes": map_bytes,
        "cache": "warm",
        "parity": parity,
        "model": options.model,
        "batch": options.batch,
        "workers": options.workers,
        "cpus": len(os.sched_getaffinity(0)),
        "device": options.device,
        "seconds": options.seconds,
        "repetitions": options.repetitions,
    }
    rows = [
        {**common, "work": job.work, "loader": job.loader, "decoder": decoder_version(job.loader)}
        | {"startup_seconds": start}
        | summary(mine)
        for job, start, mine in zip(jobs, starts, turns, strict=True)
    ]
    rates = {row["loader"]: row["p50_pairs_per_second"] for row in rows if row["work"] == "load"}
    for row in rows:
        if row["work"] == "verify":
            row["rate_to_loader"] = row["p50_pairs_per_second"] / rates[row["loader"]]
    return rows


def job(case: Case, work: str, loader: str, options: argparse.Namespace) -> Job:
    return Job(
        work=work,
        loader=loader,
        path=str(case.path),
        pairs=options.pairs,
        model=options.model,
        batch=options.batch,
        workers=options.workers,
        device=options.device,
    )


def summary(turns: list[dict[str, float]]) -> Row:
    """Percentiles over the turns; memory at its most."""
    rates = harness.percentiles([turn["pairs_per_second"] for turn in turns])
    costs = harness.percentiles([turn["cpu_seconds_per_pair"] * 1e3 for turn in turns])
    found: Row = {}
    for name, rate, cost in zip(("p20", "p50", "p80"), rates, costs, strict=True):
        found |= {f"{name}_pairs_per_second": rate, f"{name}_cpu_milliseconds_per_pair": cost}
    return found | {name: max(turn[name] for turn in turns) for name in ("peak_rss_bytes", "held_bytes")}


# -- appetite


def find_appetite(options: argparse.Namespace) -> tuple[float | None, str]:
    """Pairs a second of the training step, and a sentence on where they are from, or how to get them."""
    if options.appetite is not None:
        return options.appetite, f"appetite: {options.appetite:g} pairs a second, as given"
    rows = [row for row in recorded(options.results.parent) if row.get("model") == options.model]
    if not rows:
        return None, (
            "Which share of a training step's appetite the loaders feed is told once `python -m benchmarks.train_step "
            f"--model {options.model}` has been run on the machine that trains, or with --appetite."
        )
    newest = max(row["environment"]["started"] for row in rows)
    row = max((row for row in rows if row["environment"]["started"] == newest), key=lambda r: r["images_per_second"])
    where = row["environment"].get("gpu") or row["environment"]["cpu"]
    return row["images_per_second"], (
        f"appetite: {row['images_per_second']:.1f} pairs a second: {row['model']}, {row['backend']}, "
        f"{row['precision']}, batch {row['batch']}, on {where} ({newest})"
    )


def recorded(folder: Path) -> list[Row]:
    """Rows of benchmarks.train_step."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise UserError(
                    f"{path}:{number}: not a row of a benchmark; remove the line, or use --appetite"
                ) from None
            if isinstance(row, dict) and row.get("benchmark") == "train_step":
                found.append(row)
    return found


def table(rows: list[Row], device: str) -> Table:
    """For people; the columns are explained by ``--help``."""
    first = rows[0]
    sets = list(dict.fromkeys(row["data"] for row in rows))
    shown = Table(
        title=f"batches of {first['batch']}, {first['workers']} workers, {device}, warm cache; {', '.join(sets)}"
    )
    for name in (*(["set"] if len(sets) > 1 else []), "maps", "stored in", "what"):
        shown.add_column(name)
    fed = any("share_of_appetite" in row for row in rows)
    checked = any("rate_to_loader" in row for row in rows)
    more = [*(["feeds"] if fed else []), *(["to load"] if checked else [])]
    for name in ("pairs/s", "20..80 %", "CPU ms", "RSS MB", "held MB", "start s", *more):
        shown.add_column(name, justify="right")
    for row in rows:
        cells = [row["data"]] if len(sets) > 1 else []
        cells += [row["maps"], row["storage"], row["loader"] if row["work"] == "load" else f"verify {row['loader']}"]
        cells += [
            f"{row['p50_pairs_per_second']:.0f}",
            f"{row['p20_pairs_per_second']:.0f}..{row['p80_pairs_per_second']:.0f}",
            f"{row['p50_cpu_milliseconds_per_pair']:.2f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{row['held_bytes'] / 1e6:.0f}",
            f"{row['startup_seconds']:.1f}",
        ]
        if fed:
            cells.append(f"{row['share_of_appetite']:.0%}" if "share_of_appetite" in row else "")
        if checked:
            cells.append(f"x{row['rate_to_loader']:.2f}" if "rate_to_loader" in row else "")
        shown.add_row(*cells)
    return shown


if __name__ == "__main__":
    main()
