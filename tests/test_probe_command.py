"""Probes from images to figures: what is and what is not in the features, in Python and as a command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_cases import SWIN_DEPTHS, tiny_backbone
from dense_sets import CLASSES, write_ade20k, write_kitti, write_own_depth, write_own_labels, write_scenes
from torch import Tensor

from sgmim_fast.backbones import create_backbone
from sgmim_fast.cli import main
from sgmim_fast.config import ModelConfig
from sgmim_fast.data.dense.evaluation import EvaluationSample, evaluation_samples
from sgmim_fast.data.scenes.synthetic import render_dataset
from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.probing.data import ProbeSplits, open_splits
from sgmim_fast.probing.features import BackboneFeatures, Features, RowColour
from sgmim_fast.probing.probes import CONSTANT, GRID_TARGET, ProbeReport, run_probes
from sgmim_fast.probing.record import read_record
from sgmim_fast.probing.settings import ProbeSettings
from sgmim_fast.probing.targets import Cells, DepthTarget
from sgmim_fast.weights import save_weights

SMALL = ProbeSettings(train_images=8, val_images=2, tokens=256, neighbours=5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 scenes to fit on, 2 to score on."""
    return write_scenes(tmp_path_factory.mktemp("probing") / "scenes", count=20)


@pytest.fixture(scope="module")
def depth(scenes: Path) -> ProbeSplits:
    return open_splits("depth", "scenes", str(scenes))


@pytest.fixture(scope="module")
def labels(scenes: Path) -> ProbeSplits:
    return open_splits("segmentation", "scenes", str(scenes))


# -- the whole


class Told:
    """Features in which the truth is hidden linearly, or not at all."""

    stride = 8

    def __init__(self, splits: ProbeSplits, knows: bool) -> None:
        self.channels = splits.target.size + 4
        self._known: dict[float, Tensor] = {}
        for samples in (splits.train, splits.val):
            for sample in evaluation_samples(samples, range(len(samples))):
                values = splits.target.cells(sample, 8).values if knows else random(splits.target.size, 8, 8)
                mix = random(self.channels, splits.target.size, seed=5)
                noise = random(self.channels, 8, 8, seed=len(self._known))
                hidden = torch.einsum("ct,thw->chw", mix, values) + (1e-3 if knows else 1.0) * noise
                self._known[float(sample.image.sum())] = hidden

    def __call__(self, image: Tensor) -> Tensor:
        return self._known[float(image.sum())]

    def describe(self) -> str:
        return "told"


ALL = replace(SMALL, train_images=18, tokens=18 * 64)


def test_depth_that_is_in_the_features_is_found(depth: ProbeSplits) -> None:
    report = run_probes(Features(Told(depth, True)), depth, ["depth", "knn-depth"], ALL)
    best, constant = report[GRID_TARGET].figures, report[CONSTANT].figures
    assert best["abs_rel"] < 0.4 * constant["abs_rel"]  # else this test says little
    for name in ("abs_rel", "rmse_log", "d1"):
        assert report["depth"].figures[name] == pytest.approx(best[name], abs=0.02)
    assert report["knn-depth"].figures["abs_rel"] < (best["abs_rel"] + constant["abs_rel"]) / 2
    assert report["depth"].chosen["held_out_squared_error"] < 1e-3
    blind = run_probes(Features(Told(depth, False)), depth, ["depth", "knn-depth"], ALL)
    assert blind["depth"].figures["abs_rel"] == pytest.approx(constant["abs_rel"], rel=0.1)
    assert blind["knn-depth"].figures["rmse_log"] > 0.9 * constant["rmse_log"]


def test_classes_that_are_in_the_features_are_found(labels: ProbeSplits) -> None:
    probes = ("segmentation", "knn-segmentation")
    report = run_probes(Features(Told(labels, True)), labels, probes, ALL)
    best, constant = report[GRID_TARGET].figures, report[CONSTANT].figures
    assert best["aAcc"] > 0.9 > constant["aAcc"] + 0.2
    assert report["segmentation"].figures["aAcc"] > best["aAcc"] - 0.05
    assert report["knn-segmentation"].figures["aAcc"] > best["aAcc"] - 0.1
    blind = run_probes(Features(Told(labels, False)), labels, probes, ALL)
    assert blind["segmentation"].figures["aAcc"] == pytest.approx(constant["aAcc"], abs=0.03)
    assert blind["knn-segmentation"].figures["mIoU"] < 0.6 * report["knn-segmentation"].figures["mIoU"]


def figures(report: ProbeReport) -> dict[str, object]:
    return {result.probe: (result.figures, result.chosen) for result in report.results}


def test_probes_are_deterministic_and_change_nothing(depth: ProbeSplits, labels: ProbeSplits) -> None:
    backbone = tiny_backbone("swin", norm="last")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    shared = Features(BackboneFeatures(backbone))
    for splits, probes in ((depth, ("depth", "knn-depth")), (labels, ("segmentation", "knn-segmentation"))):
        once = run_probes(shared, splits, probes, SMALL)  # type: ignore[arg-type]
        torch.manual_seed(99)
        forgetful = Features(BackboneFeatures(backbone), budget=0)
        again = run_probes(forgetful, splits, probes, SMALL)  # type: ignore[arg-type]
        assert figures(once) == figures(again)
        assert (once.train_images, once.val_images, once.train_sha256) == (8, 2, again.train_sha256)
        other = run_probes(shared, splits, probes, replace(SMALL, seed=1))  # type: ignore[arg-type]
        assert other.train_sha256 != once.train_sha256
    # 2 images to score on, and 8 of two seeds that overlap, are all that the shared features were computed of
    assert shared.computed <= 2 + 8 + 8
    assert all(value.equal(before[name]) for name, value in backbone.state_dict().items())
    assert not backbone.training


def test_more_images_add_to_fewer(depth: ProbeSplits) -> None:
    few, _ = depth.chosen(SMALL)
    more, val = depth.chosen(replace(SMALL, train_images=12))
    assert more[:8] == few
    assert len(set(more)) == 12
    assert val == [0, 1]


def test_tokens_are_drawn_evenly(depth: ProbeSplits) -> None:
    report = run_probes(Features(RowColour()), depth, ["knn-depth"], replace(SMALL, tokens=20))
    assert report.kept_tokens == 20
    assert 20 < report.train_tokens <= 8 * 64


def test_images_larger_than_their_labels_are_scored_at_the_labels_size(tmp_path: Path) -> None:
    """ADE20K's images are resized; its label maps are not."""
    splits = open_splits("segmentation", "ade20k", str(write_ade20k(tmp_path, size=(24, 32))), classes=CLASSES)
    settings = ProbeSettings(train_images=4, val_images=2, tokens=400)
    sample = next(evaluation_samples(splits.val, [0]))
    assert sample.image.shape[1:] != sample.target.shape
    report = run_probes(Features(RowColour(64)), splits, ["segmentation"], settings)
    assert report["segmentation"].figures["aAcc"] > 0.8  # stripes, which the column tells


def test_sparse_depth_of_another_data_set(tmp_path: Path) -> None:
    splits = open_splits("depth", "kitti", str(write_kitti(tmp_path, train=3, val=1)))
    report = run_probes(
        Features(RowColour(32)),
        splits,
        ["depth", "knn-depth"],
        replace(SMALL, train_images=3, val_images=1, tokens=999),
    )
    assert report["depth"].figures["d1"] > report[CONSTANT].figures["d1"] + 0.3  # a ramp along the columns
    assert report[GRID_TARGET].figures["d1"] > 0.99


def test_targets_in_too_few_images(tmp_path: Path) -> None:
    root = write_own_depth(tmp_path)
    splits = open_splits("depth", "folder", str(root), max_depth=80.0)
    near = replace(splits, target=DepthTarget(70.0, 80.0, "none"))
    with pytest.raises(UserError, match="0 of 4 training images has a pixel with a target"):
        run_probes(Features(RowColour()), near, ["depth"], ProbeSettings(train_images=4, val_images=1))
    with pytest.raises(UserError, match="probe segmentation does not go with"):
        run_probes(Features(RowColour()), splits, ["segmentation"], SMALL)


class Here(DepthTarget):
    """Depth that only some images have."""

    def __init__(self, have: set[int]) -> None:
        super().__init__(0.001, 30.0, "none")
        self.have = have

    def cells(self, sample: EvaluationSample, stride: int) -> Cells:
        found = super().cells(sample, stride)
        return found if sample.index in self.have else Cells(found.values * 0, found.weight * 0)


def test_images_without_a_target_leave_no_fold_empty(depth: ProbeSplits) -> None:
    """The first and the sixth of eight would share a fold of five if folds went by place."""
    train, _ = depth.chosen(SMALL)
    two = replace(depth, target=Here({train[0], train[5]}))
    report = run_probes(Features(RowColour()), two, ["depth"], SMALL)
    assert report["depth"].chosen["held_out_squared_error"] > 0
    with pytest.raises(UserError, match="1 of 8 training images"):
        run_probes(Features(RowColour()), replace(depth, target=Here({train[0]})), ["depth"], SMALL)


@pytest.mark.parametrize(
    ("field", "complaint"),
    [
        ({"train_images": 1}, "train_images 1 must be 2"),
        ({"tokens": 100}, "tokens 100 must be 200"),
        ({"temperature": 0.0}, "temperature"),
        ({"neighbours": 0}, "neighbours"),
    ],
)
def test_settings_that_make_no_sense(field: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ProbeSettings(**field)  # type: ignore[arg-type]


# -- the command

QUICK = ("--train-images", "6", "--val-images", "2", "--tokens", "120")


def weights_file(path: Path) -> Path:
    torch.manual_seed(5)
    shape = {"embed_dim": 16, "depths": SWIN_DEPTHS, "num_heads": (1, 2, 4, 8), "window_size": 2}
    return save_weights(SGMIM(ModelConfig(image_size=64, **shape)), path)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pre-training run leaves, as far as the command reads it."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = folder / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint.parent / "latest").write_text("step_000003\n")
    weights_file(checkpoint / "model.safetensors")
    return folder


def probe(*words: object) -> None:
    main(["probe", *map(str, words)])


def test_as_many_images_as_there_are(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe("row-colour", "--data", scenes, "--dataset", "scenes", "--tasks", "depth")
    assert "depth: 18 images fitted on" in capsys.readouterr().out


def test_command_probes_a_run(scenes: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--data", scenes, "--dataset", "scenes", *QUICK)
    probe(run, *common, "--output", tmp_path / "run.json")
    printed = capsys.readouterr().out
    for line in ("knn-segmentation", "grid target", "6 images fitted on", "2 scored", "mIoU"):
        assert line in printed
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["weights"].endswith("step_000003/model.safetensors")
    assert (found["stride"], found["channels"]) == (8, 16 * 15)
    assert found["reports"]["depth"]["target"] == {"min_depth": 0.001, "max_depth": 30.0, "crop": "none"}
    names = [result["probe"] for result in found["reports"]["segmentation"]["results"]]
    assert names == ["segmentation", "knn-segmentation", CONSTANT, GRID_TARGET]
    # It is what Python's face says of the encoder with its own norm.
    file = run / "checkpoints" / "step_000003" / "model.safetensors"
    features = Features(BackboneFeatures(create_backbone(weights=file, norm="last")))
    settings = ProbeSettings(train_images=6, val_images=2, tokens=120)
    report = run_probes(features, open_splits("depth", "scenes", str(scenes)), ["depth"], settings)
    assert found["reports"]["depth"]["results"][0]["figures"] == report["depth"].figures
    # The file, named itself, says the same; other weights say something else on the same images.
    probe(file, *common, "--tasks", "depth", "--output", tmp_path / "file.json")
    probe("random", "--like", run, *common, "--seed", 0, "--tasks", "depth", "--output", tmp_path / "random.json")
    probe("row-colour", *common, "--tasks", "depth", "--output", tmp_path / "rows.json")
    of = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["reports"]["depth"]
        for name in ("run", "file", "random", "rows")
    }
    assert of["file"]["results"][0]["figures"] == of["run"]["results"][0]["figures"]
    assert len({report["results"][0]["figures"]["rmse"] for report in of.values()}) == 3
    assert len({report["train_sha256"] + report["val_sha256"] for report in of.values()}) == 1
    assert len({report["results"][-1]["figures"]["rmse"] for report in of.values()}) == 1


def test_another_folder_is_scored_on_as_a_whole(scenes: Path, tmp_path: Path) -> None:
    test = render_dataset(tmp_path / "test", count=7, size=64, workers=1, split="test")
    common = ("row-colour", "--data", scenes, "--dataset", "scenes", "--train-images", 6, "--tokens", 120)
    probe(*common, "--val-data", test, "--val-images", 7, "--output", tmp_path / "found.json")
    content = json.loads((tmp_path / "found.json").read_text())
    for kind, found in content["reports"].items():
        assert found["val"] == f"scenes: all 7 images of {test}"
        assert found["train"].startswith(f"scenes (train): 18 images of {scenes}")
        splits = open_splits(kind, "scenes", str(scenes), val_path=str(test))
        names = [splits.val.members(index)[0].path for index in range(7)]
        assert names == [str(test / f"images/{number:06d}.jpg") for number in range(7)]
        own = open_splits(kind, "scenes", str(scenes))
        assert (len(own.train), len(own.val)) == (len(splits.train), 2) == (18, 2)
    # What is written is read again, and tells the same images from others.
    record = read_record(tmp_path / "found.json")
    assert record.weights == "row-colour"
    results = content["reports"]["depth"]["results"]
    assert record.figures["depth"]["knn-depth"] == results[1]["figures"]
    probe(*common, "--val-images", 2, "--output", tmp_path / "own.json")
    assert record.difference(record) == ""
    assert "settings.val_images is 7 in the one and 2 in the other" in record.difference(
        read_record(tmp_path / "own.json")
    )


def test_random_weights_are_those_of_the_seed(run: Path, scenes: Path, tmp_path: Path) -> None:
    rmse = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(rmse))
        output = tmp_path / "found.json"
        common = ("--data", scenes, "--dataset", "scenes", *QUICK, "--tasks", "depth", "--maps", 0, "--output", output)
        probe("random", "--like", run, *common, "--seed", seed)
        rmse.append(json.loads(output.read_text())["reports"]["depth"]["results"][0]["figures"]["rmse"])
    assert rmse[0] == rmse[1] != rmse[2]


def test_command_takes_folders_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_own_labels(tmp_path)
    common = ("row-colour", "--data", root, "--dataset", "folder", *QUICK, "--val-images", 1)
    probe(*common, "--tasks", "segmentation", "--classes", CLASSES)
    assert "segmentation: 6 images fitted on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("row-colour", "--dataset", "scenes", "--train-images", 50), "--train-images 50 is more than there are"),
        (("row-colour", "--dataset", "scenes", "--val-data", "nowhere"), "nowhere is no folder"),
        (("row-colour", "--dataset", "nyu", "--val-data", "nowhere"), "--val-data is for --dataset scenes or folder"),
        (("row-colour", "--dataset", "nyu", "--tasks", "segmentation"), "--tasks segmentation cannot be with"),
        (("row-colour", "--dataset", "folder"), "--tasks is not set"),
        (("row-colour", "--dataset", "folder", "--tasks", "segmentation"), "--classes is not set"),
        (("row-colour", "--dataset", "scenes", "--name", "swin_base"), "--name means nothing"),
        (("row-colour", "--dataset", "scenes", "--add-place"), "--add-place means nothing"),
        (("row-colour", "--dataset", "scenes", "--like", "x"), '--like is for "random" alone'),
        (("row-colour", "--dataset", "scenes", "--cache-gib", "-1"), "--cache-gib -1.0 must be"),
        (("row-colour", "--dataset", "scenes", "--output", "nowhere/x.json"), "nowhere is not a folder"),
        (("row-colour", "--dataset", "scenes", "--classes", 3), "has 8 classes"),
        (("random", "--dataset", "scenes"), "either --name swin_base or --like RUN"),
        (("random", "--dataset", "scenes", "--name", "swin_tiny"), "'swin_tiny' is unknown"),
        (("nowhere.safetensors", "--dataset", "scenes"), "nowhere.safetensors: cannot be read"),
        (("{scenes}", "--dataset", "scenes"), "holds no checkpoint"),
        (("{run}", "--dataset", "scenes", "--maps", 7), "maps 7 must be among 0 to 3"),
        (("{run}", "--dataset", "scenes", "--device", "gpu"), "--device gpu cannot be used"),
        (("{run}", "--dataset", "kitti"), "holds none of eigen_train"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[object, ...], complaint: str, scenes: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(word).format(scenes=scenes, run=run) for word in words]
    with pytest.raises(SystemExit) as stop:
        probe(*given, "--data", scenes, *(() if "--train-images" in words else QUICK))
    assert stop.value.code == 2
    found = capsys.readouterr().err.strip()
    assert complaint in found
    assert found.count("\n") == 0


def test_fine_tuned_model_is_refused(tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sgmim_fast.config import DepthConfig
    from sgmim_fast.tasks.finetuned import save_finetuned

    backbone: Backbone = tiny_backbone("swin")
    file = tmp_path / "model.safetensors"
    save_finetuned(backbone.state_dict(), file, backbone.config, DepthConfig(), {})
    with pytest.raises(SystemExit):
        probe(file, "--data", scenes, "--dataset", "scenes", *QUICK)
    assert "holds a fine-tuned model" in capsys.readouterr().err


def test_probing_loads_no_deepspeed() -> None:
    code = "import sys, sgmim_fast.probing.probes, sgmim_fast.commands.probing; print('deepspeed' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
