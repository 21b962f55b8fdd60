"""The GPU benchmarks, as far as they can be tried without a GPU: what they time, how, and what they make of it."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bars, gpu_check, harness, kernels, train_step
from benchmarks.cases import all_cases, class_token_of, guidance_of, window_case
from benchmarks.peers import Contender, contender, flex_class_token_attention, flex_window_attention
from sgmim_fast.errors import UserError
from sgmim_fast.recipes import MODELS
from tests.kernel_cases import DEVICE

ROOT = Path(__file__).parents[1]
WINDOWS = window_case("tiny", batch=3, side=8, heads=2, window=4, shift=2, size=16, cosine=True)


@pytest.mark.parametrize("module", ["kernels", "gpu_check"])
def test_without_a_gpu_there_is_one_clear_line(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no CUDA GPU is visible here")
    assert done.stderr.count("\n") == 1


def test_kernels_are_imported_where_nothing_is_installed() -> None:
    """``-S`` leaves out the .pth files of the environment, and with them an editable install."""
    show = "import benchmarks, sgmim_fast.kernels as kernels; print(kernels.__file__)"
    path = os.pathsep.join([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    command = [sys.executable, "-S", "-c", show]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr


# -- time


@dataclass
class MadeUpClock:
    """A device that does each call's work, ``costs[number]`` seconds, once what held it is over."""

    now: float = 0.0
    busy_until: float = 0.0
    held: list[float] = field(default_factory=list)

    def hold(self, seconds: float) -> None:
        self.held.append(seconds)
        self.busy_until += seconds

    def work(self, seconds: float) -> None:
        self.busy_until += seconds

    def mark(self) -> float:
        return self.busy_until

    def wait(self) -> None:
        self.now = self.busy_until

    def between(self, start: float, end: float) -> float:
        return end - start


def test_measure_times_the_device_and_takes_inputs_in_turns() -> None:
    clock, asked = MadeUpClock(), []

    def call(number: int) -> None:
        asked.append(number)
        clock.work([1e-3, 2e-3, 9e-3][number])

    times = harness.measure(call, sets=3, seconds=1.0, clock=clock)
    assert asked[:3] == [0, 1, 2]  # each is warmed up
    timed = asked[-times.runs :]
    assert timed == [number % 3 for number in range(times.runs)]
    assert times.p50 == pytest.approx(2e-3)
    assert (times.p20, times.p80) == pytest.approx((1e-3, 9e-3))
    assert all(seconds > times.host for seconds in clock.held)


def test_measure_makes_few_runs_of_what_is_slow_and_many_of_what_is_fast() -> None:
    def runs(cost: float) -> int:
        clock = MadeUpClock()
        return harness.measure(lambda _: clock.work(cost), seconds=0.2, clock=clock).runs

    assert runs(10.0) == harness.FEWEST_RUNS
    assert runs(1e-9) == harness.MOST_RUNS
    assert harness.FEWEST_RUNS < runs(0.02) < harness.MOST_RUNS


def test_inputs_outgrow_the_cache() -> None:
    for size in (1 << 20, 50 << 20, 1 << 30):
        assert (harness.input_sets(size, 60 << 20) - 1) * size >= 2 * (60 << 20) or harness.input_sets(
            size, 60 << 20
        ) == 64
    assert harness.input_sets(1, 60 << 20) == 64


def test_rows_carry_their_environment(tmp_path: Path) -> None:
    rows = harness.Rows(tmp_path / "new" / "rows.jsonl", torch.device("cpu"))
    rows.append({"benchmark": "a"})
    rows.append({"benchmark": "b"})
    found = [json.loads(line) for line in rows.path.read_text().splitlines()]
    assert [row["benchmark"] for row in found] == ["a", "b"]
    assert {"commit", "torch", "triton", "command"} <= found[1]["environment"].keys()


# -- what is timed


def test_cases_fit_the_plain_functions() -> None:
    """On the meta device: shapes alone."""
    names = []
    for case in all_cases(batch=2):
        names.append((case.op, case.name))
        inputs = {name: torch.empty(shape, device="meta") for name, shape in case.shapes.items()}
        for name in case.wanted():
            inputs[name].requires_grad_()
        if case.index is not None:
            keyword, count, places = case.index
            assert 0 < count < places
            inputs[keyword] = torch.empty(case.batch, count, dtype=torch.int32, device="meta")
        out = case.truth(**inputs)
        assert out.requires_grad == (case.backward is not None)
        read = sum(x.nbytes for name, x in inputs.items() if case.is_batched(name) and name not in case.fixed)
        if case.index is None:  # all of the inputs is read, and the output written
            assert case.forward(4).bytes == read + out.nbytes
    assert len(set(names)) == len(names)
    assert {op for op, _ in names} == set(bars.MEMORY_BOUND) | set(gpu_check.ATTENTION)


def test_made_inputs_are_as_the_case_says() -> None:
    case = next(case for case in all_cases(batch=2) if case.op == "masked_l1")
    inputs = case.make(torch.float16, torch.device("cpu"), seed=0)
    assert inputs["prediction"].dtype == torch.float16
    assert inputs["prediction"].requires_grad
    assert inputs["picture"].dtype == torch.float32
    assert not inputs["picture"].requires_grad
    index = inputs["index"]
    assert (index.diff(dim=1) > 0).all()
    assert 0 <= index.min() <= index.max() < 36
    other = case.make(torch.float16, torch.device("cpu"), seed=1)["prediction"]
    assert not torch.equal(inputs["prediction"], other)


# -- whether it is right


@pytest.mark.parametrize("name", ["triton", "plain", "sdpa"])
def test_right_implementations_pass(name: str) -> None:
    function = contender(name, WINDOWS)
    assert function is not None
    found = kernels.parity(name, function, WINDOWS, torch.float32, torch.device(DEVICE))
    assert found.correct
    assert found.error < 1e-4


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda out, qkv, table: out * 1.001, "result"),
        (lambda out, qkv, table: torch.cat((out[:-1], out[:1])), "result"),  # right but for the last sample
        (lambda out, qkv, table: out + (table - table.detach()).sum(), "gradient of table"),
        (lambda out, qkv, table: out * torch.nan, "result"),
    ],
)
def test_wrong_implementations_are_named(spoil: Callable[..., Tensor], where: str) -> None:
    function = Contender(lambda **inputs: spoil(WINDOWS.truth(**inputs), inputs["qkv"], inputs["table"]))
    found = kernels.parity("triton", function, WINDOWS, torch.float32, torch.device(DEVICE))
    assert not found.correct
    assert found.worst == where


def test_dense_attention_is_what_guidance_replaces() -> None:
    case = guidance_of("tiny", MODELS["sgmim_swin_base"], batch=2)
    function = contender("dense", case)
    assert function is not None
    assert kernels.parity("dense", function, case, torch.float32, torch.device("cpu")).correct


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shift", [0, 2])
def test_flex_attention_is_window_attention(shift: int) -> None:
    case = replace(WINDOWS, constants={"window": 4, "shift": shift})
    inputs = {name: x.detach() for name, x in case.make(torch.float32, torch.device("cpu"), 0).items()}
    torch.testing.assert_close(flex_window_attention(**inputs, **case.constants), case.truth(**inputs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_class_token_attention() -> None:
    case = class_token_of("tiny", replace(MODELS["sgmim_vit_base"], image_size=64, embed_dim=32, num_heads=(2,)), 2)
    inputs = {name: x.detach() for name, x in case.make(torch.float32, torch.device("cpu"), 0).items()}
    torch.testing.assert_close(flex_class_token_attention(**inputs, **case.constants), case.truth(**inputs))


def test_variants_of_the_step() -> None:
    assert train_step.Variant.parse("torch+sdpa+compile") == train_step.Variant(
        "torch+sdpa+compile", "torch", "sdpa", True
    )
    assert train_step.Variant.parse("triton") == train_step.Variant("triton", "triton", "auto", False)
    with pytest.raises(UserError, match=r"'fast' in 'triton\+fast' is unknown"):
        train_step.Variant.parse("triton+fast")


# -- what it amounts to


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
        "p50_seconds": seconds,
        "step_memory_bytes": int(seconds * 1e9),
        "share_of_matrix": 0.1 / seconds,
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
            kernel_row("plain", 9e-3),
            kernel_row("sdpa", 1.1e-3),
            kernel_row("copy", 1e-3),
            kernel_row("triton", 5e-3, op="guidance_attention", case="guidance"),
            kernel_row("dense", 11e-3, op="guidance_attention", case="guidance"),
            kernel_row("triton", 1.1e-3, op="gather_rows", case="many"),
            kernel_row("triton", 6e-6, **small),
            kernel_row("triton", 4e-6, **(small | {"op": "masked_l1"})),
        ]
    )
    names = "window_attention forward, windows 6, 7, 12", ">= 70% of a copy of its bytes"
    assert found[names] == (False, "50% (Swin-L, forward)")
    names = "window_attention backward, windows 6, 7, 12", ">= 60% of a copy of its bytes"
    assert found[names] == (None, "-")
    assert found["attention, every shape", "faster than every peer"] == (False, "x0.92 (Swin-B, forward)")
    assert found["guidance_attention", ">= 2x SDPA over all tokens"] == (True, "x2.20 (guidance, forward)")
    assert found["gather_rows", ">= 80% of a copy of its bytes"] == (True, "91% (many, forward)")
    assert found["gather_rows, small", "<= 3 us beyond an empty launch"] == (False, "4.0 us (few, forward)")
    assert found["masked_l1, small", "<= 3 us beyond an empty launch"] == (True, "2.0 us (few, forward)")
    assert found["scatter_rows", ">= 80% of a copy of its bytes"] == (None, "-")


def test_bars_of_the_training_step() -> None:
    found = verdicts(
        [
            step_row("reference", 0.9),
            step_row("reference", 0.4, compiled=True),
            step_row("triton", 0.35),
            step_row("triton", 0.3, compiled=True, step_memory_bytes=500_000_000),
            step_row("triton", 0.3, model="sgmim_vit_base"),
            step_row("reference", 0.33, compiled=True, model="sgmim_vit_base"),
        ]
    )
    swin, vit = "step of sgmim_swin_base", "step of sgmim_vit_base"
    assert found[swin, ">= 3.0x plain, eager"] == (True, "x3.00")
    assert found[swin, ">= 1.4x plain, compiled"] == (False, "x1.33")
    assert found[swin, "<= 0.5x the memory of plain"] == (False, "x1.80")
    assert found[swin, ">= 40% of the matrix rate"] == (False, "33%")
    assert found[vit, ">= 1.2x plain, compiled"] == (False, "x1.10")


def test_table_of_bars() -> None:
    lines = bars.table(bars.bars([kernel_row("triton", 1.2e-3)])).splitlines()
    assert lines[0].split("  ")[0].strip() == "pass"
    assert lines[0].endswith("83% (Swin-B, forward)")
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
    found = gpu_check.read_memcheck(log, status)
    assert found[0] == safe
    assert said in found[1]


def test_gpu_check_begins_benchmarks_that_understand_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def finished(name: str, command: list[str], seconds: float, *_: Any) -> int:
        begun.append(name)
        module, words = command[3], command[4:]
        options = (
            {"benchmarks.kernels": kernels, "benchmarks.train_step": train_step}[module].arguments().parse_args(words)
        )
        assert options.output.parent == tmp_path
        assert seconds <= 200
        return len(begun) == 2  # the second one fails

    monkeypatch.setattr(gpu_check, "finished", finished)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("kernels", "train_step")}
    assert not gpu_check.measure(files, gpu_check.Budget(500))
    assert begun[:2] == ["kernels", "steps of sgmim_swin_base"]
    assert len(begun) == 8  # one that fails does not stop the rest


def test_commands_are_stopped_with_their_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.0)
    sleeper = f"sleep 60 & echo $! > {tmp_path}/child; wait"
    assert gpu_check.finished("test", ["bash", "-c", sleeper], 2.0) is None
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    with stopped(child) as alive:
        assert not alive
    assert gpu_check.finished("test", ["bash", "-c", "exit 3"], 20.0) == 3


@contextmanager
def stopped(process: Path) -> Iterator[bool]:
    """Whether a process of Linux is still running; one that has ended may wait for its parent as a zombie."""
    status = process / "status"
    yield status.exists() and "zombie" not in status.read_text()


def test_rows_of_this_run_alone_are_judged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    start = path.stat().st_size
    with path.open("a") as file:
        file.write('{"a": 2}\n{"a": ')  # the last one's writer was stopped
    assert gpu_check.read_rows(path, start) == [{"a": 2}]
    assert gpu_check.read_rows(tmp_path / "none", 0) == []
