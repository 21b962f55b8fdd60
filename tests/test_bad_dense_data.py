"""Splits of dense data sets: every kind of bad input is one clear line."""

import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sgmim_fast.config import DepthDataConfig, SegmentationDataConfig
from sgmim_fast.errors import UserError
from tests.dense_sets import (
    OWN_SIZE,
    depth,
    labels,
    picture,
    save,
    write_every_kind,
    write_own_labels,
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, to be copied where it is changed."""
    return write_every_kind(tmp_path_factory.mktemp("dense"))


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    save(file, change(np.asarray(Image.open(file))))


def every(root: Path, pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for file in root.rglob(pattern):
        rewrite(file, change)


def edit_list(root: Path, name: str, change: Callable[[str], str]) -> None:
    (root / name).write_text(change((root / name).read_text()))


TRAIN_NYU = "nyudepthv2_train_files_with_gt.txt"
GROUNDTRUTH = "groundtruth/image_02/*.png"
BAD_DEPTH: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing images": (
        "kitti",
        lambda root: [file.unlink() for file in root.rglob("image_02/data/000000000[23].png")],
        r"train_list\.txt:3: raw_data/.*/0000000002\.png does not exist in any of .*, and 1 other listed files",
    ),
    "missing map": (
        "nyu",
        lambda root: (root / "sync/kitchen_0028b/sync_depth_00004.png").unlink(),
        r"files_with_gt\.txt:5: kitchen_0028b/sync_depth_00004\.png does not exist in any of .*/sync/; correct",
    ),
    "empty list": (
        "nyu",
        lambda root: edit_list(root, TRAIN_NYU, lambda _: "\n# nothing\n"),
        r"gt\.txt lists no images",
    ),
    "one field": (
        "nyu",
        lambda root: edit_list(root, TRAIN_NYU, lambda text: text + "alone.jpg\n"),
        r"gt\.txt:7: expected an image, a map and perhaps a focal length, found 'alone\.jpg'",
    ),
    "no focal length": (
        "nyu",
        lambda root: edit_list(root, TRAIN_NYU, lambda text: text.replace("518.8579", "wide")),
        r"gt\.txt:1: expected an image",
    ),
    "only None": (
        "kitti",
        lambda root: edit_list(root, "train_list.txt", lambda text: "a.png None 7\nb.png None 7\n"),
        r"train_list\.txt names no image with ground truth",
    ),
    "no list": (
        "kitti",
        lambda root: (root / "train_list.txt").unlink(),
        r"--data.train-list is not set, and .* holds none of eigen_train_files_with_gt\.txt, .*the Eigen split of BTS",
    ),
    "millimetres in KITTI": (
        "kitti",
        lambda root: every(root, GROUNDTRUTH, lambda v: np.minimum(v / 256 * 1000, 65535).astype(np.uint16)),
        r"KITTI reaches 5 to 130 m: it looks like value / 1000 \(millimetres\)",
    ),
    "metres in KITTI": (
        "kitti",
        lambda root: every(root, GROUNDTRUTH, lambda v: (v // 256).astype(np.uint16)),
        r"kitti \(train\): depths reach 0\.2695 m .*value / 256 .*KITTI reaches 5 to 130 m: it looks like whole metres",
    ),
    "KITTI's unit in NYU": (
        "nyu",
        lambda root: every(root, "sync_depth*", lambda v: np.rint(v / 1000 * 256).astype(np.uint16)),
        r"depths reach 1\.5.* m .*value / 1000 .*NYU-v2 reaches 2\.7 to 15 m: it looks like value / 256 \(KITTI's\)",
    ),
    "KITTI's unit in NYU, large rooms": (
        "nyu",
        lambda root: every(root, "sync_depth*", lambda v: np.rint(v / v.max() * 9.9 * 256).astype(np.uint16)),
        r"depths reach 2\.5.* m .*value / 1000 .*NYU-v2 reaches 2\.7 to 15 m: it looks like value / 256 \(KITTI's\)",
    ),
    "stretched to 16 bits": (
        "nyu",
        lambda root: every(root, "sync_depth*", lambda v: np.rint(v / 10000 * 65535).astype(np.uint16)),
        r"sync_depth_00000\.png: depths reach 39\.\d+ m .* NYU-v2 reaches",
    ),
    "8 bits": (
        "nyu",
        lambda root: every(root, "sync_depth*", lambda v: (v // 40).astype(np.uint8)),
        r"sync_depth_00000\.png: holds 8 bits a value, too few for depth",
    ),
    "other size": (
        "nyu",
        lambda root: every(root, "sync_depth*", lambda v: v[:-1]),
        r"rgb_00000\.jpg is 64x48 .* its map .*sync_depth_00000\.png is 64x47",
    ),
    "nothing valid": (
        "nyu",
        lambda root: every(root, "sync_depth*", np.zeros_like),
        r"nyu \(train\): \d maps that were looked at hold no valid depth",
    ),
    "three channels": (
        "nyu",
        lambda root: every(root, "sync_depth*", lambda v: picture(0, (48, 64))),
        r"sync_depth_00000\.png: has 3 channels",
    ),
    "small KITTI images": (
        "kitti",
        lambda root: every(root, "*.png", lambda v: v[:351]),
        r"0000000000\.png is 1226x351 pixels \(width x height\), smaller than KITTI's benchmark crop of 1216x352",
    ),
    "unfinished scenes": (
        "scenes",
        lambda root: (root / "metadata.jsonl").unlink(),
        r"scenes is not finished; run the same",
    ),
    "no scenes": ("scenes", lambda root: (root / "dataset.json").unlink(), r"scenes has no dataset\.json"),
    "damaged description": (
        "scenes",
        lambda root: (root / "dataset.json").write_text("{}"),
        r"dataset\.json is damaged",
    ),
    "image without depth": (
        "depth",
        lambda root: (root / "depth/04.png").unlink(),
        r"images/04\.png has no map depth/04 with one of the suffixes",
    ),
    "no depth folder": ("depth", lambda root: shutil.rmtree(root / "depth"), r"depth has no depth/ folder"),
    "metres as millimetres": (
        "depth",
        lambda root: every(root, "depth/*.png", lambda v: (v // 1000).astype(np.uint16)),
        r"depths reach 0\.009 m .*nearer than the task's largest, 10 m, .* it looks like whole metres; correct --data",
    ),
    "no folder": ("depth", shutil.rmtree, r"--data.path .*depth is no folder"),
}


@pytest.mark.parametrize("kind", BAD_DEPTH)
def test_bad_depth_is_one_clear_line(sets: Path, tmp_path: Path, kind: str) -> None:
    name, spoil, message = BAD_DEPTH[kind]
    root = shutil.copytree(sets / name, tmp_path / name)
    dataset = "folder" if name == "depth" else name
    far = 80 if name == "kitti" else 10
    depth(root, "train", dataset, far)
    spoil(root)
    with pytest.raises(UserError, match=message) as caught:
        depth(root, "train", dataset, far)
    assert "\n" not in str(caught.value)


def test_a_largest_depth_that_leaves_nothing_is_refused(sets: Path) -> None:
    message = (
        r"kitti \(train\): 0\.0% of the depths .* nearer than depth.max_depth 2 m, and half of them farther than 3\d"
    )
    with pytest.raises(UserError, match=message):
        depth(sets / "kitti", "train", "kitti", 2)
    assert len(depth(sets / "kitti", "train", "kitti", 10)) == 6  # near depths alone are a task, too


BAD_LABELS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "colours": (
        "labels",
        lambda root: every(root, "labels/*.png", lambda v: np.stack([v] * 3, -1)),
        r"labels/00\.png: holds colours \(RGB\) where class indices are expected",
    ),
    "16 bits": (
        "labels",
        lambda root: every(root, "labels/*.png", lambda v: v.astype(np.uint16)),
        r"labels/00\.png: label maps must be 8-bit",
    ),
    "black and white": (
        "labels",
        lambda root: every(root, "labels/*.png", lambda v: v > 1),
        r"labels/00\.png: label maps must be 8-bit",
    ),
    "no such class": (
        "labels",
        lambda root: every(root, "labels/*.png", lambda v: np.where(v == 2, 7, v).astype(np.uint8)),
        r"labels/00\.png: label 7 at row 4, column 48 is no class; 4 classes are stored as 0\.\.3, and none as 255",
    ),
    "other size": (
        "labels",
        lambda root: every(root, "labels/*.png", lambda v: v.T),
        r"images/00\.png is 96x64 .* its map .*labels/00\.png is 64x96",
    ),
    "no annotations": (
        "ade20k",
        lambda root: shutil.rmtree(root / "annotations/training"),
        r"ade20k has no annotations/training/ folder; give the folder ADEChallengeData2016",
    ),
    "image without labels": (
        "ade20k",
        lambda root: (root / "annotations/training/ADE_train_00000003.png").unlink(),
        r"ADE_train_00000003\.jpg has no map annotations/training/ADE_train_00000003 with one of the suffixes",
    ),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels_are_one_clear_line(sets: Path, tmp_path: Path, kind: str) -> None:
    name, spoil, message = BAD_LABELS[kind]
    root = shutil.copytree(sets / name, tmp_path / name)
    dataset = "folder" if name == "labels" else name
    labels(root, "train", dataset)
    spoil(root)
    with pytest.raises(UserError, match=message) as caught:
        labels(root, "train", dataset)
    assert "\n" not in str(caught.value)


def test_grey_of_four_bits_is_refused(tmp_path: Path) -> None:
    """Pillow would hand out 0, 17, 34, ... for 0, 1, 2, ..."""
    write_own_labels(tmp_path, count=2)
    for file in (tmp_path / "labels").iterdir():
        file.write_bytes(png_of_four_bits(np.zeros(OWN_SIZE, np.uint8) + 1))
    with pytest.raises(UserError, match=r"label maps must be 8-bit grey"):
        labels(tmp_path)


def png_of_four_bits(values: np.ndarray) -> bytes:
    """A grey PNG of 4 bits a pixel, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes((row[::2] << 4) | row[1::2]) for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 4, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_scenes_must_have_the_classes_of_the_task(sets: Path) -> None:
    with pytest.raises(UserError, match=r"scenes has 8 classes \(sky, ground, .*\), not the 7 of the task"):
        labels(sets / "scenes", "train", "scenes", 7)


def test_one_bad_file_of_many_does_not_stop_the_start(sets: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sets / "nyu", tmp_path / "nyu")
    file = root / "sync/kitchen_0028b/rgb_00000.jpg"
    file.write_bytes(file.read_bytes()[:200])
    samples = depth(root, "train", "nyu")
    with pytest.raises(UserError, match=re.escape(str(file)) + ".*cannot be read"):
        samples.decode(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "kiti"}, "data.dataset 'kiti' is unknown; choose one of kitti, nyu, scenes, folder"),
        ({"dataset": "folder", "depth_scale": 1000}, "data.crop_size is not set"),
        ({"dataset": "folder", "crop_size": (32, 32)}, "data.depth_scale is not set"),
        ({"depth_scale": 1000}, "data.depth_scale is for data.dataset folder alone"),
        ({"crop_size": (0, 32)}, "data.crop_size 0 32"),
        ({"gamma": 1.5}, "data.gamma"),
        ({"hue_saturation_value": (181, 0, 0)}, "data.hue_saturation_value"),
        ({"cutdepth": 2}, "data.cutdepth 2"),
        ({"cutdepth_width": 0}, "data.cutdepth_width"),
        ({"workers": -1}, "data.workers"),
        ({"max_bad_share": 1}, "data.max_bad_share"),
    ],
)
def test_depth_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        DepthDataConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "coco"}, "data.dataset 'coco' is unknown; choose one of ade20k, scenes, folder"),
        ({"resize": (512, 2048)}, "data.resize"),
        ({"ratio_range": (2, 1)}, "data.ratio_range"),
        ({"cat_max_ratio": 0}, "data.cat_max_ratio"),
        ({"ignore_index": 256}, "data.ignore_index"),
        ({"crop_size": (32,)}, "data.crop_size 32"),
    ],
)
def test_label_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        SegmentationDataConfig(**fields)


def test_usual_crops_follow_the_data_set() -> None:
    assert DepthDataConfig().crop == (480, 480)
    assert DepthDataConfig(dataset="kitti").crop == (352, 352)
    assert DepthDataConfig(dataset="kitti", crop_size=(352, 704)).crop == (352, 704)
    assert (SegmentationDataConfig().first_label, SegmentationDataConfig(dataset="folder").first_label) == (1, 0)
