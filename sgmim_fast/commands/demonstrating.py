"""``sgmim demo``: scenes, a small pre-training and a page; with ``--compare`` SimMIM beside SG-MIM on that page.

What the two trainings of the comparison share: the recipe, the images, the number of steps, the encoder's initial
weights (a model draws them first, so one seed gives the same whatever follows), and the crops, masks and order of the
samples, which are functions of seed, epoch and sample. What they do not: the maps, which SimMIM is not given; the
initial weights of the heads, drawn after the guidance that SimMIM lacks; the number of parameters; the norm that
gradients are clipped by, over all parameters; and the time of a step.
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
_SCORED, _SHARE = 100, 5
"""Scenes to score on, at most; fewer where there are not so many times as many to train on."""
_RESUME = ("--resume", "auto")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--count", type=int, default=1500, help="scenes to render")
    parser.add_argument("--steps", type=int, help="stop training after this many steps, not the recipe's epochs")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also pre-train without maps (SimMIM), from the same encoder weights and on the same batches; probe both "
        "on scenes unlike those of training, and show them side by side: about twice the time",
    )


def run(arguments: argparse.Namespace) -> None:
    """Do what is not done yet.

    Raises:
        UserError: if what is there already cannot be compared.
        SystemExit: if a training fails.
    """
    from sgmim_fast.commands.compared_probes import probe_runs, show_figures
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
        _render(TEST_SCENES, min(_SCORED, max(2, arguments.count // _SHARE)), "test", begin)
        begin("probing frozen features")
        probe_runs(RUN, SIMMIM, SCENES, TEST_SCENES)
    begin("writing the page")
    page = write_report(RUN, against=SIMMIM if arguments.compare else None)
    print(f"wrote {page}")
    begin("exporting for timm")
    for folder in (RUN, SIMMIM) if arguments.compare else (RUN,):
        _export(folder)
    if arguments.compare:
        show_figures(RUN, SIMMIM)
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


def _export(folder: Path) -> None:
    from sgmim_fast.commands import exporting

    exporting.run(argparse.Namespace(run=folder, layout="timm", output=None, image_size=None, batch_size=None))
