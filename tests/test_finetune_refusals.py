"""What fine-tuning refuses before it begins: one line that names the option or the file, and the remedy."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sgmim_fast.cli import main
from sgmim_fast.config import BackboneConfig
from sgmim_fast.errors import UserError
from sgmim_fast.finetune import make_job
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.weights import save_weights
from tests import dense_sets
from tests.finetune_runs import arguments
from tests.tiny_finetuned import TINY
from tests.training_runs import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone of our own file."""
    return save_weights(
        Backbone(replace(TINY, norm="last")), tmp_path_factory.mktemp("weights") / "tiny.safetensors", layout="sgmim"
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_sets.write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", count=11, size=64)


def refused(words: list[str]) -> str:
    def begin() -> None:
        job, _ = make_job(words)
        job.check(CPU)
        job.open()
        job.make_task(CPU, "torch")

    with pytest.raises(UserError) as caught:
        begin()
    message = str(caught.value)
    assert "\n" not in message
    return message


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("depth", {"schedule__kind": "cosine"}, "--schedule.kind"),
    ("depth", {"optimizer__layer_decay": 0}, "optimizer.layer_decay 0.0 must be in (0, 1]"),
    ("depth", {"schedule__min_lr": 1}, "schedule.min_lr 1.0 is above optimizer.lr"),
    ("depth", {"evaluate_every": -1}, "evaluate_every -1 must be 0 or more"),
    ("depth", {"backbone__name": "swin_base"}, "build the model like the file's"),
    ("depth", {"backbone__name": "swin_huge"}, "backbone 'swin_huge' is unknown; choose one of swin_base"),
    ("depth", {"backbone__window_size": "4 4 4"}, "window_size (4, 4, 4) must be one for all stages or have one entry"),
    ("depth", {"backbone__weights": "none"}, "name a backbone"),
    ("depth", {"train__activation_checkpointing": "4"}, "names a stage that the swin encoder lacks"),
    ("depth", {"depth__max_depth": 0}, "must be positive metres"),
    ("depth", {"data__train_list": "nowhere.txt", "data__val_list": "nowhere.txt"}, "nowhere.txt"),
    ("segmentation", {"segmentation__classes": 4}, "set --segmentation.classes 8"),
    ("segmentation", {"segmentation__classes": 300}, "segmentation.classes 300 must be 1 to 255"),
    ("segmentation", {"data__crop_size": "0 64"}, "data.crop_size 0 64"),
]


@pytest.mark.parametrize(("task", "options", "message"), CASES, ids=[str(list(case[1])) for case in CASES])
def test_settings(
    task: str, options: dict[str, Any], message: str, weights: Path, scenes: Path, tmp_path: Path
) -> None:
    assert message in refused(arguments(task, scenes, weights, tmp_path, **options))


def test_weights(weights: Path, scenes: Path, tmp_path: Path) -> None:
    def weighed(path: Path | str) -> str:
        return refused(arguments("depth", scenes, Path(path), tmp_path))

    assert "nowhere.safetensors: cannot be read" in weighed("nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no checkpoint" in weighed(tmp_path / "empty")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:1000])
    assert "is damaged" in weighed(cut)
    words = ["depth", "--data", str(scenes), "--output", str(tmp_path)]
    assert "--backbone.weights is not set; name a pre-training run's folder" in refused(words)
    other = BackboneConfig(encoder="vit", image_size=64, embed_dim=16, depths=(4,), num_heads=(2,))
    vit = save_weights(Backbone(other), tmp_path / "vit.safetensors", layout="sgmim")
    named = arguments("depth", scenes, vit, tmp_path, backbone__name="swin_base")
    assert "holds a vit encoder" in refused(named)


def test_data(weights: Path, scenes: Path, tmp_path: Path) -> None:
    def opened(data: Path, **options: Any) -> str:
        return refused(arguments("depth", data, weights, tmp_path, recipe="folder", data__crop_size="32 32", **options))

    assert "nowhere" in opened(tmp_path / "nowhere")
    own = dense_sets.write_own_depth(tmp_path / "own", scale=256)
    assert "it looks like" in opened(own, data__depth_scale=1)
    few = dense_sets.write_own_depth(tmp_path / "few", count=2)
    job, _ = make_job(arguments("depth", few, weights, tmp_path, recipe="folder", data__crop_size="32 32"))
    job.open()
    with pytest.raises(UserError, match=r"has 1 pairs but one optimizer step takes 2 "):
        job.order(1)


def test_command_line(weights: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line, once for all ranks."""
    for words, message in (
        (["finetune"], "depth or segmentation comes first"),
        (["finetune", "pose"], "depth or segmentation comes first"),
        (["finetune", "depth", "--recipe", "cityscapes"], "recipe 'cityscapes' is unknown; choose one of nyu, kitti"),
        (["finetune", "depth", "--num-gpus", "0"], "--num-gpus 0 must be 1 or more"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    words = arguments("depth", tmp_path / "nowhere", weights, tmp_path / "run")
    done = run([sys.executable, "-m", "sgmim_fast.cli", "finetune", *words[:1], "--num-gpus", "2", *words[1:]])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "nowhere" in errors[0]
    assert not (tmp_path / "run").exists()


def test_dry_run_reads_no_data(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments("segmentation", tmp_path / "nowhere", weights, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *words, "--dry-run"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "swin backbone, segmentation" in out
    assert "expected peak" in out
    assert not (tmp_path / "run").exists()
