"""Checkpoints of a run: ``checkpoints/step_000200/`` with DeepSpeed's shards, the weights and the position.

A checkpoint is written under a temporary name. When every rank's files are on the disk they are listed with their
checksums, the folder is renamed, and only then does ``latest`` name it and old ones go. Whatever interrupts a save,
``latest`` names a complete checkpoint.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, distributed, nn

from sgmim_fast import __version__
from sgmim_fast.config import RunConfig
from sgmim_fast.data.order import LoaderState
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.train.agreement import Agreement
from sgmim_fast.train.environment import commit, versions
from sgmim_fast.train.ranks import on_chief
from sgmim_fast.train.retention import check_space, clear_leftovers, make_durable, remove, remove_old
from sgmim_fast.train.run_folder import (
    FILES,
    LATEST,
    STATE,
    WEIGHTS,
    FileFact,
    checkpoint_name,
    checkpoints,
    latest_checkpoint,
    temporary_name,
)
from sgmim_fast.train.shard_writer import ShardWriter


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
    """Fields of the run's configuration."""
    versions: dict[str, str]
    """Of the packages and the code that wrote it."""
    skipped_steps: int = 0
    """Of the steps done, those whose gradient was not finite."""

    @classmethod
    def at(cls, step: int, loader: LoaderState, config: RunConfig) -> "Position":
        """The position of a run of this version."""
        made_by = {"sgmim_fast": __version__, "commit": commit(), **versions()}
        return cls(step, loader, json.loads(json.dumps(asdict(config))), made_by)


class Checkpoints:
    """Writes a run's checkpoints; a context manager that ends its thread. Every rank calls every method.

    Args:
        engine: whose state is saved; its checkpoint engine is replaced.
        model: whose weights are saved by name, besides.
        save: writes those weights.
        beside: write while training goes on; a checkpoint is then complete some steps after it was begun.
        say: told of every checkpoint that is complete.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        model: nn.Module,
        save: Callable[[dict[str, Tensor], Path], None],
        run: Path,
        agreement: Agreement,
        *,
        beside: bool,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._model, self._save = engine, model, save
        self._run, self._agreement, self._say = run, agreement, say
        self._writer = ShardWriter(beside)
        engine.checkpoint_engine = self._writer
        # A program beside the shards that nobody needs who has WEIGHTS; copying it fails in its own way on a full disk.
        engine._copy_recovery_script = lambda save_path: None
        self._begun: Position | None = None
        self._chief = distributed.get_rank() == 0

    def close(self) -> None:
        """End the thread; what it writes is finished, though not made a checkpoint."""
        self._writer.close()

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._writer.busy

    @property
    def open(self) -> bool:
        """Whether a checkpoint is begun and not complete."""
        return self._begun is not None

    def begin(self, position: Position) -> None:
        """Copy or write the state of now; with ``beside``, ``complete`` must follow when no rank is busy.

        Raises:
            UserError: on every rank, if the disk is full or not writable; earlier checkpoints stay intact.
        """
        if self.open:
            self.complete()
        root, temporary = checkpoints(self._run), self._temporary(position)
        self._begun = position
        self._on_chief(lambda: self._prepare(temporary))
        self._writer.begin(temporary)
        self._engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
        weights = full_weights(self._model)
        if self._chief:
            state = json.dumps(asdict(position), indent=2) + "\n"
            self._writer.put(temporary / WEIGHTS, lambda path: self._save(weights, path))
            self._writer.put(temporary / STATE, lambda path: path.write_text(state))

    def complete(self) -> Path:
        """Wait for every rank's files, then make them the run's latest checkpoint. Returns its folder.

        Raises:
            UserError: on every rank, if a file of any could not be written; earlier checkpoints stay intact.
        """
        assert self._begun is not None
        position = self._begun
        mine = (self._writer.wait(), None if self._writer.failure is None else _reason(self._writer.failure))
        every = self._agreement.gather(mine)
        facts = {name: fact for files, _ in every for name, fact in files.items()}
        failed = next((reason for _, reason in every if reason is not None), None)
        final = self._on_chief(lambda: self._publish(position, facts, failed))
        self._begun = None
        if self._chief:
            self._say(f"saved {final}")
        return final

    def _temporary(self, position: Position) -> Path:
        return checkpoints(self._run) / temporary_name(position.step)

    def _on_chief(self, work: Callable[[], Any]) -> Any:
        """Work of rank 0 whose failure to write ends every rank with one line."""

        def attempt() -> Any:
            try:
                return work()
            except (OSError, UserError) as error:
                assert self._begun is not None
                shutil.rmtree(self._temporary(self._begun), ignore_errors=True)
                final = checkpoints(self._run) / checkpoint_name(self._begun.step)
                kept = latest_checkpoint(self._run)
                intact = (
                    "no earlier checkpoint exists" if kept is None else f"{kept} is intact; continue with --resume auto"
                )
                raise UserError(
                    f"cannot write checkpoint {final}: {_reason(error)}; free space there. {intact}"
                ) from error

        return on_chief(attempt)

    def _prepare(self, temporary: Path) -> None:
        clear_leftovers(temporary.parent)
        check_space(self._run)
        temporary.mkdir(parents=True)

    def _publish(self, position: Position, facts: dict[str, FileFact], failed: str | None) -> Path:
        if failed is not None:
            raise UserError(failed)
        root, temporary = checkpoints(self._run), self._temporary(position)
        for name in sorted(facts):
            if not (temporary / name).is_file():
                raise UserError(
                    f"{name}, which another rank has written, is not there on rank 0's machine; --output must be on a "
                    "file system that all machines share"
                )
        listing = temporary / FILES
        listing.write_text(json.dumps(dict(sorted(facts.items())), indent=1) + "\n")
        make_durable(listing, temporary)
        final = root / checkpoint_name(position.step)
        if final.exists():  # left by a save that died before `latest` named it
            remove(final)
        os.rename(temporary, final)
        pointer = root / (LATEST + ".new")
        pointer.write_text(final.name + "\n")
        make_durable(pointer, root)
        os.replace(pointer, root / LATEST)
        make_durable(root)
        train = position.config["train"]
        remove_old(self._run, position.step, train["keep_last"], train["keep_every"])
        return final


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Restore model and optimizer from ``folder``; every rank calls it.

    The optimizer keeps the hyperparameters that it was made with: where they differ from the checkpoint's, that was
    allowed by name.
    """
    optimizer = engine.optimizer
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise UserError(f"DeepSpeed found nothing to load in {folder}; choose an earlier checkpoint with --resume PATH")
    # From a universal checkpoint stage 3 gives all groups the hyperparameters of the first, weight decay among them,
    # and all parameters one counter of steps, which then counts as many times as there are parameters.
    for group, hyperparameters in zip(optimizer.param_groups, own, strict=True):
        group.update(hyperparameters)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def read_position(folder: Path) -> Position:
    """The position that a checkpoint stores."""
    content = json.loads((folder / STATE).read_text())
    return Position(**content | {"loader": LoaderState(**content["loader"])})


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's fp32 state on the host, whatever DeepSpeed has done to it; a collective under ZeRO."""
    kept = model.state_dict(keep_vars=True)
    weights = {name: value.detach().to("cpu", copy=True) for name, value in model.named_buffers() if name in kept}
    for name, parameter in model.named_parameters():
        # Under ZeRO the exact weights are the optimizer's fp32 partitions, not the module's copy.
        full = (
            safe_get_full_fp32_param(parameter)
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            else None
        )
        weights[name] = (parameter.detach() if full is None else full).to("cpu", torch.float32, copy=True)
    return weights
