"""Commands that leave nothing behind: what still ran on the GPU would be measured with whatever comes next."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
SET_SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_LIBC = ctypes.CDLL(None)


def run_for(
    command: Sequence[str], seconds: float, output: IO[str] | None = None, more: dict[str, str] | None = None
) -> int | None:
    """Run a command in the root of the checkout for at most so long, and end all that it has started with it.

    Args:
        output: takes what it says, errors as well; None shows it.
        more: variables of its environment beside this process's.

    Returns:
        Its status; None if it had to be stopped.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (more or {}),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,  # a group of its own, to be stopped as a whole
        preexec_fn=end_with_parent,
    )
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_with_parent() -> None:
    """Between fork and exec: end the new process if the one that starts it is killed."""
    _LIBC.prctl(SET_SIGNAL_OF_PARENTS_DEATH, int(signal.SIGKILL), 0, 0, 0)


def leave_in_order() -> None:
    """From now on SIGTERM and SIGHUP end this process as an error does, so that what it has started is stopped."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
