"""What a training step is measured by: losses, throughput, memory; without making any step wait for the host."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from sgmim_fast.train.job import Job
from sgmim_fast.train.peaks import device_peak_tflops


class LossWindow:
    """Losses summed on the device since the last log step, so that no step waits for the host.

    Losses that are not finite are left out: their steps are not taken either.

    Args:
        names: of the losses, in their order.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._sum = torch.zeros(len(names) + 1, dtype=dtype, device=device)
        self._names, self._absent = names, set[str]()

    @torch.no_grad()
    def add(self, out: Sequence[Tensor | None]) -> None:
        """A micro-step's; None for what this run does not have."""
        self._absent.update(name for name, value in zip(self._names, out, strict=True) if value is None)
        values = [self._sum.new_zeros(()) if value is None else value.to(self._sum.dtype) for value in out]
        one = torch.stack([*values, self._sum.new_ones(())])
        self._sum += torch.where(torch.isfinite(one.sum()), one, 0.0)

    def over_ranks(self, bad_samples: int) -> dict[str, float | int | None]:
        """Means of all ranks' micro-steps, None if no loss was finite, and all ranks' ``bad_samples``.

        Waits for the device, and begins a new window.
        """
        together = torch.cat((self._sum, self._sum.new_tensor([bad_samples])))
        distributed.all_reduce(together)
        self._sum.zero_()
        *sums, count, bad = together.tolist()
        means = {
            name: None if count == 0 or name in self._absent else value / count
            for name, value in zip(self._names, sums, strict=True)
        }
        return {**means, "bad_samples": int(bad)}


class Stopwatch:
    """Time since the last log step, and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self.origin = self._mark = time.perf_counter()
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the last log step was spent on something else than steps."""
        self._mark += seconds

    def lap(self, images: int) -> dict[str, float]:
        """``images_per_second``, ``data_wait`` (share of the time) and ``time`` (seconds since the start)."""
        now = time.perf_counter()
        span, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        return {"images_per_second": images / span, "data_wait": waited / span, "time": now - self.origin}


@dataclass(frozen=True)
class Efficiency:
    """What of the devices' arithmetic a run makes use of."""

    flops_per_image: int
    """Model FLOPs of one image's forward and backward pass: what the method asks for, whatever way it is computed."""
    ranks: int
    peak_tflops: float | None
    """Of one device, dense; None if it is not known."""

    @classmethod
    def of(cls, job: Job[Any], device: torch.device, ranks: int) -> "Efficiency":
        """That of a run; counting the FLOPs takes about a second for a base model."""
        config = job.config
        peak = device_peak_tflops(device, config.train.precision, config.monitor.peak_tflops)
        return cls(job.flops_per_image(), ranks, peak)

    def at(self, images_per_second: float) -> dict[str, float | None]:
        """``tflops``, achieved by a device, and ``mfu``, their share of its peak, at a rate of all ranks together."""
        tflops = self.flops_per_image * images_per_second / self.ranks / 1e12
        return {"tflops": tflops, "mfu": None if self.peak_tflops is None else tflops / self.peak_tflops}

    def summary(self) -> str:
        """One line about what utilisation is counted from."""
        line = f"{self.flops_per_image / 1e9:.3g} GFLOP an image"
        if self.peak_tflops is None:
            return f"{line}; no MFU, for the peak of the device is not known: --monitor.peak-tflops sets it"
        return f"{line}; MFU is of {self.peak_tflops:g} TFLOP/s a device"


def memory(device: torch.device) -> dict[str, int]:
    """``peak_memory_bytes``: most memory in use so far, allocated on the GPU or resident in the process on the CPU.

    On a GPU also ``reserved_memory_bytes``: the most that PyTorch's allocator has held, in use or not.
    """
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_memory_bytes": torch.cuda.max_memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def as_float(value: float | Tensor | None) -> float | None:
    """DeepSpeed hands out norms as numbers or tensors, by stage and version."""
    return None if value is None else float(value)
