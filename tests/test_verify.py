"""``sgmim verify``: every kind of bad file with its reason, and what training gets."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from verify_cases import BAD, H, W, cut, depth, one_line, pixels, quarantined, swap, write_pair, write_pairs

from sgmim_fast.data.decoding import DecodedPair, PillowDecoder
from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.verification.verify import Summary, create_decoder, verify
from sgmim_fast.data.verified import read_verified


@pytest.fixture(scope="module", params=["torch", "dali"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A folder of good pairs and one bad pair of every kind, verified with a loader's decoder."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", exc_type=ImportError)
    root = write_pairs(tmp_path_factory.mktemp("mixed"), 20)
    for seed, (name, (spoil, _, _)) in enumerate(BAD.items(), start=100):
        spoil(*write_pair(root, name, seed))
    write_pair(root, "swapped-a", 200)
    write_pair(root, "swapped-b", 201, size=(W, H))
    swap(root / "structure/swapped-a.png", root / "structure/swapped-b.png")
    write_pair(root, "twin", 202)
    shutil.copy(root / "images/003.jpg", root / "images/twin.jpg")
    rotated = Image.Exif()
    rotated[274] = 6
    image, _ = write_pair(root, "fine-rotated", 203)
    Image.fromarray(pixels(203)).save(image, exif=rotated)
    image, _ = write_pair(root, "fine-cmyk", 204)
    Image.fromarray(pixels(204)).convert("CMYK").save(image)
    image, _ = write_pair(root, "fine-grey", 205)
    Image.fromarray(pixels(205)).convert("L").save(image)
    return root, verify(root, workers=2, loader=request.param)


@pytest.mark.parametrize("name", BAD)
def test_bad_pair_is_listed_with_its_reason(mixed: tuple[Path, Summary], name: str) -> None:
    _, kind, words = BAD[name]
    record = quarantined(mixed[1])[f"images/{name}.jpg"]
    assert record["kind"] == kind
    assert words in record["reason"]
    assert "\n" not in record["reason"]


def test_swapped_maps_and_duplicates_are_listed(mixed: tuple[Path, Summary]) -> None:
    records = quarantined(mixed[1])
    for name in ("swapped-a", "swapped-b"):
        assert records[f"images/{name}.jpg"]["kind"] == "sizes differ"
    assert records["images/twin.jpg"]["kind"] == "duplicate"
    assert "images/twin.jpg: the same bytes as images/003.jpg" in records["images/twin.jpg"]["reason"]
    assert "images/003.jpg" not in records
    assert len(records) == len(BAD) + 3


def test_summary_counts_everything(mixed: tuple[Path, Summary]) -> None:
    root, summary = mixed
    assert (summary.total, summary.good, summary.exit_code) == (20 + len(BAD) + 6, 23, 1)
    assert sum(summary.quarantined.values()) == len(BAD) + 3
    assert summary.quarantined["unreadable"] == 6
    assert summary.remarks == {"EXIF-rotated": 1, "CMYK": 1, "grey": 1}
    assert (summary.value_type, summary.decoded) == ("uint16", summary.total)
    assert not (root / ".manifest.tsv.part").exists()
    text = "\n".join(summary.lines())
    for part in ("23 of 43 pairs are good, uint16 maps", "6 left out: unreadable", "1 kept, to know: CMYK"):
        assert part in text


def test_training_gets_the_good_pairs_only(mixed: tuple[Path, Summary]) -> None:
    root, summary = mixed
    bad = quarantined(summary)
    for path in (root, root / "manifest.tsv"):
        manifest = read_manifest(path)
        images = [image for image, _ in manifest.pairs]
        assert len(manifest) == summary.good == len(images)
        assert images == sorted(images)
        assert not bad.keys() & set(images)
        for index in range(len(manifest)):
            image, structure = manifest.members(index)
            assert structure is not None
            assert (image.size, structure.size) == (os.path.getsize(image.path), os.path.getsize(structure.path))
            decoded = PillowDecoder(1).decode([(image.read(), structure.read())])[0]
            assert isinstance(decoded, DecodedPair)
    assert manifest.verification is not None
    assert (manifest.verification.channels, manifest.verification.value_type) == (1, "uint16")
    without_maps = read_manifest(root, structure=False)
    assert without_maps.pairs == tuple((image, None) for image in images)
    assert without_maps.members(0)[0].size == os.path.getsize(root / images[0])


def test_clean_folder_keeps_the_fingerprint_of_the_unverified_one(tmp_path: Path) -> None:
    unverified = read_manifest(write_pairs(tmp_path, 3))
    calls: list[tuple[int, int]] = []
    summary = verify(tmp_path, workers=1, progress=lambda done, total: calls.append((done, total)))
    assert (summary.exit_code, summary.good, summary.quarantined, summary.remarks) == (0, 3, {}, {})
    assert calls == [(0, 3), (3, 3)]
    assert summary.quarantine.read_bytes() == b""
    before = summary.manifest.read_bytes()
    assert read_manifest(tmp_path).pairs == unverified.pairs
    assert read_manifest(tmp_path).sha256 == unverified.sha256
    assert verify(summary.manifest, workers=2).manifest.read_bytes() == before
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=shutil.ignore_patterns("moved"))
    assert read_manifest(tmp_path / "moved").sha256 == unverified.sha256


def test_no_good_pair_is_unusable(tmp_path: Path) -> None:
    for path in write_pair(tmp_path, "a", 0):
        path.write_bytes(b"")
    assert verify(tmp_path, workers=1).exit_code == 3
    one_line(lambda: read_manifest(tmp_path), str(tmp_path), "no pair passed `sgmim verify`")


def test_options(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    shutil.copy(tmp_path / "images/000.jpg", tmp_path / "images/001.jpg")
    assert verify(tmp_path, workers=1, keep_duplicates=True).exit_code == 0
    summary = verify(tmp_path, workers=1, min_side=H + 1)
    assert summary.quarantined == {"too small": 2}
    assert verify(tmp_path, workers=1, channels=3).quarantined == {"channels": 2}
    for options in ({"workers": 0}, {"channels": 0}, {"min_side": 0}):
        one_line(lambda options=options: verify(tmp_path, **options), next(iter(options)).replace("_", "-"))  # type: ignore[misc]
    one_line(lambda: create_decoder("dally", 1), "--loader dally")


def test_of_equally_many_types_8_bits_are_left_out(tmp_path: Path) -> None:
    for seed, (name, values) in enumerate((("a", depth(0) >> 8), ("b", depth(1)))):
        _, structure = write_pair(tmp_path, name, seed)
        Image.fromarray(values.astype(np.uint8) if name == "a" else values).save(structure)
    summary = verify(tmp_path, workers=1)
    assert (list(quarantined(summary)), summary.value_type) == (["images/a.jpg"], "uint16")


def test_images_only_serve_images_only(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    shutil.rmtree(tmp_path / "structure")
    one_line(lambda: verify(tmp_path), "no structure/ folder", "--images-only")
    summary = verify(tmp_path, structure=False, workers=1)
    assert (summary.exit_code, summary.value_type) == (0, "")
    assert len(read_manifest(tmp_path, structure=False)) == 2
    write_pairs(tmp_path, 2)
    one_line(lambda: read_manifest(tmp_path), "without looking at the maps", f"sgmim verify {tmp_path}")


def test_other_files_of_that_name_are_left_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    (tmp_path / "manifest.tsv").write_text("images/000.jpg\tstructure/000.png\n")
    one_line(lambda: verify(tmp_path), "manifest.tsv was not written by `sgmim verify`")
    one_line(lambda: read_manifest(tmp_path), "manifest.tsv was not written by `sgmim verify`")
    assert len(read_manifest(tmp_path / "manifest.tsv")) == 1  # a list of pairs
    (tmp_path / "manifest.tsv").unlink()
    (tmp_path / "shards.json").touch()
    one_line(lambda: verify(tmp_path), "verify the folder before packing it")


def test_odd_file_names_survive(tmp_path: Path) -> None:
    names = ["#1", "tab\there", "line\nend\r", "back\\x41", "raw\udcff\udc80", "spá ce"]
    for seed, name in enumerate([*names, "bad\t\udcff"]):
        write_pair(tmp_path, name, seed)
    cut(tmp_path / "images/bad\t\udcff.jpg")
    (tmp_path / "#n").mkdir()
    before = {image for image, _ in read_manifest(tmp_path).pairs}
    summary = verify(tmp_path, workers=1)
    summary.manifest.read_bytes().decode()  # as text it is clean
    found = read_manifest(tmp_path)
    assert {image for image, _ in found.pairs} == {f"images/{name}.jpg" for name in names}
    assert list(quarantined(summary)) == ["images/bad\t\udcff.jpg"]
    assert {image for image, _ in read_verified(summary.manifest).quarantined} == before - {i for i, _ in found.pairs}
    for index in range(len(found)):
        found.members(index)[0].read()


def test_list_file_with_missing_files(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", 4)
    os.remove(tmp_path / "set/images/001.jpg")
    shutil.copy(tmp_path / "set/images/000.jpg", tmp_path / "#0.jpg")
    rows = [json.dumps({"image": "#0.jpg", "structure": f"{tmp_path}/set/structure/000.png"})]
    rows += [
        json.dumps({"image": f"set/images/{i:03d}.jpg", "structure": f"set/structure/{i:03d}.png"})
        for i in (3, 1, 2, 2)
    ]
    source = tmp_path / "l.jsonl"
    source.write_text("\n".join(rows))
    one_line(lambda: read_manifest(source), "001.jpg does not exist")
    summary = verify(source, workers=1)
    assert (summary.manifest, summary.quarantine) == (
        tmp_path / "l.jsonl.manifest.tsv",
        tmp_path / "l.jsonl.quarantine.jsonl",
    )
    assert summary.quarantined == {"missing": 1, "duplicate": 1}
    for path in (source, summary.manifest):
        assert [image for image, _ in read_manifest(path).pairs] == [
            "#0.jpg",
            "set/images/002.jpg",
            "set/images/003.jpg",
        ]
    assert len(read_manifest(source, structure=False)) == 3
    os.remove(tmp_path / "set/structure/003.png")
    one_line(lambda: read_manifest(source), "l.jsonl:2: ", "003.png does not exist")
    source.write_text("\n".join([*rows[:1], *rows[2:]]))
    one_line(lambda: read_manifest(source), "0 pair(s) added, 1 removed")
