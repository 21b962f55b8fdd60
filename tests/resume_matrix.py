"""``python -m tests.resume_matrix DATA OUTPUT [OTHER]``: straight and interrupted runs, all ZeRO stages and precisions.

One process a rank for all of them, as starting one takes longer than all its steps; the group of ranks stays. Each
combination has three runs in OUTPUT: ``straight`` of four steps; ``halves`` that stops after two and is resumed from
its files by a new engine; ``poisoned`` of three steps, one of them with infinity in an image. With a third argument,
the OUTPUT of another number of ranks, those ``halves`` are resumed at step two by this number of ranks: ``other``.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import distributed

from sgmim_fast.train.arguments import parse_config
from sgmim_fast.train.engine import run_job
from sgmim_fast.train.pretrain_job import PretrainJob
from sgmim_fast.train.programs import PRETRAIN
from tests.faulty_pretrain import poison
from tests.training_runs import arguments

COMBINATIONS = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]
WITH_DROP_PATH = {
    "vit": (2, "bf16", {"model__embed_dim": 32, "model__depths": 2, "model__num_heads": 2, "model__patch_size": 16}),
    "swinv2": (3, "fp32", {}),
}
"""Encoders that draw numbers in each step, other ones on each rank."""


def name(stage: int, precision: str) -> str:
    return f"zero{stage}_{precision}"


def configured(data: Path, output: Path, stage: int, precision: str, ranks: int, **options: Any) -> list[str]:
    """Four pairs a step whatever the number of ranks."""
    chosen = {"train__zero_stage": stage, "train__precision": precision, "train__checkpoint_every": 2}
    return arguments(data, output, **chosen, train__batch_size=4 // ranks, **options)


def run(words: list[str]) -> None:
    config, recipe = parse_config(words, PRETRAIN)
    assert run_job(PretrainJob(config), recipe)


def straight_and_halves(data: Path, folder: Path, stage: int, precision: str, ranks: int, **options: Any) -> None:
    run([*configured(data, folder / "straight", stage, precision, ranks, **options), "--train.max-steps", "4"])
    words = configured(data, folder / "halves", stage, precision, ranks, **options)
    run([*words, "--train.max-steps", "2"])
    run([*words, "--train.max-steps", "4", "--resume", "auto"])


def main() -> None:
    data, output, *others = map(Path, (word for word in sys.argv[1:] if not word.startswith("--local_rank")))
    ranks = int(os.environ["WORLD_SIZE"])
    destroy = distributed.destroy_process_group
    distributed.destroy_process_group = lambda: None  # DeepSpeed keeps groups for the life of a process
    for stage, precision in COMBINATIONS:
        folder = output / name(stage, precision)
        for other in others:
            written = other / folder.name / "halves" / "checkpoints" / "step_000002"
            words = configured(data, folder / "other", stage, precision, ranks, train__max_steps=4)
            run([*words, "--resume", str(written)])
        if others:
            continue
        straight_and_halves(data, folder, stage, precision, ranks)
        # The last rank alone meets what is not finite in the second of three steps.
        words = configured(data, folder / "poisoned", stage, precision, ranks, train__max_steps=3)
        with poison([2]) if distributed.get_rank() == ranks - 1 else nullcontext():
            run([*words, "--train.checkpoint-every", "1"])
    for encoder, (stage, precision, shape) in () if others else WITH_DROP_PATH.items():
        shape = {"model__encoder": encoder, "model__drop_path_rate": 0.3, **shape}
        straight_and_halves(data, output / encoder, stage, precision, ranks, **shape)
    destroy()


if __name__ == "__main__":
    main()
