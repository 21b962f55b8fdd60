"""Recipes of fine-tuning: functions that return the configuration of a run.

Sources: for depth MIM-Depth-Estimation (arXiv 2205.13543), total batch 24; for segmentation BEiT's UPerNet on ADE20K
(2106.08254), total batch 16, 160,000 steps. Batches here are for one rank: on N ranks divide ``train.batch_size`` by N.
"""

from collections.abc import Callable

from sgmim_fast.config import (
    DepthConfig,
    DepthDataConfig,
    DepthEvalConfig,
    DepthRunConfig,
    FinetuneBackboneConfig,
    FinetuneOptimizerConfig,
    FinetuneScheduleConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationEvalConfig,
    SegmentationRunConfig,
    TrainConfig,
)


def _four_stages(*windows: int) -> FinetuneBackboneConfig:
    return FinetuneBackboneConfig(window_size=windows, use_shift=(True, True, False, False))


def nyu() -> DepthRunConfig:
    """NYU-v2 in crops of 480 pixels, windows 30/30/30/15, up to 10 m."""
    return DepthRunConfig(
        backbone=_four_stages(30, 30, 30, 15),
        depth=DepthConfig(max_depth=10.0),
        data=DepthDataConfig(dataset="nyu"),
        evaluation=DepthEvalConfig(flip=True, windows=2, crop="nyu"),
        train=TrainConfig(batch_size=24),
        output="runs/nyu",
    )


def kitti() -> DepthRunConfig:
    """KITTI in crops of 352 pixels, windows 22/22/22/11, up to 80 m."""
    return DepthRunConfig(
        backbone=_four_stages(22, 22, 22, 11),
        depth=DepthConfig(max_depth=80.0),
        data=DepthDataConfig(dataset="kitti"),
        evaluation=DepthEvalConfig(flip=True, windows=16, crop="garg"),
        train=TrainConfig(batch_size=24),
        output="runs/kitti",
    )


def folder_depth() -> DepthRunConfig:
    """Images and depth maps of one's own in crops of 384 pixels, windows as in pre-training, up to 80 m."""
    return DepthRunConfig(
        depth=DepthConfig(max_depth=80.0),
        data=DepthDataConfig(dataset="folder", crop_size=(384, 384), depth_scale=1000.0),
        train=TrainConfig(batch_size=24),
        output="runs/depth",
    )


def scenes_depth() -> DepthRunConfig:
    """The demo's scenes and backbone: minutes on two CPU cores. Of images so small the last map alone tells little."""
    return DepthRunConfig(
        backbone=FinetuneBackboneConfig(weights="runs/demo", drop_path_rate=0.0),
        depth=DepthConfig(head="dpt", head_channels=8, max_depth=30.0),
        data=DepthDataConfig(dataset="scenes", path="scenes/demo", crop_size=(128, 128), workers=1),
        optimizer=FinetuneOptimizerConfig(lr=1e-3),
        schedule=FinetuneScheduleConfig(epochs=4),
        train=TrainConfig(batch_size=8, precision="fp32", log_every=5, checkpoint_every=200),
        output="runs/demo-depth",
    )


def ade20k() -> SegmentationRunConfig:
    """ADE20K, 150 classes, crops of 512 pixels."""
    return SegmentationRunConfig(
        backbone=FinetuneBackboneConfig(drop_path_rate=0.1),
        optimizer=FinetuneOptimizerConfig(lr=3e-5),
        schedule=FinetuneScheduleConfig(kind="poly", epochs=127, min_lr=0.0, power=1.0),
        evaluation=SegmentationEvalConfig(mode="slide"),
        train=TrainConfig(batch_size=16),
        evaluate_every=12,
        output="runs/ade20k",
    )


def folder_segmentation() -> SegmentationRunConfig:
    """Images and label maps of one's own in crops of 512 pixels; ``segmentation.classes`` says how many classes."""
    return SegmentationRunConfig(
        backbone=FinetuneBackboneConfig(drop_path_rate=0.1),
        data=SegmentationDataConfig(dataset="folder", resize=None),
        optimizer=FinetuneOptimizerConfig(lr=3e-5),
        schedule=FinetuneScheduleConfig(kind="poly", epochs=100, min_lr=0.0, power=1.0),
        evaluation=SegmentationEvalConfig(mode="slide"),
        train=TrainConfig(batch_size=16),
        output="runs/segmentation",
    )


def scenes_segmentation() -> SegmentationRunConfig:
    """The demo's scenes and backbone: minutes on two CPU cores."""
    return SegmentationRunConfig(
        backbone=FinetuneBackboneConfig(weights="runs/demo", drop_path_rate=0.0),
        segmentation=SegmentationConfig(classes=8, head_channels=64, auxiliary_channels=64),
        data=SegmentationDataConfig(
            dataset="scenes", path="scenes/demo", crop_size=(128, 128), resize=None, ratio_range=(0.8, 1.5), workers=1
        ),
        optimizer=FinetuneOptimizerConfig(lr=1e-3),
        schedule=FinetuneScheduleConfig(kind="poly", epochs=4, min_lr=0.0, power=1.0, warmup_steps=20),
        train=TrainConfig(batch_size=8, precision="fp32", log_every=5, checkpoint_every=200),
        output="runs/demo-segmentation",
    )


DEPTH_RECIPES: dict[str, Callable[[], DepthRunConfig]] = {
    "nyu": nyu,
    "kitti": kitti,
    "folder": folder_depth,
    "scenes": scenes_depth,
}
SEGMENTATION_RECIPES: dict[str, Callable[[], SegmentationRunConfig]] = {
    "ade20k": ade20k,
    "folder": folder_segmentation,
    "scenes": scenes_segmentation,
}
