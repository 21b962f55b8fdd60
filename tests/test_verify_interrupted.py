"""Verifications that are interrupted, and decoders that die."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from verify_cases import cut, one_line, quarantined, write_pair, write_pairs

from sgmim_fast.data.decoding import DecodedPair, Decoder, EncodedPair, PillowDecoder
from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.verification.checks import Checked, CheckSettings, stamp_of
from sgmim_fast.data.verification.journal import Journal
from sgmim_fast.data.verification.verify import verify
from sgmim_fast.errors import UserError

ROOT = Path(__file__).parents[1]
KILLED_AFTER = 60  # seconds; what is waited for takes a fraction of one on a quiet machine


class CountingDecoder(PillowDecoder):
    """Writes one byte a pair into the file that COUNT_DECODED names, whatever process it is in."""

    def decode(self, pairs: Sequence[EncodedPair]) -> list[DecodedPair | UserError]:
        with open(os.environ["COUNT_DECODED"], "ab") as file:
            file.write(b"." * len(pairs))
        return super().decode(pairs)


def make_counting(loader: str, channels: int) -> Decoder:
    return CountingDecoder(channels)


class FatalDecoder(PillowDecoder):
    """Dies, or fails, as the name of the image says."""

    def decode(self, pairs: Sequence[EncodedPair]) -> list[DecodedPair | UserError]:
        for image, _ in pairs:
            if "segfault" in image.name:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "exit" in image.name:
                os._exit(5)
            if "oom" in image.name:
                os.kill(os.getpid(), signal.SIGKILL)
            if "bug" in image.name:
                raise KeyError("bug")
        return super().decode(pairs)


def make_fatal(loader: str, channels: int) -> Decoder:
    return FatalDecoder(channels)


def make_none(loader: str, channels: int) -> Decoder:
    raise UserError("there is no decoder today; come back tomorrow")


def make_dead(loader: str, channels: int) -> Decoder:
    os._exit(7)


def test_pair_that_kills_its_process_is_listed_and_no_other(tmp_path: Path) -> None:
    write_pairs(tmp_path, 40)
    for seed, name in enumerate(("005-segfault", "017-exit", "018-bug"), start=50):
        write_pair(tmp_path, name, seed)
    summary = verify(tmp_path, workers=2, make_decoder=make_fatal)
    assert summary.quarantined == {"ends the decoder": 2, "unreadable": 1}
    records = quarantined(summary)
    assert "005-segfault.jpg: the decoder ends its process (SIGSEGV)" in records["images/005-segfault.jpg"]["reason"]
    assert "(exit code 5)" in records["images/017-exit.jpg"]["reason"]
    assert "the decoder fails: 'bug'" in records["images/018-bug.jpg"]["reason"]
    assert len(read_manifest(tmp_path)) == 40


def test_process_that_is_killed_or_cannot_start_is_one_line(tmp_path: Path) -> None:
    write_pair(tmp_path, "oom", 0)
    for make, words in (
        (make_fatal, ("ended from outside (SIGKILL)", "lower --workers")),
        (make_none, ("no decoder today",)),
        (make_dead, ("ended at its start (exit code 7)",)),
    ):
        one_line(lambda make=make: verify(tmp_path, workers=1, make_decoder=make), *words)  # type: ignore[misc]
        assert not (tmp_path / "manifest.tsv").exists()


SLOW_VERIFY = """
import sys, time
from sgmim_fast.data.decoding import PillowDecoder
from sgmim_fast.data.verification.verify import verify

class SlowDecoder(PillowDecoder):
    def decode(self, pairs):
        time.sleep(0.05)
        return super().decode(pairs)

def make_slow(loader, channels):
    return SlowDecoder(channels)

if __name__ == "__main__":
    verify(sys.argv[1], workers=1, make_decoder=make_slow)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_verification_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: signal.Signals
) -> None:
    root = write_pairs(tmp_path / "set", 80)
    cut(root / "images/002.jpg")
    script, journal = tmp_path / "slow.py", root / ".manifest.tsv.part"
    script.write_text(SLOW_VERIFY)
    process = subprocess.Popen(
        [sys.executable, script, root],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + KILLED_AFTER
    while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + 16:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, ending)
    assert process.wait(KILLED_AFTER) != 0
    known = journal.read_bytes().count(b"\n") - 1
    assert 16 <= known < 80
    assert not (root / "manifest.tsv").exists()
    with open(journal, "ab") as file:
        file.write(b'[1, "images/001.jpg", "struct')  # a torn line
    write_pair(root, "001", 999)  # changed since
    write_pair(root, "000-new", 1000)  # moves all indices
    counted = tmp_path / "counted"
    monkeypatch.setenv("COUNT_DECODED", str(counted))
    summary = verify(root, workers=1, make_decoder=make_counting)
    assert summary.decoded == counted.stat().st_size == 80 - known + 2
    assert summary.quarantined == {"unreadable": 1}
    assert "002.jpg: cannot be read" in quarantined(summary)["images/002.jpg"]["reason"]
    resumed = summary.manifest.read_bytes()
    assert verify(root, workers=1).manifest.read_bytes() == resumed


def test_journal_of_other_settings_is_not_used_and_only_one_may_write(tmp_path: Path) -> None:
    pairs = read_manifest(write_pairs(tmp_path, 2)).pairs
    path = tmp_path / ".manifest.tsv.part"
    settings = CheckSettings(structure=True, channels=1, loader="torch", decoder="any", min_side=32)
    journal = Journal(path, settings)
    image, structure = (os.stat(tmp_path / file) for file in pairs[1] if file)
    checked = Checked(
        (image.st_size, image.st_mtime_ns, structure.st_size, structure.st_mtime_ns), "odd", "why\n\udcff", 1, 2, "ab"
    )
    journal.add(pairs, [(1, checked)])
    one_line(lambda: Journal(path, settings), "another `sgmim verify` works on this data set")
    journal.close()
    journal = Journal(path, settings)
    assert list(journal.results(pairs, tmp_path)) == [(1, checked)]
    journal.close()
    path.write_bytes(path.read_bytes() + b"[]\nnull\n{}\n")
    journal = Journal(path, settings)
    assert list(journal.results(pairs, tmp_path)) == [(1, checked)]
    journal.close()
    other = Journal(path, CheckSettings(structure=True, channels=3, loader="torch", decoder="any", min_side=32))
    assert list(other.results(pairs, tmp_path)) == []
    other.close(delete=True)
    assert not path.exists()


def test_verification_that_was_interrupted_at_its_end_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path, 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "quarantine.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr("sgmim_fast.data.verification.verify.write_quarantine", full)
        with pytest.raises(OSError, match="No space left"):
            verify(tmp_path, workers=1)
    assert not (tmp_path / "manifest.tsv").exists()
    summary = verify(tmp_path, workers=1, make_decoder=make_dead)
    assert (summary.decoded, summary.good, summary.exit_code) == (0, 3, 0)


def test_full_disk_names_the_journal_and_costs_the_last_line_only(tmp_path: Path) -> None:
    pairs = read_manifest(write_pairs(tmp_path, 2)).pairs
    settings = CheckSettings(structure=True, channels=1, loader="torch", decoder="any", min_side=32)
    path = tmp_path / ".manifest.tsv.part"
    checked = [Checked(stamp_of(*(str(tmp_path / file) for file in pair if file)), "odd", "why" * 50) for pair in pairs]
    journal = Journal(path, settings)
    journal.add(pairs, [(0, checked[0])])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))
        with pytest.raises(OSError, match="too large") as caught:
            journal.add(pairs, [(1, checked[1])])
        journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    journal = Journal(path, settings)
    assert list(journal.results(pairs, tmp_path)) == [(0, checked[0])]
    journal.add(pairs, [(1, checked[1])])
    assert list(journal.results(pairs, tmp_path)) == list(enumerate(checked))
    journal.close()
