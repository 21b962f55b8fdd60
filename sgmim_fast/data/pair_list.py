"""Millions of pairs of paths without a Python object for each."""

import bisect
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Self, overload

import numpy as np

Pair = tuple[str, str | None]
"""(image, structure): paths as listed; structure is None where a pair has no map."""

_HASHED_AT_ONCE = 4096


def entry_of(pair: Pair) -> bytes:
    """A pair as bytes, image NUL structure: no path holds NUL, and the order is that of the pairs."""
    image, structure = pair
    return os.fsencode(image) if structure is None else os.fsencode(f"{image}\0{structure}")


def pair_of(entry: bytes) -> Pair:
    """What ``entry_of`` was given."""
    image, separator, structure = entry.partition(b"\0")
    return os.fsdecode(image), os.fsdecode(structure) if separator else None


class PairList(Sequence[Pair]):
    """Pairs in one buffer; each is made when it is asked for.

    Args:
        entries: see ``entry_of``, in the order of the list.
    """

    def __init__(self, entries: Sequence[bytes]) -> None:
        self._buffer = b"".join(entries)
        self._ends = np.cumsum(np.fromiter(map(len, entries), np.int64, len(entries)))

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> Self:
        """The pairs in the order given."""
        return cls([entry_of(pair) for pair in pairs])

    def __len__(self) -> int:
        return len(self._ends)

    def entry(self, index: int) -> bytes:
        """One pair as bytes."""
        begin = int(self._ends[index - 1]) if index else 0
        return self._buffer[begin : int(self._ends[index])]

    def entries(self) -> Iterator[bytes]:
        """All pairs as bytes."""
        begin = 0
        for end in self._ends:
            yield self._buffer[begin:end]
            begin = end

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "PairList": ...
    def __getitem__(self, index: "int | slice") -> "Pair | PairList":
        if isinstance(index, slice):
            return PairList([self.entry(i) for i in range(len(self))[index]])
        return pair_of(self.entry(range(len(self))[index]))  # the range knows negative and too large ones

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PairList):
            return self._buffer == other._buffer and np.array_equal(self._ends, other._ends)
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # compares equal to tuples, but has not their hash

    def __repr__(self) -> str:
        return f"PairList({len(self)} pairs)"

    def find(self, entry: bytes) -> int | None:
        """Where an entry is, in a sorted list."""
        place = bisect.bisect_left(range(len(self)), entry, key=self.entry)
        return place if place < len(self) and self.entry(place) == entry else None

    def images_only(self) -> "PairList":
        """The same pairs without their maps."""
        return PairList([entry.partition(b"\0")[0] for entry in self.entries()])

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the list and its order, of nothing else."""
        digest = hashlib.sha256()
        lines: list[bytes] = []
        for entry in self.entries():
            image, _, structure = entry.partition(b"\0")
            lines.append(b"%b\t%b\n" % (image, structure))
            if len(lines) == _HASHED_AT_ONCE:
                digest.update(b"".join(lines))
                lines.clear()
        digest.update(b"".join(lines))
        return digest.hexdigest()
