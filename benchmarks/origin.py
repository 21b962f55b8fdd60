"""Where a row comes from: the sources that were measured, the GPU, and the clocks that it ran at meanwhile."""

import atexit
import hashlib
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sgmim_fast.train.environment import describe_environment

ROOT = Path(__file__).parents[1]
MEASURED = ("sgmim_fast", "kernels", "benchmarks")
QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
SEEN = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
EVERY = 0.2  # seconds
PATIENCE = 20.0  # seconds for an answer


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions, command and sources of what is measured on ``device``."""
    found: dict[str, Any] = dict(describe_environment(device, 1))
    found["dirty"] = found["commit"].endswith("+changes") if len(found["commit"]) >= 40 else None
    found["sources"] = sources()
    return found | (describe_gpu(device) if device.type == "cuda" else {})


@cache
def sources(root: Path = ROOT) -> str:
    """A digest of the code, which also tells two states apart where there is no commit, or changes on top of one."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


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
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return found | {"driver_version": f"unknown: nvidia-smi: {type(error).__name__}"}
    if done.returncode != 0:
        return found | {"driver_version": f"unknown: nvidia-smi ended with status {done.returncode}"}
    # Warnings may stand above; of a part of a GPU some fields say [N/A].
    values = done.stdout.strip().rpartition("\n")[2].split(", ")
    if len(values) != len(QUERY):
        return found | {"driver_version": f"unknown: nvidia-smi said {', '.join(values)!r}"}
    return found | dict(zip(QUERY, values, strict=True))


class ClockWatch:
    """Clocks, power and temperature of one GPU, as nvidia-smi sees them several times a second until this process ends.

    Args:
        gpu: what ``nvidia-smi --id`` takes.
    """

    def __init__(self, gpu: str) -> None:
        self._lines: list[str] = []
        if (tool := shutil.which("nvidia-smi")) is None:
            return
        command = [tool, f"--query-gpu={','.join(SEEN)}", "--format=csv,noheader,nounits", f"--id={gpu}"]
        try:
            self._process = subprocess.Popen(
                [*command, f"--loop-ms={EVERY * 1e3:.0f}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            return
        atexit.register(self._process.kill)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)

    def seen(self) -> dict[str, list[float]]:
        """Lowest, middle and highest value since the last call; what was not seen is left out."""
        lines, self._lines = self._lines, []
        found = {}
        for place, name in enumerate(SEEN.values()):
            if values := [value for line in lines if (value := number(line, place)) is not None]:
                found[name] = [min(values), median(values), max(values)]
        return found


def number(line: str, place: int) -> float | None:
    """A figure of a line of nvidia-smi; None for what this GPU does not tell."""
    try:
        return float(line.split(",")[place])
    except (ValueError, IndexError):
        return None
