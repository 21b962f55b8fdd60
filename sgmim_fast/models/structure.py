"""Structured-knowledge encoder: patch embedding and patch mergings, no attention (SG-MIM, arXiv 2409.02513)."""

import torch
from torch import Tensor, nn

from sgmim_fast import ops, reference
from sgmim_fast.config import ModelConfig
from sgmim_fast.masking import CELL
from sgmim_fast.models.layers import PatchEmbed
from sgmim_fast.models.swin import PatchMerging

PATCH = 4


class StructureEncoder(nn.Module):
    """Structure map (B, c, H, W) -> tokens of the encoder's stride and width, zero before merging where hidden.

    A mask cell is a multiple of every merging's reach, so cells can be encoded one by one, and all hidden
    cells end as one and the same token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        merges = config.structure_merges
        self.merges = merges
        self.width = config.num_features // 2**merges
        for number in range(merges):
            self.add_module(f"patch_merging_{number + 1}", PatchMerging(self.width * 2**number))
        self.depth_patch_embed = PatchEmbed(config.structure_channels, self.width, PATCH)

    def forward(
        self, structure: Tensor, given: Tensor, index: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens, and in the gathered path the token of hidden cells.

        Args:
            structure: (B, c, H, W) in the dtype of the weights.
            given: (B, Gh, Gw) bool, True where the map is shown.
            index: (B, K) int indices of the cells shown. With it (gathered path) only those are encoded:
                (B, K * t * t, C), cell after cell, and the hidden cells' token (C,). Without it (plain path)
                all: (B, L, C), and None.
            backend: implementation of the gather.
        """
        if index is None:
            x = self.depth_patch_embed(structure)
            x = x * reference.upsample_mask(given, CELL // PATCH).unsqueeze(-1).to(x.dtype)
            return self._merge(x).flatten(1, 2), None
        cells = ops.gather_cells(structure, index, backend=backend).flatten(0, 1)
        x = self.depth_patch_embed(cells)
        # One more cell, of zeros, rides along: a pass of its own would compute every weight's gradient twice.
        x = self._merge(torch.cat((x, x.new_zeros(1, *x.shape[1:]))))
        x, null = x.split((x.shape[0] - 1, 1))
        return x.reshape(index.shape[0], -1, x.shape[-1]), null[0, 0, 0]

    def _merge(self, x: Tensor) -> Tensor:
        for number in range(self.merges):
            x = getattr(self, f"patch_merging_{number + 1}")(x)
        return x
