"""The section of a page that shows a run beside another: figures of files, the same pictures, and what is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compared_runs import GUIDED, PLAIN, add_records, make_both, make_record
from page_reading import Page, decode
from tiny_run import TINY, TRAIN, make_run, metric_row

from sgmim_fast import UserError
from sgmim_fast.cli import main
from sgmim_fast.masking import CELL
from sgmim_fast.report import write_report
from sgmim_fast.report.comparison import BASELINES, PROBE, differences, read_comparison
from sgmim_fast.report.curves import Chart, Series, render_overlay
from sgmim_fast.report.run import Row, read_run


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs and figures that no test changes."""
    runs = make_both(tmp_path_factory.mktemp("compared"))
    add_records(*runs)
    return runs


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return make_both(tmp_path)


def text_of(path: Path) -> str:
    return re.sub(r"\s+", " ", Page(path).text)


def edit(run: Path, **sections: dict[str, object]) -> None:
    """Change settings that a run has written."""
    content = json.loads((run / "config.json").read_text())
    for section, values in sections.items():
        content[section] |= values
    (run / "config.json").write_text(json.dumps(content))


# -- what is shown


def test_figures_are_those_of_the_files(shared: tuple[Path, Path], tmp_path: Path) -> None:
    html = write_report(shared[0], tmp_path / "page.html", samples=1, against=shared[1]).read_text()
    rows = re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>((?:<td>[^<]*</td>)+)</tr>', html)
    found = [(re.sub(r"<[^>]*>", "", name), re.findall(r"<td>(.*?)</td>", values)) for name, values in rows]
    shown = {  # by what the label begins with: values of linear and knn depth, linear and knn segmentation
        "constant": ["10.008 10.009 10.010 10.011"] * 2 + ["10.022 10.023 10.024"] * 2,
        "row-colour": ["20.000 20.001 20.002 20.003", "20.004 20.005 20.006 20.007"]
        + ["20.016 20.017 20.018", "20.019 20.020 20.021"],
        "random": ["30.000 30.001 30.002 30.003", "30.004 30.005 30.006 30.007"]
        + ["30.016 30.017 30.018", "30.019 30.020 30.021"],
        "SG-MIM": ["10.000 10.001 10.002 10.003", "10.004 10.005 10.006 10.007"]
        + ["10.016 10.017 10.018", "10.019 10.020 10.021"],
        "SimMIM": ["40.000 40.001 40.002 40.003", "40.004 40.005 40.006 40.007"]
        + ["40.016 40.017 40.018", "40.019 40.020 40.021"],
        "grid target": ["10.012 10.013 10.014 10.015"] * 2 + ["10.025 10.026 10.027"] * 2,
    }
    # Depth stands first, then segmentation; linear before nearest neighbours.
    order = re.findall(r"<caption>((?:Linear|Nearest)[^<]*)</caption>", html)
    assert order == [
        "Linear depth",
        "Linear segmentation",
        "Nearest neighbours, depth",
        "Nearest neighbours, segmentation",
    ]
    for label, wanted in shown.items():
        values = [" ".join(figures) for name, figures in found if name.startswith(label)][:4]
        assert values == [wanted[0], wanted[2], wanted[1], wanted[3]], label
    text = text_of(tmp_path / "page.html")
    assert "Fitted on 8 images of depth: 9 images; scored on 3 of 3 others." in text
    assert "docs/claim.md" in text
    assert "Another seed alone moves every figure" in text


def test_names_stay_text(shared: tuple[Path, Path], tmp_path: Path) -> None:
    path = write_report(shared[0], tmp_path / "page.html", samples=1, against=shared[1])
    page = Page(path)
    assert f"SG-MIM ({GUIDED})" in page.text
    assert f"SimMIM ({PLAIN})" in page.text
    assert f"({GUIDED})" not in path.read_text()


def test_what_both_share_is_read_from_the_runs(both: tuple[Path, Path]) -> None:
    guided, plain = both
    text = text_of(write_report(guided, samples=1, against=plain))
    assert "Both encoders began with equal weights, those of seed 0. The heads did not" in text
    assert "Both saw the same crops of the same images under the same masks in the same order, 32 a step." in text
    assert "SG-MIM was given structure maps besides" in text
    assert "model.guidance relational none" in text
    assert "more parameters outside the encoder" in text
    edit(plain, train={"seed": 3})
    text = text_of(write_report(guided, samples=1, against=plain))
    assert "The encoders did not begin with equal weights" in text
    assert "The two did not see the same batches" in text
    assert "train.seed 0 3" in text
    edit(plain, train={"seed": 0}, data={"flip": False})
    comparison = read_comparison(read_run(guided), plain)
    assert (comparison.same_start, comparison.same_batches) == (True, False)
    assert comparison.differing == {"model.guidance": ("relational", "none"), "data.flip": (True, False)}
    edit(plain, data={"flip": True}, model={"window_size": 1})
    comparison = read_comparison(read_run(guided), plain)
    assert (comparison.same_start, comparison.same_batches) == (False, True)
    assert "more parameters outside the encoder" not in text_of(write_report(guided, samples=1, against=plain))


def test_runs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    first = make_run(tmp_path, TINY, "x/run")
    make_run(tmp_path, TINY, "y/run", replace(TRAIN, seed=1))
    comparison = read_comparison(read_run(first), tmp_path / "y" / "run")
    assert comparison.labels == (f"SG-MIM ({first})", f"SG-MIM ({tmp_path / 'y/run'})")
    assert not comparison.guided_apart
    assert "structure maps besides" not in text_of(write_report(first, samples=1, against=tmp_path / "y" / "run"))


def test_pictures_are_of_the_same_samples_and_masks(both: tuple[Path, Path]) -> None:
    guided, plain = both
    edit(plain, train={"seed": 3})  # its own masks would be others
    html = write_report(guided, samples=2, against=plain).read_text()
    section = html[html.index('id="compared"') : html.index('id="pictures"')]
    uris = re.findall(r'<img src="([^"]*)"', section)
    assert len(uris) == 2 * 4
    for start in (0, 4):
        original, given, ours, theirs = map(decode, uris[start : start + 4])
        hole = np.ptp(given.reshape(64 // CELL, CELL, 96 // CELL, CELL * 3), axis=(1, 3)) == 0
        assert 0 < hole.sum() < hole.size
        hole = hole.repeat(CELL, 0).repeat(CELL, 1)
        for completed in (ours, theirs):
            assert np.array_equal(completed[~hole], original[~hole])
            assert np.abs(completed[hole] - original[hole]).mean() > 5
        assert np.abs(ours[hole] - theirs[hole]).mean() > 1
    assert html.count(uris[2]) == 2  # and in the run's own gallery


def test_curves_of_both_are_on_one_axis() -> None:
    chart = Chart("Loss", "units", (Series("first", "one"), Series("second", "other")))
    ours: list[Row] = [metric_row(step, image_loss=value) for step, value in ((0, 1.0), (50, 0.5), (100, 0.0))]
    theirs: list[Row] = [metric_row(step, image_loss=value) for step, value in ((20, 1.0), (40, 0.0))]
    html = render_overlay(chart, "image_loss", (ours, theirs))
    assert 'class="line first" d="M0.0 0.0h0L500.0 500.0L1000.0 1000.0"' in html
    assert 'class="line second" d="M200.0 0.0h0L400.0 1000.0"' in html
    found = re.search(r'class="readout">(.*?)</script>', html)
    assert found is not None
    numbers = json.loads(found[1])
    assert numbers["at"] == ["step 0", "step 20", "step 40", "step 50", "step 100"]
    assert numbers["values"] == {
        "first": ["1.00", "1.00", "1.00", "0.500", "0"],
        "second": ["–", "1.00", "0", "–", "–"],
    }


# -- what is missing


def test_without_probes_the_rest_is_shown(both: tuple[Path, Path]) -> None:
    guided, plain = both
    text = text_of(write_report(guided, samples=1, against=plain))
    assert f"{plain / PROBE} is missing" in text
    assert "What the frozen features tell" not in text
    assert "What each paints into the hidden cells" in text
    make_record(plain / PROBE, "checkpoints/step_000020/model.safetensors", 5.0)
    text = text_of(write_report(guided, samples=1, against=plain))
    assert f"{guided / PROBE} is missing" in text
    assert "is of step_000020, but step_000040 is the newest checkpoint" in text
    assert "5.003" in text


def test_baselines_may_be_in_either_run(both: tuple[Path, Path]) -> None:
    guided, plain = both
    add_records(guided, plain)
    for file in BASELINES.values():
        (guided / file).rename(plain / file)
    assert "30.002" in text_of(write_report(guided, samples=1, against=plain))


def lost_weights(plain: Path) -> str:
    (plain / "checkpoints" / "latest").unlink()
    return "No pictures. {plain}: This run has not written a checkpoint yet."


def lost_metrics(plain: Path) -> str:
    (plain / "metrics.jsonl").unlink()
    return "No curves. {plain}/metrics.jsonl is missing or holds no image loss yet."


def shorter(plain: Path) -> str:
    lines = (plain / "metrics.jsonl").read_text().splitlines(keepends=True)
    (plain / "metrics.jsonl").write_text("".join(lines[:10]))
    return "The runs have not gone equally far: 40 and 20 steps."


@pytest.mark.parametrize("damage", [lost_weights, lost_metrics, shorter])
def test_what_the_other_lacks_is_said(both: tuple[Path, Path], damage: Callable[[Path], str]) -> None:
    words = damage(both[1]).format(plain=both[1])
    text = text_of(write_report(both[0], samples=1, against=both[1]))
    assert words in text
    assert "What the model fills in" in text


# -- what is refused


def itself(plain: Path) -> str:
    return "is the run itself"


def absent(plain: Path) -> str:
    plain.rename(plain.with_name("moved"))
    return "is not a run: it does not exist"


def finetuned(plain: Path) -> str:
    (plain / "config.json").write_text(json.dumps({"kind": "depth", "recipe": "nyu"}))
    return "belongs to a depth run"


def other_size(plain: Path) -> str:
    edit(plain, model={"image_size": [96, 96]})
    return "of other pictures (model.image_size is (64, 96) in the one and (96, 96) in the other)"


def other_masks(plain: Path) -> str:
    edit(plain, data={"mask_ratio": 0.5})
    return "of other masks (data.mask_ratio is 0.6 in the one and 0.5 in the other)"


def other_targets(plain: Path) -> str:
    edit(plain, model={"normalize_target_window": 47})
    return "of other targets"


def other_data(plain: Path) -> str:
    edit(plain, data={"path": "elsewhere"})
    return "of other data"


def other_images(plain: Path) -> str:
    add_records(plain.with_name(GUIDED), plain)
    path = plain / PROBE
    path.write_text(path.read_text().replace("3 others", "4 others"))
    return "cannot be compared: depth.val is 3 others in the one and 4 others in the other; probe both again alike"


def broken_record(plain: Path) -> str:
    (plain / PROBE).write_text("[]")
    return "is not what `sgmim probe --output` writes"


@pytest.mark.parametrize(
    "make_unlike",
    [itself, absent, finetuned, other_size, other_masks, other_targets, other_data, other_images, broken_record],
)
def test_runs_that_cannot_be_compared(both: tuple[Path, Path], make_unlike: Callable[[Path], str]) -> None:
    words = make_unlike(both[1])
    against = both[0] / "." if make_unlike is itself else both[1]
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        write_report(both[0], samples=1, against=against)
    assert "\n" not in str(caught.value)
    assert not (both[0] / "report.html").exists()


def test_one_folder_by_two_paths_is_the_same_data(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(both[0].parent)
    edit(both[1], data={"path": "data"})
    assert set(differences(*map(read_run, both))) == {"model.guidance"}


def test_command_takes_the_other_run(shared: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    main(["report", str(shared[0]), "--against", str(shared[1]), "--samples", "1", "--output", str(page)])
    assert "beside" in page.read_text()
    with pytest.raises(SystemExit):
        main(["report", str(shared[0]), "--against", str(shared[0])])
