"""Named models, and recipes: functions that return the configuration of a run.

Sources: SG-MIM (arXiv 2409.02513), SimMIM (2111.09886), Swin V2 (2111.09883).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sgmim_fast.config import DataConfig, ModelConfig, OptimizerConfig, PretrainConfig, ScheduleConfig, TrainConfig

_ENCODERS: dict[str, dict[str, Any]] = {
    "swin_base": {},
    "swin_large": {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "window_size": 12},
    "swinv2_base": {"encoder": "swinv2", "window_size": 12, "drop_path_rate": 0.1},
    "vit_base": {
        "encoder": "vit",
        "image_size": 224,
        "embed_dim": 768,
        "depths": (12,),
        "num_heads": (12,),
        "drop_path_rate": 0.1,
        "layer_scale_init": 0.1,
    },
}

MODELS: dict[str, ModelConfig] = {
    f"{prefix}_{name}": ModelConfig(**fields | {"guidance": guidance})
    for prefix, guidance in (("sgmim", "relational"), ("simmim", "none"))
    for name, fields in _ENCODERS.items()
}
"""Every named model; ``create_model`` and the recipes share it."""


def _long_schedule() -> ScheduleConfig:
    return ScheduleConfig(kind="multistep", epochs=800, warmup_lr=5e-7, milestones=(700,))


def swin_base_100ep() -> PretrainConfig:
    """Swin-B, 192 px, window 6: 100 epochs, 2e-4 cosine to 1e-5."""
    return PretrainConfig(model=MODELS["sgmim_swin_base"], optimizer=OptimizerConfig(lr=2e-4))


def swin_base_800ep() -> PretrainConfig:
    """Swin-B, 192 px, window 6: 800 epochs, 1e-4, a tenth of it from epoch 700."""
    return PretrainConfig(model=MODELS["sgmim_swin_base"], schedule=_long_schedule())


def swin_large_800ep() -> PretrainConfig:
    """Swin-L, 192 px, window 12: 800 epochs."""
    return PretrainConfig(model=MODELS["sgmim_swin_large"], schedule=_long_schedule())


def swinv2_base_800ep() -> PretrainConfig:
    """SwinV2-B, 192 px, window 12: 800 epochs, image target normalised in windows of 47 as SimMIM does."""
    model = replace(MODELS["sgmim_swinv2_base"], normalize_target_window=47)
    return PretrainConfig(model=model, schedule=_long_schedule())


def vit_base_800ep() -> PretrainConfig:
    """ViT-B/16, 224 px: 800 epochs."""
    return PretrainConfig(model=MODELS["sgmim_vit_base"], schedule=_long_schedule())


def demo() -> PretrainConfig:
    """A small Swin at 128 px that learns something visible in minutes on two CPU cores."""
    return PretrainConfig(
        model=ModelConfig(image_size=128, embed_dim=32, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=4),
        data=DataConfig(workers=1),
        optimizer=OptimizerConfig(lr=0.016),
        schedule=ScheduleConfig(epochs=8, warmup_epochs=0.5, warmup_lr=1e-5, min_lr=2e-4),
        train=TrainConfig(batch_size=16, precision="fp32", log_every=5, checkpoint_every=200),
        output="runs/demo",
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (swin_base_100ep, swin_base_800ep, swin_large_800ep, swinv2_base_800ep, vit_base_800ep, demo)
}
