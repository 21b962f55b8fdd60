"""Building blocks that the encoders, the structure encoder and the guidance block share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgmim_fast import ops, reference
from sgmim_fast.masking import CELL


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


class PatchEmbed(nn.Module):
    """Patches of (B, C, H, W) to channels-last tokens (B, H / p, W / p, E): convolution, then an optional norm."""

    def __init__(self, channels: int, width: int, patch: int, norm_eps: float | None = 1e-5) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.to(self.proj.weight.dtype)).permute(0, 2, 3, 1))


def merge_neighbours(x: Tensor) -> Tensor:
    """(..., H, W, C) -> (..., H / 2, W / 2, 4 C), the 2x2 neighbours in the order (0,0), (1,0), (0,1), (1,1)."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    # (h, row, w, column, c) -> (h, w, column, row, c): the row parity varies fastest
    return x.movedim(-4, -2).flatten(-3)


class MaskedEmbed(nn.Module):
    """What every encoder begins with: patch embedding, and one learned token in place of masked cells."""

    def __init__(self, width: int, patch: int, norm_eps: float | None) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(3, width, patch, norm_eps)
        self.cell_side = CELL // patch  # tokens

    def embed(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """Plain path: embed every patch, then overwrite masked ones. (B, 3, H, W) -> (B, H / p, W / p, C)."""
        x = self.patch_embed(image)
        if mask is None:
            return x
        weight = reference.upsample_mask(mask, self.cell_side).unsqueeze(-1).to(x.dtype)
        return x * (1 - weight) + self.mask_token.view(-1) * weight

    def embed_visible(self, image: Tensor, visible: Tensor, backend: str) -> Tensor:
        """Gathered path: embed the visible cells alone; the rest is the mask token. Same result as ``embed``."""
        batch, count = visible.shape
        rows, columns = image.shape[2] // CELL, image.shape[3] // CELL
        cells = ops.gather_cells(image, visible, backend=backend).flatten(0, 1)
        values = self.patch_embed(cells).reshape(batch, count, -1)
        fill = self.mask_token.view(-1).repeat(self.cell_side**2)
        x = ops.scatter_rows(values, visible, fill, rows * columns, backend=backend)
        x = x.reshape(batch, rows, columns, self.cell_side, self.cell_side, -1).transpose(2, 3)
        return x.reshape(batch, rows * self.cell_side, columns * self.cell_side, -1)


def init_trunc_normal(module: nn.Module, cut: float = 2.0) -> None:
    """SimMIM's start for one module: Linear weights truncated normal (std 0.02, cut at +-``cut``), biases 0, norms 1/0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-cut, b=cut)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
