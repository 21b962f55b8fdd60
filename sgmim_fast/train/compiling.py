"""``--compile``: the training step in one piece through torch.compile, and whether a machine can do that."""

import os
import shlex
import shutil
import subprocess
import sysconfig

import torch
from torch import nn

from sgmim_fast.errors import UserError, first_line

PACKAGES = "Debian and Ubuntu: apt-get install g++ python3-dev"


def check_compiler(device: torch.device) -> None:
    """Refuse ``--compile`` where the programs that it writes for ``device`` cannot be built.

    Raises:
        UserError: with the reason and the remedy.
    """
    reason = _gpu_objection() if device.type == "cuda" else _cpu_objection()
    if reason is not None:
        raise UserError(f"--compile cannot run here: {reason}; or leave --compile out")


def _cpu_objection() -> str | None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler is found ({first_line(error)}); install g++ ({PACKAGES}) or set CXX"
    return _trial(compiler, "c++", "#include <omp.h>\n#include <Python.h>\n#include <vector>\n", "-fopenmp")


def _gpu_objection() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"Triton cannot be imported ({first_line(error)}); install it again"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return f"Triton finds no C compiler; install gcc ({PACKAGES}) or set CC"
    return _trial(compiler, "c", "#include <Python.h>\n")


def _trial(compiler: str, language: str, program: str, *options: str) -> str | None:
    """Let ``compiler`` read a program's headers; what it complains of, if it does."""
    command = [*shlex.split(compiler), "-x", language, "-fsyntax-only", *options]
    command += ["-I", sysconfig.get_path("include"), "-"]
    try:
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the compiler {compiler} does not start ({first_line(error)}); install g++ ({PACKAGES})"
    if done.returncode == 0:
        return None
    what = next((line.strip() for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
    return f"the compiler {compiler} cannot build its programs ({what}); install what is missing ({PACKAGES})"


def compile_step(task: nn.Module) -> None:
    """Let ``task`` run as one compiled graph, forward and backward, made for the shapes of its first batch.

    What DeepSpeed hooks around the task (timers that change with every step) stays outside.
    """
    task.forward = torch.compile(task.forward, dynamic=False, fullgraph=True)
