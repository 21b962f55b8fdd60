"""What ``make gpu-check`` does, in slices of under nine minutes, the most valuable first; all of it in 25 minutes."""

from dataclasses import dataclass

from benchmarks import bars
from benchmarks.peers import ATTENTIONS

RESULT_FILES = ("kernels", "train_step", "tests", "products", "optimizers", "pipeline", "parity", "gpu_check")
CHEAP = ("--implementations", "triton", "plain", "sdpa", "xformers", "dense", "copy")
BF16 = ("--precision", "bf16", "--batch", "128")
TINY = (
    *("--override", "image_size=64", "embed_dim=8", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)", "window_size=4"),
    *("--batch", "2", "--steps", "1", "--device", "cpu"),
)
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
    stops_itself: bool = True
    """Whether it takes ``--seconds`` and begins nothing new after that."""


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
    return Step(name, "train_step", "train_step", words, seconds, smoke, stops_itself=False)


def _every_slice() -> tuple[Slice, ...]:
    attention, others = ("--ops", *ATTENTIONS), ("--ops", *bars.MEMORY_BOUND)
    pieces = ("--ops", "attention_layer", "layer_norm", "residual_norm")
    tests = Step(
        "tests of the kernels",
        "tested",
        "tests",
        ("--whole",),
        170,
        smoke=("--smoke", "--ops", "masked_l1", "--select", "refused"),
    )
    compiled = ("--implementations", "compiled", "flex")
    autotuned = ("--implementations", "max-autotune")
    return (
        Slice(
            "kernels",
            "the kernels' tests, attention forward and backward against what is demanded, the other kernels",
            7.5,
            (
                tests,
                kernels("attention", 110, *attention, *CHEAP, smoke=SMOKE_KERNELS),
                kernels("attention, compiled peers", 100, *attention, *compiled),
                kernels("other kernels", 60, *others, *CHEAP),
            ),
        ),
        Slice(
            "step",
            "the training step of Swin-B: plain, compiled, gathered, on kernels",
            6.0,
            (
                steps(
                    "step, eager",
                    70,
                    bars.MAIN_MODEL,
                    *("reference", "torch", "triton"),
                    smoke=("--backends", "reference", "torch", *TINY),
                ),
                steps("step, compiled", 200, bars.MAIN_MODEL, "reference", "reference+compile", "triton+compile"),
            ),
        ),
        Slice(
            "others",
            "memory accesses, other shapes, batch sizes and peers of the kernels, matrix products, optimizers",
            5.0,
            (
                Step("memory accesses", "memcheck", "gpu_check", (), 50, stops_itself=True),
                Step("matrix products", "products", "products", (), 20, smoke=("--smoke",), stops_itself=False),
                kernels("attention layers and norms", 50, *pieces),
                kernels("attention at other batch sizes", 60, *attention, *CHEAP, "--batches", "1", "8", "32", "256"),
                kernels("other kernels, compiled", 50, *others, *compiled),
                kernels("attention, autotuned", 60, *attention, *autotuned),
            ),
        ),
        Slice(
            "models",
            "the training step of the other models, memory, data and parity",
            6.0,
            tuple(
                steps(f"step of {model}", 110, model, "reference+compile", "triton", "triton+compile")
                for model in bars.MODELS
            ),
        ),
    )


SLICES = _every_slice()
