"""The order of samples, and the torch loader: pairing, determinism, resuming, errors, processes."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sgmim_fast.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from sgmim_fast.data import augment
from sgmim_fast.data.manifest import Manifest, read_manifest
from sgmim_fast.data.torch_loader import (
    PairDataset,
    SampleKey,
    SampleOrder,
    TorchLoader,
    build_torch_loader,
    evaluation_batch,
)
from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, sample_rng

SIZE = (64, 96)
CELLS, MASKED = 6, 4  # ceil(0.6 * 6)
PAIRS = 11
HEIGHT, WIDTH = 110, 150


def gradient(index: int = 0) -> np.ndarray:
    """An RGB image whose red channel has a slope of 0.6 a column and 0.7 a row, moved by the index."""
    red = 0.6 * np.arange(WIDTH)[None, :] + 0.7 * np.arange(HEIGHT)[:, None] + 5 * index
    return np.stack([np.rint(red), np.full_like(red, index), np.full_like(red, 128)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose 16-bit map holds the red channel of the image, times 256."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "images").mkdir()
    (root / "structure").mkdir()
    for index in range(PAIRS):
        image = gradient(index)
        Image.fromarray(image).save(root / f"images/{index:02d}.png")
        Image.fromarray(image[..., 0].astype(np.uint16) * 256).save(root / f"structure/{index:02d}.png")
    return root


@pytest.fixture(scope="module")
def manifest(root: Path) -> Manifest:
    return read_manifest(root)


def settings(*, workers: int = 0, batch: int = 2, accumulation: int = 1, **model: object) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(image_size=SIZE, **model),  # type: ignore[arg-type]
        data=DataConfig(workers=workers),
        train=TrainConfig(batch_size=batch, accumulation_steps=accumulation, seed=5),
    )


def take(loader: TorchLoader, count: int) -> list[dict[str, torch.Tensor]]:
    with loader:
        return list(islice(loader, count))


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def red_of(image: torch.Tensor) -> torch.Tensor:
    """Red channel of a normalised image, back in 0..255."""
    return (image[..., 0, :, :] * augment.IMAGENET_STD[0] + augment.IMAGENET_MEAN[0]) * 255


@pytest.mark.parametrize("size", [(64, 96), (192, 192)])
def test_map_stays_on_its_image_through_crop_and_flip(manifest: Manifest, size: tuple[int, int]) -> None:
    config = replace(settings(), model=ModelConfig(image_size=size))
    pairs = PairDataset(config)
    slopes = []
    for epoch in range(24):
        sample = pairs[SampleKey.of(manifest, config, epoch, 3)]
        red, depth = red_of(sample["image"]), sample["structure"][0] / 256
        assert depth.shape == size
        # Rounding to 8 bits (twice) and the filter's cut at the border; one source column would be 0.6.
        assert (red - depth).abs().max() < 1.3
        assert (red - depth).abs().mean() < 0.35
        slopes.append(float(depth[0, -1] - depth[0, 0]))
    assert min(slopes) < 0 < max(slopes), "both mirrored and plain samples are expected"
    assert len({round(abs(slope), 3) for slope in slopes}) > 12, "crops differ from epoch to epoch"


def epoch_of(order: SampleOrder, rank: int, start: int = 0) -> list[tuple[int, list[int]]]:
    steps = order.steps_per_epoch * order.accumulation_steps
    return [(epoch, indices.tolist()) for epoch, indices in islice(order.micro_batches(rank, start), 2 * steps)]


def test_ranks_and_accumulation_share_each_steps_samples() -> None:
    one = SampleOrder(100, batch_size=12, world_size=1, accumulation_steps=1, seed=3)
    many = SampleOrder(100, batch_size=2, world_size=3, accumulation_steps=2, seed=3)
    assert one.steps_per_epoch == many.steps_per_epoch == 8
    ranks = [epoch_of(many, rank) for rank in range(3)]
    for step, (epoch, expected) in enumerate(epoch_of(one, 0)):
        got = [ranks[rank][2 * step + micro] for micro in range(2) for rank in range(3)]
        assert {e for e, _ in got} == {epoch}
        assert [index for _, indices in got for index in indices] == expected


def test_an_epoch_holds_each_sample_once_and_drops_the_rest() -> None:
    order = SampleOrder(103, batch_size=10, world_size=1, accumulation_steps=1, seed=0)
    batches = epoch_of(order, 0)
    assert [epoch for epoch, _ in batches] == [0] * 10 + [1] * 10
    epochs = [[i for e, indices in batches if e == epoch for i in indices] for epoch in (0, 1)]
    for indices in epochs:
        assert len(indices) == len(set(indices)) == 100
        assert set(indices) <= set(range(103))
    assert epochs[0] != epochs[1]
    other = SampleOrder(103, batch_size=10, world_size=1, accumulation_steps=1, seed=1)
    assert epoch_of(other, 0) != batches


@pytest.mark.parametrize("start", [0, 3, 7, 8, 9, 21])
def test_order_starts_at_any_step(start: int) -> None:
    order = SampleOrder(100, batch_size=2, world_size=3, accumulation_steps=2, seed=3)
    whole = [(e, i.tolist()) for e, i in islice(order.micro_batches(1), 80)]
    rest = [(e, i.tolist()) for e, i in islice(order.micro_batches(1, start), 20)]
    assert rest == whole[2 * start : 2 * start + 20]


def test_a_data_set_smaller_than_one_step(manifest: Manifest) -> None:
    config = settings(batch=2, accumulation=2)
    with pytest.raises(UserError, match=r"has 11 pairs but one optimizer step takes 12 .*lower --train.batch-size"):
        build_torch_loader(manifest, config, rank=0, world_size=3)
    assert build_torch_loader(manifest, config, rank=0, world_size=2).steps_per_epoch == 1


def test_batch_contract(manifest: Manifest) -> None:
    (batch,) = take(build_torch_loader(manifest, settings(batch=3), rank=0, world_size=1), 1)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "image": ((3, 3, *SIZE), torch.float32),
        "structure": ((3, 1, *SIZE), torch.float32),
        "mask": ((3, 2, 3), torch.bool),
        "masked": ((3, MASKED), torch.int32),
        "visible": ((3, CELLS - MASKED), torch.int32),
        "index": ((3,), torch.int64),
    }
    flat = batch["mask"].flatten(1)
    for row in range(3):
        assert batch["masked"][row].tolist() == flat[row].nonzero()[:, 0].tolist()
        assert batch["visible"][row].tolist() == (~flat[row]).nonzero()[:, 0].tolist()
        # The green channel of every picture holds its number.
        green = batch["image"][row, 1] * augment.IMAGENET_STD[1] + augment.IMAGENET_MEAN[1]
        assert torch.allclose(green * 255, batch["index"][row].float(), atol=1e-3)


def test_two_ranks_see_what_one_rank_of_twice_the_batch_sees(manifest: Manifest) -> None:
    whole = take(build_torch_loader(manifest, settings(batch=4), rank=0, world_size=1), 5)
    ranks = [take(build_torch_loader(manifest, settings(batch=2), rank=rank, world_size=2), 5) for rank in (0, 1)]
    for step, expected in enumerate(whole):
        joined = {name: torch.cat([rank[step][name] for rank in ranks]) for name in expected}
        assert_same(joined, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_bit_for_bit_across_an_epochs_end(manifest: Manifest, workers: int) -> None:
    # 11 pairs, 4 a step: 2 steps of 2 micro-batches an epoch; step 3 is the last of epoch 1.
    whole = take(build_torch_loader(manifest, settings(accumulation=2), rank=0, world_size=1), 12)
    config = settings(workers=workers, accumulation=2)
    rest = take(build_torch_loader(manifest, config, rank=0, world_size=1, start_step=3), 6)
    for got, expected in zip(rest, whole[6:], strict=True):
        assert_same(got, expected)


def test_samples_change_with_epoch_and_seed_only(manifest: Manifest) -> None:
    config = settings()
    key = SampleKey.of(manifest, config, 4, 7)
    first, again = PairDataset(config)[key], PairDataset(settings(workers=3, batch=5))[key]
    assert all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(again[name])) for name in first)
    later = PairDataset(config)[key._replace(epoch=5)]
    reseeded = PairDataset(replace(config, train=replace(config.train, seed=6)))[key]
    for other in (later, reseeded):
        assert not torch.equal(first["image"], other["image"])


def test_without_guidance_no_map_is_read(root: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(root / "images")
    manifest = read_manifest(tmp_path, structure=False)
    config = settings(guidance="none")
    (batch,) = take(build_torch_loader(manifest, config, rank=0, world_size=1), 1)
    assert set(batch) == {"image", "mask", "masked", "visible", "index"}
    with_maps = take(build_torch_loader(read_manifest(root), settings(), rank=0, world_size=1), 1)[0]
    assert torch.equal(batch["image"], with_maps["image"])
    with pytest.raises(ValueError, match="without structure maps"):
        next(build_torch_loader(manifest, settings(), rank=0, world_size=1))


def test_loader_leaves_the_global_random_state_alone(manifest: Manifest) -> None:
    before = torch.get_rng_state()
    take(build_torch_loader(manifest, settings(workers=1), rank=0, world_size=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_batch_is_the_uncropped_picture(manifest: Manifest, tmp_path: Path) -> None:
    config = settings()
    batch = evaluation_batch(manifest, config, [9, 2])
    assert batch["index"].tolist() == [9, 2]
    for row, index in enumerate((9, 2)):
        expected = draw_cell_mask(sample_rng(5, 0, index, STREAM_MASK), (2, 3), 0.6)
        assert torch.equal(batch["mask"][row], torch.from_numpy(expected))
        red, depth = red_of(batch["image"][row]), batch["structure"][row, 0] / 256
        assert (red - depth).abs().max() < 1.3
        # 110 x 150 holds 100 x 150 of the target's shape, in the middle: rows 5 to 105, all columns.
        corners = gradient(index)[[5, 5, 104, 104], [0, -1, 0, -1], 0]
        assert np.abs(red[[0, 0, -1, -1], [0, -1, 0, -1]].numpy() - corners).max() < 1.6


def break_pair(root: Path, target: Path, kind: str) -> str:
    """A copy of the data set in which pair 03 is broken; returns what the message must match."""
    for folder in ("images", "structure"):
        (target / folder).mkdir()
        for file in (root / folder).iterdir():
            (target / folder / file.name).symlink_to(file)
    image, depth = target / "images/03.png", target / "structure/03.png"
    if kind == "truncated image":
        data = image.read_bytes()
        image.unlink()
        image.write_bytes(data[: len(data) // 2])
        return re.escape(str(image)) + ".*cannot be read"
    depth.unlink()
    if kind == "nan":
        np.save(depth.with_suffix(".npy"), np.full((HEIGHT, WIDTH), np.nan))
        return re.escape(str(depth.with_suffix(".npy"))) + ".*not finite"
    if kind == "small map":
        Image.fromarray(np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)).save(depth)
        return re.escape(str(image)) + " is 150x110 .*" + re.escape(str(depth)) + " is 75x55: they do not show"
    exif = Image.Exif()
    exif[274] = 6
    image.unlink()
    Image.fromarray(gradient(3)).save(image, exif=exif)
    Image.fromarray(np.zeros((WIDTH, HEIGHT), np.uint8)).save(depth)
    return "150x110 .* is 110x150: the image's EXIF orientation"


@pytest.mark.parametrize("kind", ["truncated image", "nan", "small map", "turned"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_one_clear_line(root: Path, tmp_path: Path, kind: str, workers: int) -> None:
    pattern = break_pair(root, tmp_path, kind)
    loader = build_torch_loader(read_manifest(tmp_path), settings(workers=workers), rank=0, world_size=1)
    with pytest.raises(UserError, match=f"^[^\n]*{pattern}[^\n]*$"):
        take(loader, PAIRS)
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_close_ends_the_workers_at_once_even_inside_an_error(manifest: Manifest) -> None:
    pids: list[int | None] = []

    def interrupted(loader: TorchLoader) -> None:
        with loader:
            next(loader)
            pids.extend(child.pid for child in multiprocessing.active_children())
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            while True:
                next(loader)

    loader = build_torch_loader(manifest, settings(workers=2), rank=0, world_size=1)
    assert not multiprocessing.active_children(), "no process before the first batch"
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            interrupted(loader)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(pids) == 2
    assert caught.tb is not None, "the traceback lives, and with it the frames that use the workers"
    assert not multiprocessing.active_children()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    loader.close()


def test_a_killed_worker_is_one_clear_line_and_not_a_hang(manifest: Manifest) -> None:
    loader = build_torch_loader(manifest, settings(workers=1), rank=0, world_size=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^a loader process was ended from outside.*--data.workers"):
        take(loader, 20)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


LOAD_FOREVER = """
import multiprocessing, sys, time
from sgmim_fast.config import DataConfig, PretrainConfig, TrainConfig
from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.torch_loader import build_torch_loader
if __name__ == "__main__":
    config = PretrainConfig(data=DataConfig(workers=2), train=TrainConfig(batch_size=2))
    loader = build_torch_loader(read_manifest(sys.argv[1]), config, rank=0, world_size=1)
    next(loader)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_training_process(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "load_forever.py"
    script.write_text(LOAD_FOREVER)
    command = [sys.executable, str(script), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
