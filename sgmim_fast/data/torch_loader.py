"""The order of the samples, and the loader built on torch's DataLoader.

A batch is a function of (seed, epoch, step, rank) alone: no state is carried from one to the next, so
a run resumes at any step and any number of worker processes gives the same batches.

Shapes: B pairs a micro-batch, S_h x S_w image pixels, C structure channels, Gh x Gw mask cells of which
K are masked.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data import augment, reading
from sgmim_fast.data.manifest import Manifest
from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_CROP, STREAM_MASK, STREAM_ORDER, draw_cell_mask, mask_indices, sample_rng

Batch = dict[str, torch.Tensor]


class SampleOrder:
    """Which samples each micro-batch holds.

    An epoch is a permutation drawn from (seed, epoch). Optimizer step k takes the next A * W * B of it
    (A micro-steps, W ranks, B pairs a micro-batch), micro-batch by micro-batch and rank by rank; an
    incomplete last step is dropped. So W ranks of B pairs see in each step what one rank of W * B sees.
    """

    def __init__(self, samples: int, *, batch_size: int, world_size: int, accumulation_steps: int, seed: int) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.world_size = world_size
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self.step_size = accumulation_steps * world_size * batch_size
        self.steps_per_epoch = samples // self.step_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"the data set has {samples} pairs but one optimizer step takes {self.step_size} "
                f"(batch size {batch_size} x {world_size} rank(s) x {accumulation_steps} accumulation step(s)); "
                "lower --train.batch-size or add pairs"
            )

    def permutation(self, epoch: int) -> np.ndarray:
        """Dataset indices of one epoch in order, (samples,) int64."""
        return sample_rng(self.seed, epoch, 0, STREAM_ORDER).permutation(self.samples)

    def micro_batches(self, rank: int, start_step: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Endless (epoch, dataset indices (B,)) of one rank's micro-batches from an optimizer step on."""
        epoch, first = divmod(start_step, self.steps_per_epoch)
        while True:
            # (steps, micro-batches, ranks, pairs)
            order = self.permutation(epoch)[: self.steps_per_epoch * self.step_size].reshape(
                self.steps_per_epoch, self.accumulation_steps, self.world_size, self.batch_size
            )
            for step in range(first, self.steps_per_epoch):
                for micro in range(self.accumulation_steps):
                    yield epoch, order[step, micro, rank]
            epoch, first = epoch + 1, 0


class SampleKey(NamedTuple):
    """What a worker needs to make one sample; it travels with the request, so no worker copies the manifest."""

    epoch: int
    sample: int
    image: str
    structure: str | None

    @classmethod
    def of(cls, manifest: Manifest, config: PretrainConfig, epoch: int, index: int) -> Self:
        if config.model.guidance == "none":
            return cls(epoch, index, manifest.image_path(index), None)
        structure = manifest.structure_path(index)
        if structure is None:
            raise ValueError("the manifest was read without structure maps, but the model's guidance needs them")
        return cls(epoch, index, manifest.image_path(index), structure)


class PairDataset(Dataset[dict[str, Any]]):
    """Makes one sample from its key: ``image`` (3,S_h,S_w), ``structure`` (C,S_h,S_w), ``mask`` (Gh,Gw), ``index``.

    The crop and the mask are drawn from (seed, epoch, dataset index), nothing else.

    Args:
        random_crop: False takes the whole image instead: short side to size, centre crop, no flip.
    """

    def __init__(self, config: PretrainConfig, *, random_crop: bool = True) -> None:
        self.config = config
        self.random_crop = random_crop

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        model, data, seed = self.config.model, self.config.data, self.config.train.seed
        image = reading.read_image(key.image)
        height, width = image.height, image.width
        structure = None
        if key.structure is not None:
            structure = reading.read_structure(key.structure, model.structure_channels)
            _check_sizes(key, (height, width), structure.shape[1:])
        if self.random_crop:
            rng = sample_rng(seed, key.epoch, key.sample, STREAM_CROP)
            augmentation = augment.draw_augmentation(rng, height, width, data)
        else:
            augmentation = augment.central_augmentation(height, width, model.hw)
        rng = sample_rng(seed, key.epoch, key.sample, STREAM_MASK)
        sample: dict[str, Any] = {
            "image": augment.augment_image(image, augmentation, model.hw),
            "mask": torch.from_numpy(draw_cell_mask(rng, model.grid, data.mask_ratio)),
            "index": key.sample,
        }
        if structure is not None:
            sample["structure"] = augment.augment_structure(structure, augmentation, model.hw)
        return sample

    def batch(self, keys: Sequence[SampleKey]) -> Batch:
        """Collated samples: each tensor gains a leading B; ``masked`` (B,K) and ``visible`` (B,Gh*Gw-K) int32."""
        batch: Batch = default_collate([self[key] for key in keys])
        batch["masked"], batch["visible"] = mask_indices(batch["mask"])
        return batch


def _check_sizes(key: SampleKey, image: tuple[int, int], structure: tuple[int, ...]) -> None:
    if image == structure:
        return
    turned = image == structure[::-1] and reading.exif_orientation(key.image) >= 5
    cause = "the image's EXIF orientation was applied to the map only" if turned else "they do not show the same pixels"
    raise UserError(
        f"{key.image} is {image[1]}x{image[0]} pixels (width x height) but its map {key.structure} is "
        f"{structure[1]}x{structure[0]}: {cause}; make the map from the image as stored, at its size"
    )


class _BatchDataset(Dataset[Batch | UserError]):
    """Whole batches by their keys; bad input is a value, because DataLoader would wrap it into a traceback."""

    def __init__(self, pairs: PairDataset) -> None:
        self.pairs = pairs

    def __getitem__(self, keys: Sequence[SampleKey]) -> Batch | UserError:
        try:
            return self.pairs.batch(keys)
        except UserError as error:
            return error


class _BatchKeys:
    """The endless request list of one rank."""

    def __init__(self, manifest: Manifest, config: PretrainConfig, order: SampleOrder, rank: int, start: int) -> None:
        self.manifest, self.config, self.order, self.rank, self.start = manifest, config, order, rank, start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for epoch, indices in self.order.micro_batches(self.rank, self.start):
            yield [SampleKey.of(self.manifest, self.config, epoch, index) for index in indices.tolist()]


class TorchLoader:
    """Endless iterator over one rank's micro-batches; see ``build_torch_loader``.

    Worker processes start with the first batch and end with ``close()``, a ``with`` block, or an error.
    """

    def __init__(self, keys: _BatchKeys, config: PretrainConfig, *, pin_memory: bool) -> None:
        self.steps_per_epoch = keys.order.steps_per_epoch
        workers = config.data.workers
        self._loader: DataLoader[Batch | UserError] = DataLoader(
            _BatchDataset(PairDataset(config)),
            batch_size=None,  # a key is a whole batch already
            sampler=keys,
            num_workers=workers,
            multiprocessing_context=_worker_context() if workers else None,
            worker_init_fn=_end_with_parent if workers else None,
            pin_memory=pin_memory,
            # Without its own generator DataLoader would draw from, and so shift, the training process's.
            generator=torch.Generator(),
        )
        self._batches: Any = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

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
        if isinstance(batch, UserError):
            self.close()
            raise batch
        return batch

    def _lost_a_worker(self) -> bool:
        # What is raised depends on where in the hand-over the worker died, so the processes are asked instead.
        sentinels = [worker.sentinel for worker in getattr(self._batches, "_workers", ())]
        return bool(multiprocessing.connection.wait(sentinels, timeout=1.0)) if sentinels else False

    def close(self) -> None:
        """End the worker processes and wait for them."""
        self._closed = True
        batches, self._batches = self._batches, None
        if batches is not None and self._loader.num_workers:
            # Dropping the last reference would do the same, but a live traceback may hold another one.
            batches._shutdown_workers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _worker_context() -> BaseContext:
    """A fork server: workers fork from a clean process that has imported this module once.

    Forking the training process itself would copy locks that its communication and device threads hold.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent(worker: int) -> None:
    """Leave as soon as the training process is gone, even if it was killed.

    DataLoader's own check asks whether the worker's parent lives, and that is the fork server, which
    in turn lives as long as any worker.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, f"worker {worker} is not a child process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def build_torch_loader(
    manifest: Manifest,
    config: PretrainConfig,
    *,
    rank: int,
    world_size: int,
    start_step: int = 0,
    pin_memory: bool = False,
) -> TorchLoader:
    """One rank's micro-batches, endless over the epochs, from optimizer step ``start_step`` on.

    A batch holds float32 ``image`` (B,3,S_h,S_w), normalised; float32 ``structure`` (B,C,S_h,S_w), raw
    values, absent with guidance "none"; bool ``mask`` (B,Gh,Gw), True where the image is masked; int32
    ``masked`` (B,K) and ``visible`` (B,Gh*Gw-K), cell indices ascending; int64 ``index`` (B,), positions
    in the manifest. All are on the CPU.

    Raises:
        UserError: at once if the data set is smaller than one optimizer step; with the batch, from
            whichever process, if a file is bad. The message is one line that names the file.
    """
    if not 0 <= rank < world_size or start_step < 0:
        raise ValueError(f"rank {rank} of {world_size}, start_step {start_step}")
    train = config.train
    order = SampleOrder(
        len(manifest),
        batch_size=train.batch_size,
        world_size=world_size,
        accumulation_steps=train.accumulation_steps,
        seed=train.seed,
    )
    return TorchLoader(_BatchKeys(manifest, config, order, rank, start_step), config, pin_memory=pin_memory)


def evaluation_batch(manifest: Manifest, config: PretrainConfig, indices: Sequence[int]) -> Batch:
    """Chosen samples to look at: whole images (short side to size, centre crop), masks of epoch 0."""
    pairs = PairDataset(config, random_crop=False)
    return pairs.batch([SampleKey.of(manifest, config, 0, index) for index in indices])
