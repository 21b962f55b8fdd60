"""``python -m tests.finetune_matrix DATA WEIGHTS OUTPUT [OTHER]``: straight and interrupted fine-tuning.

As ``tests.resume_matrix``, one process a rank for all runs. Each combination has in OUTPUT ``straight`` of four steps,
evaluated after two and four; ``halves`` that stops after two and is resumed by a new engine that evaluates only at its
end. ``stopped`` is told to stop in both evaluations, and goes on twice. ``poisoned`` has three steps, one of them with
infinity in an image. With a fourth argument, the OUTPUT of another number of ranks, those ``halves`` are resumed at
step two by this number of ranks: ``other``.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sgmim_fast.finetune import make_job
from sgmim_fast.tasks.evaluation import SegmentationCounts
from sgmim_fast.train.engine import run_job
from sgmim_fast.train.segmentation_job import SegmentationJob
from tests.faulty_pretrain import poison
from tests.finetune_runs import arguments

COMBINATIONS = [("depth", 0, "fp32"), ("depth", 3, "bf16"), ("segmentation", 2, "fp32")]


def name(task: str, stage: int, precision: str) -> str:
    return f"{task}_zero{stage}_{precision}"


@contextmanager
def terminated_in_evaluation(here: bool) -> Iterator[None]:
    """SIGTERM to this rank when an evaluation has begun."""
    usual = SegmentationJob.counts

    def counts(self: SegmentationJob, device: torch.device) -> SegmentationCounts:
        if here:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, device)

    SegmentationJob.counts = counts  # type: ignore[method-assign]
    try:
        yield
    finally:
        SegmentationJob.counts = usual  # type: ignore[method-assign]


def main() -> None:
    data, weights, output, *others = map(Path, (word for word in sys.argv[1:] if not word.startswith("--local_rank")))
    ranks = int(os.environ["WORLD_SIZE"])
    destroy = distributed.destroy_process_group
    distributed.destroy_process_group = lambda: None  # DeepSpeed keeps groups for the life of a process

    def run(task: str, folder: Path, stage: int, precision: str, finishes: bool = True, **options: Any) -> None:
        chosen: dict[str, Any] = {"train__zero_stage": stage, "train__precision": precision}
        chosen |= {"train__batch_size": 4 // ranks}
        if task == "segmentation":
            chosen["segmentation__dropout"] = 0.0  # drawn by each rank for its own images
            chosen["backbone__drop_path_rate"] = 0.0
            chosen["data__ratio_range"] = "1 1"  # padding does not count, and ranks average what does
        assert run_job(*make_job(arguments(task, data, weights, folder, **chosen | options))) is finishes

    for task, stage, precision in COMBINATIONS:
        folder = output / name(task, stage, precision)
        for other in others:
            written = other / folder.name / "halves" / "checkpoints" / "step_000002"
            run(task, folder / "other", stage, precision, resume=written)
        if others:
            continue
        run(task, folder / "straight", stage, precision)
        run(task, folder / "halves", stage, precision, train__max_steps=2)
        run(task, folder / "halves", stage, precision, resume="auto", evaluate_every=0)
    for task, stage, precision in COMBINATIONS[-1:] if not others else ():
        for _ in range(2):  # in the evaluation after two steps, then in the last one
            with terminated_in_evaluation(distributed.get_rank() == ranks - 1):
                run(task, output / "stopped", stage, precision, resume="auto", finishes=False)
        run(task, output / "stopped", stage, precision, resume="auto")
    with poison([2]) if distributed.get_rank() == ranks - 1 else nullcontext():  # the last rank alone meets it
        task, stage, precision = COMBINATIONS[0]
        if not others:
            run(task, output / "poisoned", stage, precision, train__max_steps=3, train__checkpoint_every=1)
    destroy()


if __name__ == "__main__":
    main()
