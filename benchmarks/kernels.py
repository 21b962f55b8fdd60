"""Every operation forward, backward and both, beside its peers, its byte floor and the ceilings of the same run.

    python -m benchmarks.kernels --ops window_attention --dtypes bf16 --batches 1 32 256

An operation whose tests are red is not timed; each implementation is then held against plain PyTorch in float64, and a
wrong one is named instead of timed. Rows go to ``benchmarks/results/kernels.jsonl`` as they come, most important shapes
first, until the time is over; the same command goes on where it was stopped.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, tested
from benchmarks.cases import PLAIN, Case
from benchmarks.clocks import clock_of
from benchmarks.harness import Ceilings, Rows
from benchmarks.peers import COMPILED, NAMES, OURS, expresses
from benchmarks.products import measure_products
from benchmarks.rows import key_of
from benchmarks.shapes import all_cases, smoke_cases
from benchmarks.speed import DTYPES, Run
from sgmim_fast.errors import EXIT_PREEMPTED, first_line, one_line_errors
from sgmim_fast.recipes import MODELS, RECIPES

RESULTS = harness.RESULTS / "kernels.jsonl"
KEYS = ("smoke", "op", "case", "implementation", "dtype", "batch")
SMOKE_TESTS = "refused or refusals or wrong"


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        raise SystemExit(run(options, harness.device(options.smoke)))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(PLAIN), default=list(PLAIN), metavar="OP", help="default: all")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name holds this")
    parser.add_argument("--one-each", action="store_true", help="only the first case of each operation")
    parser.add_argument("--implementations", nargs="+", choices=list(NAMES), default=list(NAMES), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[128], metavar="N", help="of most cases; large windows take fewer"
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing new after this long")
    parser.add_argument("--tests", type=float, default=600.0, metavar="SECONDS", help="for the tests, if not run yet")
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--again", action="store_true", help="measure also what the file has from these sources")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, once each, on any device: does it work?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to; tests.jsonl beside it")
    return parser


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measure what the options name.

    Returns:
        1 if one of our own implementations is wrong, fails or has red tests; else 75 if the time did not suffice.
    """
    start = time.monotonic()
    rows = Rows(options.output, device)
    done = set() if options.again or options.check_only else rows.finished(KEYS)
    planned = list(plan(options))
    todo = [one for one in planned if key_of(head_of(options, *one), KEYS) not in done]
    if skipped := len(planned) - len(todo):
        print(f"{skipped} measured before from the same sources and not again")
    if not todo:
        return 0
    run = Run(device, options.smoke, None if options.check_only else ceilings_of(options, device))
    ours = [case.op for name, case, _ in todo if name == OURS]
    found = {} if options.check_only else verdicts(options, device, ours)
    missed, wrong = [], 0
    for name, case, dtype in todo:
        label = f"{case.op} [{case.name}] x{case.batch} {dtype} {name}"
        head = head_of(options, name, case, dtype)
        if time.monotonic() > start + options.seconds:
            missed.append(label)
            continue
        if name == OURS and (reason := tested.refused(case.op, found)):
            print(f"{label}: NOT TIMED: {reason}", flush=True)
            wrong += 1
            continue
        try:
            measured = run.measure(name, case, dtype)
        except Exception as error:  # a peer that cannot is a result as well
            reason = f"{type(error).__name__}: {first_line(error)}"
            print(f"{label}: failed: {reason}", flush=True)
            wrong += name == OURS
            measured = []
            if run.ceilings and name != OURS:
                rows.append(head | {"failed": reason})
            if not usable(device):
                print("the GPU takes no more work of this process; the same command goes on with the rest")
                return 1
        for row in measured:
            print(describe(label, row), flush=True)
            wrong += name == OURS and not row["correct"]
            if run.ceilings:
                status = found[tested.TESTS[case.op]].status if name == OURS else None
                rows.append(head | row | {"tests": status, "ceilings": run.ceilings.row()})
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if name in COMPILED:
            torch.compiler.reset()
    if missed:
        print(f"{options.seconds:.0f} s are over; {len(missed)} not measured, the first of them {missed[0]}")
    return 1 if wrong else EXIT_PREEMPTED if missed else 0


def usable(device: torch.device) -> bool:
    """Whether an error has left a GPU that still computes for this process."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        return False
    return True


def plan(options: argparse.Namespace) -> Iterator[tuple[str, Case, str]]:
    """What to measure, in this order: all that needs no compiler, then the rest."""
    chosen = [case for case in cases_of(options) if case.op in options.ops and options.cases in case.name]
    if options.one_each:
        first = {op: next((case for case in chosen if case.op == op), None) for op in options.ops}
        chosen = [case for case in first.values() if case is not None]
    for compiled in (False, True):
        for dtype in options.dtypes:
            for case in chosen:
                for name in NAMES:
                    wanted = name in options.implementations and (name in COMPILED) == compiled
                    if wanted and expresses(name, case):
                        yield name, case, dtype


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The most important case with every batch size, then the next; each once: large windows may take as few twice."""
    if options.smoke:
        return list(smoke_cases())
    every = (case for group in zip(*map(all_cases, options.batches), strict=True) for case in group)
    return list({(case.op, case.name, case.batch): case for case in every}.values())


def head_of(options: argparse.Namespace, name: str, case: Case, dtype: str) -> dict[str, Any]:
    """What is measured."""
    return {
        "benchmark": "kernels",
        "smoke": options.smoke,
        "op": case.op,
        "case": case.name,
        "implementation": name,
        "dtype": dtype,
        "batch": case.batch,
        "shapes": {key: list(shape) for key, shape in case.shapes.items()},
    }


def ceilings_of(options: argparse.Namespace, device: torch.device) -> Ceilings:
    """Also at the shapes of the products of Swin-B's step, or of a smaller one's."""
    ceilings = harness.measure_ceilings(device, clock_of(device), options.smoke)
    swin = RECIPES["demo"]().model if options.smoke else MODELS["sgmim_swin_base"]
    rate, _ = measure_products(swin, max(options.batches), device, seconds=0.005, smoke=options.smoke)
    ceilings = replace(ceilings, products=rate)
    print(ceilings.describe(), flush=True)
    return ceilings


def verdicts(options: argparse.Namespace, device: torch.device, ops: list[str]) -> dict[str, tested.Verdict]:
    """Of the tests of those operations."""
    rows = Rows(options.output.with_name("tests.jsonl"), device)
    names = [tested.TESTS[op] for op in ops if op in tested.TESTS]
    return tested.verdicts(names, rows, options.tests, SMOKE_TESTS if options.smoke else "")


def describe(label: str, row: dict[str, Any]) -> str:
    if not row["correct"]:
        return (
            f"{label}: WRONG, not timed: {row['pass']} off by {row['error']:.1e} of its largest value, "
            f"plain PyTorch by {row['plain_error']:.1e}"
        )
    error = f", off by {row['error']:.1e} (plain {row['plain_error']:.1e})" if "error" in row else ""
    if "p50_seconds" not in row:
        return f"{label}: correct{error}"
    spread = " / ".join(f"{row[key] * 1e6:.1f}" for key in ("p20_seconds", "p50_seconds", "p80_seconds"))
    products = f", {row['flops_per_second'] / 1e12:.3g} TFLOP/s" if row["flops"] else ""
    return (
        f"{label} {row['pass']}: {spread} us, {row['bytes_per_second'] / 1e9:.0f} GB/s of its floor "
        f"({row['share_of_copy']:.0%} of a copy){products}, host {row['host_seconds'] * 1e6:.0f} us{error}"
    )


if __name__ == "__main__":
    main()
