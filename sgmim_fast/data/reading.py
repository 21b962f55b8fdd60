"""Decoders of one image and of one structure map.

Pillow decodes everything but .npy. It quietly reduces some files to 8 bits or turns them; where that
would change a map's values or its alignment, the file is refused instead.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from sgmim_fast.data.members import Encoded, Member
from sgmim_fast.errors import UserError

# Only these decoders are tried: Pillow's others are not for photographs, and one starts an outside program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF", "JPEG2000")
# What Pillow raises on damaged files of these formats, seen when bytes were changed at random, or documented.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 274  # tag of EXIF and TIFF; 1 is upright
_BITS_PER_SAMPLE = 258
_WHITE_IS_ZERO = 0
_MANY_CHANNELS_8BIT = ("LA", "RGB", "RGBA")
_MAP_MODES = ("L", "I", "F", "I;16", "I;16L", "I;16B", *_MANY_CHANNELS_8BIT)
_CODESTREAM_START = b"\xff\x4f\xff\x51"  # JPEG 2000: the markers SOC and SIZ
_COMPONENT_BITS = 42  # bytes from there to the first component's bit depth

Source = str | os.PathLike[str] | Encoded
"""A file, by its path or by its content."""


def read_image(source: Source) -> Image.Image:
    """An image as 8-bit RGB, decoded, as stored: EXIF orientation is not applied, as maps have none.

    Grey, palette and CMYK images are converted, 16-bit grey keeps its upper 8 bits, alpha is dropped.

    Raises:
        UserError: if the file is missing, truncated, no image, or a TIFF to be turned; it names the file.
    """
    file = _encoded(source)
    with _opened(file) as image:
        _refuse_turned_tiff(file, image)
        image.load()
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise UserError(f"{file.name}: not a photograph (32-bit or float values); save it as 8-bit RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")


def read_structure(source: Source, channels: int) -> np.ndarray:
    """A structure map, (C, H, W) float32, with the values of the file.

    Formats: PNG and JPEG 2000 (8 or 16 bit; JPEG 2000 of 9 to 15 bits comes stretched to 16), TIFF (8,
    16 bit or float32), JPEG, and NPY of any real type shaped H x W, C x H x W or H x W x C (the first
    of these that fits). More than one channel needs 8 bits or NPY.

    Raises:
        UserError: if the file is unreadable, has another number of channels, would lose precision, or
            holds values that are not finite; it names the file.
    """
    file = _encoded(source)
    values = _channels_first(file, _load_npy(file), channels) if is_array(file.name) else _read_picture(file)
    _check_channels(file, values.shape[0], channels)
    floating = values.dtype.kind == "f"
    with np.errstate(over="ignore"):  # what overflows is found below
        values = np.require(values, np.float32, ["C", "W"])
    if floating and not np.isfinite(values).all():
        bad = np.count_nonzero(~np.isfinite(values))
        raise UserError(
            f"{file.name}: {bad} of {values.size} values are not finite in float32; fill the holes of the map first"
        )
    return values


def read_grey(source: Source) -> np.ndarray:
    """A map of one channel as stored, (H, W): uint8, uint16, int32, float32 or an array's own type, finite or not.

    Raises:
        UserError: if the file is unreadable, has several channels, or would lose precision; it names the file.
    """
    file = _encoded(source)
    values = _channels_first(file, _load_npy(file), 1) if is_array(file.name) else _read_picture(file)
    if len(values) != 1:
        raise UserError(f"{file.name}: has {len(values)} channels, but a map of one was expected; save it as grey PNG")
    return values[0]


def read_labels(source: Source) -> np.ndarray:
    """A map of class indices as stored, (H, W) uint8; of a palette picture the indices, whatever their colours.

    Raises:
        UserError: if the file is unreadable, or holds anything but one index of 8 bits a pixel; it names the file.
    """
    file = _encoded(source)
    with _opened(file) as image:
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise UserError(
                f"{file.name}: holds colours ({image.mode}) where class indices are expected; save one index a pixel "
                "as 8-bit grey PNG"
            )
        raw = str(image.tile[0].args) if image.tile else ""
        # Pillow stretches grey of 2 and 4 bits to 0..255; the indices of a palette it leaves alone.
        if image.mode not in ("L", "P") or "L;2" in raw or "L;4" in raw or image.format == "JPEG":
            raise UserError(
                f"{file.name}: label maps must be 8-bit grey or palette pictures, and not JPEG; save it as PNG"
            )
        _refuse_turned_tiff(file, image)
        return np.array(image)


def image_size(source: Source, channels: int = 1) -> tuple[int, int]:
    """(height, width) in pixels of an image or a map, from its header; a TIFF to be turned is refused.

    Args:
        channels: of the map; tells which axes of a three-dimensional NPY are the sides.
    """
    file = _encoded(source)
    if is_array(file.name):
        height, width = _channels_first(file, _load_npy(file), channels).shape[1:]
        return height, width
    with _opened(file) as image:
        _refuse_turned_tiff(file, image)
        return image.height, image.width


def exif_orientation(source: Source) -> int:
    """The EXIF orientation of an image, 1 (upright) where it says nothing."""
    with _opened(_encoded(source)) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


class Header(NamedTuple):
    """What a map's header says."""

    height: int
    width: int
    channels: int
    value_type: np.dtype
    """Of the stored values: uint8 and uint16 for pictures of so many bits, float32, an array's own."""


def read_header(source: Source, channels: int) -> Header:
    """The header of a structure map, with every check of ``read_structure`` that needs no pixels.

    Args:
        channels: tells which axes of a three-dimensional NPY are the sides.

    Raises:
        UserError: as ``read_structure``.
    """
    file = _encoded(source)
    if is_array(file.name):
        values = _channels_first(file, _load_npy(file), channels)
        return Header(values.shape[1], values.shape[2], values.shape[0], values.dtype)
    with _opened(file) as image:
        _refuse_odd_map(file, image)
        header = Header(image.height, image.width, len(image.getbands()), _value_type(file, image))
    _check_channels(file, header.channels, channels)
    return header


def value_type(source: Source) -> np.dtype:
    """The type of a map's stored values: uint8 and uint16 for pictures of so many bits, float32, an array's own."""
    file = _encoded(source)
    if is_array(file.name):
        return _load_npy(file).dtype
    with _opened(file) as image:
        return _value_type(file, image)


def _value_type(file: Encoded, image: ImageFile.ImageFile) -> np.dtype:
    if image.mode == "F":
        return np.dtype(np.float32)
    if image.format == "JPEG2000":
        return np.dtype(np.uint16 if _jpeg2000_bits(file) > 8 else np.uint8)
    return np.dtype(np.uint16 if image.mode.startswith("I") else np.uint8)


def _encoded(source: Source) -> Encoded:
    return source if isinstance(source, Encoded) else Member(os.fspath(source)).read()


@contextmanager
def _opened(file: Encoded) -> Iterator[ImageFile.ImageFile]:
    try:
        with Image.open(io.BytesIO(file.data), formats=_FORMATS) as image:
            yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise _unreadable(file, "no picture of a known format, or cut short") from error
    except _DAMAGE as error:
        raise _unreadable(file, str(error) or type(error).__name__) from error


def _unreadable(file: Encoded, reason: str) -> UserError:
    return UserError(f"{file.name}: cannot be read ({' '.join(reason.split())}); replace it, or remove the pair")


def _refuse_turned_tiff(file: Encoded, image: Image.Image) -> None:
    # Pillow turns TIFFs while loading, unlike every other format.
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION, 1) != 1:
        raise UserError(f"{file.name}: the TIFF's orientation tag turns it; save it upright without the tag")


def _read_picture(file: Encoded) -> np.ndarray:
    """(C, H, W), uint8, uint16, int32 or float32."""
    with _opened(file) as image:
        _refuse_odd_map(file, image)
        values = np.asarray(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _check_channels(file: Encoded, found: int, channels: int) -> None:
    if found != channels:
        raise UserError(
            f"{file.name}: the map has {found} channel(s), not the {channels} of --model.structure-channels; "
            "set that option, or save the maps with that many"
        )


def _refuse_odd_map(file: Encoded, image: ImageFile.ImageFile) -> None:
    if image.mode not in _MAP_MODES:
        raise UserError(f"{file.name}: a map cannot be of the kind {image.mode!r}; save it as grey PNG, TIFF or NPY")
    if getattr(image, "n_frames", 1) != 1:
        raise UserError(f"{file.name}: holds {getattr(image, 'n_frames', 1)} pictures; a map must hold one")
    _refuse_turned_tiff(file, image)
    _refuse_changed_values(file, image)


def _refuse_changed_values(file: Encoded, image: ImageFile.ImageFile) -> None:
    """Pillow has no 16-bit RGB and no unsigned 32-bit mode, and inverts only some white-is-zero TIFFs."""
    bits = 8
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
            raise UserError(f"{file.name}: the TIFF counts white as zero; save it with black as zero")
        if image.mode == "I" and bits > 16:
            raise UserError(
                f"{file.name}: {bits}-bit integers do not fit float32; save the map as float32 TIFF or 16-bit PNG"
            )
    elif image.format == "JPEG2000":
        bits = _jpeg2000_bits(file)
        if bits > 16:
            raise UserError(f"{file.name}: {bits}-bit JPEG 2000 is read with at most 16 bits; save the map as 16 bit")
    elif image.tile and ";16" in str(image.tile[0].args):
        bits = 16
    if bits > 8 and image.mode in _MANY_CHANNELS_8BIT:
        raise UserError(
            f"{file.name}: several channels of {bits} bits cannot be read without loss; save the map as .npy instead"
        )


def _jpeg2000_bits(file: Encoded) -> int:
    head = file.data[: 1 << 16]
    start = head.find(_CODESTREAM_START)
    if start < 0 or len(head) <= start + _COMPONENT_BITS:
        raise _unreadable(file, "no JPEG 2000 header in its first 64 KiB")
    return (head[start + _COMPONENT_BITS] & 0x7F) + 1


def is_array(name: str) -> bool:
    """Whether a file of this name holds a NumPy array and no picture."""
    return name.lower().endswith(".npy")


def _load_npy(file: Encoded) -> np.ndarray:
    try:
        values: np.ndarray = np.lib.format.read_array(io.BytesIO(file.data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(file, str(error)) from error
    if values.dtype.kind not in "iuf":
        raise UserError(f"{file.name}: holds no plain array of real numbers; save the map as float32 or integers")
    return values


def _channels_first(file: Encoded, values: np.ndarray, channels: int) -> np.ndarray:
    if values.ndim == 2:
        return values[None]
    if values.ndim == 3 and values.shape[0] == channels:
        return values
    if values.ndim == 3 and values.shape[2] == channels:
        return values.transpose(2, 0, 1)
    raise UserError(
        f"{file.name}: an array of shape {values.shape} is no map of {channels} channel(s); "
        "save it as H x W, C x H x W or H x W x C"
    )
