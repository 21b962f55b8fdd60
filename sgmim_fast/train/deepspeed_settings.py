"""What DeepSpeed is told about a run: batch, precision, ZeRO and where its memory goes."""

from typing import Any

import torch

from sgmim_fast.config import RunConfig, TrainConfig


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run."""
    return {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        # Steps whose gradient is not finite are skipped, as in fp32; so does DeepSpeed unless told otherwise.
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": zero_settings(config.train),
        "zero_allow_untested_optimizer": True,
        # PyTorch's AdamW steps on the host as well; DeepSpeed's own CPU Adam would have to be built first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }


def zero_settings(train: TrainConfig) -> dict[str, Any]:
    """The part about ZeRO. Sizes are in elements, as DeepSpeed counts them."""
    if train.zero_stage == 0:
        return {"stage": 0}
    settings: dict[str, Any] = {
        "stage": train.zero_stage,
        "overlap_comm": train.overlaps_comm,
        "reduce_bucket_size": train.bucket_size,
    }
    if train.zero_stage == 3:
        # In the proportions of DeepSpeed's own figures: what is fetched ahead of its use, and within how many elements
        # weights must be used again to be kept. At those figures ZeRO-3 keeps all weights of a model this small.
        settings["stage3_prefetch_bucket_size"] = train.bucket_size // 10
        settings["stage3_max_live_parameters"] = settings["stage3_max_reuse_distance"] = 2 * train.bucket_size
    else:
        settings["allgather_bucket_size"] = train.bucket_size + train.bucket_size % 2  # DeepSpeed wants it even
    if train.offload_optimizer:
        # Page-locked memory lets a GPU copy beside its work; without a GPU there is nothing to lock it for.
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings
