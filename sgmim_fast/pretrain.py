"""Pre-training, as a module for the launchers: ``deepspeed --num_gpus 2 --module sgmim_fast.pretrain ...``."""

import os
import sys

from sgmim_fast.errors import one_line_errors


def main() -> None:
    """Parse the command line, then train. Heavy imports wait, because loader processes import this file too."""
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed decides at import which accelerator it serves; said outright, it does not warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from sgmim_fast.train.arguments import parse_config
    from sgmim_fast.train.programs import PRETRAIN

    with one_line_errors():
        config, recipe = parse_config(sys.argv[1:], PRETRAIN)
        from sgmim_fast.train.entry import start
        from sgmim_fast.train.pretrain_job import PretrainJob

        start(PretrainJob(config), recipe)


if __name__ == "__main__":
    main()
