"""Weights in and out: reads the layouts of SG-MIM, SimMIM, Swin and timm, writes them as safetensors.

Pickled checkpoints are read by PyTorch's restricted unpickler, which runs no code of the file.
"""

import json
import os
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgmim_fast.config import Encoder, ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.models.swin import SwinEncoder
from sgmim_fast.models.vit import ViTEncoder
from sgmim_fast.weight_layouts import (
    BARE,
    EncoderShape,
    Layout,
    Target,
    encoder_shape,
    from_model,
    is_unused,
    recognise,
    to_model,
)

__all__ = ["LoadReport", "load_weights", "read_config", "save_weights"]

_PICKLED = (".pth", ".pt", ".bin")
_LISTED = 8  # names that one message spells out


@dataclass(frozen=True)
class LoadReport:
    """What became of the parameters of a file and of a model."""

    source: str
    layout: Layout
    encoder: Encoder
    loaded: tuple[str, ...]
    """The model's names."""
    missing: tuple[str, ...]
    """The model's names of what the file lacks; left as it was."""
    unused: tuple[str, ...]
    """The file's names of what the model has no part for, or computes itself."""


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any], *, strict: bool = True) -> LoadReport:
    """Copies weights into a model, in its dtype and on its device. All or nothing.

    Args:
        model: a pre-training model, or its encoder alone. The mask token of an encoder alone may be missing.
        source: a ``.safetensors`` file, a ``.pth``, ``.pt`` or ``.bin`` checkpoint, or a state dict. The layout is
            recognised by the names; ``{"model": ...}``, ``{"state_dict": ...}`` and the prefix ``module.`` are undone.
        strict: False leaves what the source lacks at its initial value; the report names it.

    Raises:
        UserError: if the source cannot be read, lacks something, holds something unknown or of another shape.
    """
    target = _target(model)
    if isinstance(source, Mapping):
        where, tensors = "state dict", _tensors_of(source, "state dict")
    else:
        where, tensors = str(source), _tensors_of(_read(Path(source)), str(source))
    layout = recognise(tensors)
    if layout is None:
        raise UserError(
            f"{where}: holds no SG-MIM, SimMIM, Swin or timm weights of an encoder; its first names are "
            f"{_some(list(tensors))}"
        )
    own: dict[str, Tensor] = model.state_dict()
    plan: dict[str, str] = {}  # the model's name -> the file's name
    unused, unknown = [], []
    for key in tensors:
        name = None if is_unused(key, layout) else to_model(key, layout, target)
        if name is None:
            unused.append(key)
        elif name not in own or name in plan:
            unknown.append(key)
        else:
            plan[name] = key
    missing = [name for name in own if name not in plan]
    optional = {"mask_token"} if target == "encoder" and layout in BARE else set()
    lacking = [name for name in missing if name not in optional] if strict else []
    held = _shape_of(tensors)
    problems = _problems(held, _shape_of(own), lacking, _misfits(plan, tensors, own), unknown)
    if problems:
        raise UserError(f"{where}: {problems}; nothing was loaded")
    with torch.no_grad():
        for name, key in plan.items():
            own[name].copy_(tensors[key])
    return LoadReport(where, layout, held.kind, tuple(plan), tuple(missing), tuple(unused))


def save_weights(model: nn.Module, path: str | Path, layout: Layout = "sgmim") -> Path:
    """Writes a model's weights as safetensors. A failure leaves what was there before.

    Args:
        model: a pre-training model; an encoder alone for the layouts ``"swin"`` and ``"timm"``.
        path: ends in ``.safetensors``; its folder exists.
        layout: ``"sgmim"`` all of a guided model; ``"simmim"`` encoder and image head under SimMIM's names;
            ``"swin"`` the encoder as official Swin and Swin V2 checkpoints have it; ``"timm"`` the encoder for
            timm's SwinTransformer, SwinTransformerV2, or Beit with a shared relative position bias and
            ``global_pool="token"``. timm shifts windows differently on maps that they do not divide, and on
            oblong maps no larger than a window on one side.

    Raises:
        UserError: if the model does not have the layout's parts, or the file cannot be written.
    """
    path = Path(path)
    target = _target(model)
    own: dict[str, Tensor] = model.state_dict()
    held = _shape_of(own)
    _check_layout(layout, target, held.kind)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are saved as safetensors; let the name end in .safetensors")
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written, {path.parent} is not a folder; create it first")
    if path.is_dir():
        raise UserError(f"{path}: cannot be written, it is a folder; name a file")
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for key, tensor in own.items()
        if (name := from_model(key, layout, target)) is not None
    }
    metadata = {"format": "pt", "layout": layout, "encoder": held.kind}
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        # The configuration of what the file holds, so that it can be built again from the file alone.
        config = config if layout == "sgmim" else replace(config, guidance="none")
        metadata["config"] = json.dumps(asdict(config))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors gives its files to their owner alone
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({_short(error)}); check that its folder is writable and has room"
        ) from error
    finally:
        with suppress(OSError):  # its folder is then what the error above is about
            temporary.unlink(missing_ok=True)
    return path


def read_config(path: str | Path) -> ModelConfig | None:
    """The configuration that ``save_weights`` wrote beside the weights; None for files of another origin.

    Raises:
        UserError: if the file cannot be read, or its configuration is not one of this version.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise _damaged(path, error) from error
    if "layout" not in metadata or "config" not in metadata:
        return None
    try:
        return ModelConfig(**json.loads(metadata["config"]))
    except (TypeError, ValueError) as error:  # UserError and json's error are ValueErrors
        raise UserError(f"{path}: holds a model configuration that this version cannot use ({error})") from error


# -- the model


def _target(model: nn.Module) -> Target:
    if isinstance(model, SGMIM):
        return "plain" if model.config.guidance == "none" else "guided"
    if isinstance(model, SwinEncoder | ViTEncoder):
        return "encoder"
    raise UserError(
        f"weights belong to a model made by create_model, or to its encoder; got {type(model).__name__} "
        "(unwrap a distributed or compiled model first)"
    )


def _shape_of(tensors: Mapping[str, Tensor]) -> EncoderShape:
    return encoder_shape({key: tuple(tensor.shape) for key, tensor in tensors.items()})


def _check_layout(layout: str, target: Target, encoder: Encoder) -> None:
    if layout not in get_args(Layout):
        raise UserError(f"layout {layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
    if layout == "sgmim" and target != "guided":
        raise UserError(
            "layout 'sgmim' needs a model with guidance; save this one with layout 'simmim', 'swin' or 'timm'"
        )
    if layout == "simmim" and target == "encoder":
        raise UserError("layout 'simmim' needs the image head; save an encoder alone as 'swin' or 'timm'")
    if layout == "swin" and encoder == "vit":
        raise UserError("layout 'swin' is for Swin and Swin V2; save a ViT as 'timm'")


# -- what does not fit


def _misfits(plan: Mapping[str, str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name, key in plan.items():
        tensor, mine = tensors[key], own[name]
        if tensor.shape != mine.shape:
            found.append(f"{key} is {tuple(tensor.shape)} in the file, {tuple(mine.shape)} in the model")
        elif not tensor.is_floating_point():
            found.append(f"{key} is {str(tensor.dtype).removeprefix('torch.')} in the file, a float in the model")
    return found


def _problems(
    held: EncoderShape, wanted: EncoderShape, missing: list[str], misfits: list[str], unknown: list[str]
) -> str:
    if not (missing or misfits or unknown):
        return ""
    parts = []
    listed = _LISTED
    if held != wanted:
        parts.append(f"holds a {held}; the model has a {wanted}")
        listed = 2  # the cause is said, the names are examples
    for names, what in ((missing, "missing"), (misfits, "of another shape"), (unknown, "unknown")):
        if names:
            parts.append(f"{len(names)} {what}: {_some(names, listed)}")
    if held != wanted:
        parts.append("build the model like the file's")
    elif misfits and all("relative_position_bias_table" in misfit for misfit in misfits):
        parts.append(f"build the model with the file's {'image_size' if held.kind == 'vit' else 'window_size'}")
    elif missing and not (misfits or unknown):
        parts.append("strict=False leaves what is missing at its initial value")
    return "; ".join(parts)


def _some(names: list[str], listed: int = _LISTED) -> str:
    more = len(names) - listed
    return ", ".join(names[:listed]) + (f" and {more} more" if more > 0 else "")


# -- files


# Official checkpoints carry the configuration of their run, as nodes of yacs, beside the weights. To PyTorch's reader
# they are plain ordered dicts: it fills no dict subclass but that one.
_STAND_INS: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file of weights in it")
    if path.suffix not in (".safetensors", *_PICKLED):
        raise UserError(f"{path}: weights are read from .safetensors, {', '.join(_PICKLED)} files")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if size == 0:
        raise UserError(f"{path}: is empty; copy or download it again")


def _read(path: Path) -> Any:
    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    # Damaged bytes fail anywhere in the readers, and so with any exception.
    except Exception as error:
        raise _damaged(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or _short(error)}); check the path and its access")


def _refused(path: Path, error: pickle.UnpicklingError) -> UserError:
    message = str(error)
    if name := re.search(r"GLOBAL ([\w.]+)", message):
        found = f"a pickled {name[1]}, which could run code"
    elif (code := re.search(r"Unsupported operand (\d+)", message)) and _protocol(int(code[1])) > 2:
        found = f"pickle instructions of protocol {_protocol(int(code[1]))}, which PyTorch's safe reader does not know"
    else:
        return _damaged(path, error)
    return UserError(
        f"{path}: holds {found}; it was not loaded. Where it was made, save the state dict alone, as safetensors"
    )


def _protocol(code: int) -> int:
    """The pickle protocol that brought an instruction; 0 for bytes that are none."""
    return next((operation.proto for operation in pickletools.opcodes if operation.code == chr(code)), 0)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    detail = reason[1] if reason else _short(error)
    return UserError(f"{path}: is damaged or not a {path.suffix} checkpoint ({detail}); copy or download it again")


def _short(error: Exception) -> str:
    """The first sentence of a message, or the kind of error where it has none."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def _tensors_of(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{where}: holds no tensors by name; expected a state dict, alone or as 'model' or 'state_dict'"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{where}: entry {key!r} is a {type(value).__name__}; a state dict holds tensors by name")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)
