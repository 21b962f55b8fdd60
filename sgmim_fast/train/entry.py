"""What the module entry points share: a run, or its dry run, on this rank."""

import os
from typing import Any

from sgmim_fast.errors import EXIT_PREEMPTED
from sgmim_fast.train.job import Job


def start(job: Job[Any], recipe: str) -> None:
    """Run ``job`` as one of the ranks that a launcher has started.

    Raises:
        SystemExit: with EXIT_PREEMPTED if it was told to stop and has saved.
    """
    if job.config.dry_run:
        from sgmim_fast.train.dry_run import dry_run

        if os.environ.get("RANK", "0") == "0":
            dry_run(job, int(os.environ.get("WORLD_SIZE", "1")))
        return
    from sgmim_fast.train.engine import run_job

    if not run_job(job, recipe):
        raise SystemExit(EXIT_PREEMPTED)
