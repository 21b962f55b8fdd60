"""How much of the machine's processor time others took while something was measured, from /proc."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_TICK = 1 / os.sysconf("SC_CLK_TCK")


def watched(run: Callable[[], T], own: Iterable[int]) -> tuple[T, float]:
    """What ``run`` gives, and the share of all cores that processes other than this one and ``own`` took meanwhile."""
    pids = (*own, os.getpid())
    begin, busy, ours = time.monotonic(), _busy(), sum(map(_of_process, pids))
    found = run()
    seconds = time.monotonic() - begin
    others = _busy() - busy - (sum(map(_of_process, pids)) - ours)
    return found, max(0.0, others) / seconds / (os.cpu_count() or 1)


def quietest(parts: list[tuple[T, float]], share: float) -> list[tuple[T, float]]:
    """That share of the parts, and three at least, during which others took least."""
    return sorted(parts, key=lambda part: part[1])[: max(3, round(share * len(parts)))]


def _busy() -> float:
    """Seconds that all cores have computed for anybody, the host of a virtual machine included."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK


def _of_process(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) * _TICK
