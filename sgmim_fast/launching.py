"""Starts a run's ranks on this machine under DeepSpeed's launcher, and passes signals on to them.

DeepSpeed's launcher would end the ranks one after the other, give each 30 seconds, and report status 1 whatever they
did. Here the ranks themselves hear of a signal, all at once: SIGTERM lets them write a checkpoint first, and their
status is the command's.
"""

import base64
import ctypes
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from uuid import uuid4

import psutil

from sgmim_fast.train.stopping import MARK

_LIBC = ctypes.CDLL(None)
_SET_SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def launch(module: str, arguments: Sequence[str], *, ranks: int, environment: dict[str, str]) -> int:
    """Run ``python -m module arguments`` as ``ranks`` ranks. Returns the status of the first one to fail, or 0;
    128 + n if signal n killed it.

    Of the GPUs that CUDA_VISIBLE_DEVICES names, the first ``ranks`` are used; MASTER_PORT is taken if set.
    """
    named = [word for word in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    devices = named[:ranks] if len(named) >= ranks else list(range(ranks))
    command = launcher_command(module, arguments, devices, environment.get("MASTER_PORT") or free_port())
    # By the mark ranks know their launcher, even if it ends before they look.
    environment = environment | {MARK: uuid4().hex}
    # In a session of its own the launcher does not hear the terminal's Ctrl-C, which would end the ranks in its way.
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)

    passed_on: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.add(number)
        ranks_now = _ranks(launcher.pid)
        for process in ranks_now:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if not ranks_now:
            launcher.send_signal(number)  # does nothing where it has ended

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status and signal.SIGINT in passed_on:
        return 128 + signal.SIGINT  # whichever rank ended first, and lost the other
    if status < 0:
        return 128 - status
    # The launcher tells that a rank was killed by signal n by 256 - n, shells and queues by 128 + n.
    return status if status < 256 - signal.NSIG else 128 + 256 - status


def launcher_command(module: str, arguments: Sequence[str], devices: Sequence[int | str], port: int | str) -> list[str]:
    """The command of DeepSpeed's launcher for the ranks of this machine alone, one a device."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(devices)}).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", "--log_level=critical", "--module", module]
    return [*command, *arguments]


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ranks(launcher: int) -> list[psutil.Process]:
    try:
        return psutil.Process(launcher).children()
    except psutil.NoSuchProcess:
        return []


def _end_with_parent() -> None:
    """Between fork and exec: SIGTERM for the launcher if this command is killed, so that no rank is left behind."""
    _LIBC.prctl(_SET_SIGNAL_OF_PARENTS_DEATH, int(signal.SIGTERM), 0, 0, 0)
