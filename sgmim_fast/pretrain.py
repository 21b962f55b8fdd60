"""Pre-training, as a module for the launchers: ``deepspeed --num_gpus 2 --module sgmim_fast.pretrain ...``."""

import os
import sys

from sgmim_fast.errors import EXIT_PREEMPTED, one_line_errors


def main() -> None:
    """Parse the command line, then train. Heavy imports wait, because loader processes import this file too."""
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed decides at import which accelerator it serves; said outright, it does not warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from sgmim_fast.train.arguments import PRETRAIN, parse_config

    with one_line_errors():
        config, recipe = parse_config(sys.argv[1:], PRETRAIN)
        if config.dry_run:
            from sgmim_fast.train.dry_run import dry_run
            from sgmim_fast.train.pretrain_job import PretrainJob

            if os.environ.get("RANK", "0") == "0":
                dry_run(PretrainJob(config), int(os.environ.get("WORLD_SIZE", "1")))
            return
        from sgmim_fast.train.engine import run_job
        from sgmim_fast.train.pretrain_job import PretrainJob

        if not run_job(PretrainJob(config), recipe):
            raise SystemExit(EXIT_PREEMPTED)


if __name__ == "__main__":
    main()
