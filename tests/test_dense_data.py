"""Splits of dense data sets: the layouts people have, units and sizes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgmim_fast.data.scenes.scene import render_scene
from sgmim_fast.errors import UserError
from tests.dense_sets import (
    ADE_SIZE,
    KITTI_SIZE,
    OWN_SIZE,
    depth,
    kitti_depth,
    labels,
    picture,
    ramp,
    stripes,
    write_ade20k,
    write_every_kind,
    write_kitti,
    write_own_depth,
    write_own_labels,
)

KITTI_CROP = (slice(18, 370), slice(5, 1221))
"""Of the 370 x 1226 images: the lowest 352 rows, the central 1216 columns."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind."""
    return write_every_kind(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("layout", ["mim", "bts", "input"])
def test_kitti_in_metres_cut_as_the_benchmark_cuts(tmp_path: Path, layout: str) -> None:
    write_kitti(tmp_path, train=2, val=2, layout=layout)
    train, val = depth(tmp_path, "train", "kitti", 80), depth(tmp_path, "val", "kitti", 80)
    assert (len(train), len(val)) == (2, 2)
    assert "1 listed without ground truth left out" in val.describe()
    assert "left out" not in train.describe()
    for first, samples in ((0, train), (2, val)):
        for index in range(2):
            pixels, metres, size = samples.decode(index)
            assert size == KITTI_SIZE
            assert np.array_equal(pixels, picture(first + index, KITTI_SIZE)[KITTI_CROP])
            expected = np.rint(kitti_depth()[KITTI_CROP] * 256) / 256
            assert metres.dtype == np.float32
            assert np.array_equal(metres, expected.astype(np.float32))
    assert train.name(1).endswith("2011_09_26_drive_0002_sync/image_02/data/0000000001")
    assert train.sha256 != val.sha256


def test_nyu_in_metres(sets: Path) -> None:
    train, val = depth(sets / "nyu", "train", "nyu"), depth(sets / "nyu", "val", "nyu")
    assert (len(train), len(val)) == (6, 3)
    assert train.name(0) == "sync/kitchen_0028b/rgb_00000"
    assert val.name(2) == "official_splits/test/bathroom/rgb_00002"
    pixels, metres, size = val.decode(1)
    assert size == metres.shape == pixels.shape[:2] == (48, 64)
    assert np.abs(metres[8:] - ramp((40, 64), 0.8, 6)).max() < 0.0006
    assert not metres[:8].any()


def test_ade20k_counts_its_classes_from_one(sets: Path) -> None:
    train, val = labels(sets / "ade20k", "train", "ade20k"), labels(sets / "ade20k", "val", "ade20k")
    assert (len(train), len(val)) == (6, 3)
    found = val.decode(0).target
    assert (found[:4] == 255).all()
    assert np.array_equal(found[4:], stripes(ADE_SIZE)[4:])
    with pytest.raises(
        UserError, match=r"ADE_train_\d+\.png: label 4 at row 4, column 96 is no class; 4 classes .* 0\.\.3, .*255"
    ):
        labels(sets / "ade20k", "train", "ade20k", reduce_zero_label=False)
    assert len(labels(sets / "ade20k", "train", "ade20k", reduce_zero_label=False, classes=5)) == 6


def test_ade20k_names_its_classes(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path / "ade20k")
    assert labels(root, "val", "ade20k").class_names is None
    rows = ["1\t0.1576\t11664\t1172\t1\twall", "2\t0.1072\t6046\t612\t1\tbuilding, edifice"]
    rows += [f"{number}\t0.01\t9\t9\t0\tthing {number}" for number in (3, 4)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    assert labels(root, "val", "ade20k").class_names == ("wall", "building", "thing 3", "thing 4")
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tName", *rows[:3]]))
    assert labels(root, "val", "ade20k").class_names is None


def test_scenes_have_metric_depth_and_named_classes(sets: Path) -> None:
    train, val = depth(sets / "scenes", "train", "scenes", 80), depth(sets / "scenes", "val", "scenes", 80)
    assert [samples.name(0) for samples in (train, val)] == ["images/000000", "images/000010"]
    assert (len(train), len(val)) == (10, 2)
    for index in range(10):
        scene, metres = render_scene(0, index, 64), train.decode(index).target
        assert np.array_equal(metres == 0, scene.inverse_depth == 0)
        solid = metres > 0
        assert np.abs(65535 * 0.25 / metres[solid] - scene.inverse_depth[solid]).max() < 1e-2
        assert np.array_equal(labels(sets / "scenes", "train", "scenes", 8).decode(index).target, scene.labels)
    assert (labels(sets / "scenes", "val", "scenes", 8).class_names or ())[:2] == ("sky", "ground")


def test_a_folder_keeps_its_last_tenth_for_evaluation(sets: Path) -> None:
    train, val = depth(sets / "depth", "train"), depth(sets / "depth", "val")
    names = [samples.name(i) for samples in (train, val) for i in range(len(samples))]
    assert names == [f"images/{i:02d}" for i in range(11)]
    assert "the last 2 of 11" in val.describe()
    assert np.abs(train.decode(3).target - ramp(OWN_SIZE, 1, 9)).max() < 0.0006
    ignored = labels(sets / "labels", "val").decode(0).target
    assert (ignored[:4] == 255).all()
    assert np.array_equal(ignored[4:], stripes(OWN_SIZE)[4:])


def test_a_folder_split_by_subfolders_or_by_lists(tmp_path: Path) -> None:
    write_own_depth(tmp_path / "parts" / "train", count=3)
    write_own_depth(tmp_path / "parts" / "val", count=2)
    root = tmp_path / "set"
    for split in ("train", "val"):
        for kind in ("images", "depth"):
            shutil.copytree(tmp_path / "parts" / split / kind, root / kind / split)
    assert [len(depth(root, "train")), len(depth(root, "val"))] == [3, 2]
    assert depth(root, "val").name(1) == "images/val/01"
    (tmp_path / "a.txt").write_text(
        "# picked\nimages/val/01.png\tdepth/val/01.png\n\nimages/train/00.png depth/train/00.png\n"
    )
    (tmp_path / "b.txt").write_text(f"{root}/images/train/02.png {root}/depth/train/02.png\n")
    lists = {"train_list": str(tmp_path / "a.txt"), "val_list": str(tmp_path / "b.txt")}
    train = depth(root, "train", **lists)
    assert [train.name(i) for i in range(2)] == ["images/val/01", "images/train/00"], "the order of the list"
    assert depth(root, "val", **lists).members(0)[0].path == f"{root}/images/train/02.png"
    with pytest.raises(UserError, match=r"--data.train-list is given but --data.val-list is not"):
        depth(root, "val", train_list=lists["train_list"])
    shutil.rmtree(root / "images/val")
    with pytest.raises(UserError, match=r"images has a folder train but none named val"):
        depth(root, "val")


@pytest.mark.parametrize("suffix", [".npy", ".tiff"])
def test_float_depth_may_have_holes(tmp_path: Path, suffix: str) -> None:
    write_own_depth(tmp_path, count=3)
    shutil.rmtree(tmp_path / "depth")
    (tmp_path / "depth").mkdir()
    metres = ramp(OWN_SIZE, 1, 9).astype(np.float32)
    metres[0, :4] = np.nan, np.inf, -np.inf, -3
    for index in range(3):
        file = tmp_path / f"depth/{index:02d}{suffix}"
        np.save(file, metres) if suffix == ".npy" else Image.fromarray(metres).save(file)
    found = depth(tmp_path, "val", depth_scale=1).decode(0).target
    assert (found[0, :4] == 0).all()
    assert np.array_equal(found[1:], metres[1:])


def test_palette_labels_are_their_indices(tmp_path: Path) -> None:
    write_own_labels(tmp_path, count=2)
    for file in sorted((tmp_path / "labels").iterdir()):
        painted = Image.open(file).copy()
        painted.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, 200, 200, 10])
        assert painted.mode == "P"
        painted.save(file)
    assert np.array_equal(labels(tmp_path, "val").decode(0).target[4:], stripes(OWN_SIZE)[4:])
