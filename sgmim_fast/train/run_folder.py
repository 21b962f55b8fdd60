"""Where a run keeps its checkpoints; light enough for readers that need no DeepSpeed."""

from pathlib import Path

from sgmim_fast.errors import UserError

LATEST = "latest"
STATE = "state.json"
WEIGHTS = "model.safetensors"


def checkpoints(run: Path) -> Path:
    """The folder of all checkpoints."""
    return run / "checkpoints"


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
