"""A process does not end while a thread of gloo's is at work."""

import os
import subprocess
import sys
import threading
import time
from ctypes import CDLL
from pathlib import Path

import pytest

from sgmim_fast.train.gloo_threads import await_idle_gloo

PR_SET_NAME = 15

RANK = """
import builtins, torch
from torch import distributed
from sgmim_fast.train.gloo_threads import await_idle_gloo

distributed.init_process_group("gloo")
builtins.held = distributed.group.WORLD  # as DeepSpeed does
distributed.all_reduce(torch.ones(1000))
distributed.destroy_process_group()
threads = [path.read_text().strip() for path in __import__("pathlib").Path("/proc/self/task").glob("*/comm")]
await_idle_gloo()
print(threads.count("pt_gloo_runloop"))
"""


def at_work(name: bytes, until: threading.Event) -> threading.Thread:
    def work() -> None:
        CDLL(None).prctl(PR_SET_NAME, name)
        started.set()
        while not until.is_set():
            pass

    started = threading.Event()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait()
    return thread


@pytest.mark.parametrize(("name", "waits"), [(b"pt_gloo_runloop", True), (b"another", False)])
def test_threads_of_gloo_alone_are_awaited(name: bytes, waits: bool) -> None:
    until = threading.Event()
    thread = at_work(name, until)
    waiting = threading.Thread(target=await_idle_gloo, args=(600.0,))
    waiting.start()
    waiting.join(1.0 if waits else 60.0)
    assert waiting.is_alive() is waits
    until.set()
    waiting.join(60)
    thread.join(60)
    assert not waiting.is_alive()


def test_no_longer_than_the_limit() -> None:
    until = threading.Event()
    thread = at_work(b"pt_gloo_runloop", until)
    before = time.monotonic()
    await_idle_gloo(0.2)
    assert 0.2 <= time.monotonic() - before < 60
    until.set()
    thread.join(60)


def test_name_is_that_of_gloo() -> None:
    """Held groups keep their threads, and those are called what is looked for."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RANK],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
