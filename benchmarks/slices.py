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
ON_CPU = ("--device", "cpu")
FLOAT8_ARMS = ("triton+compile", "triton+compile+float8", "triton+compile+float8_rowwise")
COMPILED_ARMS = ("reference", "reference+compile", "triton+compile", "triton+graphs")
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
    """The most that it may take."""
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
        7.0,
        (
            Step("tests of the kernels", "tested", "tests", ("--whole",), 170, some),
            kernels("attention", 100, *attention, *CHEAP, smoke=SMOKE_KERNELS),
            kernels("attention, compiled peers", 90, *attention, *compiled),
            kernels("other kernels", 60, *others, *CHEAP),
        ),
    )
    tiny = (*SMALL, "--batch", "2", "--steps", "1", "--no-parts", *ON_CPU, "--backends", "torch")
    float8 = (*tiny, "torch+float8", "--precision", "bf16")
    second = Slice(
        "step",
        "the training step of Swin-B: plain, compiled, gathered, on kernels, in FP8",
        7.0,
        (
            steps("step, eager", 70, bars.MAIN_MODEL, "reference", "torch", "triton", smoke=tiny),
            steps("step, compiled", 180, bars.MAIN_MODEL, *COMPILED_ARMS),
            steps("step, FP8", 60, bars.MAIN_MODEL, *FLOAT8_ARMS, smoke=float8),
            steps("step, autotuned", 110, bars.MAIN_MODEL, "reference", "reference+autotune", "triton+compile"),
        ),
    )
    third = Slice(
        "others",
        "memory accesses, other shapes, batch sizes and peers of the kernels, matrix products, optimizers",
        4.0,
        (
            Step("memory accesses", "memcheck", "gpu_check", (), 45),
            Step("matrix products", "products", "products", (), 30, ("--smoke",)),
            kernels("attention layers and norms", 45, *pieces),
            kernels("attention at other batch sizes", 60, *attention, *CHEAP, "--batches", "1", "8", "32", "256"),
            Step("optimizers", "optimizers", "optimizers", (), 40),
            kernels("other kernels, compiled", 50, *others, *compiled),
            kernels("attention, autotuned", 60, *attention, "--implementations", "max-autotune"),
        ),
    )
    images = (*SMALL, "--batch", "2", "--workers", "0", *ON_CPU, "--backends", "torch")
    few = ("--steps", "3", "--last", "2", "--pairs", "6")
    fourth = Slice(
        "models",
        "the training step of the other models and of timm's, parity, data, the largest batch",
        7.0,
        (
            *(steps(f"step of {model}", 75, model, *COMPILED_ARMS[1:3], "triton") for model in bars.MODELS),
            Step("parity", "parity", "parity", (), 80, (*images, *few)),
            Step(
                "parity, FP8",
                "parity",
                "parity",
                ("--backends", "triton", "triton+float8"),
                60,
                (*images, "torch+float8", "--precision", "bf16", *few),
            ),
            Step("data", "pipeline", "pipeline", (*BF16, "--backends", "triton", "--pairs", "1024"), 60),
            steps("timm's encoder", 60, "simmim_swin_base", "reference", "timm", "timm+compile", "triton"),
            Step("largest batch", "largest_batch", "largest_batch", ("--memory-budget", "24", "80", "141"), 90),
        ),
    )
    return first, second, third, fourth


SLICES = _every_slice()
