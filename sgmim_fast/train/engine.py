"""A training run from its configuration to its end, on DeepSpeed whatever the number of ranks."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sgmim_fast.data.order import BEGIN
from sgmim_fast.train.agreement import Agreement
from sgmim_fast.train.arguments import config_to_json
from sgmim_fast.train.bad_samples import BadSampleLog
from sgmim_fast.train.checkpoint import load_checkpoint, read_position
from sgmim_fast.train.choices import check_choices
from sgmim_fast.train.environment import describe_environment
from sgmim_fast.train.job import Job
from sgmim_fast.train.loop import Loop
from sgmim_fast.train.ranks import joined_ranks, on_chief, own_device
from sgmim_fast.train.reporting import Reporter
from sgmim_fast.train.resuming import check_same_run, starting_point
from sgmim_fast.train.rewinding import EVALUATIONS, METRICS, has_row
from sgmim_fast.train.stopping import StopRequest
from sgmim_fast.train.trainer import Trainer
from sgmim_fast.train.universal import make_universal, remove_universal
from sgmim_fast.train.watchdog import Watchdog


def run_job(job: Job[Any], recipe: str) -> bool:
    """Train as ``job`` says; every rank calls it.

    Returns False if the run was asked to stop by SIGTERM, or lost its launcher, and has saved its last step; True if it
    has come to its end.

    Raises:
        UserError: for bad input; what the output folder holds already is left as it is.
    """
    config = job.config
    run = Path(config.output)
    check_choices(config, own_device())
    job.check(own_device())
    job.open()
    with (
        StopRequest() as stop,
        joined_ranks(config.fault.collective_timeout) as device,
        Watchdog(run, distributed.get_rank(), config.fault.stall_timeout) as watchdog,
    ):
        agreement = Agreement(config.fault.collective_timeout)
        chief = distributed.get_rank() == 0
        watchdog.beat("reading checkpoints")
        checkpoint = on_chief(lambda: starting_point(run, config.resume, say))
        watchdog.beat("making the model")
        trainer = Trainer(job, run, device) if checkpoint is None else _go_on(job, run, device, checkpoint)
        start, total = trainer.position.step, trainer.last_step()
        put_off = start > 0 and job.evaluates_after(start, total, trainer.order)
        put_off = put_off and on_chief(lambda: not has_row(run, start, EVALUATIONS))
        if (
            start >= total and not put_off
        ):  # no error: a job that is queued again after its last step has nothing left to do
            if chief:
                say(f"{checkpoint} has done all {total} steps; --schedule.epochs or --train.max-steps ends it later")
            return True
        watchdog.beat("opening the data")
        tell = BadSampleLog(run, trainer.rank)
        place = trainer.position.loader.place
        with job.loader(
            rank=trainer.rank, world_size=trainer.world_size, place=place, device=device, tell=tell
        ) as loader:
            watchdog.loader_processes = loader.processes
            if chief:
                if start == 0:
                    _set_aside(run)
                _describe_run(run, job, recipe, device)
            with Reporter(run, job, start, total, device=device, ranks=trainer.world_size, chief=chief) as reporter:
                if chief:
                    tell.say = reporter.say
                finished = Loop(trainer, loader, reporter, agreement, stop, watchdog).run(total, evaluate_first=put_off)
                if not finished:
                    reporter.say("stopped as asked; --resume auto goes on")
                return finished


def say(line: str) -> None:
    """One line for the reader, before there is a progress bar."""
    print(line, flush=True)


def _go_on(job: Job[Any], run: Path, device: torch.device, checkpoint: Path) -> Trainer:
    """A trainer with the state of ``checkpoint``, which any number of ranks may have written."""
    found = read_position(checkpoint)
    here = job.order(distributed.get_world_size()).state(BEGIN, job.sha256)
    on_chief(lambda: check_same_run(checkpoint, found.config, job.config, (found.loader, here), job.fixed, job.free))
    # Stage 0 keeps all of the state on every rank.
    reshape = job.config.train.zero_stage > 0 and found.loader.world_size != here.world_size
    source = on_chief(lambda: make_universal(checkpoint)) if reshape else checkpoint
    trainer = Trainer(job, run, device, universal=reshape)
    load_checkpoint(trainer.engine, source)
    if reshape:
        on_chief(lambda: remove_universal(source))
        if trainer.rank == 0:
            say(f"{checkpoint} was written by {found.loader.world_size} rank(s) and goes on with {trainer.world_size}")
    trainer.position = replace(
        trainer.position, step=found.step, loader=found.loader, skipped_steps=found.skipped_steps
    )
    return trainer


def _set_aside(run: Path) -> None:
    """Rename what a run left that ended before its first checkpoint: it cannot be continued, only repeated."""
    for name in (METRICS, EVALUATIONS, "tensorboard"):
        if (run / name).exists():
            number = next(n for n in itertools.count(1) if not (run / f"{name}.{n}").exists())
            (run / name).rename(run / f"{name}.{number}")


def _describe_run(run: Path, job: Job[Any], recipe: str, device: torch.device) -> None:
    run.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(device, distributed.get_world_size())
    for name, text in (
        ("config.json", config_to_json(job.config, recipe, job.kind)),
        ("environment.json", json.dumps(environment, indent=2) + "\n"),
    ):
        temporary = run / (name + ".new")
        temporary.write_text(text)
        os.replace(temporary, run / name)
