"""A run folder as it lies on disk, read without loading a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgmim_fast.config import PretrainConfig
from sgmim_fast.errors import UserError
from sgmim_fast.train.arguments import load_config
from sgmim_fast.train.programs import PRETRAIN
from sgmim_fast.train.run_folder import LATEST, WEIGHTS, checkpoints, latest_name

Row = dict[str, float | None]
METRICS = (
    "epoch",
    "loss",
    "image_loss",
    "structure_loss",
    "lr",
    "grad_norm",
    "images_per_second",
    "data_wait",
    "mfu",
    "skipped_steps",
    "peak_memory_bytes",
    "time",
)
"""Columns that the page shows; runs of earlier versions lack some."""


@dataclass(frozen=True)
class Checkpoint:
    """One folder below ``checkpoints/``."""

    name: str
    size: int
    """Bytes of all its files."""
    complete: bool
    """It holds the model's weights."""
    latest: bool


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    config: Mapping[str, Any]
    """``config.json`` as written."""
    settings: PretrainConfig
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    """Logged steps, ascending, each once; a value that is missing or not finite is None."""
    notes: tuple[str, ...]
    """What was left out of ``rows``, in words."""
    checkpoints: tuple[Checkpoint, ...]
    weights: Path | None
    """The newest complete checkpoint's weights."""
    weights_notice: str
    """Why there are none."""

    @property
    def recipe(self) -> str:
        return str(self.config.get("recipe", "custom"))


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: if it is not one, or its configuration cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} is not a run: it {what}; give the folder that pre-training wrote (its --output)")
    settings = load_config(path, PRETRAIN)
    rows, notes = _read_metrics(folder / "metrics.jsonl")
    found = _list_checkpoints(folder)
    weights, notice = _choose_weights(folder, found)
    environment = folder / "environment.json"
    return Run(
        folder=folder,
        config=_read_object(path),
        settings=settings,
        environment=_read_object(environment) if environment.is_file() else {},
        rows=rows,
        notes=notes,
        checkpoints=found,
        weights=weights,
        weights_notice=notice,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold one JSON object; restore it or remove it")
    return content


def _read_metrics(path: Path) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Rows by step, and notes. After a resume a step may be there twice: the later row is the run's history."""
    if not path.is_file():
        return (), ()
    rows: dict[int, Row] = {}
    broken: list[int] = []
    repeated = 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse_row(line)
        if row is None:
            broken.append(number)
            continue
        step = int(row["step"] or 0)
        repeated += step in rows
        rows[step] = row
    notes = []
    if broken == [len(lines)]:
        notes.append("The last line of metrics.jsonl was cut off, as by a crash, and is left out.")
    elif broken:
        named = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        notes.append(f"{len(broken)} unreadable line(s) of metrics.jsonl are left out: {named}.")
    if repeated:
        notes.append(f"{repeated} step(s) were logged again after a resume; the later row counts.")
    gaps = sum(row[key] is None for row in rows.values() for key in ("loss", "image_loss", "grad_norm"))
    if gaps:
        notes.append(f"{gaps} logged value(s) of loss or gradient norm are not finite numbers and leave gaps.")
    return tuple(rows[step] for step in sorted(rows)), tuple(notes)


def _parse_row(line: str) -> Row | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict) or type(content.get("step")) is not int:
        return None
    return {"step": content["step"], **{key: _number(content.get(key)) for key in METRICS}}


def _number(value: Any) -> float | None:
    """A finite number, or None; JSON as Python writes it may hold NaN and Infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _list_checkpoints(run: Path) -> tuple[Checkpoint, ...]:
    folder = checkpoints(run)
    if not folder.is_dir():
        return ()
    latest = latest_name(run)
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.startswith("step_"):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Checkpoint(path.name, size, (path / WEIGHTS).is_file(), path.name == latest))
    return tuple(found)


def _choose_weights(run: Path, found: tuple[Checkpoint, ...]) -> tuple[Path | None, str]:
    for checkpoint in found:
        if checkpoint.latest and checkpoint.complete:
            return checkpoints(run) / checkpoint.name / WEIGHTS, ""
    name = latest_name(run)
    if not name:
        return None, "This run has not written a checkpoint yet."
    return None, f"checkpoints/{LATEST} names {name}, which holds no {WEIGHTS}."
