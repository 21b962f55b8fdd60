"""``--dry-run``: what a run would take, without data, memory or another rank.

The task is built, and takes a step, on tensors without memory ("meta"). How near the figures are to real runs is in
``docs/memory.md``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sgmim_fast.config import Backend
from sgmim_fast.errors import UserError
from sgmim_fast.train.activation_memory import step_memory
from sgmim_fast.train.job import Job
from sgmim_fast.train.zero_layout import ADAM_STATES, FP32, ZeroLayout, zero_layout

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes. Bytes are of one rank, the one that needs most, unless a name says otherwise."""

    world_size: int
    parameters: dict[str, int]
    """Elements by part of the model."""
    layout: ZeroLayout
    activations: int
    """Kept by the forward pass for the backward pass, activation checkpointing respected."""
    temporaries: int
    """What both passes need besides, at the worst moment; what activation checkpointing computes again included."""
    batch: int
    """One micro-batch."""
    flops_per_image: int
    """Model FLOPs of forward and backward; see ``Job.flops_per_image``."""
    images_per_rank: int
    """Pairs a rank and optimizer step, accumulation included."""
    checkpoint: int
    """A checkpoint on disk, all ranks' shards and the exported weights."""

    @property
    def images_per_step(self) -> int:
        """Pairs an optimizer step, of all ranks."""
        return self.images_per_rank * self.world_size

    @property
    def flops_per_step(self) -> int:
        """Model FLOPs of an optimizer step, of all ranks."""
        return self.flops_per_image * self.images_per_step

    @property
    def peak(self) -> int:
        """Most that a rank holds on its device: at the beginning of a backward pass, or while the optimizer steps.

        Without what libraries and the driver take for themselves, and what an allocator cannot use.
        """
        zero = self.layout
        always = zero.weights + zero.gradients + (0 if zero.offloaded else zero.master + zero.optimizer)
        passes = zero.gathered + zero.buckets + self.activations + self.temporaries + self.batch
        return always + max(passes, 0 if zero.offloaded else zero.step)

    @property
    def host(self) -> int:
        """What a rank holds in the host's memory because of ``train.offload_optimizer``."""
        zero = self.layout
        return zero.master + zero.optimizer + zero.step + zero.host_buffers if zero.offloaded else 0


def estimate(job: Job[Any], world_size: int) -> Estimate:
    """What a run of ``job`` on ``world_size`` ranks takes; a second or two for a base model.

    Activations are those of the plain path for ``train.backend`` "reference", and of the gathered path in PyTorch's
    operations for all others: kernels, libraries' attention and the compiler keep less.
    """
    if world_size < 1:
        raise UserError(f"a run needs 1 rank or more, not {world_size}")
    train = job.config.train
    backend: Backend = "reference" if train.backend == "reference" else "torch"
    with torch.device("meta"):  # no generator draws, so a run that asks for this in between stays as it was
        task = job.make_task(None, backend)
    groups = job.parameter_groups(task)
    layout = zero_layout(train, [[p.numel() for p in group["params"]] for group in groups], world_size)
    batch = job.meta_batch()
    activations, peak = step_memory(task.bfloat16() if train.precision == "bf16" else task, batch)
    return Estimate(
        world_size=world_size,
        parameters={
            part: sum(p.numel() for module in modules for p in module.parameters())
            for part, modules in job.parts(task).items()
        },
        layout=layout,
        activations=activations,
        temporaries=peak - activations,
        batch=sum(value.nbytes for value in batch.values()),
        flops_per_image=job.flops_per_image(backend),
        images_per_rank=train.batch_size * train.accumulation_steps,
        checkpoint=_checkpoint_bytes(sum(p.numel() for p in task.parameters()), train.zero_stage, train.precision),
    )


def _checkpoint_bytes(parameters: int, stage: int, precision: str) -> int:
    """DeepSpeed's shards (weights, but for ZeRO-3; master weights, where there are any; moments), and fp32 weights."""
    width = 2 if precision == "bf16" else FP32
    stored = (width if stage < 3 else 0) + (FP32 if stage else 0) + ADAM_STATES * FP32
    return (stored + FP32) * parameters


def dry_run(job: Job[Any], world_size: int) -> None:
    """Print what a run takes. Reads the list of pairs if there is one, and writes nothing.

    Raises:
        UserError: if the run cannot be.
    """
    found, train = estimate(job, world_size), job.config.train
    sections = {
        f"parameters, {job.described()}": _parameter_rows(found),
        f"memory of a rank, {train.precision}, ZeRO {train.zero_stage}, {world_size} rank(s)": [*_memory_rows(found)],
        "work": list(_work_rows(found, job)),
    }
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        for title, rows in sections.items():
            print(title)
            for name, value, remark in rows:
                print(f"  {name:28}{value:>14}  {remark}".rstrip())
        return
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column(style="dim")
        for row in rows:
            table.add_row(*row)
        console.print(table)


Row = tuple[str, str, str]


def _parameter_rows(found: Estimate) -> list[Row]:
    rows = [(name, _millions(count), "") for name, count in found.parameters.items() if count]
    return [*rows, ("all", _millions(sum(found.parameters.values())), "")]


def _memory_rows(found: Estimate) -> Iterator[Row]:
    zero = found.layout
    where = "in the host's memory" if zero.offloaded else ""
    yield "weights", _size(zero.weights), ""
    if zero.gathered:
        yield "weights gathered for use", _size(zero.gathered), "at most; a smaller --train.bucket-size keeps fewer"
    if zero.gradients:
        yield "gradients", _size(zero.gradients), ""
    if zero.master:
        yield "fp32 master weights", _size(zero.master), where
    yield "optimizer state", _size(zero.optimizer), where
    yield "gradient buckets", _size(zero.buckets), "--train.bucket-size" if zero.master else ""
    yield "activations", _size(found.activations), "kept for the backward pass"
    yield "temporaries", _size(found.temporaries), "of the forward and backward pass"
    yield "batch", _size(found.batch), ""
    yield "expected peak", _size(found.peak), "without libraries' workspaces and the allocator's gaps"
    if zero.offloaded:
        yield "host memory", _size(found.host), "for the offloaded optimizer"


def _work_rows(found: Estimate, job: Job[Any]) -> Iterator[Row]:
    yield "pairs a step", str(found.images_per_step), f"{found.images_per_rank} a rank"
    yield "model FLOPs an image", f"{found.flops_per_image / 1e9:.2f} G", "forward and backward"
    yield "model FLOPs a step", f"{found.flops_per_step / 1e12:.2f} T", ""
    yield "model FLOPs a step and rank", f"{found.flops_per_step / found.world_size / 1e12:.2f} T", ""
    yield "a checkpoint on disk", _size(found.checkpoint), ""
    steps, why = _steps_per_epoch(job, found.world_size)
    yield "steps an epoch", "unknown" if steps is None else str(steps), why
    if steps is not None:
        total = steps * job.epochs()
        limit = job.config.train.max_steps
        yield "steps of the run", str(total if limit is None else min(total, limit)), ""


def _steps_per_epoch(job: Job[Any], world_size: int) -> tuple[int | None, str]:
    """Optimizer steps an epoch and of how many pairs; None, and why, where that cannot be told."""
    if not job.config.data.path:
        return None, "--data names the pairs"
    try:
        job.open()
        return job.order(world_size).steps_per_epoch, f"{job.samples} pairs"
    except UserError as error:
        return None, str(error)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _size(count: int) -> str:
    if count < GIB / 10:
        return f"{count / (1 << 20):.2f} MiB"
    return f"{count / GIB:.2f} GiB"
