"""Rows of measurements: JSON lines that are only ever appended, each with where it comes from."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks import origin
from sgmim_fast.errors import UserError

Row = dict[str, Any]


class Rows:
    """Appends rows to a JSONL file, each with the environment it was measured in; one is on the disk when it is told.

    On a GPU a row also says which clocks were seen since the one before.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.environment: dict[str, Any] = origin.describe(device)
        self.clocks: origin.ClockWatch | None = None
        if device.type == "cuda":
            self.clocks = origin.ClockWatch(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def append(self, row: Mapping[str, Any]) -> None:
        seen = {"clocks_seen": self.clocks.seen()} if self.clocks else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**row, "environment": self.environment | seen}) + "\n"
        with self.path.open("a+b") as file:
            _drop_cut_line(file)
            file.write(line.encode())

    def finished(self, keys: Iterable[str]) -> set[tuple[Any, ...]]:
        """Values of ``keys`` in the rows that this file has of the same sources, device and versions already.

        What was wrong is not finished.
        """
        keys = tuple(keys)
        same = [
            row for row in read(self.path) if alike(row["environment"], self.environment) and row.get("correct", True)
        ]
        return {key_of(row, keys) for row in same if set(keys) <= row.keys()}


def _drop_cut_line(file: BinaryIO) -> None:
    """A writer that was killed may have left half a row, which is none."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two environments measure the same code on the same kind of machine."""
    return all(one.get(key) == other.get(key) for key in ("sources", "gpu", "cpu", "torch", "triton"))


def key_of(row: Mapping[str, Any], keys: Iterable[str]) -> tuple[Any, ...]:
    return tuple(json.dumps(row.get(key)) for key in keys)


def read(path: Path) -> list[Row]:
    """All rows of a file, none if there is no file; a last line that was cut off is left out.

    Raises:
        UserError: if another line is not a row.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not a row of JSON ({error}); delete this line") from error
        if not isinstance(row, dict) or not isinstance(row.get("environment"), dict):
            raise UserError(f"{path}:{number} is not a row of a benchmark: it has no environment; delete this line")
        found.append(row)
    return found


def newest(rows: Iterable[Row], keys: Iterable[str]) -> list[Row]:
    """Of the rows that share the values of ``keys`` the last; in the order of their first."""
    keys = tuple(keys)
    return list({key_of(row, keys): row for row in rows}.values())
