"""Structured-knowledge encoder: patch embedding and patch mergings, no attention (SG-MIM, arXiv 2409.02513)."""

from torch import Tensor, nn

from sgmim_fast import ops, reference
from sgmim_fast.config import ModelConfig
from sgmim_fast.masking import CELL
from sgmim_fast.models.layers import PatchEmbed
from sgmim_fast.models.swin import PatchMerging

PATCH = 4


class StructureEncoder(nn.Module):
    """Structure map (B, c, H, W) -> tokens of the encoder's stride and width, zero before merging where hidden.

    Cells are a multiple of every merging's reach, so each can be encoded alone: ``encode_cells`` gives for
    given cells the very tokens that ``forward`` has at their places, and ``null_token`` the one of hidden cells.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        merges = config.structure_merges
        width = config.num_features // 2**merges
        self.merges = merges
        for number in range(merges):
            self.add_module(f"patch_merging_{number + 1}", PatchMerging(width * 2**number))
        self.depth_patch_embed = PatchEmbed(config.structure_channels, width, PATCH)

    def _merge(self, x: Tensor) -> Tensor:
        for number in range(self.merges):
            x = getattr(self, f"patch_merging_{number + 1}")(x)
        return x

    def forward(self, structure: Tensor, given: Tensor) -> Tensor:
        """Plain path. ``given`` (B, Gh, Gw) bool marks the cells whose map is shown. Returns (B, L, C)."""
        x = self.depth_patch_embed(structure)
        x = x * reference.upsample_mask(given, CELL // PATCH).unsqueeze(-1).to(x.dtype)
        return self._merge(x).flatten(1, 2)

    def encode_cells(self, structure: Tensor, index: Tensor, backend: str) -> Tensor:
        """Gathered path: tokens of the cells ``index`` (B, K) alone -> (B, K * t * t, C), cell after cell."""
        cells = ops.gather_cells(structure, index, backend=backend).flatten(0, 1)
        x = self._merge(self.depth_patch_embed(cells))
        return x.reshape(index.shape[0], -1, x.shape[-1])

    def null_token(self) -> Tensor:
        """The token (C,) of every hidden cell: the mergings applied to zeros."""
        weight, side = self.depth_patch_embed.proj.weight, 2**self.merges
        zeros = weight.new_zeros(1, side, side, self.depth_patch_embed.proj.out_channels)
        return self._merge(zeros).flatten()
