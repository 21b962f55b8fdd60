"""When a run is asked to end early: by SIGTERM, as queues announce pre-emption, or because its launcher is gone."""

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

LAUNCHED = "LOCAL_RANK"
"""Every launcher tells its processes this; without it, the parent is a shell that may well end before the run."""
MARK = "SGMIM_LAUNCH"
"""Of `sgmim pretrain`, in the environment of its launcher and of the ranks."""


class StopRequest:
    """Notes a SIGTERM instead of dying of it, for the length of a block.

    Queues send it to all processes and launchers pass it on, so a second one says no more than the first.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launcher = os.getppid() if LAUNCHED in os.environ else None
        if not _started_by(os.getppid()):
            self._launcher = -1  # it has ended already
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @property
    def here(self) -> bool:
        """Whether this rank was asked to stop, or its launcher is gone."""
        return self._asked or (self._launcher is not None and os.getppid() != self._launcher)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def _started_by(process: int) -> bool:
    """Whether ``process`` may have started this one: it has the same mark, or there is none to look for."""
    mark = os.environ.get(MARK)
    if mark is None:
        return True
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
