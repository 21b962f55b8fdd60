"""Joining the ranks of a run, on GPUs or CPUs, under whichever launcher."""

import logging
import os
import warnings
from datetime import timedelta

import deepspeed
import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def join_ranks() -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", message=r".*_into_tensor. is deprecated", category=FutureWarning)
    # Only inference uses this op; building it would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():  # started without a launcher
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return device
