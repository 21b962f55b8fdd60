"""A run on two machines, which lose each other in every way they can, has the losses of one that nothing disturbed."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_runs import arguments, rows
from two_hosts import Started, TwoHosts, two_hosts

STEPS = 16
EVERY = 4
PORT = "29500"
LOST = "error: another rank has ended or cannot be reached"
OPTIONS: dict[str, Any] = {"train__max_steps": STEPS, "train__checkpoint_every": EVERY, "data__loader": "torch"}
COMPARED = ("step", "epoch", "loss", "image_loss", "structure_loss", "lr", "grad_norm")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts
    assert not hosts.left()


def by_deepspeed(hosts: TwoHosts, words: list[str]) -> list[Started]:
    """One command a host, as without SSH."""
    hostfile = hosts.logs / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    launcher += ["--master_addr", hosts.addresses[0], "--master_port", PORT]
    module = ["--module", "sgmim_fast.pretrain", *words]
    return [hosts.start(host, [*launcher, "--node_rank", str(host), *module]) for host in (0, 1)]


def by_torchrun(hosts: TwoHosts, words: list[str]) -> list[Started]:
    """The agents meet at the first host and start the ranks again if one ends."""
    started = []
    for host, address in enumerate(hosts.addresses):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.addresses[0]}:{PORT}", "--rdzv-id", "run"]
        agent += ["--rdzv-conf", f"is_host={int(host == 0)}", "--local-addr", address, "--max-restarts", "3"]
        agent += ["-m", "sgmim_fast.pretrain", *words]
        started.append(hosts.start(host, agent, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    return started


def when(ready: Callable[[], bool], started: list[Started]) -> None:
    """Wait until the run has come so far."""
    end = time.monotonic() + 240
    while not ready():
        assert time.monotonic() < end, started[0].output()
        assert all(one.process.poll() is None for one in started), started[0].output() + started[1].output()
        time.sleep(0.01)


def latest(run: Path) -> int:
    pointer = run / "checkpoints" / "latest"
    return int(pointer.read_text().strip().removeprefix("step_")) if pointer.exists() else 0


def succeed(started: list[Started]) -> None:
    for one in started:
        assert one.end(300) == 0, one.output()


def same(run: Path, other: Path, steps: int) -> None:
    """To the bit; steps that were done twice count as done last."""
    last, expected = ({row["step"]: row for row in rows(folder)} for folder in (run, other))
    assert len(expected) >= steps
    for step in range(1, steps + 1):
        for name in COMPARED:
            assert last[step][name] == expected[step][name], (step, name)


@pytest.fixture(scope="module")
def undisturbed(hosts: TwoHosts, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(by_deepspeed(hosts, arguments(pairs, run, **OPTIONS)))
    return run


def test_two_hosts_give_the_losses_of_one(undisturbed: Path, two_ranks: Path) -> None:
    assert [row["step"] for row in rows(undisturbed)] == list(range(1, STEPS + 1))
    same(undisturbed, two_ranks, 6)


def test_a_run_that_loses_a_rank_then_the_network_then_a_rank_under_torchrun(
    hosts: TwoHosts, undisturbed: Path, pairs: Path, tmp_path: Path
) -> None:
    """One run goes through all of it, so that each start both ends one trouble and meets the next."""
    run = tmp_path / "run"
    words = [*arguments(pairs, run, **OPTIONS, fault__collective_timeout=20), "--resume", "auto"]

    started = by_deepspeed(hosts, words)  # a rank is killed
    when(lambda: latest(run) >= EVERY, started)
    os.kill(hosts.rank(1), signal.SIGKILL)
    assert started[1].end(60) != 0
    assert started[0].end(120) == 69, started[0].output()
    assert_one_line(started[0])
    before = latest(run)
    assert before < STEPS, "killed before the end"

    started = by_deepspeed(hosts, words)  # goes on; the cable is cut
    when(lambda: latest(run) > before, started)
    hosts.cut()
    for one in started:
        assert one.end(200) == 69, one.output()
        assert_one_line(one)
        assert f"from step {before}" in started[0].output()
    hosts.mend()
    before = latest(run)
    assert before < STEPS, "cut before the end"

    started = by_torchrun(hosts, words)  # goes on; a rank is killed and both are started again
    when(lambda: f"from step {before}" in started[0].output(), started)
    when(lambda: rows(run)[-1]["step"] > before, started)
    os.kill(hosts.rank(1), signal.SIGKILL)
    succeed(started)
    assert started[0].output().count("from step") == 2, started[0].output()

    assert latest(run) == STEPS
    same(run, undisturbed, STEPS)


def assert_one_line(started: Started) -> None:
    output = started.output()
    assert next(line for line in output.splitlines() if line.startswith("error:")).startswith(LOST), output
    assert "Traceback" not in output


def test_hosts_go_with_all_they_run_even_if_the_test_fails(tmp_path: Path) -> None:
    stubborn = ["bash", "-c", "trap '' TERM HUP; setsid sleep 1000 & sleep 1000"]

    def fail() -> None:
        with two_hosts(tmp_path) as hosts:
            made.append(hosts)
            started = [hosts.start(host, stubborn) for host in (0, 1)]
            when(lambda: sum(word.startswith("process") for word in hosts.left()) >= 6, started)
            raise ZeroDivisionError

    made: list[TwoHosts] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert not made[0].left()


@pytest.mark.parametrize(("ci", "system", "expected"), [
    ("true", "ID=debian\n", pytest.fail.Exception),
    ("true", "ID=fedora\n", pytest.skip.Exception),
    ("", "ID=debian\n", pytest.skip.Exception),
])  # fmt: skip
def test_without_ip_they_are_skipped_but_not_in_ci(
    ci: str, system: str, expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("two_hosts._os_release", lambda: system)
    with pytest.raises(expected, match="install iproute2"), two_hosts(tmp_path):
        pass
