"""Kills a small run of two ranks over and over, and compares what it comes to with a run that nothing disturbed.

    python -m benchmarks.soak                          200 kills, about an hour on two quiet cores
    python -m benchmarks.soak --kills 5 --steps 60     whether it works

Each life of the run is `sgmim pretrain --resume auto` on scenes rendered for it. A while after it began (a random
number of steps, sometimes while it still starts, often in the middle of a save) one process is killed with SIGKILL: a
rank, the launcher, the command, or all of them at once; or the command gets SIGTERM. After every kill it is asserted
that

    - no process, no file in /dev/shm and no half-written checkpoint that looks like one is left,
    - every checkpoint that was whole is whole, or was replaced by newer ones,
    - the next life goes on from the newest of them.

In the end, losses and norms of every step and the last weights must be those of the undisturbed run, to the bit. One
row is appended to --results.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file

from benchmarks import harness
from sgmim_fast.data.scenes.synthetic import render_dataset
from sgmim_fast.errors import EXIT_PREEMPTED, UserError, one_line_errors
from sgmim_fast.train.run_folder import WEIGHTS, damage, list_checkpoints, step_of

RESULTS = harness.RESULTS / "soak.jsonl"
VICTIMS = {"a rank": 6, "every process": 6, "launcher": 2, "command": 2, "SIGTERM": 4}
"""Whom a kill hits, and how often relatively."""
TINY = {
    "--model.image-size": "64",
    "--model.embed-dim": "16",
    "--model.depths": "1 1 1 1",
    "--model.num-heads": "1 2 2 4",
    "--train.batch-size": "4",
    "--train.log-every": "1",
    "--data.workers": "1",
    "--schedule.epochs": "1000",
}
MARK = "SGMIM_SOAK"
SAME = ("epoch", "loss", "image_loss", "structure_loss", "lr", "grad_norm")


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        soak(options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000, help="of the run; kills are spread over them (default 1000)")
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--asynchronous", action="store_true", help="with --train.async-checkpoint")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the row is appended to")
    return parser


class Run:
    """A run's folder, and its lives."""

    def __init__(self, data: Path, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        words = ["--recipe", "demo", "--data", str(data), "--output", str(folder), "--resume", "auto"]
        words += [word for pair in TINY.items() for word in (pair[0], *pair[1].split())]
        words += ["--train.checkpoint-every", str(options.every), "--train.max-steps", str(options.steps)]
        if options.asynchronous:
            words.append("--train.async-checkpoint")
        self._command = [sys.executable, "-m", "sgmim_fast.cli", "pretrain", "--num-gpus", "2", *words]

    def start(self) -> subprocess.Popen[bytes]:
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        environment = {**os.environ, MARK: str(self.folder), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(self._command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def rows(self) -> dict[int, dict[str, Any]]:
        """By step; the last of each counts. A line that a kill cut off is left out."""
        found = {}
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["step"]] = row
        return found

    def reached(self, began: float) -> int:
        """Last step of the life that began at a time; rows that the one before left are moved aside when it trains."""
        path = self.folder / "metrics.jsonl"
        return max(self.rows(), default=0) if path.exists() and path.stat().st_mtime > began else 0

    def saved(self) -> dict[int, Path]:
        """Whole checkpoints by step.

        Raises:
            UserError: if a folder looks like a checkpoint and is none.
        """
        found = {step_of(folder): folder for folder in list_checkpoints(self.folder)}
        for folder in found.values():
            if reason := damage(folder):
                raise UserError(f"{folder} is damaged: {reason}")
        return found

    def processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder):
                    yield process
            except psutil.Error:
                continue


def soak(options: argparse.Namespace) -> None:
    rows = harness.Rows(options.results, torch.device("cpu"))
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="sgmim-soak-") as temporary,
        Progress(*columns, TimeRemainingColumn()) as bar,
    ):
        data = Path(temporary) / "scenes"
        render_dataset(data, count=96, size=64, seed=0, workers=2)
        shared = abandoned()
        undisturbed, run = (Run(data, Path(temporary) / name, options) for name in ("undisturbed", "killed"))
        if undisturbed.start().wait():
            raise UserError(f"the undisturbed run failed: {undisturbed.folder}.log")
        task = bar.add_task("kills", total=options.kills)
        drawn = random.Random(options.seed)
        victims: Counter[str] = Counter()
        kept, lost = 0, 0
        for number in range(options.kills):
            victim = drawn.choices(list(VICTIMS), list(VICTIMS.values()))[0]
            reached = disturb(run, victim, kept, options, number, drawn)
            leftovers(run, shared)
            newest = max(run.saved(), default=0)
            if newest < kept:
                raise UserError(
                    f"after kill {number + 1} ({victim}) step {newest} is the newest checkpoint, it was {kept}"
                )
            victims[victim] += 1
            lost += max(0, reached - newest)
            kept = newest
            bar.update(task, completed=number + 1)
        if run.start().wait():
            raise UserError(f"the last life failed: {run.folder}.log")
        leftovers(run, shared)
        compare(run, undisturbed, options.steps)
        rows.append({
            "benchmark": "soak",
            "ranks": 2,
            "kills": options.kills,
            "victims": dict(victims),
            "steps": options.steps,
            "checkpoint_every": options.every,
            "asynchronous": options.asynchronous,
            "steps_computed_again": lost,
            "checkpointed_steps_lost": 0,
            "final_loss": run.rows()[options.steps]["loss"],
            "undisturbed_final_loss": undisturbed.rows()[options.steps]["loss"],
            "equal_to_the_bit": True,
            "seconds": round(time.monotonic() - began, 1),
        })  # fmt: skip
    print(f"{options.kills} kills, {lost} steps computed again, no checkpointed one lost; same bits as undisturbed")


def disturb(run: Run, victim: str, kept: int, options: argparse.Namespace, number: int, drawn: random.Random) -> int:
    """One life up to its kill. Returns the steps it had come to."""
    began = time.time()
    process = run.start()
    try:
        if drawn.random() < 0.1:  # while it starts
            time.sleep(drawn.uniform(0, 8))
        else:
            left = (options.steps - kept) / (options.kills - number)
            goal = min(kept + 1 + int(drawn.uniform(0, 2 * left - 1)), options.steps - 1)
            while run.reached(began) < goal and process.poll() is None:
                time.sleep(0.005)
            time.sleep(drawn.uniform(0, 0.15))
        if process.poll() is not None:
            what = "the run was done before all kills: give it more --steps"
            if max(run.saved(), default=0) < options.steps:
                what = f"a life ended by itself with status {process.returncode}"
            raise UserError(f"{what}: {run.folder}.log")
        strike(victim, process, drawn)
        process.wait(timeout=120)
        # Before ranks listen, it ends them at once.
        if victim == "SIGTERM" and process.returncode not in (0, EXIT_PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise UserError(f"SIGTERM ended the command with status {process.returncode}: {run.folder}.log")
    finally:
        if process.poll() is None:
            process.kill()
    return max(run.rows(), default=0)


def strike(victim: str, process: subprocess.Popen[bytes], drawn: random.Random) -> None:
    try:
        command = psutil.Process(process.pid)
        launcher = command.children()
        ranks = [rank for one in launcher for rank in one.children()]
        everyone = [command, *command.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    if victim == "SIGTERM":
        process.terminate()
        return
    targets = {"a rank": ranks[:], "launcher": launcher, "command": [command], "every process": everyone}[victim]
    if victim == "a rank" and targets:
        targets = [drawn.choice(targets)]
    for target in targets or everyone:
        try:
            target.kill()
        except psutil.NoSuchProcess:
            continue


def leftovers(run: Run, shared: set[str]) -> None:
    """Processes of the last life end by themselves within a while, and leave nothing.

    Raises:
        UserError: if something is left.
    """
    deadline = time.monotonic() + 300  # ranks that still start do so until they look for their launcher
    while left := list(run.processes()):
        if time.monotonic() > deadline:
            raise UserError(f"processes are left: {[process.pid for process in left]}")
        time.sleep(0.1)
    if more := abandoned() - shared:
        raise UserError(f"files are left in /dev/shm: {sorted(more)}")


def abandoned() -> set[str]:
    """Files in /dev/shm that no process has in its memory: other programs on the machine may use theirs."""
    names = set(os.listdir("/dev/shm"))
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:
            continue
        names -= {name for name in names if f"/dev/shm/{name}" in text}
    return {name for name in names if Path("/dev/shm", name).exists()}


def compare(run: Run, undisturbed: Run, steps: int) -> None:
    """Every step and the last weights, to the bit.

    Raises:
        UserError: for the first difference.
    """
    ours, theirs = run.rows(), undisturbed.rows()
    for step in range(1, steps + 1):
        for name in SAME:
            if ours[step][name] != theirs[step][name]:
                raise UserError(f"{name} of step {step} is {ours[step][name]}, undisturbed it is {theirs[step][name]}")
    ours_last, theirs_last = (load_file(one.saved()[steps] / WEIGHTS) for one in (run, undisturbed))
    for name, value in theirs_last.items():
        if not torch.equal(ours_last[name], value):
            raise UserError(f"{name} of the last weights differs")


if __name__ == "__main__":
    main()
