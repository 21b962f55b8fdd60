"""Steps whose gradient is not finite: they are skipped, counted and written down; too many in a row end the run."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

from sgmim_fast.errors import UserError
from sgmim_fast.train.agreement import Agreement
from sgmim_fast.train.trainer import MicroStep

LIST = "nonfinite.jsonl"
FOLDER = "nonfinite"
_DUMPS = 8  # batches that a rank keeps; later ones are named in LIST alone
_NAMED = 12  # samples in a message


class SkippedSteps:
    """What a rank keeps of steps that were not taken. Every rank calls it for the same steps.

    Args:
        count: skipped steps before a resumed run.
        most_in_a_row: more than this many end the run.
        sources: entries of a batch that were read from files.
        say: told of every skipped step.
    """

    def __init__(
        self,
        run: Path,
        agreement: Agreement,
        count: int,
        most_in_a_row: int,
        sources: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self.count, self._run, self._agreement, self._most, self._say = count, run, agreement, most_in_a_row, say
        self._sources = sources
        self._in_a_row = 0

    def taken(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def skipped(self, step: int, epoch: float, micro_steps: Sequence[MicroStep]) -> None:
        """A step was not taken; ``micro_steps`` are this rank's.

        Writes each suspect batch to ``RUN/nonfinite/`` and names it in ``RUN/nonfinite.jsonl``.

        Raises:
            UserError: on every rank, with the suspect samples, if it is one too many in a row.
        """
        self.count += 1
        self._in_a_row += 1
        rank = distributed.get_rank()
        rows = [
            {
                "step": step,
                "epoch": epoch,
                "rank": rank,
                "loss": loss if math.isfinite(loss := float(micro.loss)) else str(loss),
                "samples": micro.batch["index"].tolist(),
                "samples_not_finite": _not_finite(micro.batch, self._sources),
            }
            for micro in micro_steps
        ]
        found = [row for rows_of_rank in self._agreement.gather(rows) for row in rows_of_rank]
        # A loss that is not finite accuses its batch; with none, the gradient overflowed in any of them.
        suspects = [row for row in found if row["samples_not_finite"] or isinstance(row["loss"], str)] or found
        for number, row in enumerate(rows):
            if row in suspects:
                self._dump(f"step_{step:06d}_rank{rank}_{number}", micro_steps[number].batch)
        if rank == 0:
            with (self._run / LIST).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in suspects)
            self._say(
                f"warning: step {step} has a gradient that is not finite and is skipped ({self.count} so far); "
                f"{self._run / LIST} names its samples"
            )
        if self._in_a_row > self._most:
            error = UserError(
                f"{self._in_a_row} steps in a row had a gradient that is not finite, the last with samples "
                f"{_names(suspects)}; {self._run / LIST} names all: look at these pairs, lower --optimizer.lr, or "
                "allow more by --fault.max-skipped-steps"
            )
            error.told_elsewhere = rank != 0
            raise error

    def _dump(self, name: str, batch: Mapping[str, Tensor]) -> None:
        folder = self._run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.glob(f"*_rank{distributed.get_rank()}_*"))) < _DUMPS:
            save_file({key: value.contiguous() for key, value in batch.items()}, folder / f"{name}.safetensors")


def _not_finite(batch: Mapping[str, Tensor], sources: Sequence[str]) -> list[int]:
    """Samples whose files themselves hold numbers that are not finite."""
    index = batch["index"]
    bad = torch.zeros(len(index), dtype=torch.bool)
    for name in sources:
        if name in batch:
            bad |= ~torch.isfinite(batch[name]).flatten(1).all(1)
    return [int(i) for i, is_bad in zip(index.tolist(), bad.tolist(), strict=True) if is_bad]


def _names(suspects: Sequence[Mapping[str, object]]) -> str:
    narrowed = [i for row in suspects for i in row["samples_not_finite"]]  # type: ignore[attr-defined]
    samples = narrowed or [i for row in suspects for i in row["samples"]]  # type: ignore[attr-defined]
    return ", ".join(map(str, samples[:_NAMED])) + (", ..." if len(samples) > _NAMED else "")
