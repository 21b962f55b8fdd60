"""The benchmark of the loaders runs as documented, in a size for tests; what it times is never asserted."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress

from benchmarks import data_loading, loading_contender, loading_parity
from benchmarks.loading_contender import Contender, Job, Work, cpu_seconds, memory
from benchmarks.loading_pairs import KINDS, Part, open_part, warm, write_pairs
from sgmim_fast.data.batches import Batch
from sgmim_fast.data.loading import build_loader
from sgmim_fast.data.reading import read_structure
from sgmim_fast.errors import UserError

ROOT = Path(__file__).parents[1]
SIZE = (64, 48)
TINY = ["--pairs", "8", "--size", "64x48", "--batch", "2", "--workers", "1", "--seconds", "0.2", "--repetitions", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 8, SIZE, list(KINDS))


def job(path: Path, **fields: Any) -> Job:
    values: dict[str, Any] = {
        "work": "load",
        "loader": "dali",
        "path": str(path),
        "pairs": 8,
        "model": "sgmim_swin_base",
    }
    return Job(**values | {"batch": 2, "workers": 1, "device": "cpu"} | fields)


def test_both_loaders_are_recorded(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    words = ["--maps", "png", "--storage", "folder", "--no-verify", "--appetite", "100", "--results", str(results)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data_loading", *TINY, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["work"], row["loader"], row["maps"], row["storage"]) for row in rows] == [
        ("load", "dali", "png", "folder"),
        ("load", "torch", "png", "folder"),
    ]
    for row in rows:
        assert row["benchmark"] == "data_loading"
        assert row["cache"] == "warm"
        assert row["pairs"] == 8
        for name in ("pairs_per_second", "cpu_milliseconds_per_pair"):
            assert 0 < row[f"p20_{name}"] <= row[f"p50_{name}"] <= row[f"p80_{name}"]
        assert row["share_of_appetite"] == pytest.approx(row["p50_pairs_per_second"] / 100)
        # PyTorch alone takes more; worker processes come on top.
        assert row["peak_rss_bytes"] > 100e6
        assert 0 < row["held_bytes"] < row["peak_rss_bytes"]
        assert row["startup_seconds"] > 0
        assert row["parity"].keys() == {"batches", *loading_parity.MOST}
        assert {"commit", "torch", "cpu", "command"} <= row["environment"].keys()
    assert rows[0]["decoder"].startswith("DALI ")
    assert rows[1]["decoder"].startswith("Pillow ")
    for column in ("pairs/s", "CPU ms", "feeds"):
        assert column in done.stdout
    assert "appetite: 100 pairs a second, as given" in done.stdout


def test_verify_is_measured_in_the_same_way(folders: dict[str, Path]) -> None:
    with Contender(job(folders["npy"], work="verify", loader="torch")) as contender:
        session = contender.process.pid
        assert contender.start() > 0
        found = contender.measure(0.1)
    assert all(value > 0 for value in found.values())
    assert found.keys() == {"pairs_per_second", "cpu_seconds_per_pair", "peak_rss_bytes", "held_bytes"}
    assert ended(session)


def ended(session: int, patience: float = 60.0) -> bool:
    """Whether no process of a session is left; helpers of Python's end by themselves, a moment later."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_what_a_contender_complains_of_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"), Contender(job(tmp_path / "nowhere")) as contender:
        contender.start()


def test_made_sets_are_measured_as_folders_and_as_shards(tmp_path: Path) -> None:
    options = data_loading.arguments().parse_args([*TINY, "--maps", "npy"])
    with Progress(disable=True) as progress:
        found = list(data_loading.cases(options, tmp_path / "made", progress))
        assert [(case.maps, case.storage) for case in found] == [("npy", "folder"), ("npy", "shards")]
        content = [
            {member.read().data for index in range(8) for member in open_part(case.path, 8).members(index) if member}
            for case in found
        ]
        assert content[0] == content[1]
        options.data = [case.path for case in found]
        own = list(data_loading.cases(options, tmp_path, progress))
    assert [(case.maps, case.storage, case.path) for case in own] == [
        (case.maps, case.storage, case.path) for case in found
    ]


# -- parity


def altered_loaders(change: Callable[[Batch], None]) -> Callable[..., Any]:
    """``build_loader`` whose DALI loader gives changed batches, and whose other one is DALI's as well, as that is
    quick to start."""

    @contextmanager
    def build(pairs: Part, config: Any, **options: Any) -> Generator[Iterator[Batch], None, None]:
        def changed(batches: Iterator[Batch]) -> Iterator[Batch]:
            for batch in batches:
                if config.data.loader == "dali":
                    change(batch)
                yield batch

        dali = replace(config, data=replace(config.data, loader="dali"))
        with build_loader(pairs, dali, **options) as loader:
            yield changed(loader)

    return build


CHANGES: dict[str, Callable[[Batch], Any]] = {
    "index differs": lambda batch: batch["index"].add_(1),
    "mask differs": lambda batch: batch["mask"][0].logical_not_(),
    "image_levels_max": lambda batch: batch["image"][0, 0, 0, 0].add_(0.2),
    "image_levels_mean": lambda batch: batch["image"].add_(0.01),
    "map_share_max": lambda batch: batch["structure"][0, 0, 0, 0].mul_(0.99),
    "map_share_max is nan": lambda batch: batch["structure"][0].fill_(torch.nan),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_loaders_that_disagree_are_not_timed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "rows.jsonl"
    words = ["--maps", "npy", "--storage", "folder", "--no-verify", "--results", str(results)]
    monkeypatch.setattr(loading_parity, "build_loader", altered_loaders(CHANGES[what]))
    monkeypatch.setattr(data_loading, "Contender", None)
    monkeypatch.setattr(sys, "argv", ["data_loading", *TINY, *words])
    with pytest.raises(SystemExit) as stopped:
        data_loading.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert what in last
    assert "nothing was timed" in last
    assert not results.exists()


def test_loaders_that_agree_pass(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_parity, "build_loader", altered_loaders(lambda batch: None))
    found = loading_parity.compare_loaders(job(folders["tiff"]), job(folders["tiff"], loader="torch"))
    assert found == {"batches": 2, "image_levels_mean": 0, "image_levels_max": 0, "map_share_max": 0}


# -- what is measured


def test_what_was_ready_is_left_out_and_rounds_are_whole(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def batches(job: Job, pairs: Part) -> Generator[int, None, None]:
        while True:
            given.append(job.batch)
            yield job.batch

    monkeypatch.setattr(loading_contender, "loaded", batches)
    monkeypatch.setattr(loading_contender, "own_processes", lambda: [os.getpid()])
    work = Work(job(folders["png"], workers=3))
    work.start()
    assert len(given) == 1
    found = work.measure(0.01)
    assert work.job.ahead == 6
    counted = len(given) - 1 - work.job.ahead
    assert counted >= 3
    assert counted % 3 == 0
    assert found["pairs_per_second"] <= 2 * counted / 0.01


def test_time_and_memory_of_another_process() -> None:
    busy = (
        "import threading, time\n"
        "held = bytes(range(256)) * 400_000\n"
        "def burn():\n"
        "    while time.thread_time() < 0.2: pass\n"
        "threads = [threading.Thread(target=burn) for _ in range(2)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert cpu_seconds([process.pid]) >= 0.4
        assert cpu_seconds([process.pid, process.pid]) >= 0.8
        assert 102e6 < memory(process.pid, "status", "VmHWM") < 400e6
        assert 102e6 < memory(process.pid, "smaps_rollup", "Pss_Anon") < 400e6
        process.communicate(b"\n")


# -- pairs


def test_pairs_are_the_same_in_every_run(tmp_path: Path, folders: dict[str, Path]) -> None:
    again = write_pairs(tmp_path / "again", 8, SIZE, list(KINDS))
    for kind in KINDS:
        first, second = open_part(folders[kind], 8), open_part(again[kind], 8)
        for index in range(8):
            for one, other in zip(first.members(index), second.members(index), strict=True):
                assert one is not None
                assert other is not None
                assert one.read().data == other.read().data
    maps = {kind: read_structure(folders[kind] / f"structure/000003{KINDS[kind]}", 1) for kind in KINDS}
    assert np.array_equal(maps["png"], maps["jp2"])
    assert np.array_equal(maps["tiff"], maps["npy"])
    assert np.abs(maps["png"] / 65535 - maps["npy"]).max() < 1e-5
    assert maps["npy"].std() > 0.05


def test_a_part_is_spread_over_the_whole(folders: dict[str, Path]) -> None:
    whole, part = open_part(folders["png"], 100), open_part(folders["png"], 3)
    assert (len(whole), len(part)) == (8, 3)
    assert [part.members(index) for index in range(3)] == [whole.members(index) for index in (0, 4, 7)]
    image, structure = warm(part)
    assert image == pytest.approx(np.mean([len(part.members(index)[0].read().data) for index in range(3)]))
    assert structure > 0


# -- appetite


def options(tmp_path: Path, *words: str) -> Any:
    return data_loading.arguments().parse_args(["--results", str(tmp_path / "data_loading.jsonl"), *words])


def step(rate: float, started: str, model: str = "sgmim_swin_base") -> str:
    environment = {"started": started, "cpu": "a processor", "gpu": "a GPU"}
    row = {"benchmark": "train_step", "model": model, "backend": "triton", "precision": "bf16", "batch": 128}
    return json.dumps(row | {"images_per_second": rate, "environment": environment}) + "\n"


def test_the_appetite_is_that_of_the_newest_run(tmp_path: Path) -> None:
    assert data_loading.find_appetite(options(tmp_path, "--appetite", "7"))[0] == 7
    found, sentence = data_loading.find_appetite(options(tmp_path))
    assert found is None
    assert "python -m benchmarks.train_step --model sgmim_swin_base" in sentence
    (tmp_path / "kernels.jsonl").write_text('{"benchmark": "kernels"}\n')
    (tmp_path / "train_step.jsonl").write_text(
        step(900, "2026-01-01") + step(300, "2026-02-01") + step(400, "2026-02-01") + step(50, "2026-03-01", "other")
    )
    found, sentence = data_loading.find_appetite(options(tmp_path))
    assert found == 400
    assert "400.0 pairs a second: sgmim_swin_base, triton, bf16, batch 128, on a GPU (2026-02-01)" in sentence
    (tmp_path / "train_step.jsonl").write_text(step(900, "2026-01-01") + "{half\n")
    with pytest.raises(UserError, match=r"train_step.jsonl:2: not a row"):
        data_loading.find_appetite(options(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "--workers 0 must be 1 or more"),
        (["--seconds", "0"], "--seconds 0.0 must be more than 0"),
        (["--appetite", "-1"], "--appetite -1.0 must be more than 0"),
        (["--pairs", "3", "--batch", "4"], "--pairs 3 do not fill one batch of 4"),
        (["--size", "0x5"], "--size 0x5 must be 1x1 or more"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_loading.compare(options(tmp_path, *words))


def test_sets_of_the_users_are_told_apart() -> None:
    row = {"maps": "png", "storage": "folder", "work": "load", "loader": "dali", "batch": 2, "workers": 1}
    row |= dict.fromkeys(("p20_pairs_per_second", "p50_pairs_per_second", "p80_pairs_per_second"), 10.0)
    row |= {"p50_cpu_milliseconds_per_pair": 1.0, "peak_rss_bytes": 1, "held_bytes": 1, "startup_seconds": 1.0}
    shown = data_loading.table([row | {"data": "one"}, row | {"data": "another", "share_of_appetite": 0.25}], "cpu")
    cells = {str(column.header): list(column.cells) for column in shown.columns}
    assert cells["set"] == ["one", "another"]
    assert cells["feeds"] == ["", "25%"]
    assert "to load" not in cells
