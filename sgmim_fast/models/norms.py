"""LayerNorm by name: PyTorch's, or NVIDIA Apex's fused one in its place."""

from typing import Any

import torch
from torch import nn

from sgmim_fast import nvidia_apex
from sgmim_fast.config import Norm
from sgmim_fast.errors import UserError, first_line

NORMS = ("torch", "apex")


def check_norm(norm: Norm, device: torch.device) -> None:
    """Refuse a norm that cannot run on ``device``.

    Raises:
        UserError: with the reason and the remedy.
    """
    if norm not in NORMS:
        raise UserError(f"norm {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    if norm == "apex" and (reason := _apex_objection(device)) is not None:
        raise UserError(f'norm "apex" cannot run here: {reason}; or choose "torch"')


def _apex_objection(device: torch.device) -> str | None:
    try:
        fused = nvidia_apex.load("normalization", "FusedLayerNorm")
        if device.type not in ("cuda", "meta"):
            return f"on the {device.type.upper()} FusedLayerNorm runs PyTorch's own norm; it needs a GPU"
        fused(8)  # it looks for its CUDA extension when it is made
    except Exception as error:
        return first_line(error)
    return None


def use_norm(model: nn.Module, norm: Norm) -> None:
    """Let every LayerNorm of ``model`` be of the implementation ``norm``; parameters and their names stay.

    Raises:
        UserError: if it is unknown or cannot run where the model is.
    """
    check_norm(norm, next(model.parameters()).device)
    fused = nvidia_apex.load("normalization", "FusedLayerNorm") if norm == "apex" else None
    make: Any = fused or nn.LayerNorm
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if not (type(old) is nn.LayerNorm if fused else _is_apex(old)):
                continue
            new = make(old.normalized_shape, eps=old.eps)
            new.weight, new.bias = old.weight, old.bias
            new.train(old.training)
            setattr(parent, name, new)


def _is_apex(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "apex" and type(module).__name__ == "FusedLayerNorm"
