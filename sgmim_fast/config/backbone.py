"""Shape of a backbone: an encoder put to use on whole images of any size, that gives maps of several resolutions."""

from dataclasses import dataclass
from typing import Literal

from sgmim_fast.config.model import Encoder

OutputNorm = Literal["none", "last", "all"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape of a backbone without a head.

    Raises:
        UserError: for any combination that cannot be built; the message names the field.
    """

    encoder: Encoder = "swin"
    """Swin, Swin V2 (cosine attention) or ViT (shared relative position bias)."""
    image_size: int | tuple[int, int] | None = None
    """Side or (height, width) in pixels that the position tables are made for; other sizes are taken as well. For Swin,
    windows larger than a stage's map at this size are reduced to it; None reduces none. A ViT needs it."""
    patch_size: int = None  # type: ignore[assignment]
    """Pixels a patch side; unless given, 4 for Swin and 16 for ViT."""
    embed_dim: int = 128
    """Channels of the first stage (Swin) or of every block (ViT)."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks a stage; one entry for ViT."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads a stage; one entry for ViT."""
    window_size: int | tuple[int, ...] = 6
    """Tokens a window side (Swin), the same for all stages or one entry a stage. ViT ignores it."""
    use_shift: bool | tuple[bool, ...] = True
    """Whether every second block of a stage is shifted (Swin), for all stages or one entry a stage."""
    pretrained_window_size: int | tuple[int, ...] | None = None
    """Windows of pre-training, which Swin V2 measures its offsets by; None for those of ``window_size``."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; earlier ones less, linearly."""
    layer_scale_init: float | None = None
    """Initial layer scale of ViT blocks; None for none. Swin has none."""
    norm_eps: float = None  # type: ignore[assignment]
    """Epsilon of the LayerNorms; unless given, 1e-5 for Swin and 1e-6 for ViT."""
    out_indices: tuple[int, ...] = None  # type: ignore[assignment]
    """Stages (Swin) or blocks (ViT) whose maps are given, ascending; unless given, all stages, or four blocks."""
    norm: OutputNorm = "none"
    """LayerNorm on maps: "none" as timm gives them, "last" the encoder's own on the last map alone, "all" one each, of
    which the last is the encoder's own and the others are new."""
    pyramid: bool = True
    """Bring a ViT's four maps to strides 4, 8, 16 and 32 (a simple pyramid); False leaves all at the patch size."""
