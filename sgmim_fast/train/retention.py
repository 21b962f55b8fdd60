"""Room on the disk: what may be removed from a run's checkpoints, and whether another one fits."""

import os
import shutil
from pathlib import Path

from sgmim_fast.errors import UserError
from sgmim_fast.train.run_folder import UNFINISHED, UNIVERSAL, checkpoints, list_checkpoints, step_of

_REMOVED = ".removed-"
_SPARE = 1.05  # of the newest checkpoint's size must be free


def check_space(run: Path) -> None:
    """The next checkpoint is as large as the newest one; without any, writing tells.

    Raises:
        UserError: if that much is not free.
    """
    kept = list_checkpoints(run)
    if not kept:
        return
    needed = int(_SPARE * sum(path.stat().st_size for path in kept[0].rglob("*") if path.is_file()))
    free = shutil.disk_usage(checkpoints(run)).free
    if free < needed:
        raise UserError(f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")


def remove_old(run: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the ``keep_last`` newest checkpoints up to ``step`` and every ``keep_every``-th.

    Later ones are of a run that was resumed before them, perhaps because they are damaged: they neither count nor go.
    """
    own = [folder for folder in list_checkpoints(run) if step_of(folder) <= step]
    for folder in own[keep_last:]:
        if keep_every is None or step_of(folder) % keep_every:
            remove(folder)


def remove(folder: Path) -> None:
    """Renamed first: a removal that is interrupted leaves nothing that looks like a checkpoint."""
    aside = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """What interrupted saves and removals have left."""
    for leftover in (*root.glob(f"{UNFINISHED}*"), *root.glob(f"{_REMOVED}*"), root / UNIVERSAL):
        shutil.rmtree(leftover, ignore_errors=True)


def make_durable(*paths: Path) -> None:
    """Wait until files, and the names in folders, have reached the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
