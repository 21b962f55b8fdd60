"""A split of a dense data set: which files it has, and how one image and its target are decoded."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from sgmim_fast.data import reading
from sgmim_fast.data.decoding import check_sizes
from sgmim_fast.data.members import Encoded, Member
from sgmim_fast.data.pair_list import PairList
from sgmim_fast.errors import UserError

BENCHMARK_CROP = (352, 1216)
"""(height, width) that KITTI's benchmark cuts from the bottom centre of its images, which differ in size."""
_LOOKED_AT = 8
"""Samples that are decoded when a split is opened."""


class TargetReader(Protocol):
    """Decodes the targets of one data set; picklable."""

    key: str
    """What a batch calls these targets."""

    def read(self, file: Encoded) -> np.ndarray:
        """(H, W) float32 metres with 0 where invalid, or uint8 class indices."""


class Decoded(NamedTuple):
    """An image and its target, pixel on pixel."""

    pixels: np.ndarray
    """(H, W, 3) uint8, RGB."""
    target: np.ndarray
    """(H, W) float32 or uint8, see ``TargetReader``."""
    original_size: tuple[int, int]
    """(height, width) of the files, before KITTI's crop."""


class DenseDecoder(NamedTuple):
    """Decodes samples; travels to worker processes."""

    reader: TargetReader
    benchmark_crop: bool

    def decode(self, image: Member, target: Member) -> Decoded:
        """One sample, with KITTI's crop where the data set has it.

        Raises:
            UserError: if a file is bad or the two are not of one size; it names the file.
        """
        image_file, target_file = image.read(), target.read()
        pixels = np.asarray(reading.read_image(image_file))
        values = self.reader.read(target_file)
        size = (pixels.shape[0], pixels.shape[1])
        check_sizes(image_file, target_file, size, values.shape)
        if self.benchmark_crop:
            rows, columns = benchmark_box(image.name, size)
            pixels, values = pixels[rows, columns], values[rows, columns]
        return Decoded(pixels, values, size)


def benchmark_box(name: str, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of KITTI's benchmark crop.

    Raises:
        UserError: if the image is smaller than the crop.
    """
    height, width = BENCHMARK_CROP
    if size[0] < height or size[1] < width:
        raise UserError(
            f"{name} is {size[1]}x{size[0]} pixels (width x height), smaller than KITTI's benchmark crop of "
            f"{width}x{height}; use the images at their original size"
        )
    top, left = size[0] - height, (size[1] - width) // 2
    return slice(top, top + height), slice(left, left + width)


class DenseSamples:
    """The samples of one split; a sample's dataset index is its position here.

    Args:
        root: folder that the paths start from.
        pairs: image and target of each sample, relative to the root or absolute.
        decoder: of these samples.
        summary: what the split is, for people.
        class_names: of label maps, where the data set names its classes.
        max_depth: largest depth of the task in metres, of depth maps.
        fit: (long, short) side that whole images are fitted into before anything is predicted; None leaves their size.
    """

    def __init__(
        self,
        root: Path,
        pairs: PairList,
        decoder: DenseDecoder,
        *,
        summary: str,
        class_names: Sequence[str] | None = None,
        max_depth: float | None = None,
        fit: tuple[int, int] | None = None,
    ) -> None:
        self.root, self.pairs, self.decoder, self._summary = root, pairs, decoder, summary
        self.max_depth, self.fit = max_depth, fit
        self.class_names = None if class_names is None else tuple(class_names)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sha256(self) -> str:
        """Fingerprint of the list: the same after the whole folder moved."""
        return self.pairs.sha256

    @property
    def shard_sizes(self) -> None:
        """Every sample is two files of its own."""

    def members(self, index: int) -> tuple[Member, Member]:
        """The image and the target of one sample."""
        image, target = self.pairs[index]
        assert target is not None, "every sample has a target"
        return Member(os.path.join(self.root, image)), Member(os.path.join(self.root, target))

    def name(self, index: int) -> str:
        """What one sample is called: the image's path relative to the root, without suffix."""
        return os.path.splitext(self.pairs[index][0])[0].lstrip("/")

    def describe(self) -> str:
        """One line for people."""
        return self._summary

    def decode(self, index: int) -> Decoded:
        """One sample, decoded."""
        return self.decoder.decode(*self.members(index))

    def look(self) -> list[Decoded]:
        """A few samples from all over the split, decoded; single bad ones are left to whoever reads the split.

        Raises:
            UserError: if half of them or more are bad: then the data set is, and not a file.
        """
        count = min(_LOOKED_AT, len(self))
        good: list[Decoded] = []
        errors: list[UserError] = []
        for index in np.linspace(0, len(self) - 1, count).round().astype(int).tolist():
            try:
                good.append(self.decode(index))
            except UserError as error:
                errors.append(error)
        if len(errors) * 2 >= count:
            raise errors[0]
        return good
