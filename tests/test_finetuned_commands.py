"""``sgmim evaluate`` and ``sgmim predict`` on data in the true layouts, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgmim_fast.cli import main
from sgmim_fast.config import DepthDataConfig, SegmentationDataConfig
from sgmim_fast.data.dense.evaluation import read_picture
from sgmim_fast.tasks.finetuned import load_finetuned
from tests import dense_sets
from tests.tiny_finetuned import depth_run, segmentation_run
from tests.tiny_run import make_run

WEIGHTS = "checkpoints/step_000002/model.safetensors"
NYU = DepthDataConfig(dataset="nyu")


def evaluated(run: Path, *words: str) -> dict[str, Any]:
    output = run / "found.json"
    main(["evaluate", str(run), "--device", "cpu", "--output", str(output), *words])
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def plain_depth_figures(run: Path, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """By hand: whole images, no crop; (image, metres) each."""
    task, _ = load_finetuned(run / WEIGHTS)
    found: dict[str, list[float]] = {"abs_rel": [], "rmse": [], "d1": []}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for pixels, metres in pairs:
        image = torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            depth = task.predict(image)[0, 0].double().numpy().clip(1e-3, 10)
        valid = (metres > 1e-3) & (metres < 10)
        p, t = depth[valid], metres[valid]
        found["abs_rel"].append(np.mean(np.abs(p - t) / t))
        found["rmse"].append(np.sqrt(np.mean((p - t) ** 2)))
        found["d1"].append(np.mean(np.maximum(p / t, t / p) < 1.25))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_depth_of_a_nyu_folder_equals_a_calculation_by_hand(tmp_path: Path) -> None:
    root = dense_sets.write_nyu(tmp_path / "nyu", train=1, val=3)
    run = depth_run(tmp_path / "run", NYU, flip=False)
    figures = evaluated(run, "--data", str(root))["figures"]
    assert (figures["images"], figures["skipped_images"]) == (3, 0)
    lines = (root / "nyudepthv2_test_files_with_gt.txt").read_text().split("\n")
    files = [line.split()[:2] for line in lines if line.strip()]
    read = [[np.asarray(Image.open(next(root.rglob(Path(name).name)))) for name in pair] for pair in files]
    expected = plain_depth_figures(run, [(image, depth / 1000.0) for image, depth in read])
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name


def test_protocols_of_the_benchmarks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Crops, windows and mirror images; a list with an image that has no truth; another data set than the run's."""
    nyu, kitti = dense_sets.write_nyu(tmp_path / "nyu", 1, 2), dense_sets.write_kitti(tmp_path / "kitti", 1, 1)
    run = depth_run(tmp_path / "run", NYU, crop="nyu", windows=2)
    found = evaluated(run, "--data", str(nyu))
    assert found["evaluation"] == {"flip": True, "windows": 2, "crop": "nyu"}
    assert 0 <= found["figures"]["d1"] <= found["figures"]["d3"] <= 1
    far = depth_run(tmp_path / "far", DepthDataConfig(dataset="kitti"), max_depth=80.0, crop="garg", windows=4)
    found = evaluated(far, "--data", str(kitti), "--evaluation.no-flip")
    assert found["evaluation"] == {"flip": False, "windows": 4, "crop": "garg"}
    assert found["figures"]["images"] == 1
    assert "without ground truth" in capsys.readouterr().out


def test_segmentation_of_an_ade20k_folder(tmp_path: Path) -> None:
    root = dense_sets.write_ade20k(tmp_path / "ade", 1, 3)
    run = segmentation_run(tmp_path / "run", SegmentationDataConfig(resize=None), mode="slide", crop=64, stride=40)
    found = evaluated(run, "--data", str(root), "--limit", "2")
    assert found["images"] == 2
    assert set(found["figures"]) == {"mIoU", "mAcc", "aAcc"}
    assert found["details"]
    assert all(0 <= value <= 1 for value in (found["figures"] | found["details"]).values())
    whole = evaluated(run, "--data", str(root), "--evaluation.mode", "whole")
    assert whole["images"] == 3


def test_depth_predictions_are_metres_and_pictures(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, size in enumerate([(48, 80), (33, 61), (3, 5)]):  # of any size, smaller than a window too
        dense_sets.save(images / f"{number}.png", dense_sets.picture(number, size))
    run = depth_run(tmp_path / "run", NYU)
    out = tmp_path / "out"
    main(["predict", str(run), str(images), "--out", str(out), "--device", "cpu", "--evaluation.no-flip"])
    task, _ = load_finetuned(run / WEIGHTS)
    for number, size in enumerate([(48, 80), (33, 61), (3, 5)]):
        metres = np.load(out / f"{number}.npy")
        assert metres.shape == size
        with torch.no_grad():
            expected = task.predict(read_picture(images / f"{number}.png").image[None])[0, 0]
        np.testing.assert_array_equal(metres, expected.numpy())
        picture = Image.open(out / f"{number}.png")
        assert picture.width == 2 * size[1] + 8
        assert picture.height > size[0]


def test_class_predictions_are_labels_and_pictures(tmp_path: Path) -> None:
    image = dense_sets.save(tmp_path / "a b.png", dense_sets.picture(9, (70, 90)))
    run = segmentation_run(tmp_path / "run", SegmentationDataConfig(resize=(128, 64)))
    main(
        ["predict", str(run / "checkpoints/step_000002"), str(image), "--out", str(tmp_path / "out"), "--device", "cpu"]
    )
    labels = np.asarray(Image.open(tmp_path / "out" / "a b_labels.png"))
    assert labels.shape == (70, 90)
    assert labels.max() < 4
    assert (tmp_path / "out" / "a b.png").is_file()


def refusal(capsys: pytest.CaptureFixture[str], words: list[Any]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = depth_run(tmp_path / "run", NYU)
    image = dense_sets.save(tmp_path / "a.png", dense_sets.picture(9, (70, 90)))
    other = dense_sets.save(tmp_path / "more" / "a.jpg", dense_sets.picture(9, (70, 90)))
    out = tmp_path / "out"
    assert "no config.json" in refusal(capsys, ["evaluate", tmp_path])
    assert "is a pretrain run" in refusal(capsys, ["evaluate", make_run(tmp_path / "pretrained")])
    assert "did you mean --evaluation.windows" in refusal(capsys, ["evaluate", run, "--evaluation.window", "2"])
    for setting in ("--backbone.window-size", "--depth.head-channels", "--train.batch-size"):
        assert f"option {setting} changes nothing of a trained" in refusal(capsys, ["evaluate", run, setting, "2"])
    for setting in ("--data", "--depth.max-depth"):
        told = refusal(capsys, ["predict", run, image, setting, "5"])
        assert "changes nothing of a trained model here; what can be changed is --evaluation.*, --data.resize" in told
    early = refusal(capsys, ["evaluate", "--evaluation.windows", "2", run])
    assert "--evaluation.windows comes too early; settings of the run stand after RUN" in early
    assert "comes too early" in refusal(capsys, ["predict", run, "--evaluation.windows", "2", image])
    assert "nowhere" in refusal(capsys, ["evaluate", run, "--data", tmp_path / "nowhere"])
    assert "is not a folder; create it first" in refusal(capsys, ["evaluate", run, "--output", out / "no" / "f.json"])
    assert "--limit 0" in refusal(capsys, ["evaluate", run, "--limit", "0"])
    assert "--device cuda:99 cannot be used" in refusal(capsys, ["evaluate", run, "--device", "cuda:99"])
    assert "does not exist" in refusal(capsys, ["predict", run, tmp_path / "b.png", "--out", out])
    assert "holds no images" in refusal(capsys, ["predict", run, run, "--out", out])
    assert "both be written as a.png" in refusal(capsys, ["predict", run, image, other, "--out", out])
    main(["predict", str(run), str(image), "--out", str(out), "--device", "cpu"])
    before = (out / "a.npy").read_bytes()
    assert "exists; choose another --out" in refusal(capsys, ["predict", run, image, "--out", out])
    assert (out / "a.npy").read_bytes() == before
    main(["predict", str(run / WEIGHTS), str(image), "--out", str(out), "--device", "cpu", "--overwrite"])
    strip = dense_sets.save(tmp_path / "strip.png", dense_sets.picture(9, (8, 90)))
    narrow = refusal(capsys, ["predict", run, strip, "--out", out, "--evaluation.windows", "2"])
    assert "strip.png: evaluation.windows 2 leaves columns of an image of 8 x 90 pixels out" in narrow
    weights = run / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "is damaged" in refusal(capsys, ["evaluate", run])
    (run / "checkpoints" / "latest").unlink()
    assert "has no checkpoint yet" in refusal(capsys, ["evaluate", run])
