"""Every operation once on few samples under NVIDIA's compute-sanitizer: does any read or write where it must not?

python -m benchmarks.memcheck
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from benchmarks import harness
from benchmarks.processes import ROOT, run_for
from sgmim_fast.errors import UserError, one_line_errors

LOG = ROOT / "build" / "memcheck.log"


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        harness.gpu()
        safe, said = check(options.seconds)
        print(f"memory: {said}", flush=True)
        if not safe:
            raise UserError(f"memory accesses: {said}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after this long")
    parser.add_argument("--output", type=Path, help="takes no rows; as for other benchmarks")
    return parser


def check(seconds: float) -> tuple[bool, str]:
    """Whether all is well as far as can be told, and what to say; true as well where the tool cannot run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return True, "skipped, there is no compute-sanitizer on PATH"
    command = [tool, "--tool", "memcheck", sys.executable, "-u", "-m", "benchmarks.kernels", "--check-only"]
    command += ["--one-each", "--batches", "2", "--implementations", "triton", "--seconds", str(seconds * 0.6)]
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as output:
        # Tensors of their own each, so that what lies beyond one is nobody's.
        status = run_for(command, seconds, output, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return verdict(LOG.read_text(), status)


def verdict(log: str, status: int | None) -> tuple[bool, str]:
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


if __name__ == "__main__":
    main()
