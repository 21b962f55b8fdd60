"""The tables and plots of docs/claim.md say what rows say, and nothing of rows of other settings."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import claim
from benchmarks.recorded import Results
from benchmarks.replicating.pieces import Piece, fingerprint
from benchmarks.replicating.sizes import USUAL, Variant
from benchmarks.rows import Row

SIZE = claim.SIZE
ENVIRONMENT = {
    "cpu": "EPYC",
    "cores": 2,
    "torch": "2.11.0",
    "commit": "0123456789",
    "command": "python -m x --output y",
}


def row(arm: str, seed: int, stage: Any, figures: dict[str, Any], labels: int | None = 200, **more: Any) -> Row:
    variant = more.pop("variant", USUAL)
    piece = Piece(arm, seed, stage, labels, variant)
    return {
        "benchmark": "replication",
        "environment": ENVIRONMENT,
        "size": SIZE.name,
        "arm": arm,
        "seed": seed,
        "stage": stage,
        "labels": labels,
        "rate": variant.rate,
        "length": variant.length,
        "fingerprint": fingerprint(SIZE, piece),
        "precision": SIZE.precision,
        "threads": SIZE.threads,
        "figures": figures,
        "cost": {"seconds": 1.0},
        **more,
    }


def results(folder: Path, *rows: Row) -> Results:
    folder.mkdir(exist_ok=True)
    (folder / "made_up.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Results(folder)


def depth(value: float) -> dict[str, float]:
    return {f"{scenes}{key}": value for scenes in ("", "familiar ") for key in ("rmse", "abs_rel", "d1", "silog")}


VALUES = {
    "scratch": (4.0, 4.2, 4.4),
    "simmim": (3.0, 3.1, 3.2),
    "sgmim": (2.0, 2.11, 2.22),
    "fourth-channel": (3, 2, 5),
}


@pytest.fixture
def tuned(tmp_path: Path) -> Results:
    rows = [row(arm, seed, "depth", depth(value)) for arm, found in VALUES.items() for seed, value in enumerate(found)]
    return results(tmp_path / "rows", *rows)


def line(lines: list[str], start: str) -> list[str]:
    (found,) = (line for line in lines if line.startswith(start))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_method_is_held_against_its_baseline(tuned: Results) -> None:
    cells = line(claim.main(tuned), "| fine-tuned depth RMSE")
    assert cells[:5] == [
        "fine-tuned depth RMSE ↓",
        "200",
        "4.200 ± 0.200",
        "3.100 ± 0.100",
        "2.110 ± 0.110",
    ]
    # Differences -1.00, -0.99, -0.98: Student's t with 2 degrees reaches 4.3027 x 0.01 / sqrt(3) = 0.0248.
    assert cells[5] == "**-0.990 [-1.015, -0.965]**"
    assert "| linear" not in "\n".join(claim.main(tuned))


def test_doubt_is_not_bold(tmp_path: Path) -> None:
    rows = [row("simmim", seed, "depth", depth(3.0)) for seed in range(3)]
    rows += [row("sgmim", seed, "depth", depth(value)) for seed, value in enumerate((2.0, 2.9, 3.5))]
    (cell,) = line(claim.main(results(tmp_path / "rows", *rows)), "| fine-tuned depth RMSE")[5:]
    assert cell.startswith("-0.200 [-2.0")
    single = results(tmp_path / "one", *(row(arm, 0, "depth", depth(1.0)) for arm in ("simmim", "sgmim")))
    assert line(claim.main(single), "| fine-tuned depth RMSE")[3:] == ["1.000", "1.000", "+0.000"]


def test_ablations_are_held_against_the_method(tuned: Results) -> None:
    lines = claim.ablations(tuned)
    place = [cell.strip() for cell in lines[0].strip("|").split("|")].index("fine-tuned depth RMSE ↓")
    assert line(lines, "| sgmim |")[place] == "2.110 ± 0.110"
    assert line(lines, "| simmim |")[place] == "3.100 ± 0.100 (**+0.990**)"
    assert line(lines, "| fourth-channel |")[place] == "3.333 ± 1.528 (+1.223)"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| scratch", "| simmim", "| sgmim", "| fourth-channel"]


def test_rows_of_other_settings_do_not_count(tmp_path: Path) -> None:
    stale = row("sgmim", 0, "depth", depth(1.0), fingerprint="0" * 16)
    assert claim.main(results(tmp_path / "rows", stale)) == [claim.UNMEASURED]
    longer = row("sgmim", 0, "depth", depth(1.0), variant=Variant(length=2.0))
    assert claim.main(results(tmp_path / "more", longer)) == [claim.UNMEASURED]


def test_every_block_is_made(tuned: Results) -> None:
    for name, make in claim.TABLES.items():
        lines = make(tuned)
        assert lines
        assert (lines == [claim.UNMEASURED]) == (name in ("claim-cost", "claim-floor"))
    assert claim.origin(tuned)[-1] == "    python -m x"
    picture = claim.PLOTS["claim-labels"](tuned)
    assert picture is not None
    ElementTree.fromstring(picture)
    assert claim.PLOTS["claim-length"](tuned) is None
