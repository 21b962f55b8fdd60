"""The training loop, on DeepSpeed whatever the number of ranks."""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, distributed

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.manifest import Manifest, read_manifest
from sgmim_fast.data.torch_loader import build_torch_loader
from sgmim_fast.errors import UserError
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.arguments import config_to_json
from sgmim_fast.train.checkpoint import Position, latest_checkpoint, load_checkpoint, save_checkpoint
from sgmim_fast.train.environment import describe_environment
from sgmim_fast.train.metrics import LossWindow, Reporter, Stopwatch, as_float, peak_memory_bytes
from sgmim_fast.train.optim import build_optimizer, learning_rate

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def pretrain(config: PretrainConfig, recipe: str) -> Path:
    """Pre-train as ``config`` says; every rank calls it. Returns the run's folder.

    Raises:
        UserError: for bad input, before anything in the output folder is touched.
    """
    run = Path(config.output)
    manifest = read_manifest(config.data.path, structure=config.model.guidance != "none")
    checkpoint = _starting_point(run, config.resume)
    device = start_process_group()
    try:
        _train(config, recipe, run, manifest, checkpoint, device)
    finally:
        distributed.destroy_process_group()
    return run


def _starting_point(run: Path, resume: bool) -> Path | None:
    checkpoint = latest_checkpoint(run)
    if resume and checkpoint is None:
        raise UserError(f"--resume: {run} has no checkpoint; leave --resume out to start anew")
    if not resume and (run / "metrics.jsonl").exists():
        raise UserError(f"{run} already holds a run; continue it with --resume, or choose another --output")
    return checkpoint if resume else None


def start_process_group() -> torch.device:
    """Join the ranks (NCCL on GPUs, gloo on CPUs) and choose this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Only inference uses this op; building it would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank, local_size = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "0"))
    )
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ):
        os.environ.setdefault(name, value)  # started without a launcher: one rank
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        ranks_here = local_size or int(os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return device


def deepspeed_config(config: PretrainConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run."""
    return {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }


def _train(
    config: PretrainConfig, recipe: str, run: Path, manifest: Manifest, checkpoint: Path | None, device: torch.device
) -> None:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(config.train.seed)
    task = PretrainTask(config.model, config.train.backend)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=task, optimizer=build_optimizer(task, config.optimizer), config=deepspeed_config(config)
    )
    position = Position(
        step=0,
        world_size=world_size,
        zero_stage=config.train.zero_stage,
        precision=config.train.precision,
        samples_per_step=config.train.batch_size * config.train.accumulation_steps * world_size,
        seed=config.train.seed,
        manifest=manifest.sha256,
        model=json.loads(json.dumps(dataclasses.asdict(config.model))),
    )
    start = 0 if checkpoint is None else load_checkpoint(engine, checkpoint, position)
    with build_torch_loader(
        manifest, config, rank=rank, world_size=world_size, start_step=start, pin_memory=device.type == "cuda"
    ) as loader:
        total = config.schedule.epochs * loader.steps_per_epoch
        total = total if config.train.max_steps is None else min(total, config.train.max_steps)
        if start >= total:
            raise UserError(
                f"{checkpoint} has done all {total} steps; raise --schedule.epochs or --train.max-steps to go on"
            )
        if rank == 0:
            _describe_run(run, config, recipe, device, world_size)
        with Reporter(run, start, total, chief=rank == 0) as reporter:
            reporter.say(_summary(config, task, manifest, world_size, device, start, total))
            batches = iter(loader)
            losses, watch = LossWindow(device), Stopwatch()
            logged = start
            for step in range(start, total):
                rate = learning_rate(
                    step, loader.steps_per_epoch, position.samples_per_step, config.optimizer, config.schedule
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # Drop path draws from a stream of (seed, step, rank), so a resumed run draws the same.
                torch.manual_seed((config.train.seed * 1_000_003 + step) * world_size + rank)
                grad_norm = _optimizer_step(engine, batches, config, device, losses, watch)
                done = step + 1
                reporter.step(done)
                if done % config.train.log_every == 0 or done == total:
                    loss, image_loss, structure_loss = losses.mean_over_ranks()
                    row: dict[str, float | int | None] = {
                        "step": done,
                        "epoch": done / loader.steps_per_epoch,
                        "loss": loss,
                        "image_loss": image_loss,
                        "structure_loss": None if config.model.guidance == "none" else structure_loss,
                        "lr": rate,
                        "grad_norm": as_float(grad_norm),
                        **watch.lap((done - logged) * position.samples_per_step),
                        "peak_memory_bytes": peak_memory_bytes(device),
                    }
                    logged = done
                    reporter.row(row)
                if done % config.train.checkpoint_every == 0 or done == total:
                    folder = save_checkpoint(engine, task.model, run, dataclasses.replace(position, step=done))
                    reporter.say(f"saved {folder}")


def _optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: Iterator[Mapping[str, Tensor]],
    config: PretrainConfig,
    device: torch.device,
    losses: LossWindow,
    watch: Stopwatch,
) -> float | Tensor | None:
    """All micro-steps of one optimizer step; returns the gradient norm before clipping."""
    norm: float | Tensor | None = None
    for _ in range(config.train.accumulation_steps):
        before = time.perf_counter()
        batch = next(batches)
        watch.waited(time.perf_counter() - before)
        out = engine({name: value.to(device, non_blocking=True) for name, value in batch.items()})
        engine.backward(out.loss)
        losses.add(out)
        if config.train.zero_stage == 0 and engine.is_gradient_accumulation_boundary():
            # Stage 0 clips without telling the norm.
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.step()
    return norm if config.train.zero_stage == 0 else engine.get_global_grad_norm()


def _describe_run(run: Path, config: PretrainConfig, recipe: str, device: torch.device, world_size: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(device, world_size)
    for name, text in (
        ("config.json", config_to_json(config, recipe)),
        ("environment.json", json.dumps(environment, indent=2) + "\n"),
    ):
        temporary = run / (name + ".new")
        temporary.write_text(text)
        os.replace(temporary, run / name)


def _summary(
    config: PretrainConfig,
    task: PretrainTask,
    manifest: Manifest,
    world_size: int,
    device: torch.device,
    start: int,
    total: int,
) -> str:
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in task.parameters())
    batch = config.train.batch_size * config.train.accumulation_steps * world_size
    begin = "" if start == 0 else f", from step {start}"
    return (
        f"{config.model.encoder} encoder, guidance {config.model.guidance}, {parameters / 1e6:.1f} M parameters; "
        f"{len(manifest)} pairs, {batch} a step on {world_size} {device.type} rank(s), "
        f"{config.train.precision}, ZeRO {config.train.zero_stage}; {total} steps{begin}"
    )
