"""Vision transformer encoder of SimMIM: class token, one relative position bias shared by all blocks.

Parameter names and shapes are those of SimMIM's code (arXiv 2111.09886), which follows BEiT.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.config import BackboneConfig, ModelConfig
from sgmim_fast.models.encoder import ImageEncoder
from sgmim_fast.models.layers import BlockStage, Dispatched, DropPath, Mlp, QkvLinear, init_trunc_normal
from sgmim_fast.position_tables import resize_table


class Attention(Dispatched):
    """Global attention over the class token and a token map; the bias table comes from outside."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QkvLinear(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
        qkv = self.qkv(x, self.q_bias, self.v_bias).unflatten(-1, (3, self.heads, x.shape[-1] // self.heads))
        choice = {"backend": self.backend, "attention": self.attention}
        return self.proj(ops.class_token_attention(qkv, table.to(qkv.dtype), grid, **choice))


class Block(nn.Module):
    """Pre-norm attention and MLP with optional layer scale."""

    def __init__(self, config: BackboneConfig, drop_path: float) -> None:
        super().__init__()
        width, scale = config.embed_dim, config.layer_scale_init
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, config.num_heads[0])
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width)
        self.gamma_1 = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))
        self.gamma_2 = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
        branch = self.attn(self.norm1(x), table, grid)
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class SharedRelativePositionBias(nn.Module):
    """Hands out the one table, ((2 H - 1) (2 W - 1) + 3, heads), that all blocks add to their logits."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """The table for maps of ``grid`` (H, W); resized if it was made for others."""
        table = self.relative_position_bias_table
        return table if grid == self.grid else resize_table(table, self.grid, grid, "bicubic")


class ViTEncoder(ImageEncoder, BlockStage):
    """ViT whose class token is dropped at the end."""

    def __init__(self, config: ModelConfig | BackboneConfig) -> None:
        super().__init__(config, norm_eps=None)
        shape = self.shape
        rows, columns = shape.stage_map(0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.embed_dim))
        self.rel_pos_bias = SharedRelativePositionBias((rows, columns), shape.num_heads[0])
        rates = torch.linspace(0, shape.drop_path_rate, shape.depths[0], device="cpu").tolist()
        self.draws = max(rates) > 0.0
        blocks = [Block(shape, rate) for rate in rates[: shape.out_indices[-1] + 1]]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(shape.embed_dim, eps=shape.norm_eps) if shape.has_own_norm else None
        self._initialize(blocks)

    def _initialize(self, blocks: list[Block]) -> None:
        """SimMIM's ViT cuts the normal at one standard deviation, and starts the bias table at zero."""
        self.apply(lambda module: init_trunc_normal(module, cut=0.02))
        for parameter in (self.patch_embed.proj.weight, self.cls_token, self.mask_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        with torch.no_grad():
            for number, block in enumerate(blocks, start=1):
                block.attn.proj.weight.div_(math.sqrt(2.0 * number))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))

    def block_stages(self) -> list[BlockStage]:
        return [self]

    def levels(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        grid = (x.shape[1], x.shape[2])
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x.flatten(1, 2)), 1)
        table = self.rel_pos_bias(grid)
        found = []
        for number, block in zip(range(max(wanted) + 1), self.blocks, strict=False):
            x = self.run_block(block, x, table, grid)
            found += [x] * wanted.count(number)
        return found

    def maps(self, x: Tensor) -> list[Tensor]:
        found = self.levels(x, self.shape.out_indices)
        if self.norm is not None:
            found[-1] = self.norm(found[-1])
        return [tokens[:, 1:].unflatten(1, (x.shape[1], x.shape[2])) for tokens in found]
