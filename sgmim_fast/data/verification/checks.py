"""What makes a pair fit for training: the checks of one process of ``sgmim verify``."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from sgmim_fast.data import reading
from sgmim_fast.data.decoding import DecodedPair, Decoder, EncodedPair, PillowDecoder, check_sizes
from sgmim_fast.data.members import Encoded, Member
from sgmim_fast.errors import UserError, first_line

Item = tuple[int, str, str | None]
"""One pair to check: its place in the listing, the paths of image and map."""

Stamp = tuple[int, int, int, int]
"""Bytes and modification time (ns) of the image, then of the map; -1 where there is no file."""

MakeDecoder = Callable[[str, int], Decoder]
"""Of (loader, channels)."""

_ORIENTATION = 274
_UPRIGHT = 1
_DIGEST_BYTES = 16
_PROBE = 16  # every so manyth value tells most maps from constant ones
# A decoder's message -> the kind of reason it is counted under; the first that fits.
_KINDS = (
    ("does not exist", "missing"),
    ("channel(s)", "channels"),
    ("not finite", "not finite"),
    ("but its map", "sizes differ"),
    ("cannot be read", "unreadable"),
)


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What the result of a check depends on."""

    structure: bool
    """Whether pairs need maps."""
    channels: int
    """Of the maps."""
    loader: str
    decoder: str
    """Library that decodes, with its version."""
    min_side: int
    """Pixels that an image must have a side."""


class Checked(NamedTuple):
    """What was found out about one pair; plain values, as it travels and is kept as JSON."""

    stamp: Stamp
    """Of the files, before they were read."""
    kind: str = ""
    """Why it is bad, in a word or two; empty for a good pair."""
    reason: str = ""
    """Why it is bad, in full."""
    height: int = 0
    width: int = 0
    digest: str = ""
    """Of the image file's bytes, hexadecimal."""
    value_type: str = ""
    """Of the map: uint8, uint16, float, ...; empty without a map."""
    remarks: tuple[str, ...] = ()
    """What is worth counting, yet no reason against the pair."""

    @classmethod
    def parse(cls, values: Sequence[Any]) -> "Checked":
        """From the lists that JSON makes of it."""
        stamp, kind, reason, height, width, digest, value_type, remarks = values
        first, second, third, fourth = map(int, stamp)
        found = (str(kind), str(reason), int(height), int(width), str(digest), str(value_type), tuple(remarks))
        return cls((first, second, third, fourth), *found)


def create_decoder(loader: str, channels: int) -> Decoder:
    """The decoder that training with ``--data.loader`` uses."""
    if loader == "torch":
        return PillowDecoder(channels)
    if loader == "dali":
        from sgmim_fast.data.dali_decoding import DaliDecoder

        return DaliDecoder(channels)
    raise UserError(f"--loader {loader} is unknown; use torch or dali")


def decoder_version(loader: str) -> str:
    """Name and version of the library that decodes."""
    if loader != "dali":
        return f"Pillow {PIL.__version__}"
    from sgmim_fast.data.dali_decoding import import_dali

    import_dali()  # says what is wrong
    from nvidia import dali

    return f"DALI {dali.__version__}"


def stamp_of(image: str, structure: str | None) -> Stamp:
    """Sizes and times by which a changed file is noticed."""
    return (*_status(image), *(_status(structure) if structure is not None else (-1, -1)))


def _status(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


class _ReadPair(NamedTuple):
    files: EncodedPair
    value_type: str


class PairChecker:
    """Checks pairs with the decoder of a loader.

    Args:
        make_decoder: of (loader, channels); called at once, and again for each further type of maps.
    """

    def __init__(self, settings: CheckSettings, make_decoder: MakeDecoder) -> None:
        self.settings = settings
        self._make_decoder = make_decoder
        self._spare: Decoder | None = make_decoder(settings.loader, settings.channels)
        self._decoders: dict[str, Decoder] = {}
        self._last: object = None

    def check(self, items: Sequence[Item]) -> list[Checked]:
        """One result a pair, in their order."""
        batch = 1 if self.settings.loader == "torch" else len(items)  # Pillow gains nothing from more
        return [
            checked
            for begin in range(0, len(items), batch)
            for checked in self._check_batch(items[begin : begin + batch])
        ]

    def _check_batch(self, items: Sequence[Item]) -> list[Checked]:
        stamps = [stamp_of(image, structure) for _, image, structure in items]
        read = [self._read(image, structure) for _, image, structure in items]
        decoded = self._decode([pair for pair in read if not isinstance(pair, UserError)])
        # Kept until the next pixels are there: memory freed all at once would go back to the system each time.
        self._last = decoded
        outcomes = iter(decoded)
        found = []
        for stamp, pair in zip(stamps, read, strict=True):
            if isinstance(pair, UserError):
                found.append(Checked(stamp, *_reason(pair)))
            elif isinstance(outcome := next(outcomes), UserError):
                found.append(Checked(stamp, *_reason(outcome)))
            else:
                found.append(self._judge(stamp, pair, outcome))
        return found

    def _read(self, image: str, structure: str | None) -> _ReadPair | UserError:
        if structure is None and self.settings.structure:
            return UserError(f"{image}: its map does not exist; add the map, or remove the image")
        try:
            files = Member(image).read(), None if structure is None else Member(structure).read()
            return _ReadPair(files, "" if files[1] is None else self._value_type(files[1]))
        except UserError as error:
            return error

    def _value_type(self, structure: Encoded) -> str:
        """Maps of one type mean the same by the same number; floats do so whatever their precision."""
        is_array = reading.is_array(structure.name)
        dtype = _array_type(structure) if is_array else reading.value_type(structure)
        name = "float" if dtype.kind == "f" else dtype.name
        return f"{name} array" if is_array and self.settings.loader == "dali" else name  # its graph takes one kind

    def _decode(self, pairs: list[_ReadPair]) -> list[DecodedPair | UserError]:
        """Each type of maps by a decoder of its own: DALI's takes one kind, and the other may be the common one."""
        outcomes: dict[int, DecodedPair | UserError] = {}
        for value_type in dict.fromkeys(pair.value_type for pair in pairs):
            if value_type not in self._decoders:
                settings = self.settings
                self._decoders[value_type] = self._spare or self._make_decoder(settings.loader, settings.channels)
                self._spare = None
            places = [place for place, pair in enumerate(pairs) if pair.value_type == value_type]
            answers = _decode_each(self._decoders[value_type], [pairs[place].files for place in places])
            outcomes.update(zip(places, answers, strict=True))
        return [outcomes[place] for place in range(len(pairs))]

    def _judge(self, stamp: Stamp, pair: _ReadPair, decoded: DecodedPair) -> Checked:
        image, structure = pair.files
        height, width = decoded.image.shape[:2]
        kind = reason = ""
        try:
            if structure is not None:
                assert decoded.structure is not None, "a decoder gives a map for a map"
                check_sizes(image, structure, (height, width), decoded.structure.shape[1:])
                _check_values(structure.name, decoded.structure, pair.value_type)
            if min(height, width) < self.settings.min_side:
                raise _BadPair(
                    "too small",
                    f"{image.name} is {width}x{height} pixels (width x height) but a side needs "
                    f"{self.settings.min_side} (--min-side); remove the pair",
                )
        except _BadPair as error:
            kind, reason = error.kind, str(error)
        except UserError as error:
            kind, reason = _reason(error)
        digest = hashlib.blake2b(image.data, digest_size=_DIGEST_BYTES).hexdigest()
        return Checked(stamp, kind, reason, height, width, digest, pair.value_type, _remarks(image))


def _decode_each(decoder: Decoder, pairs: list[EncodedPair]) -> list[DecodedPair | UserError]:
    try:
        return decoder.decode(pairs)
    except Exception as error:  # whatever a library raises on damaged data: it would stop a training run
        if len(pairs) == 1:
            return [UserError(f"{pairs[0][0].name}: cannot be read (the decoder fails: {first_line(error)})")]
        return [outcome for pair in pairs for outcome in _decode_each(decoder, [pair])]


class _BadPair(UserError):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _reason(error: UserError) -> tuple[str, str]:
    message = str(error)
    return next((kind for words, kind in _KINDS if words in message), "unsuitable"), message


def _array_type(file: Encoded) -> np.dtype:
    """Of an NPY file, from its header alone."""
    data = io.BytesIO(file.data)
    try:
        version = np.lib.format.read_magic(data)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(data)[2]
        return np.lib.format.read_array_header_2_0(data)[2]
    except (ValueError, EOFError) as error:
        raise UserError(f"{file.name}: cannot be read ({first_line(error)}); replace it, or remove the pair") from error


def _check_values(name: str, values: np.ndarray, value_type: str) -> None:
    if value_type.startswith("float") and not np.isfinite(values.sum(dtype=np.float64)):
        raise UserError(f"{name}: the map's values are not finite; fill its holes first")
    first = values.flat[0]
    if (values[..., ::_PROBE, ::_PROBE] == first).all() and (values == first).all():
        raise _BadPair("constant", f"{name}: all values are {first:g}, so it shows nothing; make the map again")


def _remarks(image: Encoded) -> tuple[str, ...]:
    """Colour and orientation, from the header."""
    try:
        with Image.open(io.BytesIO(image.data)) as picture:
            mode = picture.mode
            rotated = "exif" in picture.info and picture.getexif().get(_ORIENTATION, _UPRIGHT) not in (0, _UPRIGHT)
    except Exception:  # a picture that only the loader's own decoder knows, or damaged EXIF data: nothing to remark
        return ()
    colour = {"RGB": "", "L": "grey", "1": "grey", "LA": "grey", "CMYK": "CMYK"}.get(mode, "other colours")
    colour = "grey" if mode.startswith("I") else colour
    return (*((colour,) if colour else ()), *(("EXIF-rotated",) if rotated else ()))
