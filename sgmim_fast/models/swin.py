"""Swin (arXiv 2103.14030) and Swin V2 (2111.09883) encoders, for pre-training and for use on whole images.

Parameter names and shapes are those of the official code, so its checkpoints load as they are.
Token maps are channels-last: (B, H, W, C).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.config import BackboneConfig, ModelConfig
from sgmim_fast.models.encoder import ImageEncoder
from sgmim_fast.models.layers import (
    BlockStage,
    Dispatched,
    DropPath,
    Mlp,
    QkvLinear,
    init_trunc_normal,
    merge_neighbours,
)

MAX_LOGIT_SCALE = math.log(100.0)


class _WindowAttention(Dispatched):
    """What both versions share: padding to whole windows, the attention itself, the output projection.

    A map whose shorter side one window covers is not shifted, whatever ``shift`` says, unless ``shift_covered``; one
    that is smaller than a window is completed to one, like any other.
    """

    shift_covered = False

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.proj = nn.Linear(width, width)

    def project_qkv(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def bias_table(self) -> Tensor:
        raise NotImplementedError

    def scale(self) -> Tensor | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        shift = self.shift if self.shift_covered or min(height, width) > self.window else 0
        # As in Swin's detection and segmentation code: zero tokens complete the last windows.
        down, right = -height % self.window, -width % self.window
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        qkv = self.project_qkv(x).unflatten(-1, (3, self.heads, channels // self.heads))
        table = self.bias_table().to(qkv.dtype)
        choice = {"backend": self.backend, "attention": self.attention}
        out = ops.window_attention(qkv, table, self.window, shift, self.scale(), **choice)
        return self.proj(out[:, :height, :width])


class WindowAttention(_WindowAttention):
    """Swin: scaled dot products plus a learned bias by relative position."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__(width, heads, window, shift)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def project_qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def bias_table(self) -> Tensor:
        return self.relative_position_bias_table


class CosineWindowAttention(_WindowAttention):
    """Swin V2: cosine similarity with a learned scale a head, bias from a small MLP on log-spaced offsets.

    Offsets are measured by the window of pre-training, so that another window asks the same MLP for further ones.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int, pretrained_window: int) -> None:
        super().__init__(width, heads, window, shift)
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.qkv = QkvLinear(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def project_qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x, self.q_bias, self.v_bias)

    def bias_table(self) -> Tensor:
        """16 * sigmoid(mlp(offsets)): ((2 * window - 1) ** 2, heads)."""
        # In float32 whatever the weights are: the official code rounds these constants so.
        offset = torch.arange(1 - self.window, self.window, device=self.q_bias.device, dtype=torch.float32)
        offset = offset / max(self.pretrained_window - 1, 1) * 8
        offset = torch.sign(offset) * torch.log2(offset.abs() + 1) / math.log2(8)
        pairs = torch.stack(torch.meshgrid(offset, offset, indexing="ij"), -1).flatten(0, 1)
        return 16 * torch.sigmoid(self.cpb_mlp(pairs.to(self.q_bias.dtype)))

    def scale(self) -> Tensor:
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().view(-1)


class SwinBlock(nn.Module):
    """Window attention and MLP, each with a residual; norms before them (Swin) or after them (Swin V2)."""

    def __init__(self, config: BackboneConfig, stage: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        width, heads, eps = config.embed_dim * 2**stage, config.num_heads[stage], config.norm_eps
        window, _, pretrained_window = config.window_of(stage)
        shift = window // 2 if shifted else 0
        self.post_norm = config.encoder == "swinv2"
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = (
            CosineWindowAttention(width, heads, window, shift, pretrained_window)
            if self.post_norm
            else WindowAttention(width, heads, window, shift)
        )
        self.attn.shift_covered = config.shift_covered
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.drop_path(self.norm1(self.attn(x)))
            return x + self.drop_path(self.norm2(self.mlp(x)))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """(..., H, W, C) -> (..., H / 2, W / 2, 2 C); the norm comes before the reduction, in Swin V2 after it."""

    def __init__(self, width: int, norm_eps: float = 1e-5, post_norm: bool = False) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width if post_norm else 4 * width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = merge_neighbours(x)
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))


class SwinStage(BlockStage):
    """Blocks of one resolution, every second one shifted; it also holds the merging to the next."""

    def __init__(self, config: BackboneConfig, stage: int, drop_paths: list[float], last: bool) -> None:
        super().__init__()
        self.draws = max(drop_paths) > 0.0
        use_shift = config.window_of(stage)[1]
        self.blocks = nn.ModuleList(
            SwinBlock(config, stage, use_shift and number % 2 == 1, rate) for number, rate in enumerate(drop_paths)
        )
        width = config.embed_dim * 2**stage
        self.downsample = None if last else PatchMerging(width, config.norm_eps, config.encoder == "swinv2")

    def forward(self, x: Tensor) -> Tensor:
        """The blocks alone: (B, H, W, C) -> (B, H, W, C)."""
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


def _silence_post_norms(module: nn.Module) -> None:
    """Swin V2's residual branches start at zero."""
    if isinstance(module, SwinBlock) and module.post_norm:
        nn.init.zeros_(module.norm1.weight)
        nn.init.zeros_(module.norm2.weight)


class SwinEncoder(ImageEncoder):
    """Swin or Swin V2, by ``config.encoder``."""

    def __init__(self, config: ModelConfig | BackboneConfig) -> None:
        super().__init__(config, config.norm_eps)
        shape = self.shape
        rates = iter(torch.linspace(0, shape.drop_path_rate, sum(shape.depths), device="cpu").tolist())
        last = shape.out_indices[-1]
        self.layers = nn.ModuleList(
            SwinStage(shape, stage, [next(rates) for _ in range(depth)], stage == last)
            for stage, depth in enumerate(shape.depths[: last + 1])
        )
        self.norm = nn.LayerNorm(shape.num_features, eps=shape.norm_eps) if shape.has_own_norm else None
        self.apply(init_trunc_normal)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.apply(_silence_post_norms)

    def block_stages(self) -> list[BlockStage]:
        return [layer for layer in self.layers if isinstance(layer, BlockStage)]

    def levels(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        found = []
        last = max(wanted)
        for stage, layer in zip(range(last + 1), self.layers, strict=False):
            x = layer(x)
            found += [x] * (stage in wanted)
            if stage < last:
                x = layer.downsample(x)  # type: ignore[operator]
        return found

    def maps(self, x: Tensor) -> list[Tensor]:
        found = self.levels(x, self.shape.out_indices)
        if self.norm is not None:
            found[-1] = self.norm(found[-1])
        return found
