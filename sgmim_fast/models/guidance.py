"""Relational guidance: one light cross-attention block from image features to structure features.

Source: SG-MIM (arXiv 2409.02513); ``relational-visible`` is a variant of its authors' later code.
"""

import torch
from torch import Tensor, nn

from sgmim_fast import ops, reference
from sgmim_fast.config import GUIDANCE_HEADS, ModelConfig
from sgmim_fast.models.layers import Mlp


class CrossAttention(nn.Module):
    """Queries from (B, Nq, C), keys and values from (B, Nk, C); q, k, v without bias."""

    backend = "auto"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, null: Tensor | None = None, count: int = 0) -> Tensor:
        """``null`` (C,) stands for ``count`` further context tokens that are all equal to it."""
        q, k, v = (_heads(part) for part in (self.q(x), self.k(context), self.v(context)))
        null_k = null_v = None
        if null is not None:
            null_k, null_v = _heads(self.k(null)), _heads(self.v(null))
        return self.proj(ops.guidance_attention(q, k, v, null_k, null_v, count, backend=self.backend))


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (GUIDANCE_HEADS, -1))


class RelationalGuidance(nn.Module):
    """One pre-norm cross-attention block: image tokens z ask, structure tokens s answer.

    ``relational``: hidden context tokens take part, all equal. ``relational-visible``: they are left out, and one
    learned position table is added to queries and context.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.num_features
        self.visible_only = config.guidance == "relational-visible"
        self.cross_attn = CrossAttention(width)
        self.context_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.out_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        if self.visible_only:
            tokens = (config.hw[0] // config.stride) * (config.hw[1] // config.stride)
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, z: Tensor, s: Tensor, given: Tensor) -> Tensor:
        """Plain path: z (B, L, C), s (B, L, C), ``given`` (B, L) bool marks the context shown -> u (B, L, C).

        In ``relational-visible`` the samples must show equal numbers of tokens.
        """
        if self.visible_only:
            z, s = z + self.absolute_pos_embed, s + self.absolute_pos_embed
            s = s[given].reshape(s.shape[0], -1, s.shape[-1])
        return self._finish(z, self.cross_attn(self.query_norm(z), self.context_norm(s)))

    def forward_gathered(
        self, z: Tensor, s: Tensor, null: Tensor, hidden: int, query_index: Tensor, context_index: Tensor, backend: str
    ) -> Tensor:
        """Gathered path: queries and context are the tokens that ``query_index`` and ``context_index`` name.

        Args:
            z: (B, Nq, C).
            s: (B, Nk, C).
            null: (C,), the token of each of the ``hidden`` tokens that are not in ``s``.
            query_index: (B, Nq) token numbers of ``z``.
            context_index: (B, Nk) token numbers of ``s``.
            backend: implementation of the position table's gather.

        Returns:
            u (B, Nq, C).
        """
        if self.visible_only:
            table = self.absolute_pos_embed.expand(z.shape[0], -1, -1)
            z = z + ops.gather_rows(table, query_index, backend=backend)
            s = s + ops.gather_rows(table, context_index, backend=backend)
            return self._finish(z, self.cross_attn(self.query_norm(z), self.context_norm(s)))
        attended = self.cross_attn(self.query_norm(z), self.context_norm(s), self.context_norm(null), hidden)
        return self._finish(z, attended)

    def _finish(self, z: Tensor, attended: Tensor) -> Tensor:
        u = z + attended
        return u + self.mlp(self.out_norm(u))


def token_index(cells: Tensor, columns: int, side: int) -> Tensor:
    """Token numbers of the cells (B, K) in a map of ``columns`` cells a row and side x side tokens a cell.

    Returns (B, K * side * side), cell after cell, rows before columns; the dtype of ``cells``.
    """
    if side == 1:
        return cells
    offset = torch.arange(side, device=cells.device, dtype=cells.dtype)
    row = (cells // columns * side).unsqueeze(-1) + offset  # (B, K, side)
    column = (cells % columns * side).unsqueeze(-1) + offset
    return (row.unsqueeze(-1) * (columns * side) + column.unsqueeze(-2)).flatten(1)


def token_mask(mask: Tensor, side: int) -> Tensor:
    """Cell mask (B, Gh, Gw) -> token mask (B, L), row-major."""
    return reference.upsample_mask(mask, side).flatten(1)
