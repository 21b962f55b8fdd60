"""The measured GPU that a plan starts from: a row of ``benchmarks/train_step.py``, or a rate that somebody names."""

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgmim_fast.config.checks import require
from sgmim_fast.errors import UserError, first_line

_FIELDS = ("model", "batch", "precision", "images_per_second")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Forward and backward passes of one device, without an optimizer."""

    model: str
    """A name of ``sgmim_fast.recipes.MODELS``."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of ``ModelConfig`` that were changed."""
    precision: str
    """Of the weights."""
    batch: int
    """Pairs a pass."""
    images_per_second: float
    source: str
    """Where the numbers are from, for the reader."""
    memory_bandwidth: float | None = None
    """Bytes a second of a large copy, if the row tells."""


def read_row(place: str) -> Measured:
    """The training step that ``FILE.jsonl`` or its line ``FILE.jsonl:N`` (from 1) holds.

    Raises:
        UserError: if the file cannot be read, the line is none of a training step, or several are and none is named.
    """
    name, colon, number = place.rpartition(":")
    path = Path(name if colon and number.isdigit() else place)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"--row {place} cannot be read: {reason}; name a file of benchmarks/train_step.py") from error
    if colon and number.isdigit():
        require(1 <= int(number) <= len(lines), f"--row {place}: {path} has {len(lines)} lines; choose one of them")
        return _measured(_parse(path, int(number), lines[int(number) - 1]), f"{path}:{number}")
    rows = {n: _parse(path, n, line) for n, line in enumerate(lines, 1) if line.strip()}
    steps = {n: row for n, row in rows.items() if row.get("benchmark") == "train_step"}
    require(bool(steps), f"--row {place} holds no row of benchmarks/train_step.py")
    if len(steps) > 1:
        choices = ", ".join(f":{n} {_title(row)}" for n, row in steps.items())
        raise UserError(f"--row {place} holds {len(steps)} training steps; add the number of one: {choices}")
    ((n, row),) = steps.items()
    return _measured(row, f"{path}:{n}")


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"--row: line {number} of {path} is no JSON ({error}); name a JSONL file") from error
    require(isinstance(row, dict), f"--row: line {number} of {path} is no JSON object; name a file of a benchmark")
    return row


def _title(row: dict[str, Any]) -> str:
    words = [row.get("model"), row.get("precision"), f"batch {row.get('batch')}", row.get("backend")]
    return " ".join(str(word) for word in words) + ("+compile" if row.get("compiled") else "")


def _measured(row: dict[str, Any], place: str) -> Measured:
    require(
        row.get("benchmark") == "train_step",
        f"--row {place} is of the benchmark {row.get('benchmark')!r}; choose a row of train_step",
    )
    missing = [name for name in _FIELDS if name not in row]
    require(not missing, f"--row {place} lacks {', '.join(missing)}; measure it again with benchmarks/train_step.py")
    require(
        row["precision"] in ("fp32", "bf16"),
        f"--row {place} is in {row['precision']}, which training does not offer; choose a row in fp32 or bf16",
    )
    environment = row.get("environment", {})
    device = environment.get("gpu") or f"{environment.get('cpu', 'unknown CPU')}, {row.get('threads', '?')} thread(s)"
    return Measured(
        model=row["model"],
        overrides={
            name: ast.literal_eval(value) for name, value in (word.split("=", 1) for word in row.get("override", []))
        },
        precision=row["precision"],
        batch=row["batch"],
        images_per_second=row["images_per_second"],
        source=f"{_title(row)} on {device} ({place}, measured)",
        memory_bandwidth=row.get("ceilings", {}).get("copy_bytes_per_second"),
    )
