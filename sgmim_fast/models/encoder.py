"""What the encoders share: they begin with patches, give maps, and stand masked cells in for in pre-training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast import ops, reference
from sgmim_fast.config import BackboneConfig, ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.masking import CELL
from sgmim_fast.models.layers import BlockStage, PatchEmbed


class ImageEncoder(nn.Module):
    """An encoder that begins with patch embedding.

    Args:
        config: a ``ModelConfig`` for pre-training, with one learned token in place of masked cells; a
            ``BackboneConfig`` to put it to use, without.
        norm_eps: epsilon of a norm after the patch embedding; None for none.
    """

    def __init__(self, config: ModelConfig | BackboneConfig, norm_eps: float | None) -> None:
        super().__init__()
        self.config = config
        self.shape = encoder_shape(config)
        width, patch = config.embed_dim, config.patch_size
        masked = isinstance(config, ModelConfig)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if masked else None
        self.patch_embed = PatchEmbed(3, width, patch, norm_eps)

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

    def levels(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """What the stages or blocks ``wanted`` give, without norm, in the order they run; no later one does.

        Embedded tokens (B, H / p, W / p, E) -> maps (B, H_i, W_i, C_i) of Swin, tokens (B, 1 + L, C) of ViT.
        """
        raise NotImplementedError

    def maps(self, x: Tensor) -> list[Tensor]:
        """Embedded tokens (B, H / p, W / p, E) -> maps (B, H_i, W_i, C_i) as the configuration names them.

        The last of them has been through the encoder's own norm, if that takes part.
        """
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, H / p, W / p, E) -> the last map's (B, L, C)."""
        return self.maps(x)[-1].flatten(1, 2)

    def maps_of(self, image: Tensor) -> list[Tensor]:
        """``maps`` of (B, 3, H, W), any H and W; nothing is masked."""
        return self.maps(self._embed(image, None))

    def _embed(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """Plain path: embed every patch, then overwrite masked ones. (B, 3, H, W) -> (B, H / p, W / p, C)."""
        check_image(image, self.patch_embed.proj.in_channels)
        x = self.patch_embed(image.to(self.patch_embed.proj.weight.dtype))
        if mask is None:
            return x
        assert self.mask_token is not None
        weight = reference.upsample_mask(mask, CELL // self.config.patch_size).unsqueeze(-1).to(x.dtype)
        return x * (1 - weight) + self.mask_token.view(-1) * weight

    def _embed_visible(self, image: Tensor, visible: Tensor, backend: str) -> Tensor:
        """Gathered path: embed the visible cells alone; the rest is the mask token. Same result as ``_embed``."""
        proj, norm = self.patch_embed.proj, self.patch_embed.norm
        assert proj.bias is not None
        assert self.mask_token is not None
        weight, bias, eps = (None, None, 0.0) if isinstance(norm, nn.Identity) else (norm.weight, norm.bias, norm.eps)
        token = self.mask_token.view(-1)
        return ops.embed_visible(image, visible, proj.weight, proj.bias, weight, bias, eps, token, backend=backend)


def check_image(image: Any, channels: int) -> None:
    """Refuses what is no batch of images, and what cannot be normalised.

    Raises:
        UserError: which says what it must be.
    """
    if not isinstance(image, Tensor):
        raise UserError(f"image must be a tensor (B, {channels}, H, W); got {type(image).__name__}")
    shape = tuple(image.shape)
    if len(shape) != 4 or shape[1] != channels:
        raise UserError(f"image must be (B, {channels}, H, W); got {shape}")
    if not image.is_floating_point():
        kind = str(image.dtype).removeprefix("torch.")
        raise UserError(f"image is {kind}; it must be floating-point and normalised, by ImageNet's mean and deviation")
    if 0 in shape:
        raise UserError(f"image {shape} is empty; each of B, H and W must be 1 or more")


def encoder_shape(config: ModelConfig | BackboneConfig) -> BackboneConfig:
    """The shape of an encoder; that of pre-training gives its last map alone, normed."""
    if isinstance(config, BackboneConfig):
        return config
    last = (config.depths[0] if config.encoder == "vit" else len(config.depths)) - 1
    return BackboneConfig.from_pretraining(config, out_indices=(last,), norm="last", pyramid=False)
