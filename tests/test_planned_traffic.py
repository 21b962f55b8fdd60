"""What `sgmim plan` says that DeepSpeed communicates and saves, against two ranks that do: byte by byte."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sgmim_fast.planning.checkpoints import checkpoint_size
from sgmim_fast.planning.parameters import ParameterSizes
from sgmim_fast.planning.traffic import step_traffic

ROOT = Path(__file__).parents[1]
RANKS = 2


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    output = tmp_path_factory.mktemp("traffic") / "cases.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run(
        [*launcher, "-m", "benchmarks.count_traffic", str(output)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {(line["stage"], line["precision"]): line for line in lines}


CASES = [*((stage, "fp32") for stage in range(4)), *((stage, "bf16") for stage in range(1, 4))]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_bytes_and_collectives(stage: int, precision: str, cases: dict[tuple[int, str], dict[str, Any]]) -> None:
    case = cases[stage, precision]
    parameters = ParameterSizes(tuple(map(tuple, case["groups"])))
    assert parameters.partitioned
    assert parameters.persistent
    options = {name: case[name] for name in ("accumulation", "bucket_size") if name in case}
    counted, calls, planned, planned_calls = (Counter[str]() for _ in range(4))
    for kind, payload in case["calls"]:
        counted[kind] += payload
        calls[kind] += 1
    for part in step_traffic(parameters, stage=stage, precision=precision, gpus=RANKS, **options):  # type: ignore[arg-type]
        planned[part.kind] += part.payload
        planned_calls[part.kind] += part.calls
    if stage == 3 and "bucket_size" in options:  # weights are let go and gathered again, by whole modules
        assert counted.pop("all-gather") == pytest.approx(planned.pop("all-gather"), rel=0.03)
        assert calls.pop("all-gather") <= planned_calls.pop("all-gather")
    assert counted == planned
    if stage < 2 or precision == "fp32":
        assert calls == planned_calls
    else:  # several buckets, filled in the order of the backward pass
        assert calls.keys() == planned_calls.keys()
        assert all(abs(calls[kind] - planned_calls[kind]) <= case["accumulation"] for kind in calls)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_checkpoints(stage: int, precision: str, cases: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Names and settings, some 50 KB a file, come on top of two million parameters."""
    case = cases[stage, precision]
    parameters = ParameterSizes(tuple(map(tuple, case["groups"])))
    size = checkpoint_size(parameters, stage=stage, precision=precision, gpus=RANKS)  # type: ignore[arg-type]
    shards = size.total - 4 * parameters.count  # model.safetensors is the trainer's
    assert shards < case["checkpoint_bytes"] < 1.01 * shards
