"""The page of a run: what it shows is what the model did, and what is broken is said."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_reading import Page, decode
from tiny_run import NASTY, TINY, make_run, metric_row

from sgmim_fast import UserError, create_model
from sgmim_fast.colors import SCALES, color_table, colorize
from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.pair_samples import evaluation_batch
from sgmim_fast.masking import CELL
from sgmim_fast.ops import standardize_structure
from sgmim_fast.reference import local_normalize
from sgmim_fast.report import write_report
from sgmim_fast.report.curves import format_value
from sgmim_fast.report.gallery import Gallery, build_gallery, local_denormalize
from sgmim_fast.report.run import Row, read_run
from sgmim_fast.report.words import format_duration
from sgmim_fast.weights import load_weights


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes."""
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


# -- the page


def test_page_says_what_the_run_was(shared_run: Path, tmp_path: Path) -> None:
    path = write_report(shared_run, tmp_path / "new folder" / "page.html", samples=3)
    page = Page(path)
    assert path == tmp_path / "new folder" / "page.html"
    parameters = sum(parameter.numel() for parameter in create_model(TINY).parameters())
    shown = ("my run", "swin_base_100ep", "relational guidance", f"{parameters / 1e6:.1f} M", "40", "32 pairs a step")
    for text in (
        *shown,
        "1 min 20 s",
        "3.00 GiB",
        "model.embed_dim",
        "train.zero_stage",
        "step_000040",
        "latest",
        "scene 0 <b>.png",
        NASTY,
    ):
        assert text in page.text, text
    assert format_value(sum(0.8 / step for step in range(32, 42, 2)) / 5) in page.text
    assert len(page.all("img")) == 3 * 8
    assert all(image["alt"] and image["width"] == "96" and image["height"] == "64" for image in page.all("img"))
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_page_marks_what_differs_from_the_recipe(shared_run: Path, tmp_path: Path) -> None:
    html = write_report(shared_run, tmp_path / "page.html", samples=1).read_text()
    assert "<mark>16</mark> <small>128</small>" in html  # batch size
    assert "<td>0.6</td>" in html  # mask ratio, as in the recipe
    assert f"<td>{shared_run.parent / 'data'}</td>" in html  # a place, not a part of the recipe


def test_page_refers_to_nothing_outside(shared_run: Path) -> None:
    page = Page(write_report(shared_run))
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"<{tag} {name}={value}>"
    styles = re.search(r"<style>(.*?)</style>", (shared_run / "report.html").read_text(), re.DOTALL)
    assert styles is not None
    assert "@import" not in styles[1]
    assert re.findall(r"url\((?!#)", styles[1]) == []
    (policy,) = [str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


# -- the gallery


@pytest.fixture(scope="module")
def gallery(shared_run: Path) -> Gallery:
    run = read_run(shared_run)
    assert run.weights is not None
    return build_gallery(run.settings, run.weights, 3)


def test_pictures_show_what_was_given_and_what_was_predicted(shared_run: Path, gallery: Gallery) -> None:
    config = read_run(shared_run).settings
    manifest = read_manifest(config.data.path)
    masks = evaluation_batch(manifest, config, [0, 2, 4])["mask"].numpy()
    assert [sample.name for sample in gallery.samples] == [Path(manifest.pairs[i][0]).name for i in (0, 2, 4)]
    for sample, mask in zip(gallery.samples, masks, strict=True):
        image, structure = sample.strips
        assert np.array_equal(image.predicted, mask)
        assert np.array_equal(structure.predicted, ~mask)
        for strip in sample.strips:
            hole = np.array(strip.predicted).repeat(CELL, 0).repeat(CELL, 1)
            original, given, completed, error = map(decode, (strip.original, strip.given, strip.completed, strip.error))
            assert original.shape == (64, 96, 3)
            # Cells hold whole JPEG blocks, so what is given is the same to the last bit.
            assert np.array_equal(given[~hole], original[~hole])
            assert np.array_equal(completed[~hole], original[~hole])
            assert np.ptp(given[hole]) == 0
            assert np.ptp(error[~hole]) == 0
            assert np.abs(completed[hole] - original[hole]).mean() > 5  # an untrained model is wrong


def test_losses_are_those_of_training(shared_run: Path, gallery: Gallery) -> None:
    record = read_run(shared_run)
    assert record.weights is not None
    model = create_model(TINY)
    load_weights(model, record.weights)
    batch = evaluation_batch(read_manifest(record.settings.data.path), record.settings, [0, 2, 4])
    with torch.no_grad():
        out = model.eval()(batch["image"], standardize_structure(batch["structure"]), batch["mask"])
    assert out.structure_loss is not None
    for place, loss in enumerate((out.image_loss, out.structure_loss)):
        mean = np.mean([sample.strips[place].loss for sample in gallery.samples])
        assert mean == pytest.approx(loss.item(), rel=1e-4)


def test_random_numbers_of_the_caller_are_left_alone(shared_run: Path) -> None:
    state = torch.get_rng_state()
    write_report(shared_run, samples=1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "pictures", "words"),
    [
        ({"guidance": "none"}, 4, "SimMIM (image only)"),
        ({"structure_channels": 3}, 8, "red, green and blue"),
        ({"structure_channels": 2}, 8, "the first is shown"),
        ({"normalize_target_window": 47}, 8, "not the model's own"),
    ],
)
def test_variants_of_the_model(tmp_path: Path, changes: dict[str, Any], pictures: int, words: str) -> None:
    page = Page(write_report(make_run(tmp_path, replace(TINY, **changes)), samples=1))
    assert len(page.all("img")) == pictures
    assert words in page.text
    assert ("Final map loss" in page.text) == (pictures == 8)


def test_local_normalisation_is_undone() -> None:
    picture = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    restored = local_denormalize(local_normalize(picture, 47), picture, 47)
    assert torch.allclose(restored, picture, atol=1e-9)


@pytest.mark.parametrize("name", SCALES)
def test_colours_grow_lighter_evenly(name: str) -> None:
    linear = (color_table(name) / 255.0) ** 2.2
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > -1e-3).all()
    assert luminance[0] < 0.02
    assert luminance[-1] > 0.7
    low, high = colorize(np.array([[-5.0, 9.0]], dtype=np.float32), 0, 1, name)[0]
    assert low.tolist() == color_table(name)[0].tolist()
    assert high.tolist() == color_table(name)[-1].tolist()


# -- what is missing or broken


def no_data(run: Path) -> str:
    (run.parent / "data").rename(run.parent / "moved")
    return "does not exist"


def no_checkpoint(run: Path) -> str:
    (run / "checkpoints" / "latest").unlink()
    return "not written a checkpoint yet"


def lost_checkpoint(run: Path) -> str:
    (run / "checkpoints" / "step_000040" / "model.safetensors").unlink()
    return "step_000040, which holds no model.safetensors"


def broken_weights(run: Path) -> str:
    path = run / "checkpoints" / "step_000040" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return "model.safetensors"


@pytest.mark.parametrize("damage", [no_data, no_checkpoint, lost_checkpoint, broken_weights])
def test_without_pictures_the_rest_is_shown(run: Path, damage: Callable[[Path], str]) -> None:
    reason = damage(run)
    page = Page(write_report(run))
    assert "No pictures." in page.text
    assert reason in page.text
    assert page.all("img") == []
    assert "Gradient norm" in page.text


def test_without_metrics_the_rest_is_shown(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").unlink()
    page = Page(write_report(run, samples=1))
    assert "No curves." in page.text
    assert "No environment." in page.text
    assert len(page.all("img")) == 8


def test_metrics_of_a_troubled_run(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    again = [metric_row(20, loss=7.0), metric_row(22, loss=float("nan"))]
    path.write_text("\n".join([*lines, *map(json.dumps, again), lines[0][:40]]))
    record = read_run(run)
    assert [row["step"] for row in record.rows] == list(range(2, 42, 2))
    losses = {row["step"]: row["loss"] for row in record.rows}
    assert losses[20] == 7.0
    assert losses[22] is None
    assert [note.split(" ")[0:2] for note in record.notes] == [["The", "last"], ["2", "step(s)"], ["1", "logged"]]
    page = Page(write_report(run, samples=1))
    assert all(note in page.text for note in record.notes)
    path.write_text("\n".join([lines[0], "{", *lines[1:], '{"step": true}']))
    assert read_run(run).notes == ("2 unreadable line(s) of metrics.jsonl are left out: 2, 22.",)


def test_utilisation_and_skipped_steps_are_shown_where_they_are_known(run: Path) -> None:
    page = Page(write_report(run, samples=1))
    assert "Utilisation" not in page.text
    assert "Skipped steps" not in page.text
    rows = [metric_row(step, mfu=0.4 + step / 1000, skipped_steps=step // 20) for step in range(2, 42, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = re.sub(r"\s+", " ", Page(write_report(run, samples=1)).text)
    assert "Utilisation 42.2 % of the peak FLOP/s, median" in text
    assert "Skipped steps 2 gradient not finite" in text
    assert "Utilisation model FLOPs, share of the peak (MFU)" in text
    assert 'class="line mfu"' in (run / "report.html").read_text()


def test_duration_adds_up_over_resumes() -> None:
    rows: list[Row] = [{"time": time} for time in (5.0, 10.0, 4.0, 3600.0)]
    assert format_duration(rows) == "1 h 00 min"
    assert format_duration(rows[:3]) == "14 s"
    assert [format_duration([{"time": time}]) for time in (80.0, 3590.0)] == ["1 min 20 s", "1 h 00 min"]


@pytest.mark.parametrize(
    ("folder", "output", "samples", "words"),
    [
        ("absent", None, 6, "is not a run: it does not exist"),
        (".", None, 6, "is not a run: it has no config.json"),
        ("my run", ".", 6, "is a folder; give the name of an HTML file"),
        ("my run", "data/images/scene 0 <b>.png/page.html", 6, "cannot be written"),
        ("my run", None, 0, "samples 0 must be 1 or more"),
    ],
)
def test_bad_input_is_one_line(run: Path, folder: str, output: str | None, samples: int, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        write_report(run.parent / folder, run.parent / output if output else None, samples=samples)
    assert "\n" not in str(caught.value)


def test_failed_write_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "report.html").write_text("old")

    def full_disk(path: Path, text: str, **options: str) -> int:
        with path.open("w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_report(run, samples=1)
    assert (run / "report.html").read_text() == "old"
    assert [path.name for path in run.glob(".*")] == []
