"""Ends a rank that hangs, and writes down where."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from sgmim_fast.errors import EXIT_LOST

_GRACE = 2.0  # seconds for loader processes to print their stacks


class Watchdog:
    """Looks from a thread of its own whether ``beat`` is still called; a context manager.

    A main thread that waits for a file, a collective or a GPU for ever cannot be interrupted from Python, so the
    process is ended: its launcher then ends the other ranks. The stacks of all threads go to ``RUN/stalls/``, those of
    loader processes to the error stream.

    Args:
        run: the run's folder.
        rank: of this process.
        timeout: seconds without a beat.
    """

    def __init__(self, run: Path, rank: int, timeout: float) -> None:
        self._run, self._rank, self._timeout = run, rank, timeout
        self.loader_processes: Callable[[], list[int]] = list
        """Gives the ids of the processes that make batches for this one."""
        self._doing = "starting"
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sgmim-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.beat(self._doing)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, doing: str) -> None:
        """What this rank begins to do; whatever it did before has come to an end."""
        self._doing = doing
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(max(0.05, self._last + self._timeout - time.monotonic())):
            if time.monotonic() - self._last >= self._timeout:
                self._give_up()

    def _give_up(self) -> None:
        where = "on the error stream"
        try:
            path = self._run / "stalls" / f"rank{self._rank}_{time.strftime('%Y%m%d_%H%M%S')}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"rank {self._rank}, {self._doing}: nothing for {self._timeout:g} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"in {path}"
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        processes = self.loader_processes()
        for process in processes:
            try:
                os.kill(process, signal.SIGUSR1)
            except ProcessLookupError:
                continue
        if processes:
            time.sleep(_GRACE)
        print(
            f"error: rank {self._rank} has done nothing for {self._timeout:g} s while {self._doing}; stacks are "
            f"{where}; --resume auto goes on, --fault.stall-timeout gives more time",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_LOST)
