"""Files of weights: what is read from them, safely, and how they are written.

Pickled checkpoints are read by PyTorch's restricted unpickler, which runs no code of the file.
"""

import os
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgmim_fast.errors import UserError

_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("module.", "_orig_mod.")  # what distributed and compiled models begin all names with
# Official checkpoints carry the configuration of their run, as nodes of yacs, beside the weights. To PyTorch's reader
# they are plain ordered dicts: it fills no dict subclass but that one.
_STAND_INS: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]


def read_tensors(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """How messages call a source, and the state dict in it.

    Raises:
        UserError: if it cannot be read or holds none.
    """
    if isinstance(source, Mapping):
        return "state dict", _tensors_of(source, "state dict")
    if not isinstance(source, str | Path):
        raise UserError(f"weights are the path of a file or a state dict; got {type(source).__name__}")
    return str(source), _tensors_of(_read(Path(source)), str(source))


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for other files.

    Raises:
        UserError: if the file cannot be read.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise _damaged(path, error) from error


def check_target(path: Path) -> None:
    """Refuses paths that no weights can be written to.

    Raises:
        UserError: which says why.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are saved as safetensors; let the name end in .safetensors")
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written, {path.parent} is not a folder; create it first")
    if path.is_dir():
        raise UserError(f"{path}: cannot be written, it is a folder; name a file")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file. A failure leaves what was there before.

    Raises:
        UserError: if it cannot be written.
    """
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


# -- reading


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file of weights in it")
    if path.suffix not in (".safetensors", *_PICKLED):
        if not path.exists():
            raise UserError(f"{path}: does not exist; name the folder of a run, or a file of weights")
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
    while prefix := next((w for w in _WRAPPERS if all(key.startswith(w) for key in content)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return dict(content)


# -- what is wrong with a file


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
