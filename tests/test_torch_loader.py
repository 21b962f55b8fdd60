"""The torch loader's samples and processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sgmim_fast.data.batches import Loader
from sgmim_fast.data.manifest import Manifest, read_manifest
from sgmim_fast.data.pair_samples import PairDataset, SampleKey, evaluation_batch
from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, sample_rng
from tests.pair_sets import gradient, load, red_of, settings, take, write_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set")


@pytest.fixture(scope="module")
def manifest(root: Path) -> Manifest:
    return read_manifest(root)


def test_samples_change_with_epoch_and_seed_only(manifest: Manifest) -> None:
    config = settings()
    key = SampleKey.of(manifest, config, 4, 7)
    first, again = PairDataset(config)[key], PairDataset(settings(workers=3, batch=5))[key]
    assert all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(again[name])) for name in first)
    later = PairDataset(config)[key._replace(epoch=5)]
    reseeded = PairDataset(replace(config, train=replace(config.train, seed=6)))[key]
    for other in (later, reseeded):
        assert not torch.equal(first["image"], other["image"])


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


def test_close_ends_the_workers_at_once_even_inside_an_error(manifest: Manifest) -> None:
    pids: list[int | None] = []

    def interrupted(loader: Loader) -> None:
        with loader:
            next(loader)
            pids.extend(child.pid for child in multiprocessing.active_children())
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            while True:
                next(loader)

    loader = load(manifest, settings(workers=2))
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
    loader = load(manifest, settings(workers=1))
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
from sgmim_fast.data.loading import build_loader
if __name__ == "__main__":
    config = PretrainConfig(data=DataConfig(workers=2, loader="torch"), train=TrainConfig(batch_size=2))
    loader = build_loader(read_manifest(sys.argv[1]), config, rank=0, world_size=1)
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
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
