"""Building blocks that the encoders, the structure encoder and the guidance block share.

Every parameter is used inside the forward of the module that owns it, or of one around it that reads it as an attribute
of its owner: under ZeRO-3 that is when it is there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Dispatched(nn.Module):
    """A module that runs an operation of ``ops``, with the backend and attention that the model has chosen."""

    backend: str = "auto"
    attention: str = "auto"


class Mlp(nn.Module):
    """Two linear layers with GELU (erf) between: (..., C) -> (..., C), hidden width 4 C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Drops a residual branch for whole samples with probability ``rate`` and rescales the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * kept / keep


class BlockStage(nn.Module):
    """A module that runs residual blocks one after the other, and chooses what they keep for the backward pass."""

    checkpointed = False
    """Keep each block's input alone and run the block again in the backward pass (activation checkpointing)."""
    draws = False
    """Whether blocks draw random numbers: those of drop path, which must come again."""

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """``block(*inputs)``; same numbers either way, drop path's included."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.draws and self.training)
        return block(*inputs)


class PatchEmbed(nn.Module):
    """Patches of (B, C, H, W) to channels-last tokens (B, H / p, W / p, E): convolution, then an optional norm.

    Zeros at the bottom and the right complete the last patches.
    """

    def __init__(self, channels: int, width: int, patch: int, norm_eps: float | None = 1e-5) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (-side % patch for side, patch in zip(x.shape[2:], self.proj.kernel_size, strict=True))
        if down or right:
            x = F.pad(x, (0, right, 0, down))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class QkvLinear(nn.Linear):
    """Projection to queries, keys and values whose bias comes from outside; keys have none (BEiT, Swin V2)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)

    def forward(self, x: Tensor, q_bias: Tensor, v_bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, qkv_bias(q_bias, v_bias))


def qkv_bias(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    """Of the projection to queries, keys and values, in this order: 2 x (C,) -> (3 C,), zeros for the keys."""
    return torch.cat((q_bias, torch.zeros_like(v_bias), v_bias))


class PixelHead(nn.Conv2d):
    """1x1 convolution from token features to pixels, for maps (B, C, H, W) and for lists (B, N, C) of tokens alike."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__(width, pixels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else F.linear(x, self.weight.flatten(1), self.bias)


def merge_neighbours(x: Tensor) -> Tensor:
    """(..., H, W, C) -> (..., H / 2, W / 2, 4 C), the 2x2 neighbours in the order (0,0), (1,0), (0,1), (1,1).

    Zeros complete an odd H or W.
    """
    if x.shape[-3] % 2 or x.shape[-2] % 2:
        x = F.pad(x, (0, 0, 0, x.shape[-2] % 2, 0, x.shape[-3] % 2))
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    # (h, row, w, column, c) -> (h, w, column, row, c): the row parity varies fastest
    return x.movedim(-4, -2).flatten(-3)


def init_trunc_normal(module: nn.Module, cut: float = 2.0) -> None:
    """SimMIM's start for one module: Linear weights normal (std 0.02, cut at +-``cut``), biases 0, norms 1/0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-cut, b=cut)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
