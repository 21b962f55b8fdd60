"""DeepSpeed's own configuration for a run."""

from typing import Any

from sgmim_fast.config import PretrainConfig


def deepspeed_config(config: PretrainConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run."""
    return {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        # Steps whose gradient is not finite are then skipped, as in fp32.
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }
