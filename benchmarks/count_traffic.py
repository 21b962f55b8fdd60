"""Count what DeepSpeed communicates in a step, and what its checkpoints weigh, on joined ranks; one JSON line a case.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.count_traffic OUTPUT.jsonl

Rank 0 writes, for each ZeRO stage and some settings, the collectives of the third step (the first ones of stage 3 trace
the model) and the bytes of a checkpoint. Nothing is timed; a test holds the lines against ``sgmim_fast.planning``.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed

from benchmarks.scaling_engine import Engine, counted
from sgmim_fast.config import ModelConfig
from sgmim_fast.train.ranks import joined_ranks

# Parameters on both sides of ZeRO-3's threshold, odd sizes among them.
MODEL = ModelConfig(image_size=64, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=2)
CASES: tuple[dict[str, Any], ...] = (
    *({"stage": stage, "accumulation": 1, "precision": "fp32"} for stage in range(4)),
    *({"stage": stage, "accumulation": 2, "precision": "bf16", "bucket_size": 600_000} for stage in range(1, 4)),
)


def main() -> None:
    output = Path(sys.argv[1])
    with joined_ranks(600):
        chief = distributed.get_rank() == 0
        for case in CASES:
            engine = Engine(MODEL, batch=1, **case)
            engine.step()
            engine.step()
            with counted() as calls:
                engine.step()
            files = checkpoint_bytes(engine.engine)
            if chief:
                line = case | {"world_size": distributed.get_world_size(), "calls": calls, "checkpoint_bytes": files}
                with output.open("a") as file:
                    file.write(json.dumps(line | {"groups": engine.sizes.groups}) + "\n")


def checkpoint_bytes(engine: deepspeed.DeepSpeedEngine) -> int:
    """Of all ranks' shards."""
    with tempfile.TemporaryDirectory() as own:
        shared: list[Any] = [own]
        distributed.broadcast_object_list(shared)
        engine.save_checkpoint(shared[0], tag="step", save_latest=False)
        distributed.barrier()
        size = sum(path.stat().st_size for path in Path(shared[0]).rglob("*") if path.is_file())
        distributed.barrier()
    return size


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
