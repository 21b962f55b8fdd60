"""The loader built on torch's DataLoader; what a sample is, others say.

A batch is a function of (seed, epoch, step, rank) alone: no state is carried from one to the next, so
a run resumes at any step and any number of worker processes gives the same batches.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from sgmim_fast.data.batches import Batch, Loader, Sample
from sgmim_fast.data.order import BEGIN, Place, SampleOrder
from sgmim_fast.data.substitution import Substitutes
from sgmim_fast.errors import UserError

_SHIELD = "sgmim_fast.data.shielded"  # a name: importing it here would shield this process


class Key(Protocol):
    """Which sample, and in which epoch; beside that, where its files are."""

    @property
    def epoch(self) -> int: ...

    @property
    def sample(self) -> int:
        """Dataset index."""


K = TypeVar("K", bound=Key)
K_in = TypeVar("K_in", bound=Key, contravariant=True)


class Samples(Protocol[K_in]):
    """Makes samples, in worker processes: small, picklable, and without state."""

    def __getitem__(self, key: K_in) -> Sample:
        """One sample, a function of its key.

        Raises:
            UserError: if a file is bad; it names the file.
        """

    def collated(self, samples: Sequence[Sample]) -> Batch: ...


class _Incomplete(NamedTuple):
    """A batch with bad samples: the training process, which knows the other ones, completes it."""

    epoch: int
    indices: list[int]
    samples: list[Sample | UserError]


class _BatchDataset(Dataset[Batch | _Incomplete], Generic[K]):
    """Whole batches by their keys; bad input is a value, because DataLoader would wrap it into a traceback."""

    def __init__(self, samples: Samples[K]) -> None:
        self.samples = samples

    def __getitem__(self, keys: Sequence[K]) -> Batch | _Incomplete:
        samples = [self._sample(key) for key in keys]
        good = [sample for sample in samples if not isinstance(sample, UserError)]
        if len(good) == len(samples):
            return self.samples.collated(good)
        return _Incomplete(keys[0].epoch, [key.sample for key in keys], samples)

    def _sample(self, key: K) -> Sample | UserError:
        try:
            return self.samples[key]
        except UserError as error:
            return error


class _BatchKeys(Generic[K]):
    """The endless request list of one rank."""

    def __init__(self, key: Callable[[int, int], K], order: SampleOrder, rank: int, place: Place) -> None:
        self.key, self.order, self.rank, self.place = key, order, rank, place

    def __iter__(self) -> Iterator[list[K]]:
        for epoch, indices in self.order.micro_batches(self.rank, self.place):
            yield [self.key(epoch, index) for index in indices.tolist()]


class TorchLoader(Loader, Generic[K]):
    """Endless iterator over one rank's micro-batches.

    Worker processes start with the first batch and end with ``close()``, a ``with`` block, or an error.

    Args:
        samples: goes to the worker processes.
        key: the request for one sample by (epoch, dataset index); called in this process only.
        workers: processes; with 0 this one makes the batches.
        pin_memory: batches are page-locked.
    """

    def __init__(
        self,
        samples: Samples[K],
        key: Callable[[int, int], K],
        order: SampleOrder,
        substitutes: Substitutes,
        *,
        workers: int,
        rank: int,
        place: Place = BEGIN,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(order, substitutes)
        self._samples, self._key = samples, key
        self._loader: DataLoader[Batch | _Incomplete] = DataLoader(
            _BatchDataset(samples),
            batch_size=None,  # a key is a whole batch already
            sampler=_BatchKeys(key, order, rank, place),
            num_workers=workers,
            multiprocessing_context=_worker_context(type(samples).__module__) if workers else None,
            worker_init_fn=_begin_worker if workers else None,
            pin_memory=pin_memory,
            # Without its own generator DataLoader would draw from, and so shift, the training process's.
            generator=torch.Generator(),
        )
        self._batches: Any = None
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this loader is closed; build another one")
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            if not self._lost_a_worker():
                raise
            self.close()
            raise UserError(
                "a loader process was ended from outside; mostly memory or /dev/shm ran out: "
                "lower --data.workers or --train.batch-size, or give the machine more"
            ) from error
        if isinstance(batch, _Incomplete):
            try:
                return self._completed(batch)
            except UserError:
                self.close()
                raise
        return batch

    def _completed(self, batch: _Incomplete) -> Batch:
        def make(candidate: int) -> Sample:
            return self._samples[self._key(batch.epoch, candidate)]

        return self._samples.collated([
            self.substitutes.replace(batch.epoch, index, sample, make) if isinstance(sample, UserError) else sample
            for index, sample in zip(batch.indices, batch.samples, strict=True)
        ])  # fmt: skip

    def processes(self) -> list[int]:
        return [worker.pid for worker in self._workers() if worker.pid is not None]

    def _workers(self) -> list[BaseProcess]:
        return list(getattr(self._batches, "_workers", ()))

    def _lost_a_worker(self) -> bool:
        # What is raised depends on where in the hand-over the worker died, so the processes are asked instead.
        sentinels = [worker.sentinel for worker in self._workers()]
        return bool(multiprocessing.connection.wait(sentinels, timeout=1.0)) if sentinels else False

    def close(self) -> None:
        """End the worker processes and wait for them."""
        self._closed = True
        workers = self._workers()
        batches, self._batches = self._batches, None
        if batches is not None and self._loader.num_workers:
            # Dropping the last reference would do the same, but a live traceback may hold another one.
            batches._shutdown_workers()
        for worker in workers:
            if worker.is_alive():  # it hangs, and DataLoader's SIGTERM does not end it
                worker.kill()


def _worker_context(module: str) -> BaseContext:
    """A fork server: workers fork from a clean process that has imported this module and another once.

    Forking the training process itself would copy locks that its communication and device threads hold.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module, _SHIELD])
    return context


def _begin_worker(worker: int) -> None:
    """Tell where it is when asked by SIGUSR1, and leave as soon as the training process is gone, even if it was killed.

    DataLoader's own check asks whether the worker's parent lives, and that is the fork server, which
    in turn lives as long as any worker.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, f"worker {worker} is not a child process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
