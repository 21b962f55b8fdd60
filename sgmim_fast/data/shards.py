"""Data sets that ``sgmim shard`` packed: a few large tar files, and where in them each pair's bytes are.

    DIR/shards.json         the list of the shards; written last, so what has it is whole
    DIR/shard-000000.tar    000000_000000.jpg, 000000_000000.structure.png, 000000_000001.jpg, ...
    DIR/shard-000000.idx    offset and size of each member, in the format of DALI's readers.webdataset
    DIR/shard-000000.jsonl  what the pairs were called before they were packed; for people, not read here

A dataset index is a pair's place in the shards, one after the other. Opening reads the list and the index files only.
Members are read by offset and size: no tar header is parsed, and no name found in a file is ever opened.
"""

import hashlib
import json
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sgmim_fast.data.manifest import IMAGE_SUFFIXES, STRUCTURE_SUFFIXES
from sgmim_fast.data.members import Member, PairMembers
from sgmim_fast.errors import UserError

SHARD_LIST = "shards.json"
FORMAT = 1
"""Of the list; raised whenever older readers would misread a folder."""
BLOCK = 512
"""Tar headers take one block, contents whole ones."""
INDEX_VERSION = "v1.2"
MAX_MEMBER = 2**32 - 1
"""Bytes of one member, so that sizes take four bytes in memory."""

STRUCTURE = "structure"
SUFFIXES = tuple(sorted(IMAGE_SUFFIXES | STRUCTURE_SUFFIXES))
_IMAGE_CODES = {suffix[1:].encode(): SUFFIXES.index(suffix) for suffix in IMAGE_SUFFIXES}
_STRUCTURE_CODES = {f"{STRUCTURE}{suffix}".encode(): SUFFIXES.index(suffix) for suffix in STRUCTURE_SUFFIXES}
_TAR_NAME = re.compile(r"shard-([0-9]{6})\.tar")
_AGAIN = "restore it, or run the same `sgmim shard` command again"


@dataclass(frozen=True)
class Shard:
    """What the list says of one tar file."""

    name: str
    """Its file name: it lies beside the list."""
    pairs: int
    size: int
    """Of the tar file, in bytes."""
    index_sha256: str
    """Of the bytes of its index file."""


class Table(NamedTuple):
    """Where the members of one shard are; columns are image and, unless packed without, map."""

    offsets: np.ndarray
    """(N, 1 or 2) int64, the first byte."""
    sizes: np.ndarray
    """(N, 1 or 2) uint32, bytes."""
    suffixes: np.ndarray
    """(N, 1 or 2) uint8, place in SUFFIXES."""


class _Misfit(ValueError):
    """Why an index is not that of its tar file."""


class ShardSet:
    """A finished sharded data set. Implements ``Pairs``; takes some 26 bytes of memory a pair.

    Args:
        root: the folder.
        sha256: of the list.
        shards: in the order of their indices.
        tables: one a shard; with one column, pairs come without maps.
        skipped: pairs that were left out because they were bad.
    """

    def __init__(
        self, root: Path, *, sha256: str, shards: Sequence[Shard], tables: Sequence[Table], skipped: int = 0
    ) -> None:
        self.root = root
        self.sha256 = sha256
        self.skipped = skipped
        self.shards = tuple(shards)
        self._tables = tuple(tables)
        self._begins = (0, *accumulate(shard.pairs for shard in shards))

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Pairs in each shard."""
        return tuple(shard.pairs for shard in self.shards)

    def __len__(self) -> int:
        return self._begins[-1]

    def members(self, index: int) -> PairMembers:
        """Where the image and the map of one pair are."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} pairs")
        place = bisect_right(self._begins, index) - 1
        row = index - self._begins[place]
        name, table = self.shards[place].name, self._tables[place]
        path, key = os.path.join(self.root, name), pair_key(shard_number(name), row)
        found = [
            Member(path, size, offset, member_name(key, SUFFIXES[code], structure=column == 1))
            for column, (offset, size, code) in enumerate(
                zip(table.offsets[row].tolist(), table.sizes[row].tolist(), table.suffixes[row].tolist(), strict=True)
            )
        ]
        return found[0], found[1] if len(found) == 2 else None


def pair_key(shard: int, row: int) -> str:
    """What the members of one pair share: no dots, and no other pair of the data set has it."""
    return f"{shard:06d}_{row:06d}"


def member_name(key: str, suffix: str, *, structure: bool) -> str:
    """A member's name; the suffix has its dot."""
    return f"{key}.{STRUCTURE}{suffix}" if structure else f"{key}{suffix}"


def tar_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def shard_number(name: str) -> int:
    """The number in a shard's file name; -1 if the name is no shard's."""
    match = _TAR_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def list_sha256(record: dict[str, Any]) -> str:
    """Fingerprint of a list: of all it holds but the fingerprint itself."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_list(shards: Sequence[Shard], *, maps: bool, skipped: int, source: Any, options: Any) -> bytes:
    """The content of a SHARD_LIST."""
    record = {
        "format": FORMAT,
        "pairs": sum(shard.pairs for shard in shards),
        "maps": maps,
        "skipped": skipped,
        "source": source,
        "options": options,
        "shards": [asdict(shard) for shard in shards],
    }
    record["sha256"] = list_sha256(record)
    return (json.dumps(record, indent=1) + "\n").encode()


def read_shards(path: str | os.PathLike[str], structure: bool = True) -> ShardSet:
    """Open a folder that ``sgmim shard`` has finished.

    Args:
        structure: False leaves the maps out: there need not be any.

    Raises:
        UserError: if the list or a shard is missing, cut short, changed, or of another format.
    """
    root = Path(path)
    source = root / SHARD_LIST
    try:
        content = source.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{root} has no {SHARD_LIST}, so it is no finished sharded data set; `sgmim shard` makes one"
        ) from error
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); check its permissions") from error
    record, shards = _parse_list(source, content)
    tables = []
    for shard in shards:
        table, index_sha256 = read_table(root, shard.name, shard.pairs, size=shard.size)
        if index_sha256 != shard.index_sha256:
            raise UserError(f"{_index_path(root, shard.name)} is not the one that {SHARD_LIST} lists; {_AGAIN}")
        if structure and table.offsets.shape[1] == 1:
            raise UserError(
                f"{root} was packed without maps; pack it with maps, or train without them (--model.guidance none)"
            )
        tables.append(table if structure else Table(*(column[:, :1].copy() for column in table)))
    return ShardSet(root, sha256=record["sha256"], shards=shards, tables=tables, skipped=record["skipped"])


def _parse_list(source: Path, content: bytes) -> tuple[dict[str, Any], list[Shard]]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(record, dict) or "format" not in record:
        raise UserError(f"{source} is no list of shards; {_AGAIN}")
    if record["format"] != FORMAT:
        raise UserError(
            f"{source} has format version {str(record['format'])[:20]!r} but this sgmim_fast reads {FORMAT}; "
            "update sgmim_fast, or pack the data set again"
        )
    if record.get("sha256") != list_sha256(record):
        raise UserError(f"{source} was changed after it was written (its sha256 does not fit); {_AGAIN}")
    try:
        shards = [Shard(**entry) for entry in record["shards"]]
        names = [shard.name for shard in shards]
        wrong = [name for name in names if not isinstance(name, str) or shard_number(name) < 0]
        if wrong:
            raise UserError(f"{source} lists {str(wrong[0])[:80]!r}, which is no file name of a shard; {_AGAIN}")
        counts = [number for shard in shards for number in (shard.pairs, shard.size)]
        fits = bool(shards) and type(record["skipped"]) is int
        fits = fits and all(type(number) is int and number > 0 for number in counts)
        fits = fits and len(set(names)) == len(names) and record["pairs"] == sum(shard.pairs for shard in shards)
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{source} contradicts itself or lacks an entry; {_AGAIN}")
    return record, shards


def _index_path(root: Path, name: str) -> Path:
    return (root / name).with_suffix(".idx")


def _file_size(path: Path) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} is missing or cannot be reached ({error.strerror}); {_AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no file; {_AGAIN}")
    return status.st_size


def read_table(root: Path, name: str, pairs: int, *, size: int | None = None) -> tuple[Table, str]:
    """The index of one shard, checked against its tar file's size, and the sha256 of the index file.

    Args:
        name: of the tar file.
        pairs: that the shard must have.
        size: that the tar file must have, in bytes; None takes it as it is.
    """
    tar, path = root / name, _index_path(root, name)
    found = _file_size(tar)
    if size is not None and found != size:
        raise UserError(f"{tar} has {found} bytes but {size} when it was packed; {_AGAIN}")
    _file_size(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    try:
        table = _parse_index(content, pairs, found)
    except (ValueError, KeyError, OverflowError) as error:
        reason = str(error) if isinstance(error, _Misfit) else "unknown content"
        raise UserError(f"{path} does not fit {name} ({reason}); {_AGAIN}") from error
    return table, hashlib.sha256(content).hexdigest()


def _parse_index(content: bytes, pairs: int, tar_size: int) -> Table:
    """Lines of ``suffix offset size name`` for one or two members, below a line of version and count."""
    version, count, *fields = content.split() if content.count(b"\n") == pairs + 1 else (b"", b"")
    if (version, count) != (INDEX_VERSION.encode(), str(pairs).encode()) or len(fields) not in (4 * pairs, 8 * pairs):
        raise _Misfit(f"it does not list {pairs} pairs")
    columns = len(fields) // (4 * pairs)
    table = Table(*(np.empty((pairs, columns), dtype) for dtype in (np.int64, np.uint32, np.uint8)))
    for column, codes in enumerate((_IMAGE_CODES, _STRUCTURE_CODES)[:columns]):
        suffixes, offsets, sizes = (fields[4 * column + part :: 4 * columns] for part in range(3))
        table.suffixes[:, column] = [codes[suffix] for suffix in suffixes]
        offset = table.offsets[:, column] = np.array(list(map(int, offsets)), dtype=np.int64)
        size = np.array(list(map(int, sizes)), dtype=np.int64)
        if (size < 1).any() or (size > MAX_MEMBER).any() or (offset < BLOCK).any() or (offset % BLOCK).any():
            raise _Misfit("an offset or a size is impossible")
        if (offset > tar_size - size).any():
            raise _Misfit("it points beyond the end")
        table.sizes[:, column] = size
    return table
