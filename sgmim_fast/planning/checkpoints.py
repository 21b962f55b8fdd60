"""How large a checkpoint is, and how long training stands still for it.

With N parameters and w bytes a weight: DeepSpeed's shards take wN for the module (stages 0 to 2; stage 3 keeps
none), 8N for AdamW's moments and, from stage 1 on, 4N for the fp32 weights; beside them lies model.safetensors, 4N.
"""

from dataclasses import dataclass

from sgmim_fast.planning.parameters import WEIGHT_BYTES, ParameterSizes, Precision


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes, but for names and settings, which are small."""

    total: float
    """Of all files."""
    first_rank: float
    """Of what rank 0 writes, which is the most: module, its shard, model.safetensors."""


@dataclass(frozen=True)
class CheckpointTime:
    """Seconds a checkpoint."""

    write: float
    """Until all is in the storage."""
    stall_synchronous: float
    """That training stands still if it waits for the storage."""
    stall_asynchronous: float
    """That it stands still if it waits for a copy in the host's memory, and for the checkpoint before."""


def checkpoint_size(parameters: ParameterSizes, *, stage: int, precision: Precision, gpus: int) -> CheckpointSize:
    """By the formulas above; the models save no buffers."""
    count = parameters.count
    module = 0 if stage == 3 else WEIGHT_BYTES[precision] * count
    full = 4 * count
    moments, master = 8 * count, 4 * count if stage > 0 else 0
    shards = moments + master
    return CheckpointSize(module + shards + full, module + shards / (gpus if stage > 0 else 1) + full)


def checkpoint_time(size: CheckpointSize, *, write_speed: float, copy_speed: float, interval: float) -> CheckpointTime:
    """Seconds for a checkpoint every ``interval`` seconds.

    Args:
        size: of a checkpoint.
        write_speed: bytes a second that the storage takes from all ranks together, checksums included.
        copy_speed: bytes a second from one GPU to the host.
        interval: seconds of training from one checkpoint to the next.
    """
    write = size.total / write_speed
    return CheckpointTime(write, write, size.first_rank / copy_speed + max(0.0, write - interval))
