"""Pre-training, as a module for the launchers: ``deepspeed --num_gpus 2 --module sgmim_fast.pretrain ...``."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sgmim_fast.errors import one_line_errors

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
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed decides at import which accelerator it serves; said outright, it does not warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with one_line_errors():
        job, recipe = make_job(sys.argv[1:])
        from sgmim_fast.train.entry import start

        start(job, recipe)


if __name__ == "__main__":
    main()
