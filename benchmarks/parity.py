"""Short trainings that should come to the same: the plain path and a fast one on the same data from the same weights.

    python -m benchmarks.parity                                   1,000 steps; on a GPU of backend triton in bf16
    python -m benchmarks.parity --backends triton triton+compile --precision fp32
    python -m benchmarks.parity --steps 200 --override image_size=64 --seeds 0 1 2 3
    python -m benchmarks.parity --backends triton triton+float8 --precision bf16

A small model (that of the recipe ``demo``) learns from rendered scenes, or from --data. All arms get the same batches
of the first seed, step by step, and begin with the same weights; ``reference`` runs once more with each other seed,
which draws other weights, another order, other crops and masks. Rounding makes the curves of two implementations part
in the end; they may not end further apart than the curves of two seeds do, by the mean loss of the last steps. How far
rounding alone takes a training is told by ``reference`` on the first seed's batches from weights of which about half
are moved to the next float32 number (--nudged).

One row of ``benchmarks/results/parity.jsonl`` is one comparison ("benchmark": "parity"):

    model, override, backends, batch, precision, device, peak_rate, seeds, data, pairs
    steps, planned_steps   done, and those that the learning rate was planned for
    points               steps behind which there is a point of the curves
    curves               [{"arm", "seed", "nudged", "loss", "image_loss", "structure_loss"}, ...]: means since the
                         point before
    last, final          how many steps, and the mean losses of each curve over them, in the order of the curves
    spread               of each loss: between the two seeds of reference that lie furthest apart, in ``final``
    rounding             of each loss: between reference and the nudged one that lies furthest from it; null without one
    differences          {arm: {loss: between the arm and reference, in ``final``}}
    first_deviation, largest_deviation     {arm: of a step's loss from reference's, relative: first step, worst step}
    within_spread        {arm: whether its difference of the whole loss is no larger than the spread}

Arms that cannot run here are left out and leave "benchmark": "parity_skipped" with the first two lines and ``reasons``.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.deadline import Deadline
from benchmarks.pipeline_turns import Step
from benchmarks.step_arms import PEER, PRECISIONS, Variant, config_of
from sgmim_fast.config import DataConfig, ModelConfig, OptimizerConfig, PretrainConfig, ScheduleConfig, TrainConfig
from sgmim_fast.data.batches import Loader
from sgmim_fast.data.loading import build_loader
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.scenes.synthetic import render_dataset
from sgmim_fast.data.sources import open_pairs
from sgmim_fast.errors import EXIT_PREEMPTED, UserError, one_line_errors
from sgmim_fast.recipes import MODELS, RECIPES
from sgmim_fast.train.optim import learning_rate

RESULTS = harness.RESULTS / "parity.jsonl"
PLAIN = "reference"
LOSSES = ("loss", "image_loss", "structure_loss")
POINTS = 100  # of a curve
SIGNS = 10  # of life, while it trains
WARM_UP = 0.05  # of the steps
DIGITS = 6
Row = dict[str, Any]


def main() -> None:
    options = arguments().parse_args()
    with one_line_errors():
        raise SystemExit(compare(options))


def arguments() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=["demo", *MODELS], metavar="NAME", help="(default: demo)")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of ModelConfig")
    default = ["triton" if on_gpu else "torch"]
    parser.add_argument(
        "--backends",
        nargs="+",
        default=default,
        metavar="BACKEND[+WORD...]",
        help=f"arms to hold against {PLAIN} (default: {default[0]})",
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--last", type=int, default=50, help="steps whose mean loss is compared (default: 50)")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step (default: 16)")
    parser.add_argument("--rate", type=float, default=0.016, help="peak learning rate for 512 pairs (default: 0.016)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="two or more (default: 0 1)")
    parser.add_argument("--nudged", type=int, default=1, metavar="RUNS", help="from nudged weights (default: 1)")
    precision = "bf16" if on_gpu else "fp32"
    parser.add_argument("--precision", choices=PRECISIONS[:2], default=precision, help=f"(default: {precision})")
    parser.add_argument("--data", type=Path, metavar="SET", help="folder, list or shards; default: scenes")
    parser.add_argument("--pairs", type=int, default=512, help="scenes to render (default: 512)")
    workers = min(4, len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=workers, help="of each loader; 0 loads in this process")
    parser.add_argument("--seconds", type=float, help="for everything; the trainings end at the step they have come to")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    return parser


def compare(options: argparse.Namespace) -> int:
    """Train all arms side by side, write a row and print a line for each.

    Returns:
        1 if one without FP8 ends beyond the spread; else 75 if the time did not suffice for all steps.
    """
    check(options)
    deadline = Deadline(options.seconds)
    device = torch.device(options.device)
    rows = harness.Rows(options.output, device)
    model = config_of(RECIPES["demo"]().model if options.model == "demo" else MODELS[options.model], options)
    options.backends = able(options, device, rows)
    if not options.backends:
        return 0
    with data_set(options, model) as path:
        pairs = open_pairs(path, structure=model.guidance != "none")
        histories, steps = train(options, model, path, pairs, device, deadline)
    row = head_of(options, len(pairs)) | judged(histories, steps, options)
    rows.append(row)
    for arm, within in row["within_spread"].items():
        rounding = "" if row["rounding"] is None else f"its own rounding {row['rounding']['loss']:.2e}, "
        print(
            f"{row['model']} {row['precision']}, {row['steps']} steps: {arm} ends "
            f"{row['differences'][arm]['loss']:.2e} from {PLAIN}, {rounding}"
            f"seeds {row['spread']['loss']:.2e} from each "
            f"other: {'within' if within else 'BEYOND'} the spread; a step's loss off by "
            f"{row['largest_deviation'][arm]:.1e} at most"
        )
    if not all(ok for arm, ok in row["within_spread"].items() if Variant.parse(arm).float8 == "off"):
        return 1
    return 0 if steps == options.steps else EXIT_PREEMPTED


def check(options: argparse.Namespace) -> None:
    if options.nudged < 0:
        raise UserError(f"--nudged {options.nudged} must be 0 or more")
    for name in ("steps", "last", "batch", "pairs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be 1 or more")
    if options.last > options.steps:
        raise UserError(f"--last {options.last} is more than --steps {options.steps}; lower it")
    if len(set(options.seeds)) < max(2, len(options.seeds)):
        given = " ".join(map(str, options.seeds))
        raise UserError(f"--seeds {given} must be two or more that differ: their spread is the yardstick")
    for name in options.backends:
        if Variant.parse(name).backend in (PLAIN, PEER):
            raise UserError(f"--backends {name}: arms are torch or triton, with or without +compile and others")


def able(options: argparse.Namespace, device: torch.device, rows: harness.Rows) -> list[str]:
    """The arms that can run; those that cannot are told of, in a row as well."""
    reasons = {}
    for name in options.backends:
        try:
            Variant.parse(name).check(options.precision, device)
        except UserError as refusal:
            reasons[name] = str(refusal)
            print(f"{options.model} {name}: left out: {refusal}", flush=True)
    if reasons:
        pairs = options.pairs if options.data is None else None
        rows.append(head_of(options, pairs) | {"benchmark": "parity_skipped", "reasons": reasons})
    return [name for name in options.backends if name not in reasons]


@contextmanager
def data_set(options: argparse.Namespace, model: ModelConfig) -> Iterator[Path]:
    """The user's, or scenes of the model's size in a temporary folder."""
    if options.data is not None:
        yield options.data
        return
    with tempfile.TemporaryDirectory(prefix="sgmim-parity-") as folder:
        yield render_dataset(Path(folder) / "scenes", count=options.pairs, size=max(model.hw), seed=0)


def head_of(options: argparse.Namespace, pairs: int | None) -> Row:
    return {
        "benchmark": "parity",
        "model": options.model,
        "override": options.override,
        "backends": options.backends,
        "batch": options.batch,
        "planned_steps": options.steps,
        "precision": options.precision,
        "device": options.device,
        "peak_rate": options.rate,
        "seeds": list(options.seeds),
        "data": "scenes" if options.data is None else options.data.absolute().name,
        "pairs": pairs,
    }


# -- training


class History:
    """The losses of every step of one arm, kept on its device until the end."""

    def __init__(self, arm: str, seed: int, step: Step, steps: int) -> None:
        self.arm, self.seed, self.step, self.nudged = arm, seed, step, False
        self.losses = torch.full((steps, len(LOSSES)), torch.nan, dtype=torch.float64, device=step.device)

    def take(self, number: int, batch: dict[str, torch.Tensor], rate: float) -> None:
        self.step.rate = rate
        out = self.step(batch)
        for place, loss in enumerate(out):
            if loss is not None:
                self.losses[number, place] = loss


def train(
    options: argparse.Namespace, model: ModelConfig, path: Path, pairs: Pairs, device: torch.device, deadline: Deadline
) -> tuple[list[History], int]:
    """Histories of reference, other arms, reference nudged and with other seeds; and how many steps they have."""
    first, *more = options.seeds
    done = 0

    def history(name: str, seed: int) -> History:
        step = Step(model, Variant.parse(name), options.precision, "adamw", device, seed)
        return History(name, seed, step, options.steps)

    same = [history(name, first) for name in (PLAIN, *options.backends)]
    for number in range(options.nudged):
        same.append(history(PLAIN, first))
        same[-1].nudged = True
        nudge(same[-1].step, number)
    turns = [same, *([history(PLAIN, seed)] for seed in more)]
    optimizer = OptimizerConfig(lr=options.rate)
    schedule = ScheduleConfig(epochs=1, warmup_epochs=WARM_UP, warmup_lr=0.0, min_lr=options.rate / 100)
    with ExitStack() as stack:
        loaders = [stack.enter_context(loader(options, model, path, pairs, device, seed)) for seed in options.seeds]
        while done < options.steps and (done < max(options.last, every(options)) or deadline.left() > 0):
            rate = learning_rate(done, options.steps, options.batch, optimizer, schedule)
            for batches, arms in zip(loaders, turns, strict=True):
                batch = {name: value.to(device) for name, value in next(batches).items()}
                for arm in arms:
                    arm.take(done, batch, rate)
            done += 1
            if done % max(1, options.steps // SIGNS) == 0:
                print(f"{done} of {options.steps} steps", flush=True)
    return [arm for arms in turns for arm in arms], done


def nudge(step: Step, number: int) -> None:
    """Move about half of the weights, and of those in float32 that bf16 ones are rounded from, up by a last bit."""
    rng = torch.Generator().manual_seed(number)
    update = step.update
    with torch.no_grad():
        for weight in (*update.masters, *(weight for weight in update.weights if weight.dtype == torch.float32)):
            moved = torch.rand(weight.shape, generator=rng).to(weight.device) < 0.5
            weight.copy_(torch.where(moved, torch.nextafter(weight, weight.new_tensor(math.inf)), weight))


def loader(
    options: argparse.Namespace, model: ModelConfig, path: Path, pairs: Pairs, device: torch.device, seed: int
) -> Loader:
    config = PretrainConfig(
        model=model,
        data=DataConfig(path=str(path), workers=options.workers, loader="torch"),
        train=TrainConfig(batch_size=options.batch, seed=seed),
    )
    return build_loader(pairs, config, rank=0, world_size=1, device=device)


# -- what the curves say


def judged(histories: list[History], steps: int, options: argparse.Namespace) -> Row:
    """Curves in short, and how far they end apart; the first is the yardstick, the last are its other seeds."""
    losses = [history.losses[:steps].cpu() for history in histories]
    width = every(options)
    points = list(range(width, steps + 1, width))
    kept = [place for place in range(len(LOSSES)) if not all(x[:, place].isnan().all() for x in losses)]
    curves: list[Row] = []
    final: list[dict[str, float]] = []
    for history, values in zip(histories, losses, strict=True):
        short = values[: points[-1]].unflatten(0, (len(points), width)).mean(1)
        end = values[-options.last :].mean(0)
        curve = {LOSSES[place]: [rounded(x) for x in short[:, place].tolist()] for place in kept}
        curves.append({"arm": history.arm, "seed": history.seed, "nudged": history.nudged, **curve})
        final.append({LOSSES[place]: end[place].item() for place in kept})
    plain, whole = final[0], losses[0][:, 0]
    fast = [number for number, history in enumerate(histories) if history.arm != PLAIN]
    nudged = [end for history, end in zip(histories, final, strict=True) if history.nudged]
    differences = {histories[number].arm: distances(plain, [final[number]]) for number in fast}
    spread = spread_of(curves, final)
    off = {histories[number].arm: (losses[number][:, 0] - whole).abs() / whole.abs() for number in fast}
    return {
        "steps": steps,
        "points": points,
        "curves": curves,
        "last": options.last,
        "final": final,
        "spread": spread,
        "rounding": distances(plain, nudged) if nudged else None,
        "differences": differences,
        "first_deviation": {arm: x[0].item() for arm, x in off.items()},
        "largest_deviation": {arm: x.max().item() for arm, x in off.items()},
        # A loss that is not a number is within nothing.
        "within_spread": {arm: end["loss"] <= spread["loss"] for arm, end in differences.items()},
    }


def spread_of(curves: list[Row], final: list[dict[str, float]]) -> dict[str, float]:
    """Of each loss the largest distance between two seeds of the plain path."""
    seeds = [
        end
        for curve, end in zip(curves, final, strict=True)
        if curve["arm"] == PLAIN and not curve.get("nudged", False)
    ]
    return {name: max(end[name] for end in seeds) - min(end[name] for end in seeds) for name in seeds[0]}


def distances(plain: dict[str, float], others: list[dict[str, float]]) -> dict[str, float]:
    """Of each loss the largest distance from the plain path's."""
    return {name: max(abs(end[name] - value) for end in others) for name, value in plain.items()}


def every(options: argparse.Namespace) -> int:
    """Steps between two points of a curve."""
    return max(1, options.steps // POINTS)


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    main()
