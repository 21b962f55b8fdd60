"""What every measurement on a GPU shares: timing by device events, ceilings of the same run, rows with their origin."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sgmim_fast.errors import UserError
from sgmim_fast.train.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
FASTEST_CLOCK = 2.5e9  # Hz; no GPU of the supported kinds counts faster, so a wait lasts at least as long as asked
MOST_RUNS, FEWEST_RUNS = 200, 5
COPIED_BYTES = 2 << 30
MATRIX_SIDE = 8192
QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


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


def measure(call: Callable[[int], Any], sets: int = 1, seconds: float = 0.2, clock: Clock | None = None) -> Times:
    """Time ``call(number)`` for input sets 0 .. sets - 1 in turns, about ``seconds`` long in all.

    The device is held before each call until the host has queued all of it: kernels then follow each other without
    gaps, and what is measured is the device's work alone. ``host`` tells where gaps would come from.
    """
    clock = clock or CudaClock()
    for number in range(max(sets, 2)):
        call(number % sets)
    clock.wait()
    host = min(_host_seconds(call, clock) for _ in range(3))
    wait = 1.5 * host + 50e-6
    once = clock.between(*_marks(call, 0, wait, clock))
    runs = min(MOST_RUNS, max(FEWEST_RUNS, int(seconds / (once + wait))))
    marks = [_marks(call, number % sets, wait, clock, finish=False) for number in range(runs)]
    clock.wait()
    return Times(runs, *percentiles([clock.between(*pair) for pair in marks]), host)


def _host_seconds(call: Callable[[int], Any], clock: Clock) -> float:
    start = time.perf_counter()
    call(0)
    asked = time.perf_counter() - start
    clock.wait()
    return asked


def _marks(call: Callable[[int], Any], number: int, wait: float, clock: Clock, finish: bool = True) -> tuple[Any, Any]:
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
    """How many sets of inputs of ``size`` bytes to take in turns so that a cache has lost each until its turn."""
    return min(64, 1 + -(-2 * cache // max(size, 1)))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that a call holds beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best, measured in the same run as what is held against it."""

    copy: float
    """Bytes a second of a large copy, those read and those written."""
    matrix: float
    """FLOP/s of a large bf16 matrix product of random numbers."""
    launch: float
    """Seconds of a launch that does next to nothing."""

    def row(self) -> dict[str, float]:
        return {
            "copy_bytes_per_second": self.copy,
            "matrix_flops_per_second": self.matrix,
            "launch_seconds": self.launch,
        }


def measure_ceilings(device: torch.device) -> Ceilings:
    source = torch.randn(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda _: target.copy_(source)).p50
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    matrix = measure(lambda _: a @ b).p50
    one = torch.zeros(1, device=device)
    launch = measure(lambda _: one.zero_(), seconds=0.05).p50
    return Ceilings(2 * COPIED_BYTES / copy, 2 * MATRIX_SIDE**3 / matrix, launch)


# -- rows


class Rows:
    """Appends rows to a JSONL file, each with the environment it was measured in."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.environment: dict[str, Any] = dict(describe_environment(device, 1))
        if device.type == "cuda":
            self.environment |= describe_gpu(device)

    def append(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "environment": self.environment}) + "\n")


def describe_gpu(device: torch.device) -> dict[str, str | int]:
    """What ``describe_environment`` leaves out: driver, clocks and sizes of the GPU."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, str | int] = {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "gpu_bytes": properties.total_memory,
    }
    if (tool := shutil.which("nvidia-smi")) is None:
        return found | {"driver_version": "unknown: no nvidia-smi"}
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return found | {"driver_version": f"unknown: nvidia-smi ended with status {done.returncode}"}
    return found | dict(zip(QUERY, done.stdout.strip().split(", "), strict=True))
