"""Checkpoints of a run: ``checkpoints/step_000200/`` with DeepSpeed's shards, the weights and the position.

A checkpoint is written under a temporary name and renamed when every rank has finished; only then is
``latest`` replaced. Whatever interrupts a save, ``latest`` names a complete checkpoint.
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

from sgmim_fast.data.order import LoaderState
from sgmim_fast.errors import UserError
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.train.ranks import is_lost_peer
from sgmim_fast.train.run_folder import LATEST, STATE, WEIGHTS, checkpoints, latest_checkpoint
from sgmim_fast.weights import save_weights


@dataclass(frozen=True)
class Position:
    """How far a checkpoint's run had come, and what a continuation must share with it."""

    step: int
    """Optimizer steps done."""
    world_size: int
    zero_stage: int
    precision: str
    samples_per_step: int
    """Pairs of one optimizer step over all ranks."""
    loader: LoaderState
    model: dict[str, Any]
    """Fields of ``ModelConfig``."""
    optimizer: str = "adamw"
    """Whose AdamW: each keeps its state in its own way."""


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, model: SGMIM, run: Path, position: Position) -> Path:
    """Write a checkpoint; every rank calls it. Returns the folder.

    Raises:
        UserError: on rank 0, if the disk is full or not writable; earlier checkpoints stay intact.
    """
    root = checkpoints(run)
    name = f"step_{position.step:06d}"
    temporary, final = root / f".incomplete-{name}", root / name
    chief = distributed.get_rank() == 0
    try:
        if chief:
            shutil.rmtree(temporary, ignore_errors=True)
        distributed.barrier()
        engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
        weights = full_weights(model)
        if chief:
            _save_full(weights, model, temporary / WEIGHTS)
            (temporary / STATE).write_text(json.dumps(asdict(position), indent=2) + "\n")
            _make_durable(*temporary.iterdir(), temporary)
        distributed.barrier()
        if chief:
            shutil.rmtree(final, ignore_errors=True)  # left by a save that died before `latest` named it
            os.rename(temporary, final)
            pointer = root / (LATEST + ".new")
            pointer.write_text(name + "\n")
            _make_durable(pointer, root)
            os.replace(pointer, root / LATEST)
            _make_durable(root)
        distributed.barrier()
    except (OSError, RuntimeError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_lost_peer(error) or not _is_write_failure(error):
            raise
        kept = latest_checkpoint(run)
        intact = "no earlier checkpoint exists" if kept is None else f"{kept} is intact; continue with --resume"
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write checkpoint {final}: {reason}; free space there. {intact}") from error
    return final


def _is_write_failure(error: Exception) -> bool:
    """torch.save reports a full disk as a bare RuntimeError of its archive writer; others are programming mistakes."""
    signs = ("inline_container", "PytorchStreamWriter", "write()")
    return not isinstance(error, RuntimeError) or any(sign in str(error) for sign in signs)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, expected: Position) -> Position:
    """Restore the engine from ``folder`` and return how far it had come.

    Raises:
        UserError: if the checkpoint belongs to another model, data list or set-up than ``expected``.
    """
    found = read_position(folder)
    for option, (was, now) in found.loader.differences(expected.loader).items():
        raise _other_settings(folder, option, was, now)
    for name in ("model", "world_size", "zero_stage", "precision", "samples_per_step", "optimizer"):
        was, now = getattr(found, name), getattr(expected, name)
        if was != now:
            if name == "model":
                name = ", ".join(f"model.{k}" for k in was if was[k] != now.get(k))
                was, now = ({k: v[k.removeprefix("model.")] for k in name.split(", ")} for v in (was, now))
            raise _other_settings(folder, name, was, now)
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise UserError(f"DeepSpeed found nothing to load in {folder}; write an earlier checkpoint's name into latest")
    return found


def _other_settings(folder: Path, name: str, was: object, now: object) -> UserError:
    return UserError(
        f"checkpoint {folder} was written with {name} = {was}, this run has {now}; "
        "resume with the same settings, or start anew in another --output"
    )


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
