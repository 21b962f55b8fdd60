"""What ranks decide together on the host, without waiting for a device."""

from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import distributed

T = TypeVar("T")


class Agreement:
    """Questions that every rank must answer alike, such as whether to stop after this step.

    It has a gloo group of its own, so that asking neither waits for work on a GPU nor stands in the queue behind NCCL's
    collectives. Every rank makes it and asks in the same order.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Make the group; a collective.

        Args:
            timeout_seconds: how long an answer of the other ranks is waited for.
        """
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert isinstance(group, distributed.ProcessGroup)  # every rank is in it
        self._group = group

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank; a collective.

        Args:
            flags: as many on every rank.

        Raises:
            RuntimeError: if another rank has ended or does not answer in time (``is_lost_peer`` tells).
        """
        said = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(said, op=distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in said.tolist()]

    def gather(self, own: T) -> list[T]:
        """What every rank has, in the order of ranks, on every rank; a collective.

        Args:
            own: anything that can be pickled.

        Raises:
            RuntimeError: as above.
        """
        found: list[T | None] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(found, own, group=self._group)
        return cast(list[T], found)
