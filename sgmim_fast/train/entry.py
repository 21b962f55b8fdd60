"""What the module entry points share: a run, or its dry run, on this rank."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgmim_fast.errors import EXIT_PREEMPTED, one_line_errors
from sgmim_fast.train.job import Job


def run_module(make_job: Callable[[Sequence[str]], tuple[Job[Any], str]]) -> None:
    """Run what the command line asks for as one of the ranks that a launcher has started.

    Args:
        make_job: of the command line's words; gives the run and the recipe's name.

    Raises:
        SystemExit: with EXIT_PREEMPTED if the run was told to stop and has saved; with the status of bad input.
    """
    if not torch.cuda.is_available():
        # DeepSpeed decides at import which accelerator it serves; said outright, it does not warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with one_line_errors():
        job, recipe = make_job(sys.argv[1:])
        if job.config.dry_run:
            from sgmim_fast.train.dry_run import dry_run

            if os.environ.get("RANK", "0") == "0":
                dry_run(job, int(os.environ.get("WORLD_SIZE", "1")))
            return
        from sgmim_fast.train.engine import run_job

        if not run_job(job, recipe):
            raise SystemExit(EXIT_PREEMPTED)
