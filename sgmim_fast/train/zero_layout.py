"""Where DeepSpeed's ZeRO keeps weights, gradients and optimizer state: bytes of one rank, by stage.

As DeepSpeed 0.19 lays them out with a torch optimizer; read from its engines, see ``docs/memory.md``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from sgmim_fast.config import TrainConfig

FP32 = 4  # bytes an element
ADAM_STATES = 2
SMALL = 100_000  # elements; ZeRO-3 keeps smaller parameters whole on every rank
FALLBACK_BUCKET = 500_000_000  # elements; what stage 0 reduces at a time


@dataclass(frozen=True, kw_only=True)
class ZeroLayout:
    """Bytes of the rank that holds most."""

    weights: int
    """The module's weights, as stored; of ZeRO-3 the rank's part and the small ones, which every rank has whole."""
    gathered: int
    """ZeRO-3: whole weights beside the stored ones, at most, while they are in use."""
    gradients: int
    """Reduced gradients that wait for the step."""
    master: int
    """fp32 weights that the optimizer steps; none at stage 0, whose own weights are fp32."""
    optimizer: int
    """AdamW's two moments, fp32."""
    buckets: int
    """Buffers in which gradients are reduced, there during the backward pass (ZeRO-3: always)."""
    step: int
    """Copies of the gradients while the optimizer steps."""
    offloaded: bool
    """Whether ``master`` and ``optimizer`` are in the host's memory, and ``step`` with them."""
    host_buffers: int
    """Buffers that offloading needs there besides."""


def zero_layout(train: TrainConfig, groups: Sequence[Sequence[int]], world_size: int) -> ZeroLayout:
    """The layout of a run.

    Args:
        train: stage, precision, offloading and bucket size.
        groups: number of elements of every parameter, by the optimizer's parameter groups, in order.
        world_size: ranks.
    """
    width = 2 if train.precision == "bf16" else FP32
    sizes = [size for group in groups for size in group]
    total = sum(sizes)
    if train.zero_stage == 0:
        return ZeroLayout(
            weights=width * total,
            gathered=0,
            gradients=width * total,
            master=0,
            optimizer=ADAM_STATES * FP32 * total,
            buckets=width * min(total, FALLBACK_BUCKET),
            step=0,
            offloaded=False,
            host_buffers=0,
        )
    if train.zero_stage == 3:
        return _partitioned(train, groups, sizes, width, world_size)
    parts = [_align(sum(group), 2 * world_size) // world_size for group in groups]
    stored, largest = sum(parts), max(sizes)
    waiting = width * sum(_touched(group, part, world_size) for group, part in zip(groups, parts, strict=True))
    flat = (FP32 + (width if width != FP32 else 0)) * max(parts)
    offload = train.offload_optimizer
    return ZeroLayout(
        weights=width * stored * world_size,
        gathered=0,
        gradients=width * largest if offload else waiting,
        master=FP32 * stored,
        optimizer=ADAM_STATES * FP32 * stored,
        buckets=width * train.bucket_size * (2 if train.overlaps_comm else 1),
        step=FP32 * stored if offload else flat,
        offloaded=offload,
        host_buffers=width * (stored + largest) + (waiting if train.accumulation_steps > 1 else 0) if offload else 0,
    )


def _partitioned(
    train: TrainConfig, groups: Sequence[Sequence[int]], sizes: Sequence[int], width: int, world_size: int
) -> ZeroLayout:
    """ZeRO-3: every parameter is cut by itself."""
    parts = [sum(-(-size // world_size) for size in group) for group in groups]
    stored, small = sum(parts), sum(size for size in sizes if size < SMALL)
    # Weights that are used again within twice the bucket size stay; the modules at both ends of that are whole, too.
    live = min(sum(sizes) - small, 2 * train.bucket_size + 2 * max(sizes))
    offload = train.offload_optimizer
    return ZeroLayout(
        weights=width * (stored + small),
        gathered=width * live,
        gradients=0 if offload else width * stored,
        master=FP32 * stored,
        optimizer=ADAM_STATES * FP32 * stored,
        buckets=width * train.bucket_size,
        step=FP32 * (stored if offload else max(parts)),
        offloaded=offload,
        host_buffers=width * stored if offload else 0,
    )


def _align(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _touched(group: Sequence[int], part: int, world_size: int) -> int:
    """Elements of all parameters that reach into one rank's partition; the most of any rank."""
    ends = list(accumulate(group))
    most = 0
    for rank in range(world_size):
        low, high = rank * part, (rank + 1) * part
        most = max(most, sum(size for size, end in zip(group, ends, strict=True) if end > low and end - size < high))
    return most
