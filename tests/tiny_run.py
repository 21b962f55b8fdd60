"""A run folder as pre-training writes it, of an untrained tiny model on five small pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sgmim_fast import create_model
from sgmim_fast.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from sgmim_fast.train.arguments import config_to_json
from sgmim_fast.weights import save_weights

TINY = ModelConfig(image_size=(64, 96), embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=2)
TRAIN = TrainConfig(batch_size=16, zero_stage=2)
NASTY = "<img src=x onerror=console.error(1)></script><script>console.error(2)</script>"


def make_pairs(folder: Path, channels: int = 1, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "structure").mkdir()
    y, x = np.mgrid[0:80, 0:120] / 120
    for i in range(count):
        wave = np.sin(7 * x * rng.uniform(1, 2) + 9 * y + i)
        rgb = 127 + 90 * np.stack([wave, np.roll(wave, 9, 1), y], 2) + rng.normal(0, 5, (80, 120, 3))
        name = f"scene {i} <b>"
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        if channels == 1:
            Image.fromarray(np.uint16(20000 + 15000 * wave)).save(folder / "structure" / f"{name}.png")
        else:
            np.save(folder / "structure" / f"{name}.npy", rgb[:, :, :1].repeat(channels, 2).astype(np.float32))
    return folder


def metric_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {"step": step, "epoch": step / 20, "image_loss": 0.8 / max(step, 1), "structure_loss": 1.2 / max(step, 1)}
    row |= {
        "loss": 2 / max(step, 1),
        "lr": 1e-4 * step,
        "grad_norm": 3.0,
        "images_per_second": 100.0 + step,
        "data_wait": 0.031,
    }
    return row | {"peak_memory_bytes": 3 << 30, "time": 2.0 * step} | changes


def make_run(folder: Path, model: ModelConfig = TINY, name: str = "my run", train: TrainConfig = TRAIN) -> Path:
    """The pairs are in ``folder / "data"``; further runs there are of the same."""
    data = folder / "data"
    if not data.exists():
        make_pairs(data, model.structure_channels)
    run = folder / name
    weights = run / "checkpoints" / "step_000040" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    config = PretrainConfig(model=model, data=DataConfig(path=str(data)), train=train)
    (run / "config.json").write_text(config_to_json(config, "swin_base_100ep", "pretrain"))
    (run / "environment.json").write_text(json.dumps({"python": "3.11.0", "world_size": 2, "command": NASTY}))
    rows = [metric_row(step) for step in range(2, 42, 2)]
    if model.guidance == "none":
        rows = [row | {"structure_loss": None} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    save_weights(create_model(model), weights, layout="simmim" if model.guidance == "none" else "sgmim")
    (run / "checkpoints" / "latest").write_text("step_000040\n")
    return run
