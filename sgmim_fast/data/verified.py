"""The two files that ``sgmim verify`` leaves: the manifest of the good pairs and the quarantine list.

The manifest is text: a header, ``#`` and one object of JSON; one line a good pair, in order,

    image<TAB>structure<TAB>bytes of the image<TAB>bytes of the map<TAB>height<TAB>width

and one line ``#<TAB>image<TAB>structure`` a quarantined pair, so that a change of the data set is noticed. In paths a
backslash, a tab, a line end, a leading ``#`` and bytes that are no UTF-8 are written ``\\xNN``.
"""

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from sgmim_fast.data.pair_list import Pair, PairList
from sgmim_fast.errors import UserError

FORMAT = 1
_MANIFEST, _QUARANTINE = "manifest.tsv", "quarantine.jsonl"
_MARK = b'# {"sgmim_manifest": '
_SPECIAL = re.compile("^#|[\\\\\t\n\r\udc80-\udcff]")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The header: what was verified, how, and with which result."""

    sgmim_manifest: int = FORMAT
    """Version of the format; the first key, as files are known by it."""
    sgmim_version: str
    sha256: str
    """Of the good pairs: what a run on them is identified by."""
    listing_sha256: str
    """Of all pairs that were found."""
    images_sha256: str
    """Of all images that were found."""
    structure: bool
    """Whether maps were verified too."""
    channels: int
    """Of the maps."""
    loader: str
    decoder: str
    """Library that decoded, with its version."""
    value_type: str
    """Of the good pairs' maps: uint8, uint16, float, ...; empty without maps."""
    good: int
    quarantined: dict[str, int] = field(default_factory=dict)
    """Pairs left out, by kind of reason."""


class VerifiedPairs(NamedTuple):
    """What a manifest holds."""

    header: Verification
    pairs: PairList
    """The good pairs."""
    sizes: np.ndarray
    """(pairs, 2) int64: bytes of image and map."""
    quarantined: PairList


def manifest_path(source: Path) -> Path:
    """Where the manifest of a folder or of a list file is."""
    return source / _MANIFEST if source.is_dir() else source.with_name(f"{source.name}.{_MANIFEST}")


def quarantine_path(source: Path) -> Path:
    """Where the quarantine list of a folder or of a list file is."""
    return source / _QUARANTINE if source.is_dir() else source.with_name(f"{source.name}.{_QUARANTINE}")


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest that ``sgmim verify`` wrote."""
    if not path.name.endswith(_MANIFEST) or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MARK)) == _MARK


def source_of(manifest: Path) -> Path:
    """The folder or list file that a manifest belongs to."""
    return manifest.parent if manifest.name == _MANIFEST else manifest.with_name(manifest.name[: -len(_MANIFEST) - 1])


def refuse_foreign(manifest: Path) -> None:
    """Somebody else's file of that name is neither read as ours nor overwritten."""
    if manifest.exists() and not is_manifest(manifest):
        raise UserError(f"{manifest} was not written by `sgmim verify`; give it another name")


def write_verified(
    path: Path, header: Verification, good: Iterable[tuple[Pair, tuple[int, ...]]], quarantined: Iterable[Pair]
) -> None:
    """Write the manifest under a temporary name, then give it its own.

    Args:
        good: each pair with bytes of image and map, height, width.
    """
    with _replacing(path) as file:
        file.write(f"# {json.dumps(asdict(header))}\n".encode())
        for (image, structure), numbers in good:
            line = (_escape(image), _escape(structure or ""), *map(str, numbers))
            file.write(("\t".join(line) + "\n").encode())
        for image, structure in quarantined:
            file.write(f"#\t{_escape(image)}\t{_escape(structure or '')}\n".encode())


def write_quarantine(path: Path, reasons: Iterable[tuple[Pair, str, str]]) -> None:
    """Write the quarantine list, (pair, kind, reason) each, under a temporary name, then give it its own."""
    with _replacing(path) as file:
        for (image, structure), kind, reason in reasons:
            record = {"image": image, "structure": structure, "kind": kind, "reason": reason}
            file.write(f"{json.dumps(record)}\n".encode())


def read_verified(path: Path) -> VerifiedPairs:
    """Read a manifest.

    Raises:
        UserError: if it is damaged, was edited, or is of another version of the format.
    """
    good: list[bytes] = []
    sizes = array("q")
    quarantined: list[bytes] = []
    try:
        with open(path, "rb") as file:
            header = _header(path, file.readline())
            for line in file:
                parts = line.rstrip(b"\n").split(b"\t")
                if parts[0] == b"#":
                    quarantined.append(_entry(parts[1], parts[2]))
                    continue
                if len(parts) != _COLUMNS:
                    raise ValueError
                good.append(_entry(parts[0], parts[1]))
                sizes.extend((int(parts[2]), int(parts[3])))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path) from error
    pairs = PairList(good)
    if pairs.sha256 != header.sha256 or len(quarantined) != sum(header.quarantined.values()):
        raise _damaged(path)
    return VerifiedPairs(header, pairs, np.array(sizes).reshape(-1, 2), PairList(quarantined))


def stale_message(manifest: Path, verified: VerifiedPairs, listing: PairList) -> str:
    """How the data set differs from what was verified.

    Args:
        listing: what is there now; compared by images alone if it has no maps.
    """
    known = [verified.pairs, verified.quarantined]
    if verified.header.structure and all(structure is None for _, structure in listing):
        known = [pairs.images_only() for pairs in known]
    before: Counter[bytes] = Counter(entry for pairs in known for entry in pairs.entries())
    now = Counter(listing.entries())
    added, removed = now - before, before - now
    first = os.fsdecode(min((*added, *removed), default=b"").partition(b"\0")[0])
    source = source_of(manifest)
    return (
        f"{source} has changed since it was verified: {added.total()} pair(s) added, {removed.total()} removed"
        f"{f', {first} among them' if first else ''}; run `sgmim verify {source}` again, "
        f"or delete {manifest} to train unverified"
    )


def _header(path: Path, line: bytes) -> Verification:
    values = json.loads(line.removeprefix(b"#"))
    version = values["sgmim_manifest"] if isinstance(values, dict) and "sgmim_manifest" in values else None
    if version is None:
        raise ValueError
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}, this version reads {FORMAT}; run `sgmim verify` again")
    known = {entry.name for entry in fields(Verification)}
    return Verification(**{key: value for key, value in values.items() if key in known})


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged or was edited; run `sgmim verify {source_of(path)}` again")


def _escape(path: str) -> str:
    return _SPECIAL.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", path) if _SPECIAL.search(path) else path


def _entry(image: bytes, structure: bytes) -> bytes:
    entry = image + b"\0" + structure if structure else image
    return _ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), entry) if b"\\" in entry else entry


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
