"""``sgmim`` from a shell: the demo in small, and refusals in one line."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from sgmim_fast.cli import main
from sgmim_fast.errors import one_line_errors
from sgmim_fast.launching import launch
from tests.verify_cases import cut, write_pairs

SMALL = ("--train.batch-size", "2", "--train.max-steps", "2", "--data.crop-size", "64", "64")


def sgmim(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sgmim_fast.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, env=environment)


def test_demo_in_small(tmp_path: Path) -> None:
    """Scenes, two DeepSpeed ranks, page, export; a second call finds its work done and compares it; timm takes the
    backbone, and so do both dense tasks.
    """
    done = sgmim(tmp_path, "demo", "--count", "40", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/demo/report.html").resolve().as_uri() in done.stdout
    assert "Traceback" not in done.stderr
    weights = (tmp_path / "runs/demo/checkpoints/step_000002/model.safetensors").read_bytes()
    compared = sgmim(tmp_path, "demo", "--count", "40", "--compare")  # for as many steps as the run that is there
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "runs/demo holds a finished run; delete the folder to train again" in compared.stdout
    assert (tmp_path / "runs/demo/checkpoints/step_000002/model.safetensors").read_bytes() == weights
    assert [line[:4] for line in compared.stdout.splitlines() if line[1:4] == "/7 "] == [f"{n}/7 " for n in range(1, 8)]
    page = (tmp_path / "runs/demo/report.html").read_text()
    assert "Both encoders began with equal weights" in page
    assert "the weights that both began with" in page
    figures = json.loads((tmp_path / "runs/demo-simmim/probe.json").read_text())["reports"]["depth"]
    assert figures["val"].endswith("all 8 images of scenes/demo-test")
    shown = f"{figures['results'][0]['figures']['abs_rel']:.3f}"
    assert f"<td>{shown}</td>" in page
    assert re.search(rf"runs/demo-simmim .*{shown}", compared.stdout)
    again = sgmim(tmp_path, "demo", "--count", "40", "--compare")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("is up to date") == 4
    config = tmp_path / "runs/demo-simmim/config.json"
    config.write_text(config.read_text().replace('"max_steps": 2', '"max_steps": 1'))
    refused = sgmim(tmp_path, "demo", "--compare")
    assert refused.returncode == 2
    assert "were not trained alike: train.max_steps is 2 in the one and 1 in the other" in refused.stderr

    backbone = timm.models.swin_transformer.SwinTransformer(
        img_size=128, embed_dim=32, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=4, num_classes=0
    )
    backbone.load_state_dict(load_file(tmp_path / "runs/demo/backbone_timm.safetensors"))
    assert backbone(torch.randn(1, 3, 128, 128)).isfinite().all()

    for task in ("depth", "segmentation"):
        run = f"runs/demo-{task}"
        tuned = sgmim(tmp_path, "finetune", task, "--num-gpus", "2", "--recipe", "scenes", *SMALL)
        assert tuned.returncode == 0, tuned.stdout + tuned.stderr
        assert "evaluated after step 2" in tuned.stdout
        main(["evaluate", str(tmp_path / run), "--data", str(tmp_path / "scenes/demo")])
        image = tmp_path / "scenes/demo/images/000001.jpg"
        main(["predict", str(tmp_path / run), str(image), "--out", str(tmp_path / task)])
        assert (tmp_path / task / "000001.png").is_file()

    other = sgmim(tmp_path, "export", "runs/demo", "--layout", "sgmim", "--output", "mine.safetensors")
    assert other.returncode == 0, other.stderr
    assert any(name.startswith("fusion_blk_img") for name in load_file(tmp_path / "mine.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere"], "nowhere: holds no config.json; name the folder of a run"),
        (
            ["export", "nowhere", "--layout", "sgmim", "--image-size", "64"],
            "--image-size is for timm, hf, torch-export",
        ),
        (["export", "nowhere", "--layout", "hf", "--batch-size", "2"], "--batch-size is for torch-export and onnx"),
        (["synth", "out", "--count", "0"], "count 0 must be 1 or more"),
        (["pretrain", "--recipe", "nope"], "recipe 'nope' is unknown"),
        (["pretrain", "--num-gpus", "0"], "--num-gpus 0"),
    ],
)
def test_refusals(words: list[str], message: str, tmp_path: Path) -> None:
    done = sgmim(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_data_is_said_once_by_two_ranks(tmp_path: Path) -> None:
    done = sgmim(tmp_path, "pretrain", "--num-gpus", "2", "--recipe", "demo", "--data", "nowhere")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    assert "nowhere" in done.stderr


def test_help_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from sgmim_fast.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_output_that_nobody_reads_any_more_is_no_error(tmp_path: Path) -> None:
    script = (
        "from sgmim_fast.errors import one_line_errors\n"
        "with one_line_errors():\n    for number in range(10**6): print(number)"
    )
    shell = f"'{sys.executable}' -c '{script}' | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


def test_another_broken_pipe_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError), one_line_errors():
        raise BrokenPipeError


@pytest.mark.parametrize("command", [[], ["evaluate"], ["predict"], ["probe"], ["synth"], ["finetune"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert not re.search(r"default: (None|False)", said)
    assert (
        command == ["synth"] or "sgmim " in said.split("usage:")[1].partition("\n")[2]
    )  # an example, or where to begin


def test_verify_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def status(*words: str) -> object:
        with pytest.raises(SystemExit) as caught:
            main(["verify", *words, "--loader", "torch", "--workers", "1"])
        return caught.value.code

    write_pairs(tmp_path, 3)
    assert status(str(tmp_path)) == 0
    cut(tmp_path / "images/001.jpg")
    assert status(str(tmp_path)) == 1
    assert "unreadable" in capsys.readouterr().out
    assert status(str(tmp_path), "--channels", "3") == 3
    assert status(str(tmp_path / "absent")) == 2
    assert "error: " in capsys.readouterr().err


def test_shard_then_report_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "set", 4)
    (tmp_path / "set/images/002.jpg").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["shard", str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1"])
    assert "002.jpg" in capsys.readouterr().err
    main(["shard", str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1", "--skip-bad"])
    out = capsys.readouterr().out
    assert "3 pairs in 1 shards" in out
    assert "1 bad pairs were left out" in out


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher would make GPUs visible that CUDA_VISIBLE_DEVICES hides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--num-gpus", "3", "--recipe", "demo"])
    assert stop.value.code == 2
    assert "--num-gpus 3 is more than the 2 GPU(s)" in capsys.readouterr().err


def test_devices_that_are_named_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Launched:
        pid = -1

        def __init__(self, command: list[str], **options: object) -> None:
            commands.append(command)

        def wait(self) -> int:
            return -9

    monkeypatch.setattr(subprocess, "Popen", Launched)
    environment = {"CUDA_VISIBLE_DEVICES": "2,GPU-17,5", "MASTER_PORT": "1234"}
    assert launch("some.module", ["--word"], ranks=2, environment=environment) == 137
    (command,) = commands
    assert command[-3:] == ["--module", "some.module", "--word"]
    assert "--master_port=1234" in command
    world = next(word for word in command if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info="))) == {"localhost": ["2", "GPU-17"]}
