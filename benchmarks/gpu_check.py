"""Everything that only a GPU can tell, in slices of under nine minutes: are the kernels right, and fast enough?

    python -m benchmarks.gpu_check --results DIR                   the first slice
    python -m benchmarks.gpu_check --results DIR --slice step      another one
    python -m benchmarks.gpu_check --results DIR --slice all       one after the other, within 25 minutes
    python -m benchmarks.gpu_check --list-slices

Needs torch, triton, timm, numpy, pytest and hypothesis; nothing has to be installed. Rows are on the disk as soon as
something is measured, and whatever is finished is not done again with the same results folder and the same sources: a
slice that was stopped goes on where it was. The last lines hold all rows of these sources against what is demanded.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks import bars, harness, origin
from benchmarks.harness import Rows
from benchmarks.processes import leave_in_order, run_for
from benchmarks.rows import Row, alike, key_of, read
from benchmarks.slices import RESULT_FILES, SLICES, Slice, Step
from sgmim_fast.errors import EXIT_PREEMPTED, one_line_errors

MODULE = [sys.executable, "-u", "-m"]
LEAST_SECONDS = 15.0  # nothing is begun with less
KEYS = ("step", "words")
OUT_OF_TIME = ("the time", "it was not ready")


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        if options.list_slices:
            print(listing())
            return
        leave_in_order()
        raise SystemExit(check(options))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in SLICES]
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder to append the rows to")
    parser.add_argument(
        "--slice",
        nargs="+",
        dest="slices",
        choices=[*names, "all"],
        default=names[:1],
        metavar="NAME",
        help=f"{', '.join(names)} or all (default: {names[0]})",
    )
    parser.add_argument("--list-slices", action="store_true", help="what they do, and how long they may take")
    parser.add_argument("--minutes", type=float, help="for each slice, in the place of its own")
    parser.add_argument("--smoke", action="store_true", help="every slice in the smallest size, on any device")
    return parser


def listing() -> str:
    width = max(len(one.name) for one in SLICES)
    lines = [f"{one.name.ljust(width)}  {one.minutes:4.1f} min  {one.what}" for one in SLICES]
    return "\n".join([*lines, f"{'all'.ljust(width)}  {sum(one.minutes for one in SLICES):4.1f} min  in this order"])


def check(options: argparse.Namespace) -> int:
    """Run the slices asked for; 1 if a test fails, a kernel is wrong or a benchmark breaks."""
    device = harness.device(options.smoke)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, {json.dumps(origin.describe_gpu(device))}", flush=True)
    start = time.monotonic()
    progress = Rows(options.results.absolute() / "gpu_check.jsonl", device)
    wrong = []
    for one in SLICES:
        if one.name in options.slices or "all" in options.slices:
            print(f"\n{one.name}: {one.what}", flush=True)
            wrong += run_slice(one, progress, Budget((options.minutes or one.minutes) * 60), options.smoke)
    rows = rows_of(progress)
    print(f"\n{bars.table(bars.bars(rows))}")
    print(f"\n{len(rows)} rows of these sources in {options.results}; {time.monotonic() - start:.0f} s")
    if wrong:
        print(f"FAILED: {', '.join(wrong)}; see above")
    return int(bool(wrong))


def rows_of(progress: Rows) -> list[Row]:
    """All that the results folder has from the same sources on this kind of device."""
    files = [progress.path.with_name(f"{name}.jsonl") for name in RESULT_FILES if name != "gpu_check"]
    return [row for path in files for row in read(path) if alike(row["environment"], progress.environment)]


class Budget:
    """What is left of the time, and how much of it the next step gets."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def share(self, most: float) -> float:
        return min(most, self.seconds - (time.monotonic() - self.start))


def run_slice(one: Slice, progress: Rows, left: Budget, smoke: bool) -> list[str]:
    """Names of the steps that failed; what the time does not suffice for is left out and shows as not measured."""
    failed = []
    for step in one.steps:
        words = step.smoke if smoke else step.words
        if smoke and not step.smoke:
            continue
        head = {"benchmark": "gpu_check", "slice": one.name, "step": step.name, "words": list(words)}
        if key_of(head, KEYS) in progress.finished(KEYS):
            print(f"{step.name}: finished before", flush=True)
            continue
        path = progress.path.with_name(f"{step.file}.jsonl")
        size = len(read(path))
        seconds = left.share(step.seconds)
        command = command_of(step, words, path, seconds)
        begin = time.monotonic()
        status = finished(step.name, command, seconds)
        if status is None:
            continue
        late = any(str(row.get("reason", "")).startswith(OUT_OF_TIME) for row in read(path)[size:])
        # Only what has ended well counts as finished, see ``Rows.finished``.
        row = head | {"status": status, "correct": status == 0 and not late}
        progress.append(row | {"seconds": round(time.monotonic() - begin, 1)})
        if status not in (0, EXIT_PREEMPTED):
            failed.append(step.name)
    return failed


def command_of(step: Step, words: tuple[str, ...], path: Path, seconds: float) -> list[str]:
    """Which begins nothing new shortly before it would be stopped."""
    command = [*MODULE, f"benchmarks.{step.module}", *words, "--output", str(path)]
    return [*command, "--seconds", str(round(max(seconds - LEAST_SECONDS, 1.0), 1))]


def finished(name: str, command: list[str], seconds: float) -> int | None:
    """Run a command for at most so long; its status, or None if it had to be stopped or could not be begun in time."""
    if seconds < LEAST_SECONDS:
        print(f"{name}: left out, the time is over", flush=True)
        return None
    start = time.monotonic()
    status = run_for(command, seconds)
    end = f"stopped after {seconds:.0f} s" if status is None else f"ended with status {status}"
    print(f"{name}: {end}, {time.monotonic() - start:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    main()
