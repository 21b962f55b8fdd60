"""Packing data sets into shards and reading them: bytes, order, resuming, refusals."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sgmim_fast.data import reading
from sgmim_fast.data.members import Encoded, Pairs
from sgmim_fast.data.order import LANES, SampleOrder
from sgmim_fast.data.sharding.packing import Packing
from sgmim_fast.data.sharding.shard_pairs import shard_pairs
from sgmim_fast.data.shards import list_sha256, read_shards
from sgmim_fast.data.sources import open_pairs
from sgmim_fast.errors import UserError

ROOT = Path(__file__).parents[1]
COUNT = 23


def make_pair(root: Path, stem: str, height: int = 24, width: int = 32) -> None:
    """An image whose red and green are its pixels' columns and rows, and a 16-bit map of both."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, np.zeros_like(rows)], axis=2).astype(np.uint8)
    for folder in ("images", "structure"):
        (root / folder / stem).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / f"images/{stem}.jpg", quality=95)
    Image.fromarray((rows * 256 + columns).astype(np.uint16)).save(root / f"structure/{stem}.png")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    for number in range(COUNT):
        make_pair(root, f"n{number % 3}/{number:02d} x", width=32 + number)
    return root


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 5 pairs, the last of 3."""
    out = tmp_path_factory.mktemp("shards")
    shard_pairs(source, out, Packing(pairs_per_shard=5), workers=1)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(pairs: Pairs) -> list[tuple[bytes, bytes | None]]:
    found = []
    for index in range(len(pairs)):
        image, structure = pairs.members(index)
        found.append((image.read().data, None if structure is None else structure.read().data))
    return found


def decoded(pairs: Pairs, index: int) -> tuple[np.ndarray, np.ndarray, Encoded]:
    image, structure = pairs.members(index)
    assert structure is not None
    file = structure.read()
    return np.asarray(reading.read_image(image.read())), reading.read_structure(file, 1), file


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def relist(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the list as somebody would who means harm: with a fingerprint that fits."""
    record = json.loads((folder / "shards.json").read_text())
    change(record)
    record["sha256"] = list_sha256(record)
    (folder / "shards.json").write_text(json.dumps(record))


def reindex(folder: Path, content: bytes) -> None:
    """Give shard 1 another index, with a fingerprint that fits."""
    (folder / "shard-000001.idx").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    relist(folder, lambda record: record["shards"][1].update(index_sha256=digest))


def test_round_trip_is_bit_for_bit_in_the_seeds_order(source: Path, finished: Path) -> None:
    before, after = open_pairs(source), open_pairs(finished)
    order = np.random.default_rng(0).permutation(COUNT)
    plain = contents(before)
    assert contents(after) == [plain[index] for index in order]
    assert after.shard_sizes == (5, 5, 5, 5, 3)
    assert len(after) == COUNT
    image, structure = after.members(6)
    assert image.name == f"{finished / 'shard-000001.tar'}:000001_000001.jpg"
    assert structure is not None
    assert structure.inner == "000001_000001.structure.png"
    for index in (-1, COUNT):
        with pytest.raises(IndexError):
            after.members(index)
    # What the pairs were called is on record, one line each.
    lines = [json.loads(line) for path in sorted(finished.glob("*.jsonl")) for line in path.read_text().splitlines()]
    first = source / lines[6]["image"]
    assert lines[6]["key"] == "000001_000001"
    assert first.read_bytes() == image.read().data
    assert lines[6]["structure"].endswith(f"{first.stem}.png")


def test_order_can_be_kept_or_drawn_anew(source: Path, finished: Path, tmp_path: Path) -> None:
    kept = shard_pairs(source, tmp_path / "kept", Packing(pairs_per_shard=10, shuffle=False), workers=1)
    assert contents(kept) == contents(open_pairs(source))
    other = shard_pairs(source, tmp_path / "other", Packing(pairs_per_shard=5, seed=1), workers=1)
    assert other.sha256 != open_pairs(finished).sha256
    assert contents(other) != contents(open_pairs(finished))
    assert sorted(contents(other)) == sorted(contents(kept))


def test_other_programs_open_the_shards(finished: Path) -> None:
    pairs = open_pairs(finished)
    with tarfile.open(finished / "shard-000001.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == [
            "000001_000000.jpg",
            "000001_000000.structure.png",
            "000001_000001.jpg",
        ]
        assert len(members) == 10
        for row in range(5):
            for place, member in enumerate(pairs.members(5 + row)):
                file = tar.extractfile(members[2 * row + place])
                assert file is not None
                assert member is not None
                assert (file.read(), members[2 * row + place].offset_data) == (member.read().data, member.offset)


def test_dali_reads_the_same_bytes_with_our_index(finished: Path) -> None:
    pytest.importorskip("nvidia.dali")  # there is none for some systems
    from nvidia.dali import Pipeline, fn

    tars = sorted(map(str, finished.glob("*.tar")))
    pipeline: Any = Pipeline(
        batch_size=COUNT, num_threads=1, device_id=None
    )  # None: its types know no CPU-only machine
    with pipeline:
        members: Any = fn.readers.webdataset(
            paths=tars,
            index_paths=[path.removesuffix("tar") + "idx" for path in tars],
            ext=["jpg", "structure.png"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(*members)
    pipeline.build()
    images, maps = pipeline.run()
    read = [(bytes(images.at(place)), bytes(maps.at(place))) for place in range(COUNT)]
    assert read == contents(open_pairs(finished))


def test_target_size_makes_even_shards(tmp_path: Path) -> None:
    (tmp_path / "in/images").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for number in range(16):
        Image.fromarray(noise).save(tmp_path / f"in/images/{number}.bmp")  # 360 kB each, 5.8 MB in all
    pairs = shard_pairs(tmp_path / "in", tmp_path / "out", Packing(shard_size=2, maps="none"), workers=1)
    assert pairs.shard_sizes == (6, 6, 4)
    assert [round(shard.size / 1e6, 1) for shard in pairs.shards] == [2.2, 2.2, 1.4]


def test_maps_can_be_left_out_when_packing_or_reading(source: Path, finished: Path, tmp_path: Path) -> None:
    without = open_pairs(finished, structure=False)
    assert contents(without) == [(image, None) for image, _ in contents(open_pairs(finished))]
    shutil.copytree(source / "images", tmp_path / "in/images")
    packed = shard_pairs(tmp_path / "in", tmp_path / "out", Packing(pairs_per_shard=5, maps="none"), workers=1)
    assert contents(packed) == contents(without)
    refused(lambda: open_pairs(tmp_path / "out"), "packed without maps", "--model.guidance none")
    assert len(open_pairs(tmp_path / "out", structure=False)) == COUNT


@pytest.mark.parametrize("maps", ["keep", "png", "npy"])
def test_smaller_pairs_stay_aligned_and_maps_exact(tmp_path: Path, maps: str) -> None:
    make_pair(tmp_path, "wide", height=120, width=180)
    make_pair(tmp_path, "small", height=30, width=60)
    packing = Packing(shuffle=False, short_side=40, maps=maps)
    pairs = shard_pairs(tmp_path, tmp_path / "out", packing, workers=1)
    small, wide = decoded(pairs, 0), decoded(pairs, 1)
    assert small[0].shape == (30, 60, 3)  # never made larger, and then the image's bytes are kept
    assert pairs.members(0)[0].read().data == (tmp_path / "images/small.jpg").read_bytes()
    image, structure, file = wide
    assert image.shape == (40, 60, 3)
    assert structure.shape == (1, 40, 60)
    assert file.name.endswith(".npy" if maps == "npy" else ".png")
    assert reading.value_type(file) == np.uint16
    # Every value is that of the stored pixel under the new one's centre, which is what the image shows there.
    rows, columns = np.divmod(structure[0].astype(int), 256)
    np.testing.assert_array_equal(rows, np.broadcast_to(np.arange(40)[:, None] * 3 + 1, (40, 60)))
    np.testing.assert_array_equal(columns, np.broadcast_to(np.arange(60) * 3 + 1, (40, 60)))
    assert np.abs(image[:, :, 0] - columns * 255 / 180).max() < 8
    assert np.abs(image[:, :, 1] - rows * 255 / 120).max() < 8


def test_images_are_made_smaller_without_aliasing(tmp_path: Path) -> None:
    make_pair(tmp_path, "a", height=90, width=90)
    stripes = np.zeros((90, 90, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "images/a.jpg").unlink()
    Image.fromarray(stripes).save(tmp_path / "images/a.png")
    image, _, _ = decoded(shard_pairs(tmp_path, tmp_path / "out", Packing(short_side=30), workers=1), 0)
    assert np.abs(image[:, 1:-1].astype(int) - 128).max() < 30  # every third column would be stripes again


def test_jpeg_quality_re_encodes_images_only(source: Path, finished: Path, tmp_path: Path) -> None:
    pairs = shard_pairs(source, tmp_path / "out", Packing(pairs_per_shard=5, jpeg_quality=50), workers=1)
    before, after = contents(open_pairs(finished)), contents(pairs)
    assert [structure for _, structure in before] == [structure for _, structure in after]
    assert all(len(small) < len(large) for (small, _), (large, _) in zip(after, before, strict=True))
    with Image.open(io.BytesIO(after[0][0])) as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int32"])
@pytest.mark.parametrize("maps", ["png", "npy"])
def test_values_of_every_type_are_kept_or_refused(tmp_path: Path, maps: str, dtype: str) -> None:
    make_pair(tmp_path, "a", height=4, width=6)
    (tmp_path / "structure/a.png").unlink()
    values = np.linspace(-1 if dtype in ("float32", "int32") else 0, 255, 24).reshape(4, 6).astype(dtype)
    np.save(tmp_path / "structure/a.npy", values)

    def pack() -> Any:
        return shard_pairs(tmp_path, tmp_path / "out", Packing(maps=maps), workers=1)

    if maps == "png" and dtype in ("float32", "int32"):
        refused(pack, "a.npy", "float32", "--maps npy")
        return
    _, structure, file = decoded(pack(), 0)
    np.testing.assert_array_equal(structure[0], values)
    assert file.name.endswith(f".structure.{maps}")
    assert reading.value_type(file) == (np.float32 if dtype == "int32" else dtype)


KILLED = """
import os, signal, sys
from sgmim_fast.data.sharding.packing import Packing
from sgmim_fast.data.sharding.shard_pairs import shard_pairs

def progress(done, total):
    if done >= 13:  # more than two processes have in hand, so that a shard is whole
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    packing = Packing(pairs_per_shard=5, maps="npy")
    shard_pairs(sys.argv[1], sys.argv[2], packing, workers=int(sys.argv[3]), progress=progress)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_goes_on_and_equals_an_undisturbed_one(source: Path, tmp_path: Path, workers: int) -> None:
    script, out = tmp_path / "pack.py", tmp_path / "out"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(source), str(out), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The pipe ends when the last process that holds it does: a packing process must not outlive its parent.
    process = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "shards.json").exists()
    refused(lambda: read_shards(out), "no finished sharded data set", "sgmim shard")
    whole = {path: path.stat().st_ino for path in out.glob("shard-*.tar")}
    assert whole
    if workers == 1:
        assert len(whole) == 2
        assert [path.name.split(".")[1] for path in out.glob(".*.tmp")] == ["shard-000002"]
    done: list[int] = []
    packing = Packing(pairs_per_shard=5, maps="npy")
    shard_pairs(source, out, packing, workers=1, progress=lambda count, _: done.append(count))
    assert done[0] >= 5
    assert done[-1] == COUNT
    assert {path: path.stat().st_ino for path in whole} == whole  # what was finished was kept
    shard_pairs(source, tmp_path / "undisturbed", packing, workers=2)
    assert folder_bytes(out) == folder_bytes(tmp_path / "undisturbed")


def test_process_that_is_killed_is_one_line(source: Path, tmp_path: Path) -> None:
    def kill(done: int, _: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    refused(
        lambda: shard_pairs(source, tmp_path, Packing(pairs_per_shard=5), workers=2, progress=kill),
        "ended from outside",
        "fewer --workers",
    )


def test_damaged_shard_is_packed_again_and_a_finished_folder_left_alone(source: Path, copy: Path) -> None:
    before = folder_bytes(copy)
    inodes = {path.name: path.stat().st_ino for path in copy.glob("shard-*")}
    os.truncate(copy / "shard-000002.tar", len(before["shard-000002.tar"]) - 512)  # all members are there still
    (copy / "shard-000003.idx").write_bytes(b"v1.2 5\n")
    (copy / "shards.json").write_bytes(b"{")
    shard_pairs(source, copy, Packing(pairs_per_shard=5), workers=1)
    assert folder_bytes(copy) == before
    replaced = {name[6:12] for name, inode in inodes.items() if (copy / name).stat().st_ino != inode}
    assert replaced == {"000002", "000003"}


def test_full_disk_is_one_line_and_nothing_finished_is_lost(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    synced: list[int] = []

    def fsync(file: int) -> None:
        synced.append(file)
        if len(synced) == 5:  # the plan, three files of the first shard, the second shard's tar file
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        refused(
            lambda: shard_pairs(source, out, Packing(pairs_per_shard=5), workers=1),
            "shard-000001.tar: no space left",
            "run the same command again",
        )
    assert sorted(path.suffix for path in out.glob("*0*")) == [".idx", ".jsonl", ".tar"]
    assert not list(out.glob(".*.tmp"))
    shard_pairs(source, out, Packing(pairs_per_shard=5), workers=1)
    assert folder_bytes(out) == folder_bytes(finished)


def test_other_options_sources_and_data_are_refused(source: Path, copy: Path, tmp_path: Path) -> None:
    before = folder_bytes(copy)

    def pack(origin: Path = source, **options: Any) -> Callable[[], Any]:
        return lambda: shard_pairs(origin, copy, Packing(**{"pairs_per_shard": 5, **options}), workers=1)

    refused(pack(jpeg_quality=80), str(copy), "jpeg_quality None then, 80 now", "empty or new folder")
    refused(pack(pairs_per_shard=None), "pairs_per_shard 5 then, None now", "shard_size None then, 256 now")
    make_pair(tmp_path / "else", "a")
    refused(pack(tmp_path / "else"), "another list of pairs")
    assert folder_bytes(copy) == before
    (copy / ".plan.json").write_text("[]")
    refused(pack(), ".plan.json is damaged")
    (tmp_path / "else/.shard-000000.tar.1.tmp").touch()
    refused(lambda: shard_pairs(source, tmp_path / "else", workers=1), "already holds other data")
    assert (tmp_path / "else/.shard-000000.tar.1.tmp").exists()
    refused(lambda: shard_pairs(source, tmp_path / "else/images/a.jpg", workers=1), "a.jpg", "choose a folder")
    refused(lambda: shard_pairs(source, tmp_path / "new", workers=0), "--workers 0 must be 1 or more")
    for option in ({"shard_size": 0}, {"short_side": 0}, {"jpeg_quality": 101}, {"maps": "tiff"}, {"seed": -1}):
        refused(lambda option=option: Packing(**option), f"--{next(iter(option)).replace('_', '-')} ")  # type: ignore[misc]


def test_two_calls_do_not_write_one_folder(source: Path, tmp_path: Path) -> None:
    def again(done: int, _: int) -> None:
        if done == 1:
            refused(lambda: shard_pairs(source, tmp_path, workers=1), "is being written by another")

    assert len(shard_pairs(source, tmp_path, workers=1, progress=again)) == COUNT


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_pairs_stop_the_run_or_are_left_out(source: Path, tmp_path: Path, workers: int) -> None:
    for number in range(6):
        make_pair(tmp_path / "in", f"{number}")
    (tmp_path / "in/images/1.jpg").write_bytes(b"no image")
    make_pair(tmp_path / "other", "4", height=12)
    shutil.copy(tmp_path / "other/structure/4.png", tmp_path / "in/structure/4.png")
    (tmp_path / "in/images/2.jpg").write_bytes(b"")
    (tmp_path / "in/images/3.jpg").write_bytes(b"")
    packing = Packing(shuffle=False, pairs_per_shard=2, maps="npy")

    def pack(skip_bad: bool = True) -> Any:
        return shard_pairs(tmp_path / "in", tmp_path / "out", packing, workers=workers, skip_bad=skip_bad)

    refused(lambda: pack(skip_bad=False), str(tmp_path / "in/images"), ".jpg", "--skip-bad leaves such pairs out")
    pairs = pack()
    assert pairs.shard_sizes == (1, 1)  # one shard had bad pairs only
    assert [shard.name for shard in pairs.shards] == ["shard-000000.tar", "shard-000002.tar"]
    assert pairs.skipped == 4
    assert [member.inner for member in pairs.members(1) if member] == [
        "000002_000000.jpg",
        "000002_000000.structure.npy",
    ]
    assert pairs.members(1)[0].read().data == (tmp_path / "in/images/5.jpg").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"images/{number}.jpg" for number in (1, 2, 3, 4)]
    for line, words in zip(lines, ("no picture", "empty", "empty", "is 32x24 pixels"), strict=True):
        assert words in line["skipped"]
    before = folder_bytes(tmp_path / "out")
    assert pack().skipped == 4
    assert folder_bytes(tmp_path / "out") == before


def test_nothing_but_bad_pairs(tmp_path: Path) -> None:
    make_pair(tmp_path, "a")
    (tmp_path / "images/a.jpg").write_bytes(b"")
    packing = Packing(pairs_per_shard=2)
    refused(lambda: shard_pairs(tmp_path, tmp_path / "out", workers=1), "a.jpg", "empty")
    refused(lambda: shard_pairs(tmp_path, tmp_path / "out", packing, skip_bad=True, workers=1), "all 1 pairs are bad")


def test_missing_and_cut_files_are_named(copy: Path) -> None:
    def opening() -> Any:
        return read_shards(copy)

    tar, index = copy / "shard-000001.tar", copy / "shard-000001.idx"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    refused(opening, str(tar), f"has {len(whole) - 512} bytes but {len(whole)}", "sgmim shard")
    tar.unlink()
    refused(opening, str(tar), "is missing")
    tar.mkdir()
    refused(opening, str(tar), "is no file")
    tar.rmdir()
    tar.write_bytes(whole)
    listed = index.read_bytes()
    index.write_bytes(listed.replace(b" 512 ", b" 1024 "))
    refused(opening, str(index), "is not the one that shards.json lists")
    index.unlink()
    refused(opening, str(index), "is missing")
    index.write_bytes(listed)
    pairs = read_shards(copy)
    tar.write_bytes(whole[:1024])  # after the set was opened
    refused(lambda: pairs.members(9)[0].read(), f"{tar}:000001_000004.jpg", "empty")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"v1.2 5", b"v1.2 4", "does not list 5 pairs"),
        (b"v1.2", b"v1.1", "does not list 5 pairs"),
        (b"\n", b" ", "does not list 5 pairs"),
        (b"jpg 512", b"jpg", "does not list 5 pairs"),
        (b"jpg 512", b"jpg 0", "impossible"),
        (b"jpg 512", b"jpg 513", "impossible"),
        (b"jpg 512", b"jpg -512", "impossible"),
        (b"jpg 512", b"jpg 5120000", "beyond the end"),
        (b"jpg 512", b"jpg 9223372036854775296", "beyond the end"),
        (b"jpg 512", b"jpg " + b"9" * 30, "unknown content"),
        (b"jpg 512", b"jpg " + b"9" * 5000, "unknown content"),
        (b"jpg 512", b"jpg 5x2", "unknown content"),
        (b"jpg 512", b"exe 512", "unknown content"),
        (b"structure.png", b"mask.png", "unknown content"),
    ],
)
def test_index_that_does_not_fit_is_refused(copy: Path, old: bytes, new: bytes, reason: str) -> None:
    content = (copy / "shard-000001.idx").read_bytes()
    assert old in content
    reindex(copy, content.replace(old, new, 1))
    refused(lambda: read_shards(copy), "shard-000001.idx", reason)


@pytest.mark.parametrize("size, reason", [(0, "impossible"), (2**32, "impossible"), (10**6, "beyond the end")])
def test_size_that_does_not_fit_is_refused(copy: Path, size: int, reason: str) -> None:
    content = (copy / "shard-000001.idx").read_bytes()
    reindex(copy, re.sub(rb"jpg 512 \d+", b"jpg 512 %d" % size, content, count=1))
    refused(lambda: read_shards(copy), "shard-000001.idx", reason)


def test_garbage_index_is_refused(copy: Path) -> None:
    for garbage in (b"", b"\n" * 6, b"\x00\xff" * 4000, bytes(range(256))):
        reindex(copy, garbage)
        refused(lambda: read_shards(copy), "shard-000001.idx does not fit shard-000001.tar")


@pytest.mark.parametrize(
    "name",
    [
        "../shard-000001.tar",
        "/etc/passwd",
        "sub/shard-000001.tar",
        "shard-000001.tar\n",
        "..",
        "",
        "shard-1.tar",
        7,
        None,
    ],
)
def test_hostile_shard_names_are_refused(copy: Path, name: Any) -> None:
    relist(copy, lambda record: record["shards"][1].update(name=name))
    refused(lambda: read_shards(copy), "shards.json", "which is no file name of a shard")


def test_names_inside_an_index_are_never_used(copy: Path) -> None:
    before = contents(read_shards(copy))
    content = (copy / "shard-000001.idx").read_bytes()
    reindex(copy, content.replace(b"000001_000001.jpg", b"../../../../etc/passwd").replace(b"000001_000002.jpg", b"/x"))
    pairs = read_shards(copy)
    assert contents(pairs) == before
    assert pairs.members(6)[0].inner == "000001_000001.jpg"


def test_list_that_is_wrong_is_refused(copy: Path) -> None:
    def opening() -> Any:
        return read_shards(copy)

    listed = (copy / "shards.json").read_text()
    for change, words in (
        (lambda record: record.update(format=99), ("format version '99'", "update sgmim_fast")),
        (lambda record: record.update(pairs=99), ("contradicts itself",)),
        (lambda record: record.update(shards=[]), ("contradicts itself",)),
        (lambda record: record.update(shards="abc"), ("contradicts itself",)),
        (lambda record: record.pop("shards"), ("contradicts itself",)),
        (lambda record: record["shards"].append(record["shards"][0]), ("contradicts itself",)),
        (lambda record: record["shards"][0].update(pairs=True), ("contradicts itself",)),
        (lambda record: record["shards"][0].update(pairs=-5), ("contradicts itself",)),
        (lambda record: record["shards"][0].update(more=1), ("contradicts itself",)),
        (lambda record: record["shards"][0].update(pairs=6, size=1) or record.update(pairs=24), ("but 1 when",)),
    ):
        (copy / "shards.json").write_text(listed)
        relist(copy, change)
        refused(opening, "shards.json" if "but" not in words[0] else "shard-000000.tar", *words)
    for text, word in ((listed.replace('"pairs": 5', '"pairs": 6', 1), "was changed"), ("[" * 99999, "is not JSON")):
        (copy / "shards.json").write_text(text)
        refused(opening, "shards.json", word)
    (copy / "shards.json").write_text("[]")
    refused(opening, "no list of shards")


def test_shards_can_be_packed_again(finished: Path, tmp_path: Path) -> None:
    again = shard_pairs(finished, tmp_path, Packing(pairs_per_shard=9, shuffle=False), workers=1)
    assert contents(again) == contents(open_pairs(finished))
    assert again.shard_sizes == (9, 9, 5)


def test_an_epoch_visits_every_pair_once_and_each_shard_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "in/images").mkdir(parents=True)
    for number in range(640):
        (tmp_path / f"in/images/{number:03d}.jpg").write_bytes(b"%d" % number)
    pairs = shard_pairs(tmp_path / "in", tmp_path / "out", Packing(pairs_per_shard=16, maps="none"), workers=1)
    buffer = 2 * LANES
    order = SampleOrder(
        len(pairs),
        batch_size=2,
        world_size=2,
        accumulation_steps=1,
        seed=3,
        shard_sizes=pairs.shard_sizes,
        shuffle_buffer=buffer,
    )
    for epoch in (0, 1):
        seen = order.permutation(epoch)
        assert {pairs.members(int(index))[0].read().data for index in seen} == {b"%d" % n for n in range(640)}
        for lane in range(LANES):
            taken = seen[lane::LANES]
            jumps = np.abs(np.diff(taken // 16)) > 0
            assert jumps.sum() <= 3  # a lane is ten pairs long: it leaves its shard at one place, mixed by the buffer
    assert not np.array_equal(order.permutation(0), order.permutation(1))
