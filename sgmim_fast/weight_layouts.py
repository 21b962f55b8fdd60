"""Parameter names in the checkpoint layouts of other codes, and their translation to a model of ours and back.

Pure functions of names and shapes; ``weights`` moves the tensors. Names of ours are those of the authors' code, which
is the layout ``sgmim``, and every other layout is described by how it differs from that one:

=========  =================================================================================================
sgmim      as here: ``encoder.* depth_encoder.* fusion_blk_img.* img_decoder.0.* dep_decoder.0.*``; of a
           backbone all its parts
simmim     encoder and image head alone; the head is called ``decoder.0.*``
swin       the encoder alone, without prefix and mask token (official Swin and Swin V2 classifiers)
timm       likewise, with a merging at the start of the stage it leads to; also ViT, as timm's Beit
hf         Hugging Face's Swin, Swin V2 or Beit, with SimMIM's image head where there is one (``hf_layout``)
mim-depth  encoder of MIM-Depth-Estimation (arXiv 2205.13543): the last norm is called after its stage, Swin V2's
           position MLP ``rpe_mlp``; its detection and segmentation relatives have a norm for each stage
=========  =================================================================================================
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sgmim_fast import hf_layout
from sgmim_fast.config import Encoder
from sgmim_fast.hf_layout import Place

Layout = Literal["sgmim", "simmim", "swin", "timm", "hf", "mim-depth"]
Target = Literal["guided", "plain", "encoder", "backbone"]
"""What the names belong to: a model with guidance, one without, an encoder on its own, or a backbone."""

BARE: tuple[Layout, ...] = ("swin", "timm", "mim-depth")
"""Layouts of an encoder alone, as classifiers and dense tasks have it."""

_GUIDANCE = ("depth_encoder.", "fusion_blk_img.", "img_decoder.", "dep_decoder.")
BACKBONE_PARTS = ("out_norms.", "pyramid.")
"""What a backbone has beside its encoder."""
STAGE_NORMS = "stage_norms."
"""Begins names of the norms that other codes put on maps of stages before the last: they are counted by the stage, a
backbone's ``out_norms`` by the map."""
_WRAPPERS = ("backbone.", "model.")
# Buffers that are computed from the configuration; timm's k_bias is a constant zero.
_DERIVED = ("relative_position_index", "attn_mask", "relative_coords_table", "k_bias")
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.")
_STAGE_NORM = re.compile(r"^(?:encoder\.)?norm(\d+)\.")
_DEPTH_HEAD = ("decoder.deconv_layers.", "decoder.conv_layers.", "last_layer_depth.")


@dataclass(frozen=True)
class Reading:
    """What the names of a file stand for."""

    layout: Layout
    held: Mapping[str, tuple[str, ...]]
    """Names of the layout ``sgmim``, and what the file calls them: one key, or three whose tensors are joined."""
    unused: tuple[str, ...]
    """Keys that a file may have although no model has use for them."""
    unknown: tuple[str, ...]
    """Keys that stand for nothing known, or for what another key already is."""
    incomplete: tuple[str, ...]
    """Keys whose companions of queries, keys and values are not all there."""


def read_names(keys: Iterable[str]) -> Reading | None:
    """What these parameter names stand for; None if they belong to no layout."""
    names = list(keys)
    wrapper = _wrapper(names)
    inner = {key.removeprefix(wrapper): key for key in names if key.startswith(wrapper)}
    layout = _recognise(inner)
    if layout is None:
        return None
    key_bias = hf_layout.has_key_bias(inner)
    stages = _stages(inner)
    dead = hf_layout.unused(inner, stages) if layout == "hf" else set()
    found: dict[str, dict[int | None, str]] = {}
    unused, unknown = [key for key in names if not key.startswith(wrapper)], []
    for name, key in inner.items():
        if name in dead or _is_unused(name, layout):
            unused.append(key)
            continue
        place = _place(name, layout, key_bias, stages)
        parts = {} if place is None else found.setdefault(place.name, {})
        if place is None or place.third in parts or (parts and (place.third is None) == (None not in parts)):
            unknown.append(key)
        else:
            parts[place.third] = key
    held: dict[str, tuple[str, ...]] = {}
    incomplete: list[str] = []
    for name, parts in found.items():
        if None in parts:
            held[name] = (parts[None],)
        elif len(parts) == 3:
            held[name] = (parts[0], parts[1], parts[2])
        else:
            incomplete.extend(parts.values())
    return Reading(layout, held, tuple(unused), tuple(unknown), tuple(incomplete))


def _wrapper(names: Collection[str]) -> str:
    """The beginning of names that modules around an encoder have given it."""
    found = ""
    while inner := next((w for w in _WRAPPERS if any(name.startswith(found + w) for name in names)), None):
        found += inner
    return found


def _recognise(names: Collection[str]) -> Layout | None:
    if hf_layout.is_hf(names):
        return "hf"
    if any(name.startswith(_DEPTH_HEAD) or _STAGE_NORM.match(name) or ".attn.rpe_mlp." in name for name in names):
        return "mim-depth"
    if any(name.startswith("encoder.") for name in names):
        return "sgmim" if any(name.startswith((*_GUIDANCE, *BACKBONE_PARTS)) for name in names) else "simmim"
    if any(name.startswith("layers.") and ".blocks." in name for name in names):
        merged = {int(match[1]) for name in names if (match := _MERGING.match(name))}
        late = bool(merged) and 0 not in merged
        return "timm" if late or any(name.startswith("head.fc.") for name in names) else "swin"
    if any(re.match(r"layers_\d+\.blocks\.", name) for name in names):
        return "timm"
    if any(name.startswith("blocks.") for name in names) and any(name.startswith("patch_embed.") for name in names):
        return "timm"
    return None


def _is_unused(name: str, layout: Layout) -> bool:
    """Whether a file may hold this although no model has use for it: derived buffers, dead parts, classifiers."""
    if name.rpartition(".")[2] in _DERIVED:
        return True
    if layout == "mim-depth":
        return name.startswith(("decoder.", "last_layer_depth."))
    return name.startswith("head.") if layout in BARE else name.startswith("encoder.depth_patch_embed.")


def _place(name: str, layout: Layout, key_bias: bool, stages: int) -> Place | None:
    if layout == "sgmim":
        return Place(name)
    if layout == "hf":
        if stage_norm := hf_layout.stage_norm(name):
            return _place_of_stage_norm(*stage_norm, stages)
        place = hf_layout.from_hf(name, key_bias)
        if place is None or place.name.startswith("decoder."):
            return None if place is None else Place(f"img_{place.name}")
        return Place(f"encoder.{place.name}", place.third)
    if layout == "mim-depth":
        name = name.removeprefix("encoder.").replace(".attn.rpe_mlp.", ".attn.cpb_mlp.")
        if norm := _STAGE_NORM.match(name):
            return _place_of_stage_norm(int(norm[1]), name[norm.end() :], stages)
    elif layout == "timm":
        # Beit with average pooling applies its last norm after the pooling, under another name.
        name = re.sub(r"^fc_norm\.", "norm.", name)
        # With features_only, stages are attributes and not a list.
        name = _move_merging(re.sub(r"^layers_(\d+)\.", r"layers.\1.", name), -1)
    elif layout == "simmim":
        return Place(re.sub(r"^decoder\.", "img_decoder.", name))
    return Place(f"encoder.{name}")


def _place_of_stage_norm(stage: int, rest: str, stages: int) -> Place:
    return Place(f"encoder.norm.{rest}" if stage == stages - 1 else f"{STAGE_NORMS}{stage}.{rest}")


def to_model(name: str, target: Target, outputs: tuple[int, ...] = ()) -> str | None:
    """A model's name of what has this one in the layout ``sgmim``; None if the model has no such part.

    Args:
        name: of a ``Reading``.
        target: the kind of model.
        outputs: the stages whose maps a backbone gives.
    """
    if target == "backbone":
        if norm := re.match(rf"{STAGE_NORMS}(\d+)\.", name):
            stage = int(norm[1])
            return f"out_norms.{outputs.index(stage)}.{name[norm.end() :]}" if stage in outputs else None
        return None if name.startswith(_GUIDANCE) or name == "encoder.mask_token" else name
    if name.startswith((*BACKBONE_PARTS, STAGE_NORMS)):
        return None
    if target == "guided":
        return name
    if target == "plain" and name.startswith("img_decoder."):
        return name.removeprefix("img_")
    if name.startswith(_GUIDANCE):
        return None
    return name if target == "plain" else name.removeprefix("encoder.")


def from_model(
    key: str, layout: Layout, target: Target, shape: "EncoderShape", outputs: tuple[int, ...] = ()
) -> tuple[str, ...]:
    """What a layout calls a model's parameter: one name, or three for equal parts of its first axis.

    Args:
        key: name in the model.
        layout: to be written.
        target: the kind of model.
        shape: its encoder's.
        outputs: the stages whose maps a backbone gives.

    Returns:
        None of them if the parameter does not belong to the layout.
    """
    name = f"encoder.{key}" if target == "encoder" else key
    if target == "plain":
        name = re.sub(r"^decoder\.", "img_decoder.", name)
    if layout == "sgmim":
        return (name,)
    if name.startswith("img_decoder."):
        head = layout == "simmim" or (layout == "hf" and shape.kind != "vit")
        return (name.removeprefix("img_"),) if head else ()
    if norm := re.match(r"out_norms\.(\d+)\.", name):
        stage, rest = outputs[int(norm[1])], name[norm.end() :]
        if layout == "mim-depth":
            return (f"encoder.norm{stage}.{rest}",)
        return (hf_layout.name_of_stage_norm(stage, rest),) if layout == "hf" and shape.kind == "swin" else ()
    if not name.startswith("encoder."):
        return ()
    if layout == "simmim":
        return (name,)
    name = name.removeprefix("encoder.")
    if name == "mask_token" and (layout != "hf" or target == "encoder"):
        return ()
    if layout == "hf":
        return hf_layout.to_hf(name, shape.kind)
    if layout == "mim-depth":
        name = re.sub(r"^norm\.", f"norm{len(shape.depths) - 1}.", name)
        return ("encoder." + name.replace(".attn.cpb_mlp.", ".attn.rpe_mlp."),)
    return (_move_merging(name, 1) if layout == "timm" else name,)


def _move_merging(key: str, stages: int) -> str:
    return _MERGING.sub(lambda match: f"layers.{int(match[1]) + stages}.downsample.", key)


def _stages(names: Iterable[str]) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.search(r"layers\.(\d+)\.", name))), default=0)


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

    def begins(self, other: "EncoderShape") -> bool:
        """Whether this is the other's first stages (of a ViT, blocks), or all of it."""
        if (self.kind, self.width) != (other.kind, other.width):
            return False
        if self.kind == "vit":
            return self.depths <= other.depths
        return self.depths == other.depths[: len(self.depths)]


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


def is_beyond(name: str, shape: EncoderShape) -> bool:
    """Whether a parameter, named as in the layout ``sgmim``, comes after the end of an encoder of this shape."""
    name = name.removeprefix("encoder.")
    if name.startswith(("norm.", STAGE_NORMS, *BACKBONE_PARTS)):
        return True
    if shape.kind == "vit":
        return (block := re.match(r"blocks\.(\d+)\.", name)) is not None and int(block[1]) >= shape.depths[0]
    last = len(shape.depths) - 1
    stage = re.match(r"layers\.(\d+)\.(downsample\.)?", name)
    return stage is not None and (int(stage[1]) > last or (int(stage[1]) == last and stage[2] is not None))
