"""Traces are written of the chosen steps and no others, whole or not at all."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sgmim_fast.train import profiling
from sgmim_fast.train.profiling import StepProfiler

PARTS = ("data", "forward", "backward", "optimizer")


def steps(profiler: StepProfiler, first: int, last: int) -> None:
    """What a training loop does."""
    for step in range(first, last + 1):
        with profiler.step(step):
            for part in PARTS:
                with profiler.span(part):
                    torch.ones(8, 8) @ torch.ones(8, 8)


def make(run: Path, chosen: tuple[int, ...], said: list[str], rank: int = 0) -> StepProfiler:
    return StepProfiler(run, chosen, rank, torch.device("cpu"), said.append)


def test_chosen_steps_leave_traces(tmp_path: Path) -> None:
    said: list[str] = []
    steps(make(tmp_path, (2, 5), said, rank=1), 1, 6)
    names = [f"step_{step:06d}_rank1.{kind}" for step in (2, 5) for kind in ("json.gz", "txt")]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    assert said == [f"traced step {step}: {tmp_path / 'profile' / f'step_{step:06d}_rank1.json.gz'}" for step in (2, 5)]
    for step in (2, 5):
        with gzip.open(tmp_path / "profile" / f"step_{step:06d}_rank1.json.gz") as file:
            events = json.load(file)["traceEvents"]
        ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert sorted(ranges) == sorted([f"step {step}", *PARTS])
        products = [event for event in events if event["name"] == "aten::mm"]
        assert [event["args"]["Input Dims"][:2] for event in products] == [[[8, 8], [8, 8]]] * 4
        table = (tmp_path / "profile" / f"step_{step:06d}_rank1.txt").read_text()
        assert table.startswith(f"step {step}, rank 1, cpu: ")
        assert "aten::mm" in table


def test_a_resumed_run_leaves_earlier_traces_alone(tmp_path: Path) -> None:
    said: list[str] = []
    steps(make(tmp_path, (2,), said), 1, 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "profile").iterdir()}
    resumed = make(tmp_path, (2,), said)
    assert resumed.warning(9) == ""
    steps(resumed, 4, 6)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "profile").iterdir()} == before


def test_steps_after_the_last_are_told(tmp_path: Path) -> None:
    assert make(tmp_path, (3, 12, 11), []).warning(10) == (
        "warning: --profile 11 12 leaves no trace: the run ends at 10"
    )


def test_without_steps_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the profiler was used")

    monkeypatch.setattr(profiling, "profile", refuse)
    monkeypatch.setattr(profiling, "record_function", refuse)
    steps(make(tmp_path, (), []), 1, 3)
    steps(make(tmp_path, (7,), []), 1, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("in the way")
    said: list[str] = []
    steps(make(tmp_path, (1,), said), 1, 2)
    assert len(said) == 1
    assert said[0].startswith("warning: no trace of step 1 is written: ")
    steps(make(tmp_path, (1,), said, rank=3), 1, 2)
    err = capfd.readouterr().err
    assert err.startswith("warning: rank 3: no trace of step 1 is written: ")
    assert err.count("\n") == 1


def test_a_step_that_fails_is_not_traced(tmp_path: Path) -> None:
    profiler = make(tmp_path, (1, 2), [])
    with pytest.raises(ZeroDivisionError), profiler.step(1):
        raise ZeroDivisionError
    assert not (tmp_path / "profile").exists()
    steps(profiler, 2, 2)
    assert len(list((tmp_path / "profile").iterdir())) == 2
