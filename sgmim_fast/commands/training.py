"""``sgmim pretrain`` and ``sgmim finetune``: options to the training module, under DeepSpeed's launcher."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sgmim_fast.errors import UserError
from sgmim_fast.finetune import make_job, task_of

if TYPE_CHECKING:
    from sgmim_fast.train.job import Job

_RANKS = "--num-gpus N    ranks on this machine (default: all GPUs, or 1 CPU rank), then the training options:\n"
_FINETUNE = """usage: sgmim finetune depth|segmentation [OPTIONS]

Train a pre-trained backbone on to predict depth in metres, or a class, for every pixel.

examples:
  sgmim finetune depth --recipe scenes                 what `sgmim demo` made, in minutes without a GPU
  sgmim finetune depth --recipe nyu --data DIR --weights RUN --output runs/nyu --resume auto
  sgmim finetune segmentation --recipe ade20k --data DIR --weights FILE --backbone.name swin_base

`sgmim finetune depth --help` and `sgmim finetune segmentation --help` list recipes and options."""


def train(command: str, argv: Sequence[str]) -> int:
    """Run "pretrain" or "finetune". Returns the exit status.

    Raises:
        UserError: for whatever is wrong with the options; said here, once, before any rank starts.
    """
    parser = argparse.ArgumentParser(prog=f"sgmim {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--num-gpus", "--num_gpus", type=int)
    known, words = parser.parse_known_args(list(argv))
    module = f"sgmim_fast.{command}"
    if "--help" in words or "-h" in words:
        if command == "finetune" and words[0].startswith("-"):
            print(_FINETUNE)
            return 0
        print(_RANKS)
        return subprocess.call([sys.executable, "-m", module, *words])
    if command == "finetune":
        task, rest = task_of(words)
        words = [task, *rest]
    import torch

    job = _job(command, words)
    if known.num_gpus is not None and known.num_gpus < 1:
        raise UserError(f"--num-gpus {known.num_gpus} must be 1 or more")
    count = known.num_gpus or torch.cuda.device_count() or 1
    if job.config.dry_run:
        from sgmim_fast.train.dry_run import dry_run

        dry_run(job, count)
        return 0
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {count} is more than the {torch.cuda.device_count()} GPU(s) that are to be seen here"
        )
    from sgmim_fast.launching import launch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return launch(module, words, ranks=count, environment=environment)


def _job(command: str, words: Sequence[str]) -> "Job[Any]":
    if command == "finetune":
        return make_job(words)[0]
    from sgmim_fast.pretrain import make_job as make_pretraining

    return make_pretraining(words)[0]
