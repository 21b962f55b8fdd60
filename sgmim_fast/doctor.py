"""``sgmim doctor``: what this machine has, which choices run on it and why others do not, and whether a run can start.

The choices are tried with the very functions that refuse them when a run asks for them. A package that is broken is a
finding: whatever it raises is reported, so nothing of it is imported at the top of this file, not even PyTorch.
"""

import contextlib
import importlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import get_args

from sgmim_fast import nvidia_apex
from sgmim_fast.errors import first_line
from sgmim_fast.train.environment import cpu_name

# Name, module to import, and whether every run needs it.
PACKAGES = (
    ("PyTorch", "torch", True),
    ("Triton", "triton", False),
    ("DeepSpeed", "deepspeed", True),
    ("NumPy", "numpy", True),
    ("Pillow", "PIL.Image", True),
    ("safetensors", "safetensors.torch", True),
    ("tyro", "tyro", True),
    ("PyYAML", "yaml", True),
    ("psutil", "psutil", True),
    ("rich", "rich.progress", True),
    ("TensorBoard", "torch.utils.tensorboard", True),
    ("timm", "timm", False),
    ("segmentation-models-pytorch", "segmentation_models_pytorch", False),
    ("TorchMetrics", "torchmetrics", False),
    ("transformers", "transformers", False),
    ("ONNX", "onnx", False),
    ("ONNX Runtime", "onnxruntime", False),
    ("DALI", "nvidia.dali", False),
    ("xformers", "xformers.ops", False),
    ("torchao", "torchao.float8", False),
    ("Weights & Biases", "wandb", False),
)
# Those that do not tell their version themselves, by the name they are installed under.
INSTALLED_AS = {"Pillow": "pillow", "PyYAML": "pyyaml", "TensorBoard": "tensorboard", "safetensors": "safetensors"}
INSTALLED_AS |= {"rich": "rich", "tyro": "tyro", "xformers": "xformers", "torchao": "torchao"}

BAD = ("not installed", "broken")


@dataclass(frozen=True)
class Choice:
    """A value of an option, and whether it runs here."""

    option: str
    value: str
    runs: bool
    remark: str
    """Why it does not, and what to do; or what it means here."""


@dataclass
class Findings:
    """Everything that ``sgmim doctor`` has to say."""

    machine: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What keeps a training run with backend "auto" from starting here; one line each, with the remedy."""


def examine() -> Findings:
    """Look at everything; takes the time of importing it."""
    found = Findings()
    with _quiet():
        for step in (_look_at_packages, _look_at_machine, _look_at_gpus, _try_choices, _try_to_start):
            if reason := _reason(partial(step, found)):
                found.problems.append(f"{step.__name__.strip('_').replace('_', ' ')}: {reason}")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What packages print and warn of while they are imported is not for the reader."""
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with out, err, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(attempt: Callable[[], object]) -> str | None:
    """Why ``attempt`` fails, in one line; None if it does not."""
    try:
        attempt()
    except (Exception, SystemExit) as error:  # a package may do anything when it is imported
        return first_line(error)
    return None


def _look_at_packages(found: Findings) -> None:
    for name, module, needed in PACKAGES:
        if name == "DeepSpeed" and not _torch_has_gpus():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it looks for an accelerator when it is imported
        found.packages[name] = state = _state(name, module)
        if needed and state.startswith(BAD):
            found.problems.append(f"{name} is {state}; run make setup, or install it again")
    found.packages["NVIDIA Apex"] = _apex_state()


def _state(name: str, module: str) -> str:
    """Version of a package; "not installed"; or "broken: why"."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        itself = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        return "not installed" if itself else f"broken: {first_line(error)}"
    except (Exception, SystemExit) as error:
        return f"broken: {first_line(error)}"
    if name in INSTALLED_AS:
        try:
            return metadata.version(INSTALLED_AS[name])
        except metadata.PackageNotFoundError:
            return "of unknown version"
    version = getattr(sys.modules[module], "__version__", None)
    return version if isinstance(version, str) else "broken: it is empty, as an interrupted installation leaves it"


def _apex_state() -> str:
    """NVIDIA's is told apart by the parts it has; the other package of that name is not run."""
    whose = nvidia_apex.find()
    if whose == "missing":
        return "not installed"
    try:
        version = metadata.version("apex")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    if whose == "other":
        return f"not installed (the apex here, {version}, is PyPI's package of that name, not NVIDIA's)"
    parts = (("optimizers", "FusedAdam"), ("normalization", "FusedLayerNorm"))
    reasons = [reason for part in parts if (reason := _reason(partial(nvidia_apex.load, *part)))]
    return f"broken: {reasons[0]}" if reasons else version


def _look_at_machine(found: Findings) -> None:
    machine = found.machine
    machine["system"] = platform.platform()
    machine["Python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine["CPU"] = f"{cpu_name()}, {usable} of {os.cpu_count()} cores usable"
    with contextlib.suppress(ValueError, OSError):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        machine["memory"] = f"{size / 2**30:.1f} GiB"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=20, check=True)
        machine["C++ compiler"] = next(iter(done.stdout.splitlines()), compiler[0])
    machine.setdefault("C++ compiler", f"none ({compiler[0]})")


def _look_at_gpus(found: Findings) -> None:
    machine = found.machine
    seen = _gpus_of_the_driver(machine)
    if found.packages["PyTorch"].startswith(BAD):
        return
    import torch

    machine["CUDA of PyTorch"] = torch.version.cuda or "none: built without CUDA"
    if not torch.cuda.is_available():
        machine["GPUs"] = "none that PyTorch sees"
        problem = _invisible_gpu(seen)
        found.problems += [problem] if problem else []
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        text = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
        machine[f"GPU {number}"] = text
        if reason := _reason(partial(_compute, f"cuda:{number}")):
            found.problems.append(
                f"GPU {number} ({gpu.name}) does not compute: {reason}; install a PyTorch built for it, or leave it "
                "out with CUDA_VISIBLE_DEVICES"
            )


def _compute(device: str) -> float:
    import torch

    return torch.ones(8, device=device).sum().item()


def _torch_has_gpus() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False


def _gpus_of_the_driver(machine: dict[str, str]) -> list[str]:
    """Names of the GPUs that NVIDIA's driver knows, whatever PyTorch sees; also notes the driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        machine["NVIDIA driver"] = "none"
        with contextlib.suppress(OSError):
            machine["NVIDIA driver"] = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        return ["a GPU"] if list(Path("/dev").glob("nvidia[0-9]*")) else []
    rows = [line.split(", ", 1) for line in out.splitlines() if ", " in line]
    machine["NVIDIA driver"] = rows[0][0] if rows else "no GPU"
    return [name for _, name in rows]


def _invisible_gpu(seen: list[str]) -> str | None:
    """What is wrong if the driver has GPUs and PyTorch sees none of them."""
    import torch

    if not seen or os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):  # none, or hidden on purpose
        return None
    names = ", ".join(sorted(set(seen)))
    if torch.version.cuda is None:
        return f"this machine has {names}, but PyTorch is built without CUDA; install the CUDA build (make setup does)"
    reason = _reason(torch.cuda.init) or "CUDA finds no device"
    return f"this machine has {names}, but PyTorch sees no GPU: {reason}; update the driver or install another PyTorch"


def _try_choices(found: Findings) -> None:
    if found.problems:
        return  # nothing runs here before they are solved
    import torch

    from sgmim_fast import config, ops
    from sgmim_fast.attention import check_attention
    from sgmim_fast.data.dali_decoding import check_dali
    from sgmim_fast.models.float8 import check_float8
    from sgmim_fast.models.norms import check_norm
    from sgmim_fast.train.compiling import check_compiler
    from sgmim_fast.train.optim import check_optimizer
    from sgmim_fast.train.ranks import own_device

    def note(option: str, value: str, attempt: Callable[[], object], meaning: str = "") -> None:
        reason = _reason(attempt)
        remark = meaning if reason is None else reason.split(" cannot run here: ")[-1]
        found.choices.append(Choice(option, value, reason is None, remark))

    device = own_device()
    x = torch.zeros(1, device=device)
    for name in get_args(config.Backend):
        meaning = f'means "{ops.resolve_backend(name, x)}" here' if name == "auto" else ""
        note("train.backend", name, partial(ops.resolve_backend, name, x), meaning)
    for name in get_args(config.Attention):
        note("train.attention", name, partial(check_attention, name, "torch", device))
    for name in get_args(config.Norm):
        note("train.norm", name, partial(check_norm, name, device))
    for name in get_args(config.Float8):
        note("train.float8", name, partial(check_float8, name, device))
    for name in get_args(config.OptimizerName):
        note("optimizer.implementation", name, partial(check_optimizer, name, device))
    note("data.loader", "torch", partial(importlib.import_module, "sgmim_fast.data.torch_loader"))
    note("data.loader", "dali", check_dali)
    note("--compile", "", partial(check_compiler, device))


def _try_to_start(found: Findings) -> None:
    """What a run does first: import everything, then check its choices, here those that it makes unless told."""
    if found.problems:
        return
    from sgmim_fast.config import PretrainConfig
    from sgmim_fast.train.choices import check_choices
    from sgmim_fast.train.engine import run_job  # noqa: F401
    from sgmim_fast.train.ranks import own_device

    check_choices(PretrainConfig(), own_device())


def to_json(found: Findings) -> str:
    """For machines: the findings, and ``ready``."""
    return json.dumps({"ready": not found.problems, **asdict(found)}, indent=2)


def show(found: Findings) -> None:
    """Print tables on a terminal, plain lines elsewhere."""
    sections = {
        "machine": [(name, "", value) for name, value in found.machine.items()],
        "packages": [(name, "", value) for name, value in found.packages.items()],
        "choices": [
            (f"{choice.option} {choice.value}".strip(), "yes" if choice.runs else "no", choice.remark)
            for choice in found.choices
        ],
    }
    if sys.stdout.isatty() and "rich" in sys.modules and not found.packages["rich"].startswith(BAD):
        _show_tables(sections)
    else:
        for title, rows in sections.items():
            print(title)
            width = max((len(name) for name, _, _ in rows), default=0)
            for name, mark, text in rows:
                print(f"  {name:{width}}  {': '.join(part for part in (mark, text) if part)}")
    for problem in found.problems:
        print(f"problem: {problem}")
    gpus = sum(name.startswith("GPU ") for name in found.machine)
    where = f"{gpus} GPU(s)" if gpus else "the CPU"
    print("no training run can start here" if found.problems else f"ready to train on {where}")


def _show_tables(sections: dict[str, list[tuple[str, str, str]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, expand=False)
        for name, mark, text in rows:
            bad = mark == "no" or text.startswith("broken")
            style = "red" if bad else "dim" if text.startswith("not installed") else "green" if mark else ""
            table.add_row(Text(name), Text(mark or text, style), *([Text(text)] if mark else []))
        console.print(table)
