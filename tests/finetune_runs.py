"""Real fine-tuning runs of a tiny backbone on CPU ranks, for the tests that start some."""

from pathlib import Path
from typing import Any

from tests.training_runs import command, run

TASKS = ("depth", "segmentation")
TINY: dict[str, dict[str, str]] = {
    "depth": {"depth.head": "glp", "depth.head-channels": "8"},
    "segmentation": {
        "segmentation.head-channels": "16",
        "segmentation.auxiliary-channels": "16",
        "schedule.warmup-steps": "2",
    },
}
SHORT = {
    "data.crop-size": "64 64",
    "data.workers": "0",
    "backbone.drop-path-rate": "0.2",
    "train.batch-size": "2",
    "train.log-every": "1",
    "train.checkpoint-every": "2",
    "train.max-steps": "4",
}


def arguments(task: str, data: Path, weights: Path, output: Path, recipe: str = "scenes", **options: Any) -> list[str]:
    """Options of a run; ``a__b_c`` is ``--a.b-c``."""
    chosen = SHORT | TINY[task] | {key.replace("__", ".").replace("_", "-"): str(v) for key, v in options.items()}
    words = [task, "--recipe", recipe, "--data", str(data), "--weights", str(weights), "--output", str(output)]
    for key, value in chosen.items():
        words += [f"--{key}", *value.split()]
    return words


def finetune(ranks: int, words: list[str], **options: Any) -> Any:
    """Under DeepSpeed's launcher."""
    return run(command(ranks, words, "sgmim_fast.finetune"), **options)
