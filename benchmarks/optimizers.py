"""AdamW by whoever implements it: a step on the parameters of a model, against the plain loop over parameters.

    python -m benchmarks.optimizers --model sgmim_swin_base
    python -m benchmarks.optimizers --model sgmim_swin_large --implementations adamw apex deepspeed

``plain`` steps one parameter after the other, ``foreach`` is PyTorch's for lists of tensors, ``adamw`` PyTorch's fused
one, ``apex`` and ``deepspeed`` are their FusedAdam. All of them on float32 weights, as in training. What is not
installed, or cannot run on the device, leaves "benchmark": "optimizers_skipped" with ``reason``.

Each row of ``benchmarks/results/optimizers.jsonl`` ("benchmark": "optimizers") holds ``model``, ``implementation``,
``device``, ``parameters`` (numbers), and

    p20_seconds, p50_seconds, p80_seconds, host_seconds, runs    of one step, without clipping
    floor_bytes, share_of_copy    reading weight, gradient and both moments, writing three of them; against a copy
    error                         of the change that a first step makes, relative to ``plain``'s in float64
    ceilings                      as in ``benchmarks.kernels``; on a GPU alone, like ``share_of_copy``
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.clocks import clock_of
from benchmarks.deadline import Deadline
from sgmim_fast.config import OptimizerConfig
from sgmim_fast.errors import UserError, first_line, one_line_errors
from sgmim_fast.models.registry import create_model
from sgmim_fast.train.optim import build_optimizer, parameter_groups

RESULTS = harness.RESULTS / "optimizers.jsonl"
PLAIN = ("plain", "foreach")
NAMES = (*PLAIN, "adamw", "apex", "deepspeed")
MOVED = 7 * 4  # bytes a parameter
RATE = 1e-3
SECONDS = 0.5  # to time each


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        raise SystemExit(compare(options))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgmim_swin_base", help="a name of sgmim_fast.recipes.MODELS")
    parser.add_argument("--implementations", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--seconds", type=float, help="for everything; begins nothing new after that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    return parser


class Update:
    """What makes new weights of gradients, as in training: clipping, AdamW in float32, rounding to the model's type.

    Args:
        implementation: one of ``NAMES``.

    Raises:
        UserError: if it cannot run on ``device``.
    """

    def __init__(self, model: nn.Module, implementation: str, device: torch.device) -> None:
        self.config = OptimizerConfig()
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.rounded = [parameter for parameter in self.weights if parameter.dtype != torch.float32]
        self.masters = [parameter.detach().float() for parameter in self.rounded]
        master = dict(zip(self.rounded, self.masters, strict=True))
        groups = parameter_groups(model, self.config.weight_decay)
        for group in groups:
            group["params"] = [master.get(parameter, parameter) for parameter in group["params"]]
        self.optimizer = optimizer_of(groups, implementation, self.config, device)

    def step(self, rate: float = 0.0) -> None:
        """From the gradients that the weights hold; a rate of 0 computes everything and changes nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        held = [parameter for parameter in self.weights if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(held, self.config.clip_grad_norm)
        pairs = [(m, w) for m, w in zip(self.masters, self.rounded, strict=True) if w.grad is not None]
        masters = [m for m, _ in pairs]
        for master in masters:
            if master.grad is None:
                master.grad = torch.empty_like(master)
        with torch.no_grad():
            if pairs:
                torch._foreach_copy_([m.grad for m in masters], [w.grad for _, w in pairs])
            self.optimizer.step()
            if pairs:
                torch._foreach_copy_([w for _, w in pairs], masters)

    def state_bytes(self) -> int:
        """Float32 copies of weights and gradients, and the moments, as they are after a first step."""
        moments = 2 * 4 * sum(parameter.numel() for parameter in self.weights)
        return moments + 2 * sum(master.nbytes for master in self.masters)


def optimizer_of(
    groups: list[dict[str, Any]], implementation: str, config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    if implementation in PLAIN:
        foreach = implementation == "foreach"
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, foreach=foreach)
    return build_optimizer(groups, OptimizerConfig(implementation=implementation), device)  # type: ignore[arg-type]


# -- measuring


def compare(options: argparse.Namespace) -> int:
    """A row for each implementation; 1 if one that can run fails or is wrong."""
    device, deadline = torch.device(options.device), Deadline(options.seconds)
    rows = harness.Rows(options.output, device)
    ceilings = harness.measure_ceilings(device) if device.type == "cuda" else None
    torch.manual_seed(0)
    model = create_model(options.model, backend="torch").to(device)
    for parameter in model.parameters():
        parameter.grad = 1e-2 * torch.randn_like(parameter)
    truth = first_change(model, "plain", device, torch.float64)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    head = {"benchmark": "optimizers", "model": options.model, "device": options.device, "parameters": numbers}
    failed = False
    for name in options.implementations:
        row: dict[str, Any] = head | {"implementation": name}
        if deadline.left() <= 0:
            rows.append(row | {"benchmark": "optimizers_skipped", "reason": "the time given by --seconds is over"})
            continue
        try:
            error = distance(first_change(model, name, device), truth)
            optimizer = stepped(model, name, device)
            times = harness.measure(partial(one_step, optimizer), 1, SECONDS, clock_of(device))
        except UserError as refusal:
            rows.append(row | {"benchmark": "optimizers_skipped", "reason": f"cannot run here: {refusal}"})
            print(f"{options.model} {name}: skipped: {refusal}", flush=True)
            continue
        except Exception as fault:
            reason = f"{type(fault).__name__}: {first_line(fault)}"
            rows.append(row | {"benchmark": "optimizers_skipped", "reason": reason})
            print(f"{options.model} {name}: failed: {reason}", flush=True)
            failed = True
            continue
        row |= {**times.row(), "error": error, "floor_bytes": MOVED * numbers}
        if ceilings:
            row |= {"ceilings": ceilings.row(), "share_of_copy": MOVED * numbers / times.p50 / ceilings.copy}
        rows.append(row)
        share = f", {row['share_of_copy']:.0%} of a copy" if ceilings else ""
        print(f"{options.model} {name}: {times.p50 * 1e3:.3f} ms a step{share}, change off by {error:.1e}", flush=True)
        failed |= not error < 1e-3
    return int(failed)


def one_step(optimizer: torch.optim.Optimizer, _: int) -> None:
    optimizer.step()


def stepped(model: nn.Module, name: str, device: torch.device) -> torch.optim.Optimizer:
    """An optimizer whose state is there, on parameters of its own."""
    own = copied(model, torch.float32)
    optimizer = optimizer_of(parameter_groups(own, OptimizerConfig().weight_decay), name, OptimizerConfig(), device)
    optimizer.step()
    return optimizer


def first_change(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What one step adds to each parameter."""
    own = copied(model, dtype)
    before = [parameter.detach().clone() for parameter in own.parameters()]
    config = OptimizerConfig()
    optimizer = optimizer_of(parameter_groups(own, config.weight_decay), name, config, device)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    optimizer.step()
    return [after.detach() - old for after, old in zip(own.parameters(), before, strict=True)]


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With its gradients."""
    own = copy.deepcopy(model).to(dtype)
    for parameter, source in zip(own.parameters(), model.parameters(), strict=True):
        parameter.grad = None if source.grad is None else source.grad.to(dtype)
    return own


def distance(got: list[Tensor], true: list[Tensor]) -> float:
    """Length of the difference of two lists of tensors over the length of the second."""
    off = sum(((a.double() - b.double()) ** 2).sum().item() for a, b in zip(got, true, strict=True))
    size = sum((b.double() ** 2).sum().item() for b in true)
    return float((off / size) ** 0.5)


if __name__ == "__main__":
    main()
