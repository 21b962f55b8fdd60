"""What DeepSpeed is told about memory changes no loss, and two real ranks hold the bytes that ``zero_layout`` says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sgmim_fast import UserError
from sgmim_fast.config import OptimizerConfig, PretrainConfig, TrainConfig
from sgmim_fast.train.deepspeed_settings import deepspeed_config, zero_settings
from sgmim_fast.train.dry_run import estimate
from sgmim_fast.train.pretrain_job import PretrainJob
from tests.engine_bytes import config
from tests.training_runs import free_port

LEVERS = {
    "offload_optimizer": True,
    "overlap_comm": "on",
    "bucket_size": 1001,
    "accumulation_steps": 2,
    "activation_checkpointing": [0, 2],
}
PLAIN: list[dict[str, Any]] = [
    {"zero_stage": 0, "precision": "fp32"},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 2, "precision": "fp32", "accumulation_steps": 2},
    {"zero_stage": 3, "precision": "bf16", "accumulation_steps": 2},
]
LEVERED = [
    {"zero_stage": 1, "precision": "fp32", **LEVERS},
    {"zero_stage": 2, "precision": "bf16", **LEVERS},
    {"zero_stage": 3, "precision": "fp32", **LEVERS},
]
CASES = [*PLAIN, *LEVERED]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each case's engine held and computed."""
    output = tmp_path_factory.mktemp("engines") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), str(Path(__file__).with_name("engine_bytes.py")), str(output), json.dumps(CASES)]
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", LEVERED, ids=lambda case: f"zero{case['zero_stage']}")
def test_levers_change_no_loss(case: dict[str, Any], found: list[dict[str, Any]]) -> None:
    twice = next(c for c in PLAIN if "accumulation_steps" in c and c["precision"] == case["precision"])
    expected = found[CASES.index(twice)]["losses"]
    rounding = 1e-5 if case["precision"] == "fp32" else 2e-3
    assert found[CASES.index(case)]["losses"] == pytest.approx(expected, rel=rounding)
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case['zero_stage']}-{case['precision']}")
def test_an_engine_holds_what_the_layout_says(case: dict[str, Any], found: list[dict[str, Any]]) -> None:
    got, said = found[CASES.index(case)], estimate(PretrainJob(config(case)), world_size=2)
    layout = said.layout
    assert got["weights"] == layout.weights
    assert got["master"] == layout.master
    assert got["optimizer"] == layout.optimizer
    assert layout.offloaded == case.get("offload_optimizer", False)
    exported = 4 * sum(said.parameters.values())
    assert said.checkpoint - exported == pytest.approx(got["shards"], rel=0.01)


def test_settings_in_words_of_deepspeed() -> None:
    train = {"bucket_size": 1001, "offload_optimizer": True}
    assert zero_settings(TrainConfig(zero_stage=2, **train)) == {  # type: ignore[arg-type]
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 1001,
        "allgather_bucket_size": 1002,
        "offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
    }
    assert zero_settings(TrainConfig(zero_stage=3)) == {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 500_000_000,  # these four are what DeepSpeed takes unless told
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    }
    whole = deepspeed_config(PretrainConfig(train=TrainConfig(precision="fp32", zero_stage=0)))
    assert whole["zero_optimization"] == {"stage": 0}
    assert whole["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("name", ["apex", "deepspeed"])
def test_gpu_optimizers_are_not_offloaded(name: Any) -> None:
    with pytest.raises(UserError, match=f"optimizer.implementation {name} steps on a GPU alone"):
        PretrainConfig(optimizer=OptimizerConfig(implementation=name), train=TrainConfig(offload_optimizer=True))
