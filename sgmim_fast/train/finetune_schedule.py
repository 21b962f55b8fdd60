"""Learning rates of fine-tuning, by optimizer step from 0. They do not depend on the batch size."""


def triangle_rate(
    step: int, steps_per_epoch: int, epochs: int, low: float = 3e-5, high: float = 5e-4, power: float = 0.9
) -> float:
    """MIM-Depth-Estimation's: from ``low`` to ``high`` in half of the epochs, rounded down, and back in as many.

    With x running from 0 to 1 in the first half, the rate is low + (high - low) x^power; after it, with x beginning
    from 0 again, high - (high - low) x^power, and ``low`` in what an odd number of epochs leaves. One epoch turns at
    half of its steps. As in the source, steps are counted from 1, so the first one is already above ``low``.
    """
    turn = steps_per_epoch * (epochs // 2) or max(steps_per_epoch // 2, 1)
    x = (step + 1) / turn
    if x < 1:
        return low + (high - low) * x**power
    return max(low, high - (high - low) * (x - 1) ** power)


def poly_rate(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int = 1500,
    warmup_ratio: float = 1e-6,
    power: float = 1.0,
    floor: float = 0.0,
) -> float:
    """mmsegmentation's: floor + (peak - floor) (1 - step / total)^power, in the warm-up times a factor.

    The factor rises linearly from ``warmup_ratio`` at step 0 to 1 at step ``warmup_steps``; the polynomial counts from
    step 0 all the same.
    """
    rate = floor + (peak - floor) * (1 - min(step / total_steps, 1.0)) ** power
    if step < warmup_steps:
        rate *= 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)
    return rate
