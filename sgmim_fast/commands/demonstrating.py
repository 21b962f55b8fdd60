"""``sgmim demo``: scenes, a small pre-training and a page; with ``--compare`` SimMIM beside SG-MIM on that page.

What the two trainings of the comparison share: the recipe, the images, the number of steps, the encoder's initial
weights (a model draws them first, so one seed gives the same whatever follows), and the crops, masks and order of the
samples, which are functions of seed, epoch and sample. What they do not: the maps, which SimMIM is not given; the heads'
initial weights, drawn after the guidance that SimMIM lacks; the number of parameters; the norm that gradients are clipped
by, over all parameters; and the time of a step.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sgmim_fast.errors import UserError

if TYPE_CHECKING:
    from sgmim_fast.data.scenes.splits import SceneSplit

DESCRIPTION = "Render scenes, pre-train a small Swin on two ranks, report, export: some minutes."
SCENES, TEST_SCENES = Path("scenes/demo"), Path("scenes/demo-test")
RUN, SIMMIM = Path("runs/demo"), Path("runs/demo-simmim")
SIDE = 160  # pixels
FITTED, SCORED = 200, 100
"""Labelled scenes that probes are fitted on, and scenes they are scored on, at most."""
_SCORED_SHARE = 5  # one scene to score on for so many to train on
_RESUME = ("--resume", "auto")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--count", type=int, default=1500, help="scenes to render")
    parser.add_argument("--steps", type=int, help="stop training after this many steps (default: the recipe's epochs)")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also pre-train without maps (SimMIM), from the same encoder weights and on the same batches; probe both on "
        "scenes unlike those of training, and show them side by side: about twice the time",
    )


def run(arguments: argparse.Namespace) -> None:
    """Do what is not done yet.

    Raises:
        UserError: if what is there already cannot be compared.
        SystemExit: if a training fails.
    """
    from sgmim_fast.report import write_report

    began, numbers, total = time.perf_counter(), itertools.count(1), 7 if arguments.compare else 4

    def begin(text: str) -> None:
        print(f"{next(numbers)}/{total} {text}", flush=True)

    _render(SCENES, arguments.count, "train", begin)
    begin(f"pre-training a small Swin on two DeepSpeed ranks in {RUN}")
    _pretrain(RUN, arguments.steps)
    if arguments.compare:
        begin(f"pre-training the same without maps (SimMIM) in {SIMMIM}")
        _pretrain_alike()
        _render(TEST_SCENES, min(SCORED, max(2, arguments.count // _SCORED_SHARE)), "test", begin)
        begin("probing frozen features")
        _probe()
    begin("writing the page")
    page = write_report(RUN, against=SIMMIM if arguments.compare else None)
    print(f"wrote {page}")
    begin("exporting for timm")
    for folder in (RUN, SIMMIM) if arguments.compare else (RUN,):
        _export(folder)
    if arguments.compare:
        _show_figures()
    minutes = (time.perf_counter() - began) / 60
    print(f"\ndone in {minutes:.1f} min. Open {page.resolve().as_uri()} in a browser.")


def _render(folder: Path, count: int, split: "SceneSplit", begin: Callable[[str], None]) -> None:
    from sgmim_fast.commands.rendering import render

    begin(f"rendering {count} scenes into {folder}")
    if (folder / "metadata.jsonl").exists():
        print(f"    {folder} holds scenes; delete the folder to render again")
    else:
        render(folder, count=count, size=SIDE, split=split)


def _pretrain(folder: Path, steps: int | None, *options: str) -> None:
    from sgmim_fast.commands.training import train

    if (folder / "backbone_timm.safetensors").exists():
        print(f"    {folder} holds a finished run; delete the folder to train again")
        return
    limit = ["--train.max-steps", str(steps)] if steps else []
    words = ["--num-gpus", "2", "--recipe", "demo", "--data", str(SCENES), "--output", str(folder), *_RESUME, *limit]
    status = train("pretrain", [*words, *options])
    if status:
        raise SystemExit(status)


def _pretrain_alike() -> None:
    """SimMIM, for as many steps as the run that is there."""
    from sgmim_fast.report.comparison import differences
    from sgmim_fast.report.run import read_run

    ours = read_run(RUN)
    _pretrain(SIMMIM, ours.settings.train.max_steps, "--model.guidance", "none")
    found = differences(ours, read_run(SIMMIM))
    found.pop("model.guidance", None)
    for name, (value, other) in found.items():
        raise UserError(
            f"{RUN} and {SIMMIM} were not trained alike: {name} is {value} in the one and {other} in the other; delete "
            "either folder and run the same again"
        )


def _probe() -> None:
    """Both encoders, the weights they began with, and what no encoder is needed for; the figures go into the runs."""
    from rich.progress import Progress

    from sgmim_fast.commands.finetuned_runs import open_device
    from sgmim_fast.commands.probed_weights import RANDOM, open_backbone
    from sgmim_fast.commands.probing import ROW_COLOUR
    from sgmim_fast.probing.data import open_splits
    from sgmim_fast.probing.features import BackboneFeatures, Extractor, Features, RowColour
    from sgmim_fast.probing.probes import run_probes
    from sgmim_fast.probing.record import write_record
    from sgmim_fast.probing.settings import Probe, ProbeSettings
    from sgmim_fast.report.comparison import BASELINES, PROBE
    from sgmim_fast.train.environment import describe_environment

    probes: dict[str, list[Probe]] = {
        "depth": ["depth", "knn-depth"],
        "segmentation": ["segmentation", "knn-segmentation"],
    }
    splits = [open_splits(kind, "scenes", str(SCENES), val_path=str(TEST_SCENES)) for kind in ("depth", "segmentation")]
    settings = ProbeSettings(train_images=min(FITTED, len(splits[0].train)), val_images=min(SCORED, len(splits[0].val)))
    device = open_device(None)
    work = sum(settings.train_images + settings.val_images + len(probes[found.kind]) for found in splits)
    with Progress() as progress:
        for subject, file in (
            (ROW_COLOUR, RUN / BASELINES[ROW_COLOUR]),
            (RANDOM, RUN / BASELINES[RANDOM]),
            (str(SIMMIM), SIMMIM / PROBE),
            (str(RUN), RUN / PROBE),
        ):
            task = progress.add_task(subject, total=work)
            extractor: Extractor = RowColour()
            origin = subject
            if subject != ROW_COLOUR:
                like = RUN if subject == RANDOM else None
                backbone, origin = open_backbone(subject, like=like, seed=settings.seed)
                extractor = BackboneFeatures(backbone.to(device))
            features = Features(extractor)
            reports = {
                found.kind: run_probes(
                    features,
                    found,
                    probes[found.kind],
                    settings,
                    lambda what, done, total, task=task: progress.update(task, advance=min(done, 1)),
                )
                for found in splits
            }
            write_record(file, origin, features, settings, splits, reports, describe_environment(device, 1))


def _export(folder: Path) -> None:
    from sgmim_fast.commands import exporting

    exporting.run(argparse.Namespace(run=folder, layout="timm", output=None, image_size=None, batch_size=None))


def _show_figures() -> None:
    """The linear probes of all that was probed."""
    from sgmim_fast.probing.probes import CONSTANT
    from sgmim_fast.probing.record import read_record
    from sgmim_fast.report.comparison import BASELINES, PROBE

    records = {name: read_record(RUN / file) for name, file in BASELINES.items()}
    records |= {"SimMIM": read_record(SIMMIM / PROBE), "SG-MIM": read_record(RUN / PROBE)}
    shown = (("depth", "d1"), ("depth", "abs_rel"), ("segmentation", "mIoU"), ("segmentation", "aAcc"))
    print(f"\n  {'linear probes':14}" + "".join(f"{name:>10}" for _, name in shown))
    lines = {CONSTANT: [records["SG-MIM"].figures[kind][CONSTANT][name] for kind, name in shown]}
    lines |= {name: [record.figures[kind][kind][metric] for kind, metric in shown] for name, record in records.items()}
    for name, values in lines.items():
        print(f"  {name:14}" + "".join(f"{value:>10.3f}" for value in values))
    print("  One run each: a difference smaller than another seed makes says nothing.")
