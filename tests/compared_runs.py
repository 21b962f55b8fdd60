"""Two runs of one start, with and without guidance, and files as ``sgmim probe`` writes them beside them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_run import TINY, make_run

from sgmim_fast.probing.probes import CONSTANT, GRID_TARGET
from sgmim_fast.report.comparison import BASELINES, PROBE

GUIDED, PLAIN = "a <b>", "b & simmim"
"""Names of the folders."""


def make_both(folder: Path) -> tuple[Path, Path]:
    """The runs, without figures of their probes."""
    return make_run(folder, TINY, GUIDED), make_run(folder, replace(TINY, guidance="none"), PLAIN)


def make_record(path: Path, weights: str, first: float) -> None:
    """Figures count up from ``first`` in steps of a thousandth."""
    number = iter(range(1000))

    def figures(*names: str) -> dict[str, float]:
        return {name: first + next(number) / 1000 for name in names}

    def report(kind: str, *names: str) -> dict[str, Any]:
        probes = (kind, f"knn-{kind}", CONSTANT, GRID_TARGET)
        return {
            "results": [{"probe": probe, "figures": figures(*names)} for probe in probes],
            **{"train": f"{kind}: 9 images", "val": "3 others", "target": {}, "train_images": 8, "val_images": 3},
            **{"train_sha256": "1", "val_sha256": "2", "kept_tokens": 77},
        }

    content = {
        "weights": weights,
        "stride": 8,
        "settings": {"seed": 0, "tokens": 80},
        "reports": {
            "depth": report("depth", "d1", "abs_rel", "rmse", "silog"),
            "segmentation": report("segmentation", "mIoU", "mAcc", "aAcc"),
        },
    }
    path.write_text(json.dumps(content))


FIRST = {PROBE: 10.0, BASELINES["row-colour"]: 20.0, BASELINES["random"]: 30.0}
"""The first figure in each file of the guided run; the other run's ``PROBE`` begins with 40."""


def add_records(guided: Path, plain: Path) -> None:
    """All four files."""
    newest = "checkpoints/step_000040/model.safetensors"
    for file, first in FIRST.items():
        make_record(guided / file, str(guided / newest) if file == PROBE else file, first)
    make_record(plain / PROBE, str(plain / newest), 40.0)
