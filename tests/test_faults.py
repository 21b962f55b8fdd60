"""Faults that happen for real: kills in the middle of a save, pre-emption, full disks, hanging files, poisoned batches.

Each asserts what survives: the last complete checkpoint, and after ``--resume auto`` the bits of an undisturbed run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sgmim_fast.errors import EXIT_LOST, EXIT_PREEMPTED
from sgmim_fast.train.run_folder import damage, list_checkpoints
from tests.training_runs import (
    COURSE,
    all_gone,
    arguments,
    command,
    latest,
    rows,
    run,
    run_environment,
    same_course,
    succeed,
    train,
)

KILLS = {
    "at-once": [("before", 1), ("shard", 0), ("shard", 1), ("written", 1), ("rename", 0), ("latest", 0), ("old", 0)],
    "beside": [("shard", 1), ("rename", 0)],
}


@pytest.mark.parametrize("writing", KILLS)
def test_a_kill_at_any_point_of_a_save_loses_no_checkpoint(
    writing: str, two_ranks: Path, pairs: Path, tmp_path: Path
) -> None:
    """Every save of a run is hit once at another point; each start goes on from the checkpoint before."""
    output = tmp_path / "killed"
    words = [*arguments(pairs, output, train__checkpoint_every=1), "--resume", "auto"]
    if writing == "beside":
        words += ["--train.async-checkpoint"]
    kept = 0
    for point, rank in KILLS[writing]:
        fault = {"point": point, "rank": rank, "step": kept + 1}
        done = run(command(2, words, "tests.faulty_pretrain"), SGMIM_TEST_FAULT=json.dumps(fault))
        assert done.returncode not in (0, 2), (fault, done.stdout + done.stderr)
        assert all_gone(str(output)), fault
        assert "Traceback" not in done.stderr, (fault, done.stderr)
        there = list_checkpoints(output)
        complete = [int(folder.name[5:]) for folder in there if not damage(folder)]
        assert len(complete) == len(there), (fault, "whatever has a checkpoint's name is whole")
        kept += point in ("latest", "old")  # the folder had its name already
        assert max(complete, default=0) == kept, fault
        if kept and point != "latest":
            assert latest(output) == f"step_{kept:06d}"
    out = succeed(train(2, words))
    assert out.count("saved ") == 6 - kept
    same_course(output, two_ranks)
    assert not [path.name for path in (output / "checkpoints").iterdir() if path.name.startswith(".")]


def start(words: list[str]) -> subprocess.Popen[str]:
    pretrain = [sys.executable, "-m", "sgmim_fast.cli", "pretrain", "--num-gpus", "2", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A shell that runs the tests in the background hands on that Ctrl-C is to be ignored.
    return subprocess.Popen(
        pretrain, env=run_environment(), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes
    )


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_pre_emption_saves_the_last_step(two_ranks: Path, pairs: Path, tmp_path: Path) -> None:
    """SIGTERM to the command, as `kill` sends it; to every process, as queues do; and a launcher that is gone."""
    output = tmp_path / "stopped"
    options = {"data__workers": 1, "train__checkpoint_every": 100}
    words = [*arguments(pairs, output, **options, train__max_steps=48), "--resume", "auto"]
    config = output / "config.json"

    def to_the_command(process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGTERM)

    def to_every_process(process: subprocess.Popen[str]) -> None:
        for one in descendants(process):
            one.send_signal(signal.SIGTERM)

    def launcher_killed(process: subprocess.Popen[str]) -> None:
        (launcher,) = psutil.Process(process.pid).children()
        launcher.kill()

    step = 0
    for interrupt in (to_the_command, to_every_process, launcher_killed):
        before = config.stat().st_mtime_ns if config.exists() else 0
        process = start(words)
        wait_for(lambda before=before: config.exists() and config.stat().st_mtime_ns > before, process)  # type: ignore[misc]
        interrupt(process)
        out = process.communicate(timeout=120)[0]
        assert all_gone(str(output)), out
        assert "Traceback" not in out
        assert "stopped as asked; --resume auto goes on" in out
        done = rows(output)[-1]["step"]
        assert step < done < 48, out
        step = done
        assert latest(output) == f"step_{step:06d}", "the last step is saved"
        if interrupt is to_the_command:
            assert process.returncode == EXIT_PREEMPTED, out
        else:
            assert process.returncode not in (0, 2), out
    step = max(step + 1, 6)
    succeed(train(2, [*arguments(pairs, output, **options, train__max_steps=step), "--resume", "auto"]))
    assert [row["step"] for row in rows(output)] == list(range(1, step + 1))
    for ours, undisturbed in zip(rows(output), rows(two_ranks), strict=False):
        for name in COURSE:
            assert ours[name] == undisturbed[name], (name, ours["step"])


def test_interrupting_the_command_ends_it_quietly(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(arguments(pairs, output, train__max_steps=48))
    wait_for((output / "config.json").exists, process)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert all_gone(str(output))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB; less than a run of the tiny model writes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"no file system can be mounted: {mounted.stderr}")
        pytest.skip("mounting a file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_with_one_line(small_disk: Path, pairs: Path) -> None:
    done = train(2, arguments(pairs, small_disk / "run", train__checkpoint_every=1))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(r"cannot write checkpoint .*step_00000[12]: .*(No space left on device|GB are free)", line)
    assert "Traceback" not in done.stderr
    assert not list((small_disk / "run" / "checkpoints").glob(".*"))
    for folder in list_checkpoints(small_disk / "run"):
        assert not damage(folder)


def test_a_loader_that_hangs_is_ended_and_says_where(pairs: Path, tmp_path: Path) -> None:
    """A pipe in the place of an image: opening it waits for ever, as a dead network disk does."""
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    (data / "images" / "07.jpg").unlink()
    os.mkfifo(data / "images" / "07.jpg")
    output = tmp_path / "run"
    done = train(2, [*arguments(data, output, data__loader="torch", data__workers=1), "--fault.stall-timeout", "30"])
    assert done.returncode == EXIT_LOST, done.stdout + done.stderr
    assert re.search(r"error: rank [01] has done nothing for 30 s while waiting for a batch of step \d", done.stderr)
    stalls = [path.read_text() for path in (output / "stalls").iterdir()]
    assert any("torch_loader.py" in stall for stall in stalls), "the other rank may tell that it waits for this one"
    assert "members.py" in done.stderr, "the loader process tells that it reads a file"
    assert all_gone(str(output))


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run_when_many(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "poisoned"
    words = arguments(pairs, output, train__checkpoint_every=1, train__keep_last=9)
    fault: dict[str, Any] = {"point": "poison", "rank": 1, "steps": [2, 4, 5, 6]}
    poisoned = run(
        command(2, [*words, "--fault.max-skipped-steps", "2"], "tests.faulty_pretrain"),
        SGMIM_TEST_FAULT=json.dumps(fault),
    )
    assert poisoned.returncode == 2, poisoned.stdout + poisoned.stderr
    named = [json.loads(line) for line in (output / "nonfinite.jsonl").read_text().splitlines()]
    assert [(row["step"], row["rank"]) for row in named] == [(step, 1) for step in (2, 4, 5, 6)]
    assert all(row["loss"] in ("nan", "inf") for row in named), "a masked pixel's loss is infinite, a visible one's NaN"
    sample = named[-1]["samples"][0]
    assert all(row["samples_not_finite"] == row["samples"][:1] for row in named)
    (line,) = [line for line in poisoned.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(
        f"error: 3 steps in a row had a gradient that is not finite, the last with samples {sample};"
    )
    assert len(list((output / "nonfinite").glob("step_*_rank1_0.safetensors"))) == 4
    told = {row["step"]: row for row in rows(output)}
    assert [told[step]["skipped_steps"] for step in (1, 2, 3, 4, 5)] == [0, 1, 1, 2, 3]
    assert told[2]["grad_norm"] is None
    assert told[2]["loss"] is not None, "rank 0's loss was finite"
