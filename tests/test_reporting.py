"""Rows reach every sink once, whatever a run went through; what is asked for and missing is refused."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TINY, metric_row

from sgmim_fast import UserError
from sgmim_fast.config import MonitorConfig, PretrainConfig
from sgmim_fast.train import rewinding
from sgmim_fast.train.choices import check_choices
from sgmim_fast.train.flops import training_flops_per_image
from sgmim_fast.train.metrics import Efficiency, memory
from sgmim_fast.train.peaks import PEAKS, device_peak_tflops, peak_tflops
from sgmim_fast.train.pretrain_job import PretrainJob
from sgmim_fast.train.reporting import Reporter
from sgmim_fast.train.rewinding import METRICS, rewind_rows, superseded
from sgmim_fast.train.wandb_sink import check_wandb

SUPERSEDED = superseded(METRICS)
CPU = torch.device("cpu")


def report(run: Path, steps: range, **monitor: Any) -> None:
    """What a run leaves that logs these steps, each with its loss 1 / step."""
    run.mkdir(exist_ok=True)
    config = PretrainConfig(model=TINY, monitor=MonitorConfig(**monitor))
    with Reporter(run, PretrainJob(config), steps[0] - 1, 100, device=CPU, ranks=2, chief=True) as reporter:
        for step in steps:
            reporter.row(metric_row(step, loss=1 / step))


def logged(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# -- metrics.jsonl


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": step / 2}).encode() + b"\n" for step in steps)


@pytest.mark.parametrize(
    ("content", "kept", "moved"),
    [
        (lines(1, 2, 3), lines(1, 2), lines(3)),
        (lines(1, 2, 3, 4) + b'{"step": 5, "lo', lines(1, 2), lines(3, 4) + b'{"step": 5, "lo\n'),
        (lines(1, 2) + b"\xff\x00\n", lines(1, 2), b"\xff\x00\n"),
        (lines(1, 2)[:-1], lines(1, 2), None),  # killed before the line's end: nothing is lost, nothing glued to it
        (lines(1) + b'[2]\n{"step": true}\n{"step": "2"}\n', lines(1), b'[2]\n{"step": true}\n{"step": "2"}\n'),
        (lines(1, 2, 9), lines(1, 2), lines(9)),
        (b"", b"", None),
    ],
)
def test_rows_after_the_step_are_moved(content: bytes, kept: bytes, moved: bytes | None, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(content)
    assert rewind_rows(tmp_path, 2, METRICS) == (moved or b"").count(b"\n")
    assert (tmp_path / METRICS).read_bytes() == kept
    assert (tmp_path / SUPERSEDED).exists() == (moved is not None)
    assert moved is None or (tmp_path / SUPERSEDED).read_bytes() == moved
    assert {path.name for path in tmp_path.iterdir()} <= {METRICS, SUPERSEDED}


def test_of_a_step_that_is_there_twice_the_later_row_stays(tmp_path: Path) -> None:
    first, again = b'{"step": 2, "loss": 1.0}\n', b'{"step": 2, "loss": 3.0}\n'
    (tmp_path / METRICS).write_bytes(lines(1) + first + lines(3) + again + lines(3))
    assert rewind_rows(tmp_path, 3, METRICS) == 2
    assert (tmp_path / METRICS).read_bytes() == lines(1) + again + lines(3)
    assert (tmp_path / SUPERSEDED).read_bytes() == first + lines(3)


def test_a_file_with_nothing_to_move_is_not_touched(tmp_path: Path) -> None:
    assert rewind_rows(tmp_path, 7, METRICS) == 0
    (tmp_path / METRICS).write_bytes(lines(1, 2))
    before = (tmp_path / METRICS).stat()
    assert rewind_rows(tmp_path, 2, METRICS) == 0
    after = (tmp_path / METRICS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_interrupted_move_is_ended_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / METRICS).write_bytes(lines(1, 2, 3))
    (tmp_path / SUPERSEDED).write_bytes(lines(8) + b'{"ste')  # killed while it wrote, long ago
    with monkeypatch.context() as patch:
        patch.setattr(rewinding.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rewind_rows(tmp_path, 1, METRICS)
    assert (tmp_path / METRICS).read_bytes() == lines(1, 2, 3)
    assert rewind_rows(tmp_path, 1, METRICS) == 2
    assert (tmp_path / METRICS).read_bytes() == lines(1)
    assert (tmp_path / SUPERSEDED).read_bytes() == lines(8) + b'{"ste\n' + lines(2, 3)


# -- sinks


def test_after_resumes_each_step_is_there_once(tmp_path: Path) -> None:
    """Resumed at 4 after 6 steps were logged, at 5 after 8: files and TensorBoard's readers hold each step once."""
    run = tmp_path / "run"
    for steps in (range(1, 7), range(5, 9), range(6, 11)):
        report(run, steps)
    assert logged(run / METRICS) == list(range(1, 11))
    assert logged(run / SUPERSEDED) == [5, 6, 6, 7, 8]
    assert len(list((run / "tensorboard").iterdir())) == 3
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = board.Scalars("pretrain/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 11))
    assert [scalar.value for scalar in scalars] == pytest.approx([1 / step for step in range(1, 11)])
    assert {"pretrain/tflops", "pretrain/grad_norm"} <= set(board.Tags()["scalars"])
    assert not {"pretrain/step", "pretrain/time", "pretrain/mfu"} & set(board.Tags()["scalars"])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    config = PretrainConfig(model=TINY, monitor=MonitorConfig(wandb="offline"))
    with Reporter(tmp_path, PretrainJob(config), 0, 9, device=CPU, ranks=2, chief=False) as reporter:
        reporter.step(1)
        reporter.row(metric_row(1))
        reporter.say("nothing")
    assert list(tmp_path.iterdir()) == []


def wandb_records(file: Path) -> list[Any]:
    """W&B's own records in a file of its: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, records, pending = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of the block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        pending += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(pending))
            pending = b""
    return records


def test_wandb_offline_continues_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed but a line on how to send it, and no process is left."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "my run"
    report(run, range(1, 4), wandb="offline", wandb_project="tried", peak_tflops=1.0)
    name = (run / "wandb" / "run_id").read_text().strip()
    (part,) = (run / "wandb").glob("offline-run-*")
    while time.strftime("%Y%m%d_%H%M%S") in part.name:  # the second names the folder
        time.sleep(0.05)
    report(run, range(3, 5), wandb="offline", wandb_project="tried")
    parts = sorted((run / "wandb").glob("offline-run-*"))
    assert [part.name.split("-")[-1] for part in parts] == [name, name]
    steps = []
    for part in parts:
        records = wandb_records(part / f"run-{name}.wandb")
        (begun,) = [record.run for record in records if record.HasField("run")]
        assert (begun.run_id, begun.project, begun.display_name) == (name, "tried", "my run")
        config = {item.key: json.loads(item.value_json) for item in begun.config.update}
        assert config["model"]["embed_dim"] == TINY.embed_dim
        rows = [record.history for record in records if record.HasField("history")]
        for row in rows:
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
            assert values["pretrain/loss"] == 1 / row.step.num
            assert ("pretrain/mfu" in values) == (part == parts[0])
        steps.append([row.step.num for row in rows])
    assert steps == [[1, 2, 3], [3, 4]]
    out, err = capfd.readouterr()
    said = [line for line in out.splitlines() if not line.startswith("step ")]
    assert said == [f"Weights & Biases: wandb sync '{part}' sends this run" for part in parts]
    assert err == ""
    # The process that runs the tests may have children of other tests, such as Python's resource tracker.
    left = [command_of(child) for child in psutil.Process().children(recursive=True)]
    assert [command for command in left if command and "multiprocessing" not in command] == []


def command_of(process: psutil.Process) -> str:
    """Empty for one that has ended since, whether or not somebody has asked for its status."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_a_run_begun_anew_has_another_id(tmp_path: Path) -> None:
    from sgmim_fast.train.wandb_sink import _run_id

    path = tmp_path / "wandb" / "run_id"
    first = _run_id(path, anew=False)
    assert _run_id(path, anew=False) == first
    assert _run_id(path, anew=True) != first


def test_a_sink_that_cannot_open_closes_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise RuntimeError("no room\nTraceback")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match=r"monitor.wandb offline cannot run here: no room; .*--monitor.wandb off$"):
        report(tmp_path / "run", range(1, 2), wandb="offline")
    report(tmp_path / "run", range(1, 2))


def test_wandb_that_is_missing_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"monitor.wandb offline cannot run here: the package wandb is missing .*pip install wandb, .*wandb off$"
    config = PretrainConfig(model=TINY, monitor=MonitorConfig(wandb="offline"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb("off")
    with pytest.raises(UserError, match=line):
        check_choices(config, CPU)
    # A folder of runs named wandb, where the run is started, is an empty package to Python.
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    with pytest.raises(UserError, match=line):
        check_choices(config, CPU)


def test_wandb_online_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def no_key(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", no_key)
    with pytest.raises(UserError, match=r"No API key configured.; run wandb login or set WANDB_API_KEY, or use"):
        check_wandb("online")
    monkeypatch.setenv("RANK", "1")
    check_wandb("online")  # rank 0 asks for all


def test_nothing_imports_wandb_unasked() -> None:
    program = "import sys, sgmim_fast.train.choices, sgmim_fast.train.reporting; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# -- utilisation


def test_utilisation_is_the_share_of_all_devices_peak(tmp_path: Path) -> None:
    report(tmp_path, range(1, 2), peak_tflops=0.25)
    (row,) = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    tflops = training_flops_per_image(TINY) * row["images_per_second"] / 2 / 1e12
    assert row["tflops"] == pytest.approx(tflops)
    assert row["mfu"] == pytest.approx(tflops / 0.25)


def test_an_unknown_peak_is_said(tmp_path: Path) -> None:
    report(tmp_path, range(1, 2))
    assert json.loads((tmp_path / METRICS).read_text())["mfu"] is None
    config = PretrainConfig(model=TINY)
    assert "--monitor.peak-tflops sets it" in Efficiency.of(PretrainJob(config), CPU, 1).summary()
    told = PretrainConfig(model=TINY, monitor=MonitorConfig(peak_tflops=989.5))
    assert "MFU is of 989.5 TFLOP/s a device" in Efficiency.of(PretrainJob(told), CPU, 1).summary()


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312.0, 156.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 156.0, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 494.5, 67.0),
        ("NVIDIA H100 PCIe", 756.5, 378.0, 51.0),
        ("NVIDIA H200", 989.5, 494.5, 67.0),
        ("NVIDIA B200", 2250.0, 1125.0, 75.0),
        ("NVIDIA L40S", 362.0, 183.0, 91.6),
        ("NVIDIA A10", 125.0, 62.5, 31.2),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("NVIDIA GeForce RTX 3090", 71.0, 35.6, 35.6),
        ("Tesla V100-SXM2-32GB", None, None, 15.7),
        ("Tesla V100-PCIE-16GB", None, None, 14.0),
        ("NVIDIA A10G", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None, None),
        ("NVIDIA H200 NVL", None, None, None),
    ],
)
def test_peaks_of_devices(name: str, bf16: float | None, tf32: float | None, fp32: float | None) -> None:
    assert (peak_tflops(name, "bf16"), peak_tflops(name, "tf32"), peak_tflops(name, "fp32")) == (bf16, tf32, fp32)


def test_fp32_counts_as_tf32_only_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_peak_tflops(gpu, "bf16", None) == 989.5
    assert device_peak_tflops(gpu, "fp32", None) == 67.0
    assert device_peak_tflops(gpu, "fp32", 5.0) == 5.0
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peak_tflops(gpu, "fp32", None) == 494.5
    assert device_peak_tflops(CPU, "fp32", None) is None


def test_no_peak_has_sparsity_in_it() -> None:
    for peak in PEAKS.values():
        assert peak.bf16 is None or peak.tf32 is None or 1.9 < peak.bf16 / peak.tf32 < 2.1


def test_memory_of_a_cpu_rank_is_what_is_resident() -> None:
    assert memory(CPU).keys() == {"peak_memory_bytes"}
    assert memory(CPU)["peak_memory_bytes"] > 50 << 20
