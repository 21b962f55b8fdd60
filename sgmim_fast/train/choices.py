"""What a run asks for by name and this machine cannot do is refused before anything starts."""

import torch

from sgmim_fast import ops
from sgmim_fast.attention import check_attention
from sgmim_fast.config import RunConfig
from sgmim_fast.models.float8 import check_float8
from sgmim_fast.models.norms import check_norm
from sgmim_fast.train.compiling import check_compiler
from sgmim_fast.train.optim import check_optimizer
from sgmim_fast.train.wandb_sink import check_wandb


def check_choices(config: RunConfig, device: torch.device) -> None:
    """Refuse choices of ``config`` that cannot run on ``device``.

    Raises:
        UserError: for the first of them, with the reason and the remedy.
    """
    train = config.train
    backend = ops.resolve_backend(train.backend, torch.zeros(1, device=device))
    check_attention(train.attention, backend, device)
    check_norm(train.norm, device)
    check_float8(train.float8, device)
    check_optimizer(config.optimizer.implementation, device)
    if train.compile:
        check_compiler(device)
    check_wandb(config.monitor.wandb)
