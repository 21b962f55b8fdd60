"""How far a step's loss and gradients are from those of the plain path in float64, on the same weights and batch."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.step_arms import Batch, Runner
from sgmim_fast.models.sgmim import SGMIM

CHUNK = 8  # samples that the truth takes at a time: float64 needs four times the memory of bfloat16


@dataclass(frozen=True)
class Result:
    """What a step gives."""

    loss: float
    gradients: Mapping[str, Tensor]
    """By the names of the parameters."""

    @property
    def norm(self) -> float:
        return float(torch.nn.utils.get_total_norm(list(self.gradients.values())))


def truth_of(model: SGMIM, inputs: Batch) -> Result:
    """Of the plain path in float64; gradients in float32.

    All samples mask equally many cells, so the mean over chunks of samples is the mean over all of them.
    """
    exact = copy.deepcopy(model).double()
    exact.set_attention("auto")
    exact.set_backend("reference")
    size = len(inputs[0])
    loss = 0.0
    for start in range(0, size, CHUNK):
        part = [x[start : start + CHUNK] for x in inputs]
        image, structure, *rest = (x.double() if x.is_floating_point() else x for x in part)
        share = exact(image, structure, *rest).loss * (len(image) / size)
        share.backward()
        loss += share.item()
    gradients = {name: p.grad.float() for name, p in exact.named_parameters() if p.grad is not None}
    return Result(loss, gradients)


def result_of(runner: Runner) -> Result:
    """Of one step; the gradients are copies."""
    runner.drop_gradients()
    loss = runner.step().item()
    return Result(loss, {name: gradient.clone() for name, gradient in runner.gradients().items()})


def deviations(got: Result, other: Result) -> dict[str, float | None]:
    """Relative to ``other``: of the loss, of the gradient's norm, and of the gradient itself as one long vector.

    The last is None where the parameters have other names, as the outside peer's.
    """
    gradient = None
    if got.gradients.keys() == other.gradients.keys():
        squares = [
            ((x.float() - other.gradients[name].float()) ** 2).sum(dtype=torch.float64)
            for name, x in got.gradients.items()
        ]
        gradient = float(torch.stack(squares).sum().sqrt()) / other.norm
    return {
        "loss": abs(got.loss - other.loss) / abs(other.loss),
        "gradient_norm": abs(got.norm - other.norm) / other.norm,
        "gradient": gradient,
    }
