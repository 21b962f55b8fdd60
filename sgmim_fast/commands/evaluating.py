"""``sgmim evaluate``: figures of a fine-tuned model on images that it was not trained on."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgmim_fast.commands import finetuned_runs

DESCRIPTION = "Test a fine-tuned model on images that it was not trained on."
_TEACHING = f"""{DESCRIPTION}

Depth: d1 d2 d3, AbsRel, SqRel, RMSE, RMSE of logarithms, log10 and SILog, each averaged over images. Segmentation:
mIoU, mAcc and aAcc of all pixels, and the IoU of each class. Data and protocol are those of the run unless --data.*,
--evaluation.*, --depth.min-depth or --depth.max-depth, as `sgmim finetune depth --help` explains them, stand last.
"""
_CHANGEABLE = ("--data.", "--evaluation.", "--depth.min-depth", "--depth.max-depth")
_EXAMPLES = """examples:
  sgmim evaluate runs/nyu --output figures.json
  sgmim evaluate runs/nyu --limit 50 --evaluation.no-flip --evaluation.windows 1      quick, and a little worse
  sgmim evaluate runs/kitti --data OTHER/kitti --depth.max-depth 50                   moved data, up to 50 m
  sgmim evaluate runs/ade20k/checkpoints/step_080000 --evaluation.mode whole          an earlier checkpoint
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.description, parser.epilog = _TEACHING, _EXAMPLES
    finetuned_runs.add_options(parser)
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which images")
    parser.add_argument("--limit", type=int, help="so many images, evenly from all over the split, instead of all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures and their origin as JSON, too")


def run(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    """Evaluate and print.

    Raises:
        UserError: for a run, data or settings that do not fit.
    """
    from dataclasses import asdict

    from rich.progress import Progress

    from sgmim_fast.data.dense.evaluation import evaluation_samples
    from sgmim_fast.errors import UserError
    from sgmim_fast.train.environment import describe_environment

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} must be 1 or more")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise UserError(f"--output {arguments.output}: {arguments.output.parent} is not a folder; create it first")
    opened = finetuned_runs.open_run(arguments, settings, _CHANGEABLE)
    samples = opened.job.open_split(arguments.split)
    count = len(samples)
    wanted = min(count, arguments.limit or count)
    indices = [number * count // wanted for number in range(wanted)]
    counts = opened.job.counts(opened.device)
    print(f"{opened.weights} on {samples.describe()}", flush=True)
    with Progress() as progress:
        task = progress.add_task("evaluating", total=wanted)
        for sample in evaluation_samples(samples, indices):
            counts.count(opened.task, sample)
            progress.advance(task)
    figures = counts.compute()
    details = counts.details(samples.class_names)
    for name, value in (figures | details).items():
        print(f"  {name:24}{value:>12.4f}" if isinstance(value, float) else f"  {name:24}{value:>12}")
    if arguments.output is not None:
        found: dict[str, Any] = {
            "figures": figures,
            "details": details,
            "weights": str(opened.weights),
            "split": arguments.split,
            "images": wanted,
            "data": samples.describe(),
            "list_sha256": samples.sha256,
            "evaluation": asdict(opened.job.config.evaluation),
            "environment": describe_environment(opened.device, 1),
        }
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.output}")
