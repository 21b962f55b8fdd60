"""What a run ran on: written beside its results so that figures can be judged later."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "deepspeed", "timm", "numpy", "pillow", "safetensors")


def describe_environment(device: "torch.device", world_size: int) -> dict[str, str | int]:
    """Versions, hardware and command of this process."""
    found: dict[str, str | int] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),  # where this machine keeps its Python tells nobody
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "world_size": world_size,
        "commit": commit(),
    }
    if device.type == "cuda":
        import torch

        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or ""}
    return found | versions()


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_name() -> str:
    """Model of the processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Commit of the source tree, with "+changes" if it differs; "installed" where there is no tree."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return "installed"
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True)
        # Rows that a benchmark has just appended are no change of what it measures.
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"],
            cwd=tree,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
