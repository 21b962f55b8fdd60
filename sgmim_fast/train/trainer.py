"""One rank's model and optimizer inside DeepSpeed's engine, and one step of them."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import deepspeed
import numpy as np
import torch
from torch import Tensor, distributed

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.batches import Batch
from sgmim_fast.data.loading import choose_loader, sample_order
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.order import BEGIN
from sgmim_fast.models.sgmim import PretrainOutput
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.checkpoint import Position
from sgmim_fast.train.compiling import compile_step
from sgmim_fast.train.deepspeed_settings import deepspeed_config
from sgmim_fast.train.optim import build_optimizer, learning_rate
from sgmim_fast.train.profiling import StepProfiler

Span = Callable[[str], AbstractContextManager[object]]
"""Names a part of a step in the profiler's trace."""


class MicroStep(NamedTuple):
    """What a forward and backward pass saw and gave."""

    batch: Batch
    """What of it is in the host's memory: all of it, unless DALI made it on a GPU, where room is dear."""
    out: PretrainOutput
    """Without a graph."""


class Step(NamedTuple):
    """One optimizer step."""

    rate: float
    """Learning rate."""
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

    def __init__(
        self, config: PretrainConfig, run: Path, pairs: Pairs, device: torch.device, *, universal: bool = False
    ) -> None:
        self.config, self.run, self.pairs, self.device = config, run, pairs, device
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.order = sample_order(pairs, config, self.world_size)
        train = config.train
        seed_all(train.seed)
        self.task = PretrainTask(
            config.model, train.backend, train.attention, train.norm, device, train.activation_checkpointing
        )
        optimizer = build_optimizer(self.task, config.optimizer, device)
        settings = deepspeed_config(config)
        if universal:
            settings["checkpoint"] = {"load_universal": True}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=self.task, optimizer=optimizer, config=settings)
        if train.compile:
            compile_step(self.task)
        self.position = Position.at(0, self.order.state(BEGIN, pairs.sha256), config)

    def last_step(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.config.schedule.epochs * self.order.steps_per_epoch
        return total if self.config.train.max_steps is None else min(total, self.config.train.max_steps)

    def summary(self, total: int) -> str:
        """One line that says what is about to happen."""
        model, train, start = self.config.model, self.config.train, self.position.step
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.parameters())
        loader, why = choose_loader(self.pairs, self.config)
        return (
            f"{model.encoder} encoder, guidance {model.guidance}, {parameters / 1e6:.1f} M parameters; "
            f"{len(self.pairs)} pairs through {loader} ({why}), {self.order.step_size} a step on {self.world_size} "
            f"{self.device.type} rank(s), {train.precision}, ZeRO {train.zero_stage}"
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
                self.engine.backward(_poisoned_unless_finite(out.loss))
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
        return Step(rate, norm, taken, micro_steps, waited)

    def _set_rate(self, step: int) -> float:
        config = self.config
        rate = learning_rate(step, self.order.steps_per_epoch, self.order.step_size, config.optimizer, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


def _on_host(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if not value.is_cuda}


def _detached(out: PretrainOutput) -> PretrainOutput:
    structure = None if out.structure_loss is None else out.structure_loss.detach()
    return PretrainOutput(out.loss.detach(), out.image_loss.detach(), structure)


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
