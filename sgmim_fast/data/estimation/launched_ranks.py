"""Sharing work between the processes that torchrun or DeepSpeed's launcher starts, on GPUs or CPUs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from sgmim_fast.errors import LostPeerError, UserError, first_line

AddUp = Callable[[list[int]], list[int]]


def launched_rank(device: str | None = None) -> tuple[int, int, str | None]:
    """(rank, world size, device) as a launcher gives them in the environment; (0, 1, device) without one.

    Args:
        device: what the user asked for; None for each rank's own GPU where there are GPUs.

    Raises:
        UserError: if one of the variables is no number, or there are more ranks than GPUs.
    """
    values = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        value = os.environ.get(name, alone)
        if not value.isdecimal():
            raise UserError(f"the environment variable {name}={value!r} is no number; unset it, or start by torchrun")
        values.append(int(value))
    rank, world_size, local_rank = values
    if device is None and world_size > 1 and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {rank} has no GPU of its own; start at most {torch.cuda.device_count()} here")
        device = f"cuda:{local_rank}"
    return rank, world_size, device


@contextmanager
def joined_ranks(world_size: int) -> Iterator[AddUp | None]:
    """The ranks of a launcher end this block together: launchers end every rank as soon as one exits with a failure.

    Gives a function that sums numbers over the ranks; None for a single rank, or where no launcher has said where the
    ranks meet (MASTER_ADDR).

    Raises:
        LostPeerError: if another rank has ended.
        UserError: if the ranks do not find each other.
    """
    if world_size == 1 or "MASTER_ADDR" not in os.environ:
        yield None
        return
    try:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the ranks cannot meet ({first_line(error)}); start all of them by one launcher") from error
    try:
        yield _add_up
        _add_up([0])
    finally:
        distributed.destroy_process_group()


def _add_up(numbers: list[int]) -> list[int]:
    """Sums over the ranks; waits for all of them."""
    total = torch.tensor(numbers)
    try:
        distributed.all_reduce(total)
    except RuntimeError as error:
        raise LostPeerError("another rank has ended; its message says why, the same command goes on") from error
    return [int(number) for number in total]
