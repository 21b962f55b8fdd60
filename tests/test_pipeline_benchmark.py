"""The benchmark that feeds training steps from files; what it times is never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import pipeline, pipeline_turns
from benchmarks.clocks import HostClock
from benchmarks.deadline import NotReadyError
from benchmarks.pipeline_turns import Step
from benchmarks.step_arms import Variant
from sgmim_fast.models.sgmim import PretrainOutput
from tests.weight_cases import tiny

ROOT = Path(__file__).parents[1]
SMALL = ["--override", "image_size=64", "embed_dim=8", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)", "window_size=4"]
SMALL += ["--pairs", "12", "--size", "80", "--batch", "4", "--workers", "1"]
SMALL += ["--turn-seconds", "0.05", "--repetitions", "1", "--device", "cpu"]
WORDS = ["--backends", "torch", "--loaders", "torch"]
MISSING = ("deepspeed", "pydantic", "tyro", "xformers", "apex", "nvidia", "rich", "psutil", "scipy", "transformers")


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    monkeypatch.setattr("sys.argv", ["pipeline", *words, "--output", str(path)])
    with pytest.raises(SystemExit) as ended:
        pipeline.main()
    return int(ended.value.code or 0), [json.loads(line) for line in path.read_text().splitlines()]


def test_files_become_gradients_where_little_is_installed(tmp_path: Path) -> None:
    """With torch, triton, timm and what those bring alone, as on a machine that only times."""
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"no {{name}}", name=name)
sys.meta_path.insert(0, Missing())
from benchmarks import largest_batch, optimizers, parity, pipeline, train_step
if __name__ == "__main__":
    pipeline.main()
"""
    output = tmp_path / "rows.jsonl"
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script), *SMALL, *WORDS, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    (row,) = rows
    assert (row["benchmark"], row["arm"], row["loader"]) == ("pipeline", "torch", "torch")
    assert 0 < row["p20_images_per_second"] <= row["p50_images_per_second"]
    assert row["share_of_step"] == pytest.approx(row["p50_images_per_second"] / row["step_images_per_second"])
    assert row["loader_images_per_second"] > 0
    assert 0 < row["waiting_share"] < 1
    assert 0 < row["host_waiting_share"] < 1
    assert row["image_bytes"] > 100
    assert 0 < row["loss"] < 10


def test_what_cannot_run_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(loader: str) -> str:
        raise pipeline.UserError("NVIDIA DALI is not installed; pip install it")

    monkeypatch.setattr(pipeline, "decoder_version", missing)
    status, rows = run(monkeypatch, tmp_path / "rows.jsonl", *SMALL, "--backends", "torch", "--loaders", "dali")
    assert status == 0
    assert (rows[0]["benchmark"], rows[0]["loader"]) == ("pipeline_skipped", "dali")
    assert rows[0]["reason"] == "cannot run here: NVIDIA DALI is not installed; pip install it"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), 1), (NotReadyError("it was not ready after 3 s"), 0)]
)
def test_arms_that_fail_leave_a_row_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(pipeline, "measure", fails)
    found, rows = run(monkeypatch, tmp_path / "rows.jsonl", *SMALL, "--backends", "torch", "reference")
    assert found == status
    assert [(row["benchmark"], row["arm"]) for row in rows] == [
        ("pipeline_skipped", "torch"),
        ("pipeline_skipped", "reference"),
    ]
    assert str(error) in rows[0]["reason"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "--batch 0 must be 1 or more"),
        (["--backends", "timm"], "the arm 'timm' is of benchmarks.train_step alone"),
        (["--override", "colour=1"], "colour"),
        (["--pairs", "3", "--batch", "4"], "--pairs 3 do not fill one batch of 4"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["pipeline", *words, "--device", "cpu", "--output", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit) as ended:
        pipeline.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_waiting_is_what_lies_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks when told: batches take 3 s, moving them 1 s, steps 6 s."""
    now = 0.0

    def tick(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = HostClock()
    monkeypatch.setattr(clock, "mark", lambda: now)
    monkeypatch.setattr(pipeline_turns, "clock_of", lambda device: clock)
    monkeypatch.setattr(pipeline_turns.time, "perf_counter", lambda: now)

    def next_batch() -> dict[str, Tensor]:
        tick(3.0)
        return {"image": torch.zeros(5, 1)}

    def moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        tick(1.0)
        return batch

    class Slow(SimpleNamespace):
        def __call__(self, batch: dict[str, Tensor]) -> PretrainOutput:
            tick(6.0)
            return PretrainOutput(torch.tensor(2.5), torch.tensor(2.5), None)

    step: Any = Slow(device=torch.device("cpu"), moved=moved)
    turn, loss = pipeline_turns.steps(step, next_batch, seconds=35.0)
    assert now == 40.0
    assert turn.images_per_second == pytest.approx(0.5)
    assert turn.waiting_share == pytest.approx(0.4)
    assert turn.host_waiting_share == pytest.approx(0.3)
    assert loss.item() == 2.5


def test_steps_move_the_weights_only_when_told() -> None:
    step = Step(tiny("swin"), Variant.parse("torch"), "fp32", "adamw", torch.device("cpu"))
    mask = torch.tensor([[[True, False], [True, True]]])
    batch = {"image": torch.randn(1, 3, 64, 64), "structure": torch.randn(1, 1, 64, 64), "mask": mask}
    batch |= {"masked": torch.tensor([[0, 2, 3]]), "visible": torch.tensor([[1]])}
    first, again = step(batch).loss, step(batch).loss
    assert torch.equal(first, again)
    step.rate = 1e-3
    step(batch)
    assert step(batch).loss < first
