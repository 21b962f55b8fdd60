"""The scripts of docs/cluster with a SLURM, an SSH and a Python that only pretend: what runs again after what."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "docs" / "cluster"
SRUN = """
[[ $1 == --kill-on-bad-exit=0 ]] || exit 99
shift
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
echo "$(jobs -p | xargs)" > tasks
wait
"""
SCONTROL = """
case "$1 $2" in
    "show hostnames") printf 'node1\\nnode2\\n' ;;
    "show job") echo "JobId=7 JobState=$STATE Restarts=0" ;;
    "requeue 7") touch requeued ;;
    *) exit 99 ;;
esac
"""
RANK = """
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> ranks
trap 'sleep 0.2; exit 75' TERM
status=$(cut -d, -f$((RANK + 1)) <<< "$STATUSES")
[[ $status != wait ]] || { touch waiting-$RANK; sleep 100 & wait; }
[[ $status != gone ]] || { kill -9 $PPID $$; }
exit $status
"""
SSH = """
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
cd / && exec env HOST="$1" bash -c "$2"
"""
LAUNCHER = """
[[ " $* " == *" --no_ssh "* ]] || exit 99
cd "$WORK"
attempt=$(cat "attempt-$HOST" 2>/dev/null || echo 1)
echo $((attempt + 1)) > "attempt-$HOST"
printf '%s\\n' "$FROM_FILE" "$@" > "words-$HOST"
status=$(cut -d, -f$attempt "statuses-$HOST")
[[ $status != wait ]] || { bash -c 'bash -c "trap \\"exit 75\\" TERM; touch waiting-$HOST; sleep 100 & wait"; exit $?'; exit; }
exit $status
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the scripts call, in the places where they look."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ssh", SSH)):
        program(tmp_path / "bin" / name, text)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "WORK": str(folder), **more}


def slurm(folder: Path, statuses: str, state: str = "RUNNING", restarts: int = 0) -> subprocess.Popen[str]:
    program(folder / ".venv" / "bin" / "python", RANK)
    job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "3"}
    job |= {"SLURM_RESTART_COUNT": str(restarts), "STATUSES": statuses, "STATE": state}
    return subprocess.Popen(
        ["bash", str(SCRIPTS / "slurm.sbatch")], env=environment(folder, **job), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "status", "requeued"),
    [
        ("0,0,0", 0, False),
        ("75,75,75", 0, True),
        ("69,134,69", 0, True),
        ("0,69,0", 0, True),
        ("69,gone,69", 0, True),
        ("69,2,69", 2, False),
        ("1,69,69", 1, False),
        ("75,75,2", 2, False),
    ],
)
def test_a_job_is_requeued_unless_a_person_must_mend_something(
    folder: Path, statuses: str, status: int, requeued: bool
) -> None:
    job = slurm(folder, statuses)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == status, out
    assert (folder / "requeued").exists() == requeued, out
    ranks = sorted((folder / "ranks").read_text().splitlines())
    assert [line.split()[:5] for line in ranks] == [[str(n), str(n), "3", "node1", "20007"] for n in range(3)]
    assert all(line.endswith("--resume auto") for line in ranks)
    assert not list(folder.glob(".status*"))


def test_a_job_that_no_longer_runs_or_was_requeued_too_often_is_not_requeued(folder: Path) -> None:
    assert slurm(folder, "75,75,75", state="CANCELLED").wait(60) == 75
    assert slurm(folder, "69,69,69", restarts=50).wait(60) == 69
    assert not (folder / "requeued").exists()


def test_slurms_signal_reaches_the_ranks_and_their_shells_wait_for_them(folder: Path) -> None:
    job = slurm(folder, "wait,wait,wait")
    until(lambda: len(list(folder.glob("waiting-*"))) == 3)
    for task in (folder / "tasks").read_text().split():  # as srun signals every process of a task
        children = Path(f"/proc/{task}/task/{task}/children").read_text().split()
        for process in (task, *children):
            os.kill(int(process), signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert "requeued after status 75" in out
    assert (folder / "requeued").exists()


def until(ready: object) -> None:
    end = time.monotonic() + 60
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def ssh(folder: Path, *statuses: str, **more: str) -> subprocess.Popen[str]:
    program(folder / ".venv" / "bin" / "python", LAUNCHER)
    program(folder / "bin" / "sleep", '[[ $1 == 10 ]] || exec /usr/bin/env -i /bin/sleep "$@"')
    hosts = [f"host{number}" for number in range(len(statuses))]
    (folder / "hosts").write_text("".join(f"{host} slots=4\n" for host in hosts) + "# host9 slots=4\n\n")
    (folder / ".deepspeed_env").write_text("FROM_FILE=two words\n")
    for host, words in zip(hosts, statuses, strict=True):
        (folder / f"statuses-{host}").write_text(words + "\n")
    return subprocess.Popen(
        ["bash", str(SCRIPTS / "ssh.sh"), "hosts", "--data", "my data", "--output", "run"], cwd=folder, text=True,
        env=environment(folder, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "status", "attempts"),
    [
        ("0", "0", 0, 1),
        ("69,0", "247,0", 0, 2),  # a rank was killed
        ("69,75,0", "255,75,0", 0, 3),  # a machine was lost, then both were told to stop
        ("69,0", "0,0", 0, 2),  # DeepSpeed's launcher was killed, which its parent calls success
        ("2", "69", 2, 1),
        ("69", "1", 1, 1),
        ("69,69,69", "69,69,69", 69, 3),
    ],
)
def test_ssh_starts_again_unless_a_person_must_mend_something(
    folder: Path, first: str, second: str, status: int, attempts: int
) -> None:
    run = ssh(folder, first, second, RESTARTS="2")
    out, _ = run.communicate(timeout=60)
    assert run.returncode == status, out
    for number in (0, 1):
        assert (folder / f"attempt-host{number}").read_text().strip() == str(attempts + 1), out
        value, *words = (folder / f"words-host{number}").read_text().splitlines()
        assert value == "two words"
        assert words[words.index("--node_rank") + 1] == str(number)
        assert words[words.index("--master_addr") + 1] == "host0"
        assert words[words.index("--master_port") + 1] == str(29499 + attempts)
        assert words[-6:] == ["--data", "my data", "--output", "run", "--resume", "auto"]
    assert not list(folder.glob(".launchers*"))


def test_ssh_lets_the_ranks_end_when_it_is_told_to(folder: Path) -> None:
    run = ssh(folder, "wait", "wait")
    until(lambda: len(list(folder.glob("waiting-*"))) == 2)
    run.terminate()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 75, out
