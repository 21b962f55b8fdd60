"""Timing, rows and where they come from, as far as that can be tried without a GPU."""

import os
import stat
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness, origin, products, rows, tested
from benchmarks.cases import PLAIN
from benchmarks.clocks import HostClock
from benchmarks.peers import NORMS
from benchmarks.rows import Rows
from sgmim_fast.config import ModelConfig
from sgmim_fast.errors import UserError

ROOT = Path(__file__).parents[1]


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


def test_inputs_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their number, or, where they are too small for that, because something else is read in between."""
    held = 6 << 20
    monkeypatch.setattr(harness, "l2_bytes", lambda device: held)
    for size in (1, 10_000, 200_000, 1 << 20, 5 << 20, 1 << 30):
        sets, evict = harness.input_sets(size, held), harness.evictor(size, torch.device("cpu"))
        assert 2 <= sets <= harness.MOST_SETS
        assert ((sets - 1) * size >= 2 * held) == (evict is None)
        if evict is not None:
            assert sets == harness.MOST_SETS
            assert evict.args[0].nbytes == 2 * held
            assert evict().item() == 0.0
    monkeypatch.setattr(harness, "l2_bytes", lambda device: 0)
    assert harness.evictor(1, torch.device("cpu")) is None


def test_what_empties_the_cache_is_not_timed() -> None:
    clock, order = MadeUpClock(), list[str]()

    def evict() -> None:
        order.append("evict")
        clock.work(5.0)

    def call(number: int) -> None:
        order.append("call")
        clock.work(1.0)

    times = harness.measure(call, seconds=0.0, clock=clock, evict=evict)
    assert (times.p20, times.p80) == (1.0, 1.0)
    assert order[-2 * times.runs :] == ["evict", "call"] * times.runs


def test_a_smoke_run_measures_once() -> None:
    asked: list[int] = []
    times = harness.measure(asked.append, seconds=0.0, clock=HostClock(), fewest=1)
    assert times.runs == 1
    assert len(asked) == 5  # two to warm up, one for the host's time, one for the length, one that counts


def test_ceilings_of_the_host() -> None:
    found = harness.measure_ceilings(torch.device("cpu"), HostClock(), smoke=True)
    assert found.copy > 0
    assert found.matrix > 0
    assert found.row()["products_flops_per_second"] is None
    assert found.describe().startswith("ceilings: copy ")


def test_products_of_a_step_are_its_linear_layers() -> None:
    config = ModelConfig(image_size=64, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 1, 1), window_size=4)
    found = products.products_of(config, batch=3)
    # Stage 3 has two blocks on 4 x 4 tokens of 64 channels; fc1 forward, and its two gradients.
    tokens = 3 * 4 * 4
    assert found[products.Product(tokens, 64, 256, False, True)] == 2
    assert found[products.Product(tokens, 256, 64, False, False)] == 2
    assert found[products.Product(256, tokens, 64, True, False)] == 2
    rate, measured = products.measure_products(config, 3, torch.device("cpu"), smoke=True)
    assert rate > 0
    assert len(measured) == len(found)


# -- rows


def test_rows_carry_their_environment(tmp_path: Path) -> None:
    written = harness.Rows(tmp_path / "new" / "rows.jsonl", torch.device("cpu"))
    written.append({"benchmark": "a"})
    written.append({"benchmark": "b"})
    found = rows.read(written.path)
    assert [row["benchmark"] for row in found] == ["a", "b"]
    environment = found[1]["environment"]
    assert {"commit", "torch", "triton", "command"} <= environment.keys()
    assert environment["sources"] == origin.sources()
    assert environment["dirty"] == environment["commit"].endswith("+changes")


def test_a_row_that_was_cut_off_is_none(tmp_path: Path) -> None:
    written = harness.Rows(tmp_path / "rows.jsonl", torch.device("cpu"))
    written.append({"a": 1})
    with written.path.open("a") as file:
        file.write('{"a": 2')
    assert [row["a"] for row in rows.read(written.path)] == [1]
    written.append({"a": 3})
    assert [row["a"] for row in rows.read(written.path)] == [1, 3]


@pytest.mark.parametrize(("line", "reason"), [("{", "is not a row of JSON"), ("[]", "no environment")])
def test_other_lines_are_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"environment": {{}}}}\n{line}\n')
    with pytest.raises(UserError, match=rf"rows\.jsonl:2 .*{reason}.*; delete this line"):
        rows.read(path)


def test_finished_is_what_the_same_sources_have_measured_rightly(tmp_path: Path) -> None:
    written = harness.Rows(tmp_path / "rows.jsonl", torch.device("cpu"))
    written.append({"case": "a", "batch": 2})
    written.append({"case": "wrong", "batch": 2, "correct": False})
    written.append({"case": "other key"})
    usual, written.environment = written.environment, written.environment | {"sources": "older"}
    written.append({"case": "old", "batch": 2})
    written.environment = usual
    assert written.finished(("case", "batch")) == {rows.key_of({"case": "a", "batch": 2}, ("case", "batch"))}


def test_newest_rows_replace_older_ones() -> None:
    found = rows.newest([{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 1, "b": 3}], ("a",))
    assert found == [{"a": 1, "b": 3}, {"a": 2, "b": 2}]


def test_sources_are_told_apart_by_their_content(tmp_path: Path) -> None:
    def digest(number: int) -> str:
        return origin.sources(tmp_path / str(number))

    for number, text in enumerate(("a = 1", "a = 1", "a = 2")):
        for folder in origin.MEASURED:
            (tmp_path / str(number) / folder / "inner").mkdir(parents=True)
        (tmp_path / str(number) / "kernels" / "inner" / "x.py").write_text(text)
    assert digest(0) == digest(1) != digest(2)


def test_clocks_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        f'echo "$@" > {tmp_path}/asked\n'
        "echo '345, 3201, 120.5, 40'; echo '1980, 3201, 650.0, 55'; echo '1900, 3201, [N/A], 50'; exec sleep 60\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    watch = origin.ClockWatch("GPU-1")
    deadline = time.monotonic() + 60
    while len(watch._lines) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.seen() == {
        "sm_mhz": [345, 1900, 1980],
        "memory_mhz": [3201, 3201, 3201],
        "watts": [120.5, 385.25, 650],
        "celsius": [40, 50, 55],
    }
    assert watch.seen() == {}
    asked = (tmp_path / "asked").read_text()
    assert "--id=GPU-1" in asked
    assert "--loop-ms=200" in asked
    watch._process.kill()


def test_without_nvidia_smi_no_clocks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert origin.ClockWatch("GPU-1").seen() == {}


@pytest.mark.parametrize(
    ("script", "driver", "clock"),
    [
        ("echo '580.1, 345 MHz, 3201 MHz, 1980 MHz, 700.00 W, 40'", "580.1", "345 MHz"),
        ("echo 'WARNING: infoROM is corrupted'; echo '580.1, [N/A], 1 MHz, 2 MHz, [N/A], 40'", "580.1", "[N/A]"),
        ("echo 'No devices were found'; exit 6", "unknown: nvidia-smi ended with status 6", None),
        ("echo 'No devices were found'", "unknown: nvidia-smi said 'No devices were found'", None),
        ("", "unknown: nvidia-smi said ''", None),
        ("exec sleep 60", "unknown: nvidia-smi: TimeoutExpired", None),
        (None, "unknown: nvidia-smi: PermissionError", None),
    ],
)
def test_what_nvidia_smi_cannot_tell_ends_nothing(
    script: str | None, driver: str, clock: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755 if script is not None else 0o644)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(origin.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(origin, "PATIENCE", 2.0)
    card = {"major": 9, "minor": 0, "multi_processor_count": 132, "L2_cache_size": 1, "total_memory": 2, "uuid": "1"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**card))
    found = origin.describe_gpu(torch.device("cuda"))
    assert found["driver_version"] == driver
    assert found.get("clocks.sm") == clock
    assert found["multiprocessors"] == 132
    watch = origin.ClockWatch("GPU-1")
    assert watch.seen() == {} or script is not None
    if process := getattr(watch, "_process", None):
        process.kill()


def test_benchmarks_need_torch_triton_numpy_and_timm_alone() -> None:
    """The others are hidden, as on a machine that has none of them."""
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {hidden}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import {modules}\n"
    )
    hidden = ("deepspeed", "tyro", "rich", "tensorboard", "yaml", "psutil", "xformers", "apex", "PIL")
    names = ("kernels", "train_step", "products", "memcheck", "tested", "gpu_check")
    modules = ", ".join(f"benchmarks.{name}" for name in names)
    filled = code.replace("{hidden}", repr(hidden)).replace("{modules}", modules)
    done = subprocess.run([sys.executable, "-c", filled], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- whether its tests are green


@pytest.mark.parametrize(
    ("log", "status", "verdict"),
    [
        ("....   [100%]\n4 passed in 1.00s\n", 0, ("green", "4 passed in 1.00s")),
        ("..F.   [100%]\n=== 1 failed, 3 passed in 1.00s ===\n", 1, ("red", "1 failed, 3 passed in 1.00s")),
        ("", 4, ("red", "it said nothing")),
        ("......... [ 40%]\n....", None, ("unfinished", "....")),
        ("...F..... [ 40%]\n....", None, ("red", "some had failed when the time was over")),
        ("..s..E", None, ("red", "some had failed when the time was over")),
    ],
)
def test_verdicts_on_logs(log: str, status: int | None, verdict: tuple[str, str]) -> None:
    assert tested.judge(log, status) == tested.Verdict(*verdict)


def test_every_operation_of_ours_has_tests() -> None:
    assert set(tested.TESTS) == set(PLAIN) - set(NORMS)
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in (*tested.TESTS.values(), *tested.WHOLE))


def test_verdicts_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_tests(name: str, *_: Any) -> tuple[tested.Verdict, float]:
        ran.append(name)
        return tested.Verdict({"a": "green", "b": "red", "c": "unfinished"}[name], "said"), 1.0

    monkeypatch.setattr(tested, "run_tests", run_tests)
    known = Rows(tmp_path / "tests.jsonl", torch.device("cpu"))
    assert {name: v.status for name, v in tested.verdicts("abc", known, 9.0).items()} == {
        "a": "green",
        "b": "red",
        "c": "unfinished",
    }
    assert sorted(ran) == ["a", "b", "c"]
    ran.clear()
    assert tested.verdicts("abc", known, 9.0)["b"].status == "red"
    assert ran == ["c"]
    ran.clear()
    tested.verdicts("ab", known, 9.0, again=True)
    assert ran == ["b"]
    assert tested.verdicts("a", known, 0.0, select="few")["a"] == tested.Verdict("unfinished", "not run")
    known.environment["sources"] = "others"
    ran.clear()
    tested.verdicts("a", known, 9.0)
    assert ran == ["a"]
