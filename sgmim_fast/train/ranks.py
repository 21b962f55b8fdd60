"""Joining the ranks of a run, on GPUs or CPUs, under whichever launcher."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar, cast

import deepspeed
import torch
from torch import distributed

from sgmim_fast.errors import LostPeerError, UserError, first_line
from sgmim_fast.train.deepspeed_quirks import spare_needless_work
from sgmim_fast.train.gloo_threads import await_idle_gloo

T = TypeVar("T")

_LOST = (
    # of sockets, as gloo and NCCL pass them on
    "by peer",  # connection closed by peer, connection reset by peer
    "connection refused",
    "connection timed out",
    "broken pipe",
    "no route to host",
    "network is unreachable",
    # of gloo
    "timed out waiting",
    "timeout caused pair closure",
    "connectfullmesh failed",
    "connect timeout",
    # of the store
    "wait timeout after",
    "socket timeout",
    # of NCCL and its watchdog
    "remote process exited",
    "ncclremoteerror",
    "communicator was aborted",
    "collective operation timeout",
)
"""What the messages of a lost rank contain, in lower case."""


@contextmanager
def joined_ranks(timeout_seconds: float) -> Iterator[torch.device]:
    """The process group for the length of a block; gives this rank's device.

    Args:
        timeout_seconds: how long ranks wait for each other, at the start and in every collective of every group that
            torch or DeepSpeed makes in the block.

    Raises:
        LostPeerError: if a rank does not arrive in time, or a collective of the block fails because another rank has
            ended or cannot be reached.
        UserError: if the port at the master address is taken, or torchrun's restarts would not work.
    """
    try:
        device = _join(timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        if _is_taken_port(error):
            raise UserError(f"{_meeting_place()} is taken by another program; choose another MASTER_PORT") from error
        if is_lost_peer(error):
            raise _in_vain(timeout_seconds, error) from error
        raise
    try:
        yield device
    except BaseException as error:
        _leave_behind()
        if is_lost_peer(error):
            raise LostPeerError(
                f"another rank has ended or cannot be reached ({_reason(error)}); if it ended, its message says why; "
                "--resume auto goes on"
            ) from error
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        await_idle_gloo()


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
        answer[0].told_elsewhere = distributed.get_rank() != 0
        raise answer[0]
    return cast(T, answer[0])


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended or does not answer in time.

    Gloo raises a bare RuntimeError then, the store and NCCL one of their own; what tells is the message. An NCCL that
    is set up wrongly, or a port that is taken, is no lost rank.
    """
    if isinstance(error, distributed.DistNetworkError):
        return not _is_taken_port(error)
    if isinstance(error, distributed.DistStoreError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in _LOST)


def own_device() -> torch.device:
    """This rank's GPU, or the CPU where PyTorch sees no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _check_restarts() -> None:
    """Torchrun's agents may lend ranks a store that outlives restarts: new ranks then find the last ones' addresses."""
    elastic = {name: os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("USE_AGENT_STORE", "MAX_RESTARTS")}
    if elastic["USE_AGENT_STORE"] == "True" and elastic["MAX_RESTARTS"] not in ("", "0"):
        raise UserError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment on every machine; "
            "without, ranks that start again may look for each other where the last ones were"
        )


def _reach_first_rank(seconds: float) -> None:
    """Wait until rank 0 listens. PyTorch waits too, but twice as long, and then prints its call stack."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(address, timeout=max(0.1, end - time.monotonic())) as connection:
                if connection.getsockname() != connection.getpeername():  # a free port may be connected to itself
                    return
                reason: Exception = ConnectionRefusedError("nobody listens")
        except OSError as error:
            reason = error
        if time.monotonic() >= end:
            raise _in_vain(seconds, reason) from reason
        time.sleep(0.2)


def _in_vain(seconds: float, error: Exception) -> LostPeerError:
    rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
    return LostPeerError(
        f"rank {rank} waited {seconds:g} s in vain for all {count} ranks to meet at {_meeting_place()} "
        f"({_reason(error)}); start all of them, and see that each reaches that address"
    )


def _meeting_place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _reason(error: BaseException) -> str:
    """Without gloo's source line in front and its advice behind."""
    line = re.sub(r"^(\[[^\]]*\.cc:\d+\] )+", "", first_line(error))
    return line.partition(". This is typically")[0].rstrip(".")


def _is_taken_port(error: Exception) -> bool:
    return isinstance(error, distributed.DistNetworkError) and "EADDRINUSE" in str(error)


def _leave_behind() -> None:
    """Give up NCCL's communicators: closing them in order would wait for ranks that are lost or still in the block."""
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        distributed.distributed_c10d._abort_process_group()


def _join(timeout: timedelta) -> torch.device:
    """NCCL on GPUs, gloo on CPUs."""
    spare_needless_work()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():  # started without a launcher
        os.environ.setdefault(name, value)
    _check_restarts()
    device = own_device()
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    else:
        backend = "gloo"
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))  # a job may have a part of the cores
    if os.environ["RANK"] != "0":
        _reach_first_rank(timeout.total_seconds())
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    # The groups that ZeRO makes would wait as long as torch does unless told otherwise: 30 minutes.
    deepspeed.comm.comm.cdb.new_group = partial(distributed.new_group, timeout=timeout)
    return device
