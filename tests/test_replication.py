"""The comparison of ways to pre-train: equal conditions, ablations that are what they say, rows that come out again."""

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import replication
from benchmarks.replicating import running, statistics
from benchmarks.replicating.arms import ARMS, DEFAULT_ARMS, encoder_of, find_arm, initial_encoder, make_task
from benchmarks.replicating.figures import write_figures
from benchmarks.replicating.pieces import Piece, Row, fingerprint, piece_of, pieces_of, read_rows, share_of
from benchmarks.replicating.reporting import length_curves, write_report
from benchmarks.replicating.running import Runner
from benchmarks.replicating.scenes import DenseScenes, SceneFolders, render, set_of
from benchmarks.replicating.sizes import SIZES, USUAL, Variant
from benchmarks.replicating.stages import finetune, pretrain, pretrain_batches
from benchmarks.replicating.stepping import Stepper
from sgmim_fast.config import OptimizerConfig
from sgmim_fast.errors import UserError

SMOKE = replace(SIZES["smoke"], labels=(8,))
PRETRAINED = [name for name, arm in ARMS.items() if arm.kind is not None]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def folders(work: Path) -> SceneFolders:
    return render(SMOKE, work, 1, quiet)


@pytest.fixture(scope="module")
def rows(work: Path, folders: SceneFolders) -> list[Row]:
    """Of a whole run of two arms and two seeds."""
    runner = Runner(SMOKE, work, work / "rows.jsonl", 1, quiet)
    assert runner.run(pieces_of(SMOKE, ("simmim", "sgmim"), (0, 1)), None) == 0
    return read_rows(work / "rows.jsonl")


# -- equal conditions


def test_all_arms_of_a_seed_begin_with_the_same_encoder() -> None:
    first, other = (initial_encoder(SMOKE.model, seed) for seed in (3, 4))
    first.pop("mask_token")
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
    for name in PRETRAINED:
        task = make_task(ARMS[name], SMOKE.model, 3)
        begun = encoder_of(task)
        assert begun.keys() == first.keys()
        for key, value in first.items():
            assert torch.equal(begun[key], value), (name, key)


def test_arms_of_one_shape_begin_with_the_same_new_parts() -> None:
    one, other = (make_task(ARMS[name], SMOKE.model, 3).state_dict() for name in ("sgmim", "structure-same-cells"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_all_arms_see_the_same_images_in_the_same_order_with_the_same_masks(folders: SceneFolders) -> None:
    seen: dict[str, list[dict[str, Tensor]]] = {
        name: list(pretrain_batches(SMOKE, ARMS[name], 0, folders, 6)) for name in ("simmim", "sgmim", "sgmim-normals")
    }
    assert len(seen["sgmim"]) == 6
    for one, other, normals in zip(*seen.values(), strict=True):
        for key in ("image", "mask", "masked", "visible", "index"):
            assert torch.equal(one[key], other[key])
            assert torch.equal(one[key], normals[key])
        assert torch.equal(one["structure"], other["structure"])
        assert normals["structure"].shape[1] == 3
    another = next(iter(pretrain_batches(SMOKE, ARMS["sgmim"], 1, folders, 1)))
    assert not torch.equal(another["index"], seen["sgmim"][0]["index"])


def test_labelled_scenes_of_a_seed_are_nested_and_the_same_for_both_tasks(folders: SceneFolders) -> None:
    scenes = DenseScenes(SMOKE, folders)
    few, more = (scenes.labelled("depth", count, 5) for count in (8, 16))
    names = [few.name(index) for index in range(8)]
    assert names == [more.name(index) for index in range(8)]
    assert names == [scenes.labelled("segmentation", 8, 5).name(index) for index in range(8)]
    test = scenes.split("depth", "val")
    sets = [set_of(test.name(index)) for index in range(len(test))]
    assert sorted(sets) == ["familiar"] * SMOKE.test_scenes + ["test"] * SMOKE.test_scenes
    assert json.loads((folders.test / "dataset.json").read_text())["request"]["split"] == "test"
    descriptions = [
        (folder / "metadata.jsonl").read_text().splitlines() for folder in (folders.train, folders.familiar)
    ]
    assert not set(descriptions[0]) & set(descriptions[1]), "familiar scenes are not those of training"


# -- arms are what they say


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image, standardised map and mask of two of four cells."""
    generator = torch.Generator().manual_seed(seed)
    image, structure = (torch.randn(2, channels, 64, 64, generator=generator) for channels in (3, 1))
    return image, structure, torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])


def changed(values: Tensor, cells: Tensor) -> Tensor:
    """``values`` plus 1 in the cells that are True."""
    return values + cells.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]


def structure_predictions(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """What an arm's model says of the map, and the cells that the map's loss counts."""
    from sgmim_fast import reference

    model = make_task(ARMS[name], SMOKE.model, 0).model
    model.set_backend("reference")
    with torch.no_grad():  # away from the small initial weights, so that what is given is seen in what comes out
        for parameter in model.parameters():
            parameter.mul_(3)
    plain = reference.pixel_l1

    def call(image: Tensor, structure: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        calls: list[tuple[Tensor, Tensor]] = []

        def told(prediction: Tensor, picture: Tensor, selected: Tensor) -> Tensor:
            calls.append((prediction.detach(), selected))
            return plain(prediction, picture, selected)

        monkeypatch.setattr(reference, "pixel_l1", told)
        model(image, structure, mask)
        return calls[-1]

    return call


@pytest.mark.parametrize(
    ("name", "given_where_masked", "counted"),
    [
        ("sgmim", True, "visible"),
        ("structure-same-cells", False, "masked"),
        ("structure-loss-everywhere", True, "all"),
    ],
)
def test_where_the_map_is_given_and_where_it_counts(
    name: str, given_where_masked: bool, counted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, structure, mask = batch()
    predict = structure_predictions(name, monkeypatch)
    before, cells = predict(image, structure, mask)
    assert torch.equal(cells, {"visible": ~mask, "masked": mask, "all": torch.ones_like(mask)}[counted])
    given = mask if given_where_masked else ~mask
    assert torch.equal(predict(image, changed(structure, ~given), mask)[0], before), "what is hidden must not matter"
    assert not torch.allclose(predict(image, changed(structure, given), mask)[0], before), "what is given must matter"


def test_loss_everywhere_is_the_mean_over_both_kinds_of_cells() -> None:
    image, structure, mask = batch()
    everywhere = make_task(ARMS["structure-loss-everywhere"], SMOKE.model, 0).model
    usual = make_task(ARMS["sgmim"], SMOKE.model, 0).model
    usual.set_backend("reference")
    whole, visible = everywhere(image, structure, mask), usual(image, structure, mask)
    pictures = usual.reconstruct(image, structure, mask)
    error = (pictures.structure - structure).abs()
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    torch.testing.assert_close(visible.structure_loss, error[~hidden].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.structure_loss, error.mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.image_loss, visible.image_loss)


def test_the_fourth_channel_is_masked_and_predicted_with_the_image() -> None:
    image, structure, mask = batch()
    model = make_task(ARMS["fourth-channel"], SMOKE.model, 0).model

    def prediction(image: Tensor, structure: Tensor) -> Tensor:
        return model._pixels(model.encoder(torch.cat((image, structure), 1), mask), model.image_head)

    before = prediction(image, structure)
    assert before.shape == (2, 4, 64, 64)
    assert torch.equal(prediction(changed(image, mask), changed(structure, mask)), before)
    assert not torch.allclose(prediction(image, changed(structure, ~mask)), before)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].expand(-1, 4, -1, -1)
    error = (before - torch.cat((image, structure), 1)).abs()[hidden].mean()
    output = model(image, structure, mask)
    torch.testing.assert_close(output.loss, error, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, 0.75 * output.image_loss + 0.25 * output.structure_loss)


def test_weights_of_the_map_are_those_of_the_arm() -> None:
    image, structure, mask = batch()
    for name, weight in (("structure-weight-0.1", 0.1), ("sgmim", 1.0), ("structure-weight-10", 10.0)):
        output = make_task(ARMS[name], SMOKE.model, 0).model(image, structure, mask)
        torch.testing.assert_close(output.loss, output.image_loss + weight * output.structure_loss)


def test_the_arms_compared_unless_others_are_named() -> None:
    assert len(DEFAULT_ARMS) == 9
    assert "sgmim-normals" not in DEFAULT_ARMS
    with pytest.raises(UserError, match="arm 'nothing' is unknown; choose among scratch, simmim"):
        find_arm("nothing")


# -- training


def test_bf16_steps_copies_in_full_precision() -> None:
    """A step too small for bf16 is not lost."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    groups = [{"params": [layer.weight], "weight_decay": 0.0}]
    stepper = Stepper(layer, groups, OptimizerConfig(lr=1.0), "bf16")
    for _ in range(100):
        stepper.step(layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), 1e-4)
    assert layer.weight.dtype == torch.bfloat16
    stepper.finish()
    assert layer.weight.item() == pytest.approx(0.99, abs=1e-4)


@pytest.mark.parametrize("name", ["sgmim", "structure-same-cells", "fourth-channel"])
def test_arms_train_in_bf16(name: str, folders: SceneFolders) -> None:
    size = replace(SMOKE, precision="bf16")
    begun = encoder_of(make_task(ARMS[name], size.model, 0))
    weights, result = pretrain(size, ARMS[name], 0, folders)
    assert math.isfinite(result.figures["loss"])
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert any(not torch.equal(weights[key], begun[key]) for key in weights)


def test_tasks_train_in_bf16(folders: SceneFolders) -> None:
    size = replace(SMOKE, precision="bf16")
    weights, _ = pretrain(size, ARMS["scratch"], 0, folders)
    scenes = DenseScenes(size, folders)
    for kind in ("depth", "segmentation"):
        task, result = finetune(kind, size, weights, 0, 8, scenes)
        assert math.isfinite(result.figures["train_loss"])
        assert all(parameter.dtype == torch.float32 for parameter in task.parameters())


def test_learning_makes_losses_smaller(folders: SceneFolders) -> None:
    """A short training of the real loop learns: the optimizer's steps reach the weights."""
    size = replace(SMOKE, pretrain_steps=30)
    _, result = pretrain(size, ARMS["sgmim"], 0, folders)
    curve = result.figures["curve"]
    assert curve[-1] < 0.95 * curve[0]
    _, other = pretrain(size, ARMS["sgmim"], 0, folders, Variant(rate=0.5))
    assert other.figures["curve"][-1] != curve[-1]


# -- rows


def test_every_piece_has_a_row(rows: list[Row], work: Path) -> None:
    pieces = pieces_of(SMOKE, ("simmim", "sgmim"), (0, 1))
    assert [row["fingerprint"] for row in rows] == [fingerprint(SMOKE, piece) for piece in pieces]
    assert len({row["fingerprint"] for row in rows}) == len(rows)
    for row in rows:
        assert row["environment"]["commit"]
        assert row["cost"]["seconds"] > 0
        if row["stage"] == "pretrain":
            assert row["cost"]["images"] == SMOKE.pretrain_steps * SMOKE.pretrain_batch
            assert math.isfinite(row["figures"]["image_loss"])
        elif row["stage"] == "depth":
            assert {"rmse", "abs_rel", "d1", "silog", "familiar rmse"} <= row["figures"].keys()
        elif row["stage"] == "segmentation":
            assert 0 <= row["figures"]["mIoU"] <= 1
        else:
            assert {"depth", "segmentation", "knn-depth", "constant depth"} <= row["figures"].keys()
    assert rows[0]["arm"] == "row-colour"


def test_nothing_that_has_a_row_is_done_again(rows: list[Row], work: Path) -> None:
    runner = Runner(SMOKE, work, work / "rows.jsonl", 1, quiet)
    pieces = pieces_of(SMOKE, ("simmim", "sgmim"), (0, 1))
    assert runner.left(pieces) == []
    other = replace(SMOKE, finetune_steps=SMOKE.finetune_steps + 1)
    left = Runner(other, work, work / "rows.jsonl", 1, quiet).left(pieces)
    assert {piece.stage for piece in left} == {"depth", "segmentation"}, "weights and probes do not depend on it"


def test_processes_share_the_arms_of_all_seeds() -> None:
    pieces = pieces_of(SMOKE, DEFAULT_ARMS, (0, 1, 2))
    parts = [share_of(pieces, number, 2) for number in range(2)]
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, pieces))
    groups = [{(piece.seed, piece.arm) for piece in part} for part in parts]
    assert not groups[0] & groups[1]
    assert abs(len(groups[0]) - len(groups[1])) <= 1
    assert replication.parse(["--share", "1/2"]).share == (1, 2)


def test_a_second_run_gives_the_same_rows_and_stops_when_asked(rows: list[Row], work: Path, tmp_path: Path) -> None:
    (tmp_path / "scenes-smoke").symlink_to(work / "scenes-smoke")
    output = tmp_path / "rows.jsonl"
    pieces = pieces_of(SMOKE, ("sgmim",), (1,))
    runner = Runner(SMOKE, tmp_path, output, 1, quiet)
    assert runner.run(pieces, 0) == len(pieces)
    assert not output.exists()
    assert runner.run(pieces[:3], None) == 0
    # Weights of a piece that is done are made again if they are lost, without a second row.
    runner.weights_file(Piece("sgmim", 1, "pretrain")).unlink()
    assert Runner(SMOKE, tmp_path, output, 1, quiet).run(pieces, None) == 0
    again = read_rows(output)
    before = {row["fingerprint"]: row["figures"] for row in rows}
    assert len(again) == len(pieces)
    for row in again:
        assert row["figures"] == before[row["fingerprint"]]


def test_bad_options_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--arms", "nothing"], "arm 'nothing' is unknown"),
        (["--rate", "3"], "--rate 3 is not of the grid 0.5, 1.0, 2.0"),
        (["--labels", "300"], "--labels 300 is not of size micro, which has 200, 1000, 2000"),
        (["--seeds", "-1"], "--seeds -1 must be 0 or more"),
        (["--report", "--output", str(tmp_path / "none.jsonl")], "there are no rows of size micro"),
        (["--size", "smoke", "--figures", "--work", str(tmp_path)], "holds no weights of seed 0"),
    ):
        with pytest.raises(UserError, match=message):
            replication.run(replication.parse(arguments))
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs segmentation-models-pytorch, which is not installed"):
        replication.run(replication.parse(["--size", "smoke", "--output", str(tmp_path / "none.jsonl")]))
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"benchmark": "repl\n')
    with pytest.raises(UserError, match=r"torn\.jsonl:1 is not a row of JSON"):
        read_rows(torn)
    torn.write_text('{"benchmark": "other", "environment": {}}\n{"benchmark": "repl')
    assert read_rows(torn) == []


def test_the_list_says_what_is_done(rows: list[Row], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replication.list_pieces(SMOKE, pieces_of(SMOKE, ("sgmim", "fourth-channel"), (0,)), work / "rows.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("done   row-colour-0-probe-8")
    assert lines[5].startswith("left   fourth-channel-0-pretrain: about")
    assert lines[-1].startswith("5 done, 4 left: about")
    chosen = ["--size", "smoke", "--arms", "sgmim", "sgmim", "--seeds", "0", "0", "--stages", "depth", "--list"]
    replication.run(replication.parse([*chosen, "--output", str(work / "none.jsonl")]))
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1].rstrip(":") for line in lines[:-1]]
    assert names == ["sgmim-0-pretrain", "sgmim-0-depth-8", "sgmim-0-depth-24"]
    ablation = ["--size", "smoke", "--arms", "fourth-channel", "--seeds", "0", "--stages", "depth", "--list"]
    replication.run(replication.parse([*ablation, "--output", str(work / "none.jsonl")]))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        "fourth-channel-0-pretrain:",
        "fourth-channel-0-depth-8:",
    ]
    replication.run(replication.parse([*chosen, "--labels", "24", "--output", str(work / "none.jsonl")]))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        "sgmim-0-pretrain:",
        "sgmim-0-depth-24:",
    ]


# -- what rows say


def test_figures_of_single_images_add_up_to_those_of_rows(rows: list[Row], work: Path) -> None:
    runner = Runner(SMOKE, work, work / "rows.jsonl", 1, quiet)
    by_stage = {row["stage"]: row["figures"] for row in rows if row["arm"] == "sgmim" and row["seed"] == 0}
    depth, classes = (np.load(runner.images_file(Piece("sgmim", 0, stage, 8))) for stage in ("depth", "segmentation"))
    for name, before in (("test", ""), ("familiar", "familiar ")):
        rmse, iou = by_stage["depth"][f"{before}rmse"], by_stage["segmentation"][f"{before}mIoU"]
        assert statistics.depth_figure(5)(depth[name]) == pytest.approx(rmse, rel=1e-12)
        assert statistics.mean_iou(classes[name].astype(np.float64)) == pytest.approx(iou, rel=1e-12)


def test_report_and_figures_are_written(rows: list[Row], work: Path, tmp_path: Path) -> None:
    runner = Runner(SMOKE, work, work / "rows.jsonl", 1, quiet)
    written = write_report(rows, SMOKE, USUAL, tmp_path, runner.images_file)
    assert [path.name for path in written] == ["claim_table.md", "claim_labels.svg", "claim_pretraining.svg"]
    text = written[0].read_text()
    value = [row["figures"]["rmse"] for row in rows if row["stage"] == "depth" and row["arm"] == "sgmim"]
    assert f"| sgmim | {sum(value) / 2:.4f} ± {abs(value[0] - value[1]) / math.sqrt(2):.4f}; " in text
    assert "| row-colour |" in text
    assert "| depth RMSE, familiar | 8 | sgmim | 2 | [" in text
    assert "| constant depth RMSE, unseen | 8 |" in text
    written += write_figures(runner, ("simmim", "sgmim"), 0, USUAL, tmp_path)
    for path in written:
        assert path.stat().st_size > 500
        if path.suffix == ".svg":
            ET.fromstring(path.read_text())
    assert json.dumps(rows) == json.dumps(read_rows(work / "rows.jsonl"))


def test_lengths_are_drawn_over_steps(rows: list[Row], tmp_path: Path) -> None:
    """Rows of another length, as if that had been run, with figures that are told apart."""
    longer = []
    for row in rows:
        if row["arm"] == "row-colour":
            continue
        variant = Variant(length=2.0)
        piece = replace(piece_of(row), variant=variant)
        longer.append({**row, "length": 2.0, "fingerprint": fingerprint(SMOKE, piece)})
    svg = length_curves(rows + longer, SMOKE, USUAL)
    assert svg is not None
    assert f">{SMOKE.pretrain_steps}<" in svg
    assert f">{2 * SMOKE.pretrain_steps}<" in svg
    ET.fromstring(svg)
    assert length_curves(rows, SMOKE, USUAL) is None
    written = write_report(rows + longer, SMOKE, Variant(length=2.0), tmp_path)
    assert "claim_length.svg" in {path.name for path in written}
    stale = replace(SMOKE, pretrain_steps=7)
    with pytest.raises(UserError, match="no rows of size smoke, as its settings are now"):
        write_report([row for row in rows if row["arm"] != "row-colour"], stale, USUAL, tmp_path)
