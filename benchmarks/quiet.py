"""Measure when nobody else computes: how much of the machine's processor time others took, from /proc."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Quiet:
    """Waits for a quiet spell, and repeats what was disturbed, until its patience is at an end."""

    own: Iterable[int]
    """Processes whose work is not that of others."""
    limit: float = 0.03
    """Share of all cores that others may take."""
    patience: float = 600.0
    """Seconds for waiting and repetitions in all."""
    shares: list[float] = field(default_factory=list)
    """Of what was kept."""
    repeated: int = 0

    def measure(self, run: Callable[[], T]) -> T:
        """What ``run`` gives in a quiet spell, or disturbed when patience has ended; ``shares`` tells."""
        while True:
            begin = time.monotonic()
            while self.patience > time.monotonic() - begin and self._others(partial(time.sleep, 0.5))[1] > self.limit:
                time.sleep(0.5)
            self.patience -= time.monotonic() - begin
            begin = time.monotonic()
            found, share = self._others(run)
            if share <= self.limit or self.patience <= 0:
                self.shares.append(share)
                return found
            self.repeated += 1
            self.patience -= time.monotonic() - begin

    def _others(self, run: Callable[[], T]) -> tuple[T, float]:
        """What ``run`` gives, and the share of all cores that others took meanwhile."""
        begin, busy, own = time.monotonic(), _busy(), self._own()
        found = run()
        seconds = time.monotonic() - begin
        others = _busy() - busy - (self._own() - own)
        return found, max(0.0, others) / seconds / (os.cpu_count() or 1)

    def _own(self) -> float:
        return sum(_of_process(pid) for pid in (*self.own, os.getpid()))


def _busy() -> float:
    """Seconds that all cores have computed for anybody, the host of a virtual machine included."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK


def _of_process(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) * _TICK
