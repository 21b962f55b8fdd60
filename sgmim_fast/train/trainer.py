"""One rank's model and optimizer inside DeepSpeed's engine, and one step of them."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
from torch import Tensor, distributed

from sgmim_fast.data.batches import Batch
from sgmim_fast.data.order import BEGIN
from sgmim_fast.train.checkpoint import Position
from sgmim_fast.train.compiling import compile_step
from sgmim_fast.train.deepspeed_settings import deepspeed_config
from sgmim_fast.train.job import Job
from sgmim_fast.train.optim import build_optimizer
from sgmim_fast.train.profiling import StepProfiler

Span = Callable[[str], AbstractContextManager[object]]
"""Names a part of a step in the profiler's trace."""


class MicroStep(NamedTuple):
    """What a forward and backward pass saw and gave."""

    batch: Batch
    """What of it is in the host's memory: all of it, unless DALI made it on a GPU, where room is dear."""
    out: tuple[Tensor | None, ...]
    """The losses, without a graph."""

    @property
    def loss(self) -> Tensor:
        """The one that is minimised."""
        assert self.out[0] is not None
        return self.out[0]


class Step(NamedTuple):
    """One optimizer step."""

    rate: float
    """Learning rate, of the groups that have no scale of their own."""
    norm: float | Tensor | None
    """Of all ranks' gradient before clipping."""
    taken: bool
    """False if the gradient was not finite; the weights then stayed as they were. The same on every rank."""
    micro_steps: list[MicroStep]
    waited: float
    """Seconds for batches."""


class Trainer:
    """Makes the model from its seed, and steps it.

    Args:
        universal: the checkpoint to go on from is in DeepSpeed's universal format.
    """

    def __init__(self, job: Job[Any], run: Path, device: torch.device, *, universal: bool = False) -> None:
        config = job.config
        self.job, self.config, self.run, self.device = job, config, run, device
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.order = job.order(self.world_size)
        train = config.train
        seed_all(train.seed)
        self.task = job.make_task(device, train.backend)
        optimizer = build_optimizer(job.parameter_groups(self.task), config.optimizer, device)
        settings = deepspeed_config(config)
        if universal:
            settings["checkpoint"] = {"load_universal": True}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=self.task, optimizer=optimizer, config=settings)
        if train.compile:
            compile_step(self.task)
        self._buffers = [buffer for buffer in self.task.buffers() if buffer.numel()]
        """Running statistics; a step that is not taken leaves them as they were, like the weights."""
        self.position = Position.at(0, self.order.state(BEGIN, job.sha256), config)

    def last_step(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.job.epochs() * self.order.steps_per_epoch
        return total if self.config.train.max_steps is None else min(total, self.config.train.max_steps)

    def summary(self, total: int) -> str:
        """One line that says what is about to happen."""
        train, start = self.config.train, self.position.step
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.parameters())
        return (
            f"{self.job.summary()}; {parameters / 1e6:.1f} M parameters, {self.order.step_size} pairs a step on "
            f"{self.world_size} {self.device.type} rank(s), {train.precision}, ZeRO {train.zero_stage}"
            f"{', compiled' if train.compile else ''}; {total} steps" + (f", from step {start}" if start else "")
        )

    def step(self, number: int, batches: Iterator[Batch], profiler: StepProfiler, beat: Callable[[str], None]) -> Step:
        """Optimizer step ``number`` (from 0): all its micro-steps, then the optimizer's.

        Args:
            beat: told what is about to be done.
        """
        with profiler.step(number + 1):
            return self._step(number, batches, profiler.span, beat)

    def _step(self, number: int, batches: Iterator[Batch], span: Span, beat: Callable[[str], None]) -> Step:
        rate = self._set_rate(number)
        # Whatever a step draws (drop path) is of (seed, step, rank), so a resumed run draws the same.
        seed_all((self.config.train.seed * 1_000_003 + number) * self.world_size + self.rank)
        buffers = [buffer.clone() for buffer in self._buffers]
        micro_steps: list[MicroStep] = []
        norm: float | Tensor | None = None
        waited = 0.0
        for _ in range(self.config.train.accumulation_steps):
            beat(f"waiting for a batch of step {number + 1}")
            before = time.perf_counter()
            with span("data"):
                loaded = next(batches)
            waited += time.perf_counter() - before
            beat(f"computing step {number + 1}")
            with span("forward"):
                out = self.engine({name: value.to(self.device, non_blocking=True) for name, value in loaded.items()})
            with span("backward"):
                self.engine.backward(_poisoned_unless_finite(out[0]))
            micro_steps.append(MicroStep(_on_host(loaded), _detached(out)))
            taken = True
            if self.config.train.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
                # Stage 0 clips without telling the norm, and would take the step whatever the norm is.
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.task.parameters() if p.grad is not None])
                taken = bool(torch.isfinite(norm))
            with span("optimizer"), nullcontext() if taken else _held(self.engine.optimizer):
                self.engine.step()
        if self.config.train.zero_stage > 0:
            norm, taken = self.engine.get_global_grad_norm(), self.engine.was_step_applied()
        if not taken:
            for buffer, kept in zip(self._buffers, buffers, strict=True):
                buffer.copy_(kept)
        return Step(rate, norm, taken, micro_steps, waited)

    def _set_rate(self, step: int) -> float:
        rate = self.job.learning_rate(step, self.order)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate


def _on_host(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if not value.is_cuda}


def _detached(out: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if value is None else value.detach() for value in out)


@contextmanager
def _held(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Its steps do nothing."""
    vars(optimizer)["step"] = lambda closure=None: None
    try:
        yield
    finally:
        del vars(optimizer)["step"]


def _poisoned_unless_finite(loss: Tensor) -> Tensor:
    """The loss itself; the gradient of one that is not finite is not either, which an L1 loss alone does not give."""
    return loss * torch.where(torch.isfinite(loss), 1.0, torch.nan).to(loss.dtype)


def seed_all(seed: int) -> None:
    """Every generator that a step may draw from, on every device; NumPy's old one too, as libraries use it."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.manual_seed(seed)
