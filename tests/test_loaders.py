"""What both loaders promise: pairing, the batch contract, determinism, resuming, substitution; and that they agree."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.batches import Batch
from sgmim_fast.data.dali_loader import DaliLoader
from sgmim_fast.data.loading import choose_loader, sample_order
from sgmim_fast.data.manifest import Manifest, read_manifest
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.sharding.packing import Packing
from sgmim_fast.data.sharding.shard_pairs import shard_pairs
from sgmim_fast.data.substitution import BadSample, Substitutes
from sgmim_fast.data.verification.verify import verify
from sgmim_fast.errors import UserError
from sgmim_fast.train.pretrain_job import PretrainJob
from tests.pair_sets import (
    BREAKAGES,
    HEIGHT,
    PAIRS,
    SIZE,
    WIDTH,
    assert_same,
    at_step,
    break_pair,
    copy_links,
    gradient,
    green_of,
    load,
    red_of,
    settings,
    take,
    write_pairs,
)

CELLS, MASKED = 6, 4  # ceil(0.6 * 6)
both = pytest.mark.parametrize("loader", ["torch", "dali"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set")


@pytest.fixture(scope="module")
def manifest(root: Path) -> Manifest:
    return read_manifest(root)


@both
def test_batch_contract(manifest: Manifest, loader: str) -> None:
    (batch,) = take(load(manifest, settings(loader, batch=3)), 1)
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "image": ((3, 3, *SIZE), torch.float32),
        "structure": ((3, 1, *SIZE), torch.float32),
        "mask": ((3, 2, 3), torch.bool),
        "masked": ((3, MASKED), torch.int32),
        "visible": ((3, CELLS - MASKED), torch.int32),
        "index": ((3,), torch.int64),
    }
    assert all(value.is_contiguous() for value in batch.values())
    flat = batch["mask"].flatten(1)
    for row in range(3):
        assert batch["masked"][row].tolist() == flat[row].nonzero()[:, 0].tolist()
        assert batch["visible"][row].tolist() == (~flat[row]).nonzero()[:, 0].tolist()


@pytest.fixture(scope="module")
def shards(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return shard_pairs(root, tmp_path_factory.mktemp("shards"), Packing(pairs_per_shard=4, shuffle=False), workers=1)


@both
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "shards"])
@pytest.mark.parametrize("size", [(64, 96), (192, 192)])
def test_maps_stay_on_their_images_for_epochs_and_ranks(
    manifest: Manifest, shards: Pairs, loader: str, packed: bool, size: tuple[int, int]
) -> None:
    slopes, seen = [], []
    config = settings(loader, image_size=size, batch=2)
    config = replace(config, data=replace(config.data, shuffle_buffer=5))
    for rank in (0, 1):
        for batch in take(load(shards if packed else manifest, config, rank, 2), 12):  # six epochs
            red, depth = red_of(batch["image"]), batch["structure"][:, 0] / 256
            # Rounding to 8 bits (twice) and the filter's cut at the border; one source column would be 0.6.
            assert (red - depth).abs().max() < 1.3
            assert (red - depth).abs().mean() < 0.35
            assert torch.equal(green_of(batch["image"]), batch["index"])
            slopes += (depth[:, 0, -1] - depth[:, 0, 0]).tolist()
            seen += batch["index"].tolist()
    assert min(slopes) < 0 < max(slopes), "both mirrored and plain samples are expected"
    assert len({round(abs(slope), 3) for slope in slopes}) > 12, "crops differ from sample to sample"
    assert set(seen) == set(range(PAIRS))


@both
def test_shards_hold_the_same_samples_and_resume(manifest: Manifest, shards: Pairs, loader: str) -> None:
    whole = take(load(shards, settings(loader, batch=3)), 6)
    for got, expected in zip(whole, take(load(manifest, settings(loader, batch=3)), 6), strict=True):
        assert_same(got, expected)
    config = settings(loader, batch=3)
    config = replace(config, data=replace(config.data, shuffle_buffer=4))
    opened = load(shards, config)
    place = at_step(opened, 2)
    mixed = take(opened, 6)
    assert [batch["index"].tolist() for batch in mixed] != [batch["index"].tolist() for batch in whole]
    for got, expected in zip(take(load(shards, config, place=place), 4), mixed[2:], strict=True):
        assert_same(got, expected)


@both
def test_fewer_ranks_go_on_where_more_were(manifest: Manifest, loader: str) -> None:
    """One step of two ranks, then one rank with as many pairs a step, in the middle of the epoch."""
    straight = take(load(manifest, settings(loader, batch=4)), 4)
    before = load(manifest, settings(loader, batch=2), 0, 2)
    state = before.order.state(at_step(before, 1), manifest.sha256)
    before.close()
    after = take(load(manifest, settings(loader, batch=4), place=state.place), 3)
    for got, expected in zip(after, straight[1:], strict=True):
        assert_same(got, expected)


@both
def test_two_ranks_see_what_one_rank_of_twice_the_batch_sees(manifest: Manifest, loader: str) -> None:
    whole = take(load(manifest, settings(loader, batch=4)), 5)
    ranks = [take(load(manifest, settings(loader, batch=2), rank, 2), 5) for rank in (0, 1)]
    for step, expected in enumerate(whole):
        taken_in_turns = {name: torch.stack([rank[step][name] for rank in ranks], 1).flatten(0, 1) for name in expected}
        assert_same(taken_in_turns, expected)


@pytest.mark.parametrize(("loader", "workers"), [("torch", 0), ("torch", 2), ("dali", 1), ("dali", 3)])
def test_resume_continues_bit_for_bit_across_an_epochs_end(manifest: Manifest, loader: str, workers: int) -> None:
    # 11 pairs, 4 a step: 2 steps of 2 micro-batches an epoch; step 3 is the last of epoch 1.
    first = load(manifest, settings(loader, accumulation=2))
    place = at_step(first, 3)
    whole = take(first, 12)
    config = settings(loader, workers=workers, accumulation=2)
    for got, expected in zip(take(load(manifest, config, place=place), 6), whole[6:], strict=True):
        assert_same(got, expected)


@both
def test_without_guidance_no_map_is_read(root: Path, tmp_path: Path, loader: str) -> None:
    (tmp_path / "images").symlink_to(root / "images")
    manifest = read_manifest(tmp_path, structure=False)
    (batch,) = take(load(manifest, settings(loader, guidance="none")), 1)
    assert set(batch) == {"image", "mask", "masked", "visible", "index"}
    with_maps = take(load(read_manifest(root), settings(loader)), 1)[0]
    assert torch.equal(batch["image"], with_maps["image"])
    with pytest.raises(ValueError, match="without structure maps"):
        take(load(manifest, settings(loader)), 1)


@both
def test_loaders_leave_the_global_random_state_alone(manifest: Manifest, loader: str) -> None:
    before = torch.get_rng_state()
    take(load(manifest, settings(loader, workers=1)), 2)
    assert torch.equal(torch.get_rng_state(), before)


# -- the two agree


def photograph(rng: np.random.Generator) -> Image.Image:
    """Large soft shapes and some noise."""
    soft = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
    noisy = np.asarray(soft).astype(int) + rng.integers(-10, 10, (HEIGHT, WIDTH, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


IMAGES: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 90},
    "jpeg": {"quality": 95, "subsampling": 0},
    "png": {},
    "webp": {},
    "bmp": {},
    "ppm": {},
    "tif": {},
    "jp2": {},
}


def write_photographs(root: Path, map_suffix: str, map_type: type, kinds: dict[str, dict[str, Any]]) -> Manifest:
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "structure").mkdir()
    for i, (suffix, options) in enumerate(kinds.items()):
        photograph(rng).save(root / f"images/{i}.{suffix}", **options)
        values = (rng.random((HEIGHT, WIDTH)) * (255 if map_type is np.uint8 else 65535)).astype(map_type)
        if map_suffix == "npy":
            np.save(root / f"structure/{i}.npy", values)
        else:
            Image.fromarray(values).save(root / f"structure/{i}.{map_suffix}")
    return read_manifest(root)


def resized_by_dali(manifest: Manifest, config: PretrainConfig) -> DaliLoader:
    """The graph that runs on GPUs, on the CPU."""
    order = sample_order(manifest, config, 1)
    substitutes = Substitutes(len(manifest), 0, 0.0, lambda bad: None)
    return DaliLoader(manifest, config, order, substitutes, rank=0, whole_graph=True)


def assert_close(first: Batch, second: Batch, map_range: float) -> None:
    """Index, masks and so the order equal; images within the rounding of 8-bit resizing; maps to float32 rounding."""
    for name in ("index", "mask", "masked", "visible"):
        assert torch.equal(first[name], second[name])
    levels = (first["image"] - second["image"]).abs() * 255 * 0.225  # at least a level each
    assert levels.mean() < 0.25
    assert levels.max() < 4
    assert (first["structure"] - second["structure"]).abs().max() < 3e-5 * map_range


@pytest.mark.parametrize(
    ("map_suffix", "map_type"),
    [
        ("png", np.uint16),
        ("png", np.uint8),
        ("jp2", np.uint16),
        ("tif", np.uint16),
        ("tif", np.float32),
        ("npy", np.float32),
        ("npy", np.uint16),
    ],
)
def test_both_loaders_give_the_same_batches(tmp_path: Path, map_suffix: str, map_type: type) -> None:
    manifest = write_photographs(tmp_path, map_suffix, map_type, IMAGES)
    for size in ((64, 96), (128, 128)):  # smaller and larger than the crops
        config = settings("dali", batch=4, image_size=size)
        one = take(load(manifest, settings("torch", batch=4, image_size=size)), 5)
        other, in_graph = take(load(manifest, config), 5), take(resized_by_dali(manifest, config), 5)
        for first, second, third in zip(one, other, in_graph, strict=True):
            assert_same(first, second)
            assert_close(first, third, 255 if map_type is np.uint8 else 65535)


ODD: dict[str, dict[str, Any]] = {"jpg": {}, "JPG": {}, "JPEG": {}, "png": {}, "PNG": {}}


def test_odd_but_good_images_agree(tmp_path: Path) -> None:
    """Grey, CMYK, palette, transparent and turned pictures, and 8-bit maps between 16-bit ones."""
    manifest = write_photographs(tmp_path, "png", np.uint16, ODD)
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[274] = 6
    photograph(rng).convert("L").save(tmp_path / "images/0.jpg")
    photograph(rng).convert("CMYK").save(tmp_path / "images/1.JPG", "JPEG")
    photograph(rng).save(tmp_path / "images/2.JPEG", exif=exif)
    photograph(rng).convert("P").save(tmp_path / "images/3.png")
    photograph(rng).convert("RGBA").save(tmp_path / "images/4.PNG")
    Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH), dtype=np.uint8)).save(tmp_path / "structure/2.png")
    one, other = (take(load(manifest, settings(name, batch=5)), 2) for name in ("torch", "dali"))
    in_graph = take(resized_by_dali(manifest, settings("dali", batch=5)), 2)
    for first, second, third in zip(one, other, in_graph, strict=True):
        assert_same(first, second)
        assert_close(first, third, 65535)


@both
def test_three_channel_maps(tmp_path: Path, loader: str) -> None:
    root = write_pairs(tmp_path / "set", 4)
    for index in range(4):
        Image.fromarray(gradient(index)).save(root / f"structure/{index:02d}.png")
    batch = take(load(read_manifest(root), settings(loader, structure_channels=3, batch=4)), 1)[0]
    assert batch["structure"].shape == (4, 3, *SIZE)
    assert (red_of(batch["image"]) - batch["structure"][:, 0]).abs().max() < 1.3
    assert torch.equal(batch["structure"][:, 1].mean((1, 2)).round().long(), batch["index"])


def test_what_dali_cannot_read(root: Path, tmp_path: Path) -> None:
    """By name it is refused; left to choose, the other loader is taken, and the reason given."""
    copy_links(root, tmp_path)
    assert choose_loader(read_manifest(tmp_path), settings("auto"))[0] == "dali"
    (tmp_path / "structure/05.png").unlink()
    np.save(tmp_path / "structure/05.npy", np.ones((HEIGHT, WIDTH), np.float32))
    mixed = read_manifest(tmp_path)
    chosen, why = choose_loader(mixed, settings("auto"))
    assert chosen == "torch"
    assert "05.npy: holds arrays where the data set's first map holds integers" in why
    assert len(take(load(mixed, settings("auto")), 6)) == 6
    with pytest.raises(UserError, match=r"05.npy: holds arrays .*--data.loader torch"):
        take(load(mixed, settings("dali")), 6)
    with pytest.raises(UserError, match="1 or 3 channels"):
        load(mixed, settings("dali", structure_channels=2))
    config = settings("dali")
    config = replace(config, data=replace(config.data, decode_on="gpu"))
    with pytest.raises(UserError, match=r"--data.decode-on gpu needs a training on a GPU"):
        load(mixed, config)


def test_without_dali(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named it is refused with the reason; left to choose, the other loader is taken."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert choose_loader(manifest, settings("auto")) == ("torch", "NVIDIA DALI is not installed")
    with pytest.raises(
        UserError, match=r"^--data.loader dali: NVIDIA DALI cannot be imported \(.*--data.loader torch$"
    ):
        load(manifest, settings("dali"))
    with pytest.raises(UserError, match=r"--data.loader dali"):
        PretrainJob(settings("dali")).check(torch.device("cpu"))


# -- bad files


@both
@pytest.mark.parametrize("kind", BREAKAGES)
def test_a_bad_file_is_one_clear_line(root: Path, tmp_path: Path, loader: str, kind: str) -> None:
    copy_links(root, tmp_path)
    manifest = read_manifest(tmp_path)
    pattern = break_pair(tmp_path, kind)
    if kind == "nan":
        manifest = read_manifest(tmp_path)
    opened = load(manifest, settings(loader))
    with pytest.raises(UserError, match=f"^[^\n]*{pattern}[^\n]*$"):
        take(opened, PAIRS)
    with pytest.raises(ValueError, match="closed"):
        next(opened)


@pytest.mark.parametrize(("loader", "workers"), [("torch", 0), ("torch", 1), ("dali", 1)])
@pytest.mark.parametrize("kind", BREAKAGES)
def test_another_pair_stands_in(root: Path, tmp_path: Path, loader: str, workers: int, kind: str) -> None:
    """No batch is lost or short, the good samples are untouched, and every use of the bad file is told."""
    copy_links(root, tmp_path)
    manifest = read_manifest(tmp_path)
    good = take(load(manifest, settings(loader, batch=4)), 6)
    pattern = break_pair(tmp_path, kind)
    if kind == "nan":
        manifest = read_manifest(tmp_path)
    told: list[BadSample] = []
    opened = load(manifest, settings(loader, batch=4, workers=workers, bad=0.2), tell=told.append)
    place = at_step(opened, 2)
    batches = take(opened, 6)
    used = [epoch for epoch, batch in ((i // 2, batch) for i, batch in enumerate(good)) if 3 in batch["index"]]
    assert used, "the bad pair is among the first"
    assert opened.substitutes.count >= len(used)
    assert [bad.epoch for bad in told[: len(used)]] == used
    assert {bad.sample for bad in told} == {3}
    for batch, expected in zip(batches, good, strict=True):
        same = expected["index"] != 3
        assert torch.equal(batch["index"][same], expected["index"][same])
        for name in ("image", "structure", "mask"):
            assert torch.equal(batch[name][same], expected[name][same])
        assert (batch["index"] != 3).all()
        assert torch.equal(green_of(batch["image"]), batch["index"]), "a substitute is a whole pair"
        assert (red_of(batch["image"]) - batch["structure"][:, 0] / 256).abs().max() < 1.3
    assert re.search(pattern, told[0].reason)
    resumed = take(load(manifest, settings(loader, batch=4, bad=0.2), place=place), 4)
    for got, expected in zip(resumed, batches[2:], strict=True):
        assert_same(got, expected)


AFTERWARDS = ("missing", "empty", "truncated", "garbage", "truncated map", "small map", "three channels", "turned")


@both
@pytest.mark.parametrize("kind", [*AFTERWARDS, "swapped", "grey", "CMYK", "8 bits", "constant"])
def test_a_file_that_changes_after_verification_is_noticed(root: Path, tmp_path: Path, loader: str, kind: str) -> None:
    """Also where the new content would decode: it is not what was verified."""
    for folder in ("images", "structure"):
        shutil.copytree(root / folder, tmp_path / folder)
    assert verify(tmp_path, loader=loader, workers=1).exit_code == 0
    manifest = read_manifest(tmp_path)
    told: list[BadSample] = []
    opened = load(manifest, settings(loader, batch=2, workers=1, bad=0.2), tell=told.append)
    image, depth = tmp_path / "images/03.png", tmp_path / "structure/03.png"
    if kind in AFTERWARDS:
        break_pair(tmp_path, kind)
    elif kind == "swapped":
        shutil.copy(tmp_path / "structure/04.png", depth)
    elif kind == "8 bits":
        Image.fromarray(gradient(3)[..., 0]).save(depth)
    elif kind == "constant":
        Image.fromarray(np.full((HEIGHT, WIDTH), 7, np.uint16)).save(depth)
    else:
        Image.fromarray(gradient(3)).convert("L" if kind == "grey" else "CMYK").save(image, "JPEG")
    batches = take(opened, PAIRS // 2)
    assert {(bad.epoch, bad.sample) for bad in told} == {(0, 3)}
    assert re.search(
        r"0[34].png: (the file does not exist|.*file is empty|has \d+ bytes, but \d+ when)", told[0].reason
    )
    assert all((batch["index"] != 3).all() for batch in batches)
    for batch in batches:
        assert torch.equal(green_of(batch["image"]), batch["index"])
        assert (red_of(batch["image"]) - batch["structure"][:, 0] / 256).abs().max() < 1.3


@both
def test_too_many_bad_files_end_the_run(root: Path, tmp_path: Path, loader: str) -> None:
    copy_links(root, tmp_path)
    manifest = read_manifest(tmp_path)
    for name in ("01", "04", "07", "08"):
        (tmp_path / f"images/{name}.png").unlink()
        (tmp_path / f"images/{name}.png").write_bytes(b"no picture")
    told: list[BadSample] = []
    with pytest.raises(UserError, match=r"4 of 11 pairs are bad, more than --data.max-bad-share 0.3 allows"):
        take(load(manifest, settings(loader, bad=0.3), tell=told.append), 40)
    assert {bad.sample for bad in told} <= {1, 4, 7, 8}
    assert len({bad.sample for bad in told}) == 3
