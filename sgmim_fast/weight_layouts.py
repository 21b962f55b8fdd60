"""Parameter names in the checkpoint layouts of other codes, and their translation to a model of ours and back.

Pure functions of names and shapes; ``weights`` reads and writes the files. Names of ours are those of the authors'
SG-MIM code, so each layout is described by how it differs from that one:

=========  =================================================================================================
sgmim      as here: ``encoder.* depth_encoder.* fusion_blk_img.* img_decoder.0.* dep_decoder.0.*``
simmim     encoder and image head alone; the head is called ``decoder.0.*``
swin       the encoder alone, without prefix and mask token (official Swin and Swin V2 classifiers)
timm       likewise, with a merging at the start of the stage it leads to; also ViT, as timm's Beit
=========  =================================================================================================
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sgmim_fast.config import Encoder

Layout = Literal["sgmim", "simmim", "swin", "timm"]
Target = Literal["guided", "plain", "encoder"]
"""What the names belong to: a model with guidance, one without, or an encoder on its own."""

BARE: tuple[Layout, ...] = ("swin", "timm")
"""Layouts of an encoder alone, as classifiers have it."""

_GUIDANCE = ("depth_encoder.", "fusion_blk_img.", "img_decoder.", "dep_decoder.")
# Buffers that are computed from the configuration; timm's k_bias is a constant zero.
_DERIVED = ("relative_position_index", "attn_mask", "relative_coords_table", "k_bias")
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.")


def recognise(keys: Iterable[str]) -> Layout | None:
    """The layout that these parameter names belong to; None for none of them."""
    names = list(keys)
    if any(name.startswith("encoder.") for name in names):
        return "sgmim" if any(name.startswith(_GUIDANCE) for name in names) else "simmim"
    if any(name.startswith("layers.") and ".blocks." in name for name in names):
        merged = {int(match[1]) for name in names if (match := _MERGING.match(name))}
        late = bool(merged) and 0 not in merged
        return "timm" if late or any(name.startswith("head.fc.") for name in names) else "swin"
    if any(name.startswith("blocks.") for name in names) and any(name.startswith("patch_embed.") for name in names):
        return "timm"
    return None


def is_unused(key: str, layout: Layout) -> bool:
    """Whether a file may hold this key although no model has use for it: derived buffers, dead parts, classifiers."""
    if key.rpartition(".")[2] in _DERIVED:
        return True
    return key.startswith("head.") if layout in BARE else key.startswith("encoder.depth_patch_embed.")


def to_model(key: str, layout: Layout, target: Target) -> str | None:
    """The model's name of a file's parameter; None if the model has no such part."""
    if layout in BARE:
        if layout == "timm":
            # Beit with average pooling applies its last norm after the pooling, under another name.
            key = _move_merging(re.sub(r"^fc_norm\.", "norm.", key), -1)
        key = f"encoder.{key}"
    elif layout == "simmim":
        key = re.sub(r"^decoder\.", "img_decoder.", key)
    if target == "guided":
        return key
    if target == "encoder":
        return None if key.startswith(_GUIDANCE) else key.removeprefix("encoder.")
    if key.startswith("img_decoder."):
        return key.removeprefix("img_")
    return None if key.startswith(_GUIDANCE) else key


def from_model(key: str, layout: Layout, target: Target) -> str | None:
    """The name of a model's parameter in a layout; None if it does not belong there."""
    if target == "encoder":
        key = f"encoder.{key}"
    elif target == "plain":
        key = re.sub(r"^decoder\.", "img_decoder.", key)
    if layout == "sgmim":
        return key
    if key.startswith("img_decoder."):
        return key.removeprefix("img_") if layout == "simmim" else None
    if not key.startswith("encoder."):
        return None
    if layout == "simmim":
        return key
    key = key.removeprefix("encoder.")
    if key == "mask_token":
        return None
    return _move_merging(key, 1) if layout == "timm" else key


def _move_merging(key: str, stages: int) -> str:
    return _MERGING.sub(lambda match: f"layers.{int(match[1]) + stages}.downsample.", key)


@dataclass(frozen=True)
class EncoderShape:
    """What parameter names and shapes tell about an encoder."""

    kind: Encoder
    width: int | None
    """Channels after patch embedding; None if the file lacks it."""
    depths: tuple[int, ...]
    """Blocks a stage; one entry for ViT."""

    def __str__(self) -> str:
        return f"{self.kind} encoder (embed_dim {self.width}, depths {self.depths})"


def encoder_shape(shapes: Mapping[str, tuple[int, ...]]) -> EncoderShape:
    """Reads the architecture from names and shapes, with or without the prefix ``encoder.``."""
    own = {key.removeprefix("encoder."): shape for key, shape in shapes.items()}
    blocks = {(match[1], match[2]) for key in own if (match := re.match(r"(?:layers\.(\d+)\.)?blocks\.(\d+)\.", key))}
    stages = sorted({int(stage or 0) for stage, _ in blocks})
    depths = tuple(sum(int(stage or 0) == number for stage, _ in blocks) for number in stages)
    kind: Encoder = "swin"
    if not any(key.startswith("layers.") for key in own):
        kind = "vit"
    elif any(".attn.logit_scale" in key or ".attn.cpb_mlp." in key for key in own):
        kind = "swinv2"
    patches = own.get("patch_embed.proj.weight")
    return EncoderShape(kind, patches[0] if patches else None, depths)
