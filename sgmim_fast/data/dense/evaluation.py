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
from sgmim_fast.data.dense.crops import Crop, as_tensor, fitted_size, resized_pixels
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.data.reading import read_image

_THREADS = 2
_AHEAD = 4  # samples that are decoded before they are asked for


class Picture(NamedTuple):
    """A lone image."""

    image: torch.Tensor
    """(3, h, w) float32, normalised; resized if told to."""
    name: str
    """The file's name without suffix."""
    original_size: tuple[int, int]
    """(height, width) of the file."""
    pixels: np.ndarray
    """(height, width, 3) uint8, RGB, as stored."""


@dataclass(frozen=True, eq=False)
class EvaluationSample:
    """A whole image and its target."""

    image: torch.Tensor
    """(3, H, W) float32, normalised; resized where ``DenseSamples.fit`` says so."""
    target: torch.Tensor
    """(H, W), never resized: float32 metres with 0 where invalid, or int64 labels with 255 where ignored."""
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
        return EvaluationSample(_prepared(pixels, samples.fit), values, samples.name(index), size, index)

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


def read_picture(path: str | os.PathLike[str], *, fit: tuple[int, int] | None = None) -> Picture:
    """A lone image file, as evaluation sees images.

    Args:
        fit: (long, short) side to fit the image into, as ``SegmentationDataConfig.resize``; None leaves its size.

    Raises:
        UserError: if it is missing or no image; it names the file.
    """
    pixels = np.asarray(read_image(path))
    return Picture(_prepared(pixels, fit), Path(path).stem, (pixels.shape[0], pixels.shape[1]), pixels)


def _prepared(pixels: np.ndarray, fit: tuple[int, int] | None) -> torch.Tensor:
    if fit is not None:
        size = fitted_size(pixels.shape[0], pixels.shape[1], fit)
        pixels = resized_pixels(pixels, size, Crop(slice(0, size[0]), slice(0, size[1])))
    return normalize_image(as_tensor(pixels).permute(2, 0, 1))
