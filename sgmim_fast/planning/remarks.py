"""What a reader of a plan should look out for."""

from collections.abc import Callable, Iterable

from sgmim_fast.planning.inputs import Inputs
from sgmim_fast.planning.rows import Row

# Linear scaling of the learning rate was shown up to this batch, for supervised training with SGD: Goyal et al., arXiv
# 1706.02677.
LARGE_BATCH = 8192
FEW_STEPS = 5000
SLOW_CHECKPOINTS = 0.05  # share of the time


def warnings_about(inputs: Inputs, rows: Iterable[Row]) -> list[str]:
    """Whatever makes numbers of ``rows`` doubtful or bad, once each, with the GPU counts that it holds for."""
    rows = list(rows)
    found: list[str] = []

    def warn(condition: Callable[[Row], bool], text: Callable[[Row], str]) -> None:
        hit = [row for row in rows if condition(row)]
        if hit:
            counts = sorted({row.gpus for row in hit})
            found.append(f"{_counts(counts, {row.gpus for row in rows})}: {text(max(hit, key=lambda row: row.gpus))}")

    warn(
        lambda row: row.steps == 0,
        lambda row: (
            f"a step takes more pairs ({row.global_batch:,} in the largest) than the data set has "
            f"({inputs.images:,}), so there is no epoch; lower --batch or set --global-batch"
        ),
    )
    warn(
        lambda row: 0 < row.steps < FEW_STEPS,
        lambda row: (
            f"{inputs.epochs} epochs are fewer than {FEW_STEPS:,} optimizer steps (down to {row.steps:,}), so warm-up "
            "and schedule are coarse; train more epochs or lower the global batch"
        ),
    )
    warn(
        lambda row: row.global_batch > LARGE_BATCH,
        lambda row: (
            f"a global batch above {LARGE_BATCH:,}: rates scale with batch / 512, here to x{row.global_batch / 512:g}, "
            f"and linear scaling was shown up to {LARGE_BATCH:,} only (for supervised SGD, arXiv 1706.02677)"
        ),
    )
    warn(
        lambda row: row.data_wait_seconds > 0,
        lambda row: (
            f"loading is the bottleneck: a node needs {row.batch * row.gpus * inputs.accumulation / row.nodes:,.0f} "
            f"pairs a step, and computing waits {row.data_wait_seconds / row.step_seconds:.0%} of the time"
        ),
    )
    warn(
        lambda row: row.batch < inputs.measured.batch / 2,
        lambda row: (
            f"a GPU gets {row.batch} pairs at a time, and images/s is held at that of {inputs.measured.batch}; small "
            "batches compute less efficiently, so measure one"
        ),
    )
    stall = _stall(inputs)
    warn(
        lambda row: row.steps > 0 and row.checkpoints * stall(row) > SLOW_CHECKPOINTS * row.steps * row.step_seconds,
        lambda row: (
            f"checkpoints stop training for {row.checkpoints * stall(row) / (row.steps * row.step_seconds):.0%} "
            "of the computing time; raise --checkpoint-every"
            + ("" if inputs.async_checkpoint else " or write them with --async-checkpoint")
        ),
    )
    return found


def _stall(inputs: Inputs) -> Callable[[Row], float]:
    if inputs.async_checkpoint:
        return lambda row: row.checkpoint_stall_asynchronous_seconds
    return lambda row: row.checkpoint_stall_synchronous_seconds


def _counts(counts: list[int], planned: set[int]) -> str:
    """The GPU counts in words; "64 GPUs or more" where that is all of them."""
    if counts == sorted(planned) and len(counts) > 1:
        return "any number of GPUs"
    if len(counts) > 2 and counts == sorted(count for count in planned if count >= counts[0]):
        return f"{counts[0]} GPUs or more"
    return f"{', '.join(map(str, counts))} {'GPU' if counts == [1] else 'GPUs'}"
