"""What every measurement on a GPU shares: timing by device events, ceilings of the same run, rows with their origin."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.rows import Rows
from sgmim_fast.errors import UserError

__all__ = ["RESULTS", "Ceilings", "Rows", "Times", "gpu", "measure", "measure_ceilings", "peak_bytes", "percentiles"]

RESULTS = Path(__file__).parent / "results"
FASTEST_CLOCK = 2.5e9  # Hz; no GPU of the supported kinds counts faster, so a wait lasts at least as long as asked
MOST_RUNS, FEWEST_RUNS = 200, 5
MOST_SETS = 64
COPIED_BYTES = 2 << 30
MATRIX_SIDE = 8192
SMOKE_BYTES, SMOKE_SIDE = 1 << 22, 128


def gpu() -> torch.device:
    """The GPU to measure.

    Raises:
        UserError: if there is none.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA GPU is visible here; run this on a machine with one (and look at CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", torch.cuda.current_device())


def device(smoke: bool) -> torch.device:
    """The GPU; for a run that only tries whether things work, the CPU where there is none."""
    return gpu() if torch.cuda.is_available() or not smoke else torch.device("cpu")


# -- timing


class Clock(Protocol):
    """Marks on a device's queue of work, and the time between them."""

    def hold(self, seconds: float) -> None:
        """Keep the device busy for at least so long, so that the host can run ahead of it."""

    def mark(self) -> Any:
        """A mark behind the work queued so far."""

    def wait(self) -> None:
        """Until the device has done all its work."""

    def between(self, start: Any, end: Any) -> float:
        """Seconds of device time from one mark to another; after ``wait``."""


class CudaClock:
    """CUDA events on the current stream."""

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * FASTEST_CLOCK))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Times:
    """Seconds of one call on the device, and what it takes the host to ask for it."""

    runs: int
    p20: float
    p50: float
    p80: float
    host: float

    def row(self) -> dict[str, float]:
        return {
            "runs": self.runs,
            "p20_seconds": self.p20,
            "p50_seconds": self.p50,
            "p80_seconds": self.p80,
            "host_seconds": self.host,
        }


def measure(
    call: Callable[[int], Any],
    sets: int = 1,
    seconds: float = 0.2,
    clock: Clock | None = None,
    fewest: int = FEWEST_RUNS,
    evict: Callable[[], Any] | None = None,
) -> Times:
    """Time ``call(number)`` for input sets 0 .. sets - 1 in turns, about ``seconds`` long, at least ``fewest`` times.

    ``evict`` comes before each timed call, untimed: see ``evictor``.

    The device is held before each call until the host has queued all of it: kernels then follow each other without
    gaps, and what is measured is the device's work alone. ``host`` tells where gaps would come from.
    """
    clock = clock or CudaClock()
    for number in range(max(sets, 2)):
        call(number % sets)
    clock.wait()
    host = min(_host_seconds(call, clock) for _ in range(min(3, fewest)))
    wait = 1.5 * host + 50e-6
    once = clock.between(*_marks(call, 0, wait, clock, evict))
    runs = min(MOST_RUNS, max(fewest, int(seconds / (once + wait))))
    marks = [_marks(call, number % sets, wait, clock, evict, finish=False) for number in range(runs)]
    clock.wait()
    return Times(runs, *percentiles([clock.between(*pair) for pair in marks]), host)


def _host_seconds(call: Callable[[int], Any], clock: Clock) -> float:
    start = time.perf_counter()
    call(0)
    asked = time.perf_counter() - start
    clock.wait()
    return asked


def _marks(
    call: Callable[[int], Any],
    number: int,
    wait: float,
    clock: Clock,
    evict: Callable[[], Any] | None,
    finish: bool = True,
) -> tuple[Any, Any]:
    if evict is not None:
        evict()
    clock.hold(wait)
    start = clock.mark()
    call(number)
    end = clock.mark()
    if finish:
        clock.wait()
    return start, end


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(points).tolist()
    return p20, p50, p80


def input_sets(size: int, cache: int) -> int:
    """How many sets of inputs of ``size`` bytes to take in turns so that a cache has lost each until its turn.

    Of inputs so small that more than ``MOST_SETS`` would be needed, that many; ``evictor`` does the rest.
    """
    return min(MOST_SETS, 1 + -(-2 * cache // max(size, 1)))


def evictor(size: int, device: torch.device) -> Callable[[], Any] | None:
    """Reads twice what a GPU's second cache holds, where sets of ``size`` bytes in turns do not outgrow it."""
    held = l2_bytes(device)
    if (input_sets(size, held) - 1) * size >= 2 * held:
        return None
    # Read, not written: lines that wait to be written back would be written during what is timed.
    return partial(torch.sum, _other_bytes(device, 2 * held))


@cache
def _other_bytes(device: torch.device, size: int) -> Tensor:
    return torch.zeros(size // 4, device=device)


def l2_bytes(device: torch.device) -> int:
    """Of a GPU's second cache; 0 elsewhere, where nothing is timed that would tell anything."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of the GPU that a call holds beyond what is held before it; 0 without a GPU."""
    if not torch.cuda.is_available():
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in the same run as what is held against it."""

    copy: float
    """Bytes a second of a large copy, those read and those written."""
    matrix: float
    """FLOP/s of a large bf16 matrix product of random numbers."""
    launch: float
    """Seconds of a launch that does next to nothing."""
    products: float | None = None
    """FLOP/s of bf16 products at the shapes of a model's step (``benchmarks.products``), all of them one by one."""

    def row(self) -> dict[str, float | None]:
        return {
            "copy_bytes_per_second": self.copy,
            "matrix_flops_per_second": self.matrix,
            "launch_seconds": self.launch,
            "products_flops_per_second": self.products,
        }

    def describe(self) -> str:
        products = "" if self.products is None else f" ({self.products / 1e12:.3g} at the model's own shapes)"
        return (
            f"ceilings: copy {self.copy / 1e12:.3g} TB/s, bf16 products {self.matrix / 1e12:.3g} TFLOP/s{products}, "
            f"empty launch {self.launch * 1e6:.1f} us"
        )


def measure_ceilings(device: torch.device, clock: Clock | None = None, smoke: bool = False) -> Ceilings:
    """Copy, product and launch; small ones, once each, where it is only tried whether this works."""
    copied, side = (SMOKE_BYTES, SMOKE_SIDE) if smoke else (COPIED_BYTES, MATRIX_SIDE)
    seconds, fewest = (0.0, 1) if smoke else (0.2, FEWEST_RUNS)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda _: target.copy_(source), 1, seconds, clock, fewest).p50
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    matrix = measure(lambda _: a @ b, 1, seconds, clock, fewest).p50
    one = torch.zeros(1, device=device)
    launch = measure(lambda _: one.zero_(), 1, min(seconds, 0.05), clock, fewest).p50
    return Ceilings(2 * copied / copy, 2 * side**3 / matrix, launch)
