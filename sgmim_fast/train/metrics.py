"""What a run reports while it goes: metrics.jsonl, TensorBoard, progress bar or plain lines; rank 0 only."""

import json
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, distributed
from torch.utils.tensorboard import SummaryWriter

from sgmim_fast.models.sgmim import PretrainOutput

LOSSES = ("loss", "image_loss", "structure_loss")


class LossWindow:
    """Losses summed on the device since the last log step, so that no step waits for the host.

    Losses that are not finite are left out: their steps are not taken either.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros(4, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)

    @torch.no_grad()
    def add(self, out: PretrainOutput) -> None:
        structure = out.loss.new_zeros(()) if out.structure_loss is None else out.structure_loss
        one = torch.stack((out.loss, out.image_loss, structure, torch.ones_like(out.loss))).to(self._sum.dtype)
        self._sum += torch.where(torch.isfinite(one.sum()), one, 0.0)

    def over_ranks(self, bad_samples: int) -> dict[str, float | int | None]:
        """Means of all ranks' micro-steps, None if no loss was finite, and all ranks' ``bad_samples``.

        Waits for the device, and begins a new window.
        """
        together = torch.cat((self._sum, self._sum.new_tensor([bad_samples])))
        distributed.all_reduce(together)
        self._sum.zero_()
        *sums, count, bad = together.tolist()
        means = dict.fromkeys(LOSSES) if count == 0 else {n: s / count for n, s in zip(LOSSES, sums, strict=True)}
        return {**means, "bad_samples": int(bad)}


class Stopwatch:
    """Time since the last log step, and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self.origin = self._mark = time.perf_counter()
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def lap(self, images: int) -> dict[str, float]:
        """``images_per_second``, ``data_wait`` (share of the time) and ``time`` (seconds since the start)."""
        now = time.perf_counter()
        span, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        return {"images_per_second": images / span, "data_wait": waited / span, "time": now - self.origin}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, or resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Reporter:
    """Writes metric rows; a context manager. On ranks other than 0 it does nothing."""

    def __init__(self, run: Path, first_step: int, total_steps: int, chief: bool) -> None:
        self.run, self.chief = run, chief
        self._first, self._total = first_step, total_steps
        self._console = Console()

    def __enter__(self) -> Self:
        if not self.chief:
            return self
        self._rows = (self.run / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self._first or None)
        self._progress = Progress(
            TextColumn("[bold]pre-training"),
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
            self._board.close()
            self._rows.close()

    def step(self, step: int) -> None:
        """``step`` optimizer steps are done."""
        if self.chief:
            self._progress.update(self._task, completed=step)

    def row(self, row: dict[str, float | int | None]) -> None:
        """One row of metrics, at a log step."""
        if not self.chief:
            return
        self._rows.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if value is not None and name not in ("step", "epoch", "time"):
                self._board.add_scalar(f"pretrain/{name}", value, row["step"], walltime=time.time())
        losses = (f"{name.removesuffix('_loss')} {row[name]:.4f}" for name in LOSSES if row[name] is not None)
        note = " ".join((*losses, f"{row['images_per_second']:.1f} img/s"))
        self._progress.update(self._task, note=note)
        if not self._console.is_terminal:
            self.say(f"step {row['step']}/{self._total} {note}")

    def say(self, line: str) -> None:
        """One line for the reader, above the progress bar."""
        if self.chief:
            self._progress.console.print(line, highlight=False, soft_wrap=True)


def as_float(value: float | Tensor | None) -> float | None:
    """DeepSpeed hands out norms as numbers or tensors, by stage and version."""
    return None if value is None else float(value)
