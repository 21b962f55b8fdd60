"""Batches of dense tasks: pairing, augmentation, determinism, resuming, processes; and whole images to evaluate on."""

import colorsys
import multiprocessing
import os
import shutil
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sgmim_fast.config import DepthDataConfig, SegmentationDataConfig
from sgmim_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.dense import colors, crops
from sgmim_fast.data.dense.evaluation import evaluation_samples, read_picture
from sgmim_fast.data.dense.opening import open_depth, open_labels
from sgmim_fast.data.dense.samples import DenseSamples
from sgmim_fast.data.dense.training import DenseKey, DepthTraining, LabelTraining, build_dense_loader, dense_order
from sgmim_fast.data.order import Place
from sgmim_fast.data.substitution import BadSample
from sgmim_fast.errors import UserError
from tests.dense_sets import (
    CLASSES,
    KITTI_SIZE,
    OWN_SIZE,
    picture,
    ramp,
    save,
    stripes,
    write_kitti,
    write_own_depth,
    write_own_labels,
)
from tests.pair_sets import assert_same, at_step, take

MAX_DEPTH = 10.0
PLAIN: dict[str, Any] = {
    "brightness_contrast": 0.0,
    "gamma": 0.0,
    "hue_saturation_value": (0.0, 0.0, 0.0),
    "cutdepth": 0.0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    write_own_depth(root / "depth", 22)
    write_own_labels(root / "labels", 22)
    return root


def depth_config(root: Path, **fields: Any) -> DepthDataConfig:
    usual = {"crop_size": (48, 40), "depth_scale": 1000, "workers": 0, "max_bad_share": 0.0}
    return DepthDataConfig(dataset="folder", path=str(root / "depth"), **{**usual, **fields})


def label_config(root: Path, **fields: Any) -> SegmentationDataConfig:
    usual = {"crop_size": (48, 40), "resize": None, "ratio_range": (1.0, 1.0), "workers": 0, "max_bad_share": 0.0}
    return SegmentationDataConfig(dataset="folder", path=str(root / "labels"), **{**usual, **fields})


def opened(config: DepthDataConfig | SegmentationDataConfig) -> DenseSamples:
    if isinstance(config, DepthDataConfig):
        return open_depth(config, "train", max_depth=MAX_DEPTH)
    return open_labels(config, "train", classes=CLASSES)


def load(
    config: DepthDataConfig | SegmentationDataConfig,
    *,
    batch: int = 3,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 5,
    **options: Any,
) -> Loader:
    samples = opened(config)
    order = dense_order(samples, batch_size=batch, accumulation_steps=accumulation, world_size=world_size, seed=seed)
    return build_dense_loader(samples, config, order, rank=rank, **options)


def levels(image: torch.Tensor) -> torch.Tensor:
    """A normalised image (..., 3, H, W) back in 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image * std + mean) * 255


def test_batch_contract(root: Path) -> None:
    for config, name, shape, kind in (
        (depth_config(root), "depth", (3, 1, 48, 40), torch.float32),
        (label_config(root), "label", (3, 48, 40), torch.int64),
    ):
        (batch,) = take(load(config), 1)
        assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
            "image": ((3, 3, 48, 40), torch.float32),
            name: (shape, kind),
            "index": ((3,), torch.int64),
        }
        assert all(value.is_contiguous() for value in batch.values())


def test_depth_lies_on_its_pixels_and_is_never_interpolated(root: Path) -> None:
    """Red and depth both rise with the column: what is cropped and mirrored alike keeps their relation."""
    mirrored = set()
    stored = torch.from_numpy(np.rint(ramp(OWN_SIZE, 1, 9)[0] * 1000) / 1000).float()
    for batch in take(load(depth_config(root, **PLAIN)), 12):
        pixels = levels(batch["image"])
        column = (batch["depth"][:, 0] - 1) / 8 * (OWN_SIZE[1] - 1)
        assert (pixels[:, 0] - column * 255 / (OWN_SIZE[1] - 1)).abs().max() < 1.05
        assert torch.equal(pixels[:, 1].mean((1, 2)).round().long(), batch["index"])
        assert torch.isin(batch["depth"].unique(), stored).all()
        mirrored |= {bool(row) for row in batch["depth"][:, 0, 0, 0] > batch["depth"][:, 0, 0, -1]}
    assert mirrored == {False, True}
    assert not any(
        bool((batch["depth"][:, 0, 0, 0] > batch["depth"][:, 0, 0, -1]).any())
        for batch in take(load(depth_config(root, flip=False, **PLAIN)), 12)
    )


@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.7, 1.8)])
def test_labels_lie_on_their_pixels_and_are_never_interpolated(root: Path, ratio: tuple[float, float]) -> None:
    for batch in take(load(label_config(root, photometric=False, ratio_range=ratio)), 12):
        shown = levels(batch["image"])[:, 0] / 255 * (OWN_SIZE[1] - 1)  # column of the stored image
        expected = torch.from_numpy(stripes(OWN_SIZE)[0])[shown.round().clamp(0, OWN_SIZE[1] - 1).long()]
        labelled = batch["label"] != 255
        off_edges = ((shown % 24 - 12).abs() < 10) & labelled
        assert torch.equal(batch["label"][off_edges], expected[off_edges].long())
        assert set(batch["label"].unique().tolist()) <= {0, 1, 2, 3, 255}
        assert off_edges.float().mean() > 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_same_batches(root: Path, workers: int) -> None:
    for config in (depth_config(root, workers=workers), label_config(root, workers=workers)):
        whole = take(load(replace(config, workers=0), accumulation=2), 14)
        resumed = load(config, accumulation=2)
        resumed = load(config, accumulation=2, place=at_step(resumed, 3))
        for first, second in zip(whole[6:], take(resumed, 8), strict=True):
            assert_same(first, second)
        assert resumed.order.steps_per_epoch == 3
        assert resumed.order.advance(Place(), 3) == Place(1, 0), "the second epoch is among what was compared"


def test_ranks_see_together_what_one_sees(root: Path) -> None:
    config = depth_config(root)
    whole = take(load(config, batch=4), 6)
    parts = [take(load(config, batch=2, rank=rank, world_size=2), 6) for rank in (0, 1)]
    for step, one in enumerate(whole):
        two = {name: torch.stack([parts[rank][step][name] for rank in (0, 1)], 1).flatten(0, 1) for name in one}
        assert_same(one, two)


def test_epoch_and_seed_decide(root: Path) -> None:
    config = depth_config(root)
    samples = opened(config)
    made = DepthTraining(config, samples.decoder, seed=1, max_depth=MAX_DEPTH)
    key = DenseKey(2, 4, *samples.members(4))
    assert torch.equal(made[key]["image"], made[key]["image"])
    other = DepthTraining(config, samples.decoder, seed=2, max_depth=MAX_DEPTH)
    assert not torch.equal(made[key]["image"], other[key]["image"])
    assert not torch.equal(made[key]["image"], made[key._replace(epoch=3)]["image"])


def test_processes_end_with_the_loader(root: Path) -> None:
    with load(depth_config(root, workers=2)) as loader:
        next(loader)
        processes = loader.processes()
        assert len(processes) == 2
    assert not multiprocessing.active_children()
    assert not any(os.path.exists(f"/proc/{process}") for process in processes)


@pytest.mark.parametrize("workers", [0, 1])
def test_another_sample_stands_in_for_a_bad_one(root: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(root / "depth", tmp_path / "depth")
    (tmp_path / "depth/depth/03.png").write_bytes(b"gone")
    told: list[BadSample] = []
    config = depth_config(tmp_path, workers=workers, max_bad_share=0.1)
    loader = load(config, tell=told.append)
    seen = torch.cat([batch["index"] for batch in take(loader, 6)])
    assert 3 not in seen.tolist()
    assert loader.substitutes.count == 1
    assert told[0].sample == 3
    assert told[0].substitute in seen.tolist()
    with pytest.raises(UserError, match=r"depth/03\.png: cannot be read"):
        take(load(replace(config, max_bad_share=0.0)), 6)
    with pytest.raises(UserError, match=r"1 of 19 pairs are bad, .*0\.02 allows; mend them, or leave them out"):
        take(load(replace(config, max_bad_share=0.02)), 6)


def test_too_few_samples_for_a_step(root: Path) -> None:
    with pytest.raises(UserError, match="has 19 pairs but one optimizer step takes 40"):
        load(depth_config(root), batch=20, accumulation=2)


def test_small_images_are_padded_without_a_target(root: Path) -> None:
    for config, name, nothing in (
        (depth_config(root, crop_size=(80, 120), flip=False), "depth", 0),
        (label_config(root, crop_size=(80, 120), flip=False), "label", 255),
    ):
        (batch,) = take(load(config), 1)
        target = batch[name].reshape(3, 80, 120)
        for part in (np.s_[:, OWN_SIZE[0] :], np.s_[:, :, OWN_SIZE[1] :]):
            assert (target[part] == nothing).all()
            assert (batch["image"].transpose(0, 1)[(slice(None), *part)] == 0).all()
        assert (target[:, 5 : OWN_SIZE[0], : OWN_SIZE[1]] != nothing).all()


def test_kitti_is_trained_on_within_the_benchmark_crop(tmp_path: Path) -> None:
    config = DepthDataConfig(dataset="kitti", path=str(write_kitti(tmp_path, 2, 1)), workers=0, flip=False, **PLAIN)
    samples = open_depth(config, "train", max_depth=80)
    order = dense_order(samples, batch_size=2, accumulation_steps=1, world_size=1, seed=0)
    (batch,) = take(build_dense_loader(samples, config, order, rank=0), 1)
    assert batch["image"].shape == (2, 3, 352, 352)
    blue = levels(batch["image"])[:, 2, :, 0]
    expected = torch.from_numpy(picture(0, KITTI_SIZE)[18:, 0, 2].copy())
    assert torch.equal(blue.round().byte(), expected.expand(2, -1)), "the lowest 352 rows"


def test_cut_depth_is_a_strip_of_a_quarter_of_the_samples(root: Path) -> None:
    """On its own, and with the other changes switched off: it must not depend on them."""
    config = depth_config(root, **{**PLAIN, "cutdepth": 0.25}, crop_size=OWN_SIZE, flip=False)
    samples = opened(config)
    made = DepthTraining(config, samples.decoder, seed=3, max_depth=MAX_DEPTH)
    plain = picture(4, OWN_SIZE)
    grey = np.rint(samples.decode(4).target / MAX_DEPTH * 255)
    cut, widths = [], []
    for epoch in range(200):
        pixels = (
            levels(made[DenseKey(epoch, 4, *samples.members(4))]["image"]).round().byte().numpy().transpose(1, 2, 0)
        )
        changed = (pixels != plain).any((0, 2)).nonzero()[0]
        cut.append(len(changed) > 0)
        if len(changed):
            strip = slice(changed[0], changed[-1] + 1)
            assert (pixels[:, strip] == grey[:, strip, None]).all()
            assert len(changed) <= max(1, (OWN_SIZE[1] - changed[0]) * 0.75)
            widths.append(len(changed))
    assert 0.15 < np.mean(cut) < 0.35
    assert max(widths) > 30
    assert min(widths) < 10
    always = DepthTraining(replace(config, cutdepth=1.0), samples.decoder, seed=3, max_depth=MAX_DEPTH)
    never = DepthTraining(replace(config, cutdepth=0.0), samples.decoder, seed=3, max_depth=MAX_DEPTH)
    key = DenseKey(0, 4, *samples.members(4))
    assert torch.equal(never[key]["depth"], always[key]["depth"])
    assert not torch.equal(never[key]["image"], always[key]["image"])


def test_color_tables_and_hsv() -> None:
    assert np.array_equal(colors.linear_table(1, 0), np.arange(256))
    assert colors.linear_table(1.2, -51)[[0, 100, 255]].tolist() == [0, 69, 255]
    assert colors.gamma_table(1.2)[[0, 128, 255]].tolist() == [0, round(255 * (128 / 255) ** 1.2), 255]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    same = colors.linear_table(1, 0)
    stronger, brighter = colors.linear_table(1, 30), colors.linear_table(1, -20)
    changed = colors.change_hsv(pixels, 40, stronger, brighter).astype(int)
    for (row, column), _ in np.ndenumerate(pixels[..., 0]):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[row, column] / 255))
        s, v = min(s + 30 / 255, 1), max(v - 20 / 255, 0)
        expected = np.array(colorsys.hsv_to_rgb((h + 40 / 360) % 1, s, v)) * 255
        assert np.abs(changed[row, column] - expected).max() < 8, "HSV has 8 bits"
    red = np.array([[[200, 0, 0]]], np.uint8)
    assert colors.change_hsv(red, 120, same, same).tolist() == [[[0, 200, 0]]]
    assert colors.change_hsv(red, -120, same, same).tolist() == [[[0, 0, 200]]]


def test_half_of_the_samples_change_each_color(root: Path) -> None:
    pixels = np.full((4, 4, 3), (120, 80, 60), np.uint8)
    for fields in ({"brightness_contrast": 0.2}, {"gamma": 0.2}, {"hue_saturation_value": (40.0, 30.0, 20.0)}):
        config = depth_config(root, **{**PLAIN, **fields})
        changed = [
            not np.array_equal(colors.change_depth_colors(pixels, np.random.default_rng(seed), config), pixels)
            for seed in range(1000)
        ]
        assert 0.42 < np.mean(changed) < 0.56
    distorted = [colors.distort_photometrically(pixels, np.random.default_rng(seed)) for seed in range(1000)]
    assert 0.9 < np.mean([not np.array_equal(one, pixels) for one in distorted]) < 0.97, "15 in 16"


def test_one_class_does_not_fill_a_crop_if_another_can_be_had() -> None:
    labels = np.zeros((60, 200), np.uint8)
    labels[:, 160:] = 1
    labels[30:] = 255
    config = SegmentationDataConfig(crop_size=(60, 60), resize=None, ratio_range=(1, 1), dataset="folder")

    def shares(limit: float) -> list[float]:
        found = []
        for seed in range(100):
            rng = np.random.default_rng(seed)
            size, crop, _ = crops.draw_resized_crop(rng, labels, replace(config, cat_max_ratio=limit))
            assert size == (60, 200)
            part = crops.resized_labels(labels, size, crop)
            found.append(np.bincount(part[part != 255]).max() / (part != 255).sum())
        return found

    assert np.mean(np.array(shares(0.75)) < 0.75) > 0.9
    assert np.mean(np.array(shares(1)) < 0.75) < 0.4


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((512, 683), (512, 683)), ((300, 1000), (512, 1707)), ((300, 4000), (154, 2048)), ((1000, 300), (1707, 512))],
)
def test_fitted_size(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert crops.fitted_size(*size, (2048, 512)) == fitted


def test_ade20k_recipe_resizes_between_half_and_double() -> None:
    labels = np.zeros((300, 400), np.uint8)
    config = SegmentationDataConfig(cat_max_ratio=1)
    sizes = [crops.draw_resized_crop(np.random.default_rng(seed), labels, config).size for seed in range(200)]
    short = np.array([min(size) for size in sizes])
    assert all(abs(width / height - 400 / 300) < 0.01 for height, width in sizes)
    assert 256 <= short.min() < 290
    assert 980 < short.max() <= 1024


def test_evaluation_sees_whole_images_in_order(root: Path, tmp_path: Path) -> None:
    samples = opened(label_config(root))
    found = list(evaluation_samples(samples, [7, 2, 2, 18, 0, 5, 9]))
    assert [sample.index for sample in found] == [7, 2, 2, 18, 0, 5, 9]
    assert [sample.name for sample in found][:2] == ["images/07", "images/02"]
    for sample in found:
        assert sample.original_size == OWN_SIZE
        assert torch.equal(
            levels(sample.image).round().byte().permute(1, 2, 0), torch.from_numpy(picture(sample.index, OWN_SIZE))
        )
        assert sample.target.dtype == torch.int64
        assert torch.equal(sample.target[4:], torch.from_numpy(stripes(OWN_SIZE)[4:]).long())
    write_kitti(tmp_path, 1, 1)
    kitti = open_depth(DepthDataConfig(dataset="kitti", path=str(tmp_path)), "val", max_depth=80)
    (sample,) = evaluation_samples(kitti, range(len(kitti)))
    assert (sample.image.shape, sample.target.shape, sample.original_size) == ((3, 352, 1216), (352, 1216), KITTI_SIZE)
    assert sample.target.dtype == torch.float32


def test_segmentation_is_evaluated_at_the_size_it_was_trained_for(root: Path) -> None:
    config = label_config(root, resize=(200, 128))
    (sample,) = evaluation_samples(opened(config), [5])
    assert (sample.image.shape, sample.target.shape) == ((3, 128, 192), OWN_SIZE), "twice the stored size"
    lone = read_picture(root / "labels/images/05.png", fit=config.resize)
    assert torch.equal(lone.image, sample.image)
    assert np.array_equal(lone.pixels, picture(5, OWN_SIZE))
    red = levels(sample.image)[0].mean(0)
    assert (red - torch.linspace(0, 255, 192)).abs().max() < 2
    halved = read_picture(root / "labels/images/05.png", fit=(48, 40))
    assert halved.image.shape == (3, 32, 48)


def test_evaluation_stops_at_a_bad_file_and_leaves_no_thread(root: Path, tmp_path: Path) -> None:
    samples = opened(depth_config(root))
    some = evaluation_samples(samples, range(15))
    assert [sample.index for sample in islice(some, 3)] == [0, 1, 2]
    some.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("evaluation-samples")]
    shutil.copytree(root / "depth", tmp_path / "depth")
    config = depth_config(tmp_path)
    samples = opened(config)
    (tmp_path / "depth/images/01.png").unlink()
    with pytest.raises(UserError, match=r"images/01\.png: the file does not exist"):
        list(evaluation_samples(samples, range(15)))


def test_a_lone_picture_is_read_as_in_evaluation(root: Path, tmp_path: Path) -> None:
    read = read_picture(root / "labels/images/05.png")
    (sample,) = evaluation_samples(opened(label_config(root)), [5])
    assert torch.equal(read.image, sample.image)
    assert (read.name, read.original_size) == ("05", OWN_SIZE)
    grey = save(tmp_path / "grey.png", np.full((5, 7), 9, np.uint8))
    assert read_picture(grey).image.shape == (3, 5, 7)
    with pytest.raises(UserError, match=r"none\.png: the file does not exist"):
        read_picture(tmp_path / "none.png")


def test_label_samples_are_functions_of_their_key(root: Path) -> None:
    config = label_config(root, ratio_range=(0.5, 2.0))
    samples = opened(config)
    made = LabelTraining(config, samples.decoder, seed=1)
    key = DenseKey(2, 4, *samples.members(4))
    assert torch.equal(made[key]["image"], made[key]["image"])
    assert not torch.equal(made[key]["image"], LabelTraining(config, samples.decoder, seed=2)[key]["image"])
    dull = LabelTraining(replace(config, photometric=False), samples.decoder, seed=1)
    assert torch.equal(made[key]["label"], dull[key]["label"]), "colours do not move the crop"
