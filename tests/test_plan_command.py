"""`sgmim plan` as a user meets it: input, JSON, warnings, errors; and docs/scaling.md shows what it prints."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling_table import markdown
from sgmim_fast.cli import main

ROOT = Path(__file__).parents[1]
GIVEN = ["--images-per-second", "1000", "--batch", "128", "--model", "sgmim_swin_base"]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["plan", *words])
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    found = json.loads(plan(capsys, *GIVEN, *words, "--json"))
    return found["rows"], found


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def write_rows(path: Path, *changes: dict[str, Any]) -> Path:
    row = {
        "benchmark": "train_step",
        "model": "sgmim_vit_base",
        "override": ["embed_dim=384", "num_heads=(6,)"],
        "batch": 64,
        "precision": "bf16",
        "backend": "triton",
        "compiled": True,
        "images_per_second": 800.0,
        "ceilings": {"copy_bytes_per_second": 2e12},
        "environment": {"gpu": "NVIDIA H100"},
    }
    path.write_text("".join(json.dumps(row | change) + "\n" for change in changes))
    return path


def test_rows_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    found, everything = rows(capsys, "--gpus", "64", "1", "8", "--price", "2", "--precision", "fp32")
    assert [(row["gpus"], row["stage"]) for row in found] == [(g, s) for g in (1, 8, 64) for s in range(4)]
    for row in found:
        assert row["global_batch"] == 128 * row["gpus"]
        step = row["compute_seconds"] + row["exposed_seconds"] + row["data_wait_seconds"]
        assert row["step_seconds"] == pytest.approx(step)
        assert row["images_per_second"] == pytest.approx(row["global_batch"] / step)
        assert row["efficiency"] == pytest.approx(row["images_per_second"] / row["gpus"] / 1000)
        assert row["node_pairs_per_second"] == pytest.approx(row["images_per_second"] / row["nodes"])
        assert row["steps_per_epoch"] == 1_281_167 // row["global_batch"]
        assert row["cost"] == pytest.approx(row["total_hours"] * row["gpus"] * 2)
        assert row["epoch_hours"] * 100 < row["total_hours"]
        assert (row["communication_seconds"] == 0) == (row["gpus"] == 1)
    by_stage = {stage: [row["efficiency"] for row in found if row["stage"] == stage] for stage in range(4)}
    assert all(sorted(values, reverse=True) == values for values in (by_stage[0], by_stage[3]))
    assert everything["inputs"]["parameters"] > 100e6
    assert "--price" not in everything["assumptions"]
    assert "450 GB/s" in everything["assumptions"]["--intra-node"]


def test_what_is_given_is_not_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    slow, everything = rows(capsys, "--gpus", "16", "--inter-node", "100", "--stages", "1")
    fast, _ = rows(capsys, "--gpus", "16", "--inter-node", "400", "--stages", "1")
    assert slow[0]["communication_seconds"] > 2 * fast[0]["communication_seconds"]
    assert "--inter-node" not in everything["assumptions"]


def test_a_global_batch_is_divided(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--global-batch", "384", "--accumulation", "3", "--stages", "1", "--gpus", "1", "8", "128", "256")
    found, everything = rows(capsys, *words)
    assert [(row["gpus"], row["batch"], row["global_batch"]) for row in found] == [
        (1, 128, 384),
        (8, 16, 384),
        (128, 1, 384),
    ]
    assert len({row["steps"] for row in found}) == 1
    assert everything["left_out"] == ["256 GPUs: --global-batch 384 is no multiple of 768"]
    assert any(text.startswith("8, 128 GPUs: a GPU gets 1 pairs") for text in everything["warnings"])


def test_bf16_leaves_stage_0_out(capsys: pytest.CaptureFixture[str]) -> None:
    found, everything = rows(capsys, "--gpus", "2")
    assert [row["stage"] for row in found] == [1, 2, 3]
    assert everything["left_out"][0].startswith("ZeRO 0: ")


@pytest.mark.parametrize(
    ("words", "beginning", "part"),
    [
        (["--images", "300"], "4 GPUs: a step takes more pairs (512", "so there is no epoch"),
        (["--images", "3000", "--epochs", "3"], "any number of GPUs", "fewer than 5,000"),
        (["--accumulation", "64"], "2, 4 GPUs: a global batch above 8,192", "here to x64"),
        (["--loader-rate", "1500"], "2, 4 GPUs: loading is the bottleneck", "a node needs 512 pairs"),
        (["--storage-read", "1"], "4 GPUs: loading is the bottleneck", "of the time"),
        (["--checkpoint-every", "1"], "any number of GPUs: checkpoints stop training", "--async-checkpoint"),
        (
            ["--checkpoint-every", "1", "--async-checkpoint"],
            "any number of GPUs: checkpoints",
            "raise --checkpoint-every",
        ),
    ],
)
def test_warnings(words: list[str], beginning: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, everything = rows(capsys, "--gpus", "1", "2", "4", "--stages", "1", *words)
    (text,) = [text for text in everything["warnings"] if part in text]
    assert text.startswith(beginning)
    _, quiet = rows(capsys, "--gpus", "1", "2", "4", "--stages", "1")
    assert quiet["warnings"] == []


def test_where_a_step_takes_more_than_all_there_are_no_hours(capsys: pytest.CaptureFixture[str]) -> None:
    (row,), _ = rows(capsys, "--gpus", "4", "--stages", "1", "--images", "300", "--price", "1")
    assert row["steps"] == 0
    assert row["total_hours"] is row["cost"] is row["epoch_hours"] is None


def test_a_measured_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"batch": 1}, {"benchmark": "kernels"}, {})
    found = json.loads(plan(capsys, "--row", f"{path}:3", "--gpus", "8", "--json"))
    assert found["inputs"]["batch"] == 64
    assert found["inputs"]["precision"] == "bf16"
    assert found["inputs"]["memory_bandwidth"] == 2000
    assert "--memory-bandwidth" not in found["assumptions"]
    assert found["inputs"]["parameters"] < 40e6  # the overrides
    assert found["inputs"]["source"].startswith("sgmim_vit_base bf16 batch 64 triton+compile on NVIDIA H100 (")
    assert "batch 64" in plan(capsys, "--row", str(write_rows(tmp_path / "one.jsonl", {"benchmark": "x"}, {})))


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        ({}, "", "holds 2 training steps; add the number of one: :1 sgmim_vit_base bf16 batch 64 triton+compile, :2"),
        ({}, ":3", "has 2 lines"),
        ({"benchmark": "kernels"}, ":2", "benchmark 'kernels'"),
        ({"precision": "autocast"}, ":2", "autocast, which training does not offer"),
        ({"images_per_second": 0}, ":2", "--images-per-second 0 must be a positive number"),
        ({"model": "resnet"}, ":2", "model 'resnet' is unknown"),
    ],
)
def test_rows_that_are_no_start(
    change: dict[str, Any], place: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {}, change)
    assert message in refused(capsys, "--row", f"{path}{place}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--images-per-second and --batch and --model missing: give --row"),
        (["--row", "nowhere.jsonl"], "--row nowhere.jsonl cannot be read: No such file"),
        (["--row", "setup.py"], "is no JSON"),
        (["--row", "x", "--batch", "3"], "--batch and --row say the same"),
        ([*GIVEN, "--gpus", "12"], "--gpus 12 does not fill nodes of 8 GPUs"),
        ([*GIVEN, "--gpus", "0"], "--gpus 0 must be 1 or more"),
        ([*GIVEN, "--stages", "4"], "--stages 4 must be 0, 1, 2 or 3"),
        ([*GIVEN, "--stages", "0"], "--stages 0 cannot train in bf16"),
        ([*GIVEN, "--overlap", "2"], "--overlap 2.0 must be a share from 0 to 1"),
        ([*GIVEN, "--inter-node", "nan"], "--inter-node nan must be positive"),
        ([*GIVEN, "--global-batch", "-8"], "--global-batch -8 must be positive"),
        ([*GIVEN, "--price", "-1"], "--price -1.0 must be 0 or more"),
        ([*GIVEN, "--epochs", "0"], "--epochs 0 must be 1 or more"),
        (["--images-per-second", "nan", *GIVEN[2:]], "--images-per-second nan must be a positive number"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words)


def test_help_needs_no_pytorch() -> None:
    code = "import sys\nfrom sgmim_fast.planning import options\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_documentation_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    examples = re.findall(r"^    \$ sgmim plan (.+)\n((?:(?:    .*)?\n)+)", text, re.MULTILINE)
    assert len(examples) >= 2
    for words, printed in examples:
        shown = [line[4:] for line in printed.rstrip().splitlines()]
        assert shown == plan(capsys, *shlex.split(words)).rstrip().splitlines(), f"run it again: sgmim plan {words}"


def test_documentation_shows_what_was_measured() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    lines = (ROOT / "benchmarks" / "results" / "scaling.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines]
    table = markdown(measured)
    assert len(table) >= 2 + 4
    assert "\n".join(table) in text
    assert all(row["counted_bytes"] == row["predicted_bytes"] for row in measured if row["part"] == "step")
