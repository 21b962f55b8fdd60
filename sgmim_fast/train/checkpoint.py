"""Checkpoints of a run: ``checkpoints/step_000200/`` with DeepSpeed's shards, the weights and the position.

A checkpoint is written under a temporary name and renamed when every rank has finished and its files are listed with
their checksums; only then is ``latest`` replaced, and only then are old ones removed. Whatever interrupts a save,
``latest`` names a complete checkpoint.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import distributed

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.order import LoaderState
from sgmim_fast.errors import UserError
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.train.environment import versions
from sgmim_fast.train.ranks import is_lost_peer
from sgmim_fast.train.run_folder import (
    FILES,
    LATEST,
    STATE,
    WEIGHTS,
    checkpoint_name,
    checkpoints,
    latest_checkpoint,
    list_checkpoints,
    list_files,
    step_of,
)
from sgmim_fast.weights import save_weights

_UNFINISHED = ".incomplete-"
_REMOVED = ".removed-"
_SPARE = 1.05  # of the newest checkpoint's size must be free


@dataclass(frozen=True)
class Position:
    """How far a checkpoint's run had come, and how it was made.

    No state of a random generator is among it: every step draws from (seed, step, rank), every sample from (seed,
    epoch, index).
    """

    step: int
    """Optimizer steps done."""
    loader: LoaderState
    config: dict[str, Any]
    """Fields of ``PretrainConfig``."""
    versions: dict[str, str]
    """Of the packages and the code that wrote it."""

    @classmethod
    def at(cls, step: int, loader: LoaderState, config: PretrainConfig) -> "Position":
        """The position of a run of this version."""
        return cls(step, loader, json.loads(json.dumps(asdict(config))), versions())


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, model: SGMIM, run: Path, position: Position) -> Path:
    """Write a checkpoint, then remove what need not be kept; every rank calls it. Returns the folder.

    Raises:
        UserError: on rank 0, if the disk is full or not writable; earlier checkpoints stay intact.
    """
    root = checkpoints(run)
    name = checkpoint_name(position.step)
    temporary, final = root / f"{_UNFINISHED}{name}", root / name
    chief = distributed.get_rank() == 0
    try:
        if chief:
            _clear(root)
            _check_space(run)
        distributed.barrier()
        engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
        weights = full_weights(model)
        distributed.barrier()  # all shards are there
        if chief:
            _save_full(weights, model, temporary / WEIGHTS)
            (temporary / STATE).write_text(json.dumps(asdict(position), indent=2) + "\n")
            (temporary / FILES).write_text(json.dumps(list_files(temporary), indent=1) + "\n")
            _make_durable(*temporary.iterdir(), temporary)
            if final.exists():  # left by a save that died before `latest` named it
                _remove(final)
            os.rename(temporary, final)
            pointer = root / (LATEST + ".new")
            pointer.write_text(name + "\n")
            _make_durable(pointer, root)
            os.replace(pointer, root / LATEST)
            _make_durable(root)
            train = position.config["train"]
            _forget(run, position.step, train["keep_last"], train["keep_every"])
        distributed.barrier()
    except (OSError, RuntimeError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_lost_peer(error) or not _is_write_failure(error):
            raise
        kept = latest_checkpoint(run)
        intact = "no earlier checkpoint exists" if kept is None else f"{kept} is intact; continue with --resume auto"
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write checkpoint {final}: {reason}; free space there. {intact}") from error
    return final


def _is_write_failure(error: Exception) -> bool:
    """torch.save reports a full disk as a bare RuntimeError of its archive writer; others are programming mistakes."""
    signs = ("inline_container", "PytorchStreamWriter", "write()")
    return not isinstance(error, RuntimeError) or any(sign in str(error) for sign in signs)


def _check_space(run: Path) -> None:
    """The next checkpoint is as large as the newest one; without any, writing tells."""
    kept = list_checkpoints(run)
    if not kept:
        return
    needed = int(_SPARE * sum(path.stat().st_size for path in kept[0].rglob("*") if path.is_file()))
    free = shutil.disk_usage(checkpoints(run)).free
    if free < needed:
        raise UserError(f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")


def _forget(run: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Later checkpoints than ``step`` are of a run that was resumed before them, perhaps because they are damaged: they
    neither count nor go."""
    own = [folder for folder in list_checkpoints(run) if step_of(folder) <= step]
    for folder in own[keep_last:]:
        if keep_every is None or step_of(folder) % keep_every:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Renamed first: a removal that is interrupted leaves nothing that looks like a checkpoint."""
    aside = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _clear(root: Path) -> None:
    """What interrupted saves and removals have left."""
    for leftover in (*root.glob(f"{_UNFINISHED}*"), *root.glob(f"{_REMOVED}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Restore model and optimizer from ``folder``; every rank calls it."""
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise UserError(f"DeepSpeed found nothing to load in {folder}; choose an earlier checkpoint with --resume PATH")


def read_position(folder: Path) -> Position:
    """The position that a checkpoint stores."""
    content = json.loads((folder / STATE).read_text())
    return Position(**content | {"loader": LoaderState(**content["loader"])})


def full_weights(model: SGMIM) -> dict[str, torch.Tensor]:
    """The model's fp32 state on the host, whatever DeepSpeed has done to it; a collective under ZeRO."""
    weights = {}
    for name, parameter in model.named_parameters():
        # Under ZeRO the exact weights are the optimizer's fp32 partitions, not the module's copy.
        full = (
            safe_get_full_fp32_param(parameter)
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            else None
        )
        weights[name] = (parameter.detach() if full is None else full).to("cpu", torch.float32, copy=True)
    return weights


def _save_full(weights: dict[str, torch.Tensor], model: SGMIM, path: Path) -> None:
    with torch.device("meta"):
        twin = SGMIM(model.config)
    twin.load_state_dict(weights, assign=True)
    save_weights(twin, path, layout="simmim" if model.config.guidance == "none" else "sgmim")


def _make_durable(*paths: Path) -> None:
    """Wait until files, and the names in folders, have reached the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
