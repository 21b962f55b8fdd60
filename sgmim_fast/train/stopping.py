"""When a run is asked to end early: by SIGTERM, as queues announce pre-emption, or because its launcher is gone."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

LAUNCHED = "LOCAL_RANK"
"""Every launcher tells its processes this; without it, the parent is a shell that may well end before the run."""


class StopRequest:
    """Notes a SIGTERM instead of dying of it, for the length of a block.

    Queues send it to all processes and launchers pass it on, so a second one says no more than the first.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launcher = os.getppid() if LAUNCHED in os.environ else None
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
