"""``sgmim doctor``: what it says is what a run would meet, and nothing that is broken breaks it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_apex
import pytest
import torch

from sgmim_fast import UserError, doctor, ops
from sgmim_fast.attention import check_attention
from sgmim_fast.data.dali_decoding import check_dali
from sgmim_fast.models.float8 import check_float8
from sgmim_fast.models.norms import check_norm
from sgmim_fast.train.compiling import check_compiler
from sgmim_fast.train.optim import check_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKS: dict[str, Any] = {
    "train.backend": lambda name: ops.resolve_backend(name, torch.zeros(1, device=DEVICE)),
    "train.attention": lambda name: check_attention(name, "torch", DEVICE),
    "train.norm": lambda name: check_norm(name, DEVICE),
    "train.float8": lambda name: check_float8(name, DEVICE),
    "optimizer.implementation": lambda name: check_optimizer(name, DEVICE),
    "data.loader": lambda name: check_dali() if name == "dali" else None,
    "--compile": lambda name: check_compiler(DEVICE),
}


def sgmim_doctor(*words: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with ``path`` before everything else that Python imports from."""
    changed = {**os.environ, **environment} | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-m", "sgmim_fast.cli", "doctor", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=changed)


def put(folder: Path, module: str, content: str) -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(content)


def refusal_of(choice: dict[str, Any]) -> str | None:
    try:
        CHECKS[choice["option"]](choice["value"])
    except UserError as error:
        return str(error)
    return None


def test_it_says_what_a_run_would_meet() -> None:
    done = sgmim_doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    found = json.loads(done.stdout)
    assert found["ready"] is True
    assert found["problems"] == []
    assert found["packages"]["PyTorch"] == torch.__version__
    assert not [name for name, state in found["packages"].items() if state.startswith(doctor.BAD[1])]
    assert found["machine"]["CPU"]
    assert {choice["option"] for choice in found["choices"]} == CHECKS.keys()
    for choice in found["choices"]:
        refusal = refusal_of(choice)
        assert choice["runs"] == (refusal is None), choice
        if refusal is not None:
            assert refusal.endswith(choice["remark"])
            assert "; or " in choice["remark"]  # a remedy
    values = {(choice["option"], choice["value"]) for choice in found["choices"]}
    assert {("train.backend", "auto"), ("train.attention", "xformers"), ("optimizer.implementation", "apex")} <= values


def test_broken_packages_are_findings(tmp_path: Path) -> None:
    """Those that no run needs leave it ready; nothing but plain lines where the output is no terminal."""
    put(tmp_path, "timm", "raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    put(tmp_path, "xformers", "raise SystemExit('built for another PyTorch')")
    fake_apex.write(tmp_path, {**fake_apex.PYPI, "__init__.py": ""})  # DeepSpeed imports it
    done = sgmim_doctor(path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert "broken: operator torchvision::nms does not exist\n" in done.stdout
    assert "broken: built for another PyTorch" in done.stdout
    assert "not installed (the apex here, of unknown version, is PyPI's package of that name" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("ready to train on")
    assert done.stdout.isascii()


def test_what_every_run_needs_is_a_problem(tmp_path: Path) -> None:
    put(tmp_path, "deepspeed", "raise ImportError('libaio.so: cannot open')")
    done = sgmim_doctor("--json", path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert not done.stderr
    found = json.loads(done.stdout)
    assert found["ready"] is False
    assert found["problems"] == ["DeepSpeed is broken: libaio.so: cannot open; run make setup, or install it again"]


@pytest.mark.parametrize("content", ["raise OSError('libcudart.so.12: cannot open')", "version = None"])
def test_a_broken_torch_is_named_first(content: str, tmp_path: Path) -> None:
    put(tmp_path, "torch", content)
    done = sgmim_doctor(path=tmp_path)
    assert done.returncode == 1
    assert not done.stderr
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert problems[0].startswith("problem: PyTorch is broken: ")
    assert done.stdout.splitlines()[-1] == "no training run can start here"


def gpu_findings(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> doctor.Findings:
    """What it makes of a machine whose driver names a GPU that PyTorch does not see."""
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '580.65.06, NVIDIA H200'\necho '580.65.06, NVIDIA H200'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in changes.items():
        monkeypatch.setattr(f"torch.{name.replace('__', '.')}", value)
    found = doctor.Findings(packages={"PyTorch": torch.__version__})
    doctor._look_at_gpus(found)
    assert found.machine["NVIDIA driver"] == "580.65.06"
    return found


def test_a_gpu_that_torch_cannot_use_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nmore")

    found = gpu_findings(monkeypatch, tmp_path, cuda__init=init)
    assert found.problems == [
        "this machine has NVIDIA H200, but PyTorch sees no GPU: The NVIDIA driver on your system is too old (found "
        "version 11040).; update the driver or install another PyTorch"
    ]


def test_a_torch_without_cuda_beside_a_gpu_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_findings(monkeypatch, tmp_path, version__cuda=None)
    assert found.machine["CUDA of PyTorch"] == "none: built without CUDA"
    assert "PyTorch is built without CUDA; install the CUDA build" in found.problems[0]


def test_gpus_may_be_hidden_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_findings(monkeypatch, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor._invisible_gpu(["NVIDIA H200"]) is None


def test_a_gpu_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, major, minor, total_memory = "NVIDIA H200", 9, 0, 139 * 2**30

    def broken(*size: int, **options: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Gpu)
    monkeypatch.setattr(torch, "ones", broken)
    found = doctor.Findings(packages={"PyTorch": torch.__version__})
    doctor._look_at_gpus(found)
    assert found.machine["GPU 0"] == "NVIDIA H200, compute capability 9.0, 139.0 GiB"
    assert found.problems[0].startswith("GPU 0 (NVIDIA H200) does not compute: CUDA error: no kernel image")


def test_tables_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    found = doctor.Findings(machine={"GPU 0": "NVIDIA H200"}, packages={"rich": "15.0.0", "timm": "broken: [red]"})
    found.choices = [doctor.Choice("train.norm", "apex", False, "NVIDIA Apex is not installed; " + "build it " * 20)]
    doctor.show(found)
    out = capsys.readouterr().out
    assert "broken: [red]" in out  # no markup of rich
    assert out.count("build") == 20
    assert out.splitlines()[-1] == "ready to train on 1 GPU(s)"
