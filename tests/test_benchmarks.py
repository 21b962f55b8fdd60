"""The benchmarks run as documented, in a size for tests; what they time is never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory
from tests.test_models import tiny

ROOT = Path(__file__).parents[1]
TINY = ["image_size=64", "embed_dim=8", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)", "window_size=4"]


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.train_step", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_train_step_records_a_row_for_each_backend(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    words = ["--backends", "reference", "torch", "torch+sdpa", "--batch", "2", "--steps", "2", "--output", str(output)]
    done = bench("--override", *TINY, *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["backend"], row["attention"]) for row in rows] == [
        ("reference", "auto"),
        ("torch", "auto"),
        ("torch", "sdpa"),
    ]
    for row in rows:
        assert 0 < row["p20_seconds"] <= row["p50_seconds"] <= row["p80_seconds"]
        assert row["loss_deviation"] < 1e-5
        assert row["gradient_norm_deviation"] < 1e-4
        assert row["step_memory_bytes"] > 0
        assert row["model_flops"] > 1e6
        assert {"commit", "torch", "cpu", "command"} <= row["environment"].keys()


def test_a_backend_that_cannot_run_is_not_measured(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    nowhere = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = bench("--override", *TINY, "--backends", "triton", "--output", str(output), **nowhere)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "triton" in done.stderr
    assert not output.exists()


def test_memory_records_a_row_for_each_choice_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.MODELS, "tiny", tiny("vit", depths=(3,)))
    output = tmp_path / "rows.jsonl"
    words = ["memory", "--model", "tiny", "--stages", "none", "0", "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(output)])
    memory.main()
    kept, again = (json.loads(line) for line in output.read_text().splitlines())
    assert (kept["activation_checkpointing"], again["activation_checkpointing"]) == ([], [0])
    assert again["activation_bytes"] < kept["activation_bytes"]
    for row in (kept, again):
        assert row["gradients_equal"]
        assert row["estimated_step_memory_bytes"] == row["step_memory_bytes"]
        assert {"commit", "torch", "cpu", "command"} <= row["environment"].keys()
