"""Joining the ranks of a run, on GPUs or CPUs, under whichever launcher."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar, cast

import deepspeed
import torch
from torch import distributed

from sgmim_fast.errors import LostPeerError, UserError

T = TypeVar("T")


@contextmanager
def joined_ranks(timeout_seconds: float) -> Iterator[torch.device]:
    """The process group for the length of a block; gives this rank's device.

    Args:
        timeout_seconds: how long ranks wait for each other, at the start and in every collective of every group that
            torch or DeepSpeed makes in the block.

    Raises:
        LostPeerError: if a collective of the block fails because another rank has ended.
    """
    device = _join(timedelta(seconds=timeout_seconds))
    try:
        yield device
    except RuntimeError as error:
        if is_lost_peer(error):
            reason = str(error).splitlines()[0]
            raise LostPeerError(
                f"another rank has ended ({reason}); its message says why, --resume auto goes on"
            ) from error
        raise
    finally:
        distributed.destroy_process_group()


def on_chief(decide: Callable[[], T]) -> T:
    """What ``decide`` gives on rank 0, on every rank; a UserError there is raised on every rank.

    Every rank calls it. Reading files once is cheaper than once a rank, and no two ranks can find different things.
    """
    answer: list[T | UserError | None] = [None]
    if distributed.get_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[0] = error
    distributed.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return cast(T, answer[0])


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank has ended; gloo raises a bare RuntimeError then."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "by peer" in str(error))


def own_device() -> torch.device:
    """This rank's GPU, or the CPU where PyTorch sees no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _join(timeout: timedelta) -> torch.device:
    """NCCL on GPUs, gloo on CPUs."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Only inference uses this op; building it would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():  # started without a launcher
        os.environ.setdefault(name, value)
    device = own_device()
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    else:
        backend = "gloo"
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    # The groups that ZeRO makes would wait as long as torch does unless told otherwise: 30 minutes.
    deepspeed.comm.comm.cdb.new_group = partial(distributed.new_group, timeout=timeout)
    return device
