"""How long one implementation of one case takes: forward, backward and both, and how near that is to the ceilings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from benchmarks import harness
from benchmarks.cases import Case, Inputs, Result, Work, tensors
from benchmarks.clocks import clock_of
from benchmarks.exactness import parity
from benchmarks.harness import Ceilings, Times
from benchmarks.peers import contender

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Run:
    """What all measurements of one run share."""

    device: torch.device
    smoke: bool
    """Once each."""
    ceilings: Ceilings | None
    """None: nothing is timed."""

    def measure(self, name: str, case: Case, dtype: str) -> list[dict[str, Any]]:
        """Rows of forward, backward and both.

        A wrong result is one row that names it and has no times.
        """
        # Graphs whose backward pass is timed again and again keep what they have saved.
        with functorch.patch(donated_buffer=False):
            return self._measure(name, case, dtype)

    def _measure(self, name: str, case: Case, dtype: str) -> list[dict[str, Any]]:
        kind = DTYPES[dtype]
        width = kind.itemsize
        if name == "copy":
            return self.copies(case, width) if self.ceilings else []
        function = contender(name, case, self.device, kind)
        checked = parity(name, function, case, kind, self.device)
        head = {"error": checked.error, "plain_error": checked.plain_error, "correct": checked.correct}
        if not checked.correct or self.ceilings is None:
            return [head | {"pass": checked.worst}]
        inputs = [case.make(kind, self.device, seed=2)]
        size = sum(x.nbytes for x in inputs[0].values())
        inputs += [case.make(kind, self.device, seed) for seed in range(3, 2 + self.sets(size))]
        if function.prepare is not None:
            inputs = [function.prepare(one) for one in inputs]
        passes = Passes(function.call, inputs)
        time = partial(self.time, sets=len(inputs), size=size)
        rows = [self.judged(time(passes.forward), case.forward(width), "forward")]
        if case.backward is not None:
            first, then = case.forward(width), case.backward(width)
            both = Work(first.bytes + then.bytes, first.flops + then.flops)
            rows.append(self.judged(time(passes.kept().backward), then, "backward"))
            passes.outs.clear()
            rows.append(self.judged(time(passes.both), both, "both"))
        memory = harness.peak_bytes(partial(passes.both if case.backward else passes.forward, 0))
        return [head | row | {"peak_bytes": memory if self.on_gpu else None} for row in rows]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def sets(self, size: int) -> int:
        """How many sets of inputs of ``size`` bytes to take in turns."""
        return harness.input_sets(size, harness.l2_bytes(self.device)) if self.on_gpu else 1

    def time(self, call: Callable[[int], Any], sets: int, size: int) -> Times:
        """Of a call on ``sets`` sets of inputs of ``size`` bytes in turns."""
        seconds, fewest = (0.0, 1) if self.smoke else (0.1, harness.FEWEST_RUNS)
        evict = harness.evictor(size, self.device)
        return harness.measure(call, sets, seconds, clock_of(self.device), fewest, evict)

    def copies(self, case: Case, width: int) -> list[dict[str, Any]]:
        """A plain copy that moves as many bytes as each pass must."""
        found = []
        for part, work in (("forward", case.forward), ("backward", case.backward)):
            if work is not None:
                floor = work(width).bytes
                source = torch.randint(255, (floor // 2,), dtype=torch.uint8, device=self.device)
                sources = [source] + [source.clone() for _ in range(self.sets(floor) - 1)]
                targets = [torch.empty_like(source) for _ in sources]
                call = partial(lambda to, of, number: to[number].copy_(of[number]), targets, sources)
                found.append({"correct": True} | self.judged(self.time(call, len(sources), floor), Work(floor), part))
        return found

    def judged(self, times: Times, work: Work, part: str) -> dict[str, Any]:
        """A pass's times, and how near they are to what the device can do at best."""
        best = self.ceilings
        assert best is not None
        bytes_rate, flops_rate = work.bytes / times.p50, work.flops / times.p50
        return {
            "pass": part,
            **times.row(),
            "floor_bytes": work.bytes,
            "floor_seconds": work.bytes / best.copy,
            "bytes_per_second": bytes_rate,
            "share_of_copy": bytes_rate / best.copy,
            "flops": work.flops,
            "flops_per_second": flops_rate,
            "share_of_matrix": flops_rate / best.matrix,
            "share_of_products": flops_rate / best.products if best.products else None,
        }


class Passes:
    """Calls of one implementation on several sets of inputs."""

    def __init__(self, call: Callable[..., Result], inputs: list[Inputs]) -> None:
        self.call, self.inputs = call, inputs
        self.wanted = [[x for x in one.values() if x.requires_grad] for one in inputs]
        self.outs: list[tuple[Tensor, ...]] = []
        self.cotangents: list[list[Tensor]] = []

    def forward(self, number: int) -> Result:
        return self.call(**self.inputs[number])

    def kept(self) -> "Passes":
        """Runs all forward passes, whose graphs ``backward`` then uses again and again."""
        self.outs = [tensors(self.forward(number)) for number in range(len(self.inputs))]
        self.cotangents = [[torch.randn_like(x) for x in out] for out in self.outs]
        return self

    def backward(self, number: int) -> Any:
        return torch.autograd.grad(self.outs[number], self.wanted[number], self.cotangents[number], retain_graph=True)

    def both(self, number: int) -> Any:
        out = tensors(self.forward(number))
        return torch.autograd.grad(out, self.wanted[number], self.cotangents[number])
