"""What loaders are measured on: photograph-like pairs, the same in every run, or a part of a data set of the user's."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image

from sgmim_fast.data.members import PairMembers, Pairs
from sgmim_fast.data.sources import open_pairs

KINDS = {"png": ".png", "jp2": ".jp2", "tiff": ".tif", "npy": ".npy"}
"""Kinds of maps, and their suffixes: 16-bit PNG, lossless 16-bit JPEG 2000, float32 TIFF, float32 NPY."""
QUALITY = 90  # of the JPEG images
GRAIN = 20.0  # noise of images, in 8-bit levels; makes files as large as those of photographs of this size
TREMOR = 5e-4  # noise of maps, where 1 is their range


def write_pairs(
    root: Path, count: int, size: tuple[int, int], kinds: Sequence[str], progress: Callable[[], None] = lambda: None
) -> dict[str, Path]:
    """A folder of pairs for each kind of map, all with the same images and depths.

    Args:
        size: width and height in pixels.
        progress: called after each pair.
    """
    folders = {kind: root / kind for kind in kinds}
    (root / "images").mkdir(parents=True)
    for folder in folders.values():
        (folder / "structure").mkdir(parents=True)
        (folder / "images").symlink_to(root / "images", target_is_directory=True)

    def write(index: int) -> None:
        rng = np.random.default_rng(index)
        photograph(rng, *size).save(root / f"images/{index:06d}.jpg", quality=QUALITY)
        depth = smooth_depth(rng, *size)
        for kind, folder in folders.items():
            save_map(depth, folder / f"structure/{index:06d}{KINDS[kind]}")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in as_completed([pool.submit(write, index) for index in range(count)]):
            done.result()
            progress()
    return folders


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft shapes, and grain as of a sensor."""
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = GRAIN * rng.standard_normal((height, width, 3), dtype=np.float32)
    return Image.fromarray((soft + grain).round().clip(0, 255).astype(np.uint8))


def smooth_depth(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A slowly varying map with little noise, (height, width) float32 within 0..1."""
    coarse = Image.fromarray(rng.random((6, 8), dtype=np.float32))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noise = TREMOR * rng.standard_normal((height, width), dtype=np.float32)
    return (0.1 + 0.8 * smooth + noise).clip(0, 1)


def save_map(depth: np.ndarray, path: Path) -> None:
    """In the kind that the suffix stands for."""
    if path.suffix == ".npy":
        np.save(path, depth)
    elif path.suffix == ".tif":
        Image.fromarray(depth).save(path)
    else:
        Image.fromarray(np.rint(depth * 65535).astype(np.uint16)).save(path)


class Part:
    """Some pairs of a data set, spread evenly over it and in its order; all where it has no more."""

    shard_sizes: tuple[int, ...] | None = None  # where each pair is decides about its reading, not about the order

    def __init__(self, whole: Pairs, count: int) -> None:
        self._whole = whole
        self._rows = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int).tolist()

    @property
    def sha256(self) -> str:
        return self._whole.sha256

    def __len__(self) -> int:
        return len(self._rows)

    def members(self, index: int) -> PairMembers:
        return self._whole.members(self._rows[index])


def open_part(path: str | os.PathLike[str], count: int) -> Part:
    """At most so many pairs of whatever ``open_pairs`` opens."""
    return Part(open_pairs(path), count)


def warm(pairs: Pairs) -> tuple[float, float]:
    """Read every file once, so that all later reads are served from memory. Mean bytes of an image and of a map."""
    sizes = [
        [len(member.read().data) if member else 0 for member in pairs.members(index)] for index in range(len(pairs))
    ]
    image, structure = np.mean(sizes, axis=0).tolist()
    return image, structure
