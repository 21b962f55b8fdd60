"""How a kernel is held against the truth: plain PyTorch in float64, with plain PyTorch's own error as the yardstick."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter is slow; what a GPU adds to fp32 and fp16 is bf16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_as_exact_as_plain(
    kernel: Function,
    plain: Function,
    tensors: Mapping[str, Tensor],
    others: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype,
    strided: bool = False,
    slack: float = 1.0,
) -> None:
    """Outputs and every gradient of ``kernel`` err at most twice as much as ``plain`` does in the same dtype.

    Args:
        kernel, plain: functions of the same keywords; floating outputs only.
        tensors: floating inputs by keyword, any dtype; gradients are taken for those that require them.
        others: all further keywords.
        dtype: of inputs and gradients under test. The truth is ``plain`` in float64 on the same rounded values.
        strided: give the kernel inputs and an output gradient that are not contiguous.
        slack: roundings of the largest value that are granted on top.
    """
    others = dict(others or {})
    rounded = {name: value.detach().to(DEVICE, dtype) for name, value in tensors.items()}
    wanted = [name for name, value in tensors.items() if value.requires_grad]
    assert wanted or not any(value.requires_grad for value in tensors.values())

    def run(function: Function, to: torch.dtype, stride: bool) -> dict[str, Tensor]:
        inputs = {name: value.to(to) for name, value in rounded.items()}
        if stride:
            inputs = {name: uncontiguous(value) for name, value in inputs.items()}
        inputs = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
        out = function(**inputs, **others)
        outs = out if isinstance(out, tuple) else (out,)
        found = {f"output {number}": value.detach() for number, value in enumerate(outs)}
        if wanted:
            generator = torch.Generator().manual_seed(7)
            cotangents = []
            for value in outs:
                cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
                cotangent = cotangent.to(value.dtype)
                cotangents.append(uncontiguous(cotangent) if stride else cotangent)
            gradients = torch.autograd.grad(outs, [inputs[name] for name in wanted], cotangents)
            found |= {f"gradient of {name}": value for name, value in zip(wanted, gradients, strict=True)}
        return found

    truth = run(plain, torch.float64, False)
    usual = run(plain, dtype, False)
    mine = run(kernel, dtype, strided)
    for name, true in truth.items():
        got = mine[name]
        assert got.shape == true.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(true.shape)}"
        far, usual_far = (got.double() - true).abs(), (usual[name].double() - true).abs()
        eps = slack * torch.finfo(got.dtype).eps
        if true.numel() < 64:
            eps *= 16  # of a few numbers plain PyTorch may have hit most by luck
        for kind, size in (("rms", _rms), ("largest", torch.max)):
            error, usual_error = size(far).item(), size(usual_far).item()
            # One rounding of a typical number on average; of the largest, as many as a sum of four terms has.
            rounding = eps * size(true.abs()).item() * (1 if kind == "rms" else 4)
            assert error <= 2 * usual_error + rounding, (
                f"{name}: {kind} error {error:.2e}; plain PyTorch's is {usual_error:.2e}"
            )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def uncontiguous(x: Tensor) -> Tensor:
    """The same values with a gap after every number, so that no dimension has stride 1."""
    if x.dim() == 0:
        return x
    wide = torch.full((*x.shape, 2), torch.nan if x.is_floating_point() else 0, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


def same_bits(function: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether two runs give the same bits."""
    return all(torch.equal(a, b) for a, b in zip(function(), function(), strict=True))
