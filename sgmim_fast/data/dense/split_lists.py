"""Lists that say which images belong to a split: those of BTS and GLPDepth, and people's own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sgmim_fast.data.pair_list import Pair, PairList
from sgmim_fast.errors import UserError

NO_TARGET = "None"
"""What BTS's lists hold where an image has no ground truth."""


class ListedPair(NamedTuple):
    """One line of a list."""

    line: int
    image: str
    target: str | None


class Places(NamedTuple):
    """Folders below a data set's own, each with a slash at its end, or "", in which listed files are looked for."""

    images: tuple[str, ...] = ("",)
    targets: tuple[str, ...] = ("",)


class FoundPairs(NamedTuple):
    """What a list comes to on this disk."""

    pairs: PairList
    """In the order of the list, paths relative to the data set's folder."""
    without_target: int
    """Lines that say there is no ground truth; they are left out."""


def read_split_list(path: Path) -> list[ListedPair]:
    """The lines of a list: image, depth or label map, and often a focal length, which is not needed.

    Fields are separated by tabs, or by white space where a line has no tab. Empty lines and lines that start
    with ``#`` are skipped.

    Raises:
        UserError: if the list is missing, empty, or has a line of another form; it names file and line.
    """
    listed = []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
                if len(fields) not in (2, 3) or not all(fields) or "\0" in line or not _is_number(fields[2:]):
                    raise UserError(
                        f"{path}:{number}: expected an image, a map and perhaps a focal length, found {line[:80]!r}; "
                        "correct the line"
                    )
                listed.append(ListedPair(number, fields[0], None if fields[1] == NO_TARGET else fields[1]))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the list of the split") from error
    if not listed:
        raise UserError(f"{path} lists no images; write one image and its map a line")
    return listed


def _is_number(fields: list[str]) -> bool:
    try:
        return all(float(field) > 0 for field in fields)
    except ValueError:
        return False


def find_listed(source: Path, root: Path, places: Places = Places(), *, rooted: bool = False) -> FoundPairs:  # noqa: B008
    """The files that a list names, each looked for in the places of its kind in turn.

    Args:
        root: the data set's folder.
        rooted: listed paths that begin with a slash begin in the data set's folder, as GLPDepth's do.

    Raises:
        UserError: as ``read_split_list``, and if a file is in none of the places, or no image has a ground truth.
    """
    listed = read_split_list(source)
    folders = _Folders(root)
    pairs: list[Pair] = []
    missing: list[tuple[int, str, tuple[str, ...]]] = []
    for line, image, target in listed:
        if target is None:
            continue
        found = []
        for file, kind in ((image, places.images), (target, places.targets)):
            file = file.lstrip("/") if rooted else file
            place = next((place for place in kind if folders.has(place + file)), None)
            if place is None:
                missing.append((line, file, kind))
            else:
                found.append(place + file)
        if len(found) == 2:
            pairs.append((found[0], found[1]))
    if missing:
        line, file, kind = missing[0]
        others = f", and {len(missing) - 1} other listed files are missing" if len(missing) > 1 else ""
        raise UserError(
            f"{source}:{line}: {file} does not exist in {_spoken(root, kind)}{others}; correct --data.path or the "
            "list, or restore the files"
        )
    if not pairs:
        raise UserError(f"{source} names no image with ground truth: every line says {NO_TARGET}; give another list")
    return FoundPairs(PairList.of(pairs), len(listed) - len(pairs))


def _spoken(root: Path, places: Sequence[str]) -> str:
    folders = [f"{root}/{place}" for place in places]
    return folders[0] if len(folders) == 1 else f"any of {', '.join(folders)}"


class _Folders:
    """Which files there are: one listing a folder instead of one look-up a file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, frozenset[str]] = {}

    def has(self, path: str) -> bool:
        folder, name = os.path.split(os.path.join(self.root, path))
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
            except OSError as error:
                raise UserError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error
        return name in self._names[folder]
