"""What becomes of a file's parameters in a model: which goes where, which is resized, and what does not fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sgmim_fast.position_tables import Resampling, resize_table, square_side
from sgmim_fast.weight_layouts import STAGE_NORMS, EncoderShape, Reading, Target, encoder_shape, is_beyond, to_model

_LISTED = 8  # names that one message spells out
_TABLE = "relative_position_bias_table"
_NORM = "encoder.norm."
_CLASS_ROWS = 3  # of a ViT's table: class token to patch, patch to class token, class token to itself
Grid = tuple[int, int]


@dataclass
class Plan:
    """A file's parameters, sorted by what a model has for them."""

    held: EncoderShape
    """The file's encoder."""
    wanted: EncoderShape
    """The model's."""
    fits: bool
    """Whether they are the same, or the model's the beginning of the file's, having been shortened to it."""
    keys: dict[str, tuple[str, ...]]
    """The model's names, and what the file calls them."""
    values: dict[str, Tensor]
    """The model's names, and their tensors of the file."""
    missing: tuple[str, ...]
    """The model's names of what the file lacks."""
    unused: tuple[str, ...]
    """The file's names of what the model has no part for."""
    unknown: tuple[str, ...]
    incomplete: tuple[str, ...]
    misfits: list[str] = field(default_factory=list)
    """What is of another shape or kind, in words."""
    resized: tuple[str, ...] = ()


def make_plan(
    reading: Reading,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    target: Target,
    depths: tuple[int, ...],
    outputs: tuple[int, ...] = (),
) -> Plan:
    """Sorts a file's parameters by the model's names.

    Args:
        reading: of the file's names.
        tensors: of the file.
        own: the model's state dict.
        target: what it is of.
        depths: blocks a stage (ViT: in all) of the whole encoder that it is, or is the beginning of.
        outputs: the stages whose maps a backbone gives.
    """
    held = encoder_shape({name: tuple(tensors[keys[0]].shape) for name, keys in reading.held.items()})
    wanted = encoder_shape({name: tuple(tensor.shape) for name, tensor in own.items()})
    fits = held == wanted or (wanted.begins(held) and held.begins(replace(wanted, depths=depths)))
    keys: dict[str, tuple[str, ...]] = {}
    unused, unknown = list(reading.unused), list(reading.unknown)
    for name, theirs in reading.held.items():
        mine = to_model(name, target, outputs)
        if mine not in own and name.startswith(_NORM):
            # A backbone that ends before the last stage has no norm of the encoder's, but may have one for its own end.
            rest = name.removeprefix(_NORM)
            mine = to_model(f"{STAGE_NORMS}{len(held.depths) - 1}.{rest}", target, outputs) or mine
        if mine == "mask_token" and mine not in own:
            mine = None  # an encoder in use has none
        if mine is None or (mine not in own and fits and is_beyond(name, wanted)):
            unused += theirs
        elif mine not in own:
            unknown += theirs
        else:
            keys[mine] = theirs
    values, misfits = {}, []
    for name, theirs in keys.items():
        parts = [tensors[key] for key in theirs]
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            misfits.append(f"{', '.join(theirs)} are {shapes} in the file, and should be alike")
        else:
            values[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    missing = tuple(name for name in own if name not in keys)
    return Plan(held, wanted, fits, keys, values, missing, tuple(unused), tuple(unknown), reading.incomplete, misfits)


def fit_shapes(
    plan: Plan, own: Mapping[str, Tensor], how: Resampling | None, source_map: Grid | None, own_map: Grid | None
) -> None:
    """Resizes position tables of another window or map, and notes in the plan what is of another shape or kind.

    Args:
        plan: its ``values``, ``resized`` and ``misfits`` are changed.
        own: the model's state dict.
        how: None resizes nothing.
        source_map: (rows, columns) that a ViT's table in the file is known to be made for; None if nothing is.
        own_map: likewise in the model; None for Swin.
    """
    resized = []
    for name, value in plan.values.items():
        key, shape, mine = ", ".join(plan.keys[name]), tuple(value.shape), tuple(own[name].shape)
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            plan.misfits.append(f"{key} is {kind} in the file, a float in the model")
            continue
        remade = source_map is not None and source_map != own_map and name.endswith(_TABLE)
        if shape == mine and not remade:
            continue
        if how is not None and name.endswith(_TABLE) and shape[1:] == mine[1:]:
            old, new = _grid(shape[0], source_map, plan.held), _grid(mine[0], own_map, plan.wanted)
            if old is not None and new is not None:
                plan.values[name] = resize_table(value, old, new, how)
                resized.append(name)
                continue
        note = f"; it is for {source_map} tokens, the model for {own_map}" if shape == mine else ""
        plan.misfits.append(f"{key} is {shape} in the file, {mine} in the model{note}")
    plan.resized = tuple(resized)


def _grid(rows: int, known: Grid | None, shape: EncoderShape) -> Grid | None:
    """(height, width) of the window or map that a table of so many rows is for; None if it does not tell."""
    if known is not None:
        return known
    side = square_side(rows - _CLASS_ROWS if shape.kind == "vit" else rows)
    return None if side is None else (side, side)


def problems(plan: Plan, lacking: Iterable[str], resizing: bool) -> str:
    """One line on what does not fit, with a remedy; nothing if all does.

    Args:
        plan: with its misfits.
        lacking: the model's names that the file would have to hold.
        resizing: whether position tables of other sizes were to be resized.
    """
    found = {
        "missing": list(lacking),
        "of another shape": plan.misfits,
        "without their companions among query, key and value": list(plan.incomplete),
        "unknown": list(plan.unknown),
    }
    if not any(found.values()):
        return ""
    parts, listed = [], _LISTED
    if not plan.fits:
        parts.append(f"holds a {plan.held}; the model has a {plan.wanted}")
        listed = 2  # the cause is said, the names are examples
    parts += [f"{len(names)} {what}: {some(names, listed)}" for what, names in found.items() if names]
    parts += _remedy(plan, [what for what, names in found.items() if names], resizing)
    return "; ".join(parts)


def _remedy(plan: Plan, kinds: list[str], resizing: bool) -> list[str]:
    vit = plan.held.kind == "vit"
    if not plan.fits:
        shortened = "; out_indices leave out its end" if plan.wanted.begins(plan.held) else ""
        return [f"build the model like the file's{shortened}"]
    if any(key.endswith(_TABLE) for key in plan.unknown) and vit:
        return ["each block has a position table of its own there; the ViT here has one for all of them"]
    if any("pos_embed" in key or "position_embeddings" in key for key in plan.unknown):
        return ["the encoders here know positions by relative tables alone; choose weights trained so"]
    if plan.misfits and all(_TABLE in misfit for misfit in plan.misfits):
        option = "image_size" if vit else "window_size"
        if resizing:
            return [f"the file does not tell its map's sides, which differ; build the model with its {option}"]
        return [f"build the model with the file's {option}, or resize the tables by resize=True"]
    return ["strict=False leaves what is missing at its initial value"] if kinds == ["missing"] else []


def some(names: list[str], listed: int = _LISTED) -> str:
    """The first of these names, and how many more there are."""
    more = len(names) - listed
    return ", ".join(names[:listed]) + (f" and {more} more" if more > 0 else "")
