"""The training loop, on DeepSpeed whatever the number of ranks."""

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, distributed

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.loading import build_loader, choose_loader, sample_order
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.order import BEGIN
from sgmim_fast.data.sources import open_pairs
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.arguments import config_to_json
from sgmim_fast.train.bad_samples import BadSampleLog
from sgmim_fast.train.checkpoint import Position, load_checkpoint, read_position, save_checkpoint
from sgmim_fast.train.choices import check_choices
from sgmim_fast.train.compiling import compile_step
from sgmim_fast.train.deepspeed_settings import deepspeed_config
from sgmim_fast.train.environment import describe_environment
from sgmim_fast.train.metrics import LossWindow, Reporter, Stopwatch, as_float, peak_memory_bytes
from sgmim_fast.train.optim import build_optimizer, learning_rate
from sgmim_fast.train.ranks import joined_ranks, on_chief, own_device
from sgmim_fast.train.resuming import check_same_run, starting_point


def pretrain(config: PretrainConfig, recipe: str) -> Path:
    """Pre-train as ``config`` says; every rank calls it. Returns the run's folder.

    Raises:
        UserError: for bad input; what the output folder holds already is left as it is.
    """
    run = Path(config.output)
    check_choices(config, own_device())
    pairs = open_pairs(config.data.path, structure=config.model.guidance != "none")
    with joined_ranks() as device:
        chief = distributed.get_rank() == 0
        checkpoint = on_chief(lambda: starting_point(run, config.resume, say))
        trainer = _Trainer(config, run, pairs, device)
        if checkpoint is not None:
            found = read_position(checkpoint)
            check_same_run(checkpoint, found.config, config, (found.loader, trainer.position.loader))
            load_checkpoint(trainer.engine, checkpoint)
            trainer.position = replace(trainer.position, step=found.step, loader=found.loader)
        start, total = trainer.position.step, trainer.last_step()
        if start >= total:  # no error: a job that is queued again after its last step has nothing left to do
            if chief:
                say(f"{checkpoint} has done all {total} steps; --schedule.epochs or --train.max-steps ends it later")
            return run
        tell = BadSampleLog(run, trainer.rank)
        place = trainer.position.loader.place
        with build_loader(
            pairs, config, rank=trainer.rank, world_size=trainer.world_size, place=place, device=device, tell=tell
        ) as loader:
            if chief:
                if start == 0:
                    _set_aside(run)
                _describe_run(run, config, recipe, device)
            with Reporter(run, start, total, chief) as reporter:
                if chief:
                    tell.say = reporter.say
                trainer.train(loader, reporter, total)
    return run


def say(line: str) -> None:
    """One line for the reader, before there is a progress bar."""
    print(line, flush=True)


def _set_aside(run: Path) -> None:
    """Rename what a run left that ended before its first checkpoint: it cannot be continued, only repeated."""
    for name in ("metrics.jsonl", "tensorboard"):
        if (run / name).exists():
            number = next(n for n in itertools.count(1) if not (run / f"{name}.{n}").exists())
            (run / name).rename(run / f"{name}.{number}")


def _describe_run(run: Path, config: PretrainConfig, recipe: str, device: torch.device) -> None:
    run.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(device, distributed.get_world_size())
    for name, text in (
        ("config.json", config_to_json(config, recipe)),
        ("environment.json", json.dumps(environment, indent=2) + "\n"),
    ):
        temporary = run / (name + ".new")
        temporary.write_text(text)
        os.replace(temporary, run / name)


class _Trainer:
    """One rank's model and optimizer inside DeepSpeed's engine, and the loop over its batches."""

    def __init__(self, config: PretrainConfig, run: Path, pairs: Pairs, device: torch.device) -> None:
        self.config, self.run, self.pairs, self.device = config, run, pairs, device
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.order = sample_order(pairs, config, self.world_size)
        torch.manual_seed(config.train.seed)
        train = config.train
        self.task = PretrainTask(
            config.model, train.backend, train.attention, train.norm, device, train.activation_checkpointing
        )
        optimizer = build_optimizer(self.task, config.optimizer, device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.task, optimizer=optimizer, config=deepspeed_config(config)
        )
        if train.compile:
            compile_step(self.task)
        self.position = Position.at(0, self.order.state(BEGIN, pairs.sha256), config)

    def last_step(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.config.schedule.epochs * self.order.steps_per_epoch
        return total if self.config.train.max_steps is None else min(total, self.config.train.max_steps)

    def summary(self, total: int) -> str:
        """One line that says what is about to happen."""
        model, train, start = self.config.model, self.config.train, self.position.step
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.parameters())
        loader, why = choose_loader(self.pairs, self.config)
        return (
            f"{model.encoder} encoder, guidance {model.guidance}, {parameters / 1e6:.1f} M parameters; "
            f"{len(self.pairs)} pairs through {loader} ({why}), {self.order.step_size} a step on {self.world_size} "
            f"{self.device.type} rank(s), {train.precision}, ZeRO {train.zero_stage}"
            f"{', compiled' if train.compile else ''}; {total} steps" + (f", from step {start}" if start else "")
        )

    def train(self, loader: Loader, reporter: Reporter, total: int) -> None:
        """Optimizer steps from the position to ``total``, with metric rows and checkpoints on the way."""
        train, start, begin = self.config.train, self.position.step, self.position.loader.place
        batches, losses, watch = iter(loader), LossWindow(self.device), Stopwatch()
        reporter.say(self.summary(total))
        logged = start
        for step in range(start, total):
            rate = self._set_rate(step)
            # Drop path draws from a stream of (seed, step, rank), so a resumed run draws the same.
            torch.manual_seed((train.seed * 1_000_003 + step) * self.world_size + self.rank)
            norm = self._optimizer_step(batches, losses, watch)
            done = step + 1
            reporter.step(done)
            if done % train.log_every == 0 or done == total:
                loss, image_loss, structure_loss, bad_samples = losses.over_ranks(loader.substitutes.count)
                reporter.row(
                    {
                        "step": done,
                        "epoch": done / self.order.steps_per_epoch,
                        "loss": loss,
                        "image_loss": image_loss,
                        "structure_loss": None if self.config.model.guidance == "none" else structure_loss,
                        "lr": rate,
                        "grad_norm": as_float(norm),
                        **watch.lap((done - logged) * self.order.step_size),
                        "bad_samples": int(bad_samples),
                        "peak_memory_bytes": peak_memory_bytes(self.device),
                    }
                )
                logged = done
            if done % train.checkpoint_every == 0 or done == total:
                place = self.order.advance(begin, done - start)
                position = replace(self.position, step=done, loader=self.order.state(place, self.pairs.sha256))
                reporter.say(f"saved {save_checkpoint(self.engine, self.task.model, self.run, position)}")

    def _set_rate(self, step: int) -> float:
        config = self.config
        rate = learning_rate(step, self.order.steps_per_epoch, self.order.step_size, config.optimizer, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _optimizer_step(
        self, batches: Iterator[Mapping[str, Tensor]], losses: LossWindow, watch: Stopwatch
    ) -> float | Tensor | None:
        """All micro-steps of one optimizer step; returns the gradient norm before clipping."""
        stage_0 = self.config.train.zero_stage == 0
        norm: float | Tensor | None = None
        for _ in range(self.config.train.accumulation_steps):
            before = time.perf_counter()
            batch = next(batches)
            watch.waited(time.perf_counter() - before)
            out = self.engine({name: value.to(self.device, non_blocking=True) for name, value in batch.items()})
            self.engine.backward(out.loss)
            losses.add(out)
            if stage_0 and self.engine.is_gradient_accumulation_boundary():
                # Stage 0 clips without telling the norm.
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.task.parameters() if p.grad is not None])
            self.engine.step()
        return norm if stage_0 else self.engine.get_global_grad_norm()
