"""Shape of a model. Sources: SG-MIM (arXiv 2409.02513), SimMIM (2111.09886), Swin V2 (2111.09883)."""

from dataclasses import dataclass
from typing import Literal

from sgmim_fast.config.checks import check_widths, one_of, require
from sgmim_fast.masking import CELL

Encoder = Literal["swin", "swinv2", "vit"]
Guidance = Literal["relational", "relational-visible", "none"]
GUIDANCE_HEADS = 8  # fixed by the method


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of an SG-MIM (or, with ``guidance="none"``, a SimMIM) pre-training model.

    Raises:
        UserError: for any combination that cannot be built; the message names the field.
    """

    encoder: Encoder = "swin"
    """Swin, Swin V2 (cosine attention) or ViT (shared relative position bias)."""
    image_size: int | tuple[int, int] = 192
    """Side, or (height, width); multiples of 32."""
    patch_size: int = None  # type: ignore[assignment]
    """Pixels a patch side; unless given, 4 for Swin and 16 for ViT."""
    embed_dim: int = 128
    """Channels of the first stage (Swin) or of every block (ViT)."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks a stage; one entry for ViT."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads a stage; one entry for ViT."""
    window_size: int = 6
    """Tokens a window side (Swin); reduced where it covers the whole map. ViT ignores it."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; earlier ones less, linearly."""
    layer_scale_init: float | None = None
    """Initial layer scale of ViT blocks; None for none. Swin has none."""
    norm_eps: float = None  # type: ignore[assignment]
    """Epsilon of the encoder's LayerNorms; unless given, 1e-5 for Swin and 1e-6 for ViT."""
    guidance: Guidance = "relational"
    """How image features ask structure features; "none" is SimMIM, "relational-visible" leaves hidden context out."""
    structure_channels: int = 1
    """Channels of the structure map: 1 for depth, 3 for surface normals."""
    structure_loss_weight: float = 1.0
    """Weight of the structure loss beside the image loss."""
    normalize_target_window: int | None = None
    """Side of the window whose mean and variance normalise the image target; None for plain pixels."""

    def __post_init__(self) -> None:
        one_of("encoder", self.encoder, ("swin", "swinv2", "vit"))
        one_of("guidance", self.guidance, ("relational", "relational-visible", "none"))
        vit = self.encoder == "vit"
        for name in ("depths", "num_heads"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, int) else tuple(value))
        if self.patch_size is None:
            object.__setattr__(self, "patch_size", 16 if vit else 4)
        if self.norm_eps is None:
            object.__setattr__(self, "norm_eps", 1e-6 if vit else 1e-5)
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        self._check_sizes()
        self._check_widths()
        require(0.0 <= self.drop_path_rate < 1.0, f"drop_path_rate {self.drop_path_rate} must be in [0, 1)")
        require(self.layer_scale_init is None or vit, "layer_scale_init is for the ViT encoder; leave it out for Swin")
        require(self.norm_eps > 0, f"norm_eps {self.norm_eps} must be positive")
        require(self.structure_channels >= 1, f"structure_channels {self.structure_channels} must be 1 or more")
        require(self.structure_loss_weight >= 0, f"structure_loss_weight {self.structure_loss_weight} is negative")
        window = self.normalize_target_window
        require(
            window is None or (window >= 3 and window % 2 == 1),
            f"normalize_target_window {window} must be odd and 3 or more (SimMIM uses 47)",
        )

    def _check_sizes(self) -> None:
        stages = len(self.depths)
        require(self.encoder != "vit" or stages == 1, f"depths {self.depths} must have one entry for ViT")
        require(
            len(self.hw) == 2 and all(side > 0 and side % CELL == 0 for side in self.hw),
            f"image_size {self.image_size} must be a multiple of {CELL} on each side",
        )
        require(
            self.grid[0] * self.grid[1] >= 2,
            f"image_size {self.image_size} holds one {CELL}-pixel cell; masking needs at least two",
        )
        require(
            self.stride in (4, 8, 16, 32),
            f"patch_size {self.patch_size} with {len(self.depths)} stage(s) gives an encoder stride of "
            f"{self.stride}; it must be 4, 8, 16 or 32 to fit the {CELL}-pixel mask cells",
        )
        require(self.window_size >= 1, f"window_size {self.window_size} must be 1 or more")

    def _check_widths(self) -> None:
        check_widths(self.embed_dim, self.depths, self.num_heads)
        if self.guidance != "none":
            require(
                self.num_features % GUIDANCE_HEADS == 0,
                f"embed_dim {self.embed_dim} gives {self.num_features} encoder channels; guidance needs a "
                f"multiple of {GUIDANCE_HEADS}",
            )
            require(
                self.num_features % 2**self.structure_merges == 0,
                f"embed_dim {self.embed_dim} gives {self.num_features} encoder channels, which "
                f"{self.structure_merges} patch mergings of the structure encoder cannot reach by doubling",
            )

    @property
    def hw(self) -> tuple[int, int]:
        """Image (height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Mask cells (rows, columns)."""
        return self.hw[0] // CELL, self.hw[1] // CELL

    @property
    def stride(self) -> int:
        """Pixels an encoder token covers a side: 32 for four-stage Swin, the patch size for ViT."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def num_features(self) -> int:
        """Channels of the encoder's tokens."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def structure_merges(self) -> int:
        """Patch-merging layers of the structure encoder: log2(stride / 4)."""
        return self.stride.bit_length() - 3
