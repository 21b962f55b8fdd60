"""Clocks of devices: what ``harness.measure`` and the steps are timed with."""

import time

import torch

from benchmarks import harness


class HostClock:
    """``harness.Clock`` of a device that works while the host waits for it: the host's own time."""

    def hold(self, seconds: float) -> None:
        """There is no queue to keep busy."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        """Everything is done already."""

    def between(self, start: float, end: float) -> float:
        return end - start


def clock_of(device: torch.device) -> harness.Clock:
    """Of the device's own time."""
    return harness.CudaClock() if device.type == "cuda" else HostClock()


def synchronize(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
