"""The loader built on torch's DataLoader and Pillow.

A batch is a function of (seed, epoch, step, rank) alone: no state is carried from one to the next, so
a run resumes at any step and any number of worker processes gives the same batches.

Shapes: B pairs a micro-batch, S_h x S_w image pixels, C structure channels, Gh x Gw mask cells of which
K are masked.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data import augment, reading
from sgmim_fast.data.batches import Batch, Loader, draw_mask
from sgmim_fast.data.decoding import check_sizes
from sgmim_fast.data.members import Member, Pairs
from sgmim_fast.data.order import BEGIN, Place, SampleOrder
from sgmim_fast.data.substitution import Substitutes
from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_CROP, mask_indices, sample_rng

Sample = dict[str, Any]
_SHIELD = "sgmim_fast.data.shielded"  # a name: importing it here would shield this process


class SampleKey(NamedTuple):
    """What a worker needs to make one sample; it travels with the request, so no worker copies the list of pairs."""

    epoch: int
    sample: int
    image: Member
    structure: Member | None

    @classmethod
    def of(cls, pairs: Pairs, config: PretrainConfig, epoch: int, index: int) -> Self:
        image, structure = pairs.members(index)
        if config.model.guidance == "none":
            return cls(epoch, index, image, None)
        if structure is None:
            raise ValueError("the data set was opened without structure maps, but the model's guidance needs them")
        return cls(epoch, index, image, structure)


class PairDataset(Dataset[Sample]):
    """Makes one sample from its key: ``image`` (3,S_h,S_w), ``structure`` (C,S_h,S_w), ``mask`` (Gh,Gw), ``index``.

    The crop and the mask are drawn from (seed, epoch, dataset index), nothing else.

    Args:
        random_crop: False takes the whole image instead: short side to size, centre crop, no flip.
    """

    def __init__(self, config: PretrainConfig, *, random_crop: bool = True) -> None:
        self.config = config
        self.random_crop = random_crop

    def __getitem__(self, key: SampleKey) -> Sample:
        model, data, seed = self.config.model, self.config.data, self.config.train.seed
        file = key.image.read()
        pixels = np.asarray(reading.read_image(file))
        height, width = pixels.shape[:2]
        structure = None
        if key.structure is not None:
            map_file = key.structure.read()
            structure = reading.read_structure(map_file, model.structure_channels)
            check_sizes(file, map_file, (height, width), structure.shape[1:])
        if self.random_crop:
            rng = sample_rng(seed, key.epoch, key.sample, STREAM_CROP)
            augmentation = augment.draw_augmentation(rng, height, width, data)
        else:
            augmentation = augment.central_augmentation(height, width, model.hw)
        # Copied: the crop is then in one piece, and what was decoded can go.
        box = torch.from_numpy(augment.crop(pixels, augmentation).copy())
        sample: Sample = {
            "image": augment.finish_image(box, augmentation.flip, model.hw),
            "mask": draw_mask(self.config, key.epoch, key.sample),
            "index": key.sample,
        }
        if structure is not None:
            box = torch.from_numpy(augment.crop(structure.transpose(1, 2, 0), augmentation).transpose(2, 0, 1))
            sample["structure"] = augment.finish_structure(box, augmentation.flip, model.hw)
        return sample

    def batch(self, keys: Sequence[SampleKey]) -> Batch:
        """Collated samples: each tensor gains a leading B; ``masked`` (B,K) and ``visible`` (B,Gh*Gw-K) int32."""
        return collated([self[key] for key in keys])


def collated(samples: list[Sample]) -> Batch:
    """A batch of samples, with the index lists of its masks."""
    batch: Batch = default_collate(samples)
    batch["masked"], batch["visible"] = mask_indices(batch["mask"])
    return batch


class _Incomplete(NamedTuple):
    """A batch with bad pairs: the training process, which knows the other pairs, completes it."""

    epoch: int
    indices: list[int]
    samples: list[Sample | UserError]


class _BatchDataset(Dataset[Batch | _Incomplete]):
    """Whole batches by their keys; bad input is a value, because DataLoader would wrap it into a traceback."""

    def __init__(self, pairs: PairDataset) -> None:
        self.pairs = pairs

    def __getitem__(self, keys: Sequence[SampleKey]) -> Batch | _Incomplete:
        samples = [self._sample(key) for key in keys]
        good = [sample for sample in samples if not isinstance(sample, UserError)]
        if len(good) == len(samples):
            return collated(good)
        return _Incomplete(keys[0].epoch, [key.sample for key in keys], samples)

    def _sample(self, key: SampleKey) -> Sample | UserError:
        try:
            return self.pairs[key]
        except UserError as error:
            return error


class _BatchKeys:
    """The endless request list of one rank."""

    def __init__(self, pairs: Pairs, config: PretrainConfig, order: SampleOrder, rank: int, place: Place) -> None:
        self.pairs, self.config, self.order, self.rank, self.place = pairs, config, order, rank, place

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for epoch, indices in self.order.micro_batches(self.rank, self.place):
            yield [self.key(epoch, index) for index in indices.tolist()]

    def key(self, epoch: int, index: int) -> SampleKey:
        """The request for one sample."""
        return SampleKey.of(self.pairs, self.config, epoch, index)


class TorchLoader(Loader):
    """Endless iterator over one rank's micro-batches; see ``build_loader``.

    Worker processes start with the first batch and end with ``close()``, a ``with`` block, or an error.
    """

    def __init__(
        self,
        pairs: Pairs,
        config: PretrainConfig,
        order: SampleOrder,
        substitutes: Substitutes,
        *,
        rank: int,
        place: Place = BEGIN,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(order, substitutes)
        self._keys = _BatchKeys(pairs, config, order, rank, place)
        self._samples = PairDataset(config)
        workers = config.data.workers
        self._loader: DataLoader[Batch | _Incomplete] = DataLoader(
            _BatchDataset(self._samples),
            batch_size=None,  # a key is a whole batch already
            sampler=self._keys,
            num_workers=workers,
            multiprocessing_context=_worker_context() if workers else None,
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
            return self._samples[self._keys.key(batch.epoch, candidate)]

        return collated([
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


def _worker_context() -> BaseContext:
    """A fork server: workers fork from a clean process that has imported this module once.

    Forking the training process itself would copy locks that its communication and device threads hold.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, _SHIELD])
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


def evaluation_batch(pairs: Pairs, config: PretrainConfig, indices: Sequence[int]) -> Batch:
    """Chosen samples to look at: whole images (short side to size, centre crop), masks of epoch 0."""
    samples = PairDataset(config, random_crop=False)
    return samples.batch([SampleKey.of(pairs, config, 0, index) for index in indices])
