"""Every operation forward and backward on a GPU, beside its peers, its byte floor and the ceilings of the same run.

    python -m benchmarks.kernels --ops window_attention --dtypes bf16

Each implementation is first held against plain PyTorch in float64; a wrong one is named and not timed. Rows go to
``benchmarks/results/kernels.jsonl``, most important shapes first, until the time is over.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import PLAIN, Case, Inputs, Work, all_cases
from benchmarks.harness import Ceilings, Rows, Times
from benchmarks.peers import COMPILED, NAMES, OURS, Contender, contender
from sgmim_fast.errors import first_line, one_line_errors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RESULTS = harness.RESULTS / "kernels.jsonl"
ROUNDINGS = 4  # of the largest value, granted on top of the allowed multiple of plain PyTorch's error
FEW, ROUNDINGS_OF_FEW = 64, 16  # plain PyTorch may have hit most of a few numbers by luck
ALLOWED = {OURS: 2.0}  # times plain PyTorch's own error
ALLOWED_PEER = 8.0  # some sum a bias's gradient in 16 bits


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        raise SystemExit(run(options, harness.gpu()))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(PLAIN), default=list(PLAIN), metavar="OP", help="default: all")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name holds this")
    parser.add_argument("--one-each", action="store_true", help="only the first case of each operation")
    parser.add_argument("--implementations", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--batch", type=int, default=128, help="of most cases; large windows take fewer")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing new after this long")
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    return parser


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measure what the options name; 1 if one of our own implementations is wrong or fails."""
    deadline = time.monotonic() + options.seconds
    rows = Rows(options.output, device)
    ceilings = None if options.check_only else harness.measure_ceilings(device)
    if ceilings:
        print(
            f"ceilings: copy {ceilings.copy / 1e12:.2f} TB/s, bf16 products {ceilings.matrix / 1e12:.0f} TFLOP/s, "
            f"empty launch {ceilings.launch * 1e6:.1f} us"
        )
    missed, wrong = [], 0
    for name, case, dtype in plan(options):
        label = f"{case.op} [{case.name}] {dtype} {name}"
        if time.monotonic() > deadline:
            missed.append(label)
            continue
        try:
            found = measure_case(name, case, dtype, device, ceilings)
        except Exception as error:  # a peer that cannot is a result as well
            print(f"{label}: failed: {type(error).__name__}: {first_line(error)}", flush=True)
            wrong += name == OURS
            continue
        for row in found:
            print(describe(label, row), flush=True)
            wrong += name == OURS and not row["correct"]
            if ceilings:
                rows.append(row | {"ceilings": ceilings.row()})
        torch.cuda.empty_cache()
        torch.compiler.reset()
    if missed:
        print(f"{options.seconds:.0f} s are over; {len(missed)} not measured, the first of them {missed[0]}")
    return int(wrong > 0)


def plan(options: argparse.Namespace) -> Iterator[tuple[str, Case, str]]:
    """What to measure, in this order: all that needs no compiler, then the rest."""
    chosen = [case for case in all_cases(options.batch) if case.op in options.ops and options.cases in case.name]
    if options.one_each:
        first = {op: next((case for case in chosen if case.op == op), None) for op in options.ops}
        chosen = [case for case in first.values() if case is not None]
    for compiled in (False, True):
        for dtype in options.dtypes:
            for case in chosen:
                for name in NAMES:
                    if name in options.implementations and (name in COMPILED) == compiled:
                        yield name, case, dtype


# -- correctness


@dataclass(frozen=True)
class Parity:
    """Errors against float64, relative to the largest true value: of the first that is wrong, else the largest."""

    error: float
    plain_error: float
    correct: bool
    worst: str = ""


def parity(name: str, function: Contender, case: Case, dtype: torch.dtype, device: torch.device) -> Parity:
    """Hold one implementation, at full size, against the plain function in float64.

    Where samples do not mix, only the first and the last get a gradient, so that these two are enough for the truth.
    """
    inputs = case.make(dtype, device, seed=1)
    few = torch.tensor([0, case.batch - 1], device=device)
    sample = inputs if case.whole else {n: x[few] if case.is_batched(n) else x for n, x in inputs.items()}
    exact = {n: x.detach().double() if x.is_floating_point() else x for n, x in sample.items()}
    like = case.truth(**{n: x.detach() for n, x in sample.items()})
    cotangent = torch.randn(like.shape, device=device, dtype=torch.float64).to(like.dtype)
    truth = results(case.truth, exact, case, cotangent.double())
    usual = results(case.truth, {n: x.detach() for n, x in sample.items()}, case, cotangent)
    if function.prepare is not None:
        out = function.call(**function.prepare(inputs))[:, : like.shape[1]]
        got = {"result": out.detach() if case.whole else out.detach()[few]}
    else:
        got = results(function.call, inputs, case, cotangent, few)
    allowed = ALLOWED.get(name, ALLOWED_PEER)
    worst = Parity(0.0, 0.0, True)
    for part, value in got.items():
        true = truth[part]
        largest = true.abs().max().item()
        error = (value.double() - true).abs().max().item() / largest
        plain = (usual[part].double() - true).abs().max().item() / largest
        roundings = ROUNDINGS_OF_FEW if true.numel() < FEW else ROUNDINGS
        correct = error <= allowed * plain + roundings * torch.finfo(value.dtype).eps
        if not correct:
            return Parity(error, plain, False, part)
        if error >= worst.error:
            worst = Parity(error, plain, True, part)
    return worst


def results(
    call: Callable[..., Tensor], inputs: Inputs, case: Case, cotangent: Tensor, few: Tensor | None = None
) -> dict[str, Tensor]:
    """Result and gradients; of the samples ``few`` alone where the inputs hold more than ``cotangent`` does."""
    wanted = case.wanted()
    inputs = {n: x.detach().requires_grad_(n in wanted) for n, x in inputs.items()}
    out = call(**inputs)
    if few is None or case.whole:
        found, full = {"result": out.detach()}, cotangent
        pick = dict.fromkeys(wanted, slice(None))
    else:
        found, full = {"result": out.detach()[few]}, torch.zeros_like(out)
        full[few] = cotangent.to(out.dtype)
        pick = {n: few if case.is_batched(n) else slice(None) for n in wanted}  # type: ignore[misc]
    if wanted:
        gradients = torch.autograd.grad(out, [inputs[n] for n in wanted], full.to(out.dtype))
        found |= {f"gradient of {n}": x[pick[n]] for n, x in zip(wanted, gradients, strict=True)}
    return found


# -- speed


def measure_case(
    name: str, case: Case, dtype: str, device: torch.device, ceilings: Ceilings | None
) -> list[dict[str, Any]]:
    """Rows of forward and backward; none where the implementation cannot express the case."""
    head = {
        "benchmark": "kernels",
        "op": case.op,
        "case": case.name,
        "implementation": name,
        "dtype": dtype,
        "batch": case.batch,
        "shapes": {key: list(shape) for key, shape in case.shapes.items()},
    }
    width = DTYPES[dtype].itemsize
    if name == "copy":
        found = copies(case, width, device) if ceilings else {}
        return [head | {"correct": True} | judged(times, work, part, ceilings) for part, (times, work) in found.items()]
    function = contender(name, case)
    if function is None:
        return []
    checked = parity(name, function, case, DTYPES[dtype], device)
    head |= {"error": checked.error, "plain_error": checked.plain_error, "correct": checked.correct}
    if not checked.correct or ceilings is None:
        return [head | {"pass": checked.worst}]
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    first = case.make(DTYPES[dtype], device, seed=2)
    size = sum(x.nbytes for x in first.values())
    inputs = [first] + [case.make(DTYPES[dtype], device, seed) for seed in range(3, 2 + harness.input_sets(size, l2))]
    if function.prepare is not None:
        inputs = [function.prepare(one) for one in inputs]

    def forward(number: int) -> Tensor:
        return function.call(**inputs[number])

    rows = [judged(harness.measure(forward, len(inputs)), case.forward(width), "forward", ceilings)]
    if case.backward is not None:
        rows.append(judged(backward_times(forward, inputs), case.backward(width), "backward", ceilings))
    memory = harness.peak_bytes(lambda: round_trip(forward, inputs[0]))
    return [head | row | {"round_trip_peak_bytes": memory} for row in rows]


def round_trip(forward: Callable[[int], Tensor], inputs: Inputs) -> None:
    out = forward(0)
    if wanted := [x for x in inputs.values() if x.requires_grad]:
        torch.autograd.grad(out, wanted, torch.ones_like(out))


def backward_times(forward: Callable[[int], Tensor], inputs: list[Inputs]) -> Times:
    """Each set of inputs with the graph that its forward left."""
    outs = [forward(number) for number in range(len(inputs))]
    cotangents = [torch.randn_like(out) for out in outs]
    wanted = [[x for x in one.values() if x.requires_grad] for one in inputs]

    def backward(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outs[number], wanted[number], cotangents[number], retain_graph=True)

    return harness.measure(backward, len(inputs))


def copies(case: Case, width: int, device: torch.device) -> dict[str, tuple[Times, Work]]:
    """A plain copy that moves as many bytes as each pass must."""
    found = {}
    for part, work in (("forward", case.forward), ("backward", case.backward)):
        if work is not None:
            floor = work(width)
            source = torch.randint(255, (floor.bytes // 2,), dtype=torch.uint8, device=device)
            sets = harness.input_sets(floor.bytes, torch.cuda.get_device_properties(device).L2_cache_size)
            sources = [source] + [source.clone() for _ in range(sets - 1)]
            targets = [torch.empty_like(source) for _ in sources]
            call = partial(lambda to, of, number: to[number].copy_(of[number]), targets, sources)
            found[part] = harness.measure(call, sets), Work(floor.bytes)
    return found


def judged(times: Times, work: Work, part: str, ceilings: Ceilings | None) -> dict[str, Any]:
    """A pass's times, and how near they are to what the GPU can do at best."""
    assert ceilings is not None
    rate = work.bytes / times.p50
    return {
        "pass": part,
        **times.row(),
        "floor_bytes": work.bytes,
        "floor_seconds": work.bytes / ceilings.copy,
        "bytes_per_second": rate,
        "share_of_copy": rate / ceilings.copy,
        "flops": work.flops,
        "share_of_matrix": work.flops / times.p50 / ceilings.matrix,
    }


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
    return (
        f"{label} {row['pass']}: {spread} us, {row['bytes_per_second'] / 1e9:.0f} GB/s of its floor "
        f"({row['share_of_copy']:.0%} of a copy), host {row['host_seconds'] * 1e6:.0f} us{error}"
    )


if __name__ == "__main__":
    main()
