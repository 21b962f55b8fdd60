"""A plain training loop on one process: batches that are made ahead, and steps of AdamW."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast.config import OptimizerConfig
from sgmim_fast.data.batches import Batch, Sample
from sgmim_fast.data.order import SampleOrder
from sgmim_fast.train.optim import build_optimizer

_AHEAD = 2  # batches


@dataclass(frozen=True)
class Cost:
    """What a training took, data included."""

    seconds: float
    steps: int
    images: int

    def row(self) -> dict[str, float]:
        return {
            "train_seconds": round(self.seconds, 3),
            "steps": self.steps,
            "images": self.images,
            "images_per_step": self.images // self.steps,
            "images_per_second": round(self.images / self.seconds, 2),
        }


def batches(
    dataset: Any, key_of: Callable[[int, int], Any], order: SampleOrder, steps: int, threads: int
) -> Iterator[Batch]:
    """The first ``steps`` batches of an order, made by threads a little ahead; what they hold depends on neither.

    Args:
        dataset: gives the sample of a key, and collates.
        key_of: the key of (epoch, dataset index).
        threads: how many.
    """
    waiting: deque[list[Future[Sample]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="samples")
    try:
        asked = order.micro_batches(0)
        for number in range(steps + _AHEAD):
            if number < steps:
                epoch, indices = next(asked)
                keys = [key_of(epoch, index) for index in indices.tolist()]
                waiting.append([pool.submit(dataset.__getitem__, key) for key in keys])
            if number >= _AHEAD:
                yield dataset.collated([sample.result() for sample in waiting.popleft()])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Stepper:
    """AdamW on a module. In bf16 it keeps fp32 copies of the weights and steps those, as DeepSpeed does.

    Args:
        module: on its device, in fp32; cast to bf16 if that is the precision.
        groups: of its parameters, with "weight_decay" and perhaps "lr_scale".
        settings: AdamW's constants and the clipping of gradients.
        precision: "fp32" or "bf16".
    """

    def __init__(
        self, module: nn.Module, groups: list[dict[str, Any]], settings: OptimizerConfig, precision: str
    ) -> None:
        self.module, self.settings = module, settings
        self.copies: list[tuple[nn.Parameter, Tensor]] = []
        device = next(module.parameters()).device
        if precision == "bf16":
            groups = [
                {**group, "params": [self._copied(parameter) for parameter in group["params"]]} for group in groups
            ]
            module.bfloat16()
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = build_optimizer(groups, settings, device)

    def _copied(self, parameter: nn.Parameter) -> Tensor:
        copy = parameter.detach().clone().requires_grad_(True)
        self.copies.append((parameter, copy))
        return copy

    def step(self, loss: Tensor, rate: float) -> None:
        """One step down the gradient of ``loss``."""
        loss.backward()
        for parameter, copy in self.copies:
            copy.grad = None if parameter.grad is None else parameter.grad.to(copy.dtype)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, copy in self.copies:
                parameter.copy_(copy)
        self.module.zero_grad()

    def finish(self) -> None:
        """Leave the module in fp32, with the weights at full precision."""
        self.module.float()
        with torch.no_grad():
            for parameter, copy in self.copies:
                parameter.copy_(copy)


def train(
    module: nn.Module,
    stepper: Stepper,
    source: Iterator[Batch],
    rate: Callable[[int], float],
    device: torch.device,
) -> tuple[list[tuple[float | None, ...]], Cost]:
    """Run through the batches; losses of every step by the order of the module's output, and the cost."""
    module.train()
    found: list[tuple[Tensor | None, ...]] = []
    images, began = 0, time.perf_counter()
    for step, batch in enumerate(source):
        placed = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        output = module(placed)
        stepper.step(output[0], rate(step))
        found.append(tuple(None if loss is None else loss.detach() for loss in output))
        images += len(batch["image"])
    # Reading the losses waits for the device.
    losses = [tuple(None if loss is None else float(loss) for loss in losses) for losses in found]
    return losses, Cost(time.perf_counter() - began, len(losses), images)
