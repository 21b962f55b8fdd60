"""Splits of folders that need no list: images in one folder, targets of the same names in another."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sgmim_fast.data.dense.split_lists import find_listed
from sgmim_fast.data.manifest import STRUCTURE_SUFFIXES, pair_folders
from sgmim_fast.data.pair_list import PairList
from sgmim_fast.errors import UserError

Split = Literal["train", "val"]

LABEL_SUFFIXES = frozenset((".png", ".bmp", ".tif", ".tiff"))
_SHARE = 10
"""One in so many samples, the last ones by name, is for evaluation where nothing else says which are."""


class SplitPairs(NamedTuple):
    """The pairs of a split, and how they were chosen, in words."""

    pairs: PairList
    chosen: str


def check_root(path: str, wanted: str) -> Path:
    """The data set's folder.

    Args:
        wanted: what it must hold, for the message.

    Raises:
        UserError: if it is not there.
    """
    if not path:
        raise UserError(f"--data.path is not set; give the folder with {wanted}")
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"--data.path {root} is no folder; give the folder with {wanted}")
    return root


def own_split(root: Path, split: Split, lists: tuple[str | None, str | None], images: str, targets: str) -> SplitPairs:
    """A split of a folder with IMAGES/ and TARGETS/: by lists, by subfolders train and val, or the last tenth for val.

    Args:
        lists: of training and of evaluation; both or none.
        images: name of the folder of images.
        targets: name of the folder of targets.

    Raises:
        UserError: if the folder does not hold what it must, or there are too few samples to split.
    """
    listed = listed_split(root, split, lists)
    if listed is not None:
        return listed
    for folder in (images, targets):
        if not (root / folder).is_dir():
            raise UserError(
                f"{root} has no {folder}/ folder; put the images into {images}/ and the maps into {targets}/"
            )
    suffixes = LABEL_SUFFIXES if targets == "labels" else STRUCTURE_SUFFIXES
    named = [name for name in ("train", "val") if (root / images / name).is_dir()]
    if len(named) == 2:
        entries = pair_folders(root, f"{images}/{split}", f"{targets}/{split}", suffixes)
        return SplitPairs(PairList(sorted(entries)), f"{images}/{split}")
    if named:
        other = "val" if named == ["train"] else "train"
        raise UserError(f"{root / images} has a folder {named[0]} but none named {other}; add it, or give lists")
    entries = sorted(pair_folders(root, images, targets, suffixes))
    if len(entries) < 2:
        raise UserError(f"{root / images} holds one image; training and evaluation need one each")
    val = -(-len(entries) // _SHARE)
    if split == "val":
        return SplitPairs(PairList(entries[-val:]), f"the last {val} of {len(entries)} by name")
    return SplitPairs(PairList(entries[:-val]), f"all but the last {val} of {len(entries)} by name")


def listed_split(root: Path, split: Split, lists: tuple[str | None, str | None]) -> SplitPairs | None:
    """A split by lists of one's own, whose paths begin in the data set's folder; None if none is given.

    Raises:
        UserError: if one list is given without the other, or does not hold what it must.
    """
    train, val = lists
    if train is None and val is None:
        return None
    if train is None or val is None:
        option, other = ("train", "val") if train is None else ("val", "train")
        raise UserError(f"--data.{other}-list is given but --data.{option}-list is not; give both")
    source = Path(train if split == "train" else val)
    return SplitPairs(find_listed(source, root).pairs, str(source))


def read_scenes_description(root: Path) -> dict[str, Any]:
    """What `sgmim synth` has noted in a folder: ``near`` in metres and ``labels``, the class names.

    Raises:
        UserError: if the folder is not one of its, or not finished.
    """
    file = root / "dataset.json"
    try:
        content = json.loads(file.read_text())
        near, labels = float(content["near"]), [str(name) for name in content["labels"]]
    except FileNotFoundError:
        raise UserError(
            f"{root} has no dataset.json, so `sgmim synth` did not write it; give a folder that it wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); run `sgmim synth` again") from error
    if not (root / "metadata.jsonl").is_file():
        raise UserError(f"{root} is not finished; run the same `sgmim synth` again, it continues")
    return {"near": near, "labels": labels}


def read_ade20k_names(root: Path, classes: int) -> list[str] | None:
    """The first name of each class in ADEChallengeData2016's ``objectInfo150.txt``; None if it does not name them all.

    It is a table with a head: number from 1, share, images of two splits, a mark, and names with commas between.
    """
    try:
        rows = [line.rstrip().split("\t") for line in (root / "objectInfo150.txt").read_text().splitlines()[1:]]
    except (OSError, UnicodeDecodeError):
        return None  # names are for people alone
    names = {row[0].strip(): row[-1].split(",")[0].strip() for row in rows if len(row) > 1}
    found = [names.get(str(number), "") for number in range(1, classes + 1)]
    return found if all(found) and len(names) == classes else None
