"""Where a run begins: anew, or at a checkpoint that is whole and was written with the same settings."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgmim_fast.config import RunConfig
from sgmim_fast.data.order import LoaderState
from sgmim_fast.errors import UserError
from sgmim_fast.train.run_folder import STATE, checkpoints, damage, list_checkpoints

FREE = frozenset({
    "output", "resume", "allow_changes", "dry_run", "data.path", "data.workers", "data.loader", "data.decode_on",
    "data.max_bad_share", "data.shuffle_buffer", "train.seed", "train.batch_size", "train.accumulation_steps",
    "train.backend", "train.attention", "train.norm", "train.compile", "train.max_steps", "train.log_every",
    "train.checkpoint_every", "train.keep_last", "train.keep_every", "train.async_checkpoint",
    "train.activation_checkpointing", "train.overlap_comm", "train.bucket_size", "fault.collective_timeout",
    "fault.stall_timeout", "fault.max_skipped_steps", "monitor.wandb", "monitor.wandb_project",
    "monitor.profile_steps", "monitor.peak_tflops",
})  # fmt: skip
"""Settings that change no result but by rounding, or that are compared as what they amount to."""
FIXED = frozenset({"train.zero_stage", "train.precision", "train.offload_optimizer", "optimizer.implementation"})
"""Settings that the stored state of model or optimizer has the shape of; a kind of run has more of them."""


def starting_point(run: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that a run goes on from; None if it begins anew. Reads checkpoints through, on one rank.

    Args:
        resume: "none", "auto", or a checkpoint's or a run's folder.
        say: told of what was chosen otherwise than one would think.

    Raises:
        UserError: if the run's folder holds a run that is not to be continued, or no checkpoint is intact.
    """
    there = list_checkpoints(run)
    if resume == "none":
        if there:
            raise UserError(f"{run} already holds a run; continue it with --resume auto, or choose another --output")
        return None
    if resume == "auto":
        if there:
            return _newest_intact(there, say)
        say(f"{run} has no checkpoint: the run begins anew")
        return None
    path = Path(resume)
    if (path / STATE).is_file():
        if reason := damage(path):
            raise UserError(f"--resume {path} is damaged: {reason}; choose another checkpoint, or --resume auto")
        return path
    if not (found := list_checkpoints(path)):
        raise UserError(f"--resume {path} is neither a checkpoint nor a run that has one; use auto, none or a path")
    return _newest_intact(found, say)


def _newest_intact(folders: list[Path], say: Callable[[str], None]) -> Path:
    for folder in folders:
        reason = damage(folder)
        if not reason:
            return folder
        say(f"warning: {folder} is damaged ({reason}); trying the one before it")
    raise UserError(
        f"no checkpoint in {checkpoints(folders[0].parents[1])} is intact; restore one, or choose another --output"
    )


def check_same_run(
    folder: Path,
    was: Mapping[str, Any],
    config: RunConfig,
    loaders: tuple[LoaderState, LoaderState],
    fixed: Sequence[str],
    free: Sequence[str],
) -> None:
    """Refuse to go on from a checkpoint with settings that change the mathematics, unless they are named.

    Args:
        was: fields of the configuration that the checkpoint was written with.
        loaders: the checkpoint's state and this run's.
        fixed: see ``Job.fixed``; beside FIXED.
        free: see ``Job.free``; beside FREE.

    Raises:
        UserError: for the first difference that is not allowed.
    """
    before, now = _flat(was), _flat(json.loads(json.dumps(asdict(config))))  # tuples become lists, as in the file
    old, new = ({name.partition(".")[0] for name in settings} for settings in (before, now))
    if old - new and new - old:
        raise UserError(
            f"checkpoint {folder} is of another kind of run (it has settings {' '.join(sorted(old - new))}, "
            f"this run has {' '.join(sorted(new - old))}); choose another --output"
        )
    for name in config.allow_changes:
        if name not in now:
            raise UserError(f"--allow-changes {name} is no setting; name them as in schedule.epochs optimizer.lr")
    changed = [
        name
        for name in sorted(now)
        if name in before and before[name] != now[name] and name not in FREE and not name.startswith(tuple(free))
    ]
    for name in changed:
        if name in FIXED or name.startswith(tuple(fixed)):
            raise _other(folder, name, before[name], now[name])
    there, here = loaders
    if there.step_size != here.step_size:
        raise UserError(
            f"checkpoint {folder} was written with {there.step_size} pairs a step, this run has {here.step_size} "
            f"({here.world_size} rank(s) x --train.batch-size {here.batch_size} x --train.accumulation-steps "
            f"{here.accumulation_steps}); choose these so that their product stays {there.step_size}"
        )
    for name, (first, second) in there.differences(here).items():
        raise _other(folder, name, first, second)
    for name in changed:
        if name not in config.allow_changes:
            raise _other(folder, name, before[name], now[name], f", or allow it with --allow-changes {name}")


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _other(folder: Path, name: str, was: object, now: object, hint: str = "") -> UserError:
    return UserError(
        f"checkpoint {folder} was written with {name} = {was}, this run has {now}; "
        f"resume with the same settings{hint}, or start anew in another --output"
    )
