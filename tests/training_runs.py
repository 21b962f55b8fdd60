"""Real DeepSpeed runs of a tiny model on CPU ranks, for the tests that start some."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file

from sgmim_fast.launching import free_port, launcher_command

TINY = {
    "model.image-size": "64",
    "model.embed-dim": "16",
    "model.depths": "1 1 1 1",
    "model.num-heads": "1 2 2 4",
    "model.window-size": "4",
    "data.workers": "0",
    "train.batch-size": "2",
    "train.log-every": "1",
    "train.checkpoint-every": "3",
    "train.max-steps": "6",
}
COURSE = ("step", "epoch", "loss", "image_loss", "structure_loss", "lr", "grad_norm")
"""Of a metric row, what two runs of the same course have alike to the bit."""


def write_pairs(root: Path) -> Path:
    """24 pairs of 80 x 96 pixels: 16-bit maps, images that have to do with them."""
    rng = np.random.default_rng(0)
    for name in ("images", "structure"):
        (root / name).mkdir()
    row, column = np.mgrid[:80, :96] / 96
    for number in range(24):
        phase = rng.random(4) * 6
        depth = 0.5 + 0.25 * np.sin(5 * column + phase[0]) + 0.25 * np.cos(4 * row + phase[1])
        image = np.stack((depth, (column + phase[2]) % 1, (row + phase[3]) % 1), -1)
        Image.fromarray((255 * image).astype(np.uint8)).save(root / "images" / f"{number:02d}.jpg")
        Image.fromarray((65535 * depth).astype(np.uint16)).save(root / "structure" / f"{number:02d}.png")
    return root


def arguments(data: Path, output: Path, **options: Any) -> list[str]:
    chosen = TINY | {key.replace("__", ".").replace("_", "-"): str(value) for key, value in options.items()}
    words = ["--recipe", "demo", "--data", str(data), "--output", str(output)]
    for key, value in chosen.items():
        words += [f"--{key}", *value.split()]
    return words


def run_environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(command: list[str], file_limit: int | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = run_environment() | variables
    if file_limit is not None:  # every file a process writes ends at this size, as on a full disk
        command = ["bash", "-c", f'ulimit -f {file_limit}; exec "$@"', "bash", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def command(ranks: int, words: list[str], module: str = "sgmim_fast.pretrain") -> list[str]:
    """DeepSpeed's launcher with so many ranks on this machine."""
    return launcher_command(module, words, range(ranks), free_port())


def deepspeed_command(ranks: int, words: list[str]) -> list[str]:
    """What the `deepspeed` command runs, which comes to the same launcher in the end."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*runner, "--master_port", str(free_port()), "--module", "sgmim_fast.pretrain", *words]


def train(ranks: int, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return run(command(ranks, words), **options)


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_course(folder: Path, other: Path) -> None:
    """Two runs have the same steps, each once; losses, norms and weights have the same bits."""
    theirs = rows(other)
    for our, their in zip(rows(folder), theirs, strict=True):
        for name in COURSE:
            assert our[name] == their[name], (name, their["step"])
    last = theirs[-1]["step"]
    for name, value in weights(other, last).items():
        assert torch.equal(weights(folder, last)[name], value), name


def latest(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text().strip()


def processes_with(word: str) -> list[int]:
    """Processes whose command line or environment holds ``word``, such as the name of a run's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if word.encode() in text:
            found.append(int(process.name))
    return found


def all_gone(word: str, seconds: float = 30) -> bool:
    """Whether no such process is left, after ``seconds`` at most."""
    deadline = time.monotonic() + seconds
    while processes_with(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def refuse(words: list[str], message: str) -> None:
    """In one process, as each rank would: one line, status 2."""
    done = run([sys.executable, "-m", "sgmim_fast.pretrain", *words])
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def kill_after_a_checkpoint(words: list[str], latest: Path) -> None:
    """Kill a run and its ranks as soon as ``latest`` is there; Python's resource tracker alone may clean up."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, env=run_environment(), **quiet)
    deadline = time.monotonic() + 120
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    for one in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
        with suppress(psutil.NoSuchProcess):
            if "multiprocessing.resource_tracker" not in " ".join(one.cmdline()):
                one.kill()
    process.kill()
    process.wait()
