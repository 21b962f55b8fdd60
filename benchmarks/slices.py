"""What ``make gpu-check`` does, in slices of under nine minutes, the most valuable first; all of it in 25 minutes."""

from dataclasses import dataclass

from benchmarks import bars
from benchmarks.peers import ATTENTIONS

RESULT_FILES = (
    *("kernels", "train_step", "tests", "products", "optimizers", "largest_batch", "pipeline", "parity"),
    "gpu_check",
)
CHEAP = ("--implementations", "triton", "plain", "sdpa", "xformers", "dense", "copy")
BF16 = ("--precision", "bf16", "--batch", "128")
SMALL = ("--override", "image_size=64", "embed_dim=8", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)", "window_size=4")
SIZES = ("--precision", "bf16", "--batch", "32", "256", "512")
MODEL_ARMS = ("reference", "triton", "reference+compile", "triton+compile")
PEER_MODEL = "simmim_swin_base"
"""timm's encoders have no guidance, so they are held against the model without it."""
EAGER_ARMS = ("--backends", "reference", "triton")
ON_CPU = ("--device", "cpu")
BOTH = ("torch+float8", "--precision", "bf16")  # after "torch"
FLOAT8_PARITY = ("--backends", "triton", "triton+float8")
FLOAT8_ARMS = ("triton+compile+float8", "triton+compile+float8_rowwise")
COMPILED_ARMS = ("reference", "triton+compile", "reference+compile", "triton+graphs")
"""The yardstick, then those that decide: when time is short the last ones are missing."""
SMOKE_KERNELS = (
    "--smoke",
    "--tests",
    "0",
    "--dtypes",
    "fp32",
    "--ops",
    "gather_rows",
    "--implementations",
    "triton",
    "plain",
)


@dataclass(frozen=True)
class Step:
    """One command of a slice."""

    name: str
    module: str
    """Under ``benchmarks``."""
    file: str
    """Of ``RESULT_FILES``: where its rows go."""
    words: tuple[str, ...]
    seconds: float
    """The most that it may take, of what the slice has left; together that may be more than the slice has."""
    smoke: tuple[str, ...] = ()
    """In the place of ``words`` where it is only tried whether all of it works; none: left out then."""


@dataclass(frozen=True)
class Slice:
    """Steps that fit into one call of a few minutes."""

    name: str
    what: str
    minutes: float
    steps: tuple[Step, ...]


def kernels(name: str, seconds: float, *words: str, smoke: tuple[str, ...] = ()) -> Step:
    return Step(name, "kernels", "kernels", ("--tests", "0", *words), seconds, smoke)


def steps(name: str, seconds: float, model: str, *backends: str, smoke: tuple[str, ...] = ()) -> Step:
    words = ("--model", model, *BF16, "--backends", *backends)
    return Step(name, "train_step", "train_step", words, seconds, smoke)


def _every_slice() -> tuple[Slice, ...]:
    attention, others = ("--ops", *ATTENTIONS), ("--ops", *bars.MEMORY_BOUND)
    pieces = ("--ops", "attention_layer", "layer_norm", "residual_norm")
    compiled = ("--implementations", "compiled", "flex")
    some = ("--smoke", "--ops", "standardize_structure", "--select", "refused")
    first = Slice(
        "kernels",
        "the kernels' tests, attention forward and backward against what is demanded, the other kernels",
        6.5,
        (
            Step("tests of the kernels", "tested", "tests", ("--whole",), 170, some),
            kernels("attention", 100, *attention, *CHEAP, smoke=SMOKE_KERNELS),
            kernels("other kernels", 60, *others, *CHEAP),
            kernels("attention, compiled peers", 120, *attention, *compiled),
        ),
    )
    tiny = (*SMALL, "--batch", "2", "--steps", "1", "--no-parts", *ON_CPU, "--backends", "torch")
    second = Slice(
        "step",
        "the training step of Swin-B: plain, compiled, gathered, on kernels",
        6.5,
        (
            steps("step, eager", 100, bars.MAIN_MODEL, "reference", "torch", "triton", smoke=tiny),
            steps("step, compiled", 270, bars.MAIN_MODEL, *COMPILED_ARMS),
            steps("step, autotuned", 300, bars.MAIN_MODEL, "reference", "reference+autotune"),
        ),
    )
    images = (*SMALL, "--batch", "2", "--workers", "0", *ON_CPU, "--backends", "torch")
    few_steps = ("--steps", "3", "--last", "2", "--pairs", "6")
    scenes = ("--pairs", "512", "--turn-seconds", "2")
    peer = ("--model", PEER_MODEL, *tiny, "--backends", "torch", "timm")
    few = (*images, "--pairs", "4", "--size", "64", "--turn-seconds", "0.1", "--repetitions", "1")
    third = Slice(
        "runs",
        "parity, files to gradients, the largest batch, other batch sizes of the step, timm's encoder",
        4.5,
        (
            Step("parity", "parity", "parity", ("--seeds", "0", "1", "2"), 110, (*images, *few_steps)),
            Step("data", "pipeline", "pipeline", (*BF16, "--backends", "triton", *scenes), 80, few),
            Step("largest batch", "largest_batch", "largest_batch", ("--memory-budget", "141", "80", "24"), 120),
            steps("timm's encoder", 60, PEER_MODEL, "reference", "timm", "triton", "timm+compile", smoke=peer),
            Step("step, other batches", "train_step", "train_step", (*SIZES, *EAGER_ARMS, "--no-parts"), 70),
        ),
    )
    fourth = Slice(
        "models",
        "the training step of the other models",
        4.0,
        tuple(
            steps(f"step of {model}", 120, model, *MODEL_ARMS, smoke=("--model", model, *tiny) if number == 0 else ())
            for number, model in enumerate(bars.MODELS)
        ),
    )
    fifth = Slice(
        "float8",
        "the encoder's products in FP8: the training step of Swin-B, and what a small model learns",
        2.0,
        (
            steps("step, FP8", 90, bars.MAIN_MODEL, "triton+compile", *FLOAT8_ARMS, smoke=(*tiny, *BOTH)),
            Step("parity, FP8", "parity", "parity", FLOAT8_PARITY, 60, (*images, *BOTH, *few_steps)),
        ),
    )
    sixth = Slice(
        "others",
        "memory accesses, other shapes, batch sizes and peers of the kernels, matrix products, optimizers",
        1.4,
        (
            Step("memory accesses", "memcheck", "gpu_check", (), 45),
            Step("matrix products", "products", "products", (), 30, ("--smoke",)),
            Step("optimizers", "optimizers", "optimizers", (), 40),
            kernels("attention layers and norms", 60, *pieces),
            kernels("attention at other batch sizes", 300, *attention, *CHEAP, "--batches", "1", "8", "32", "256"),
            kernels("other kernels, compiled", 300, *others, *compiled),
            kernels("attention, autotuned", 300, *attention, "--implementations", "max-autotune"),
        ),
    )
    return first, second, third, fourth, fifth, sixth


SLICES = _every_slice()
