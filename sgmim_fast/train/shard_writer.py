"""How a rank's files of a checkpoint reach the disk: checksummed, made durable, at once or beside training.

DeepSpeed hands its shards to ``ShardWriter`` as it would to its own checkpoint engines. A file that cannot be written
raises nothing there, because the other ranks would wait for this one for ever: the failure is kept until the ranks
compare notes.
"""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from sgmim_fast.train.run_folder import FileFact, file_fact


class ChecksumFile(io.RawIOBase):
    """A new file that knows the checksum of what went through it.

    ``torch.save`` writes through C++ code that an exception would leave in disorder, so ``write`` never raises: a
    failure is kept, what follows is dropped, and ``close_durably`` raises it.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            done = 0
            while self._failure is None and done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self._failure = error
        self._digest.update(view)
        self._bytes += len(view)
        return len(view)

    def close_durably(self) -> FileFact:
        """Wait until the content is on the disk.

        Raises:
            OSError: if anything of it could not be written.
        """
        with self._file:
            if self._failure is not None:
                raise self._failure
            os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


class ShardWriter(CheckpointEngine):
    """One rank's writer of one checkpoint after the other.

    Args:
        beside: write on a thread, from a copy in memory, while training goes on.
    """

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.name = "ShardWriter"
        self._pool = ThreadPoolExecutor(1, "sgmim-checkpoint") if beside else None
        self._jobs: list[Future[None]] = []
        self._facts: dict[str, FileFact] = {}
        self._folder = Path()

    def begin(self, folder: Path) -> None:
        """Files are written below ``folder`` from now on; what was written before is forgotten."""
        self._folder, self._jobs, self._facts = folder, [], {}

    @property
    def busy(self) -> bool:
        """Whether files are still on their way."""
        return not all(job.done() for job in self._jobs)

    @property
    def failure(self) -> BaseException | None:
        """Why a file could not be written, if one could not."""
        errors = (job.exception() for job in self._jobs if job.done())
        return next((error for error in errors if error is not None), None)

    def wait(self) -> dict[str, FileFact]:
        """What was written, once all of it is on the disk or one file has failed: name below the folder -> facts."""
        for job in self._jobs:
            job.exception()
        return self._facts

    def put(self, path: Path, make: Callable[[Path], object]) -> None:
        """Let ``make`` write a whole file; it must not look at anything that training changes."""

        def work() -> None:
            make(path)
            self._facts[self._name(path)] = durable_file(path)

        self._run(work)

    def close(self) -> None:
        """End the thread once its files are written."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    # -- what DeepSpeed calls

    def create(self, info: Any) -> None:
        """Nothing is to be prepared: ``begin`` has done so."""

    def commit(self, info: Any) -> bool:
        """Nothing is final before all ranks have agreed."""
        return True

    def save(self, state_dict: Any, path: str) -> None:
        def write(content: Callable[[ChecksumFile], object]) -> None:
            file = ChecksumFile(Path(path))
            try:
                content(file)
            except BaseException:
                file.close()
                raise
            self._facts[self._name(Path(path))] = file.close_durably()

        if self._pool is None:
            self._run(lambda: write(lambda file: torch.save(state_dict, cast(IO[bytes], file))))
            return
        frozen = io.BytesIO()  # the state as it is now, in the host's memory
        torch.save(state_dict, frozen)
        self._run(lambda: write(lambda file: file.write(frozen.getbuffer())))

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _run(self, work: Callable[[], None]) -> None:
        """On the thread, if there is one; else at once."""
        if self._pool is not None:
            self._jobs.append(self._pool.submit(work))
            return
        job: Future[None] = Future()
        self._jobs.append(job)
        try:
            work()
            job.set_result(None)
        except Exception as error:
            job.set_exception(error)


def durable_file(path: Path) -> FileFact:
    """Facts of a file that is written, once it is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return file_fact(path)
