"""Data sets of pairs whose pixels tell where they came from, and what tests of loaders share."""

import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sgmim_fast.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from sgmim_fast.data import augment
from sgmim_fast.data.batches import Batch, Loader
from sgmim_fast.data.loading import build_loader
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.order import Place

SIZE = (64, 96)
PAIRS = 11
HEIGHT, WIDTH = 110, 150


def gradient(index: int = 0) -> np.ndarray:
    """An RGB image whose red channel has a slope of 0.6 a column and 0.7 a row, moved by the index."""
    red = 0.6 * np.arange(WIDTH)[None, :] + 0.7 * np.arange(HEIGHT)[:, None] + 5 * index
    return np.stack([np.rint(red), np.full_like(red, index), np.full_like(red, 128)], -1).astype(np.uint8)


def write_pairs(root: Path, count: int = PAIRS) -> Path:
    """Pairs whose 16-bit map holds the red channel of the image, times 256; green holds the index."""
    (root / "images").mkdir(parents=True)
    (root / "structure").mkdir()
    for index in range(count):
        image = gradient(index)
        Image.fromarray(image).save(root / f"images/{index:02d}.png")
        Image.fromarray(image[..., 0].astype(np.uint16) * 256).save(root / f"structure/{index:02d}.png")
    return root


def settings(
    loader: str = "torch", *, workers: int = 0, batch: int = 2, accumulation: int = 1, bad: float = 0.0, **model: Any
) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(**{"image_size": SIZE, **model}),
        data=DataConfig(workers=workers, loader=loader, max_bad_share=bad),  # type: ignore[arg-type]
        train=TrainConfig(batch_size=batch, accumulation_steps=accumulation, seed=5),
    )


def load(pairs: Pairs, config: PretrainConfig, rank: int = 0, world_size: int = 1, **options: Any) -> Loader:
    return build_loader(pairs, config, rank=rank, world_size=world_size, **options)


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(islice(loader, count))


def at_step(loader: Loader, step: int) -> Place:
    return loader.order.advance(Place(), step)


def assert_same(first: Batch, second: Batch) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def red_of(image: torch.Tensor) -> torch.Tensor:
    """Red channel of a normalised image, back in 0..255."""
    return (image[..., 0, :, :] * augment.IMAGENET_STD[0] + augment.IMAGENET_MEAN[0]) * 255


def green_of(image: torch.Tensor) -> torch.Tensor:
    """The indices that the pictures of a batch hold, (B,)."""
    return ((image[:, 1] * augment.IMAGENET_STD[1] + augment.IMAGENET_MEAN[1]) * 255).mean((1, 2)).round().long()


def copy_links(root: Path, target: Path) -> None:
    for folder in ("images", "structure"):
        (target / folder).mkdir(parents=True)
        for file in (root / folder).iterdir():
            (target / folder / file.name).symlink_to(file)


def break_pair(target: Path, kind: str) -> str:
    """Breaks pair 03 of a set of links; returns what the message must match."""
    image, depth = target / "images/03.png", target / "structure/03.png"
    if kind in ("missing", "empty", "truncated", "garbage"):
        data = image.read_bytes()
        image.unlink()
        if kind == "missing":
            return re.escape(str(image)) + ": the file does not exist"
        image.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "garbage": bytes(range(200)) * 3}[kind])
        return re.escape(str(image)) + ".*cannot be read"
    if kind == "truncated map":
        data = depth.read_bytes()
        depth.unlink()
        depth.write_bytes(data[: len(data) // 2])
        return re.escape(str(depth)) + ".*cannot be read"
    depth.unlink()
    if kind == "nan":
        np.save(depth.with_suffix(".npy"), np.full((HEIGHT, WIDTH), np.nan))
        return re.escape(str(depth.with_suffix(".npy")))
    if kind == "small map":
        Image.fromarray(np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)).save(depth)
        return re.escape(str(image)) + " is 150x110 .*" + re.escape(str(depth)) + " is 75x55: they do not show"
    if kind == "three channels":
        Image.fromarray(gradient(3)).save(depth)
        return re.escape(str(depth)) + ": the map has 3 channel"
    assert kind == "turned"
    exif = Image.Exif()
    exif[274] = 6
    image.unlink()
    Image.fromarray(gradient(3)).save(image, exif=exif)
    Image.fromarray(np.zeros((WIDTH, HEIGHT), np.uint8)).save(depth)
    return "150x110 .* is 110x150: the image's EXIF orientation"


BREAKAGES = (
    "missing",
    "empty",
    "truncated",
    "garbage",
    "truncated map",
    "nan",
    "small map",
    "three channels",
    "turned",
)
