"""ZeRO-3 with every parameter partitioned: whatever a forward or backward uses must have been fetched for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import make_pairs

# DeepSpeed never partitions small parameters unless told to, and all of a tiny model's are small.
PARTITION_ALL = """
from sgmim_fast import pretrain
from sgmim_fast.train import trainer

usual = trainer.deepspeed_config

def configured(config):
    found = usual(config)
    found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return found

trainer.deepspeed_config = configured
pretrain.main()
"""
ENCODERS = {
    "swin": "swin --model.embed-dim 16 --model.depths 1 1 1 1 --model.num-heads 1 2 2 4",
    "vit": "vit --model.patch-size 16 --model.embed-dim 32 --model.depths 2 --model.num-heads 2",
}


def losses(data: Path, output: Path, start: list[str], words: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, *start, "--recipe", "demo", "--data", str(data), "--output", str(output), *words]
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_partitioned_parameters_train_as_whole_ones(encoder: str, tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data")
    words = [
        "--model.encoder",
        *ENCODERS[encoder].split(),
        "--model.image-size",
        "64",
        "--model.window-size",
        "4",
        "--data.workers",
        "0",
    ]
    words += ["--train.batch-size", "2", "--train.log-every", "1", "--train.max-steps", "3"]
    whole = losses(data, tmp_path / "whole", ["-m", "sgmim_fast.pretrain"], [*words, "--train.zero-stage", "1"])
    parts = losses(data, tmp_path / "parts", ["-c", PARTITION_ALL], [*words, "--train.zero-stage", "3"])
    assert_same(whole, parts)
    if encoder == "vit":  # its bias table belongs to no block: what is computed again must find it
        levers = ["--train.activation-checkpointing", "0", "--train.offload-optimizer", "--train.overlap-comm", "on"]
        words += ["--train.zero-stage", "3", "--train.bucket-size", "1001", *levers]
        assert_same(whole, losses(data, tmp_path / "levers", ["-c", PARTITION_ALL], words))


def assert_same(whole: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(whole, other, strict=True):
        for name in ("loss", "image_loss", "structure_loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])
