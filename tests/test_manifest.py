"""Pairing images with maps: folders and list files, and every way they can be wrong."""

import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from sgmim_fast.data.manifest import Manifest, list_pairs, read_manifest
from sgmim_fast.data.members import Member
from sgmim_fast.data.pair_list import PairList
from sgmim_fast.errors import UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def refused(path: str | Path, *words: str, structure: bool = True) -> None:
    with pytest.raises(UserError) as caught:
        read_manifest(path, structure=structure)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_folder_is_paired_by_path_and_stem_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "images/n02/b.JPEG", "images/n01/b.png", "images/a.jpg", "images/n01/x.y.webp", "images/notes.txt")
    touch(tmp_path, "structure/n01/b.npy", "structure/n02/b.png", "structure/a.jp2", "structure/n01/x.y.TIFF")
    touch(tmp_path, "images/.hidden.jpg", "images/.cache/c.jpg", "structure/extra.png")
    manifest = read_manifest(tmp_path)
    assert manifest.pairs == (
        ("images/a.jpg", "structure/a.jp2"),
        ("images/n01/b.png", "structure/n01/b.npy"),
        ("images/n01/x.y.webp", "structure/n01/x.y.TIFF"),
        ("images/n02/b.JPEG", "structure/n02/b.png"),
    )
    assert len(manifest) == 4
    assert manifest.members(1)[0].path == str(tmp_path / "images/n01/b.png")
    assert manifest.members(1)[1] == Member(str(tmp_path / "structure/n01/b.npy"))


def test_depth_folder_stands_in_for_structure(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "depth/a.png")
    assert read_manifest(tmp_path).pairs == (("images/a.jpg", "depth/a.png"),)
    touch(tmp_path, "structure/a.npy")
    assert read_manifest(tmp_path).pairs == (("images/a.jpg", "structure/a.npy"),)


def test_without_structure_no_maps_are_needed(tmp_path: Path) -> None:
    touch(tmp_path, "images/b.jpg", "images/a.jpg")
    manifest = read_manifest(tmp_path, structure=False)
    assert manifest.pairs == (("images/a.jpg", None), ("images/b.jpg", None))
    assert manifest.members(0)[1] is None
    (tmp_path / "list.txt").write_text("images/a.jpg\nimages/b.jpg\tnowhere.png\n")
    assert read_manifest(tmp_path / "list.txt", structure=False).pairs == manifest.pairs


def test_fingerprint_follows_the_list_and_not_its_place(tmp_path: Path) -> None:
    first = read_manifest(touch(tmp_path / "one", "images/a.jpg", "structure/a.png"))
    moved = read_manifest(touch(tmp_path / "two", "images/a.jpg", "structure/a.png"))
    other = read_manifest(touch(tmp_path / "two", "images/b.jpg", "structure/b.png"))
    assert first.sha256 == moved.sha256 != other.sha256
    assert Manifest(tmp_path, (("a", "bc"),)).sha256 != Manifest(tmp_path, (("ab", "c"),)).sha256


def test_linked_files_and_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "store/a.jpg", "store/b.jpg", "root/structure/a.png", "root/structure/more/b.png")
    os.makedirs(tmp_path / "root/images")
    os.symlink(tmp_path / "store/a.jpg", tmp_path / "root/images/a.jpg")
    touch(tmp_path, "elsewhere/b.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root/images/more")
    assert [image for image, _ in read_manifest(tmp_path / "root").pairs] == ["images/a.jpg", "images/more/b.jpg"]
    os.symlink(tmp_path / "root/images", tmp_path / "root/images/loop")
    refused(tmp_path / "root", "images/loop", "remove the link")


def test_folder_errors(tmp_path: Path) -> None:
    refused("", "--data.path is not set")
    refused(tmp_path / "absent", "absent", "does not exist")
    refused(tmp_path, str(tmp_path), "no images/ folder")
    (tmp_path / "images").mkdir()
    refused(tmp_path, "images holds no images", ".jpeg")
    touch(tmp_path, "images/b.jpg", "images/a.jpg", "images/n/c.jpg")
    refused(tmp_path, "no structure/ folder", "--model.guidance none")
    touch(tmp_path, "structure/b.png")
    refused(tmp_path, "images/a.jpg has no map structure/a", "nor have 1 other images")
    touch(tmp_path, "structure/a.png", "structure/n/c.png", "structure/n/c.npy")
    refused(tmp_path, "structure/n/c.npy and structure/n/c.png share one stem")
    os.remove(tmp_path / "structure/n/c.npy")
    assert len(read_manifest(tmp_path)) == 3
    touch(tmp_path, "images/n/c.png")
    refused(tmp_path, "images/n/c.jpg and images/n/c.png share one stem")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "# pairs\n\nb.jpg\tb.png\n a.jpg   a.png \n"),
        ("l.tsv", "image\tstructure\nb.jpg\tb.png\na.jpg\ta.png"),
        ("l.csv", '\ufeffimage,structure\r\nb.jpg, b.png\r\n"a.jpg",a.png\r\n'),
        ("l.jsonl", '{"structure": "b.png", "image": "b.jpg"}\n# end\n{"image": "a.jpg", "structure": "a.png"}\n'),
    ],
)
def test_list_files(tmp_path: Path, name: str, text: str) -> None:
    touch(tmp_path, "a.jpg", "a.png", "b.jpg", "b.png")
    (tmp_path / name).write_text(text)
    manifest = read_manifest(tmp_path / name)
    assert manifest.root == tmp_path
    assert manifest.pairs == (("a.jpg", "a.png"), ("b.jpg", "b.png"))


def test_list_paths_may_be_absolute_and_hold_spaces(tmp_path: Path) -> None:
    touch(tmp_path, "far/my photo.jpg", "my map, new.png")
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists/l.txt"
    path.write_text(f"{tmp_path}/far/my photo.jpg\t../my map, new.png\n")
    manifest = read_manifest(path)
    assert manifest.members(0)[0].path == f"{tmp_path}/far/my photo.jpg"
    structure = manifest.members(0)[1]
    assert structure is not None
    assert os.path.samefile(structure.path, tmp_path / "my map, new.png")


@pytest.mark.parametrize(
    ("name", "line", "word"),
    [
        ("l.txt", "a.jpg", "names no structure map"),
        ("l.txt", "a.jpg a.png b.png", "found 3 fields"),
        ("l.csv", "a.jpg,", "found 2 fields"),
        ("l.jsonl", "{a.jpg", "not a line of JSON"),
        ("l.jsonl", '["a.jpg", "a.png"]', "text values"),
        ("l.jsonl", '{"image": "a.jpg", "structure": 3}', "structure must be"),
        ("l.jsonl", '{"image": "a.jpg"}', "names no structure map"),
        ("l.txt", "a.jpg\tb.png", "b.png does not exist"),
        ("l.txt", "a.jpg\ta\0.png", "no path can have"),
        ("l.jsonl", '{"image": "a\\ud800.jpg", "structure": "a.png"}', "no path can have"),
    ],
)
def test_list_errors_name_the_line(tmp_path: Path, name: str, line: str, word: str) -> None:
    touch(tmp_path, "a.jpg", "a.png")
    good = json.dumps({"image": "a.jpg", "structure": "a.png"}) if name.endswith("jsonl") else "a.jpg\ta.png"
    (tmp_path / name).write_text(f"# head\n{good}\n{line}\n")
    refused(tmp_path / name, f"{name}:3: ", word)


def test_list_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("# nothing\n")
    refused(tmp_path / "l.txt", "lists no pairs")
    touch(tmp_path, "l.dat")
    refused(tmp_path / "l.dat", "neither a folder nor a list", ".jsonl")


@pytest.mark.parametrize("count", [3, 200])
def test_missing_listed_files_are_counted_whichever_way_they_are_looked_up(tmp_path: Path, count: int) -> None:
    names = [f"{i:03d}" for i in range(count)]
    touch(tmp_path, *(f"i/{name}.jpg" for name in names), *(f"s/{name}.png" for name in names))
    (tmp_path / "l.txt").write_text("".join(f"i/{name}.jpg\ts/{name}.png\n" for name in names))
    assert len(read_manifest(tmp_path / "l.txt")) == count
    os.remove(tmp_path / "s/001.png")
    os.remove(tmp_path / "i/002.jpg")
    refused(tmp_path / "l.txt", "l.txt:2: ", "s/001.png does not exist", "1 other listed files are missing")


def test_pair_list_is_a_sequence_of_pairs() -> None:
    pairs = [("a.jpg", None), ("a.jpg", "a.png"), ("b\udcff.jpg", "b\t\n.png"), ("ü.jpg", "")]
    listed = PairList.of(pairs)
    assert listed == tuple(pairs)
    assert listed == PairList.of(pairs)
    assert listed != PairList.of(pairs[:3])
    assert listed != "pairs"
    assert listed[-1] == listed[3] == ("ü.jpg", "")
    assert listed[1:3] == tuple(pairs[1:3])
    assert list(reversed(listed)) == pairs[::-1]
    with pytest.raises(IndexError):
        listed[4]
    in_order = PairList(sorted(listed.entries()))
    assert [in_order.find(entry) for entry in in_order.entries()] == [0, 1, 2, 3]
    assert in_order.find(b"a.jpg\0b.png") is None
    assert listed.images_only() == tuple((image, None) for image, _ in pairs)
    assert len(PairList([])) == 0


def test_fingerprint_is_the_one_of_earlier_versions() -> None:
    manifest = Manifest(Path("any"), (("images/a.jpg", "structure/a.png"), ("images/b.jpg", None)))
    text = "images/a.jpg\tstructure/a.png\nimages/b.jpg\t\n"
    assert manifest.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_memory_of_many_pairs_is_that_of_their_names(tmp_path: Path) -> None:
    count = 20_000
    names = [f"n{i // 100:04d}/n{i // 100:04d}_{i:08d}" for i in range(count)]
    (tmp_path / "l.txt").write_text("".join(f"images/{name}.JPEG\tstructure/{name}.png\n" for name in names))
    tracemalloc.start()
    try:
        listed = list_pairs(tmp_path / "l.txt", True, lambda _: True)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listed) == count
    assert held < 100 * count  # bytes; a tuple of two strings takes 260
