"""Parameter names of Hugging Face's Swin, Swin V2 and BEiT models, and the bare encoder names that they stand for.

What is written are the names that transformers has in files; those that its fifth version has in memory are read too.
Queries, keys and values are parameters of their own there, and one here: a name here may stand for three of theirs.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from sgmim_fast.config import Encoder


class Place(NamedTuple):
    """Where a tensor of a file belongs."""

    name: str
    third: int | None = None
    """0, 1 or 2 for queries, keys or values of a tensor that holds all three along its first axis; None for a whole."""


_MODELS: dict[Encoder, str] = {"swin": "swin", "swinv2": "swinv2", "vit": "beit"}
_PREFIX = re.compile(r"^(?:swin|swinv2|beit)\.")
_RECOGNISED = re.compile(r"^(?:embeddings\.patch_embeddings|(?:encoder\.)?layers?\.\d+\.(?:blocks\.\d+\.)?attention)\.")
# Names in memory of transformers 5, in the order of translation, and what files call them.
_IN_FILES = [
    (re.compile(r"^layers\.(\d+)\."), r"encoder.layer.\1."),
    (re.compile(r"^shared_position_bias\."), "encoder.relative_position_bias."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.self.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.self.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.self.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.attention\.relative_position_bias\."), ".attention.self."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
    (re.compile(r"\.attention\.attention\."), ".attention.self."),  # BEiT, in files; its own name is written
]
_HEADS = ("classifier.", "lm_head.")
_STAGE_NORM = re.compile(r"^hidden_states_norms\.stage(\d+)\.")
_BLOCK = re.compile(r"^encoder\.(?:layers\.(\d+)\.blocks|layer)\.(\d+)\.")
_OWN_BLOCK = re.compile(r"^(?:layers\.(\d+)\.)?blocks\.(\d+)\.")
_QKV = re.compile(r"^attention\.self\.(query|key|value)\.(weight|bias)$")
_PARTS = ("query", "key", "value")
# Theirs, ours.
_IN_BLOCK = [
    ("attention.output.dense", "attn.proj"),
    ("attention.self.relative_position_bias_table", "attn.relative_position_bias_table"),
    ("attention.self.logit_scale", "attn.logit_scale"),
    ("attention.self.continuous_position_bias_mlp", "attn.cpb_mlp"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("lambda_1", "gamma_1"),
    ("lambda_2", "gamma_2"),
]
_AROUND = [
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.norm", "patch_embed.norm"),
    ("encoder.relative_position_bias", "rel_pos_bias"),
    ("encoder.layers", "layers"),  # mergings, which have the same names behind it
    ("layernorm", "norm"),
    ("pooler.layernorm", "norm"),  # BEiT with average pooling applies its last norm after the pooling
]


def is_hf(keys: Iterable[str]) -> bool:
    """Whether some of these names are those of a Hugging Face encoder."""
    return any(_RECOGNISED.match(_PREFIX.sub("", key)) for key in keys)


def has_key_bias(keys: Iterable[str]) -> bool:
    """Whether the attention is that of Swin, whose biases of queries, keys and values are one tensor here."""
    return not any(".logit_scale" in key or "cls_token" in key for key in keys)


def unused(keys: Collection[str], stages: int) -> set[str]:
    """Those of a file's names that no encoder has use for.

    SwinBackbone has a norm for each map that it gives; its model's own one is dead where that of the last stage is.
    """
    found = {key for key in keys if key.startswith(_HEADS)}
    if any(key.startswith(f"hidden_states_norms.stage{stages}.") for key in keys):
        found |= {key for key in keys if _PREFIX.sub("", key).startswith("layernorm.")}
    return found


def stage_norm(key: str) -> tuple[int, str] | None:
    """The stage, from 0, whose map SwinBackbone puts this norm on, and the rest of the name; None for other names."""
    found = _STAGE_NORM.match(key)
    return None if found is None else (int(found[1]) - 1, key[found.end() :])


def name_of_stage_norm(stage: int, rest: str) -> str:
    """The name that ``stage_norm`` reads."""
    return f"hidden_states_norms.stage{stage + 1}.{rest}"


def from_hf(key: str, key_bias: bool) -> Place | None:
    """The place of a file's parameter, under the bare encoder's name; None for an unknown one.

    Args:
        key: of the file.
        key_bias: see ``has_key_bias``.
    """
    if key.startswith("decoder.0."):
        return Place(key)  # the image head of SwinForMaskedImageModeling, which is SimMIM's
    key = _PREFIX.sub("", key)
    for pattern, in_files in _IN_FILES:
        key = pattern.sub(in_files, key)
    block = _BLOCK.match(key)
    if block is None:
        around = _swap(key, _AROUND)
        return None if around is None else Place(around)
    start = f"blocks.{block[2]}." if block[1] is None else f"layers.{block[1]}.blocks.{block[2]}."
    rest = key[block.end() :]
    if parts := _QKV.match(rest):
        part, kind = parts.groups()
        if kind == "weight" or key_bias:
            return Place(f"{start}attn.qkv.{kind}", _PARTS.index(part))
        return None if part == "key" else Place(f"{start}attn.{part[0]}_bias")
    within = _swap(rest, _IN_BLOCK)
    return None if within is None else Place(start + within)


def to_hf(name: str, encoder: Encoder) -> tuple[str, ...]:
    """The names in a file of a bare encoder's parameter: three where queries, keys and values are parted, else one."""
    prefix = _MODELS[encoder]
    block = _OWN_BLOCK.match(name)
    if block is None:
        theirs = _swap(name, [(ours, theirs) for theirs, ours in _AROUND])
        return (f"{prefix}.{theirs or name}",)
    start = f"{prefix}.encoder." + (f"layers.{block[1]}.blocks.{block[2]}" if block[1] else f"layer.{block[2]}")
    attention = "attention.attention" if encoder == "vit" else "attention.self"
    rest = name[block.end() :]
    if rest.startswith("attn.qkv."):
        return tuple(f"{start}.{attention}.{part}.{rest.removeprefix('attn.qkv.')}" for part in _PARTS)
    if rest in ("attn.q_bias", "attn.v_bias"):
        return (f"{start}.{attention}.{'query' if rest == 'attn.q_bias' else 'value'}.bias",)
    theirs = _swap(rest, [(ours, theirs) for theirs, ours in _IN_BLOCK])
    return (f"{start}.{theirs or rest}",)


def _swap(name: str, pairs: list[tuple[str, str]]) -> str | None:
    """The name with its beginning exchanged; None if it begins with none of the pairs' first names."""
    for old, new in pairs:
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None
