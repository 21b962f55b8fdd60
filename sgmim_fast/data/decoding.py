"""Whole pairs as a loader decodes them, and what makes a pair unfit for training."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from sgmim_fast.data import reading
from sgmim_fast.data.members import Encoded
from sgmim_fast.errors import UserError

EncodedPair = tuple[Encoded, Encoded | None]


class DecodedPair(NamedTuple):
    """Values as stored: not cropped, resized, turned or normalised."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    structure: np.ndarray | None
    """(C, H, W) float32."""


class Decoder(Protocol):
    """Decodes pairs; a bad one is a value, so that it spoils no other."""

    def decode(self, pairs: Sequence[EncodedPair]) -> list[DecodedPair | UserError]:
        """One result a pair, in their order; the error names the file."""


class PillowDecoder:
    """What the torch loader decodes with.

    Args:
        channels: of the structure maps.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def decode(self, pairs: Sequence[EncodedPair]) -> list[DecodedPair | UserError]:
        """One result a pair."""
        return [self._decode(pair) for pair in pairs]

    def _decode(self, pair: EncodedPair) -> DecodedPair | UserError:
        image, structure = pair
        try:
            pixels = np.asarray(reading.read_image(image))
            if structure is None:
                return DecodedPair(pixels, None)
            values = reading.read_structure(structure, self.channels)
            check_sizes(image, structure, pixels.shape[:2], values.shape[1:])
            return DecodedPair(pixels, values)
        except UserError as error:
            return error


def check_sizes(image: Encoded, structure: Encoded, image_size: Sequence[int], structure_size: Sequence[int]) -> None:
    """Refuse a pair whose image and map are not of one (height, width)."""
    if tuple(image_size) == tuple(structure_size):
        return
    turned = tuple(image_size) == tuple(structure_size)[::-1] and reading.exif_orientation(image) >= 5
    cause = "the image's EXIF orientation was applied to the map only" if turned else "they do not show the same pixels"
    raise UserError(
        f"{image.name} is {image_size[1]}x{image_size[0]} pixels (width x height) but its map {structure.name} is "
        f"{structure_size[1]}x{structure_size[0]}: {cause}; make the map from the image as stored, at its size"
    )
