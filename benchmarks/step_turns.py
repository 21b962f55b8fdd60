"""Makes the arms of a training step ready, one after the other, and then lets them take turns."""

import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks import harness
from benchmarks.clocks import clock_of
from benchmarks.step_arms import Runner, Seconds
from benchmarks.step_parity import Result, result_of
from sgmim_fast.errors import first_line

RESERVE = 20.0  # seconds that the turns are left when time is short


@dataclass
class Arm:
    """One that is ready, and what was measured of it."""

    runner: Runner
    result: Result
    activation_bytes: int | None
    step_memory_bytes: int
    graph_skips: int
    """Graphs of the compiled program that it does not run as CUDA graphs, though asked to."""
    turns: list[Seconds] = field(default_factory=list)
    """The mean step of each."""


class NotReadyError(Exception):
    """An arm could not be made ready in the time that is left."""


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

        def stop(*_: Any) -> None:
            raise NotReadyError(f"it was not ready after {seconds:.0f} s, all that --seconds left")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def prepare(make: Callable[[], Runner], peak_on_host: Callable[[], int]) -> Arm:
    """Make an arm, warm it up, take its result and its memory.

    Args:
        peak_on_host: measures the memory of a step on the CPU.
    """
    runner = make()
    skipped = counters["inductor"]["cudagraph_skips"]
    if runner.device.type != "cuda":
        runner.warm_up()
        result = result_of(runner)
        kept = activations_on_host(runner)
        return Arm(runner, result, kept, peak_on_host(), 0)
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved(runner.device)
    runner.warm_up()
    result = result_of(runner)
    skips = counters["inductor"]["cudagraph_skips"] - skipped
    if runner.variant.graphs:
        del result  # its copies of the gradients are no part of the pool
        runner.drop_gradients()
        torch.cuda.empty_cache()
        pool = max(torch.cuda.memory_reserved(runner.device) - reserved, 0)
        return Arm(runner, result_of(runner), None, pool, skips)
    runner.hold_gradients()
    kept = activations_on_gpu(runner)
    runner.hold_gradients()
    peak = harness.peak_bytes(runner.step)
    runner.drop_gradients()
    return Arm(runner, result, kept, peak, skips)


def take_turns(arms: dict[str, Arm], turns: int, steps: int) -> dict[str, str]:
    """Let each arm take ``steps`` steps in its turn. Arms that fail are removed; returns why, by name."""
    failed = {}
    for _ in range(turns):
        for name, arm in list(arms.items()):
            try:
                taken = arm.runner.turn(steps, clock_of(arm.runner.device))
            except Exception as error:
                del arms[name]
                failed[name] = reason_of(error)
                continue
            arm.turns.append(Seconds(*(sum(part) / steps for part in zip(*taken, strict=True))))
    return failed


def reason_of(error: Exception) -> str:
    """Why an arm has no times, in a line."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, NotReadyError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what ended a step, in the words of whichever library met it first."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
            return True
        if "CUDA" in str(error) and "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# -- memory


def activations_on_gpu(runner: Runner) -> int:
    """Bytes that forward keeps for backward, weights not counted."""
    before = torch.cuda.memory_allocated(runner.device)
    loss = runner.forward()
    kept = torch.cuda.memory_allocated(runner.device) - before
    loss.backward()
    return kept


def activations_on_host(runner: Runner) -> int:
    """The same by the tensors that autograd saves."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in runner.model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        runner.step()
    return sum(sizes.values())


def peak_of_this_process(runner: Runner) -> int:
    """Most bytes that steps need beside weights, gradients and inputs, in a process that does nothing else."""
    runner.hold_gradients()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    for _ in range(3):
        for parameter in runner.model.parameters():
            assert parameter.grad is not None, "they are held"
            parameter.grad.zero_()
        runner.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()
