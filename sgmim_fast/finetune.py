"""Fine-tuning, as a module for the launchers: ``deepspeed --num_gpus 2 --module sgmim_fast.finetune depth ...``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sgmim_fast.errors import UserError

if TYPE_CHECKING:
    from sgmim_fast.train.job import Job

USAGE = "depth or segmentation comes first, as in: sgmim finetune depth --recipe nyu --data DIR --backbone.weights RUN"


def task_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The task that the first of some words names, and the other words. Launchers put ``--local_rank=N`` before it.

    Raises:
        UserError: if it names none.
    """
    rest = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    if not rest or rest[0] not in ("depth", "segmentation"):
        raise UserError(USAGE)
    return rest[0], rest[1:]


def make_job(words: Sequence[str]) -> "tuple[Job[Any], str]":
    """The run that a command line asks for, and the recipe's name.

    Raises:
        UserError: for whatever is wrong with it.
        SystemExit: after ``--help``.
    """
    from sgmim_fast.train.arguments import parse_config
    from sgmim_fast.train.programs import DEPTH, SEGMENTATION

    task, rest = task_of(words)
    if task == "depth":
        depth, recipe = parse_config(rest, DEPTH)
        from sgmim_fast.train.depth_job import DepthJob

        return DepthJob(depth), recipe
    segmentation, recipe = parse_config(rest, SEGMENTATION)
    from sgmim_fast.train.segmentation_job import SegmentationJob

    return SegmentationJob(segmentation), recipe


def main() -> None:
    """Parse the command line, then train. Heavy imports wait, because loader processes import this file too."""
    from sgmim_fast.train.entry import run_module

    run_module(make_job)


if __name__ == "__main__":
    main()
