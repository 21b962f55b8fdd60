"""Files of a checkpoint: written is what was there when it was asked for; failures wait until they are asked about."""

import errno
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
import torch

from sgmim_fast.train.run_folder import list_files
from sgmim_fast.train.shard_writer import ChecksumFile, ShardWriter


@pytest.fixture(params=[False, True], ids=["at-once", "beside"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ShardWriter]:
    made = ShardWriter(beside=request.param)
    made.begin(tmp_path)
    yield made
    made.close()


def test_files_and_their_facts(writer: ShardWriter, tmp_path: Path) -> None:
    state = {"weights": torch.arange(1000.0), "step": 3}
    (tmp_path / "deep").mkdir()
    writer.save(state, str(tmp_path / "deep" / "shard.pt"))
    writer.put(tmp_path / "state.json", lambda path: path.write_text("{}"))
    state["weights"].zero_()  # training goes on
    facts = writer.wait()
    assert not writer.busy
    assert writer.failure is None
    assert facts == list_files(tmp_path)
    assert set(facts) == {"deep/shard.pt", "state.json"}
    loaded = writer.load(str(tmp_path / "deep" / "shard.pt"))
    assert torch.equal(loaded["weights"], torch.arange(1000.0))
    assert loaded["step"] == 3
    writer.begin(tmp_path / "next")
    assert writer.wait() == {}


def test_a_failure_is_kept(writer: ShardWriter, tmp_path: Path) -> None:
    writer.save({"a": 1}, str(tmp_path / "missing" / "shard.pt"))
    writer.put(tmp_path / "fine.txt", lambda path: path.write_text("fine"))
    assert set(writer.wait()) == {"fine.txt"}
    assert isinstance(writer.failure, FileNotFoundError)
    writer.begin(tmp_path)
    assert writer.failure is None


def test_writing_beside_training_is_seen(tmp_path: Path) -> None:
    writer, go_on = ShardWriter(beside=True), Event()
    writer.begin(tmp_path)
    writer.put(tmp_path / "slow.txt", lambda path: (go_on.wait(60), path.write_text("done")))
    assert writer.busy
    go_on.set()
    writer.wait()
    assert not writer.busy
    writer.close()


def test_a_full_disk_is_told_at_the_end_alone() -> None:
    """torch.save writes through C++ code that must see no exception."""
    file = ChecksumFile(Path("/dev/full"))
    assert file.write(b"x" * 10) == 10
    torch.save(torch.zeros(100_000), file)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left") as failure:
        file.close_durably()
    assert failure.value.errno == errno.ENOSPC
