"""Everything that only a GPU can tell, in one command of under nine minutes: are the kernels right, and fast enough?

    python -m benchmarks.gpu_check --results DIR

Needs torch, triton, timm, numpy, pytest and hypothesis; nothing has to be installed. Runs the kernels' tests on the
GPU, looks for bad memory accesses, then times operations and training steps and holds them against what is demanded.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import bars, harness
from sgmim_fast.errors import one_line_errors

ROOT = Path(__file__).parents[1]
MODULE = [sys.executable, "-u", "-m"]
PARTS = ("tests", "memory", "speed")
TEST_PROCESSES = 12
ATTENTION = ["window_attention", "class_token_attention", "guidance_attention"]
SWIN, OTHERS = "sgmim_swin_base", ("sgmim_swinv2_base", "sgmim_vit_base", "sgmim_swin_large")
LEAST_SECONDS = 15.0  # nothing is begun with less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder to append the rows to")
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    with one_line_errors():
        raise SystemExit(check(options))


def check(options: argparse.Namespace) -> int:
    """Run the parts asked for; 1 if a test fails or a kernel is wrong."""
    device = harness.gpu()
    print(f"{torch.cuda.get_device_name(device)}, {json.dumps(harness.describe_gpu(device))}", flush=True)
    time_left = Budget(options.minutes * 60)
    files = {name: options.results.absolute() / f"{name}.jsonl" for name in ("kernels", "train_step")}
    before = {name: path.stat().st_size if path.exists() else 0 for name, path in files.items()}
    wrong = []
    if "tests" in options.only and not tests_pass(time_left.share(170)):
        wrong.append("the kernels' tests")
    if "memory" in options.only and not memory_is_safe(time_left.share(50)):
        wrong.append("memory accesses")
    if "speed" in options.only and not measure(files, time_left):
        wrong.append("benchmarks")
    rows = [row for name, path in files.items() for row in read_rows(path, before[name])]
    if "speed" in options.only:
        print(f"\n{bars.table(bars.bars(rows))}")
    print(f"\n{len(rows)} rows in {options.results}; {time_left.spent():.0f} s")
    if wrong:
        print(f"FAILED: {', '.join(wrong)}; see above")
    return int(bool(wrong))


class Budget:
    """What is left of the time, and how much of it the next part gets."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def spent(self) -> float:
        return time.monotonic() - self.start

    def share(self, most: float) -> float:
        return min(most, self.seconds - self.spent())


# -- right


def tests_pass(seconds: float) -> bool:
    """The tests that hold kernels against plain PyTorch, several files at once where pytest can."""
    files = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if "kernel_cases" in path.read_text()]
    # The settings of pyproject.toml name the pytest of `make setup`; another one may do as well.
    command = [*MODULE, "pytest", "-p", "benchmarks", "-o", "minversion=7.0", *files]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    return finished("tests", command, seconds) == 0


def memory_is_safe(seconds: float) -> bool:
    """Every operation once on few samples under compute-sanitizer; True, and a line, where that cannot run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("memory: skipped, there is no compute-sanitizer on PATH")
        return True
    command = [tool, "--tool", "memcheck", *MODULE, "benchmarks.kernels", "--check-only", "--one-each"]
    command += ["--batch", "2", "--implementations", "triton", "--seconds", str(seconds * 0.6)]
    # Tensors of their own each, so that what lies beyond one is nobody's.
    log = ROOT / "build" / "memcheck.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        status = finished("memory", command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, output)
    verdict = read_memcheck(log.read_text(), status)
    print(f"memory: {verdict[1]}", flush=True)
    return verdict[0]


def read_memcheck(log: str, status: int | None) -> tuple[bool, str]:
    """Whether compute-sanitizer is content, and what to say about it."""
    lines = log.splitlines()
    checked = sum(": correct" in line for line in lines)
    found = [line.strip("= ") for line in lines if line.startswith("=========")]
    bad = next((line for line in found if re.match(r"Invalid|Misaligned|Program hit|Out-of-range", line)), None)
    total = re.search(r"ERROR SUMMARY: (\d+) error", log)
    if total is None and bad is None:
        reason = "it ran out of time" if status is None else (found or lines or ["it said nothing"])[-1]
        return True, f"not finished: {reason} ({checked} operations were right so far)"
    if bad is not None and "not supported" not in log:
        return False, f"{bad} (build/memcheck.log)"
    if total is None or total[1] != "0":
        return False, f"{found[-1]} (build/memcheck.log)"
    return status == 0, f"no bad access in {checked} operations{'' if status == 0 else ', but not all are right'}"


# -- fast


def measure(files: dict[str, Path], left: Budget) -> bool:
    """Most important first; what the time does not suffice for is left out and shows as not measured."""
    cheap = ["--implementations", "triton", "plain", "sdpa", "dense", "copy"]
    bf16 = ["--precision", "bf16", "--batch", "128"]
    others = list(bars.MEMORY_BOUND)

    def kernels(most: float, *words: str) -> bool:
        seconds = left.share(most)
        command = [*MODULE, "benchmarks.kernels", "--output", str(files["kernels"]), *words]
        return finished("kernels", [*command, "--seconds", str(seconds - LEAST_SECONDS)], seconds) in (0, None)

    def steps(most: float, model: str, *backends: str) -> bool:
        command = [*MODULE, "benchmarks.train_step", "--output", str(files["train_step"]), "--model", model, *bf16]
        return finished(f"steps of {model}", [*command, "--backends", *backends], left.share(most)) in (0, None)

    return all(
        [
            kernels(90, "--ops", *ATTENTION, *cheap),
            steps(60, SWIN, "reference", "torch", "triton"),
            steps(200, SWIN, "reference+compile", "triton+compile"),
            kernels(60, "--ops", *others, *cheap),
            kernels(60, "--ops", *ATTENTION, "--implementations", "compiled", "flex"),
            *[steps(120, model, "reference+compile", "triton", "triton+compile") for model in OTHERS],
        ]
    )


def finished(
    name: str, command: list[str], seconds: float, more: dict[str, str] | None = None, output: Any = None
) -> int | None:
    """Run a command for at most so long; its status, or None if it had to be stopped or could not be begun in time."""
    if seconds < LEAST_SECONDS:
        print(f"{name}: left out, the time is over", flush=True)
        return None
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (more or {}),
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, to be stopped as a whole
    )
    try:
        status: int | None = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    end = f"stopped after {seconds:.0f} s" if status is None else f"ended with status {status}"
    print(f"{name}: {end}, {time.monotonic() - start:.0f} s", flush=True)
    return status


def read_rows(path: Path, start: int) -> list[dict[str, Any]]:
    """Rows that were appended behind byte ``start``."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        return [json.loads(line) for line in file if line.endswith(b"\n")]


if __name__ == "__main__":
    main()
