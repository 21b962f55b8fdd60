"""The encoders as models of timm: importing this module registers them with ``timm.create_model``.

``sgmim_swin_base``, ``sgmim_swin_large``, ``sgmim_swinv2_base`` and ``sgmim_vit_base``, which bring no weights of their
own. They keep timm's contracts: Swin's features are (B, H, W, C), ViT's (B, 1 + L, C) with the class token first, and
``features_only=True`` gives (B, C, H, W). Images of any size are taken. Weights in every layout that ``load_weights``
reads can be given to timm's own loading (``checkpoint_path``, ``pretrained_cfg_overlay``) and to ``load_state_dict``.
"""

from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sgmim_fast.config import BackboneConfig
from sgmim_fast.config.checks import require
from sgmim_fast.recipes import MODELS
from sgmim_fast.timm.classifiers import ClassifyingSwin, ClassifyingViT, TimmModel
from sgmim_fast.timm.loading import name_classifier, name_wrapped

__all__ = ["ClassifyingSwin", "ClassifyingViT"]  # timm adds the names that it registers

# Options of a model that are not its encoder's shape.
_FACE = ("in_chans", "num_classes", "global_pool", "drop_rate", "backend", "attention", "device", "dtype")


def _model(name: str, **options: Any) -> nn.Module:
    shape: dict[str, Any] = {"norm": "last", "pyramid": False}
    if (size := options.pop("img_size", None)) is not None:
        shape["image_size"] = size if isinstance(size, int) else tuple(size)
    for option, value in {"strict_img_size": False, "dynamic_img_size": True}.items():
        require(options.pop(option, value) is value, f"{option} must be {value}: images of any size are taken")
    face = {option: options.pop(option) for option in _FACE if option in options}
    config = BackboneConfig.from_pretraining(MODELS[name], **options | shape)
    return ClassifyingViT(config, **face) if config.encoder == "vit" else ClassifyingSwin(config, **face)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    depths = options.get("depths", MODELS[name].depths)
    levels = range(len(depths))
    if MODELS[name].encoder == "vit":
        levels = range(sum(depths) if isinstance(depths, tuple | list) else depths)[-4:]
    features = {"out_indices": options.pop("out_indices", tuple(levels)), "feature_cls": "getter"}
    model = build_model_with_cfg(
        partial(_model, name),
        name,
        pretrained,
        pretrained_filter_fn=name_classifier,
        feature_cfg=features,
        **options,
    )
    if not isinstance(model, TimmModel):  # features_only
        model.register_load_state_dict_pre_hook(name_wrapped)
    return model


def _described(name: str) -> dict[str, Any]:
    model = MODELS[name]
    sides = model.hw
    return {
        "input_size": (3, *sides),
        "pool_size": tuple(side // model.stride for side in sides),
        "num_classes": 0,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head" if model.encoder == "vit" else "head.fc",
    }


default_cfgs = generate_default_cfgs({name: _described(name) for name in MODELS if name.startswith("sgmim_")})


@register_model
def sgmim_swin_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """Swin-B of SG-MIM: windows of 6, as at 192 pixels."""
    return _create("sgmim_swin_base", pretrained, options)


@register_model
def sgmim_swin_large(pretrained: bool = False, **options: Any) -> nn.Module:
    """Swin-L of SG-MIM: windows of 12, 12, 12 and 6, as at 192 pixels."""
    return _create("sgmim_swin_large", pretrained, options)


@register_model
def sgmim_swinv2_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """SwinV2-B of SG-MIM: windows of 12, 12, 12 and 6, as at 192 pixels; others keep their offsets' measure."""
    return _create("sgmim_swinv2_base", pretrained, options)


@register_model
def sgmim_vit_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViT-B/16 of SG-MIM, its position table made for 224 pixels."""
    return _create("sgmim_vit_base", pretrained, options)
