"""Makes the arms of a training step ready, one after the other, and then lets them take turns."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks import harness
from benchmarks.clocks import clock_of
from benchmarks.deadline import Deadline, NotReadyError
from benchmarks.step_arms import Runner, Seconds
from benchmarks.step_parity import Result, result_of
from sgmim_fast.errors import first_line

LEAST_TURNS = 3  # of each arm, whatever the time


@dataclass
class Arm:
    """One that is ready, and what was measured of it."""

    runner: Runner
    result: Result
    activation_bytes: int | None
    step_memory_bytes: int
    graph_skips: int
    """Graphs of the compiled program that it does not run as CUDA graphs, though asked to."""
    ready_seconds: float
    """What making it ready took, compilation included."""
    turns: list[Seconds] = field(default_factory=list)
    """The mean step of each."""


def prepare(make: Callable[[], Runner], peak_on_host: Callable[[], int]) -> Arm:
    """Make an arm, warm it up, take its result and its memory.

    Args:
        peak_on_host: measures the memory of a step on the CPU.
    """
    began, skipped = time.monotonic(), counters["inductor"]["cudagraph_skips"]
    runner = make()
    reserved = reserved_bytes(runner.device)
    runner.warm_up()
    seconds = time.monotonic() - began
    if runner.device.type != "cuda":
        return Arm(runner, result_of(runner), activations_on_host(runner), peak_on_host(), 0, seconds)
    skips = counters["inductor"]["cudagraph_skips"] - skipped
    if runner.variant.graphs:
        runner.drop_gradients()
        pool = max(reserved_bytes(runner.device) - reserved, 0)
        return Arm(runner, result_of(runner), None, pool, skips, seconds)
    result = result_of(runner)
    runner.hold_gradients()
    kept = activations_on_gpu(runner)
    peak = harness.peak_bytes(runner.step)
    runner.drop_gradients()
    return Arm(runner, result, kept, peak, skips, seconds)


def take_turns(arms: dict[str, Arm], turns: int, steps: int, deadline: Deadline) -> dict[str, str]:
    """Let each arm take ``steps`` steps in its turn, until the time is over. Arms that fail are removed.

    Returns:
        Why, by name.
    """
    failed = {}
    for number in range(turns):
        if number >= LEAST_TURNS and deadline.left() <= 0:
            break
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


def reserved_bytes(device: torch.device) -> int:
    """What PyTorch has of a GPU's memory and uses, CUDA graphs' pools as a whole."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


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
