"""A small model in DeepSpeed's engine as a run has it, for what is measured and counted about several ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgmim_fast.config import ModelConfig, PretrainConfig, TrainConfig
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, mask_indices, sample_rng
from sgmim_fast.planning.collectives import Kind
from sgmim_fast.planning.model_sizes import parameter_sizes
from sgmim_fast.planning.parameters import ParameterSizes
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.deepspeed_settings import deepspeed_config
from sgmim_fast.train.optim import build_optimizer, parameter_groups

KIND_OF_OPERATION: dict[str, Kind] = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class Engine:
    """One rank's model, optimizer and DeepSpeed engine, and a batch of noise."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        stage: int,
        batch: int,
        accumulation: int = 1,
        precision: str = "fp32",
        bucket_size: int | None = None,
    ) -> None:
        """Joined ranks make theirs together; ``batch`` is in pairs a micro-step and rank."""
        train = TrainConfig(
            batch_size=batch,
            accumulation_steps=accumulation,
            zero_stage=stage,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
        )
        if bucket_size is not None:
            train = replace(train, bucket_size=bucket_size)
        config = PretrainConfig(model=model, train=train)
        device = torch.device("cpu")
        torch.manual_seed(0)
        self.stage, self.accumulation = stage, accumulation
        self.task = PretrainTask(model, "auto", "auto", "torch", device)
        self.sizes: ParameterSizes = parameter_sizes(self.task.model)
        optimizer = build_optimizer(
            parameter_groups(self.task, config.optimizer.weight_decay), config.optimizer, device
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.task, optimizer=optimizer, config=deepspeed_config(config)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        self.batch = noise(model, batch)

    def micro_step(self) -> None:
        """Forward and backward, and whatever DeepSpeed communicates meanwhile."""
        self.engine.backward(self.engine(self.batch).loss)

    def step(self) -> None:
        """One optimizer step with all its micro-steps."""
        for _ in range(self.accumulation):
            self.micro_step()
            self.engine.step()


def noise(model: ModelConfig, batch: int) -> dict[str, Tensor]:
    """A batch as a loader gives it, of random numbers."""
    rngs = [sample_rng(0, 0, index, STREAM_MASK) for index in range(batch)]
    mask = torch.stack([torch.from_numpy(draw_cell_mask(rng, model.grid, 0.6)) for rng in rngs])
    masked, visible = mask_indices(mask)
    return {
        "image": torch.randn(batch, 3, *model.hw),
        "structure": torch.randn(batch, model.structure_channels, *model.hw),
        "mask": mask,
        "masked": masked,
        "visible": visible,
        "index": torch.arange(batch),
    }


class CollectiveCounter(TorchDispatchMode):
    """Notes every collective of ``torch.distributed``, whoever calls it: kind and payload in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__
            # The payload is the larger of what goes in and what comes out.
            payload = max(map(_bytes, args))
            self.calls.append((KIND_OF_OPERATION.get(name, name), payload))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives of a block, in a list that fills meanwhile."""
    with CollectiveCounter() as counter:
        yield counter.calls
