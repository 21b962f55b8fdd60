"""One loader, or one decoder of ``sgmim verify``, in a process of its own that measures itself when told to.

All processes that it starts belong to its session, which is how their time and memory are found.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.loading_pairs import open_part
from sgmim_fast.config import DataConfig, PretrainConfig, TrainConfig
from sgmim_fast.data.dali_batch import IN_WORK
from sgmim_fast.data.dali_loader import FINISHED
from sgmim_fast.data.loading import build_loader
from sgmim_fast.data.members import Pairs
from sgmim_fast.errors import UserError
from sgmim_fast.recipes import MODELS

REST = 0.2  # seconds between two looks whether a process rests
RESTING = 0.05  # of a core; what it may use then
PATIENCE = 120.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure."""

    work: str
    """"load": batches as training gets them; "verify": the checks of ``sgmim verify``."""
    loader: str
    """"torch" or "dali"."""
    path: str
    pairs: int
    """Of those at ``path``, at most."""
    model: str
    batch: int
    workers: int
    """Processes; threads of the loader "dali"."""
    device: str

    @property
    def config(self) -> PretrainConfig:
        return PretrainConfig(
            model=MODELS[self.model],
            data=DataConfig(path=self.path, workers=self.workers, loader=self.loader, max_bad_share=0.0),  # type: ignore[arg-type]
            train=TrainConfig(batch_size=self.batch),
        )

    @property
    def ahead(self) -> int:
        """Batches (chunks of pairs, where verified) that may be ready or in work while nobody asks for one."""
        return max(2 * self.workers, IN_WORK + FINISHED + 1)


class Contender:
    """The calling process's end of it.

    It imports what it needs and waits for ``start``; as context manager it ends all its processes.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._send(asdict(job))

    def start(self) -> float:
        """Seconds from building the loader to its first batch."""
        self._receive()
        return self._ask({"do": "start"})["seconds"]

    def measure(self, seconds: float) -> dict[str, float]:
        """About so many seconds of work, after what was ready before; see ``Work.measure``."""
        return self._ask({"do": "measure", "seconds": seconds})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._send(request)
        return self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None, "it has a pipe"
        with suppress(BrokenPipeError):  # if it has ended, the next answer is missing
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None, "it has a pipe"
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"the process of {self.job.work} {self.job.loader} ended with status {self.process.wait()}; "
                "if no message of its own is above, memory may have run out: lower --workers or --batch"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None, "it has a pipe"
        assert self.process.stdout is not None, "it has a pipe"
        if kind is None:
            self.process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


# -- in the process itself


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(content: dict[str, Any]) -> None:
        os.write(answers, json.dumps(content).encode() + b"\n")

    lines = iter(sys.stdin.readline, "")
    with suppress(BrokenPipeError):  # the calling process is gone
        try:
            with closing(Work(Job(**json.loads(next(lines))))) as work:
                answer({})
                for line in lines:
                    request = json.loads(line)
                    answer(work.start() if request["do"] == "start" else work.measure(request["seconds"]))
        except UserError as error:
            answer({"error": str(error)})


class Work:
    """Takes batches and measures what that costs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._pairs = open_part(job.path, job.pairs)
        self._batches = verified(job, self._pairs) if job.work == "verify" else loaded(job, self._pairs)

    def start(self) -> dict[str, float]:
        begin = time.perf_counter()
        next(self._batches)
        return {"seconds": time.perf_counter() - begin}

    def measure(self, seconds: float) -> dict[str, float]:
        """Rate and cost of batches that were made while they were waited for.

        Keys: ``pairs_per_second``; ``cpu_seconds_per_pair``, user and system time of all processes and threads;
        ``peak_rss_bytes``, the sum over the processes of the most that each has held, pages that they share counted
        in each; ``held_bytes``, the data that they hold together at the end of this, pages that they share counted
        once. Code of libraries is not in the latter, as whatever else runs shares it. Memory of a GPU is in neither.
        """
        for _ in range(self.job.ahead):
            next(self._batches)
        processes = own_processes()
        cpu, begin = cpu_seconds(processes), time.perf_counter()
        pairs = batches = 0
        # Worker processes finish their batches at about the same time, so whole rounds of them are counted.
        while (passed := time.perf_counter() - begin) < seconds or batches % self.job.workers:
            pairs += next(self._batches)
            batches += 1
        cpu = cpu_seconds(processes) - cpu
        found = {
            "pairs_per_second": pairs / passed,
            "cpu_seconds_per_pair": cpu / pairs,
            "peak_rss_bytes": sum(memory(process, "status", "VmHWM") for process in processes),
            "held_bytes": sum(
                memory(process, "smaps_rollup", key) for process in processes for key in ("Pss_Anon", "Pss_Shmem")
            ),
        }
        rest(lambda: cpu_seconds(processes))
        return found

    def close(self) -> None:
        self._batches.close()


def loaded(job: Job, pairs: Pairs) -> Generator[int, None, None]:
    """Sizes of the batches that training gets."""
    with build_loader(pairs, job.config, rank=0, world_size=1, device=torch.device(job.device)) as loader:
        for batch in loader:
            yield len(batch["index"])


def verified(job: Job, pairs: Pairs) -> Generator[int, None, None]:
    """Sizes of the chunks that ``sgmim verify`` has checked, the same pairs again and again."""
    from sgmim_fast.data.verification.checks import CheckSettings, Item, create_decoder, decoder_version
    from sgmim_fast.data.verification.pool import check_pairs

    def items() -> Iterator[Item]:
        for index in cycle(range(len(pairs))):
            image, structure = pairs.members(index)
            yield index, image.path, structure.path if structure else None

    settings = CheckSettings(
        structure=True,
        channels=job.config.model.structure_channels,
        loader=job.loader,
        decoder=decoder_version(job.loader),
        min_side=1,
    )
    with closing(check_pairs(items(), settings, create_decoder, job.workers)) as found:
        for _, chunk in found:
            if bad := next((checked.reason for checked in chunk if checked.reason), None):
                raise UserError(bad)
            yield len(chunk)


def own_processes() -> list[int]:
    """This process and all that it and its children have started."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _session(int(name)) == os.getpid()]


def _session(process: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(process)
    return None


def cpu_seconds(processes: list[int]) -> float:
    """User and system time that processes have used so far, all their threads together."""
    clock = ctypes.c_int()
    total = 0.0
    for process in processes:
        if ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock)):
            raise UserError("a loader process has ended; look above for its message")
        total += time.clock_gettime(clock.value)
    return total


def memory(process: int, file: str, key: str) -> int:
    """Bytes, from a file of the process's that gives kB."""
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def rest(used: Callable[[], float]) -> None:
    """Until what was in work is ready, so that it costs the next one nothing."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        before = used()
        time.sleep(REST)
        if used() - before < RESTING * REST:
            return
    raise UserError(f"a loader still works {PATIENCE:.0f} s after its last batch was taken; lower --batch")


if __name__ == "__main__":
    main()
