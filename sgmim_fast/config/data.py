"""Where the pairs are, and how they are read."""

from dataclasses import dataclass
from typing import Literal, get_args

from sgmim_fast.config.checks import one_of, require
from sgmim_fast.masking import masked_cell_count

Loader = Literal["auto", "torch", "dali"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs are, and how one is cropped and masked."""

    path: str = ""
    """Folder with images/ and structure/ paired by file stem, or a list file of pairs."""
    mask_ratio: float = 0.6
    """Share of the 32-pixel cells that are masked, rounded up."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Share of the image's area that a random crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop."""
    flip: bool = True
    """Mirror half of the pairs left to right."""
    workers: int = 4
    """Loader processes a rank (torch; 0 loads in the training process) or decoding threads a rank (dali)."""
    loader: Loader = "auto"
    """Who decodes: PyTorch's DataLoader with Pillow ("torch"), NVIDIA "dali", or dali where it can ("auto")."""
    decode_on: Literal["auto", "cpu", "gpu"] = "auto"
    """Where dali decodes images and resizes: on the training's GPU if there is one ("auto"), "cpu" or "gpu"."""
    max_bad_share: float = 0.01
    """Share of the pairs that may turn out unreadable during a run; others stand in for them. 0 stops at the first."""
    shuffle_buffer: int = 0
    """With shards: samples that are mixed at a time, so that each shard is read in one go; 0 mixes all."""

    def __post_init__(self) -> None:
        masked_cell_count(1 << 20, self.mask_ratio)
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"data.crop_scale {self.crop_scale} must satisfy 0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, f"data.crop_ratio {self.crop_ratio} must satisfy 0 < low <= high")
        require(self.workers >= 0, f"data.workers {self.workers} must be 0 or more")
        one_of("data.loader", self.loader, get_args(Loader))
        one_of("data.decode_on", self.decode_on, ("auto", "cpu", "gpu"))
        require(0 <= self.max_bad_share < 1, f"data.max_bad_share {self.max_bad_share} must be in [0, 1)")
        require(self.shuffle_buffer >= 0, f"data.shuffle_buffer {self.shuffle_buffer} must be 0 or more")
