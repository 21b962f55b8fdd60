"""Compiles every kernel that the recipes launch, for a GPU that need not be there, and judges the machine code.

    python tests/ahead_of_time.py --capability 90

The real models run forward and backward on the meta device: launchers choose blocks and arguments as for real
tensors, and only the launch itself is left out. So exactly what would be launched is compiled: it must compile, fit in
shared memory, keep everything in registers, use matrix instructions and read rows 16 bytes at a time.
"""

import argparse
import ast
import math
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "triton"
sys.path.insert(0, str(ROOT))

from machine_code import SHARED_BYTES, MachineCode, read_machine_codes  # noqa: E402

import benchmarks  # noqa: E402, F401  (makes sgmim_fast.kernels importable where nothing is installed)
from sgmim_fast import kernels, ops  # noqa: E402
from sgmim_fast.config import ModelConfig  # noqa: E402
from sgmim_fast.masking import masked_cell_count  # noqa: E402
from sgmim_fast.recipes import MODELS, RECIPES  # noqa: E402
from sgmim_fast.tasks.pretrain import PretrainTask  # noqa: E402

MOST_PROGRAMS = 2**31 - 1  # along the first dimension of a grid
SPILLED_BYTES = 8 if triton.__version__.startswith("3.6.") else 0
"""What a thread may keep in local memory. Triton 3.6 keeps two registers of windows of 30 there, for sm_80."""
NARROW: dict[str, str] = {}
"""Kernels whose loads need not be 16 bytes wide, each with the reason."""


# -- what is launched


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything that launches kernels, each case with a name for the table."""
    seen = []
    for name, recipe in RECIPES.items():
        config = recipe()
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        case = (config.model, config.train.batch_size, dtype)
        if case not in seen:
            seen.append(case)
            yield name, lambda case=case: train(*case)  # type: ignore[misc]
    swin = MODELS["sgmim_swin_base"]
    yield "swin_base fp16", lambda: train(swin, 128, torch.float16)
    yield "relational-visible", lambda: train(replace(swin, guidance="relational-visible"), 128, torch.bfloat16)
    yield "demo tf32", with_tf32
    for window, cosine in ((7, False), (16, True), (22, True), (30, False)):
        case = (window, cosine)
        yield f"fine-tuning{' V2' * cosine}, window {window}", lambda case=case: windows(*case)  # type: ignore[misc]
    for size in (64, 96, 128):
        yield f"guidance at 384 px, heads of {size}", lambda size=size: guidance(size)  # type: ignore[misc]
    for side in (384, 768):
        yield f"maps of {side} px", lambda side=side: standardize(side)  # type: ignore[misc]
    for dtype in (torch.bfloat16, torch.float32):
        yield f"rows and cells, {dtype}", lambda dtype=dtype: rows_and_cells(dtype)  # type: ignore[misc]


def train(config: ModelConfig, batch: int, dtype: torch.dtype) -> None:
    """A training step, then the encoder alone as in use after training."""
    with torch.device("meta"):
        task = PretrainTask(config, "triton").to(dtype)
        cells = config.grid[0] * config.grid[1]
        masked = masked_cell_count(cells, 0.6)
        inputs = {
            "image": torch.empty(batch, 3, *config.hw),
            "structure": torch.empty(batch, config.structure_channels, *config.hw),
            "mask": torch.empty(batch, *config.grid, dtype=torch.bool),
            "masked": torch.empty(batch, masked, dtype=torch.int32),
            "visible": torch.empty(batch, cells - masked, dtype=torch.int32),
        }
    task(inputs).loss.backward()
    with torch.no_grad():
        task.model.encode(inputs["image"])


def with_tf32() -> None:
    """The demo where the user lets float32 products be rounded to TF32."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        config = RECIPES["demo"]()
        train(config.model, config.train.batch_size, torch.float32)
    finally:
        torch.set_float32_matmul_precision(usual)


def windows(window: int, cosine: bool) -> None:
    """Attention of a fine-tuned Swin's second stage, shifted, with parameters in float32 as under autocast."""
    table = meta((2 * window - 1) ** 2, 8, dtype=torch.float32)
    scale = meta(8, dtype=torch.float32) if cosine else None
    qkv = meta(4, 2 * window, 3 * window, 3, 8, 32)
    differentiate(ops.window_attention(qkv, table, window, window // 2, scale, backend="triton"))


def guidance(size: int) -> None:
    """86 of 144 cells masked."""
    q, k, v = meta(32, 58, 8, size), meta(32, 86, 8, size), meta(32, 86, 8, size)
    differentiate(ops.guidance_attention(q, k, v, meta(8, size), meta(8, size), 58, backend="triton"))


def standardize(side: int) -> None:
    ops.standardize_structure(torch.empty(16, 1, side, side, device="meta"), backend="triton")


def rows_and_cells(dtype: torch.dtype) -> None:
    """Operations that a recipe's model reaches in one form only, or not at all."""
    index = torch.empty(128, 14, dtype=torch.int32, device="meta")
    differentiate(ops.gather_rows(meta(128, 36, 1024, dtype=dtype), index, backend="triton"))
    values, fill = meta(128, 14, 1024, dtype=dtype), meta(1024, dtype=torch.float32)
    differentiate(ops.scatter_rows(values, index, fill, 36, backend="triton"))
    ops.gather_cells(torch.empty(128, 3, 192, 192, dtype=dtype, device="meta"), index, backend="triton")


def differentiate(out: Tensor) -> None:
    """By a gradient that is laid out as a layer behind would write it."""
    out.backward(torch.empty_like(out))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


# -- compiled instead of launched


@dataclass
class Launch:
    """One kernel as specialised for its arguments."""

    function: JITFunction
    grid: tuple[int, ...]
    case: str
    kernel: Any = None
    error: str = ""
    code: MachineCode | None = None

    @property
    def name(self) -> str:
        return name_of(self.function)

    def choices(self) -> str:
        """Its constants, those written in capitals."""
        names = self.function.arg_names
        found = {names[path[0]]: value for path, value in self.kernel.src.constants.items() if len(path) == 1}
        return " ".join(f"{name}={value}" for name, value in found.items() if name.isupper())

    def types(self) -> str:
        """Element types of its pointers, each once."""
        types = [str(word) for word in self.kernel.src.signature.values() if str(word).startswith("*")]
        return " ".join(dict.fromkeys(word.lstrip("*") for word in types))


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class RunLaunchers(TorchDispatchMode):
    """For meta tensors, too, custom operators run their launchers instead of their fakes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sgmim_fast":
            func = OPDEFS[func._schema.name]._init_fn
        return func(*args, **(kwargs or {}))


def compile_launches(capability: int) -> list[Launch]:
    """Run all cases; compile what they would launch, each specialisation once."""
    triton.runtime.driver.set_active(Driver(capability))
    found: dict[Any, Launch] = {}
    run = JITFunction.run
    case = ""

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launch = Launch(self, tuple(grid), case)
        try:
            launch.kernel = run(self, *args, grid=grid, warmup=True, **options)  # Triton keeps one a specialisation
        except Exception as error:
            launch.error = in_short(error)
        found.setdefault(launch.error or id(launch.kernel), launch)
        return launch.kernel

    JITFunction.run = compile_only
    try:
        for case, function in cases():
            started, before = time.perf_counter(), len(found)
            with RunLaunchers():
                function()
            print(f"{case}: {len(found) - before} kernels, {time.perf_counter() - started:.1f} s", flush=True)
    finally:
        JITFunction.run = run
    return list(found.values())


def name_of(function: JITFunction) -> str:
    """Module and name within ``kernels``."""
    return f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"


def in_short(error: BaseException) -> str:
    """One line for a compiler's error: what it says last, without the marks under its source lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    cause = f" ({in_short(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {lines[-1] if lines else '?'}{cause}"


# -- judged


def objections(launch: Launch, capability: int) -> list[str]:
    """What is wrong with a kernel that was compiled."""
    if launch.kernel is None or launch.code is None:
        return [f"does not compile: {launch.error}"]
    found, code, shared = [], launch.code, launch.kernel.metadata.shared
    if launch.grid[0] > MOST_PROGRAMS or math.prod(launch.grid[1:]) != 1:
        found.append(f"its grid {launch.grid} is not 1-D or too large")
    if shared > SHARED_BYTES[capability]:
        found.append(f"it needs {shared} bytes of shared memory; there are {SHARED_BYTES[capability]}")
    if code.local_bytes > SPILLED_BYTES or (code.spills and not SPILLED_BYTES):
        found.append(f"it spills: {code.spills} accesses to {code.local_bytes} bytes of local memory")
    if {*code.dots} & {"f16", "bf16"} and not code.matrix:
        found.append("it multiplies 16-bit matrices without matrix instructions")
    if launch.name not in NARROW and max(code.loads(), default=0) < 128:
        found.append(f"no load is 16 bytes wide (loads by bits: {code.loads()})")
    return found


def forgotten(launched: Iterable[JITFunction]) -> list[str]:
    """Kernels and helpers of ``kernels/`` that no case reaches, and exceptions for kernels that are not there."""
    modules = [import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)]
    everything = {
        function
        for module in modules
        for function in vars(module).values()
        if isinstance(function, JITFunction) and function.fn.__module__ == module.__name__
    }
    reached: set[JITFunction] = set()
    pending = list(launched)
    while pending:
        if (function := pending.pop()) not in reached:
            reached.add(function)
            pending += called(function)
    missed = sorted(name_of(function) for function in everything - reached)
    stale = sorted(NARROW.keys() - {name_of(function) for function in everything})
    return [f"{name} is launched by no case; add one to cases()" for name in missed] + [
        f"{name} is in NARROW, but there is no such kernel" for name in stale
    ]


def called(function: JITFunction) -> list[JITFunction]:
    """Kernels and helpers that a kernel names."""
    names = {node.id for node in ast.walk(ast.parse(function.src)) if isinstance(node, ast.Name)}
    values = (function.fn.__globals__.get(name) for name in names)
    return [value for value in values if isinstance(value, JITFunction)]


# -- told


def table(launches: Iterable[Launch]) -> str:
    head = "kernel", "choices", "types", "registers", "warps", "shared", "spills", "matrix", "loads", "stores", "case"
    rows: list[tuple[str, ...]] = [head]
    for launch in launches:
        if (code := launch.code) is None:
            rows.append((launch.name, "does not compile", *[""] * 8, launch.case))
            continue
        rows.append((
            launch.name, launch.choices(), launch.types(), str(code.registers),
            str(launch.kernel.metadata.num_warps), str(launch.kernel.metadata.shared), str(code.spills),
            counts(code.matrix), counts(code.loads()), counts(code.stores()), launch.case,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def counts(found: dict[Any, int]) -> str:
    return " ".join(f"{name}:{number}" for name, number in found.items()) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=list(SHARED_BYTES), required=True)
    capability = parser.parse_args().capability
    if triton.knobs.runtime.interpret:
        sys.exit("error: TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
    CACHE.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(CACHE)
    launches = sorted(compile_launches(capability), key=lambda launch: launch.name)
    compiled = [launch for launch in launches if launch.kernel is not None]
    codes = read_machine_codes([launch.kernel for launch in compiled], capability)
    for launch, code in zip(compiled, codes, strict=True):
        launch.code = code
    print(table(launches))
    found = [
        f"{launch.name} ({launch.choices() if launch.kernel else launch.case}): {complaint}"
        for launch in launches
        for complaint in objections(launch, capability)
    ]
    found += forgotten(launch.function for launch in launches)
    if found or not launches:
        sys.exit("\n".join(f"error: capability {capability}: {line}" for line in found or ["nothing was launched"]))


if __name__ == "__main__":
    main()
