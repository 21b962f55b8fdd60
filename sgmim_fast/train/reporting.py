"""What a run reports while it goes, on rank 0: rows to every sink, and a progress bar or plain lines."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sgmim_fast.train.job import Job
from sgmim_fast.train.metrics import Efficiency
from sgmim_fast.train.rewinding import EVALUATIONS, METRICS
from sgmim_fast.train.sinks import JsonLines, MetricRow, Sink, TensorBoard, known_curves
from sgmim_fast.train.wandb_sink import WandbSink


class Reporter:
    """Writes metric rows; a context manager. On ranks other than 0 it does nothing.

    Args:
        run: the run's folder, which exists.
        job: of the run.
        first_step: optimizer steps done already; rows of later ones, left by what is being resumed, are put aside.
        total_steps: of the whole run.
        device: this rank's.
        ranks: of the run.
        chief: whether this is rank 0.
    """

    def __init__(
        self,
        run: Path,
        job: Job[Any],
        first_step: int,
        total_steps: int,
        *,
        device: torch.device,
        ranks: int,
        chief: bool,
    ) -> None:
        self.run, self.job, self.chief = run, job, chief
        self._first, self._total = first_step, total_steps
        self._device, self._ranks = device, ranks
        self._console = Console()
        self._evaluations: JsonLines | None = None

    def __enter__(self) -> Self:
        """Raises UserError if Weights & Biases cannot start."""
        if not self.chief:
            return self
        self._efficiency = Efficiency.of(self.job, self._device, self._ranks)
        self._sinks: list[Sink] = []
        with ExitStack() as opened:  # what is open is closed again if the next one cannot be opened
            opened.callback(self._close, failed=True)
            self._sinks.append(JsonLines(self.run, self._first, METRICS))
            if self.job.evaluates:
                self._evaluations = JsonLines(self.run, self._first, EVALUATIONS)
            self._sinks.append(TensorBoard(self.run, self._first, self.job.kind))
            if self.job.config.monitor.wandb != "off":
                self._sinks.append(WandbSink(self.run, self.job.config, self._first, self.job.kind, self.say))
            opened.pop_all()
        self._progress = Progress(
            TextColumn(f"[bold]{self.job.doing}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=self._total, completed=self._first, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.chief:
            self._progress.stop()
            self._close(failed=kind is not None)

    def _close(self, failed: bool) -> None:
        while self._sinks:
            self._sinks.pop().close(failed)
        if self._evaluations is not None:
            self._evaluations.close(failed)

    def step(self, step: int) -> None:
        """``step`` optimizer steps are done."""
        if self.chief:
            self._progress.update(self._task, completed=step)

    def row(self, row: MetricRow) -> None:
        """One row of metrics, at a log step; ``tflops`` and ``mfu`` are added to it."""
        if not self.chief:
            return
        rate = row["images_per_second"]
        assert rate is not None
        row = {**row, **self._efficiency.at(rate)}
        for sink in self._sinks:
            sink.row(row)
        losses = [
            f"{name.removesuffix('_loss')} {value:.4f}" for name in self.job.losses if (value := row[name]) is not None
        ]
        mfu = [] if row["mfu"] is None else [f"MFU {100 * row['mfu']:.1f} %"]
        note = " ".join((*losses, f"{rate:.1f} img/s", *mfu))
        self._progress.update(self._task, note=note)
        if not self._console.is_terminal:
            self.say(f"step {row['step']}/{self._total} {note}")

    def evaluation(self, row: MetricRow) -> None:
        """One row of figures on the images that are not trained on."""
        if not self.chief:
            return
        assert self._evaluations is not None
        self._evaluations.row(row)
        figures = dict(known_curves(row))
        for sink in self._sinks[1:]:  # all but metrics.jsonl
            sink.row({"step": row["step"], "epoch": row["epoch"], **{f"val_{n}": v for n, v in figures.items()}})
        self.say(f"evaluated after step {row['step']}: " + " ".join(f"{n} {v:.4g}" for n, v in figures.items()))

    def say(self, line: str) -> None:
        """One line for the reader, above the progress bar."""
        if self.chief:
            self._console.print(line, highlight=False, soft_wrap=True)

    def summary(self) -> str:
        """What model FLOPs utilisation is counted from, or that it is not known; empty on other ranks than 0."""
        return self._efficiency.summary() if self.chief else ""
