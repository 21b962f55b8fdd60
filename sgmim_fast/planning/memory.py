"""Bytes that a GPU holds for weights, gradients and optimizer state, whatever the batch; activations come on top.

With N parameters, W ranks, and w bytes a weight (fp32 4, bf16 2), as DeepSpeed 0.19 allocates them:

| stage | weights | gradients | optimizer | buckets |
|---|---|---|---|---|
| 0 | wN | wN | 8N | wN: all gradients side by side while they are summed |
| 1 | wN | wN | 12N/W | w x bucket size |
| 2 | wN | wN/W | 12N/W | w x bucket size |
| 3 | wN/W, and what is gathered | wN/W | 12N/W | w x bucket size |

The 12 bytes are an fp32 copy of the weights, kept in fp32 runs as well, and AdamW's two moments. Overlapped
communication (stages 1 and 2) takes two buckets. Stage 3 gathers up to 1e9 weights before it lets any go: of smaller
models each rank holds all for most of a step.
"""

from dataclasses import dataclass

from sgmim_fast.planning.parameters import WEIGHT_BYTES, ParameterSizes, Precision
from sgmim_fast.planning.traffic import REUSED


@dataclass(frozen=True)
class StateMemory:
    """Bytes a GPU at their peak."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def state_memory(
    parameters: ParameterSizes,
    *,
    stage: int,
    precision: Precision,
    gpus: int,
    bucket_size: int = 500_000_000,
    overlap: bool = False,
) -> StateMemory:
    """By the table above; padding, below a kilobyte a rank and parameter, is left out."""
    width, count = WEIGHT_BYTES[precision], parameters.count
    whole = width * count
    if stage == 0:
        return StateMemory(whole, whole, 8 * count, whole if gpus > 1 else 0)
    optimizer = 12 * count / gpus
    bucket = width * bucket_size * (2 if overlap and stage < 3 else 1)
    if stage < 3:
        return StateMemory(whole, whole / (gpus if stage == 2 else 1), optimizer, bucket)
    gathered = width * min(count, REUSED)
    return StateMemory(whole / gpus + (gathered if gpus > 1 else 0), whole / gpus, optimizer, bucket)
