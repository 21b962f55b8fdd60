"""The files of a folder of made structure maps: 16-bit PNGs that say who made them, and lists of failures."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from sgmim_fast.errors import UserError

_MINIMUM, _MAXIMUM, _ESTIMATOR = "sgmim:minimum", "sgmim:maximum", "sgmim:estimator"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_HEAD = 1024  # our text chunks lie in the first bytes of a map
_COMPRESSION = 3  # of 0 to 9; a depth map gets little smaller beyond


def map_path(out: Path, name: str) -> Path:
    """OUT/n01/x.png for n01/x.jpg."""
    return out / f"{os.path.splitext(name)[0]}.png"


def maker(path: Path) -> str | None:
    """The fingerprint that ``write_map`` left in a map; None where there is no map or one cut short.

    Raises:
        UserError: if a complete picture of somebody else's lies there.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(_PNG_END)))
            complete = head.startswith(_PNG_START) and file.read() == _PNG_END
    except FileNotFoundError:
        return None
    if not complete:
        return None
    _, mark, rest = head.partition(f"{_ESTIMATOR}\0".encode())
    if not mark:
        raise UserError(f"{path} was not made by this command; choose another OUT, or --overwrite to replace it")
    return rest[:16].decode("latin-1")


def write_map(path: Path, values: np.ndarray, minimum: float, maximum: float, identity: str) -> None:
    """Write a map with its notes, in a folder made for it if need be.

    Args:
        values: (H, W) uint16.
        minimum, maximum: of the prediction, in the model's own unit.
        identity: 16 characters that name the estimator.
    """
    notes = PngImagePlugin.PngInfo()
    for key, text in ((_ESTIMATOR, identity), (_MINIMUM, repr(minimum)), (_MAXIMUM, repr(maximum))):
        notes.add_text(key, text)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", pnginfo=notes, compress_level=_COMPRESSION)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then move it to its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, facts: Mapping[str, object]) -> None:
    _write(path, (json.dumps(facts, indent=2) + "\n").encode())


def failures_name(rank: int, world_size: int) -> str:
    return "failures.jsonl" if world_size == 1 else f"failures-{rank}-of-{world_size}.jsonl"


def remove_failures(out: Path, world_size: int) -> None:
    """Lists of calls with another number of ranks; this call's ranks look after their own."""
    current = {failures_name(rank, world_size) for rank in range(world_size)}
    for path in (*out.glob("failures.jsonl"), *out.glob("failures-*-of-*.jsonl")):
        if path.name not in current:
            path.unlink(missing_ok=True)


def write_failures(path: Path, failures: dict[str, str]) -> Path | None:
    """One JSON object a line: image, reason. Returns the file, or None (and removes an older one) without failures."""
    if not failures:
        path.unlink(missing_ok=True)
        return None
    lines = (json.dumps({"image": name, "reason": reason}) + "\n" for name, reason in sorted(failures.items()))
    _write(path, "".join(lines).encode())
    return path
