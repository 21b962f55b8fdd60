"""Where a run keeps its checkpoints, and whether one is whole; light enough for readers that need no DeepSpeed."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from sgmim_fast.errors import UserError

LATEST = "latest"
STATE = "state.json"
WEIGHTS = "model.safetensors"
FILES = "files.json"
"""Size and sha256 of every other file of a checkpoint; written last."""
UNFINISHED = ".incomplete-"
"""Begins the name of a checkpoint's folder until all of it is written."""
UNIVERSAL = ".universal"
"""Holds a copy of a checkpoint for as long as it is loaded on another number of ranks."""
_NAME = re.compile(r"step_([0-9]{6,})")
_BLOCK = 1 << 22


class FileFact(TypedDict):
    """What a checkpoint's list of files says of each."""

    bytes: int
    sha256: str


def checkpoints(run: Path) -> Path:
    """The folder of all checkpoints."""
    return run / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Of the checkpoint after so many optimizer steps."""
    return f"step_{step:06d}"


def temporary_name(step: int) -> str:
    """Of the same checkpoint while it is written."""
    return UNFINISHED + checkpoint_name(step)


def step_of(folder: Path) -> int:
    """Optimizer steps that a checkpoint's name tells; -1 if it is no checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(run: Path) -> list[Path]:
    """All folders with a checkpoint's name, newest first."""
    found = (folder for folder in checkpoints(run).glob("step_*") if step_of(folder) >= 0)
    return sorted(found, key=step_of, reverse=True)


def latest_name(run: Path) -> str:
    """The name that ``latest`` holds; empty if the run has no checkpoint."""
    pointer = checkpoints(run) / LATEST
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None if it has none.

    Raises:
        UserError: if ``latest`` names a folder that is missing or damaged.
    """
    name = latest_name(run)
    if not name:
        return None
    folder = checkpoints(run) / name
    if not (folder / STATE).is_file():
        raise UserError(
            f"{folder.parent / LATEST} names {name}, which is missing or damaged; write an earlier one there instead"
        )
    return folder


def list_files(folder: Path) -> dict[str, FileFact]:
    """What FILES holds of a checkpoint, by reading it: name below the folder -> facts."""
    paths = [path for path in _files(folder) if path.name != FILES]
    with ThreadPoolExecutor(4) as pool:
        facts = pool.map(file_fact, paths)
        return {path.relative_to(folder).as_posix(): fact for path, fact in zip(paths, facts, strict=True)}


def file_fact(path: Path) -> FileFact:
    """Of one file, by reading it."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, by reading them all; empty if nothing is."""
    try:
        listed = json.loads((folder / FILES).read_text())
        found = list_files(folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        return f"its {FILES} or a file cannot be read ({reason})"
    for name in sorted(listed):
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] != listed[name]["bytes"]:
            return f"{name} has {found[name]['bytes']} bytes instead of {listed[name]['bytes']}"
        if found[name] != listed[name]:
            return f"{name} has other content than was written"
    return ""


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        if hasattr(os, "posix_fadvise"):  # what was only checked need not stay in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()
