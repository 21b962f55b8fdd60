"""Pre-training, as a module for the launchers: ``deepspeed --num_gpus 2 --module sgmim_fast.pretrain ...``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgmim_fast.train.job import Job


def make_job(words: Sequence[str]) -> "tuple[Job[Any], str]":
    """The run that a command line asks for, and the recipe's name.

    Raises:
        UserError: for whatever is wrong with it.
        SystemExit: after ``--help``.
    """
    from sgmim_fast.train.arguments import parse_config
    from sgmim_fast.train.programs import PRETRAIN

    config, recipe = parse_config(words, PRETRAIN)
    from sgmim_fast.train.pretrain_job import PretrainJob

    return PretrainJob(config), recipe


def main() -> None:
    """Parse the command line, then train. Heavy imports wait, because loader processes import this file too."""
    from sgmim_fast.train.entry import run_module

    run_module(make_job)


if __name__ == "__main__":
    main()
