"""What DeepSpeed 0.19 communicates in one optimizer step, as its source says and as a test counts it on two ranks.

| stage | a micro-step | an optimizer step |
|---|---|---|
| 0 | | all-reduce of the gradients |
| 1 | | all-reduce of the gradients, all-gather of the weights |
| 2 | all-reduce of the gradients | all-gather of the weights |
| 3 | all-gather of the weights, reduce-scatter of the gradients | all-gather of the small weights |

Stages 1 and 2 do not reduce-scatter: ``use_multi_rank_bucket_allreduce``, which is on unless told otherwise, joins the
partitions of all ranks in one all-reduce, of which each rank keeps its part.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sgmim_fast.config import TrainConfig
from sgmim_fast.planning.collectives import Cluster, Kind, seconds
from sgmim_fast.planning.parameters import WEIGHT_BYTES, ParameterSizes, Precision, padded
from sgmim_fast.train.deepspeed_settings import zero_settings

ALIGNMENT = 2  # elements a rank to which stages 1 and 2 fill up each group (nccl_start_alignment_factor)
# Overflow checks and gradient norms of a step, in bytes: latency is all they cost.
_SCALARS = {0: (4,), 1: (4, 4), 2: (4, 4), 3: (8, 8)}
_OVERFLOW_FLAG = 1  # bf16 at stages 1 and 2


@dataclass(frozen=True)
class Traffic:
    """Equal collectives of an optimizer step."""

    kind: Kind
    what: Literal["gradients", "weights", "scalars"]
    payload: int
    """Bytes of all of them together."""
    calls: int
    """How many there are. Exact where one bucket takes the whole model; stages 2 and 3 fill several in the order of the
    backward pass, which may differ by one from the order here."""
    beside: float = 0.0
    """Share that DeepSpeed can communicate beside computation: all buckets but the last."""


def bucket_count(sizes: Iterable[int], bucket_size: int) -> int:
    """Buckets that parameters fill in turn; one that does not fit begins the next, one larger than any has its own."""
    buckets, filled = 1, 0
    for size in sizes:
        if filled and filled + size > bucket_size:
            buckets, filled = buckets + 1, 0
        filled += size
    return buckets


def step_traffic(
    parameters: ParameterSizes,
    *,
    stage: int,
    precision: Precision,
    gpus: int,
    accumulation: int = 1,
    bucket_size: int = 500_000_000,
) -> list[Traffic]:
    """The collectives of one optimizer step; none on one GPU.

    Args:
        parameters: of the model.
        stage: of ZeRO.
        precision: of the weights.
        gpus: ranks.
        accumulation: micro-steps an optimizer step.
        bucket_size: gradient elements that one collective takes (``train.bucket_size``; stage 0 has its own,
            stage 3 also gathers weights by it).
    """
    if gpus == 1:
        return []
    width, count = WEIGHT_BYTES[precision], parameters.count
    buckets = bucket_count(parameters.sizes, 500_000_000 if stage == 0 else bucket_size)
    beside = 0.0 if stage == 0 else 1 - 1 / buckets
    scalars = _SCALARS[stage]
    if precision == "bf16" and stage in (1, 2):
        scalars = (_OVERFLOW_FLAG, *scalars)
    found = [Traffic("all-reduce", "scalars", size, 1) for size in scalars]
    if stage == 3:
        large, small = parameters.partitioned, parameters.persistent
        settings = zero_settings(TrainConfig(zero_stage=3, bucket_size=bucket_size))
        gathers = max(1, -(-sum(large) // settings["stage3_prefetch_bucket_size"]))
        # Weights are let go between forward and backward if so many elements lie between their uses.
        again = max(0, count - settings["stage3_max_reuse_distance"] // 2) / count
        gathered = round(width * accumulation * padded(large, gpus) * (1 + again))
        if large:
            found.append(Traffic("all-gather", "weights", gathered, gathers * accumulation, beside=1 - 1 / gathers))
        if small:
            found.append(Traffic("all-gather", "weights", width * padded(small, gpus), len(small)))
        scattered = width * accumulation * padded(parameters.sizes, gpus)
        found.append(Traffic("reduce-scatter", "gradients", scattered, buckets * accumulation, beside))
        return found
    times = accumulation if stage == 2 else 1
    found.append(Traffic("all-reduce", "gradients", width * count * times, buckets * times, beside))
    if stage > 0:
        for group in parameters.groups:
            found.append(Traffic("all-gather", "weights", width * padded([sum(group)], ALIGNMENT * gpus), 1))
    return found


def traffic_seconds(traffic: Traffic, gpus: int, cluster: Cluster) -> float:
    """Seconds of all its collectives, one after the other."""
    return traffic.calls * seconds(traffic.kind, traffic.payload / traffic.calls, gpus, cluster)
