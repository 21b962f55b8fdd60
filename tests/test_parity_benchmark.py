"""The benchmark that trains the plain path and a fast one side by side."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import parity
from benchmarks.deadline import Deadline
from sgmim_fast.models.sgmim import PretrainOutput
from tests.kernel_cases import DEVICE

SMALL = ["--override", "image_size=64", "embed_dim=8", "depths=(1,1)", "num_heads=(1,1)", "window_size=4"]
SMALL += ["--pairs", "12", "--batch", "2", "--workers", "0", "--device", DEVICE, "--precision", "fp32"]


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr("sys.argv", ["parity", *SMALL, *words, "--output", str(path)])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    (line,) = path.read_text().splitlines()
    return int(ended.value.code or 0), json.loads(line)


def test_fast_paths_learn_as_the_plain_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--steps", "2", "--last", "2", "--backends", "torch", "triton"]
    status, row = run(monkeypatch, tmp_path / "rows.jsonl", *words)
    assert status == 0
    assert (row["steps"], row["points"]) == (2, [1, 2])
    plain, torch_, triton, nudged, other = row["curves"]
    assert [(curve["arm"], curve["seed"], curve["nudged"]) for curve in row["curves"]] == [
        ("reference", 0, False), ("torch", 0, False), ("triton", 0, False), ("reference", 0, True),
        ("reference", 1, False),
    ]  # fmt: skip
    for name in parity.LOSSES:
        assert plain[name][0] != plain[name][1]
        assert torch_[name] == pytest.approx(plain[name], rel=1e-4)
        assert triton[name] == pytest.approx(plain[name], rel=1e-4)
        assert nudged[name] == pytest.approx(plain[name], rel=1e-4)
        assert other[name] != pytest.approx(plain[name], rel=1e-3)
        mean = sum(plain[name]) / 2
        assert row["final"][0][name] == pytest.approx(mean, rel=1e-5)
    assert row["first_deviation"]["torch"] < 1e-5
    assert row["within_spread"] == {"torch": True, "triton": True}
    assert row["spread"]["loss"] > 10 * row["differences"]["triton"]["loss"]
    assert 0 < row["rounding"]["loss"] < row["spread"]["loss"] / 10


def test_an_arm_that_learns_something_else_is_beyond_the_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = parity.History.take

    def wrong(self: parity.History, number: int, batch: dict[str, torch.Tensor], rate: float) -> None:
        take(self, number, batch, rate)
        if self.arm == "torch":
            self.losses[number] += 0.1 * number

    monkeypatch.setattr(parity.History, "take", wrong)
    status, row = run(monkeypatch, tmp_path / "rows.jsonl", "--steps", "8", "--last", "1", "--backends", "torch")
    assert status == 1
    assert row["within_spread"] == {"torch": False}
    assert row["first_deviation"]["torch"] < 1e-5
    assert row["largest_deviation"]["torch"] > 0.1


def test_products_in_fp8_are_held_against_those_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--steps", "2", "--last", "2", "--backends", "torch", "torch+float8", "--precision", "bf16"]
    _, row = run(monkeypatch, tmp_path / "rows.jsonl", *words, "--seeds", "0", "1", "2", "--nudged", "0")
    plain, gathered, fp8, *others = row["curves"]
    assert (gathered["arm"], fp8["arm"]) == ("torch", "torch+float8")
    assert [curve["seed"] for curve in others] == [1, 2]
    assert fp8["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert fp8["loss"] != gathered["loss"]


def test_arms_that_cannot_run_here_leave_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    status, row = run(monkeypatch, path, "--steps", "2", "--last", "2", "--backends", "torch+float8")
    assert status == 0
    assert row["benchmark"] == "parity_skipped"
    assert "is for --precision bf16" in row["reasons"]["torch+float8"]
    assert "torch+float8: left out" in capsys.readouterr().out


def test_trainings_end_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadline, "left", lambda self: 0.0)
    status, row = run(monkeypatch, tmp_path / "rows.jsonl", "--steps", "8", "--last", "2", "--backends", "torch")
    assert status in (75, 1)  # to be gone on with; or, of so few steps, beyond the spread
    assert status == (75 if row["within_spread"]["torch"] else 1)
    assert (row["steps"], row["planned_steps"], row["points"]) == (2, 8, [1, 2])


def test_curves_are_means_between_their_points() -> None:
    step: Any = SimpleNamespace(device=torch.device("cpu"))

    def history(arm: str, seed: int, offset: float) -> parity.History:
        one = parity.History(arm, seed, step, 300)
        for number in range(300):
            value = torch.tensor(number + offset, dtype=torch.float64)
            one.step = lambda batch, value=value: PretrainOutput(value, value, None)  # type: ignore[assignment,misc]
            one.take(number, {}, 0.0)
        return one

    arms = [history("reference", 0, 1.0), history("torch", 0, 1.5), history("reference", 1, 3.0)]
    options = argparse.Namespace(steps=300, last=50, backends=["torch"])
    row = parity.judged(arms, 300, options)
    assert row["points"] == list(range(3, 301, 3))
    assert row["curves"][0]["loss"][:2] == [2.0, 5.0]
    assert "structure_loss" not in row["curves"][0]
    assert row["final"][0]["loss"] == sum(range(251, 301)) / 50
    assert row["differences"] == {"torch": {"loss": 0.5, "image_loss": 0.5}}
    assert row["spread"] == {"loss": 2.0, "image_loss": 2.0}
    assert row["within_spread"] == {"torch": True}
    assert row["first_deviation"]["torch"] == 0.5
    assert row["largest_deviation"]["torch"] == 0.5
    third = parity.judged([*arms, history("reference", 2, 4.0)], 300, options)
    assert third["spread"]["loss"] == 3.0
    assert third["rounding"] is None
    nudged = history("reference", 0, 1.25)
    nudged.nudged = True
    with_nudged = parity.judged([*arms[:2], nudged, arms[2]], 300, options)
    assert with_nudged["rounding"] == {"loss": 0.25, "image_loss": 0.25}
    assert {**with_nudged, **{name: row[name] for name in ("curves", "final", "rounding")}} == row
    assert third["differences"] == row["differences"]
    assert [(curve["arm"], curve["seed"]) for curve in third["curves"][1:]] == [
        ("torch", 0), ("reference", 1), ("reference", 2)
    ]  # fmt: skip
    lost = history("torch", 0, float("nan"))
    assert parity.judged([arms[0], lost, arms[2]], 300, options)["within_spread"] == {"torch": False}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "3"], "--last 50 is more than --steps 3"),
        (["--seeds", "1", "1"], "--seeds 1 1 must be two or more that differ"),
        (["--nudged", "-1"], "--nudged -1 must be 0 or more"),
        (["--seeds", "1"], "--seeds 1 must be two or more"),
        (["--backends", "reference"], "arms are torch or triton"),
        (["--backends", "torch+fast"], "'fast' in 'torch+fast' is unknown"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["parity", *words, "--output", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
