"""Where the images, depth maps and labels of fine-tuning are, and how they are read.

The defaults of augmentation are those of published recipes: for depth MIM-Depth-Estimation (arXiv 2205.13543), which
has them from GLPDepth (2201.07436); for segmentation mmsegmentation's ADE20K configurations.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from sgmim_fast.config.checks import one_of, require

DepthDataset = Literal["kitti", "nyu", "scenes", "folder"]
LabelDataset = Literal["ade20k", "scenes", "folder"]

_CROPS = {"kitti": (352, 352), "nyu": (480, 480), "scenes": (192, 192)}


@dataclass(frozen=True, kw_only=True)
class DepthDataConfig:
    """Images with a depth map each.

    Raises:
        UserError: for any value that makes no sense; the message names the field.
    """

    dataset: DepthDataset = "nyu"
    """Layout of the folder: KITTI with the Eigen split ("kitti"), NYU-v2 ("nyu"), what `sgmim synth` writes ("scenes"),
    or images/ and depth/ of one's own ("folder")."""
    path: str = ""
    """Folder of the data set."""
    train_list: str | None = None
    """List of the training images; None looks for the usual ones in the folder. scenes and folder need none."""
    val_list: str | None = None
    """List of the images to evaluate on, like train_list."""
    crop_size: tuple[int, int] | None = None
    """(height, width) of the training crops; None is 352 x 352 for kitti, 480 x 480 for nyu, 192 x 192 for scenes."""
    depth_scale: float | None = None
    """Stored units a metre, for "folder" alone: 1000 for millimetres, 256 as in KITTI, 1 for metres."""
    flip: bool = True
    """Mirror half of the samples left to right."""
    brightness_contrast: float = 0.2
    """In half of the samples, contrast changes by up to this share and brightness by up to this share of white."""
    gamma: float = 0.2
    """In half of the samples, values in 0..1 are raised to a power that differs from 1 by up to this."""
    hue_saturation_value: tuple[float, float, float] = (40.0, 30.0, 20.0)
    """In half of the samples, hue turns by up to so many degrees, and saturation and value move by up to so many of
    their 255 steps."""
    cutdepth: float = 0.25
    """Share of the samples in which a strip of the image is replaced by its depth (vertical CutDepth)."""
    cutdepth_width: float = 0.75
    """Largest width of that strip, as a share of what lies right of its left edge."""
    workers: int = 4
    """Loader processes a rank; 0 loads in the training process."""
    max_bad_share: float = 0.01
    """Share of the samples that may turn out unreadable in a run; others stand in for them. 0 stops at the first."""

    def __post_init__(self) -> None:
        one_of("data.dataset", self.dataset, get_args(DepthDataset))
        require(
            self.crop_size is not None or self.dataset in _CROPS,
            f"data.crop_size is not set, and data.dataset {self.dataset} has no usual one; give a height and a width",
        )
        _check_crop(self.crop)
        if self.dataset == "folder":
            require(
                self.depth_scale is not None,
                "data.depth_scale is not set; say how many stored units a metre has (1000 for millimetres)",
            )
        else:
            require(
                self.depth_scale is None,
                f"data.depth_scale is for data.dataset folder alone, and {self.dataset} has its own unit; choose the "
                f"recipe {self.dataset}, or leave data.depth_scale out",
            )
        require(
            self.depth_scale is None or self.depth_scale > 0, f"data.depth_scale {self.depth_scale} must be positive"
        )
        for name in ("brightness_contrast", "gamma"):
            require(0 <= getattr(self, name) < 1, f"data.{name} {getattr(self, name)} must be in [0, 1)")
        hue, saturation, value = self.hue_saturation_value
        require(
            0 <= hue <= 180 and 0 <= saturation <= 255 and 0 <= value <= 255,
            f"data.hue_saturation_value {hue} {saturation} {value} must lie in 0..180 degrees and 0..255 steps",
        )
        require(0 <= self.cutdepth <= 1, f"data.cutdepth {self.cutdepth} must be in [0, 1]")
        require(0 < self.cutdepth_width <= 1, f"data.cutdepth_width {self.cutdepth_width} must be in (0, 1]")
        _check_loading(self.workers, self.max_bad_share)

    @property
    def crop(self) -> tuple[int, int]:
        """What ``crop_size`` comes to for this data set, (height, width) in pixels."""
        return self.crop_size or _CROPS[self.dataset]


@dataclass(frozen=True, kw_only=True)
class SegmentationDataConfig:
    """Images with a map of class labels each.

    Raises:
        UserError: for any value that makes no sense; the message names the field.
    """

    dataset: LabelDataset = "ade20k"
    """Layout of the folder: ADEChallengeData2016 ("ade20k"), what `sgmim synth` writes ("scenes"), or images/ and
    labels/ of one's own ("folder")."""
    path: str = ""
    """Folder of the data set."""
    train_list: str | None = None
    """List of the training pairs, image and label map a line, in the place of the data set's own split."""
    val_list: str | None = None
    """List of the pairs to evaluate on; given together with train_list."""
    crop_size: tuple[int, int] = (512, 512)
    """(height, width) of the training crops."""
    resize: tuple[int, int] | None = (2048, 512)
    """(long, short) side that images are fitted into: in training times a factor of ratio_range, before the crop; in
    evaluation and prediction as it is. None keeps the stored size instead."""
    ratio_range: tuple[float, float] = (0.5, 2.0)
    """Bounds of the random factor of the size."""
    cat_max_ratio: float = 0.75
    """A crop in which one class has this share of the labelled pixels or more is drawn again, up to ten times; 1 takes
    any."""
    flip: bool = True
    """Mirror half of the samples left to right."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue at random, each in half of the samples."""
    ignore_index: int = 255
    """Stored label that stands for no class."""
    reduce_zero_label: bool | None = None
    """Stored label 0 stands for no class and the classes count from 1; None means so for ade20k alone."""
    workers: int = 4
    """Loader processes a rank; 0 loads in the training process."""
    max_bad_share: float = 0.01
    """Share of the samples that may turn out unreadable in a run; others stand in for them. 0 stops at the first."""

    def __post_init__(self) -> None:
        one_of("data.dataset", self.dataset, get_args(LabelDataset))
        _check_crop(self.crop_size)
        if self.resize is not None:
            long, short = self.resize
            require(0 < short <= long, f"data.resize {long} {short} must be a long side and a short side")
        low, high = self.ratio_range
        require(0 < low <= high, f"data.ratio_range {low} {high} must satisfy 0 < low <= high")
        require(0 < self.cat_max_ratio <= 1, f"data.cat_max_ratio {self.cat_max_ratio} must be in (0, 1]")
        require(0 <= self.ignore_index <= 255, f"data.ignore_index {self.ignore_index} must be in 0..255")
        _check_loading(self.workers, self.max_bad_share)

    @property
    def first_label(self) -> int:
        """Stored label of class 0: what ``reduce_zero_label`` comes to for this data set."""
        reduced = self.dataset == "ade20k" if self.reduce_zero_label is None else self.reduce_zero_label
        return int(reduced)


def _check_crop(size: tuple[int, int]) -> None:
    require(
        len(size) == 2 and all(side > 0 for side in size),
        f"data.crop_size {' '.join(map(str, size))} must be a height and a width in pixels",
    )


def _check_loading(workers: int, max_bad_share: float) -> None:
    require(workers >= 0, f"data.workers {workers} must be 0 or more")
    require(0 <= max_bad_share < 1, f"data.max_bad_share {max_bad_share} must be in [0, 1)")
