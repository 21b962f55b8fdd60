"""Rows of steps that a resumed run does again are moved aside, so that a file of rows has each step once."""

import json
import os
from pathlib import Path

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


def superseded(name: str) -> str:
    """The file for rows of steps that were done again, and lines that a killed run left half-written; only ever
    appended to."""
    return name.replace(".jsonl", ".superseded.jsonl")


def has_row(run: Path, step: int, name: str) -> bool:
    """Whether a file holds a row of ``step``."""
    path = run / name
    return path.is_file() and any(_step_of(line) == step for line in path.read_bytes().split(b"\n"))


def rewind_rows(run: Path, step: int, name: str) -> int:
    """Leave in a file one row of each step up to ``step``; append every other line to the superseded ones.

    Of a step that is there twice the later row stays. The file is replaced by rename, after its other lines are safe,
    and not touched if nothing is to be moved. Whenever it is interrupted, the next call ends what it began.

    Args:
        run: the run's folder.
        step: optimizer steps of the checkpoint that the run goes on from.
        name: of the file.

    Returns:
        Lines that were moved.
    """
    path = run / name
    if not path.is_file():
        return 0
    content = path.read_bytes()
    lines = [line for line in content.split(b"\n") if line.strip()]
    found = ((_step_of(line), number) for number, line in enumerate(lines))
    stay = set({of: number for of, number in found if of is not None and of <= step}.values())  # the last of each step
    kept = [line for number, line in enumerate(lines) if number in stay]
    moved = [line for number, line in enumerate(lines) if number not in stay]
    after = _joined(kept)
    if after == content:
        return 0
    if moved:
        _append(run / superseded(name), _joined(moved))
    temporary = run / (name + ".new")
    with temporary.open("wb") as file:
        _write(file.fileno(), after)
    os.replace(temporary, path)
    return len(moved)


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _step_of(line: bytes) -> int | None:
    """The step that a row is of; None if the line is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


def _append(path: Path, lines: bytes) -> None:
    there = path.read_bytes() if path.is_file() else b""
    if there.endswith(lines):  # an interrupted call had come so far
        return
    gap = b"" if not there or there.endswith(b"\n") else b"\n"
    with path.open("ab") as file:
        _write(file.fileno(), gap + lines)


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
    os.fsync(file)
