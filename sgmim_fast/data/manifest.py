"""Which images and structure maps belong together, and in which order.

A data set is either a folder with ``images/`` and ``structure/`` (``depth/`` where there is no
``structure/``) or a list file of pairs. Nothing is opened here: the folders are only listed, so that
a million pairs take seconds.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sgmim_fast.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".jp2", ".jpx", ".j2k"))
STRUCTURE_SUFFIXES = frozenset((".png", ".npy", ".tif", ".tiff", ".jp2", ".jpx", ".j2k", ".jpg", ".jpeg"))
LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".jsonl")
_MAP_FOLDERS = ("structure", "depth")
_FEW = 64  # up to this many listed files of one folder are looked up singly; more cost one listing of the folder

Pair = tuple[str, str | None]


@dataclass(frozen=True)
class Manifest:
    """The pairs of a data set, sorted; a sample's dataset index is its position here."""

    root: Path
    """The folder that relative paths start from."""
    pairs: tuple[Pair, ...]
    """(image, structure) paths, relative to the root or absolute; structure is None where none is needed."""

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the list: the same after the whole folder moved, another after any file was added."""
        digest = hashlib.sha256()
        for image, structure in self.pairs:
            digest.update(os.fsencode(f"{image}\t{structure or ''}\n"))
        return digest.hexdigest()

    def image_path(self, index: int) -> str:
        return os.path.join(self.root, self.pairs[index][0])

    def structure_path(self, index: int) -> str | None:
        structure = self.pairs[index][1]
        return None if structure is None else os.path.join(self.root, structure)


def read_manifest(path: str | os.PathLike[str], *, structure: bool = True) -> Manifest:
    """List the pairs of a folder or of a list file.

    * A folder: every image below ``images/`` is paired with the map of the same path and stem below
      ``structure/`` (or ``depth/`` if there is no ``structure/``), whatever the suffixes:
      ``images/n01/x.JPEG`` with ``structure/n01/x.png``. Maps without an image are left out, and so
      are names that start with a dot.
    * A list file: ``image<TAB>structure`` a line (a comma, or else white space, also separates), or
      ``{"image": ..., "structure": ...}`` a line (.jsonl); paths are relative to the list's folder or
      absolute. Empty lines, lines that start with ``#`` and the header ``image,structure`` are skipped.

    Args:
        path: the folder, or the .txt, .tsv, .csv or .jsonl file.
        structure: False pairs nothing: maps need not exist (guidance "none").

    Raises:
        UserError: for anything missing, ambiguous or malformed; the message names the first offender.
    """
    if not os.fspath(path):
        raise UserError("--data.path is not set; give a folder with images/ and structure/, or a list file of pairs")
    source = Path(path)
    if source.is_dir():
        return Manifest(source, tuple(sorted(_folder_pairs(source, structure))))
    if not source.exists():
        raise UserError(f"--data.path {source} does not exist; give a folder with images/ and structure/, or a list")
    if source.suffix.lower() not in LIST_SUFFIXES:
        raise UserError(
            f"--data.path {source} is neither a folder nor a list of pairs; lists end in {', '.join(LIST_SUFFIXES)}"
        )
    listed = list(_listed_pairs(source, structure))
    if not listed:
        raise UserError(f"{source} lists no pairs; write one image<TAB>structure a line")
    _check_listed_files(source, listed)
    return Manifest(source.parent, tuple(sorted(pair for _, pair in listed)))


def _folder_pairs(root: Path, structure: bool) -> list[Pair]:
    if not (root / "images").is_dir():
        raise UserError(f"{root} has no images/ folder; put the images there and the maps into structure/")
    maps_folder = next((name for name in _MAP_FOLDERS if (root / name).is_dir()), None) if structure else None
    pairs: list[Pair] = []
    missing: list[str] = []
    pending = [""]
    while pending:  # folder by folder, so that only one folder's stems are held
        below = pending.pop()
        images, folders = _list_folder(root, f"images/{below}", IMAGE_SUFFIXES)
        pending += (f"{below}{folder}/" for folder in folders)
        maps: dict[str, str] = {}
        if images and maps_folder and (root / maps_folder / below).is_dir():
            maps, _ = _list_folder(root, f"{maps_folder}/{below}", STRUCTURE_SUFFIXES)
        pairs += ((image, maps.get(stem)) for stem, image in images.items())
        if maps_folder:
            missing += (images[stem] for stem in images.keys() - maps.keys())
    if not pairs:
        raise UserError(f"{root / 'images'} holds no images; known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}")
    if structure and maps_folder is None:
        raise UserError(f"{root} has no structure/ folder; add the maps, or train without them (--model.guidance none)")
    if missing:
        first = min(missing)
        stem = os.path.splitext(first.removeprefix("images/"))[0]
        others = f" (nor have {len(missing) - 1} other images)" if len(missing) > 1 else ""
        raise UserError(
            f"{root / first} has no map {maps_folder}/{stem} with one of the suffixes "
            f"{', '.join(sorted(STRUCTURE_SUFFIXES))}{others}; add the maps, or remove these images"
        )
    return pairs


def _list_folder(root: Path, folder: str, suffixes: frozenset[str]) -> tuple[dict[str, str], list[str]]:
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
                if structure and not rest:
                    raise UserError(f"{source}:{number}: names no structure map; expected image<TAB>structure")
                yield number, (image, rest[0] if structure else None)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); check its permissions") from error


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


def _check_listed_files(source: Path, listed: list[tuple[int, Pair]]) -> None:
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
