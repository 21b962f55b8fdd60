"""What ``sgmim shard`` does to one pair: nothing, or smaller pictures and formats that decode faster."""

import io
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from sgmim_fast.data import reading
from sgmim_fast.data.decoding import check_sizes
from sgmim_fast.data.manifest import IMAGE_SUFFIXES, STRUCTURE_SUFFIXES
from sgmim_fast.data.members import Encoded
from sgmim_fast.errors import UserError

MAPS = ("keep", "png", "npy", "none")
_QUALITY = 95  # of images that are made smaller
_FAST = 1  # zlib's level: larger files than the default, written several times as fast
_SAME = {".jpeg": ".jpg", ".tiff": ".tif"}  # one spelling each, as readers of shards ask for members by suffix
_PNG_CHANNELS = {np.dtype(np.uint8): (1, 2, 3, 4), np.dtype(np.uint16): (1,), np.dtype(np.float32): ()}

Content = list[tuple[str, bytes]]
"""Suffix (with its dot) and bytes of the image and, if there is one, of the map."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How to pack. Without the options that re-encode, every file is copied bit for bit."""

    shard_size: int = 256
    """About how many megabytes (10^6 bytes) a shard has."""
    pairs_per_shard: int | None = None
    """A number of pairs instead."""
    shuffle: bool = True
    """Put the pairs in random order: in folders sorted by class, neighbours resemble each other."""
    seed: int = 0
    """Of that order."""
    short_side: int | None = None
    """Make pairs smaller whose short side is longer than this, in pixels; others keep their size."""
    jpeg_quality: int | None = None
    """Re-encode all images as JPEG of this quality, colours at half the resolution (4:2:0)."""
    maps: str = "keep"
    """keep; png or npy: re-encode them, all values as they were; none: leave them out."""
    structure_channels: int = 1
    """Of the maps; needed where they are re-encoded."""

    def __post_init__(self) -> None:
        for option, least in (("shard_size", 1), ("pairs_per_shard", 1), ("short_side", 1), ("structure_channels", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise UserError(f"--{option.replace('_', '-')} {value} must be {least} or more")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} must be 0 or more")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"--jpeg-quality {self.jpeg_quality} must be from 1 to 100")
        if self.maps not in MAPS:
            raise UserError(f"--maps {self.maps!r} is unknown; choose one of {', '.join(MAPS)}")

    def content(self) -> dict[str, Any]:
        """The options that the shards' bytes depend on."""
        options = asdict(self)
        del options["shard_size" if self.pairs_per_shard else "pairs_per_shard"]
        return options


VERBATIM = Packing()
"""Every file is copied bit for bit."""


def encode_pair(image: Encoded, structure: Encoded | None, packing: Packing) -> Content:
    """The members of a pair as the options want them.

    Raises:
        UserError: if a file is unreadable, of unknown format, or (where anything is re-encoded) the sizes differ.
    """
    target = None
    remake_map = structure is not None and packing.maps in ("png", "npy")
    if remake_map or packing.short_side or packing.jpeg_quality:
        height, width = reading.image_size(image)
        if structure is not None:
            check_sizes(image, structure, (height, width), reading.image_size(structure, packing.structure_channels))
        target = _smaller(height, width, packing.short_side)
    if target or packing.jpeg_quality:
        content = [(".jpg", _jpeg(image, target, packing.jpeg_quality or _QUALITY))]
    else:
        content = [(_suffix(image, IMAGE_SUFFIXES), image.data)]
    if structure is not None:
        if target or remake_map:
            content.append(_map(structure, target, packing))
        else:
            content.append((_suffix(structure, STRUCTURE_SUFFIXES), structure.data))
    return content


def _suffix(file: Encoded, known: frozenset[str]) -> str:
    suffix = os.path.splitext(file.name)[1].lower()
    if suffix not in known:
        raise UserError(f"{file.name}: its suffix is none of {', '.join(sorted(known))}; rename it")
    return _SAME.get(suffix, suffix)


def _smaller(height: int, width: int, short_side: int | None) -> tuple[int, int] | None:
    """(height, width) with the short side as asked for; None where the picture is not larger than that."""
    short = min(height, width)
    if short_side is None or short <= short_side:
        return None
    return round(height * short_side / short), round(width * short_side / short)


def _jpeg(file: Encoded, target: tuple[int, int] | None, quality: int) -> bytes:
    """As stored: EXIF orientation is neither applied nor kept, as loaders ignore it and the map has none."""
    image = reading.read_image(file)
    if target:
        image = image.resize((target[1], target[0]), Image.Resampling.BICUBIC)  # Pillow antialiases
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", comment=b"")
    return buffer.getvalue()


def _map(file: Encoded, target: tuple[int, int] | None, packing: Packing) -> tuple[str, bytes]:
    values = reading.read_structure(file, packing.structure_channels)
    values = values.astype(_exact_type(reading.value_type(file), values))
    channels, height, width = values.shape
    if target:
        # The stored value nearest to each new pixel's centre: averages would be depths that nothing has.
        rows = ((np.arange(target[0]) + 0.5) * height / target[0]).astype(np.int64)
        columns = ((np.arange(target[1]) + 0.5) * width / target[1]).astype(np.int64)
        values = values[:, rows[:, None], columns]
    fits_png = channels in _PNG_CHANNELS[values.dtype]
    if packing.maps == "png" and not fits_png:
        raise UserError(
            f"{file.name}: a map of {channels} channel(s) of {values.dtype} is no PNG without loss; use --maps npy"
        )
    buffer = io.BytesIO()
    if packing.maps == "npy" or not fits_png:
        array = np.ascontiguousarray(values[0] if channels == 1 else values)
        np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
        return ".npy", buffer.getvalue()
    picture = Image.fromarray(np.ascontiguousarray(values[0] if channels == 1 else values.transpose(1, 2, 0)))
    picture.save(buffer, "PNG", compress_level=_FAST)
    return ".png", buffer.getvalue()


def _exact_type(stored: np.dtype, values: np.ndarray) -> np.dtype:
    """uint8 or uint16 where the file has no more bits than that, so that a set's maps stay alike; else float32."""
    if stored.kind in "iu" and stored.itemsize <= 2 and values.min() >= 0:
        return np.dtype(np.uint8 if stored.itemsize == 1 else np.uint16)
    return np.dtype(np.float32)
