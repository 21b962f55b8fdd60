"""The check on a GPU, as far as it can be tried without one: what is demanded, its slices, and that it goes on."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bars, gpu_check, memcheck, pipeline
from benchmarks.rows import Rows, read
from benchmarks.slices import RESULT_FILES, SLICES, Slice, Step

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GPU = {"gpu": "NVIDIA H200"}


# -- what is demanded


def kernel_row(implementation: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A row as of a GPU that copies 1 GB in a millisecond."""
    row = {
        "benchmark": "kernels",
        "op": "window_attention",
        "case": "Swin-B",
        "pass": "forward",
        "dtype": "bf16",
        "batch": 128,
        "shapes": {"table": [121, 4]},
        "implementation": implementation,
        "environment": GPU,
        "p50_seconds": seconds,
        "floor_seconds": 1e-3,
        "share_of_copy": 1e-3 / seconds,
        "ceilings": {"launch_seconds": 2e-6},
    }
    return row | more


def step_row(backend: str, seconds: float, compiled: bool = False, **more: Any) -> dict[str, Any]:
    row = {
        "benchmark": "train_step",
        "model": "sgmim_swin_base",
        "backend": backend,
        "compiled": compiled,
        "precision": "bf16",
        "batch": 128,
        "override": [],
        "optimizer": "adamw",
        "environment": GPU,
        "p50_seconds": seconds / 2,
        "step_p50_seconds": seconds,
        "step_memory_bytes": int(seconds * 1e9),
        "share_of_matrix": 0.2 / seconds,
        "step_share_of_matrix": 0.1 / seconds,
    }
    return row | more


def verdicts(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[bool | None, str]]:
    return {(bar.what, bar.demand): (bar.met, bar.measured) for bar in bars.bars(rows)}


def test_bars_of_kernels() -> None:
    small = {"op": "gather_rows", "case": "few", "floor_seconds": 1e-6}
    found = verdicts(
        [
            kernel_row("triton", 1.2e-3),
            kernel_row("triton", 2e-3, case="Swin-L"),
            kernel_row("triton", 9e-3, case="few samples", batch=8),
            kernel_row("triton", 9e-3, case="both", **{"pass": "both"}),
            kernel_row("triton", 9e-3, case="on a CPU", environment={"cpu": "EPYC"}),
            kernel_row("triton", 9e-3, case="a try", smoke=True),
            kernel_row("plain", 9e-3),
            kernel_row("sdpa", 1.1e-3),
            kernel_row("copy", 1e-3),
            kernel_row("triton", 5e-3, op="guidance_attention", case="guidance"),
            kernel_row("dense", 11e-3, op="guidance_attention", case="guidance"),
            kernel_row("triton", 1.1e-3, op="gather_rows", case="many"),
            kernel_row("triton", 9e-3, op="gather_rows", case="many", **{"pass": "both"}),
            kernel_row("triton", 6e-6, **small),
            kernel_row("triton", 4e-6, **(small | {"op": "masked_l1"})),
        ]
    )
    names = "window_attention forward, windows 6, 7, 12, batch 32 and more", ">= 70% of a copy of its bytes"
    assert found[names] == (False, "50% (Swin-L, batch 128, forward)")
    names = "window_attention backward, windows 6, 7, 12, batch 32 and more", ">= 60% of a copy of its bytes"
    assert found[names] == (None, "-")
    assert found["attention, every shape", "faster than every peer"] == (False, "x0.92 (Swin-B, batch 128, forward)")
    assert found["guidance_attention", ">= 2x SDPA over all tokens"] == (True, "x2.20 (guidance, batch 128, forward)")
    assert found["gather_rows", ">= 80% of a copy of its bytes"] == (True, "91% (many, batch 128, forward)")
    demand, where = "<= 3 us beyond an empty launch", "(few, batch 128, forward)"
    assert found["gather_rows, small", demand] == (False, f"4.0 us, of which 1.0 us for its bytes {where}")
    assert found["masked_l1, small", demand] == (True, f"2.0 us, of which 1.0 us for its bytes {where}")
    assert found["scatter_rows", ">= 80% of a copy of its bytes"] == (None, "-")


def test_bars_of_the_training_step() -> None:
    found = verdicts(
        [
            step_row("reference", 0.9),
            step_row("reference", 0.5, compiled=True),
            step_row("reference", 0.4, compiled=True),
            step_row("triton", 0.01, batch=32),
            step_row("triton", 0.01, precision="fp32"),
            step_row("triton", 0.01, optimizer="none"),
            step_row("triton", 0.01, compiled=True, float8="tensorwise"),
            step_row("triton", 0.01, environment={"cpu": "EPYC"}),
            step_row("triton", 0.35),
            step_row("triton", 0.3, compiled=True, step_memory_bytes=500_000_000),
            step_row("triton", 0.3, model="sgmim_vit_base"),
            step_row("reference", 0.33, compiled=True, model="sgmim_vit_base"),
        ]
    )
    swin, vit = "step of sgmim_swin_base", "step of sgmim_vit_base"
    assert found[swin, ">= 3.0x plain, eager"] == (True, "x3.00")
    assert found[swin, ">= 1.4x plain, compiled"] == (False, "x1.33")
    assert found[swin, "<= 0.5x the memory of plain"] == (False, "x0.56")
    assert found[swin, ">= 40% of the matrix rate"] == (False, "33%")
    assert found[vit, ">= 1.2x plain, compiled"] == (False, "x1.10")
    assert found["step of sgmim_swin_large", ">= 1.2x plain, compiled"] == (None, "-")


def test_a_peer_in_an_attention_layer_counts() -> None:
    layer = {"op": "attention_layer", "case": "a layer", "pass": "both"}
    found = verdicts([kernel_row("triton", 2e-3, **layer), kernel_row("timm-fused", 1e-3, **layer)])
    assert found["attention, every shape", "faster than every peer"] == (False, "x0.50 (a layer, batch 128, both)")


def test_table_of_bars() -> None:
    lines = bars.table(bars.bars([kernel_row("triton", 1.2e-3)])).splitlines()
    assert lines[0].split("  ")[0].strip() == "pass"
    assert lines[0].endswith("83% (Swin-B, batch 128, forward)")
    assert any(line.startswith("not measured") for line in lines)
    assert len({line.index(">= 3.0x plain") for line in lines if ">= 3.0x plain" in line}) == 1


@pytest.mark.parametrize(
    ("log", "status", "safe", "said"),
    [
        ("a: correct\nb: correct\n========= ERROR SUMMARY: 0 errors\n", 0, True, "no bad access in 2 operations"),
        ("a: WRONG\n========= ERROR SUMMARY: 0 errors\n", 1, False, "not all are right"),
        ("========= Invalid __global__ read of size 4 bytes\n=========     at k\n", None, False, "Invalid __global__"),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors\n", 1, False, "Invalid __global__"),
        ("========= ERROR SUMMARY: 1 error\n", 1, False, "ERROR SUMMARY: 1 error"),
        ("========= Error: Device not supported. Please refer to\n", 255, True, "not finished: Error: Device not supp"),
        ("a: correct\n", None, True, "not finished: it ran out of time (1 operations were right so far)"),
        ("", 127, True, "not finished: it said nothing"),
    ],
)
def test_verdict_on_memory_accesses(log: str, status: int | None, safe: bool, said: str) -> None:
    found = memcheck.verdict(log, status)
    assert found[0] == safe
    assert said in found[1]


# -- slices


def test_slices_fit_into_the_time() -> None:
    assert all(one.minutes < 9 for one in SLICES)
    assert sum(one.minutes for one in SLICES) <= 25
    names = [step.name for one in SLICES for step in one.steps]
    assert len(set(names)) == len(names)
    assert {step.file for one in SLICES for step in one.steps} <= set(RESULT_FILES)
    listed = gpu_check.listing().splitlines()
    assert [line.split()[0] for line in listed] == [*(one.name for one in SLICES), "all"]


def test_the_pipeline_has_time_for_its_turns() -> None:
    """It begins no arm whose turns do not fit any more."""
    steps = [step for one in SLICES for step in one.steps if step.module == "pipeline"]
    assert steps
    for step in steps:
        options = pipeline.arguments().parse_args(step.words)
        turns = pipeline.turns_seconds(options)
        assert turns < (step.seconds - gpu_check.LEAST_SECONDS) / 2, "the rest is for making it ready"


@pytest.mark.parametrize("words", ["words", "smoke"])
def test_benchmarks_understand_their_commands(words: str, tmp_path: Path) -> None:
    """Each by its own parser."""
    for step in (step for one in SLICES for step in one.steps):
        if not getattr(step, words):
            continue
        module = import_module(f"benchmarks.{step.module}")
        command = gpu_check.command_of(step, getattr(step, words), tmp_path / f"{step.file}.jsonl", 100.0)
        options = module.arguments().parse_args(command[4:])
        assert options.output.parent == tmp_path
        assert getattr(options, "seconds", None) in (None, 100 - gpu_check.LEAST_SECONDS, 3600.0)


def test_the_first_slice_is_what_runs_by_default() -> None:
    assert gpu_check.arguments().parse_args([]).slices == [SLICES[0].name]


STEPS = tuple(Step(name, "none", "kernels", (name,), 60.0) for name in ("good", "late", "bad", "stopped", "last"))


def test_a_slice_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, begun = Rows(tmp_path / "gpu_check.jsonl", CPU), []

    def finished(name: str, command: list[str], seconds: float) -> int | None:
        begun.append(name)
        assert seconds == 60
        return {"good": 0, "late": 75, "bad": 1, "stopped": None, "last": 0}[name]

    monkeypatch.setattr(gpu_check, "finished", finished)
    one = Slice("one", "", 8.0, STEPS)
    assert gpu_check.run_slice(one, progress, gpu_check.Budget(500), smoke=False) == ["bad"]
    assert begun == ["good", "late", "bad", "stopped", "last"]  # one that fails does not stop the rest
    begun.clear()
    assert gpu_check.run_slice(one, progress, gpu_check.Budget(500), smoke=False) == ["bad"]
    assert begun == ["late", "bad", "stopped"]
    progress.environment["sources"] = "others"
    begun.clear()
    gpu_check.run_slice(one, progress, gpu_check.Budget(500), smoke=False)
    assert begun == [step.name for step in STEPS]


def test_an_arm_that_the_time_did_not_suffice_for_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Rows(tmp_path / "gpu_check.jsonl", CPU)
    rows, reasons = Rows(tmp_path / "kernels.jsonl", CPU), ["the time was over", "out of memory"]

    def finished(*_: Any) -> int:
        rows.append({"benchmark": "train_step_skipped", "reason": reasons.pop(0)})
        return 0

    monkeypatch.setattr(gpu_check, "finished", finished)
    one = Slice("one", "", 8.0, STEPS[:1])
    for _ in range(3):
        gpu_check.run_slice(one, progress, gpu_check.Budget(500), smoke=False)
    assert reasons == []


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path, capsys: Any) -> None:
    progress = Rows(tmp_path / "gpu_check.jsonl", CPU)
    one = Slice("one", "", 8.0, STEPS[:2])
    assert gpu_check.run_slice(one, progress, gpu_check.Budget(1.0), smoke=False) == []
    assert capsys.readouterr().out.splitlines() == [f"{name}: left out, the time is over" for name in ("good", "late")]
    assert read(progress.path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_all_slices_in_the_smallest_size(tmp_path: Path, capsys: Any) -> None:
    words = ["--smoke", "--slice", "all", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.gpu_check", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = [step.name for one in SLICES for step in one.steps if step.smoke]
    assert [row["step"] for row in read(tmp_path / "gpu_check.jsonl")] == wanted
    table = [line for line in done.stdout.splitlines() if line.startswith("not measured")]
    assert any(">= 3.0x plain, eager" in line for line in table)
    assert gpu_check.check(gpu_check.arguments().parse_args(words)) == 0
    assert capsys.readouterr().out.count("finished before") == len(wanted)


def test_commands_are_stopped_with_their_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.0)
    sleeper = f"sleep 600 & echo $! > {tmp_path}/child; wait"
    assert gpu_check.finished("test", ["bash", "-c", sleeper], 2.0) is None
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    assert ends(child)
    assert gpu_check.finished("test", ["bash", "-c", "exit 3"], 20.0) == 3


def test_a_command_leaves_nothing_running_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.0)
    assert gpu_check.finished("test", ["bash", "-c", f"sleep 600 & echo $! > {tmp_path}/child"], 20.0) == 0
    assert ends(Path("/proc", (tmp_path / "child").read_text().strip()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_check_has_started_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "from benchmarks import gpu_check, processes\n"
        "processes.leave_in_order()\n"
        f"gpu_check.finished('test', ['bash', '-c', 'echo $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/child; "
        "sleep 600'], 600.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "child").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child = Path("/proc", (tmp_path / "child").read_text().strip())
        assert (child / "status").exists()
        process.send_signal(number)
        assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
        assert ends(child)
    finally:
        process.kill()
        process.wait()


def ends(process: Path, seconds: float = 60.0) -> bool:
    """Whether a process of Linux ends in time: one that was killed may take a moment, and then wait for its parent.

    What it is asked of lasts far longer by itself.
    """
    status = process / "status"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if "zombie" in state or "dead" in state:
            return True
        time.sleep(0.05)
    return False


def test_rows_of_these_sources_alone_are_judged(tmp_path: Path) -> None:
    progress = Rows(tmp_path / "gpu_check.jsonl", CPU)
    kernels = Rows(tmp_path / "kernels.jsonl", CPU)
    kernels.append({"a": 1})
    kernels.environment["sources"] = "older"
    kernels.append({"a": 2})
    assert [row["a"] for row in gpu_check.rows_of(progress)] == [1]
