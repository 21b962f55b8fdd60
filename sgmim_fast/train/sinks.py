"""Where metric rows go: metrics.jsonl and TensorBoard's files. Weights & Biases has a file of its own."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from sgmim_fast.train.rewinding import rewind_rows

MetricRow = Mapping[str, float | int | None]


def known_curves(row: MetricRow) -> Iterator[tuple[str, float | int]]:
    """Columns that are no axes, where their value is known."""
    return ((name, value) for name, value in row.items() if value is not None and name not in ("step", "epoch", "time"))


class Sink(Protocol):
    """Takes the rows of a run, on rank 0."""

    def row(self, row: MetricRow) -> None:
        """One row; its ``step`` is not smaller than that of any row before."""

    def close(self, failed: bool) -> None:
        """No row follows."""


class JsonLines:
    """A file with a line as soon as there is a row; what follows ``first_step`` there is moved aside before."""

    def __init__(self, run: Path, first_step: int, name: str) -> None:
        rewind_rows(run, first_step, name)
        self._file = (run / name).open("a", buffering=1)

    def row(self, row: MetricRow) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self, failed: bool) -> None:
        self._file.close()


class TensorBoard:
    """Event files in ``tensorboard/``; readers forget what earlier ones hold of the steps after ``first_step``.

    Names of curves begin with ``kind``.
    """

    def __init__(self, run: Path, first_step: int, kind: str) -> None:
        self._kind = kind
        # Readers forget from purge_step on, that step included.
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def row(self, row: MetricRow) -> None:
        for name, value in known_curves(row):
            self._writer.add_scalar(f"{self._kind}/{name}", value, row["step"], walltime=time.time())

    def close(self, failed: bool) -> None:
        self._writer.close()
