"""Checkpoints for another number of ranks: DeepSpeed's universal format, made for the time of loading."""

import shutil
import subprocess
import sys
from pathlib import Path

from sgmim_fast.errors import UserError
from sgmim_fast.train.run_folder import UNIVERSAL


def make_universal(checkpoint: Path) -> Path:
    """A copy of a ZeRO checkpoint that any number of ranks can load; on one rank. Returns its folder.

    Raises:
        UserError: if there is no room for it or DeepSpeed cannot convert the checkpoint.
    """
    folder = checkpoint.parent / UNIVERSAL
    shutil.rmtree(folder, ignore_errors=True)
    needed = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    free = shutil.disk_usage(checkpoint.parent).free
    if free < needed:
        raise UserError(
            f"{checkpoint} is of another number of ranks and must be rewritten for this one, which needs "
            f"{needed / 1e9:.2f} GB in {checkpoint.parent}; {free / 1e9:.2f} GB are free there"
        )
    target = folder / checkpoint.name
    # In a process of its own, as DeepSpeed's converter starts processes, prints, and is a program.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
        raise UserError(
            f"{checkpoint} cannot be rewritten for this number of ranks ({last.strip()}); resume on as many ranks as "
            "wrote it"
        )
    return target


def remove_universal(copy: Path) -> None:
    """Remove what ``make_universal`` made."""
    shutil.rmtree(copy.parent, ignore_errors=True)
