"""Seconds of an optimizer step: computation, communication that does not hide behind it, and waiting for data."""

from dataclasses import dataclass

from sgmim_fast.planning.collectives import Cluster
from sgmim_fast.planning.parameters import Precision
from sgmim_fast.planning.traffic import Traffic, traffic_seconds

BACKWARD = 2 / 3  # share of a micro-step: backward has two matrix products for each of forward's
# Bytes of memory traffic a parameter: AdamW reads weight, gradient and two moments and writes three of them, in fp32;
# with bf16 weights the gradient is converted first (2 read, 4 written) and the weight afterwards (2 written).
OPTIMIZER_TRAFFIC: dict[Precision, int] = {"fp32": 28, "bf16": 36}


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step."""

    compute: float
    """Forward and backward of all micro-steps, and the optimizer."""
    communication: float
    """All collectives, one after the other."""
    exposed: float
    """Communication that nothing hides."""
    data_wait: float
    """What the loader takes longer than all that."""

    @property
    def total(self) -> float:
        """From one step to the next."""
        return self.compute + self.exposed + self.data_wait


def optimizer_seconds(count: int, *, stage: int, precision: Precision, gpus: int, memory_bandwidth: float) -> float:
    """AdamW moves bytes and does little else; from stage 1 on each rank steps its part.

    Args:
        count: parameters.
        stage: of ZeRO.
        precision: of the weights.
        gpus: ranks.
        memory_bandwidth: bytes a second, read and written.
    """
    return OPTIMIZER_TRAFFIC[precision] * count / (gpus if stage > 0 else 1) / memory_bandwidth


def step_time(
    traffic: list[Traffic],
    *,
    gpus: int,
    cluster: Cluster,
    micro_step: float,
    optimizer: float,
    accumulation: int = 1,
    overlap: float = 0.0,
    loading: float = 0.0,
) -> StepTime:
    """The time of one optimizer step.

    Args:
        traffic: the step's collectives.
        gpus: ranks.
        cluster: what they run on.
        micro_step: seconds of one forward and backward pass.
        optimizer: seconds of the optimizer on this rank's part.
        accumulation: micro-steps.
        overlap: of the communication that can run beside the backward pass, the share that does so for free.
        loading: seconds that the loader needs for the step's pairs.
    """
    compute = accumulation * micro_step + optimizer
    times = [traffic_seconds(part, gpus, cluster) for part in traffic]
    hidden = overlap * sum(part.beside * time for part, time in zip(traffic, times, strict=True))
    hidden = min(hidden, accumulation * BACKWARD * micro_step)
    communication = sum(times)
    exposed = communication - hidden
    return StepTime(compute, communication, exposed, max(0.0, loading - compute - exposed))
