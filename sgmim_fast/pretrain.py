"""Pre-training, as a module for the launchers: ``deepspeed --num_gpus 2 --module sgmim_fast.pretrain ...``."""

import os
import sys


def main(argv: list[str] | None = None) -> None:
    """Parse ``argv`` (default: the command line), then train."""
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed decides at import which accelerator it serves; said outright, it does not warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from sgmim_fast.train.arguments import parse_config
    from sgmim_fast.train.engine import pretrain

    pretrain(*parse_config(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    from sgmim_fast.train.arguments import main_with_errors

    main_with_errors(main)
