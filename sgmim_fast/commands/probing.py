"""``sgmim probe``: what an encoder knows before any fine-tuning, measured on its frozen features."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgmim_fast.commands.probed_weights import RANDOM, open_backbone
from sgmim_fast.errors import UserError

if TYPE_CHECKING:
    from sgmim_fast.probing.data import Kind
    from sgmim_fast.probing.features import Features
    from sgmim_fast.probing.probes import ProbeReport, Progress

DESCRIPTION = (
    "Judge a pre-trained encoder by its frozen features: linear depth, linear segmentation, nearest neighbours."
)
ROW_COLOUR = "row-colour"
_USUAL_IMAGES = {"train": 200, "val": 100}
_TEACHING = f"""{DESCRIPTION}

Nothing of the encoder is trained. Its maps are brought to one grid of tokens; each probe says from one token's features
alone what is there, and what it says is upsampled and scored pixel by pixel:

  depth             linear in the features, least squares of log depth, solved exactly
  segmentation      linear in the features, softmax, its one minimum
  knn-depth         mean log depth of the 20 most similar training tokens
  knn-segmentation  vote of the 20 most similar training tokens

Two lines stand beside them: "constant" says everywhere what training tokens have on average, "grid target" the truth as
far as the grid can tell it. Figures are comparable between weights if data, images, seed, grid and maps are the same.
"""
_EXAMPLES = f"""examples:
  sgmim probe runs/demo --data scenes/demo --dataset scenes --output demo.json
  sgmim probe {RANDOM} --like runs/demo --data scenes/demo --dataset scenes    same shape, nothing learnt
  sgmim probe {ROW_COLOUR} --data scenes/demo --dataset scenes             what place and colour tell
  sgmim probe runs/demo --data scenes/demo --val-data scenes/test --dataset scenes   scored on scenes of another folder
  sgmim probe swin_base.pth --name swin_base --data nyu --dataset nyu --train-images 50
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.description, parser.epilog = _TEACHING, _EXAMPLES
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help=f'folder of a pre-training run (its newest checkpoint) or of a checkpoint, a file of weights, "{RANDOM}" '
        f'for initial weights, or "{ROW_COLOUR}" for a baseline without an encoder',
    )
    parser.add_argument("--name", help="architecture, such as swin_base, where the weights do not say it")
    parser.add_argument("--like", type=Path, metavar="RUN", help=f'with "{RANDOM}": run or file to take the shape from')
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument(
        "--val-data",
        metavar="DIR",
        help="folder whose images are all scored on, of the same layout, scenes or folder (default: those of --data "
        "that are held out)",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        choices=("kitti", "nyu", "scenes", "folder", "ade20k"),
        help="its layout; scenes is what `sgmim synth` writes, folder is images/ with depth/ or labels/ of one's own",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=("depth", "segmentation", "knn-depth", "knn-segmentation"),
        help="probes (default: all that the data set has targets for; of a folder name them)",
    )
    parser.add_argument(
        "--train-images",
        type=int,
        help="labelled images to fit on, drawn by the seed "
        f"(default: {_USUAL_IMAGES['train']}, or all if there are fewer)",
    )
    parser.add_argument(
        "--val-images",
        type=int,
        help="images to score on, evenly from all over the split "
        f"(default: {_USUAL_IMAGES['val']}, or all if there are fewer)",
    )
    parser.add_argument("--seed", type=int, default=0, help=f'draws images, tokens, and the weights of "{RANDOM}"')
    parser.add_argument("--output", type=Path, metavar="FILE", help="write figures and their origin as JSON, too")
    grid = parser.add_argument_group("grid")
    grid.add_argument("--maps", type=int, nargs="+", metavar="N", help="maps to use, from 0, finest (default: all)")
    grid.add_argument(
        "--stride", type=int, help="pixels a token side (default: 8, or that of the finest map if it is coarser)"
    )
    grid.add_argument(
        "--add-place",
        action="store_true",
        help="add a token's row and column to its features: what maps tell beside it",
    )
    grid.add_argument(
        "--tokens",
        type=int,
        default=16_384,
        help="training tokens at most for segmentation, knn-depth and knn-segmentation; depth uses all",
    )
    targets = parser.add_argument_group("targets")
    targets.add_argument("--max-depth", type=float, help="metres (default: 80 for kitti and folder, 10 nyu, 30 scenes)")
    targets.add_argument("--depth-scale", type=float, help="of a folder: stored units a metre (default: 1000)")
    targets.add_argument("--classes", type=int, help="of a folder: number of classes")
    targets.add_argument("--train-list", metavar="FILE", help="list of the images to fit on, as in fine-tuning")
    targets.add_argument("--val-list", metavar="FILE", help="list of the images to score on")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", help="of the encoder, such as cuda:1 (default: a GPU if there is one, else the CPU)"
    )
    machine.add_argument("--cache-gib", type=float, default=2.0, help="memory for features that are needed twice")
    machine.add_argument(
        "--cache-dtype", choices=("float32", "float16"), default="float32", help="float16 halves it, and rounds"
    )


def run(arguments: argparse.Namespace) -> None:
    """Probe and print.

    Raises:
        UserError: for weights, data or options that do not fit.
    """
    from sgmim_fast.probing.data import open_splits
    from sgmim_fast.probing.probes import run_probes
    from sgmim_fast.probing.record import write_record
    from sgmim_fast.probing.settings import ProbeSettings
    from sgmim_fast.train.environment import describe_environment

    tasks = _tasks(arguments)
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise UserError(f"--output {arguments.output}: {arguments.output.parent} is not a folder; create it first")
    options = {
        "val_path": arguments.val_data,
        "lists": (arguments.train_list, arguments.val_list),
        "max_depth": arguments.max_depth,
        "depth_scale": arguments.depth_scale,
        "classes": arguments.classes,
    }
    splits = [open_splits(kind, arguments.dataset, arguments.data, **options) for kind in tasks]
    usual = {part: min(n, *(len(getattr(found, part)) for found in splits)) for part, n in _USUAL_IMAGES.items()}
    settings = ProbeSettings(
        train_images=usual["train"] if arguments.train_images is None else arguments.train_images,
        val_images=usual["val"] if arguments.val_images is None else arguments.val_images,
        seed=arguments.seed,
        tokens=arguments.tokens,
    )
    features, origin, device = _open_features(arguments)
    print(f"{origin}: {features.extractor.describe()}", flush=True)
    for found in splits:
        print(
            f"{found.kind}: fitted on {found.train.describe()}\n{found.kind}: scored on {found.val.describe()}",
            flush=True,
        )
    with bars() as tell:
        reports = {found.kind: run_probes(features, found, tasks[found.kind], settings, tell) for found in splits}
    for kind, report in reports.items():
        _show(kind, report)
    if arguments.output is not None:
        write_record(arguments.output, origin, features, settings, splits, reports, describe_environment(device, 1))
        print(f"wrote {arguments.output}")


@contextmanager
def bars() -> "Iterator[Progress]":
    """What tells progress in bars, one for each thing that is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield tell


def _tasks(arguments: argparse.Namespace) -> dict[Any, list[Any]]:
    """Probes by the kind of their targets."""
    from sgmim_fast.probing.data import kinds_of

    kinds = kinds_of(arguments.dataset)
    if arguments.tasks is None:
        if arguments.dataset == "folder":
            raise UserError("--tasks is not set; say which a folder has targets for, such as --tasks depth knn-depth")
        return {kind: [kind, f"knn-{kind}"] for kind in kinds}
    found: dict[Any, list[Any]] = {}
    for task in dict.fromkeys(arguments.tasks):
        kind = task.removeprefix("knn-")
        if kind not in kinds:
            raise UserError(
                f"--tasks {task} cannot be with --dataset {arguments.dataset}, which has targets for "
                f"{' and '.join(kinds)} alone"
            )
        found.setdefault(kind, []).append(task)
    return found


def _open_features(arguments: argparse.Namespace) -> "tuple[Features, str, Any]":
    """The features, what they are of, and the device that computes them."""
    import torch

    from sgmim_fast.commands.finetuned_runs import open_device
    from sgmim_fast.probing.features import BackboneFeatures, Features, RowColour

    if not arguments.cache_gib >= 0:
        raise UserError(f"--cache-gib {arguments.cache_gib} must be 0 or more")
    keeping = {"budget": int(arguments.cache_gib * 2**30), "dtype": getattr(torch, arguments.cache_dtype)}
    if arguments.like is not None and arguments.weights != RANDOM:
        raise UserError(f'--like is for "{RANDOM}" alone; leave it out')
    if arguments.weights == ROW_COLOUR:
        for option in ("maps", "name", "add_place"):
            if getattr(arguments, option) not in (None, False):
                said = option.replace("_", "-")
                raise UserError(f'--{said} means nothing for "{ROW_COLOUR}", which has no encoder; leave it out')
        return Features(RowColour(arguments.stride), **keeping), ROW_COLOUR, torch.device("cpu")
    device = open_device(arguments.device)
    backbone, origin = open_backbone(arguments.weights, name=arguments.name, like=arguments.like, seed=arguments.seed)
    extractor = BackboneFeatures(backbone.to(device), arguments.maps, arguments.stride, place=arguments.add_place)
    return Features(extractor, **keeping), origin, device


def _show(kind: "Kind", report: "ProbeReport") -> None:
    from sgmim_fast.probing.record import SHOWN

    print(
        f"\n{kind}: {report.train_images} images fitted on ({report.train_tokens} tokens, {report.kept_tokens} kept), "
        f"{report.val_images} scored"
    )
    _print_row("", SHOWN[kind])
    for result in report.results:
        _print_row(result.probe, [f"{result.figures[name]:.4f}" for name in SHOWN[kind]])


def _print_row(name: str, values: Sequence[str]) -> None:
    print(f"  {name:18}" + "".join(f"{value:>10}" for value in values))
