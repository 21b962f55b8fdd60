"""The recorded rows, chosen for tables and plots: of each measurement the newest, told apart by where it was made."""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import Row, newest, read

STEP_KEYS = ("model", "override", "batch", "precision", "device", "arm", "backend", "attention", "optimizer")
SKIPPED_KEYS = ("model", "batch", "precision", "arm", "optimizer")
KERNEL_KEYS = ("op", "case", "batch", "dtype", "implementation", "pass")
WORDS = {
    "sgmim_swin_base": "Swin-B, 192 px",
    "sgmim_swin_large": "Swin-L, 192 px",
    "sgmim_swinv2_base": "SwinV2-B, 192 px",
    "sgmim_vit_base": "ViT-B/16, 224 px",
    "simmim_swin_base": "Swin-B, 192 px, SimMIM",
}
OMITTED = r" --(output|results|seconds|tests) \S+"
TARGET = "NVIDIA H200"
"""The GPU that tables are for where none has been measured."""


class Results:
    """All rows of a folder, those of first tries left out."""

    def __init__(self, folder: Path) -> None:
        self.rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read(path) if not row.get("smoke")]

    def of(self, benchmark: str) -> list[Row]:
        return [row for row in self.rows if row["benchmark"] == benchmark]

    def gpus(self, *benchmarks: str) -> list[str]:
        """Names of the GPUs that rows of those benchmarks are from, the target first; the target alone if none is."""
        found = {row["environment"]["gpu"] for row in self.rows if row["benchmark"] in benchmarks and on_gpu(row)}
        return sorted(found, key=lambda name: (not name.startswith(TARGET), name)) or [TARGET]

    def steps(self, gpu: str | None) -> list[Row]:
        """Newest rows of training steps of unchanged models on a GPU, or on CPUs for None."""
        rows = [row for row in self.of("train_step") if row["environment"].get("gpu") == gpu and not row["override"]]
        return newest(rows, STEP_KEYS)

    def skipped_steps(self, gpu: str) -> list[Row]:
        """What was tried on a GPU, of unchanged models, and why it left no times."""
        rows = [row for row in self.newest("train_step_skipped", gpu, *SKIPPED_KEYS) if not row["override"]]
        return [row for row in rows if "arm" in row]

    def kernels(self, gpu: str) -> list[Row]:
        """Newest rows of kernels on a GPU."""
        return newest((row for row in self.of("kernels") if row["environment"].get("gpu") == gpu), KERNEL_KEYS)

    def newest(self, benchmark: str, gpu: str | None, *keys: str) -> list[Row]:
        rows = (row for row in self.of(benchmark) if row["environment"].get("gpu") == gpu)
        return newest(rows, keys)


def on_gpu(row: Row) -> bool:
    return "gpu" in row["environment"]


def arm_of(row: Row) -> str:
    """How an implementation of the step is named among ``--backends``."""
    return str(row.get("arm") or row["backend"])


def model_name(row: Row) -> str:
    """For people."""
    return WORDS.get(row["model"], str(row["model"]))


def commands(rows: Iterable[Row]) -> list[str]:
    """That made the rows, each once, without where rows went and how long there was."""
    found = (re.sub(OMITTED, "", row["environment"]["command"]) for row in rows)
    return list(dict.fromkeys(command.replace("python -u -m", "python -m") for command in found))
