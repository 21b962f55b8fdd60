"""Imports run downward only, and the light part of the package stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "sgmim_fast"
# Lowest first. A room is a module or a folder; rooms of one layer do not import each other.
LAYERS = (
    ("errors",),
    ("masking", "nvidia_apex", "colors", "library_noise"),
    ("config", "reference", "kernels"),
    ("recipes", "finetune_recipes", "attention", "position_tables", "hf_layout"),
    ("ops", "weight_files"),
    ("models", "weight_layouts"),
    ("weight_plan", "weight_windows"),
    ("weights", "data"),
    ("backbones",),
    ("tasks",),
    ("train", "probing"),
    # sgmim_fast is the package's own __init__
    (PACKAGE, "timm", "pretrain", "finetune", "report", "doctor", "launching", "planning", "exporting"),
    ("commands",),
    ("cli",),
)
DEPTH = {room: depth for depth, layer in enumerate(LAYERS) for room in layer}
# Where models are built and timed these may be missing: kernels to backbones, the package's own __init__ included.
LIGHT = {room for layer in LAYERS[: DEPTH["models"] + 1] for room in layer} | {
    "weight_plan",
    "weight_windows",
    "weights",
    "backbones",
    PACKAGE,
}
HEAVY = ("deepspeed", "pydantic", "tyro", "xformers", "torchao", "apex", "nvidia")
# Imported inside a function of these modules, by name of the user's.
WHEN_ASKED = {"attention": "xformers", "nvidia_apex": "apex", "models.float8": "torchao"}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def read_tree() -> dict[str, str]:
    """Source by dotted name; a folder's own module ends in ``.__init__``."""
    folders = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.kernels": ROOT / "kernels"}
    return {
        ".".join((name, *path.relative_to(folder).with_suffix("").parts)): path.read_text(encoding="utf-8")
        for name, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }


def imported_names(module: str, source: str) -> Iterator[str]:
    """Absolute dotted names that a module imports anywhere, functions included; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def room_of(name: str) -> str:
    """Room that a dotted name of the package is in; a name of the public face is in the package's own."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in DEPTH else PACKAGE


def objection(module: str, name: str) -> str | None:
    """Why ``module`` may not import ``name``; None if it may."""
    room = room_of(module)
    top = name.split(".")[0]
    if top in ("tests", "benchmarks"):
        return "the package does not know its tests and benchmarks"
    if top == "kernels":
        return "the kernels' import name is sgmim_fast.kernels"
    if room in LIGHT and top in HEAVY and WHEN_ASKED.get(module.removeprefix(f"{PACKAGE}.")) != top:
        return f"{top} must not be needed where models are built"
    if top != PACKAGE:
        known = room != "kernels" or top in KERNELS_MAY_IMPORT
        return None if known else "kernels import torch, triton and the standard library only"
    target = room_of(name)
    if room == target or name == f"{PACKAGE}.__version__":
        return None
    if room == "kernels":
        return "kernels import no other room"
    if DEPTH[target] == DEPTH[room]:
        return "they are peers"
    return "that is upward" if DEPTH[target] > DEPTH[room] else None


def violations(sources: dict[str, str]) -> list[str]:
    """One line for each import that breaks a rule, each circle, and each file that no layer names."""
    found = []
    modules = {name.removesuffix(".__init__") for name in sources}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for module, source in sources.items():
        short = module.removesuffix(".__init__")
        if short != PACKAGE and short.split(".")[1] not in DEPTH:
            found.append(f"{short} is in no layer; add it to LAYERS")
            continue
        for name in imported_names(module, source):
            if reason := objection(module, name):
                found.append(f"{short} imports {name}: {reason}")
            target = name
            while target not in modules and "." in target:
                target = target.rpartition(".")[0]
            if target in modules and target != short and room_of(target) == room_of(short):
                graph[short].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " <- ".join(error.args[1]))
    return found


def test_tree_follows_the_layers() -> None:
    sources = read_tree()
    assert {"sgmim_fast.__init__", "sgmim_fast.errors", "sgmim_fast.kernels.__init__"} <= sources.keys()
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("sgmim_fast.masking", "from sgmim_fast.config import ModelConfig", "upward"),
        ("sgmim_fast.masking", "def f():\n    import sgmim_fast.config", "upward"),
        ("sgmim_fast.masking", "from .config import ModelConfig", "upward"),
        ("sgmim_fast.models.swin", "from ..train import engine", "upward"),
        ("sgmim_fast.models.__init__", "from ..train import engine", "upward"),
        ("sgmim_fast.train.engine", "from sgmim_fast import create_model", "upward"),
        ("sgmim_fast.train.engine", "import importlib\nimportlib.import_module('sgmim_fast.cli')", "upward"),
        ("sgmim_fast.weights", "from sgmim_fast.data.manifest import read", "peers"),
        ("sgmim_fast.report", "import sgmim_fast.pretrain", "peers"),
        ("sgmim_fast.models.swin", "def f():\n    import deepspeed.comm", "where models are built"),
        ("sgmim_fast.ops", "from nvidia import dali", "where models are built"),
        ("sgmim_fast.weights", "import tyro", "where models are built"),
        ("sgmim_fast.ops", "def f():\n    import xformers.ops", "where models are built"),
        ("sgmim_fast.attention", "def f():\n    import deepspeed", "where models are built"),
        ("sgmim_fast.kernels.launch", "import numpy as np", "standard library only"),
        ("sgmim_fast.kernels.launch", "from sgmim_fast.errors import UserError", "no other room"),
        ("sgmim_fast.kernels.launch", "from kernels import gather", "import name"),
        ("sgmim_fast.cli", "from tests.golden import formula", "tests and benchmarks"),
        ("sgmim_fast.cli", "import benchmarks.harness", "tests and benchmarks"),
        ("sgmim_fast.helpers", "", "in no layer"),
    ],
)
def test_made_up_violation_is_found(module: str, source: str, reason: str) -> None:
    found = violations({"sgmim_fast.__init__": "", module: source})
    assert len(found) == 1
    assert reason in found[0]


def test_made_up_circle_is_found() -> None:
    found = violations(
        {
            "sgmim_fast.data.__init__": "from sgmim_fast.data.pairs import Pairs",
            "sgmim_fast.data.pairs": "def f():\n    from sgmim_fast.data import loader",
            "sgmim_fast.data.loader": "from .pairs import Pairs",
        }
    )
    assert len(found) == 1
    assert found[0].startswith("circle: ")
    assert "sgmim_fast.data.loader" in found[0]


def test_downward_imports_are_allowed() -> None:
    downward = {
        "sgmim_fast.__init__": "from sgmim_fast.models.swin import Swin\n__version__ = '1'",
        "sgmim_fast.kernels.gather": "import torch, triton, math\nfrom sgmim_fast.kernels import launch",
        "sgmim_fast.kernels.launch": "import torch",
        "sgmim_fast.attention": "from sgmim_fast import reference\ndef f():\n    import xformers.ops",
        "sgmim_fast.ops": "from sgmim_fast.kernels import gather\nfrom sgmim_fast import errors, reference",
        "sgmim_fast.models.__init__": "from .swin import Swin",
        "sgmim_fast.models.swin": "import sgmim_fast.ops\nimport timm, numpy",
        "sgmim_fast.train.engine": "import deepspeed\nfrom sgmim_fast import __version__",
        "sgmim_fast.cli": "import sgmim_fast as sg\nimport tyro\nfrom sgmim_fast import pretrain",
    }
    assert violations(downward) == []


# Run in a fresh interpreter with the names to import as arguments.
IMPORT_QUIETLY = """
import importlib, os, sys
import torch

def probed(*args, **options):
    raise AssertionError("the device was probed during an import")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = probed
environment = dict(os.environ)
unwanted, names = sys.argv[1].split(","), sys.argv[2:]
for name in names:
    importlib.import_module(name)
    loaded = {loaded.split(".")[0] for loaded in sys.modules}.intersection(unwanted)
    assert not loaded, f"importing {name} imports {sorted(loaded)}"
    assert dict(os.environ) == environment, f"importing {name} sets an environment variable"
"""


def import_quietly(unwanted: tuple[str, ...], names: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPORT_QUIETLY, ",".join(unwanted), *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_importing_the_light_part_loads_nothing_heavy() -> None:
    """The package first, then all that models need. Kernel modules are left out: they are where Triton is imported."""
    modules = [name.removesuffix(".__init__") for name in read_tree()]
    light = [name for name in modules if room_of(name) in LIGHT - {"kernels"}]
    assert light[0] == PACKAGE
    result = import_quietly((*HEAVY, "triton", "timm"), [*light, f"{PACKAGE}.kernels"])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import tyro", "importing probe imports ['tyro']"),
        ("import torch; torch.cuda.is_available()", "the device was probed"),
        ("import os; os.environ['PROBE'] = '1'", "sets an environment variable"),
    ],
)
def test_made_up_heavy_import_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, complaint: str
) -> None:
    (tmp_path / "probe.py").write_text(source, encoding="utf-8")
    # Stand-ins that load at once; torch offers only what IMPORT_QUIETLY replaces.
    (tmp_path / "tyro.py").touch()
    (tmp_path / "torch.py").write_text("class cuda: pass\nclass _C: pass\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = import_quietly(HEAVY, ["probe"])
    assert result.returncode == 1
    assert complaint in result.stderr
