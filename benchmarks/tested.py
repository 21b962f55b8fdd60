"""No operation is timed whose tests are red: runs each one's own tests on the device and remembers what they said.

    python -m benchmarks.tested --ops window_attention guidance_attention

A verdict is a row of ``benchmarks/results/tests.jsonl`` and holds for the sources, versions and device of that row.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import Rows
from benchmarks.processes import ROOT, run_for
from benchmarks.rows import alike, read
from sgmim_fast.errors import EXIT_PREEMPTED, UserError, one_line_errors

RESULTS = harness.RESULTS / "tests.jsonl"
LOGS = ROOT / "build" / "tests"
TESTS = {
    "window_attention": "test_window_attention",
    "class_token_attention": "test_window_attention",
    "attention_layer": "test_window_attention",
    "guidance_attention": "test_guidance_attention",
    "gather_rows": "test_masked_tokens",
    "scatter_rows": "test_masked_tokens",
    "gather_cells": "test_masked_tokens",
    "embed_visible": "test_embed_visible",
    "masked_l1": "test_masked_l1",
    "standardize_structure": "test_trimmed_stats",
}
"""File of the tests of an operation; what is not named has no kernel of ours."""
WHOLE = ("test_triton_backend", "test_triton_golden")
"""Files about whole models on the kernels."""


@dataclass(frozen=True)
class Verdict:
    """What the tests of one file said."""

    status: str
    """``green``, ``red``, or ``unfinished`` where the time did not suffice and none had failed."""
    said: str
    """pytest's last line."""


def verdicts(
    names: Iterable[str], rows: Rows, seconds: float, select: str = "", again: bool = False
) -> dict[str, Verdict]:
    """What the files ``names`` say: as known from ``rows`` already, else by running them side by side.

    Args:
        names: of files in ``tests/``, without their ending.
        rows: where verdicts are kept.
        seconds: for all together; what still runs then is stopped. 0 runs none.
        select: pytest's ``-k``: a verdict on some tests is none on all.
        again: whether to run what was red once more.
    """
    found = {}
    for row in read(rows.path):
        if row["select"] == select and alike(row["environment"], rows.environment):
            found[row["file"]] = Verdict(row["status"], row["said"])
    wanted = list(dict.fromkeys(names))
    usable = ("green",) if again else ("green", "red")
    missing = [name for name in wanted if name not in found or found[name].status not in usable]
    if seconds <= 0:
        return {name: found.get(name, Verdict("unfinished", "not run")) for name in wanted}
    deadline = time.monotonic() + seconds
    processes = max(1, min(len(missing), os.cpu_count() or 1))
    with ThreadPoolExecutor(processes) as pool:
        for name, (verdict, spent) in zip(
            missing, pool.map(lambda name: run_tests(name, deadline, len(missing), select), missing), strict=True
        ):
            found[name] = verdict
            row = {"benchmark": "tests", "file": name, "select": select, "status": verdict.status, "said": verdict.said}
            rows.append(row | {"seconds": round(spent, 1)})
            print(f"tests/{name}.py: {verdict.status}: {verdict.said}", flush=True)
    return {name: found[name] for name in wanted}


def run_tests(name: str, deadline: float, beside: int, select: str) -> tuple[Verdict, float]:
    """Run one file in a process of its own; its log is kept."""
    # The settings of pyproject.toml name the pytest of `make setup`; another one may do as well.
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks", "-o", "minversion=7.0", f"tests/{name}.py"]
    command += ["-k", select] if select else []
    if find_spec("xdist") is not None and (share := (os.cpu_count() or 1) // beside) > 1:
        command += ["-n", str(share)]
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    start = time.monotonic()
    with log.open("w") as output:
        status = run_for(command, deadline - start, output)
    return judge(log.read_text(), status), time.monotonic() - start


def judge(log: str, status: int | None) -> Verdict:
    """What a log of pytest says; ``status`` None for one that was stopped."""
    last = next((line.strip("= ") for line in reversed(log.splitlines()) if line.strip()), "it said nothing")
    if status is None:
        # One line of progress has a letter a test, or with xdist too; F and E are failures.
        failed = re.search(r"^[.sxX]*[FE][.sxXFE]*\s*(\[ *\d+%\])?$", log, re.MULTILINE)
        return Verdict("red", "some had failed when the time was over") if failed else Verdict("unfinished", last)
    return Verdict("green" if status == 0 else "red", last)


def refused(op: str, found: dict[str, Verdict]) -> str | None:
    """Why ours must not be timed, or None."""
    name = TESTS.get(op)
    if name is None or found[name].status != "red":
        return None
    return f"tests/{name}.py is red ({found[name].said}); python -m benchmarks.tested runs it again"


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        rows = Rows(options.output, harness.device(options.smoke))
        names = [TESTS[op] for op in options.ops] + list(WHOLE if options.whole else ())
        found = verdicts(names, rows, options.seconds, options.select, again=True)
        red = [name for name, verdict in found.items() if verdict.status == "red"]
        if red:
            raise UserError(f"tests are red: {', '.join(red)}; their output is in {LOGS.relative_to(ROOT)}/")
        if any(verdict.status == "unfinished" for verdict in found.values()):
            raise SystemExit(EXIT_PREEMPTED)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(TESTS), default=list(TESTS), metavar="OP", help="default: all")
    parser.add_argument("--whole", action="store_true", help="also the tests of whole models on the kernels")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="pytest's -k: only some of the tests")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop them after this long")
    parser.add_argument("--smoke", action="store_true", help="on the CPU as well, in Triton's interpreter")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    return parser


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
