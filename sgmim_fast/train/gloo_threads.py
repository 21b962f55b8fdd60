"""The threads of gloo's process groups, at the end of a process that still holds such groups."""

import time
from pathlib import Path

_NAME = "pt_gloo_runloop"
_LOOKS = 2


def await_idle_gloo(limit_seconds: float = 10.0) -> None:
    """Wait until no thread of a gloo process group is at work, at most so long; at once without gloo.

    A collective ends for its caller a moment before the thread that ran it gives up the tensors. A process that ends
    within that moment is aborted (``terminate called without an active exception``, SIGABRT; PyTorch's pull request
    179291), because giving up a tensor takes Python's lock. Destroying a group joins its threads, but DeepSpeed holds
    its groups for the life of the process.

    Args:
        limit_seconds: of waiting, for a thread that is in a collective whose other ranks are lost.
    """
    end = time.monotonic() + limit_seconds
    idle_looks = 0
    while idle_looks < _LOOKS and time.monotonic() < end:
        time.sleep(0.001)  # gives Python's lock to a thread that waits for it
        idle_looks = 0 if any(_is_at_work(thread) for thread in Path("/proc/self/task").glob("*")) else idle_looks + 1


def _is_at_work(thread: Path) -> bool:
    """Whether a thread of gloo's runs or waits for a core. Where it has nothing to do, it sleeps."""
    try:
        stat = (thread / "stat").read_text()
    except OSError:  # it has ended
        return False
    name, _, rest = stat.partition("(")[2].rpartition(") ")
    return name == _NAME and rest.startswith("R")
