"""Turns of a pipeline: whole training steps on batches from wherever they come, and loading alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import clock_of, synchronize
from benchmarks.optimizers import Update
from benchmarks.step_arms import Variant
from sgmim_fast.config import ModelConfig
from sgmim_fast.data.batches import Batch, Loader
from sgmim_fast.models.sgmim import PretrainOutput
from sgmim_fast.tasks.pretrain import PretrainTask

IN_FLIGHT = 4  # steps that the host may be ahead of the device
LEAST = 3  # steps a turn


@dataclass
class Turn:
    """What a turn of steps was."""

    images_per_second: float
    waiting_share: float = 0.0
    host_waiting_share: float = 0.0


class Step:
    """Whole training steps of one implementation.

    Args:
        seed: of the first weights.

    The learning rate is 0, so that every step is of the same weights, unless ``rate`` is set.
    """

    def __init__(
        self,
        model: ModelConfig,
        variant: Variant,
        precision: str,
        optimizer: str,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.device, self.graphs, self.rate = device, variant.graphs, 0.0
        variant.check(precision, device)
        torch.manual_seed(seed)
        backend, attention = variant.backend, variant.attention
        self.task = PretrainTask(model, backend, attention, device=device, float8=variant.float8)  # type: ignore[arg-type]
        if precision == "bf16":
            self.task.bfloat16()
        self.update = Update(self.task, optimizer, device)
        self.run: Callable[[Batch], Any] = variant.compile(self.task) if variant.compiled else self.task

    def __call__(self, batch: Batch) -> PretrainOutput:
        """From a batch on the device to new weights; the losses."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.task.zero_grad(set_to_none=True)
        out: PretrainOutput = self.run(batch)
        out.loss.backward()
        self.update.step(self.rate)
        return PretrainOutput(*(None if loss is None else loss.detach() for loss in out))  # type: ignore[arg-type]

    def moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def drop(batches: Loader, count: int) -> None:
    for _ in range(count):
        next(batches)


def load(batches: Loader, step: Step, seconds: float) -> float:
    """Images a second that come to the device."""
    start, images, count = time.perf_counter(), 0, 0
    while count < LEAST or time.perf_counter() - start < seconds:
        images += len(step.moved(next(batches))["image"])
        count += 1
    synchronize(step.device)
    return images / (time.perf_counter() - start)


def steps(step: Step, next_batch: Callable[[], Batch], seconds: float) -> tuple[Turn, Tensor]:
    """Steps for about so many seconds, the host a few steps ahead of the device at most; the last loss."""
    clock = clock_of(step.device)
    clock.wait()
    began, host_waited, images = time.perf_counter(), 0.0, 0
    ends, gaps, loss = [clock.mark()], [], torch.tensor(torch.nan)
    while len(ends) <= LEAST or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        loaded = next_batch()
        host_waited += time.perf_counter() - before
        batch = step.moved(loaded)
        gaps.append((ends[-1], clock.mark()))
        loss = step(batch).loss
        images += len(batch["image"])
        ends.append(clock.mark())
        if step.device.type == "cuda" and len(ends) > IN_FLIGHT:
            ends[-IN_FLIGHT].synchronize()
    clock.wait()
    host_seconds = time.perf_counter() - began
    taken = clock.between(ends[0], ends[-1])
    waited = sum(clock.between(*gap) for gap in gaps)
    return Turn(images / taken, waited / taken, host_waited / host_seconds), loss
