"""One rank that ``benchmarks.scaling`` gives orders: a JSON object a line in, an answer a line out, behind ``@``."""

import argparse
import json
import sys
import time
from typing import Any

import torch
from torch import distributed

from benchmarks.scaling_engine import Engine, counted
from sgmim_fast.config import ModelConfig
from sgmim_fast.planning.collectives import Kind
from sgmim_fast.train.ranks import joined_ranks

WARM_UP = 3  # steps; ZeRO-3 traces the model in the first two


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=json.loads)
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    with joined_ranks(600):
        torch.set_num_threads(1)
        engines = [Engine(ModelConfig(**options.model), stage=stage, batch=options.batch) for stage in range(4)]
        for engine in engines:
            for _ in range(WARM_UP):
                engine.step()
        answer({"parameters": engines[0].sizes.groups})
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "link":
                answer(time_collective(order["kind"], order["payload"], order["count"]))
            elif order["do"] == "count":
                with counted() as calls:
                    engines[order["stage"]].step()
                answer(calls)
            else:
                answer(time_steps(engines[order["stage"]], order["count"]))


def answer(value: Any) -> None:
    print("@" + json.dumps(value), flush=True)


def time_steps(engine: Engine, count: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, and of the optimizer, step by step; what the ranks communicate is in both."""
    passes, optimizers = [], []
    distributed.barrier()
    for _ in range(count):
        begin = time.perf_counter()
        engine.micro_step()
        between = time.perf_counter()
        engine.engine.step()
        passes.append(between - begin)
        optimizers.append(time.perf_counter() - between)
    return {"passes": passes, "optimizers": optimizers}


def time_collective(kind: Kind, payload: int, count: int) -> list[float]:
    """Seconds of each of ``count`` collectives of ``payload`` bytes; the first is not counted."""
    ranks = distributed.get_world_size()
    whole = torch.zeros(payload // 4 // ranks * ranks)
    part = torch.zeros(len(whole) // ranks)
    run = {
        "all-reduce": lambda: distributed.all_reduce(whole),
        "all-gather": lambda: distributed.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: distributed.reduce_scatter_tensor(part, whole),
    }[kind]
    seconds = []
    for _ in range(count + 1):
        distributed.barrier()
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


if __name__ == "__main__":
    main()
