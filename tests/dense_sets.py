"""Tiny data sets in the true layouts of KITTI, NYU-v2, ADE20K, `sgmim synth` and people's own folders.

Every image's green channel holds its index. Depth rises from the left to the right; labels are stripes.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgmim_fast.config import DepthDataConfig, SegmentationDataConfig
from sgmim_fast.data.dense.folders import Split
from sgmim_fast.data.dense.opening import open_depth, open_labels
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.data.scenes.synthetic import render_dataset

KITTI_SIZE = (370, 1226)
"""(height, width) of the true images of one drive."""
NYU_SIZE = (480, 640)
ADE_SIZE = (96, 128)
OWN_SIZE = (64, 96)
CLASSES = 4
"""Of ADE20K's true 150, as many as the tiny set uses, and of the own folder."""


def picture(index: int, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: red rises to the right, green is the index, blue rises downwards."""
    height, width = size
    red = np.broadcast_to(np.linspace(0, 255, width), size)
    blue = np.broadcast_to(np.linspace(0, 255, height)[:, None], size)
    return np.stack([red, np.full(size, index), blue], -1).astype(np.uint8)


def ramp(size: tuple[int, int], near: float, far: float) -> np.ndarray:
    """Metres, (H, W): ``near`` at the left, ``far`` at the right."""
    return np.broadcast_to(np.linspace(near, far, size[1]), size).copy()


def stripes(size: tuple[int, int], classes: int = CLASSES) -> np.ndarray:
    """Class indices, (H, W) uint8: equal stripes from the left to the right."""
    return np.broadcast_to(np.arange(size[1]) * classes // size[1], size).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    """A picture, in the folder it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def kitti_depth(size: tuple[int, int] = KITTI_SIZE) -> np.ndarray:
    """Sparse metres as a laser measures them: a ramp of 4 to 70 m, two rows of three without a value."""
    metres = ramp(size, 4, 70)
    metres[np.arange(size[0]) % 3 != 0] = 0
    return metres


def write_kitti(root: Path, train: int = 6, val: int = 3, layout: str = "mim") -> Path:
    """KITTI with the Eigen split; one more line of the evaluation list has no ground truth.

    Args:
        layout: "mim" as MIM-Depth-Estimation has it (raw_data/, data_depth_annotated/ with train/ and val/), "bts"
            (drives in the folder itself, maps in data_depth_annotated/), "input" (input/, gt_depth/).
    """
    images, maps = {"mim": ("raw_data", ""), "bts": (".", ""), "input": ("input", "gt_depth")}[layout]
    for split, count, first in (("train", train, 0), ("test", val, train)):
        lines = []
        for index in range(first, first + count):
            drive, frame = f"2011_09_26_drive_{index % 2 + 1:04d}_sync", f"{index:010d}.png"
            image = f"2011_09_26/{drive}/image_02/data/{frame}"
            depth = f"{drive}/proj_depth/groundtruth/image_02/{frame}"
            below = maps or ("data_depth_annotated" + (f"/{('train', 'val')[index % 2]}" if layout == "mim" else ""))
            save(root / images / image, picture(index, KITTI_SIZE))
            save(root / below / depth, np.rint(kitti_depth() * 256).astype(np.uint16))
            mim = f"/{images}/{image} /{below}/{depth}"
            lines.append(mim if layout == "mim" else f"{image} {depth} 721.5377")
        if split == "test":
            lines.append("2011_09_26/2011_09_26_drive_0009_sync/image_02/data/0000000001.png None 721.5377")
        name = f"{split}_list.txt" if layout == "mim" else f"eigen_{split}_files_with_gt.txt"
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def write_nyu(root: Path, train: int = 6, val: int = 3, size: tuple[int, int] = NYU_SIZE) -> Path:
    """NYU-v2 as BTS has it: sync/ to train on, official_splits/test/ to evaluate on, with BTS's lists."""
    stored = np.rint(ramp(size, 0.8, 6) * 1000).astype(np.uint16)
    stored[:8] = 0  # as the border of the registered maps
    for split, count, scene, folder in (
        ("train", train, "kitchen_0028b", "sync"),
        ("test", val, "bathroom", "official_splits/test"),
    ):
        lines = []
        for index in range(count):
            image, depth = f"{scene}/rgb_{index:05d}.jpg", f"{scene}/sync_depth_{index:05d}.png"
            save(root / folder / image, picture(index, size))
            save(root / folder / depth, stored)
            lines.append(f"/{image} /{depth} 518.8579" if split == "train" else f"{image} {depth} 518.8579")
        (root / f"nyudepthv2_{split}_files_with_gt.txt").write_text("\n".join(lines) + "\n")
    return root


def write_ade20k(root: Path, train: int = 6, val: int = 3, size: tuple[int, int] = ADE_SIZE) -> Path:
    """ADEChallengeData2016 with stripes of classes 1 to 4, and label 0 in the upper rows."""
    stored = stripes(size) + np.uint8(1)
    stored[:4] = 0
    for split, short, count in (("training", "train", train), ("validation", "val", val)):
        for index in range(count):
            name = f"ADE_{short}_{index + 1:08d}"
            save(root / f"images/{split}/{name}.jpg", picture(index, size))
            save(root / f"annotations/{split}/{name}.png", stored)
    return root


def write_scenes(root: Path, count: int = 12, size: int = 64) -> Path:
    """What `sgmim synth` writes."""
    return render_dataset(root, count=count, size=size, workers=1)


def write_own_depth(root: Path, count: int = 11, size: tuple[int, int] = OWN_SIZE, scale: float = 1000) -> Path:
    """images/ and depth/ of 16-bit PNG, 1 to 9 metres, ``scale`` stored units a metre."""
    for index in range(count):
        save(root / f"images/{index:02d}.png", picture(index, size))
        save(root / f"depth/{index:02d}.png", np.rint(ramp(size, 1, 9) * scale).astype(np.uint16))
    return root


def write_own_labels(root: Path, count: int = 11, size: tuple[int, int] = OWN_SIZE) -> Path:
    """images/ and labels/ of 8-bit PNG: stripes of four classes, and 255 in the upper rows."""
    stored = stripes(size).copy()
    stored[:4] = 255
    for index in range(count):
        save(root / f"images/{index:02d}.png", picture(index, size))
        save(root / f"labels/{index:02d}.png", stored)
    return root


def write_every_kind(root: Path) -> Path:
    """A small set of each kind, in a folder of its name; the folder of all."""
    write_kitti(root / "kitti")
    write_nyu(root / "nyu", size=(48, 64))
    write_ade20k(root / "ade20k")
    write_scenes(root / "scenes")
    write_own_depth(root / "depth")
    write_own_labels(root / "labels")
    return root


def depth(
    root: Path, split: Split = "train", dataset: str = "folder", max_depth: float = 10, **fields: Any
) -> DenseSamples:
    own = {"depth_scale": 1000, "crop_size": (32, 32)} if dataset == "folder" else {}
    config = DepthDataConfig(dataset=dataset, path=str(root), **{**own, **fields})  # type: ignore[arg-type]
    return open_depth(config, split, max_depth=max_depth)


def labels(
    root: Path, split: Split = "train", dataset: str = "folder", classes: int = CLASSES, **fields: Any
) -> DenseSamples:
    config = SegmentationDataConfig(dataset=dataset, path=str(root), **fields)  # type: ignore[arg-type]
    return open_labels(config, split, classes=classes)
