"""Arms of small models, and benchmarks of steps run as commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.step_arms import Runner, Variant, make_batch
from sgmim_fast.models.sgmim import SGMIM

TINY = ["image_size=64", "embed_dim=8", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)", "window_size=4"]
CPU = torch.device("cpu")


def arm(name: str, model: SGMIM, size: int = 2, optimizer: str | None = None, precision: str = "fp32") -> Runner:
    torch.manual_seed(0)
    return Runner(model, make_batch(model.config, size, CPU), Variant.parse(name), precision, optimizer)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(monkeypatch: pytest.MonkeyPatch, module: Any, path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    monkeypatch.setattr("sys.argv", [module.__name__, *words, "--output", str(path)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return int(ended.value.code or 0), rows_of(path)
