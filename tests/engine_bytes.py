"""A rank that trains tiny models in DeepSpeed's engine and writes down losses, bytes held and checkpoint sizes.

    torchrun --nproc-per-node 2 tests/engine_bytes.py OUTPUT 'CASES as JSON'

A case holds fields of TrainConfig; OUTPUT gets one object a case, of rank 0.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, distributed

from sgmim_fast.config import PretrainConfig, TrainConfig
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.deepspeed_settings import deepspeed_config
from sgmim_fast.train.optim import build_optimizer, parameter_groups
from sgmim_fast.train.ranks import joined_ranks

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.test_compile import batch
from tests.test_models import tiny

STEPS = 3


def config(case: dict[str, Any]) -> PretrainConfig:
    levels = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    return PretrainConfig(
        model=tiny("swin", **levels), train=TrainConfig(batch_size=2, backend="torch", **case)
    )  # fmt: skip


def held(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def train(case: dict[str, Any], device: torch.device, shards: Path) -> dict[str, Any]:
    run = config(case)
    torch.manual_seed(0)
    task = PretrainTask(run.model, "torch", device=device, activation_checkpointing=run.train.activation_checkpointing)
    own = build_optimizer(parameter_groups(task, run.optimizer.weight_decay), run.optimizer, device)
    engine, optimizer, _, _ = deepspeed.initialize(model=task, optimizer=own, config=deepspeed_config(run))
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for micro in range(run.train.accumulation_steps):
            out = engine(batch(10 * step + 2 * micro + distributed.get_rank()))
            engine.backward(out.loss)
            engine.step()
        losses.append(out.loss.item())
    master = getattr(optimizer, "fp32_partitioned_groups_flat", None) or getattr(
        optimizer, "single_partition_of_fp32_groups", []
    )
    moments = [x for state in own.state.values() for x in state.values() if isinstance(x, Tensor) and x.numel() > 1]
    engine.save_checkpoint(str(shards), tag="shards", save_latest=False)
    distributed.barrier()
    found = {
        "losses": losses,
        # Of ZeRO-3 the parts, and the small ones whole besides.
        "weights": held(getattr(p, "ds_tensor", p) for p in task.parameters())
        + sum(p.ds_numel * p.element_size() for p in task.parameters() if getattr(p, "ds_persist", False)),
        "master": held(master),
        "optimizer": held(moments),
        "shards": sum(path.stat().st_size for path in shards.rglob("*.pt")),
    }
    engine.destroy()
    return found


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with joined_ranks(300) as device:
        torch.set_num_threads(1)
        found = [train(case, device, output.with_suffix(f".{number}")) for number, case in enumerate(cases)]
        if distributed.get_rank() == 0:
            output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
