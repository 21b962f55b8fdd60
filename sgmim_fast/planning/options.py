"""The options of ``sgmim plan``."""

import argparse
from typing import TYPE_CHECKING

from sgmim_fast.errors import UserError
from sgmim_fast.planning.assumed import ASSUMED

if TYPE_CHECKING:
    from sgmim_fast.planning.inputs import Inputs
    from sgmim_fast.planning.measured import Measured

DESCRIPTION = (
    "Calculate what a run on 1 to 1,024 GPUs would take: step time, memory, data, checkpoints, hours, cost. Start from "
    "one measured GPU, name your links and your storage, and see which of computation, network, loader and checkpoints "
    "holds the run up. Nothing is run. Formulas and how far they can be trusted: docs/scaling.md."
)
EPILOG = (
    "examples: sgmim plan --row benchmarks/results/train_step.jsonl:2 --gpus 8 64 --inter-node 3200;  "
    "sgmim plan --images-per-second 1500 --batch 128 --model sgmim_swin_base --stages 1 --price 3"
)
_HELP = {
    "intra_node": "GB/s that a GPU sends to another of its node: NVLink or PCIe, one direction (busbw of nccl-tests)",
    "inter_node": "Gbit/s that a node sends to others, all its ports together",
    "intra_latency": "microseconds a hop within a node",
    "inter_latency": "microseconds a hop between nodes",
    "gpus_per_node": "GPUs of a node",
    "memory_bandwidth": "GB/s of a GPU's memory, for the optimizer; a row of a GPU brings its own",
    "overlap": "share of what can be communicated beside the backward pass that takes no time of its own: 0 without "
    "train.overlap_comm; of B buckets all but one can",
    "bucket_size": "gradient elements a collective (train.bucket_size)",
    "accumulation": "micro-steps an optimizer step (train.accumulation_steps)",
    "images": "pairs of the data set",
    "epochs": "length of the run (schedule.epochs)",
    "pair_bytes": "bytes of an image and its map on disk",
    "checkpoint_write": "GB/s that the storage takes from all ranks together, checksums included",
    "checkpoint_every": "optimizer steps between checkpoints (train.checkpoint_every)",
    "host_copy": "GB/s from a GPU to the host's memory, where --async-checkpoint copies to",
}
_WHOLE = ("gpus_per_node", "bucket_size", "accumulation", "images", "epochs", "checkpoint_every")
_RATE = "--images-per-second"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, grouped as a reader asks; what is not given stays out of the namespace."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.argument_default = argparse.SUPPRESS

    def add(group: argparse._ArgumentGroup, *names: str) -> None:
        for name in names:
            part = ASSUMED[name]
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=int if name in _WHOLE else float,
                metavar="N" if name in _WHOLE else "X",
                default=argparse.SUPPRESS,
                help=f"{_HELP[name]} (assumed: {part.value:.10g}, {part.origin})".replace("%", "%%"),
            )

    def option(group: argparse._ArgumentGroup, name: str, **options: object) -> None:
        group.add_argument(name, **{"default": argparse.SUPPRESS, **options})  # type: ignore[arg-type]

    start = parser.add_argument_group("the measured GPU: a row, or a rate, a batch and a model")
    option(start, "--row", metavar="FILE[:N]", help="line N of a file that benchmarks/train_step.py has written")
    option(start, _RATE, type=float, metavar="X", help="forward and backward passes on one GPU, without the optimizer")
    option(start, "--batch", type=int, metavar="N", help="pairs a GPU and micro-step that the rate was measured with")
    option(start, "--model", metavar="NAME", help="named model, such as sgmim_swin_base")
    option(start, "--precision", choices=("fp32", "bf16"), help="of the weights (unless given, bf16)")

    asked = parser.add_argument_group("what to plan")
    option(asked, "--gpus", type=int, nargs="+", metavar="N", help="how many (unless given, 1 2 4 ... 1024)")
    option(asked, "--stages", type=int, nargs="+", metavar="N", help="of ZeRO (unless given, 0 1 2 3)")
    option(
        asked,
        "--global-batch",
        type=int,
        metavar="N",
        help="pairs an optimizer step on all GPUs together (unless given, each GPU keeps its measured batch)",
    )
    add(asked, "accumulation", "overlap", "bucket_size", "epochs")

    machine = parser.add_argument_group("the machine")
    names = ("gpus_per_node", "intra_node", "inter_node", "intra_latency", "inter_latency", "memory_bandwidth")
    add(machine, *names)
    option(machine, "--price", type=float, metavar="X", help="of a GPU for an hour, in your currency")

    data = parser.add_argument_group("data")
    add(data, "images", "pair_bytes")
    option(
        data,
        "--loader-rate",
        type=float,
        metavar="X",
        help="pairs/s that the loaders of a node deliver, as benchmarks/data_loading.py measures; else no limit",
    )
    option(data, "--storage-read", type=float, metavar="X", help="GB/s of the storage for all nodes; else no limit")

    saving = parser.add_argument_group("checkpoints")
    add(saving, "checkpoint_every", "checkpoint_write", "host_copy")
    option(saving, "--async-checkpoint", action="store_true", help="count the hours with train.async_checkpoint")

    option(parser, "--json", action="store_true", help="print inputs, assumptions and rows as JSON, in seconds, bytes")  # type: ignore[arg-type]


def inputs_from(arguments: argparse.Namespace) -> "Inputs":
    """What the options say.

    Raises:
        UserError: for what is missing, given twice or out of range; the message names the option.
    """
    # These import PyTorch, which --help does without.
    from sgmim_fast.planning.inputs import Inputs
    from sgmim_fast.planning.model_sizes import sizes_of

    given = vars(arguments)
    measured = _measured(given)
    values = {name: given[name] for name in (*ASSUMED, "global_batch", "loader_rate", "storage_read") if name in given}
    values |= {name: given[name] for name in ("async_checkpoint", "price") if name in given}
    values |= {name: tuple(sorted(set(given[name]))) for name in ("gpus", "stages") if name in given}
    told = {name for name in ASSUMED if name in given}
    if measured.memory_bandwidth is not None and "memory_bandwidth" not in given:
        values["memory_bandwidth"] = measured.memory_bandwidth / 1e9
        told.add("memory_bandwidth")
    parameters = sizes_of(measured.model, measured.overrides)
    return Inputs(measured=measured, parameters=parameters, given=frozenset(told), **values)


def _measured(given: dict[str, object]) -> "Measured":
    from sgmim_fast.planning.measured import Measured, read_row

    own = [name for name in ("images_per_second", "batch", "model", "precision") if name in given]
    if "row" in given:
        if own:
            raise UserError(f"--{own[0].replace('_', '-')} and --row say the same; leave one of them out")
        return read_row(str(given["row"]))
    missing = [f"--{name.replace('_', '-')}" for name in ("images_per_second", "batch", "model") if name not in given]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: give --row FILE[:N] of a measured GPU, or {_RATE}, --batch and --model"
        )
    return Measured(
        model=str(given["model"]),
        precision=str(given.get("precision", "bf16")),
        batch=given["batch"],  # type: ignore[arg-type]
        images_per_second=given["images_per_second"],  # type: ignore[arg-type]
        source=f"{_RATE} {given['images_per_second']:.10g} as given, which nobody here has measured",
    )
