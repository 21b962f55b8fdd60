"""Files to gradients: a training step fed by a loader, against the step alone and the loader alone.

    python -m benchmarks.pipeline --precision bf16 --batch 128 --backends triton triton+compile
    python -m benchmarks.pipeline --data photos --loaders torch dali --workers 16

Without --data, scenes are rendered into a temporary folder, JPEG images and 16-bit PNG maps as ``sgmim synth`` writes
them. Every file is read once before, so that no disk is measured. The loader is DALI where it is installed and can read
the set, PyTorch's DataLoader otherwise, as in training. A step is whole: standardised maps, both passes, clipping,
AdamW, new weights.

The three take turns of about ``--turn-seconds``. Each turn of a loader is of a new one, whose first batches, as many as
it may hold ready, are not counted: what is measured is what it keeps up. Nothing loads while the step alone is timed.

Rows of ``benchmarks/results/pipeline.jsonl`` ("benchmark": "pipeline"), one for each arm and loader:

    model, override, precision, batch, device, arm, backend, attention, compiled, compile_mode, float8, optimizer
    loader, decoder, decode_on, workers, cpus, data, pairs, image_bytes, map_bytes, cache, turn_seconds, repetitions
    p20_, p50_, p80_images_per_second      files to gradients
    step_images_per_second, loader_images_per_second     medians of each alone
    share_of_step         p50_images_per_second over that of the step alone
    waiting_share         of the device's time that lies between two steps: waiting for data, and moving it there
    host_waiting_share    of the time that the host stood in the loader
    loss                  of the last step; it must be finite

An arm or loader that cannot run leaves "benchmark": "pipeline_skipped" with ``reason``.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import harness
from benchmarks.clocks import synchronize
from benchmarks.deadline import Deadline, NotReadyError
from benchmarks.loading_pairs import warm
from benchmarks.optimizers import NAMES as OPTIMIZERS
from benchmarks.pipeline_turns import LEAST, Step, drop, load, steps
from benchmarks.step_arms import PEER, PRECISIONS, Variant, config_of, release
from benchmarks.step_turns import reason_of
from sgmim_fast.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.dali_batch import IN_WORK
from sgmim_fast.data.dali_loader import FINISHED
from sgmim_fast.data.loading import build_loader, choose_loader
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.scenes.synthetic import render_dataset
from sgmim_fast.data.sources import open_pairs
from sgmim_fast.data.verification.checks import decoder_version
from sgmim_fast.errors import UserError, one_line_errors
from sgmim_fast.recipes import MODELS

RESULTS = harness.RESULTS / "pipeline.jsonl"
Row = dict[str, Any]


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        raise SystemExit(compare(options))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, metavar="SET", help="folder, list or shards; otherwise scenes are rendered"
    )
    parser.add_argument("--pairs", type=int, default=2048, help="scenes to render (default: 2048)")
    parser.add_argument("--size", type=int, default=256, help="their side in pixels (default: 256)")
    parser.add_argument("--model", default="sgmim_swin_base", choices=list(MODELS), metavar="NAME")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of ModelConfig")
    parser.add_argument("--batch", type=int, default=128, help="pairs a step (default: 128)")
    parser.add_argument("--precision", choices=PRECISIONS[:2], default="fp32", help="of weights and activations")
    parser.add_argument("--backends", nargs="+", default=["auto"], metavar="BACKEND[+WORD...]", help="arms")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--loaders", nargs="+", choices=("auto", "torch", "dali"), default=["auto"])
    parser.add_argument("--decode-on", choices=("auto", "cpu", "gpu"), default="auto", help="of DALI")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (torch) or threads (dali) of the loader (default: one a core)",
    )
    parser.add_argument("--turn-seconds", type=float, default=8.0, help="of each turn (default: 8)")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--seconds", type=float, help="for everything; arms that are not ready then are skipped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    return parser


def compare(options: argparse.Namespace) -> int:
    """A row for each arm and loader; 1 if one fails that can run."""
    for name in ("batch", "pairs", "repetitions"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be 1 or more")
    variants = [Variant.parse(name) for name in options.backends]
    if any(variant.backend == PEER for variant in variants):
        raise UserError(f"the arm {PEER!r} is of benchmarks.train_step alone; leave it out of --backends")
    device = torch.device(options.device)
    if device.type == "cuda":
        device = harness.gpu()
    rows, deadline = harness.Rows(options.output, device), Deadline(options.seconds)
    model = config_of(MODELS[options.model], options)
    failed = False
    with data_set(options) as path:
        pairs = open_pairs(path, structure=model.guidance != "none")
        sizes = warm(pairs)
        for variant in variants:
            for loader in options.loaders:
                row = head_of(options, variant, path, pairs, sizes)
                try:
                    row |= measure(options, model, variant, loader, pairs, device, deadline)
                except UserError as refusal:
                    row |= {"benchmark": "pipeline_skipped", "loader": loader, "reason": f"cannot run here: {refusal}"}
                except Exception as error:
                    row |= {"benchmark": "pipeline_skipped", "loader": loader, "reason": reason_of(error)}
                    failed |= not isinstance(error, NotReadyError)
                rows.append(row)
                print(line_of(row), flush=True)
                release(device)
    return int(failed)


@contextmanager
def data_set(options: argparse.Namespace) -> Iterator[Path]:
    """The user's, or scenes in a temporary folder."""
    if options.data is not None:
        yield options.data
        return
    if options.pairs < options.batch:
        raise UserError(f"--pairs {options.pairs} do not fill one batch of {options.batch}; raise it or lower --batch")
    with tempfile.TemporaryDirectory(prefix="sgmim-pipeline-") as folder:
        scenes = Path(folder) / "scenes"
        began = time.perf_counter()
        render_dataset(scenes, count=options.pairs, size=options.size, seed=0)
        print(f"{options.pairs} scenes of {options.size} pixels rendered in {time.perf_counter() - began:.0f} s")
        yield scenes


def head_of(options: argparse.Namespace, variant: Variant, path: Path, pairs: Pairs, sizes: tuple[float, float]) -> Row:
    name = f"scenes {options.size}x{options.size}" if options.data is None else path.absolute().name
    return {
        "benchmark": "pipeline",
        "model": options.model,
        "override": options.override,
        "precision": options.precision,
        "batch": options.batch,
        "device": options.device,
        **variant.row(),
        "optimizer": options.optimizer,
        "workers": options.workers,
        "cpus": len(os.sched_getaffinity(0)),
        "data": name,
        "pairs": len(pairs),
        "image_bytes": sizes[0],
        "map_bytes": sizes[1],
        "cache": "warm",
        "turn_seconds": options.turn_seconds,
        "repetitions": options.repetitions,
    }


# -- one arm, one loader


def measure(
    options: argparse.Namespace,
    model: ModelConfig,
    variant: Variant,
    loader: str,
    pairs: Pairs,
    device: torch.device,
    deadline: Deadline,
) -> Row:
    config = PretrainConfig(
        model=model,
        data=DataConfig(workers=options.workers, loader=loader, decode_on=options.decode_on),  # type: ignore[arg-type]
        train=TrainConfig(batch_size=options.batch),
    )
    chosen = choose_loader(pairs, config)[0]
    decoder = decoder_version(chosen)  # before anything is made: it says what is wrong with DALI

    def new_loader() -> Loader:
        return build_loader(pairs, config, rank=0, world_size=1, device=device)

    with deadline.limit(reserve=turns_seconds(options)):
        step = Step(model, variant, options.precision, options.optimizer, device)
        with new_loader() as batches:
            resident = {name: value.clone() for name, value in step.moved(next(batches)).items()}
        for _ in range(LEAST):
            step(resident)
        synchronize(device)
    alone, loading, fed = [], [], []
    ready = max(2 * options.workers, IN_WORK + FINISHED + 1)
    for _ in range(options.repetitions):
        alone.append(steps(step, lambda: resident, options.turn_seconds)[0])
        with new_loader() as batches:
            drop(batches, ready)
            loading.append(load(batches, step, options.turn_seconds))
        with new_loader() as batches:
            drop(batches, ready)
            turn, loss = steps(step, batches.__next__, options.turn_seconds)
            fed.append(turn)
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the last loss is {loss.item()}")
    p20, p50, p80 = harness.percentiles([turn.images_per_second for turn in fed])
    step_rate = median(turn.images_per_second for turn in alone)
    return {
        "loader": chosen,
        "decoder": decoder,
        "decode_on": options.decode_on,
        "p20_images_per_second": p20,
        "p50_images_per_second": p50,
        "p80_images_per_second": p80,
        "step_images_per_second": step_rate,
        "loader_images_per_second": median(loading),
        "share_of_step": p50 / step_rate,
        "waiting_share": median(turn.waiting_share for turn in fed),
        "host_waiting_share": median(turn.host_waiting_share for turn in fed),
        "loss": loss.item(),
    }


def turns_seconds(options: argparse.Namespace) -> float:
    """Of one arm and loader: the step alone, the loader alone, and both."""
    return float(3 * options.repetitions * options.turn_seconds)


def line_of(row: Row) -> str:
    label = f"{row['model']} {row['precision']} {row['arm']}, batch {row['batch']}, {row['loader']}"
    if "reason" in row:
        return f"{label}: none: {row['reason']}"
    return (
        f"{label}: {row['p50_images_per_second']:.1f} images/s, step alone {row['step_images_per_second']:.1f} "
        f"(x{row['share_of_step']:.2f}), loader alone {row['loader_images_per_second']:.1f}; the device waits "
        f"{row['waiting_share']:.0%} of the time, the host {row['host_waiting_share']:.0%}"
    )


if __name__ == "__main__":
    main()
