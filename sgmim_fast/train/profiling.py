"""``--profile STEPS``: traces of chosen optimizer steps by PyTorch's profiler, and tables of their top operators."""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from sgmim_fast.errors import first_line

FOLDER = "profile"
TOP = 25
"""Operators in the table."""


class StepProfiler:
    """Records chosen steps on this rank; between them it does nothing.

    ``step`` goes around an optimizer step, ``span`` around its parts. A recorded step waits for the device before it
    begins and when it ends, and writing its trace takes time, so the metric row that it is in shows a lower rate.

    Args:
        run: the run's folder; files go to ``RUN/profile``.
        steps: optimizer steps, from 1; they need not be adjacent.
        rank: names the files.
        device: this rank's.
        say: told what was written, or why it could not be.
    """

    def __init__(
        self, run: Path, steps: Collection[int], rank: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._folder, self._steps, self._rank, self._device = run / FOLDER, frozenset(steps), rank, device
        self._say = say
        self._recording = False

    def warning(self, total: int) -> str:
        """Which steps leave no trace because the run ends at ``total``; empty if none do.

        Steps before the one that a run is resumed at are no mistake: they have been recorded.
        """
        beyond = " ".join(str(step) for step in sorted(self._steps) if step > total)
        return f"warning: --profile {beyond} leaves no trace: the run ends at {total}" if beyond else ""

    def step(self, step: int) -> AbstractContextManager[None]:
        """Around optimizer step ``step``, counted from 1: records it if it is one of the chosen."""
        return self._record(step) if step in self._steps else nullcontext()

    def span(self, name: str) -> AbstractContextManager[object]:
        """A named range of the trace: data, forward, backward, optimizer."""
        return record_function(name) if self._recording else nullcontext()

    @contextmanager
    def _record(self, step: int) -> Iterator[None]:
        on_gpu = self._device.type == "cuda"
        # Its tracer tells every start and stop, and that a CPU has no GPU; what it fails at shows in what it recorded.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        if on_gpu:
            torch.cuda.synchronize(self._device)
        self._recording = True
        try:
            with profile(activities=activities, record_shapes=True, with_flops=True, acc_events=True) as recorded:
                began = time.perf_counter()
                with record_function(f"step {step}"):
                    yield
                if on_gpu:
                    torch.cuda.synchronize(self._device)
                seconds = time.perf_counter() - began
        finally:
            self._recording = False
        try:
            self._write(recorded, step, seconds)
        except OSError as error:  # training matters more than its trace
            self._warn(f"no trace of step {step} is written: {first_line(error)}")

    def _write(self, recorded: profile, step: int, seconds: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{step:06d}_rank{self._rank}"
        trace, table = self._folder / f"{name}.json.gz", self._folder / f"{name}.txt"
        aside = [path.with_name(f".incomplete-{path.name}") for path in (trace, table)]
        recorded.export_chrome_trace(str(aside[0]))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        operators = recorded.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=60)
        aside[1].write_text(f"step {step}, rank {self._rank}, {self._device}: {1e3 * seconds:.2f} ms\n{operators}\n")
        for temporary, final in zip(aside, (trace, table), strict=True):
            os.replace(temporary, final)
        self._say(f"traced step {step}: {trace}")
        if self._device.type == "cuda" and not any(e.device_type == DeviceType.CUDA for e in recorded.events() or ()):
            self._warn(f"{trace} holds no work of the GPU: the driver may keep its counters from other users than root")

    def _warn(self, reason: str) -> None:
        """On any rank: only rank 0 has a progress bar to write above."""
        if self._rank == 0:
            self._say(f"warning: {reason}")
        else:
            print(f"warning: rank {self._rank}: {reason}", file=sys.stderr, flush=True)
