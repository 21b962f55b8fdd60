"""Ranks that end, fall silent or never come: the others give up in time, and say so."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed
from training_runs import free_port, run_environment

from sgmim_fast.errors import UserError
from sgmim_fast.train.ranks import _check_restarts, is_lost_peer

LOST = [
    RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.1]:6564"),
    RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Read error [10.0.0.1]:6564: Connection reset by peer"),
    RuntimeError("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms for recv operation"),
    RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:398] writev [10.0.0.1]:6564: Broken pipe"),
    RuntimeError("Application timeout caused pair closure"),
    RuntimeError("Gloo connectFullMesh failed with [...] no error"),
    distributed.DistStoreError("wait timeout after 8000ms, keys: /default_pg/0//cpu//0/rank_0"),
    distributed.DistNetworkError("The client socket has timed out after 3000ms while trying to connect to (a, 1)."),
    distributed.DistNetworkError("failed to recv, got 0 bytes"),
    distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3356, remote process exited or there was a network error\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    ),
    distributed.DistBackendError(
        "NCCL error in: NCCLUtils.hpp:268, unhandled system error\nncclSystemError: System call failed.\nLast error:\n"
        "socketPollConnect: connect to 10.0.0.1<45551> returned Connection timed out, exceeded error retry count"
    ),
    distributed.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE"),
    distributed.DistBackendError("NCCL communicator was aborted on rank 1."),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    OSError("[Errno 32] Broken pipe"),
    ValueError("Timed out waiting"),
    distributed.DistNetworkError("The server socket has failed to listen. code: -98, name: EADDRINUSE"),
    distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3356, invalid usage\nncclInvalidUsage: This usually reflects invalid "
        "usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 4000"
    ),
    distributed.DistBackendError("NCCL error in: NCCLUtils.hpp:268, unhandled cuda error\nLast error:\nout of memory"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[:60])
def test_what_a_lost_rank_looks_like(error: Exception) -> None:
    assert is_lost_peer(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:60])
def test_what_is_no_lost_rank(error: Exception) -> None:
    assert not is_lost_peer(error)


def start(script: str, rank: int, port: int) -> subprocess.Popen[str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**run_environment(), **ranks, "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip


JOIN = """
from sgmim_fast.errors import one_line_errors
from sgmim_fast.train.ranks import joined_ranks
with one_line_errors(), joined_ranks(2.0):
    raise AssertionError("nobody else is there")
"""


def test_a_rank_that_never_comes_ends_the_others_with_one_line() -> None:
    ports = [free_port(), free_port()]
    alone = [start(JOIN, rank, port) for rank, port in enumerate(ports)]  # each waits for the other, elsewhere
    for rank, (process, port) in enumerate(zip(alone, ports, strict=True)):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 69, out
        (line,) = (line for line in out.splitlines() if line.startswith("error:"))
        assert f"rank {rank} waited 2 s in vain for all 2 ranks to meet at 127.0.0.1:{port}" in line
        assert "Traceback" not in out


def test_a_taken_port_is_no_lost_rank() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        process = start(JOIN, 0, port)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert f"error: 127.0.0.1:{port} is taken by another program; choose another MASTER_PORT" in out


@pytest.mark.parametrize(
    ("shared", "restarts", "refused"), [("True", "3", True), ("False", "3", False), ("True", "0", False)]
)
def test_restarts_of_torchrun_need_a_store_that_goes_with_the_ranks(
    shared: str, restarts: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at once, because the race that a shared one brings is lost only now and then."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    if refused:
        with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
            _check_restarts()
    else:
        _check_restarts()


TOGETHER = """
import os, signal
from datetime import timedelta
import deepspeed, torch
from torch import distributed
from sgmim_fast.errors import one_line_errors
from sgmim_fast.train.agreement import Agreement
from sgmim_fast.train.ranks import joined_ranks

with one_line_errors(), joined_ranks(60.0):
    rank = distributed.get_rank()
    agreement = Agreement(4.0)
    assert agreement.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert agreement.any([rank == 1, False]) == [True, False]
    for stage in (0, 1, 2, 3):
        model = torch.nn.Linear(4, 4)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        settings["zero_allow_untested_optimizer"] = True
        deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings)
    groups = distributed.distributed_c10d._world.pg_map
    assert len(groups) >= 3, "of the run, the agreement and ZeRO"
    for group in groups:
        expected = timedelta(seconds=4 if group is agreement._group else 60)
        assert group._get_backend(torch.device("cpu")).options._timeout == expected, group.group_name
    print("set up", flush=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    agreement.any([False])
"""


def test_every_group_has_the_timeout_and_a_rank_that_falls_silent_is_noticed() -> None:
    port = free_port()
    first, second = (start(TOGETHER, rank, port) for rank in (0, 1))
    try:
        out, _ = first.communicate(timeout=120)
        assert "set up" in out
        assert first.returncode == 69, out
        (line,) = (line for line in out.splitlines() if line.startswith("error:"))
        assert "another rank has ended or cannot be reached (Timed out waiting 4000ms" in line
        os.kill(second.pid, signal.SIGCONT)  # wakes, and finds the others gone
        out, _ = second.communicate(timeout=120)
        assert second.returncode == 69, out
        assert "by peer" in out
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
