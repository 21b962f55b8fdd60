"""Which images and structure maps belong together, and in which order.

A data set is either a folder with ``images/`` and ``structure/`` (``depth/`` where there is no
``structure/``) or a list file of pairs. No image is opened here: the folders are only listed, so that
a million pairs take seconds. Where ``sgmim verify`` has left its manifest, only the good pairs count.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sgmim_fast.data.members import Member, PairMembers
from sgmim_fast.data.pair_list import Pair, PairList, entry_of, pair_of
from sgmim_fast.data.verified import (
    Verification,
    is_manifest,
    manifest_path,
    read_verified,
    refuse_foreign,
    source_of,
    stale_message,
)
from sgmim_fast.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".jp2", ".jpx", ".j2k"))
STRUCTURE_SUFFIXES = frozenset((".png", ".npy", ".tif", ".tiff", ".jp2", ".jpx", ".j2k", ".jpg", ".jpeg"))
LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".jsonl")
_MAP_FOLDERS = ("structure", "depth")
_FEW = 64  # up to this many listed files of one folder are looked up singly; more cost one listing of the folder


class Manifest:
    """The pairs of a data set, sorted; a sample's dataset index is its position here.

    Args:
        root: the folder that relative paths start from.
        pairs: (image, structure) paths, relative to the root or absolute; structure is None where none is needed.
        sizes: (pairs, 2) bytes of each image and map, where they were verified.
        verification: what was verified, and how; None if nothing was.
    """

    def __init__(
        self,
        root: Path,
        pairs: Sequence[Pair],
        sizes: np.ndarray | None = None,
        verification: Verification | None = None,
    ) -> None:
        self.root = root
        self.pairs = pairs if isinstance(pairs, PairList) else PairList.of(pairs)
        self.verification = verification
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sha256(self) -> str:
        """Fingerprint of the list: the same after the whole folder moved, another after any file was added."""
        return self.pairs.sha256

    @property
    def shard_sizes(self) -> None:
        """Every pair is a file of its own."""

    def members(self, index: int) -> PairMembers:
        """The files of one pair; verified ones must still have the size they had then."""
        image, structure = self.pairs[index]
        return self._member(image, index, 0), None if structure is None else self._member(structure, index, 1)

    def _member(self, path: str, index: int, column: int) -> Member:
        size = None if self._sizes is None else int(self._sizes[index, column])
        return Member(os.path.join(self.root, path), size)


def read_manifest(path: str | os.PathLike[str], *, structure: bool = True) -> Manifest:
    """List the pairs of a folder or of a list file.

    * A folder: every image below ``images/`` is paired with the map of the same path and stem below
      ``structure/`` (or ``depth/`` if there is no ``structure/``), whatever the suffixes:
      ``images/n01/x.JPEG`` with ``structure/n01/x.png``. Maps without an image are left out, and so
      are names that start with a dot.
    * A list file: ``image<TAB>structure`` a line (a comma, or else white space, also separates), or
      ``{"image": ..., "structure": ...}`` a line (.jsonl); paths are relative to the list's folder or
      absolute. Empty lines, lines that start with ``#`` and the header ``image,structure`` are skipped.

    Where ``sgmim verify`` has written a manifest for it, the pairs are the good ones, and the names of all
    files must be those it found.

    Args:
        path: the folder, or the .txt, .tsv, .csv or .jsonl file; or the manifest of either.
        structure: False pairs nothing: maps need not exist (guidance "none").

    Raises:
        UserError: for anything missing, ambiguous or malformed; the message names the first offender.
    """
    source = find_source(path)
    verified = manifest_path(source)
    refuse_foreign(verified)
    if verified.exists():
        return _read_verified_pairs(source, verified, structure)
    return Manifest(root_of(source), list_pairs(source, structure))


def find_source(path: str | os.PathLike[str]) -> Path:
    """The folder or list file that a path means; a manifest's path means what it was made from.

    Raises:
        UserError: if it is neither.
    """
    if not os.fspath(path):
        raise UserError("--data.path is not set; give a folder with images/ and structure/, or a list file of pairs")
    source = Path(path)
    if is_manifest(source):
        source = source_of(source)
    if not source.exists():
        raise UserError(f"--data.path {source} does not exist; give a folder with images/ and structure/, or a list")
    if not source.is_dir() and source.suffix.lower() not in LIST_SUFFIXES:
        raise UserError(
            f"--data.path {source} is neither a folder nor a list of pairs; lists end in {', '.join(LIST_SUFFIXES)}"
        )
    return source


def root_of(source: Path) -> Path:
    """The folder that the paths of a data set start from."""
    return source if source.is_dir() else source.parent


def list_pairs(source: Path, structure: bool, may_lack: Callable[[bytes], bool] = lambda _: False) -> PairList:
    """The pairs of a folder or of a list file, sorted; no manifest is looked at.

    Args:
        may_lack: which pairs (see ``entry_of``) may lack a map in a folder, or files that a list names.

    Raises:
        UserError: see ``read_manifest``.
    """
    if source.is_dir():
        return PairList(sorted(_folder_pairs(source, structure, may_lack)))
    listed = [(number, entry_of(pair)) for number, pair in _listed_pairs(source, structure)]
    if not listed:
        raise UserError(f"{source} lists no pairs; write one image<TAB>structure a line")
    _check_listed_files(source, ((number, pair_of(entry)) for number, entry in listed if not may_lack(entry)))
    return PairList(sorted(entry for _, entry in listed))


def _read_verified_pairs(source: Path, path: Path, structure: bool) -> Manifest:
    found = read_verified(path)
    header, pairs, quarantined = found.header, found.pairs, found.quarantined
    if structure and not header.structure:
        raise UserError(f"{path} was made without looking at the maps; run `sgmim verify {source}` again, with them")
    if header.structure and not structure:
        pairs, quarantined = pairs.images_only(), quarantined.images_only()
    # A folder's missing files show in its listing; a list goes on naming them.
    may_lack = set(quarantined.entries()).__contains__ if source.is_file() else lambda _: True
    listing = list_pairs(source, structure, may_lack)
    if listing.sha256 != (header.listing_sha256 if structure else header.images_sha256):
        raise UserError(stale_message(path, found, listing))
    if not len(pairs):
        raise UserError(f"{source}: no pair passed `sgmim verify`; mend what its quarantine list names, verify again")
    return Manifest(root_of(source), pairs, found.sizes, header)


def _folder_pairs(root: Path, structure: bool, may_lack: Callable[[bytes], bool]) -> list[bytes]:
    if not (root / "images").is_dir():
        raise UserError(f"{root} has no images/ folder; put the images there and the maps into structure/")
    maps = next((name for name in _MAP_FOLDERS if (root / name).is_dir()), None) if structure else None
    entries = pair_folders(root, "images", maps, may_lack=may_lack)
    if structure and maps is None:
        raise UserError(
            f"{root} has no structure/ folder; add the maps, or do without "
            "(--model.guidance none, or sgmim verify --images-only)"
        )
    return entries


def pair_folders(
    root: Path,
    images: str,
    maps: str | None,
    suffixes: frozenset[str] = STRUCTURE_SUFFIXES,
    may_lack: Callable[[bytes], bool] = lambda _: False,
) -> list[bytes]:
    """Every image below one folder with the map of the same path and stem below another, unsorted; see ``entry_of``.

    Args:
        images: the folder of the images, relative to the root.
        maps: the folder of the maps; None pairs nothing.
        suffixes: of the maps.
        may_lack: which images (their paths as bytes) may lack a map.

    Raises:
        UserError: if there is no image, or an image lacks a map; it names the first.
    """
    entries: list[bytes] = []
    missing: list[str] = []
    pending = [""]
    while pending:  # folder by folder, so that only one folder's stems are held
        below = pending.pop()
        found, folders = list_folder(root, f"{images}/{below}", IMAGE_SUFFIXES)
        pending += (f"{below}{folder}/" for folder in folders)
        of_stem: dict[str, str] = {}
        if found and maps and (root / maps / below).is_dir():
            of_stem, _ = list_folder(root, f"{maps}/{below}", suffixes)
        entries += (entry_of((image, of_stem.get(stem))) for stem, image in found.items())
        if maps:
            lacking = (found[stem] for stem in found.keys() - of_stem.keys())
            missing += (image for image in lacking if not may_lack(os.fsencode(image)))
    if not entries:
        raise UserError(f"{root / images} holds no images; known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}")
    if missing:
        first = min(missing)
        stem = os.path.splitext(first.removeprefix(f"{images}/"))[0]
        others = f" (nor have {len(missing) - 1} other images)" if len(missing) > 1 else ""
        raise UserError(
            f"{root / first} has no map {maps}/{stem} with one of the suffixes "
            f"{', '.join(sorted(suffixes))}{others}; add the maps, or remove these images"
        )
    return entries


def list_folder(root: Path, folder: str, suffixes: frozenset[str]) -> tuple[dict[str, str], list[str]]:
    """A folder's files as stem -> path below the root, and the names of the folders in it.

    Args:
        folder: path below the root, with a slash at its end.
    """
    files: dict[str, str] = {}
    folders: list[str] = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = entry.name
                stem, suffix = os.path.splitext(name)
                if name.startswith("."):
                    continue
                # is_dir() answers from the listing itself; following a link would ask for each file's status.
                if suffix.lower() in suffixes and not entry.is_dir(follow_symlinks=False):
                    if stem in files:
                        first, second = sorted((files[stem], folder + name))
                        raise UserError(
                            f"{root}: {first} and {second} share one stem, so the pair is ambiguous; "
                            "rename or remove one"
                        )
                    files[stem] = folder + name
                elif entry.is_dir():
                    _refuse_loop(entry)
                    folders.append(name)
    except OSError as error:
        raise UserError(f"{root / folder} cannot be listed ({error.strerror}); check its permissions") from error
    return files, folders


def _refuse_loop(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        target, here = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
        if os.path.commonpath((target, here)) == target:
            raise UserError(f"{entry.path} links to a folder that contains it; remove the link")


def _listed_pairs(source: Path, structure: bool) -> Iterator[tuple[int, Pair]]:
    """(line number, pair) of each line that holds one."""
    parse = _parse_json if source.suffix.lower() == ".jsonl" else _parse_fields
    try:
        with open(source, encoding="utf-8-sig", errors="surrogateescape", newline=None) as lines:
            for number, line in enumerate(lines, start=1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                fields = parse(line, f"{source}:{number}")
                if fields in (("image", "structure"), ("image", "depth"), ("image",)):
                    continue
                image, *rest = fields
                if not all(map(_is_path, fields)):
                    raise UserError(f"{source}:{number}: holds a character that no path can have; correct the line")
                if structure and not rest:
                    raise UserError(f"{source}:{number}: names no structure map; expected image<TAB>structure")
                yield number, (image, rest[0] if structure else None)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); check its permissions") from error


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair, from JSON
        return False


def _parse_fields(line: str, where: str) -> tuple[str, ...]:
    if "\t" in line:
        fields = line.split("\t")
    elif "," in line:
        fields = next(csv.reader([line], skipinitialspace=True))
    else:
        fields = line.split()
    fields = [field.strip() for field in fields]
    if len(fields) > 2 or not all(fields):
        raise UserError(
            f"{where}: expected image<TAB>structure, found {len(fields)} fields; "
            "use tabs or .jsonl if file names contain spaces or commas"
        )
    return tuple(fields)


def _parse_json(line: str, where: str) -> tuple[str, ...]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: not a line of JSON ({error}); expected an object with image and structure"
        ) from error
    values = [record.get(key) for key in ("image", "structure")] if isinstance(record, dict) else [None]
    if not isinstance(values[0], str) or not values[0]:
        raise UserError(f'{where}: expected {{"image": "...", "structure": "..."}} with text values')
    if values[1] is None:
        return (values[0],)
    if not isinstance(values[1], str) or not values[1]:
        raise UserError(f"{where}: structure must be the path of a map, as text")
    return values[0], values[1]


def _check_listed_files(source: Path, listed: Iterable[tuple[int, Pair]]) -> None:
    """Every listed file exists; one listing a folder instead of one look-up a file where that is cheaper."""
    lines: dict[str, dict[str, int]] = {}  # folder -> name -> first line that lists it
    for number, pair in listed:
        for file in pair:
            if file is not None:
                folder, name = os.path.split(os.path.join(source.parent, file))
                lines.setdefault(folder, {}).setdefault(name, number)
    missing: list[tuple[int, str]] = []
    for folder, names in lines.items():
        if len(names) <= _FEW:
            absent = {name for name in names if not os.path.isfile(os.path.join(folder, name))}
        else:
            absent = names.keys() - (set(os.listdir(folder)) if os.path.isdir(folder) else set())
        missing += [(names[name], os.path.join(folder, name)) for name in absent]
    if missing:
        number, file = min(missing)
        others = f", and {len(missing) - 1} other listed files are missing" if len(missing) > 1 else ""
        raise UserError(f"{source}:{number}: {file} does not exist{others}; correct the list or restore the files")
