"""When a benchmark begins nothing new, and ends what takes too long to become ready."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RESERVE = 20.0  # seconds that measuring is left when time is short


class NotReadyError(Exception):
    """An arm could not be made ready in the time that is left."""


class _TimeIsOver(BaseException):
    """No ``Exception``: compilers catch those, wrap them, or take one for a choice that does not work and go on."""


class Deadline:
    """When to begin nothing new."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()

    @contextmanager
    def limit(self, reserve: float = RESERVE) -> Iterator[None]:
        """Ends what is done within once only ``reserve`` seconds are left, a compilation too.

        Raises:
            NotReadyError: then.
        """
        if self.end is None:
            yield
            return
        seconds = self.left() - reserve
        if seconds <= 0:
            raise NotReadyError("the time given by --seconds is over")

        over = False

        def stop(*_: Any) -> None:
            nonlocal over
            over = True
            raise _TimeIsOver

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        except (Exception, _TimeIsOver) as error:
            if not over:
                raise
            # What was interrupted may end in an error of its own.
            raise NotReadyError(f"it was not ready after {seconds:.0f} s, all that --seconds left") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
