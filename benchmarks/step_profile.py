"""Where the time of one step goes, from PyTorch's profiler.

Eager arms are told apart by modules: ranges around them name the part that each forward operation is of, and a node of
the backward pass has the part of the operation that made it (they share a sequence number). Within the encoder,
operations of LayerNorm are "norms", those of linear layers and convolutions, gradients of their biases included,
"matrix products"; what is left of the attention modules is "attention" (of timm's blocks, windows and shifts included),
what is left beside them "encoder, rest". "guidance" and "heads" hold everything of their modules, "optimizer"
everything of the update, "losses, rest" what no module does.

Compiled arms have no modules any more. Their kernels are told apart by the operation that starts them and by their
names, so products of guidance and heads are among "matrix products", and what the compiler has fused is "fused".

Seconds are the device's: of each kernel on a GPU, the mean of a few steps; on a CPU the time of each operation without
those that it calls.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.clocks import synchronize
from benchmarks.step_arms import PEER, Runner

ATTENTION, ENCODER, GUIDANCE, HEADS = "attention", "encoder, rest", "guidance", "heads"
PRODUCTS, NORMS, OPTIMIZER, REST = "matrix products", "norms", "optimizer", "losses, rest"
FUSED = "fused"
RANGE = "part of a step: "
STEPS = 3  # that are recorded on a GPU
TOP, NAME = 12, 90  # kernels that are listed, and characters of their names
NODE = "autograd::engine::evaluate_function: "
LAUNCHES = re.compile(r"(cuda|cu)Launch(Cooperative)?Kernel")
GRAPH_LAUNCH = "cudaGraphLaunch"
KINDS = (
    (NORMS, re.compile(r"layer_?norm", re.I)),
    ("batched", re.compile(r"\bbmm|baddbmm|Bmm|scaled_dot_product|_attention|flash|fmha", re.I)),
    (PRODUCTS, re.compile(r"linear|addmm|::mm\b|\bMmBack|convolution|conv2d|mkldnn", re.I)),
    ("batched", re.compile(r"matmul", re.I)),
)
"""Of an operation, by the first name from the inside out that says so."""
KERNELS = (
    (GUIDANCE, re.compile(r"guidance_attention")),
    (ATTENTION, re.compile(r"window_attention|flash|fmha|scaled_dot_product|\bbmm|softmax", re.I)),
    (PRODUCTS, re.compile(r"gemm|nvjet|xmma|cutlass|cublas|triton_tem|::(add)?mm\b|convolution", re.I)),
    (NORMS, re.compile(r"layer_?norm", re.I)),
    (REST, re.compile(r"sgmim_fast::|masked_l1")),
    (FUSED, re.compile(r"^triton_")),
)
"""Parts of a compiled program, by the operation that starts a kernel and the kernel's name."""
Row = dict[str, Any]


def profiled(runner: Runner) -> Row:
    """Fields of a row: ``parts`` and their seconds, how they are told apart, the largest kernels, launches.

    ``parts`` is None where nothing tells parts apart: in CUDA graphs, and in compiled programs of a CPU.
    """
    by_module = not runner.variant.compiled
    on_gpu = runner.device.type == "cuda"
    steps = STEPS if on_gpu else 1
    events = list(_record(runner, by_module, steps))
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not _is_range(e)]
    if on_gpu and not kernels:
        raise RuntimeError("the profiler shows no work of the GPU; the driver may keep its counters for root")
    found: Row = {"parts": None, "parts_by": "modules" if by_module else "kernels"}
    if by_module or (on_gpu and not runner.variant.graphs):
        parts = parts_of(events, on_gpu, by_module)
        if on_gpu:
            unknown = sum(map(_microseconds, kernels)) * 1e-6 - sum(parts.values())
            parts[REST] = parts.get(REST, 0.0) + max(unknown, 0.0)
        found["parts"] = {part: seconds / steps for part, seconds in parts.items()}
    if on_gpu:
        found |= {
            "device_busy_seconds": sum(map(_microseconds, kernels)) * 1e-6 / steps,
            "kernel_launches": round(sum(bool(LAUNCHES.match(event.name)) for event in events) / steps),
            "graph_launches": round(sum(event.name == GRAPH_LAUNCH for event in events) / steps),
            "top_kernels": top_kernels(kernels, steps),
        }
    return found


def _record(runner: Runner, by_module: bool, steps: int = 1) -> Iterable[Any]:
    """Events of whole steps."""
    # Its tracer tells every start and stop, and that a CPU has no GPU; what it fails at shows in what it recorded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if runner.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with ExitStack() as stack:
        if by_module:
            stack.enter_context(_named_parts(runner))
        synchronize(runner.device)
        with profile(activities=activities) as recorded:
            for _ in range(steps):
                runner.drop_gradients()
                with record_function(RANGE + REST):
                    loss = runner.forward()
                loss.backward()
                if runner.update is not None:
                    with record_function(RANGE + OPTIMIZER):
                        runner.update.step()
            synchronize(runner.device)
    return recorded.events() or ()


@contextmanager
def _named_parts(runner: Runner) -> Iterator[None]:
    """Ranges around the forward passes of the modules whose parts are told apart."""
    of_timm = runner.variant.backend == PEER
    with ExitStack() as stack:
        if of_timm:  # it runs parts of the encoder itself
            stack.enter_context(_range_around(runner.model, "_encode", RANGE + ENCODER))
        for name, module in runner.model.named_modules():
            part = part_of_module(name)
            if part is not None:
                stack.enter_context(_range_around(module, "forward", RANGE + part))
            if of_timm and hasattr(module, "_attn"):
                stack.enter_context(_range_around(module, "_attn", RANGE + ATTENTION))
        yield


def part_of_module(name: str) -> str | None:
    """The part that a module of ``SGMIM``, or of timm's in its place, begins; None for one within a part."""
    if name == "encoder":
        return ENCODER
    if name in ("depth_encoder", "fusion_blk_img"):
        return GUIDANCE
    if name in ("decoder", "img_decoder", "dep_decoder"):
        return HEADS
    return ATTENTION if re.fullmatch(r"encoder\.(.*\.)?attn", name) else None


@contextmanager
def _range_around(module: nn.Module, method: str, name: str) -> Iterator[None]:
    """For a while, let a method run within a named range."""
    inner = getattr(module, method)

    def ranged(inner: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with record_function(name):
            return inner(*inputs, **options)

    setattr(module, method, partial(ranged, inner))
    try:
        yield
    finally:
        delattr(module, method)  # of the instance: the class's own shows again


# -- what the events tell


def parts_of(events: list[Any], on_gpu: bool, by_module: bool) -> dict[str, float]:
    """Seconds of each part, the longest first."""
    makers = _makers(events)
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU or _is_range(event):
            continue
        names = list(_names(event))
        if by_module:
            part = part_of_operation(names, _place(event, makers))
            found[part] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        else:
            optimizer = RANGE + OPTIMIZER in names
            for kernel in event.kernels:
                found[OPTIMIZER if optimizer else part_of_kernel(names, kernel.name)] += kernel.duration
    longest = sorted(found.items(), key=lambda item: -item[1])
    return {part: 1e-6 * microseconds for part, microseconds in longest if microseconds > 0}


def part_of_operation(names: list[str], place: str) -> str:
    """Of an operation, by its name and its callers' from the inside out, and by the module it is of."""
    if place in (GUIDANCE, HEADS, OPTIMIZER, REST):
        return place
    kind = next((kind for name in names for kind, pattern in KINDS if pattern.search(name)), None)
    if kind == "batched":
        return ATTENTION if place == ATTENTION else PRODUCTS
    return kind or place


def part_of_kernel(names: list[str], kernel: str) -> str:
    """Of a compiled program's kernel, by the operations that start it from the inside out, and by its own name."""
    words = [*(name for name in names if "::" in name and not name.startswith(NODE)), kernel]
    return next((part for part, pattern in KERNELS for word in words if pattern.search(word)), REST)


def _names(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _makers(events: list[Any]) -> dict[int, Any]:
    """The forward operation that made each node of the backward pass, by their common number.

    Operations that make no node tell the number that the next node gets, so the last one to tell it is the maker.
    """
    found: dict[int, Any] = {}
    for event in events:
        if event.device_type != DeviceType.CPU or event.sequence_nr < 0 or _node(event) is not None:
            continue
        known = found.get(event.sequence_nr)
        if known is None or event.time_range.start >= known.time_range.start:
            found[event.sequence_nr] = event
    return found


def _node(event: Any) -> Any:
    """The event of the node of the backward pass that an event is within; None outside of it."""
    while event is not None and not event.name.startswith(NODE):
        event = event.cpu_parent
    return event


def _place(event: Any, makers: dict[int, Any]) -> str:
    """The innermost part around an event; in the backward pass, around the maker of its node."""
    node = _node(event)
    if node is not None:
        event = makers.get(node.sequence_nr)
    while event is not None:
        if event.name.startswith(RANGE):
            return str(event.name.removeprefix(RANGE))
        event = event.cpu_parent
    return REST


# -- kernels


def _microseconds(event: Any) -> float:
    return float(event.time_range.elapsed_us())


def _is_range(event: Any) -> bool:
    """A name around work, or the shadow that it casts on a GPU's timeline: no work itself."""
    return bool(event.is_user_annotation) or event.name.startswith(RANGE)


def top_kernels(kernels: list[Any], steps: int) -> list[Row]:
    """The kernels and copies that take longest in all; counts and seconds of a step."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        found[event.name].append(_microseconds(event))
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))[:TOP]
    return [
        {"name": name[:NAME], "count": round(len(times) / steps), "seconds": 1e-6 * sum(times) / steps}
        for name, times in longest
    ]
