"""Opening a data set, whatever form it has."""

import os
from pathlib import Path

from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.shards import SHARD_LIST, read_shards


def open_pairs(path: str | os.PathLike[str], *, structure: bool = True) -> Pairs:
    """A folder or list of pairs (``read_manifest``), or a folder that ``sgmim shard`` wrote (``read_shards``).

    Args:
        structure: False pairs nothing: maps need not exist (guidance "none").

    Raises:
        UserError: for anything missing, ambiguous or malformed; the message names the first offender.
    """
    folder = Path(path)
    unfinished = not (folder / "images").is_dir() and any(folder.glob("*.tar"))
    if os.fspath(path) and ((folder / SHARD_LIST).is_file() or unfinished):
        return read_shards(path, structure=structure)
    return read_manifest(path, structure=structure)
