"""The pre-training model: encoder, structured-knowledge encoder, relational guidance, heads and losses.

SG-MIM (arXiv 2409.02513), and SimMIM (2111.09886) with ``guidance="none"``. ``docs/method.md`` has the formulas.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgmim_fast import ops, reference
from sgmim_fast.config import Attention, Backend, ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.masking import CELL, mask_indices
from sgmim_fast.models.choices import Choices, make_encoder
from sgmim_fast.models.guidance import RelationalGuidance, token_index
from sgmim_fast.models.layers import PixelHead
from sgmim_fast.models.structure import StructureEncoder


class PretrainOutput(NamedTuple):
    """Scalar losses of one batch; ``structure_loss`` is None without guidance."""

    loss: Tensor
    image_loss: Tensor
    structure_loss: Tensor | None


@dataclass
class Pictures:
    """Full-size predictions for people to look at, float tensors in the units of the inputs."""

    image: Tensor
    """(B, 3, H, W): the image head everywhere; only masked cells enter the loss."""
    structure: Tensor | None
    """(B, c, H, W): the structure head everywhere; only visible cells enter the loss."""


class SGMIM(Choices):
    """Masked image modelling guided by a structure map.

    Build it with ``create_model``. Parameters carry the names of the authors' code.
    """

    def __init__(self, config: ModelConfig, backend: Backend = "auto", attention: Attention = "auto") -> None:
        super().__init__()
        self.config = config
        self.encoder = make_encoder(config)
        width, pixels = config.num_features, config.stride**2
        if config.guidance == "none":
            self.decoder = nn.Sequential(PixelHead(width, 3 * pixels))
        else:
            self.depth_encoder = StructureEncoder(config)
            self.fusion_blk_img = RelationalGuidance(config)
            self.img_decoder = nn.Sequential(PixelHead(width, 3 * pixels))
            self.dep_decoder = nn.Sequential(PixelHead(width, config.structure_channels * pixels))
        self.set_backend(backend)
        self.set_attention(attention)

    @property
    def image_head(self) -> nn.Sequential:
        return self.decoder if self.config.guidance == "none" else self.img_decoder

    def encode(self, image: Tensor, mask: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Encoder tokens (B, L, C).

        Args:
            image: (B, 3, H, W), ImageNet-normalised RGB.
            mask: (B, Gh, Gw) bool, True where the image is masked; None shows everything.
            visible: (B, V) int cell indices of the mask's visible cells, if the loader has made them.
        """
        self._check_image(image, mask)
        backend = ops.resolve_backend(self.backend, image)
        if mask is None or backend == "reference":
            return self.encoder(image, mask)
        return self.encoder(image, mask, mask_indices(mask)[1] if visible is None else visible, backend)

    def forward(
        self,
        image: Tensor,
        structure: Tensor | None,
        mask: Tensor,
        masked: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> PretrainOutput:
        """Losses of a batch.

        Args:
            image: (B, 3, H, W) float, ImageNet-normalised RGB.
            structure: (B, c, H, W) float, standardised; None or ignored with ``guidance="none"``.
            mask: (B, Gh, Gw) bool, True where the image cell is masked.
            masked: (B, K) int cell indices of the masked cells, ascending; made from ``mask`` if None, which
                waits for the device.
            visible: (B, Gh * Gw - K), likewise.
        """
        self._check_image(image, mask)
        self._check_structure(image, structure)
        if ops.resolve_backend(self.backend, image) == "reference":
            return self._plain(image, structure, mask, masked)
        if masked is None or visible is None:
            masked, visible = mask_indices(mask)
        return self._gathered(image, structure, mask, masked, visible)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, structure: Tensor | None, mask: Tensor) -> Pictures:
        """Full-size predictions of both heads, by the plain path; arguments as in ``forward``."""
        self._check_image(image, mask)
        self._check_structure(image, structure)
        z = self.encoder(image, mask)
        picture = self._pixels(z, self.image_head)
        if self.config.guidance == "none" or structure is None:
            return Pictures(picture, None)
        return Pictures(picture, self._pixels(self._guided(z, structure, mask), self.dep_decoder))

    # -- plain path

    def _plain(self, image: Tensor, structure: Tensor | None, mask: Tensor, masked: Tensor | None) -> PretrainOutput:
        z = self.encoder(image, mask)
        image_loss = reference.pixel_l1(self._pixels(z, self.image_head), self._image_target(image), mask)
        if self.config.guidance == "none" or structure is None:
            return PretrainOutput(image_loss, image_loss, None)
        prediction = self._pixels(self._guided(z, structure, mask, masked), self.dep_decoder)
        return self._total(image_loss, reference.pixel_l1(prediction, structure, ~mask))

    def _guided(self, z: Tensor, structure: Tensor, mask: Tensor, masked: Tensor | None = None) -> Tensor:
        s, _ = self.depth_encoder(structure.to(z.dtype), mask)
        shown = None
        if self.config.guidance == "relational-visible":
            shown = self._token_index(mask_indices(mask)[0] if masked is None else masked)
        return self.fusion_blk_img(z, s, context_index=shown, backend="reference")

    def _pixels(self, tokens: Tensor, head: nn.Sequential) -> Tensor:
        stride = self.config.stride
        rows, columns = self.config.hw[0] // stride, self.config.hw[1] // stride
        return F.pixel_shuffle(head(tokens.transpose(1, 2).unflatten(2, (rows, columns))), stride)

    # -- gathered path

    def _gathered(
        self, image: Tensor, structure: Tensor | None, mask: Tensor, masked: Tensor, visible: Tensor
    ) -> PretrainOutput:
        backend = ops.resolve_backend(self.backend, image)
        z = self.encoder(image, mask, visible, backend)
        masked_tokens, visible_tokens = self._token_index(masked), self._token_index(visible)
        prediction = self._cell_pixels(ops.gather_rows(z, masked_tokens, backend=backend), self.image_head)
        image_loss = ops.masked_l1(prediction, self._image_target(image), masked, backend=backend)
        if self.config.guidance == "none" or structure is None:
            return PretrainOutput(image_loss, image_loss, None)
        s, null = self.depth_encoder(structure.to(z.dtype), mask, masked, backend)
        asked = ops.gather_rows(z, visible_tokens, backend=backend)
        u = self.fusion_blk_img(asked, s, visible_tokens, masked_tokens, null, visible_tokens.shape[1], backend)
        prediction = self._cell_pixels(u, self.dep_decoder)
        return self._total(image_loss, ops.masked_l1(prediction, structure, visible, backend=backend))

    def _cell_pixels(self, tokens: Tensor, head: nn.Sequential) -> Tensor:
        """(B, K * t * t, C) -> (B, K, t, t, channels * s * s)."""
        side = CELL // self.config.stride
        out = head(tokens)
        return out.reshape(tokens.shape[0], -1, side, side, out.shape[-1])

    # -- both

    def _token_index(self, cells: Tensor) -> Tensor:
        return token_index(cells, self.config.grid[1], CELL // self.config.stride)

    def _total(self, image_loss: Tensor, structure_loss: Tensor) -> PretrainOutput:
        loss = image_loss + self.config.structure_loss_weight * structure_loss
        return PretrainOutput(loss, image_loss, structure_loss)

    def _image_target(self, image: Tensor) -> Tensor:
        window = self.config.normalize_target_window
        return image if window is None else reference.local_normalize(image, window)

    def _check_image(self, image: Tensor, mask: Tensor | None) -> None:
        if image.dim() != 4 or image.shape[1] != 3 or tuple(image.shape[2:]) != self.config.hw:
            raise UserError(f"image must be (B, 3, {self.config.hw[0]}, {self.config.hw[1]}); got {tuple(image.shape)}")
        if mask is not None and (mask.shape != (image.shape[0], *self.config.grid) or mask.dtype != torch.bool):
            want = (image.shape[0], *self.config.grid)
            raise UserError(f"mask must be bool {want}, one entry a cell; got {mask.dtype} {tuple(mask.shape)}")

    def _check_structure(self, image: Tensor, structure: Tensor | None) -> None:
        if self.config.guidance == "none":
            return
        want = (image.shape[0], self.config.structure_channels, *self.config.hw)
        if structure is None or tuple(structure.shape) != want:
            got = None if structure is None else tuple(structure.shape)
            raise UserError(f"structure must be {want} for guidance {self.config.guidance!r}; got {got}")
