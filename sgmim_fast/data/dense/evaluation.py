"""Whole images, one at a time: to evaluate on, with their targets, or to predict from."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sgmim_fast.data.augment import normalize_image
from sgmim_fast.data.dense.crops import as_tensor
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.data.reading import read_image

_THREADS = 2
_AHEAD = 4  # samples that are decoded before they are asked for


class Picture(NamedTuple):
    """A lone image."""

    image: torch.Tensor
    """(3, H, W) float32, normalised."""
    name: str
    """The file's name without suffix."""
    original_size: tuple[int, int]
    """(height, width) of the file."""


@dataclass(frozen=True, eq=False)
class EvaluationSample:
    """A whole image and its target, neither resized nor mirrored."""

    image: torch.Tensor
    """(3, H, W) float32, normalised."""
    target: torch.Tensor
    """(H, W): float32 metres with 0 where invalid, or int64 labels with 255 where ignored."""
    name: str
    """See ``DenseSamples.name``."""
    original_size: tuple[int, int]
    """(height, width) of the files; KITTI's benchmark crop makes H and W less."""
    index: int
    """Dataset index."""


def evaluation_samples(samples: DenseSamples, indices: Iterable[int]) -> Iterator[EvaluationSample]:
    """The samples of these indices in their order, decoded by threads a little ahead of the reader.

    Raises:
        UserError: with the sample, if a file is bad: an evaluation leaves nothing out.
    """

    def make(index: int) -> EvaluationSample:
        pixels, target, size = samples.decode(index)
        values = as_tensor(target)
        if values.dtype == torch.uint8:
            values = values.long()
        return EvaluationSample(_normalized(pixels), values, samples.name(index), size, index)

    waiting: deque[Future[EvaluationSample]] = deque()
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="evaluation-samples")
    try:
        for index in indices:
            waiting.append(threads.submit(make, index))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """A lone image file, as training sees images: RGB, as stored, normalised.

    Raises:
        UserError: if it is missing or no image; it names the file.
    """
    pixels = np.asarray(read_image(path))
    return Picture(_normalized(pixels), Path(path).stem, (pixels.shape[0], pixels.shape[1]))


def _normalized(pixels: np.ndarray) -> torch.Tensor:
    return normalize_image(as_tensor(pixels).permute(2, 0, 1))
