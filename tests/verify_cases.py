"""Pairs to verify, and the ways in which they can be bad."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgmim_fast.data.verification.verify import Summary
from sgmim_fast.errors import UserError

H, W = 40, 56


def pixels(seed: int, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def depth(seed: int, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, (height, width)).astype(np.uint16)


def write_pair(root: Path, name: str, seed: int, *, size: tuple[int, int] = (H, W)) -> tuple[Path, Path]:
    image, structure = root / f"images/{name}.jpg", root / f"structure/{name}.png"
    for path in (image, structure):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, *size)).save(image)
    Image.fromarray(depth(seed, *size)).save(structure)
    return image, structure


def write_pairs(root: Path, count: int) -> Path:
    for seed in range(count):
        write_pair(root, f"{seed:03d}", seed)
    return root


def quarantined(summary: Summary) -> dict[str, dict[str, str]]:
    """Image -> its line in the quarantine list."""
    return {record["image"]: record for record in map(json.loads, summary.quarantine.read_text().splitlines())}


def one_line(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def npy(structure: Path, values: np.ndarray) -> None:
    structure.unlink()
    np.save(structure.with_suffix(".npy"), values)


def with_nan() -> np.ndarray:
    values = depth(0).astype(np.float32)
    values[3, 4] = np.nan
    return values


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.jpg")


def float_tiff(structure: Path, values: np.ndarray) -> None:
    structure.unlink()
    Image.fromarray(values).save(structure.with_suffix(".tif"))


def swap(first: Path, second: Path) -> None:
    between = first.with_suffix(".between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


# name -> what is done to a good pair's files, the kind of reason, a word of the reason
BAD: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "image-cut": (lambda i, s: cut(i), "unreadable", "image-cut.jpg: cannot be read"),
    "map-cut": (lambda i, s: cut(s), "unreadable", "map-cut.png: cannot be read"),
    "image-empty": (
        lambda i, s: i.write_bytes(b""),
        "unreadable",
        "image-empty.jpg: cannot be read (the file is empty)",
    ),
    "map-empty": (lambda i, s: s.write_bytes(b""), "unreadable", "map-empty.png: cannot be read (the file is empty)"),
    "image-garbage": (lambda i, s: i.write_bytes(b"\x07no image" * 99), "unreadable", "no picture of a known format"),
    "map-garbage": (lambda i, s: s.write_bytes(b"\x07no map" * 99), "unreadable", "map-garbage.png: cannot be read"),
    "map-missing": (lambda i, s: s.unlink(), "missing", "map-missing.jpg: its map does not exist"),
    "image-dangling": (
        lambda i, s: dangle(i),
        "missing",
        "image-dangling.jpg: the file does not exist",
    ),
    "map-turned": (
        lambda i, s: Image.fromarray(depth(1, W, H)).save(s),
        "sizes differ",
        "is 56x40 pixels (width x height) but its map",
    ),
    "map-smaller": (lambda i, s: Image.fromarray(depth(1, 39, W)).save(s), "sizes differ", "56x39"),
    "map-colour": (lambda i, s: Image.fromarray(pixels(1)).save(s), "channels", "3 channel(s)"),
    "map-8-bits": (
        lambda i, s: Image.fromarray((depth(1) >> 8).astype(np.uint8)).save(s),
        "other value type",
        "holds uint8 values, but most maps of the data set hold uint16",
    ),
    "map-floats": (
        lambda i, s: npy(s, depth(1).astype(np.float64)),
        "other value type",
        "map-floats.npy: holds float",
    ),
    "map-constant": (
        lambda i, s: Image.fromarray(np.full((H, W), 7, np.uint16)).save(s),
        "constant",
        "map-constant.png: all values are 7",
    ),
    "map-nan-npy": (lambda i, s: npy(s, with_nan()), "not finite", "1 of 2240 values are not finite"),
    "map-nan-tiff": (lambda i, s: float_tiff(s, with_nan()), "not finite", "map-nan-tiff.tif:"),
    "image-small": (
        lambda i, s: write_pair(i.parents[1], i.stem, 1, size=(31, 99)),
        "too small",
        "is 99x31 pixels (width x height) but a side needs 32",
    ),
}
