"""Relational guidance: one light cross-attention block from image features to structure features.

Source: SG-MIM (arXiv 2409.02513); ``relational-visible`` is a variant of its authors' later code.
"""

import torch
from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.config import GUIDANCE_HEADS, ModelConfig
from sgmim_fast.models.layers import Dispatched, Mlp


class CrossAttention(Dispatched):
    """Queries from (B, Nq, C), keys and values from (B, Nk, C); q, k, v without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, null: bool = False, count: int = 0) -> Tensor:
        """Attend from x (B, Nq, C).

        Args:
            x: normalised queries.
            context: (rows, C) normalised context: Nk tokens of each sample in turn and, with ``null``, one row more
                that stands for ``count`` further tokens of every sample, all equal to it.
            null: whether that row is there.
            count: how many tokens it stands for.

        Returns:
            (B, Nq, C).
        """
        q, k, v = _heads(self.q(x)), _heads(self.k(context)), _heads(self.v(context))
        null_k = null_v = None
        if null:
            (k, null_k), (v, null_v) = (part.split((len(part) - 1, 1)) for part in (k, v))
            null_k, null_v = null_k[0], null_v[0]
        k, v = (part.unflatten(0, (len(x), -1)) for part in (k, v))
        choice = {"backend": self.backend, "attention": self.attention}
        return self.proj(ops.guidance_attention(q, k, v, null_k, null_v, count, **choice))


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

    def forward(
        self,
        z: Tensor,
        s: Tensor,
        query_index: Tensor | None = None,
        context_index: Tensor | None = None,
        null: Tensor | None = None,
        hidden: int = 0,
        backend: str = "auto",
    ) -> Tensor:
        """Guided features u of the queries.

        Args:
            z: (B, Nq, C) encoder tokens: those that ``query_index`` names, or all L.
            s: (B, Nk, C) structure tokens: those that ``context_index`` names, or all L.
            query_index: (B, Nq) int token numbers of ``z``; None for all.
            context_index: (B, Nk) int token numbers of the tokens shown; ``relational-visible`` needs it.
            null: (C,) the token of each of the ``hidden`` tokens that are not in ``s``; unused by
                ``relational-visible``.
            hidden: how many tokens ``null`` stands for.
            backend: implementation of the gathers.

        Returns:
            (B, Nq, C).
        """
        if self.visible_only:
            assert context_index is not None
            table = self.absolute_pos_embed.to(z.dtype).expand(z.shape[0], -1, -1)
            z = z + (table if query_index is None else ops.gather_rows(table, query_index, backend=backend))
            if s.shape[1] != context_index.shape[1]:
                s = ops.gather_rows(s, context_index, backend=backend)
            s = s + ops.gather_rows(table, context_index, backend=backend)
            null, hidden = None, 0
        context = s.flatten(0, 1) if null is None else torch.cat((s.flatten(0, 1), null[None]))
        u = z + self.cross_attn(self.query_norm(z), self.context_norm(context), null is not None, hidden)
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
