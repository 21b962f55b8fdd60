"""The outside peer: timm's own encoders in SimMIM's wrapper, with the weights of ours.

A mask token in place of masked patches, the encoder, a 1x1 convolution to pixels, pixel shuffle, and the mean absolute
error over masked pixels: what SimMIM (arXiv 2111.09886) computes, written as its users write it.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgmim_fast import reference
from sgmim_fast.config import ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.masking import CELL
from sgmim_fast.models.sgmim import SGMIM, PretrainOutput
from sgmim_fast.weights import tensors_of


class TimmSimMIM(nn.Module):
    """SimMIM around timm's SwinTransformer, SwinTransformerV2 or Beit.

    Args:
        model: whose weights, type and device it takes.

    Raises:
        UserError: if timm is missing, or cannot express the model.
    """

    def __init__(self, model: SGMIM) -> None:
        super().__init__()
        config = model.config
        if config.guidance != "none":
            raise UserError(f"timm's encoders have no guidance {config.guidance!r}; compare them with a simmim_* model")
        if config.normalize_target_window is not None:
            raise UserError("the timm arm has plain pixels for a target; leave normalize_target_window out")
        weight = model.encoder.patch_embed.proj.weight
        self.config = config
        self.encoder = _encoder(config)
        self.encoder.load_state_dict(tensors_of(model, "timm"))
        self.mask_token = nn.Parameter(model.encoder.mask_token.detach().clone())  # type: ignore[union-attr]
        head = model.image_head[0]
        self.decoder = nn.Conv2d(config.num_features, 3 * config.stride**2, 1)
        self.decoder.load_state_dict(head.state_dict())
        self.to(weight.device, weight.dtype)

    def forward(
        self, image: Tensor, structure: Tensor | None, mask: Tensor, masked: Tensor, visible: Tensor
    ) -> PretrainOutput:
        """As ``SGMIM.forward``; only image and mask are of use here."""
        tokens = self._encode(image.to(self.mask_token.dtype), mask)
        prediction = F.pixel_shuffle(self.decoder(tokens), self.config.stride)
        loss = reference.pixel_l1(prediction, image, mask)
        return PretrainOutput(loss, loss, None)

    def _encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H / stride, W / stride)."""
        config, encoder = self.config, self.encoder
        weight = reference.upsample_mask(mask, CELL // config.patch_size).unsqueeze(-1).to(image.dtype)
        x = encoder.patch_embed(image)
        if config.encoder != "vit":
            x = x * (1 - weight) + self.mask_token * weight
            return encoder.norm(encoder.layers(x)).permute(0, 3, 1, 2)
        weight = weight.flatten(1, 2)
        x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat((encoder.cls_token.expand(len(x), -1, -1), x), 1)
        bias = encoder.rel_pos_bias()
        for block in encoder.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        rows, columns = encoder.patch_embed.grid_size
        return encoder.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))


def _encoder(config: ModelConfig) -> Any:
    """timm's class of the shape of ``config``, without a classifier."""
    try:
        from timm.models.beit import Beit
        from timm.models.swin_transformer import SwinTransformer
        from timm.models.swin_transformer_v2 import SwinTransformerV2
    except ImportError as error:
        raise UserError(f"timm cannot be imported ({error}); install it, or leave its arm out") from error
    shape: dict[str, Any] = {
        "img_size": config.hw,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "num_classes": 0,
        "global_pool": "",
        "drop_path_rate": config.drop_path_rate,
        "norm_layer": partial(nn.LayerNorm, eps=config.norm_eps),
    }
    if config.encoder == "vit":
        return Beit(
            **shape,
            depth=config.depths[0],
            num_heads=config.num_heads[0],
            init_values=config.layer_scale_init,
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
        )
    shape |= {"depths": config.depths, "num_heads": config.num_heads, "window_size": config.window_size}
    return SwinTransformer(**shape) if config.encoder == "swin" else SwinTransformerV2(**shape)
