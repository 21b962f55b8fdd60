"""Dense tasks: what a head predicts and is trained on, and how its predictions are tested.

Sources: MIM-Depth-Estimation (arXiv 2205.13543), DPT (2103.13413), UPerNet (1807.10221), settings of mmsegmentation.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from sgmim_fast.config.checks import one_of, require

DepthHead = Literal["glp", "dpt"]
DepthCrop = Literal["none", "garg", "eigen", "nyu"]
SegmentationMode = Literal["whole", "slide"]

IGNORED_LABEL = 255
"""The label of pixels that neither losses nor metrics count."""


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Monocular depth in metres."""

    head: DepthHead = "glp"
    """The decoder of MIM-Depth-Estimation on the last map ("glp"), or that of DPT on all four ("dpt")."""
    head_channels: int = 32
    """Channels of the transposed convolutions ("glp") or of the last hidden layer, an eighth of the others ("dpt")."""
    min_depth: float = 1e-3
    """Metres; nearer targets are not valid, and predictions are raised to it in metrics."""
    max_depth: float = 10.0
    """Metres; the largest depth that can be predicted, and targets from there on are not valid. 80 for KITTI."""
    silog_lambda: float = 0.5
    """Share of the squared mean error that the loss forgives: 0 is the root mean square, 1 ignores scale."""

    def __post_init__(self) -> None:
        one_of("depth.head", self.head, get_args(DepthHead))
        require(self.head_channels >= 1, f"depth.head_channels {self.head_channels} must be 1 or more")
        require(
            0 < self.min_depth < self.max_depth < float("inf"),
            f"depth.min_depth {self.min_depth} and depth.max_depth {self.max_depth} must be positive metres, "
            "the first below the second",
        )
        require(0 <= self.silog_lambda <= 1, f"depth.silog_lambda {self.silog_lambda} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class DepthEvalConfig:
    """How depth is tested."""

    flip: bool = True
    """Average the predictions of an image and of its mirror image."""
    windows: int = 1
    """Square windows of the image's height, evenly spread over its width, whose predictions are averaged where they
    overlap: 16 for KITTI, 2 for NYU-v2. 1 predicts the whole image at once."""
    crop: DepthCrop = "none"
    """Part of the image that counts: KITTI's by Garg or by Eigen, NYU-v2's by Eigen ("nyu"), or all of it."""

    def __post_init__(self) -> None:
        require(self.windows >= 1, f"evaluation.windows {self.windows} must be 1 or more")
        one_of("evaluation.crop", self.crop, get_args(DepthCrop))


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Semantic segmentation: UPerNet, and in training an auxiliary head on the third map."""

    classes: int = 150
    """Classes; labels are 0 to ``classes`` - 1, and 255 for ignored pixels."""
    head_channels: int = 512
    """Channels of UPerNet's decoder."""
    auxiliary_channels: int = 256
    """Channels of the auxiliary head's convolution."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss; 0 leaves that head out."""
    dropout: float = 0.1
    """Share of channels that is dropped before each classifier."""

    def __post_init__(self) -> None:
        require(
            1 <= self.classes <= IGNORED_LABEL,
            f"segmentation.classes {self.classes} must be 1 to {IGNORED_LABEL}; label {IGNORED_LABEL} is for ignored "
            "pixels",
        )
        for name in ("head_channels", "auxiliary_channels"):
            require(getattr(self, name) >= 1, f"segmentation.{name} {getattr(self, name)} must be 1 or more")
        require(self.auxiliary_weight >= 0, f"segmentation.auxiliary_weight {self.auxiliary_weight} is negative")
        require(0 <= self.dropout < 1, f"segmentation.dropout {self.dropout} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class SegmentationEvalConfig:
    """How segmentation is tested."""

    mode: SegmentationMode = "whole"
    """Predict whole images, or crops in a sliding window whose logits are averaged where they overlap ("slide")."""
    crop: int = 512
    """Side in pixels of the sliding window; smaller images are padded to it."""
    stride: int = 341
    """Pixels between windows, at most ``crop``."""
    flip: bool = False
    """Average the probabilities of an image and of its mirror image."""

    def __post_init__(self) -> None:
        one_of("evaluation.mode", self.mode, get_args(SegmentationMode))
        require(
            1 <= self.stride <= self.crop,
            f"evaluation.stride {self.stride} must be between 1 and evaluation.crop {self.crop}: else pixels are "
            "left out",
        )
