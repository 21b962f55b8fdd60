"""What a fine-tuning run left, opened again: its model, and its settings with some of them changed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sgmim_fast.errors import UserError, first_line

if TYPE_CHECKING:
    import torch


class FinetunedRun(NamedTuple):
    """A run's model and job."""

    task: Any
    """In evaluation mode, on ``device``."""
    job: Any
    """``FinetuneJob`` of the run's settings, as changed."""
    notes: dict[str, Any]
    """See ``save_finetuned``."""
    weights: Path
    """The file that was read."""
    device: "torch.device"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both commands are told about the run."""
    parser.set_defaults(takes_settings=True)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of the run or of one of its checkpoints, or its model.safetensors"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one, else the CPU)")
    parser.add_argument(
        "--backend", choices=("auto", "reference", "torch", "triton"), default="auto", help="implementation"
    )


def open_run(arguments: argparse.Namespace, settings: Sequence[str], changeable: Sequence[str]) -> FinetunedRun:
    """The run that ``add_options`` was told.

    Args:
        settings: options of fine-tuning that take the place of the run's own, such as ``--evaluation.windows 1``.
        changeable: the options that matter to the command; a group of them ends with a dot.

    Raises:
        UserError: if it is none, or has no checkpoint.
    """
    from sgmim_fast.tasks.finetuned import load_finetuned
    from sgmim_fast.train.arguments import changed_config, kind_of_run, load_config
    from sgmim_fast.train.depth_job import DepthJob
    from sgmim_fast.train.programs import DEPTH, SEGMENTATION
    from sgmim_fast.train.run_folder import WEIGHTS, latest_checkpoint
    from sgmim_fast.train.segmentation_job import SegmentationJob

    named = arguments.run.parent if arguments.run.name == WEIGHTS else arguments.run
    run = named.resolve().parents[1] if (named / WEIGHTS).is_file() else named
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: is no run's folder (it has no config.json); name the --output of sgmim finetune")
    kind = kind_of_run(run / "config.json")
    if kind not in (DEPTH.kind, SEGMENTATION.kind):
        raise UserError(f"{run}: is a {kind} run; name one of sgmim finetune")
    checkpoint = latest_checkpoint(run) if run == named else named
    if checkpoint is None:
        raise UserError(f"{run}: has no checkpoint yet; fine-tune it first")
    weights = checkpoint / WEIGHTS
    job: Any
    if kind == DEPTH.kind:
        job = DepthJob(changed_config(load_config(run / "config.json", DEPTH), settings, DEPTH))
    else:
        job = SegmentationJob(changed_config(load_config(run / "config.json", SEGMENTATION), settings, SEGMENTATION))
    _refuse_others(settings, changeable)
    device = open_device(arguments.device)
    task, notes = load_finetuned(weights)
    task.to(device)
    task.backbone.set_backend(arguments.backend)
    return FinetunedRun(task, job, notes, weights, device)


def _refuse_others(settings: Sequence[str], changeable: Sequence[str]) -> None:
    """What the weights were trained as cannot be changed, and what a command does not use would change nothing."""
    for word in settings:
        name = word.split("=")[0].replace("_", "-")
        name = "--data.path" if name == "--data" else name
        if name.startswith("--") and not name.startswith(tuple(changeable)):
            can = ", ".join(f"{option}*" if option.endswith(".") else option for option in changeable)
            raise UserError(f"option {name} changes nothing of a trained model here; what can be changed is {can}")


def open_device(name: str | None) -> "torch.device":
    """The device of this name, or a GPU if there is one, else the CPU.

    Raises:
        UserError: if it cannot be used.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from error
