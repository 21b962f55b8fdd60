"""Requests to stop, and checkpoints that cannot be rewritten for another number of ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sgmim_fast.errors import UserError
from sgmim_fast.train import stopping, universal
from sgmim_fast.train.stopping import LAUNCHED, MARK, StopRequest


def test_a_sigterm_is_noted_as_often_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHED, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.here
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.here
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("launched", [False, True])
def test_a_launcher_that_is_gone_asks_to_stop_and_a_shell_does_not(
    launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCHED, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHED, "0")
    stop = StopRequest()
    assert not stop.here
    monkeypatch.setattr(stopping.os, "getppid", lambda: 1)
    assert stop.here == launched


def test_a_launcher_that_was_gone_before_anyone_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes its place does not have the mark that `sgmim pretrain` gave both."""
    monkeypatch.setenv(LAUNCHED, "0")
    assert not StopRequest().here
    monkeypatch.setenv(MARK, "some run")
    assert StopRequest().here
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        monkeypatch.setattr(stopping.os, "getppid", lambda: launcher.pid)
        assert not StopRequest().here
        launcher.kill()


def test_what_is_no_checkpoint_is_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints" / "step_000002"
    folder.mkdir(parents=True)
    (folder / "model_states.pt").write_bytes(b"none")
    with pytest.raises(
        UserError, match=r"step_000002 cannot be rewritten for this number of ranks \(.+\); resume on as"
    ):
        universal.make_universal(folder)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]
    usage = type("Usage", (), {"free": 3})
    monkeypatch.setattr(universal.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0.00 GB in .*checkpoints; 0.00 GB are free there"):
        universal.make_universal(folder)
