"""A verified data set that changed since, and a manifest that somebody edited."""

import shutil
from pathlib import Path

from verify_cases import cut, one_line, write_pair, write_pairs

from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.verification.verify import verify


def test_changed_listing_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    cut(tmp_path / "images/001.jpg")
    verify(tmp_path, workers=1)
    assert len(read_manifest(tmp_path)) == 2
    remedies = (f"sgmim verify {tmp_path}", f"delete {tmp_path / 'manifest.tsv'}")
    write_pair(tmp_path, "n/new", 9)
    one_line(lambda: read_manifest(tmp_path), "1 pair(s) added, 0 removed", "images/n/new.jpg", *remedies)
    one_line(lambda: read_manifest(tmp_path, structure=False), "1 pair(s) added, 0 removed", *remedies)
    shutil.rmtree(tmp_path / "images/n")
    assert len(read_manifest(tmp_path)) == 2
    (tmp_path / "images/001.jpg").unlink()  # a quarantined one counts too
    one_line(lambda: read_manifest(tmp_path), "0 pair(s) added, 1 removed", "images/001.jpg", *remedies)
    verify(tmp_path, workers=1)
    (tmp_path / "structure/002.png").rename(tmp_path / "structure/002.tif")
    one_line(lambda: read_manifest(tmp_path), "1 pair(s) added, 1 removed", "images/002.jpg", *remedies)
    assert len(read_manifest(tmp_path, structure=False)) == 2
    (tmp_path / "manifest.tsv").unlink()
    assert read_manifest(tmp_path).verification is None


def test_changed_file_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    verify(tmp_path, workers=1)
    image, structure = read_manifest(tmp_path).members(0)
    assert structure is not None
    image.read()
    for member in (image, structure):
        with open(member.path, "ab") as file:
            file.write(b"more")
        one_line(member.read, member.path, "when the data set was verified")


def test_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = verify(write_pairs(tmp_path, 3), workers=1).manifest
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    for edited in (
        "".join(lines[:-1]),
        text[:-9],
        text.replace("001", "005"),
        lines[0] + "a\tb\n",
        lines[0][:40] + "\n",
    ):
        path.write_text(edited)
        one_line(lambda: read_manifest(tmp_path), "manifest.tsv is damaged or was edited", f"sgmim verify {tmp_path}")
    path.write_text(text.replace('"sgmim_manifest": 1', '"sgmim_manifest": 9'))
    one_line(lambda: read_manifest(tmp_path), "is of format 9")
    verify(tmp_path, workers=1)
    assert path.read_text() == text
