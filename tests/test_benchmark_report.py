"""Tables and plots follow from the recorded rows, and the pages hold what follows from them."""

import json
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import harness, more_tables, plots, report, svg, tables
from benchmarks.recorded import Results, commands
from benchmarks.rows import Row, read
from sgmim_fast.errors import UserError

ROOT = Path(__file__).parents[1]
H200 = {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "0123456789", "cpu": "EPYC", "cores": 16, "command": "x"} | {
    "driver_version": "580.1",
    "triton": "3.6.0",
    "sources": "fedcba",
}
H100 = H200 | {"gpu": "NVIDIA H100 80GB HBM3", "commit": "installed"}
CEILINGS = {"copy_bytes_per_second": 4e12, "matrix_flops_per_second": 8e14, "launch_seconds": 2e-6}


def results(folder: Path, *rows: Row, name: str = "made_up") -> Results:
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps({"environment": H200} | row) + "\n" for row in rows)
    return Results(folder)


def step(arm: str, seconds: float, **more: Any) -> Row:
    backend, _, word = arm.partition("+")
    row = {
        "benchmark": "train_step",
        **{"model": "sgmim_swin_base", "override": [], "batch": 128, "precision": "bf16", "device": "cuda", "arm": arm},
        **{"backend": backend, "attention": "auto", "compiled": bool(word), "optimizer": "adamw"},
        **{"p20_seconds": seconds * 0.8, "p50_seconds": seconds * 0.9, "p80_seconds": seconds},
        **{f"{part}_p50_seconds": seconds * x for part, x in (("forward", 0.3), ("backward", 0.6), ("update", 0.1))},
        **{f"step_{p}_seconds": seconds * factor for p, factor in (("p20", 0.9), ("p50", 1.0), ("p80", 1.1))},
        **{
            "training_images_per_second": more.get("batch", 128) / seconds,
            "step_ratios": {"reference": seconds / 0.3},
            "step_share_of_matrix": 0.05 / seconds,
            "step_share_of_products": None if arm == "torch" else 0.06 / seconds,
        },
        **{"step_memory_bytes": 10**10, "ceilings": CEILINGS},
    }
    return row | more


def kernel(implementation: str, seconds: float, **more: Any) -> Row:
    row = {
        "benchmark": "kernels",
        **{"op": "window_attention", "case": "Swin-B stage 3", "batch": 128, "dtype": "bf16", "pass": "forward"},
        **{"implementation": implementation, "shapes": {"table": [121, 4]}, "error": 1e-3, "plain_error": 2e-3},
        **{"p50_seconds": seconds, "floor_bytes": 4 * 10**8, "floor_seconds": 1e-4, "share_of_copy": 1e-4 / seconds},
        **{"flops": 4 * 10**10, "flops_per_second": 4e10 / seconds, "ceilings": CEILINGS},
    }
    return row | more


# -- the pages


def test_pages_hold_what_the_rows_say() -> None:
    """If this fails: python -m benchmarks.report."""
    assert report.outdated(ROOT, Results(harness.RESULTS)) == {}


def copied(folder: Path) -> list[str]:
    """Pages and rows elsewhere; the options that name them."""
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(harness.RESULTS, folder / "results")
    return ["--root", str(folder), "--results", str(folder / "results")]


def test_check_names_what_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = copied(tmp_path)
    rows = read(tmp_path / "results" / "train_step.jsonl")
    with (tmp_path / "results" / "train_step.jsonl").open("a") as file:
        file.write(json.dumps(rows[0] | {"p50_seconds": 2.5}) + "\n")
    before = (tmp_path / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", ["report", *words, "--check"])
    with pytest.raises(SystemExit, match="1"):
        report.main()
    stale = ["docs/images/benchmarks/steps-cpu.svg", "README.md", "docs/performance.md"]
    assert capsys.readouterr().out.splitlines() == [f"out of date: {name}" for name in stale]
    assert (tmp_path / "README.md").read_text() == before
    monkeypatch.setattr(sys, "argv", ["report", *words])
    report.main()
    assert capsys.readouterr().out.splitlines() == [f"written: {name}" for name in stale]
    assert (tmp_path / "README.md").read_text() == before.replace("1.89 / 2.03 / 2.13 s", "1.89 / 2.50 / 2.13 s")
    monkeypatch.setattr(sys, "argv", ["report", *words, "--check"])
    report.main()
    assert capsys.readouterr().out == ""


def test_a_plot_of_which_nothing_is_recorded_goes(tmp_path: Path) -> None:
    words = copied(tmp_path)
    (tmp_path / "results" / "memory.jsonl").unlink()
    stale = report.outdated(tmp_path, Results(Path(words[3])))
    assert stale[report.IMAGES / "memory-checkpointing.svg"] is None
    text = stale[Path("docs/memory.md")]
    assert text is not None
    assert "(Plot: not measured.)" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmarks:parity -->\n", "benchmarks:parity --> has no partner; end it with"),
        ("<!-- /benchmarks:parity -->\n", "/benchmarks:parity --> has no partner"),
        ("<!-- benchmarks:parity -->\n<!-- benchmarks:parity -->\n", "has no partner"),
        ("<!-- benchmarks:parity -->\n<!-- /benchmarks:work -->\n", "has no partner"),
        ("<!-- benchmarks:speed -->\n<!-- /benchmarks:speed -->\n", "names no block; choose one of cpu-steps,"),
    ],
)
def test_wrong_markers_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^page.md: .*{re.escape(message)}"):
        report.fill(
            text, Path("page.md"), results(tmp_path / "none"), {report.IMAGES / f"{p}.svg": None for p in plots.PLOTS}
        )


def test_blocks_replace_what_was_there(tmp_path: Path) -> None:
    old = "a\n<!-- benchmarks:parity -->\nold\n<!-- /benchmarks:parity -->\nb\n"
    new = report.fill(old, Path("page.md"), results(tmp_path / "none"), {})
    assert new.startswith("a\n<!-- benchmarks:parity -->\nOn a GPU: not measured.")
    assert new.endswith("\n    python -m benchmarks.parity\n<!-- /benchmarks:parity -->\nb\n")
    assert report.fill(new, Path("page.md"), results(tmp_path / "none"), {}) == new


def test_printed_commands_are_understood() -> None:
    """Those of the README, each by its own parser."""
    printed = re.findall(r"^    python -m (benchmarks\.\S+)(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(printed) >= 3
    for module, words in printed:
        import_module(module).arguments().parse_args(shlex.split(words))


# -- tables


def test_without_rows_everything_is_not_measured(tmp_path: Path) -> None:
    none = results(tmp_path / "none")
    for name, make in report.TABLES.items():
        text = "\n".join(make(none))
        assert "not measured" in text or "not counted" in text or name in ("cpu-steps", "checkpointing")
        assert not re.search(r"\d (ms|us|s|MB|GB) ", text.replace("192 px", "").replace("224 px", ""))
    assert all(plot(none) is None for plot in plots.PLOTS.values())


def test_steps_of_a_gpu(tmp_path: Path) -> None:
    found = results(
        tmp_path / "rows",
        step("triton", 9.0),
        step("triton", 0.1),  # the newer one
        step("reference", 0.4),
        step("torch", 0.4),
        step("triton+compile", 0.01, batch=32),
        step("triton+compile", 0.01, smoke=True),
        step("triton", 0.01, environment=H200 | {"gpu": "NVIDIA A100"}),
    )
    lines = tables.main_steps(found)
    assert lines[0] == ("Measured in bf16 on NVIDIA H200 (driver 580.1), torch 2.11.0, Triton 3.6.0, commit 0123456.")
    assert (
        "| Swin-B, 192 px | `triton` | 90.0 / 100.0 / 110.0 ms | 90.0 ms | 1,280 | x 3.00 |  | 10.00 GB | 50% (60%) |"
        in lines
    )
    assert "| Swin-B, 192 px | `triton+compile` | not measured |  |  |  |  |  |  |" in lines
    every = tables.gpu_steps(found)
    assert [line for line in every if line.startswith("#")] == ["### NVIDIA H200", "### NVIDIA A100"]
    demands = "\n".join(tables.demands(found))
    assert "| step of sgmim_swin_base | >= 3.0x plain, eager | x4.00 | met |" in demands
    assert "| step of sgmim_swin_base | >= 1.4x plain, compiled |  | not measured |" in demands


def test_other_batch_sizes_and_what_did_not_fit(tmp_path: Path) -> None:
    large = step("reference", 1.0, batch=512, benchmark="train_step_skipped", reason="out of memory")
    late = step("reference+autotune", 1.0, benchmark="train_step_skipped", reason="it was not ready after 60 s")
    found = results(tmp_path / "rows", step("triton", 0.1), step("triton", 0.3, batch=512), large, late)
    lines = tables.step_batches(found)
    assert "| Swin-B, 192 px | 512 | `triton` | 300.0 ms | 1,707 | x 1.00 | 10.00 GB |" in lines
    assert "| Swin-B, 192 px | 512 | `reference` | out of memory |  |  |  |" in lines
    assert not any("| 128 |" in line.split("`")[0] for line in lines)
    assert not any("autotune" in line for line in lines)
    assert "| Swin-B, 192 px | `reference+autotune` | not measured: it was not ready after 60 s |" in "\n".join(
        tables.gpu_steps(found)
    )
    retried = results(tmp_path / "rows", step("reference", 2.0, batch=512))
    assert not any("out of memory" in line for line in tables.step_batches(retried))


def test_timms_encoder_stands_beside_ours(tmp_path: Path) -> None:
    lines = tables.gpu_steps(results(tmp_path / "rows", step("timm", 0.1, model="simmim_swin_base")))
    assert any(line.startswith("| Swin-B, 192 px, SimMIM | `timm` | 90.0 / 100.0") for line in lines)


def test_cards_are_named_and_not_mixed(tmp_path: Path) -> None:
    common = {"model": "sgmim_swin_base", "override": [], "batch": 128, "precision": "bf16", "arm": "triton"}
    product = {"m": 1, "k": 2, "n": 3, "count": 4, "flops_per_second": 1e12, "share_of_matrix": 0.5}
    product |= {"a_transposed": False, "b_transposed": True, "p50_seconds": 1e-3}
    largest = {"budget_gb": 24.0, "largest_batch": 96, "training_images_per_second": 1.0}
    adamw = {"implementation": "adamw", "p50_seconds": 1e-3, "share_of_copy": 0.75, "error": 1e-7}
    rows = [
        kernel("triton", 2e-4),
        {"benchmark": "products", **common, **product},
        {"benchmark": "optimizers", **common, **adamw},
        {"benchmark": "largest_batch", **common, **largest},
    ]
    found = results(tmp_path / "rows", *(row | {"environment": card} for card in (H100, H200) for row in rows))
    for make in (more_tables.kernels, more_tables.products, more_tables.optimizers, more_tables.largest_batches):
        lines = make(found)
        heads = [line for line in lines if line.startswith("Measured")]
        assert ["H200" in head for head in heads] == [True, False]
        assert "H100 80GB HBM3 (driver 580.1)" in heads[1]
        assert heads[1].endswith("sources fedcba.")  # no commit says what was measured
        assert sum(line.startswith("|---") for line in lines) == 2
        assert lines[-1] != ""


def test_parts_of_a_step(tmp_path: Path) -> None:
    found = results(tmp_path / "rows", step("triton", 0.1, parts={"matrix products": 0.06, "attention": 0.02}))
    assert "| Swin-B, 192 px | `triton` | NVIDIA H200 | matrix products 75%, attention 25% |" in tables.step_parts(
        found
    )


def test_kernels_beside_the_fastest_peer(tmp_path: Path) -> None:
    found = results(
        tmp_path / "rows",
        kernel("triton", 2e-4),
        kernel("plain", 9e-4),
        kernel("sdpa", 5e-4),
        kernel("sdpa", 1e-5, **{"pass": "backward"}),
        kernel("copy", 1e-4),
        {**kernel("flex", 1.0), "pass": None, "p50_seconds": None} | {"failed": "it says no"},
        {**kernel("compiled", 1.0), "p50_seconds": None, "pass": "gradient of qkv", "correct": False},
    )
    # As rows are written of what cannot run, or is wrong.
    found.rows = [{k: v for k, v in row.items() if v is not None} for row in found.rows]
    what = "| `window_attention` Swin-B stage 3 | 128 bf16 | forward |"
    assert f"{what} 200.0 us | 50% | 200 | 1.0e-03 (2.0e-03) | sdpa, x 2.50 |" in more_tables.kernels(found)
    assert "- `flex` at 1 shapes: it says no" in more_tables.kernels(found)
    assert "- `compiled` at 1 shapes: wrong: gradient of qkv" in more_tables.kernels(found)


def test_whole_runs(tmp_path: Path) -> None:
    common = {"model": "sgmim_swin_base", "override": [], "batch": 128, "precision": "bf16", "arm": "triton"}
    found = results(
        tmp_path / "rows",
        {"benchmark": "largest_batch", **common, "budget_gb": 24.0, "largest_batch": 96}
        | {"training_images_per_second": 1234.0},
        {"benchmark": "largest_batch", **common, "budget_gb": 8.0, "largest_batch": None},
        {"benchmark": "optimizers_skipped", "model": "sgmim_swin_base", "implementation": "apex"}
        | {"reason": "not installed"},
        {"benchmark": "optimizers", "model": "sgmim_swin_base", "implementation": "adamw", "p50_seconds": 1e-3}
        | {"share_of_copy": 0.75, "error": 1e-7},
        {"benchmark": "pipeline", **common, "loader": "dali", "workers": 16, "data": "scenes"}
        | {"p50_images_per_second": 1234.5, "step_images_per_second": 1300.0, "loader_images_per_second": 5000.0}
        | {"waiting_share": 0.034},
        {
            "benchmark": "parity",
            **common,
            "device": "cuda",
            "steps": 1000,
            "planned_steps": 1000,
            "seeds": [0, 1],
            "rounding": {"loss": 7e-4},
            "final": [{"loss": 1.0}, {"loss": 1.001}, {"loss": 1.0007}, {"loss": 1.002}],
        }
        | {"differences": {"triton": {"loss": 1e-3}}, "within_spread": {"triton": True}, "points": [500, 1000]}
        | {
            "curves": [
                {"arm": "reference", "seed": 0, "loss": [1.0, 0.5]},
                {"arm": "triton", "seed": 0, "loss": [1.0, 0.6]},
                {"arm": "reference", "seed": 0, "nudged": True, "loss": [1.0, 0.55]},
                {"arm": "reference", "seed": 1, "loss": [1.1, 0.7]},
            ]
        },
    )
    assert "| Swin-B, 192 px | `triton` | 24 GB | 96 | 1,234 |" in more_tables.largest_batches(found)
    assert "| Swin-B, 192 px | `triton` | 8 GB | none |  |" in more_tables.largest_batches(found)
    assert "| Swin-B, 192 px | `apex` | not installed |  |  |" in more_tables.optimizers(found)
    assert "| Swin-B, 192 px | `adamw` | 1.000 ms | 75% | 1.0e-07 |" in more_tables.optimizers(found)
    assert "| 1,234 | 1,300 | 5,000 | 3.4% |" in "\n".join(more_tables.pipeline(found))
    assert "| NVIDIA H200 | `triton` | 1.00e-03 | 7.00e-04 | 2.00e-03 | yes |" in "\n".join(more_tables.parity(found))
    assert plots.parity(found) is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (123.45, "123"),
        (12.345, "12.3"),
        (9.996, "10.0"),
        (1.2345, "1.23"),
        (0.012345, "0.0123"),
    ],
)
def test_digits(value: float, text: str) -> None:
    assert tables.digits(value) == text


def test_commands_say_what_to_measure_alone() -> None:
    command = "python -u -m benchmarks.kernels --tests 0 --ops a b --output /tmp/x.jsonl --seconds 95.0"
    rows = [
        {"environment": {"command": command}},
        {"environment": {"command": "python -m benchmarks.kernels --ops a b"}},
    ]
    assert commands(rows) == ["python -m benchmarks.kernels --ops a b"]


# -- plots


def test_plots_are_pictures(tmp_path: Path) -> None:
    found = results(
        tmp_path / "rows", kernel("triton", 2e-4), kernel("triton", 4e-4, **{"pass": "backward"}), step("triton", 0.1)
    )
    for name in ("roofline", "steps-gpu", "memory-gpu"):
        picture = plots.PLOTS[name](found)
        assert picture is not None
        assert picture == plots.PLOTS[name](Results(tmp_path / "rows"))
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert picture.count("<rect") == 2  # the ground and one bar
    parts = plots.PLOTS["steps-gpu"](found)
    assert parts is not None
    assert parts.count("<rect") == 1 + 3 + 3  # and their legend


def test_bars_are_as_long_as_their_values() -> None:
    picture = ElementTree.fromstring(svg.stacked("a < b", "ms", {"x": {"a": 1.0, "b": 2.0}, "y": {"b": 4.0}}))
    bars = [
        (rect.get("fill"), float(rect.get("width", "0")))
        for rect in picture.iter()
        if rect.get("height") == str(svg.BAR)
    ]
    widths = [width for _, width in bars]
    assert widths == pytest.approx([widths[0], 2 * widths[0], 4 * widths[0]])
    assert bars[1][0] == bars[2][0] != bars[0][0]


def test_long_names_find_room() -> None:
    names = [f"{'long ' * 6}{number}" for number in range(6)]
    picture = ElementTree.fromstring(svg.stacked("t", "ms", {names[0] * 2: dict.fromkeys(names, 1.0)}))
    moved = [float((x.get("transform") or "").split()[-1].rstrip(")")) for x in picture.iter() if x.get("transform")]
    words = [x for x in picture.iter() if x.text in names]
    assert moved == [svg.LINE]
    assert [float(x.get("y", 0)) for x in words] == [46.0] * 3 + [64.0] * 3
    assert all(float(x.get("x", 0)) + svg.LETTER * len(x.text or "") <= svg.WIDTH for x in words)
    label = next(x for x in picture.iter() if x.text == names[0] * 2)
    assert float(label.get("x", 0)) >= svg.LETTER * len(label.text or "")


def test_the_curves_are_of_the_target_card(tmp_path: Path) -> None:
    row = {"benchmark": "parity", "steps": 2, "precision": "bf16", "points": [1, 2], "differences": {"triton": {}}}
    row["curves"] = [{"arm": "reference", "seed": 0, "loss": [1.0, 0.5]}]
    cards = [{}, H200, H100, {"cpu": "EPYC"}]
    found = results(tmp_path / "rows", *({**row, "environment": card} for card in cards))
    assert "on NVIDIA H200" in str(plots.parity(found))
    alone = results(tmp_path / "cpu", {**row, "environment": {"cpu": "EPYC"}})
    assert "on a CPU" in str(plots.parity(alone))


def test_points_lie_under_the_roof_that_they_reach() -> None:
    points = {"a": [(10.0, 1e13, "half of it")], "b": [(1000.0, 1e14, "all of it")]}
    picture = ElementTree.fromstring(svg.roofline("t", copy=2e12, matrix=1e14, points=points))
    circles = [x for x in picture.iter() if x.tag.endswith("circle")]
    slope, flat = [x for x in picture.iter() if x.get("stroke") == "#444444"]
    assert float(circles[1].get("cy", 0)) == pytest.approx(float(flat.get("y1", 0)))
    x1, y1, x2, y2 = (float(slope.get(key, 0)) for key in ("x1", "y1", "x2", "y2"))
    x, y = (float(circles[0].get(key, 0)) for key in ("cx", "cy"))
    roof = y1 + (y2 - y1) * (x - x1) / (x2 - x1)
    assert y > roof  # half of what copying allows lies below the line
