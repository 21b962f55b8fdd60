"""Probes of two pre-training runs and of what needs no pre-training, written where the report finds them."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sgmim_fast.probing.features import Extractor

FITTED, SCORED = 200, 100
"""Labelled images that probes are fitted on, and images they are scored on, at most; so does `sgmim probe`."""
_TOKENS = 82
"""Training tokens an image where there are fewer of them than ``FITTED``, with which it is the usual number."""


def probe_runs(run: Path, other: Path, scenes: Path, test: Path) -> None:
    """Linear probes and nearest neighbours of both, of the weights they began with, and of place and colour alone.

    Figures go into ``PROBE`` of either run, and ``BASELINES`` of the first. Files that are newer than the weights and
    the scenes stay.

    Args:
        run: its seed and shape are those of the random weights.
        other: of the same seed and shape.
        scenes: labelled, to fit on.
        test: to score on.
    """
    from rich.progress import Progress, TaskID

    from sgmim_fast.commands.finetuned_runs import open_device
    from sgmim_fast.commands.probed_weights import weights_file
    from sgmim_fast.probing.data import Kind, open_splits
    from sgmim_fast.probing.features import Features
    from sgmim_fast.probing.probes import run_probes
    from sgmim_fast.probing.record import write_record
    from sgmim_fast.probing.settings import Probe, ProbeSettings
    from sgmim_fast.report.comparison import BASELINES, PROBE
    from sgmim_fast.report.run import read_run
    from sgmim_fast.train.environment import describe_environment

    probes: dict[Kind, list[Probe]] = {
        "depth": ["depth", "knn-depth"],
        "segmentation": ["segmentation", "knn-segmentation"],
    }
    splits = [open_splits(kind, "scenes", str(scenes), val_path=str(test)) for kind in probes]
    fitted, scored = min(FITTED, len(splits[0].train)), min(SCORED, len(splits[0].val))
    seed = read_run(run).settings.train.seed  # of the weights that both began with
    tokens = min(ProbeSettings.tokens, _TOKENS * fitted)
    settings = ProbeSettings(train_images=fitted, val_images=scored, tokens=tokens, seed=seed)
    device = open_device(None)
    files = {name: run / file for name, file in BASELINES.items()} | {
        str(folder): folder / PROBE for folder in (other, run)
    }
    sources = [weights_file(run), weights_file(other), *(folder / "metadata.jsonl" for folder in (scenes, test))]
    newest = max(source.stat().st_mtime for source in sources)
    with Progress() as progress:
        for subject, file in files.items():
            if file.is_file() and file.stat().st_mtime > newest:
                progress.print(f"    {file} is up to date")
                continue
            task = progress.add_task(subject, total=sum(fitted + scored + len(each) for each in probes.values()))

            def tell(_what: str, done: int, _total: int, task: TaskID = task) -> None:
                progress.update(task, advance=min(done, 1))  # images and fits, each once

            extractor, origin = _open(subject, run, seed, device)
            features = Features(extractor)
            reports = {found.kind: run_probes(features, found, probes[found.kind], settings, tell) for found in splits}
            write_record(file, origin, features, settings, splits, reports, describe_environment(device, 1))


def _open(subject: str, like: Path, seed: int, device: "torch.device") -> "tuple[Extractor, str]":
    """What gives features, and what that is."""
    from sgmim_fast.commands.probed_weights import RANDOM, open_backbone
    from sgmim_fast.commands.probing import ROW_COLOUR
    from sgmim_fast.probing.features import BackboneFeatures, RowColour

    if subject == ROW_COLOUR:
        return RowColour(), ROW_COLOUR
    backbone, origin = open_backbone(subject, like=like if subject == RANDOM else None, seed=seed)
    return BackboneFeatures(backbone.to(device)), origin


def show_figures(run: Path, other: Path) -> None:
    """Print what ``probe_runs`` wrote of the linear probes."""
    from sgmim_fast.probing.data import Kind
    from sgmim_fast.probing.probes import CONSTANT
    from sgmim_fast.probing.record import read_record
    from sgmim_fast.report.comparison import BASELINES, PROBE

    shown: list[tuple[Kind, str]] = [
        ("depth", "d1"),
        ("depth", "abs_rel"),
        ("segmentation", "mIoU"),
        ("segmentation", "aAcc"),
    ]
    records = {name: read_record(run / file) for name, file in BASELINES.items()}
    records |= {str(folder): read_record(folder / PROBE) for folder in (other, run)}
    lines = {CONSTANT: [records[str(run)].figures[kind][CONSTANT][metric] for kind, metric in shown]}
    lines |= {name: [record.figures[kind][kind][metric] for kind, metric in shown] for name, record in records.items()}
    print(f"\n  {'linear probes':20}" + "".join(f"{metric:>10}" for _, metric in shown))
    for name, values in lines.items():
        print(f"  {name:20}" + "".join(f"{value:>10.3f}" for value in values))
    print("  One run each: a difference smaller than another seed makes says nothing.")
