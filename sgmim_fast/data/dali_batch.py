"""A batch on its way through DALI: pairs that are fit for a pipeline, and the pipeline of a run."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data import augment, reading
from sgmim_fast.data.dali_decoding import STRETCH, MapKind, check_kind, first_kind, training_pipeline
from sgmim_fast.data.decoding import check_sizes
from sgmim_fast.data.members import Encoded, Pairs
from sgmim_fast.masking import STREAM_CROP, sample_rng

IN_WORK = 2
"""Batches that a pipeline works on at a time."""

T = TypeVar("T")
R = TypeVar("R")


class Ready(NamedTuple):
    """A pair that has been read and whose headers are in order."""

    sample: int
    image: Encoded
    structure: Encoded | None
    augmentation: augment.Augmentation
    values: np.ndarray | None
    """The crop of a map that is an array, (h, w, C) float32."""
    divisor: float
    """What DALI multiplies the map's values with."""


class Preparation:
    """Reads pairs, looks at their headers and draws their crops; any thread may call it."""

    def __init__(self, pairs: Pairs, config: PretrainConfig) -> None:
        self.pairs, self.config = pairs, config
        self.channels = config.model.structure_channels
        self.kind: MapKind = "none" if config.model.guidance == "none" else first_kind(pairs, self.channels)

    def __call__(self, epoch: int, index: int) -> Ready:
        image_member, structure_member = self.pairs.members(index)
        image = image_member.read()
        size = reading.image_size(image)
        structure = values = None
        divisor = 1.0
        rng = sample_rng(self.config.train.seed, epoch, index, STREAM_CROP)
        augmentation = augment.draw_augmentation(rng, *size, self.config.data)
        if self.kind != "none":
            assert structure_member is not None, "a data set has all maps or none"
            structure = structure_member.read()
            check_kind(structure, self.kind)
            if self.kind == "arrays":
                whole = reading.read_structure(structure, self.channels)
                check_sizes(image, structure, size, whole.shape[1:])
                values = np.ascontiguousarray(augment.crop(whole.transpose(1, 2, 0), augmentation))
            else:
                header = reading.read_header(structure, self.channels)
                check_sizes(image, structure, size, (header.height, header.width))
                divisor = STRETCH if header.value_type == np.uint8 else 1.0
        return Ready(index, image, structure, augmentation, values, divisor)


class Helpers:
    """Threads that read files and finish crops."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # The number of PyTorch's own threads is set for each thread: these are many enough.
        self._pool = ThreadPoolExecutor(threads, "sgmim-data", lambda: torch.set_num_threads(1))

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``function`` of each, in order; a piece of the work for each thread."""
        share = -(-len(items) // self.threads)
        pieces = [items[i : i + share] for i in range(0, len(items), share)]
        return list(chain.from_iterable(self._pool.map(lambda piece: [function(item) for item in piece], pieces)))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Graph:
    """DALI's pipeline for batches of prepared pairs.

    On a GPU it does everything. On the CPU it decodes, and threads resize with the functions of the torch loader: that
    takes less time than DALI's antialiased resizing there, and both loaders give the same bits.

    Args:
        device_id: GPU that decodes and resizes; None for the CPU.
        whole: DALI resizes on the CPU, too.
        pin_memory: tensors on the CPU are page-locked.
    """

    def __init__(
        self,
        config: PretrainConfig,
        kind: MapKind,
        helpers: Helpers,
        *,
        device_id: int | None,
        whole: bool,
        pin_memory: bool,
    ) -> None:
        self.size, self.channels, self.kind = config.model.hw, config.model.structure_channels, kind
        self.helpers, self.device_id, self.whole, self.pin_memory = helpers, device_id, whole, pin_memory
        self._pipeline = training_pipeline(
            batch_size=config.train.batch_size,
            threads=helpers.threads,
            device_id=device_id,
            size=self.size if whole else None,
            channels=self.channels,
            kind=kind,
            depth=IN_WORK,
        )
        self._started = False

    def start(self, batches: Iterable[Sequence[Ready]]) -> None:
        """The first run, which takes as many batches as are in work at a time."""
        for batch in batches:
            self._feed(batch)
        self._pipeline.schedule_run()
        self._started = True

    def schedule(self, batch: Sequence[Ready]) -> None:
        """One more batch."""
        self._feed(batch)
        self._pipeline.schedule_run()

    def _feed(self, batch: Sequence[Ready]) -> None:
        def feed(name: str, values: Iterable[Any], value_type: type) -> None:
            self._pipeline.feed_input(name, [np.asarray(value, value_type) for value in values])

        feed("image", (np.frombuffer(one.image.data, np.uint8) for one in batch), np.uint8)
        feed("start", ((one.augmentation.top, one.augmentation.left) for one in batch), np.int32)
        feed("shape", ((one.augmentation.height, one.augmentation.width) for one in batch), np.int32)
        if self.kind in ("integers", "floats"):
            files = (one.structure for one in batch)
            feed("structure", (np.frombuffer(file.data, np.uint8) for file in files if file is not None), np.uint8)
        if self.whole:
            feed("mirror", (one.augmentation.flip for one in batch), np.int32)
            if self.kind == "arrays":
                feed("structure", (one.values for one in batch), np.float32)
            if self.kind == "integers":
                feed("divisor", (one.divisor for one in batch), np.float32)

    def take(self, batch: Sequence[Ready]) -> list[torch.Tensor]:
        """Image and structure of the oldest batch.

        Raises:
            RuntimeError: if any of its files could not be decoded; the graph is then of no more use.
        """
        outputs = self._pipeline.share_outputs()
        try:
            if not self.whole:
                return self._finish(batch, outputs)
            if self.device_id is None:
                return [self._empty(len(batch), output[0].shape()[0]).copy_(batch_tensor(output)) for output in outputs]
            with torch.cuda.stream(torch.cuda.Stream(self.device_id)):
                tensors = [batch_tensor(output).clone() for output in outputs]
                torch.cuda.current_stream().synchronize()
            return tensors
        finally:
            self._pipeline.release_outputs()

    def _finish(self, batch: Sequence[Ready], outputs: Sequence[Any]) -> list[torch.Tensor]:
        image = self._empty(len(batch), 3)
        structure = None if self.kind == "none" else self._empty(len(batch), self.channels)

        def finish(i: int) -> None:
            one, flip = batch[i], batch[i].augmentation.flip
            image[i] = augment.finish_image(torch.from_dlpack(outputs[0][i]), flip, self.size)
            if structure is not None:
                stored = np.asarray(outputs[1][i]) if one.values is None else one.values
                values = torch.from_numpy(np.ascontiguousarray(stored.transpose(2, 0, 1), np.float32) / one.divisor)
                structure[i] = augment.finish_structure(values, flip, self.size)

        self.helpers.map(finish, range(len(batch)))
        return [image] if structure is None else [image, structure]

    def _empty(self, count: int, channels: int) -> torch.Tensor:
        return torch.empty(count, channels, *self.size, pin_memory=self.pin_memory)


def batch_tensor(output: Any) -> torch.Tensor:
    """A tensor on the memory of an output whose samples are of one shape."""
    return torch.from_dlpack(output.as_tensor())
