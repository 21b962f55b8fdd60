"""Whether an implementation computes what it should: held against plain PyTorch in float64 before it is timed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Result, tensors
from benchmarks.peers import OURS, Contender

ROUNDINGS = 4  # of the largest value, granted on top of the allowed multiple of plain PyTorch's error
FEW, ROUNDINGS_OF_FEW = 64, 16  # plain PyTorch may have hit most of a few numbers by luck
ALLOWED = {OURS: 2.0}  # times plain PyTorch's own error
ALLOWED_PEER = 8.0  # some sum a bias's gradient in 16 bits


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
    few = torch.tensor(sorted({0, case.batch - 1}), device=device)
    sample = inputs if case.whole else {n: x[few] if case.is_batched(n) else x for n, x in inputs.items()}
    exact = {n: x.detach().double() if x.is_floating_point() else x for n, x in sample.items()}
    like = tensors(case.truth(**{n: x.detach() for n, x in sample.items()}))
    generator = torch.Generator(device).manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) for x in like]
    truth = results(case.truth, exact, case, [x.double() for x in cotangents])
    usual = results(case.truth, {n: x.detach() for n, x in sample.items()}, case, cotangents)
    if function.prepare is not None:
        out = tensors(function.call(**function.prepare(inputs)))[0][:, : like[0].shape[1]]
        got = {"result": out.detach() if case.whole else out.detach()[few]}
    else:
        got = results(function.call, inputs, case, cotangents, None if case.whole else few)
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
    call: Callable[..., Result], inputs: Inputs, case: Case, cotangents: list[Tensor], few: Tensor | None = None
) -> dict[str, Tensor]:
    """Results and gradients; of the samples ``few`` alone where the inputs hold more than the cotangents do."""
    wanted = case.wanted()
    inputs = {n: x.detach().requires_grad_(n in wanted) for n, x in inputs.items()}
    outs = tensors(call(**inputs))
    found, full = {}, []
    for number, (out, cotangent) in enumerate(zip(outs, cotangents, strict=True)):
        found["result" if number == 0 else f"result {number + 1}"] = out.detach() if few is None else out.detach()[few]
        cotangent = cotangent.to(out.dtype)
        if few is not None:
            some, cotangent = cotangent, torch.zeros_like(out)
            cotangent[few] = some
        full.append(cotangent)
    if wanted:
        for name, x in zip(wanted, torch.autograd.grad(outs, [inputs[n] for n in wanted], full), strict=True):
            found[f"gradient of {name}"] = x if few is None or not case.is_batched(name) else x[few]
    return found
