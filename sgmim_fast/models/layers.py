"""Building blocks that the encoders, the structure encoder and the guidance block share.

Every parameter is used inside the forward of the module that owns it, or of one around it that reads it as an attribute
of its owner: under ZeRO-3 that is when it is there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgmim_fast import ops, reference
from sgmim_fast.masking import CELL


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
    """Patches of (B, C, H, W) to channels-last tokens (B, H / p, W / p, E): convolution, then an optional norm."""

    def __init__(self, channels: int, width: int, patch: int, norm_eps: float | None = 1e-5) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class QkvLinear(nn.Linear):
    """Projection to queries, keys and values whose bias comes from outside; keys have none (BEiT, Swin V2)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)

    def forward(self, x: Tensor, q_bias: Tensor, v_bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, torch.cat((q_bias, torch.zeros_like(v_bias), v_bias)))


class PixelHead(nn.Conv2d):
    """1x1 convolution from token features to pixels, for maps (B, C, H, W) and for lists (B, N, C) of tokens alike."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__(width, pixels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else F.linear(x, self.weight.flatten(1), self.bias)


def merge_neighbours(x: Tensor) -> Tensor:
    """(..., H, W, C) -> (..., H / 2, W / 2, 4 C), the 2x2 neighbours in the order (0,0), (1,0), (0,1), (1,1)."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    # (h, row, w, column, c) -> (h, w, column, row, c): the row parity varies fastest
    return x.movedim(-4, -2).flatten(-3)


class MaskedEncoder(nn.Module):
    """An encoder that begins with patch embedding and one learned token in place of masked cells."""

    def __init__(self, width: int, patch: int, norm_eps: float | None) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(3, width, patch, norm_eps)
        self.cell_side = CELL // patch  # tokens

    def forward(
        self, image: Tensor, mask: Tensor | None = None, visible: Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """Tokens (B, L, C) of (B, 3, H, W).

        Args:
            image: ImageNet-normalised RGB; cast to the dtype of the weights.
            mask: (B, Gh, Gw) bool, True where masked; None shows everything.
            visible: (B, V) int indices of the visible cells: embed those alone. Stands for ``mask``.
            backend: implementation of that.
        """
        embedded = self._embed(image, mask) if visible is None else self._embed_visible(image, visible, backend)
        return self.encode(embedded)

    def block_stages(self) -> list[BlockStage]:
        """The modules that run the blocks of each stage."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, H / p, W / p, E) -> (B, L, C)."""
        raise NotImplementedError

    def _embed(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """Plain path: embed every patch, then overwrite masked ones. (B, 3, H, W) -> (B, H / p, W / p, C)."""
        x = self.patch_embed(image.to(self.mask_token.dtype))
        if mask is None:
            return x
        weight = reference.upsample_mask(mask, self.cell_side).unsqueeze(-1).to(x.dtype)
        return x * (1 - weight) + self.mask_token.view(-1) * weight

    def _embed_visible(self, image: Tensor, visible: Tensor, backend: str) -> Tensor:
        """Gathered path: embed the visible cells alone; the rest is the mask token. Same result as ``_embed``."""
        proj, norm = self.patch_embed.proj, self.patch_embed.norm
        assert proj.bias is not None
        weight, bias, eps = (None, None, 0.0) if isinstance(norm, nn.Identity) else (norm.weight, norm.bias, norm.eps)
        token = self.mask_token.view(-1)
        return ops.embed_visible(image, visible, proj.weight, proj.bias, weight, bias, eps, token, backend=backend)


def init_trunc_normal(module: nn.Module, cut: float = 2.0) -> None:
    """SimMIM's start for one module: Linear weights normal (std 0.02, cut at +-``cut``), biases 0, norms 1/0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-cut, b=cut)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
