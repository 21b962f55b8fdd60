"""Does structured guidance make better features for dense tasks? The method against SimMIM and its own ablations.

    python -m benchmarks.replication --size micro --list             what is done, what is left, how long it may take
    python -m benchmarks.replication --size micro --minutes 20       go on for 20 minutes; again until nothing is left
    python -m benchmarks.replication --size micro --share 0/2        half of it, while another process does --share 1/2
    python -m benchmarks.replication --size micro --report           plots and a table of the rows there are
    python -m benchmarks.replication --size micro --figures          predictions, features and spectra of one seed

Each arm (``replicating/arms.py``) pre-trains one encoder. All arms of a seed begin with the same encoder to the bit and
see the same crops of the same scenes in the same order under the same masks, for as many steps at the same rate; no arm
is tuned. ``--rate`` and ``--length`` choose other rates and numbers of steps from grids that are the same for all. Then
each encoder is

* probed (``sgmim_fast.probing``): linear and nearest-neighbour depth and classes, beside row and column;
* fine-tuned: depth with the head "dpt", classes with UPerNet, by the package's tasks, layer decay and schedules.

Ablations are judged with the fewest labels alone, unless ``--labels`` asks for more.

The labelled scenes are drawn by the seed and nested; every number of labels gets as many steps. Scored are scenes with
textures, furniture and cameras that training never shows (``sgmim synth --split test``), and apart from them new scenes
of the kind it shows, whose figures are named "familiar ...". The arm "row-colour" is the probe of row, column and mean
colour; its rows hold the constant and the truth on the grid, too.

Rows go to ``benchmarks/results/replication.jsonl``, one a piece (arm, seed, stage, labels), and ``python -m
benchmarks.report`` renders them. A piece that has a row with the fingerprint of its settings is not done again.
Weights, scenes and figures of single test images are in ``--work``.
On CPUs figures are the same again to the last digit on the same kind of machine; on GPUs they are not promised to be.

Sizes (``replicating/sizes.py``):

* ``micro``: Swin of four stages, 96 pixels, two CPU cores, one thread a process: run two, ``--share 0/2`` and ``1/2``.
  What it took is in the rows, and what came of it in ``docs/claim.md``.
* ``small``: Swin of four stages, 128 pixels, one GPU, bf16; in slices, say ``--minutes 8``. It has not been timed:
  look at ``--list`` after a few pieces, and name fewer ``--arms`` if it says too much. If the work folder is lost
  between slices, scenes and the weights that are still needed are made again. The stage "segmentation" needs
  segmentation-models-pytorch, which may be missing where torch and timm are.
* ``smoke``: whether it works; its figures mean nothing.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.replicating.arms import ARMS, COMPARED, DEFAULT_ARMS, ROW_COLOUR, find_arm
from benchmarks.replicating.pieces import (
    STAGES,
    Piece,
    done,
    estimated_seconds,
    fingerprint,
    pieces_of,
    read_rows,
    share_of,
)
from benchmarks.replicating.running import Runner, images_file
from benchmarks.replicating.sizes import SIZES, Size, Variant
from sgmim_fast.errors import UserError, one_line_errors

RESULTS = harness.RESULTS / "replication.jsonl"
WORK = Path("runs/replication")
PAGES = WORK / "report"
SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with one_line_errors():
        run(options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="micro")
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT_ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")
    parser.add_argument("--stages", nargs="+", choices=STAGES[1:], default=list(STAGES[1:]), help="after pre-training")
    parser.add_argument(
        "--labels",
        nargs="+",
        type=int,
        metavar="N",
        help="labelled images (default: all the size has; for ablations the fewest)",
    )
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the rate of pre-training, of a fixed grid")
    parser.add_argument("--length", type=float, default=1.0, help="factor of its steps, of a fixed grid")
    parser.add_argument("--share", type=share, default=(0, 1), metavar="I/N", help="what process I (from 0) of N does")
    parser.add_argument("--minutes", type=float, help="stop after the piece in which they are over")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for scenes and weights")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSONL file to append to")
    parser.add_argument("--workers", type=int, help="processes that render (default: one a core)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say what is done and left, and do nothing")
    what.add_argument("--report", action="store_true", help="write plots and a table of the rows")
    what.add_argument("--figures", action="store_true", help="write pictures of predictions, features and spectra")
    parser.add_argument("--bootstrap", action="store_true", help="with --report: intervals over test images")
    parser.add_argument("--images", type=Path, default=PAGES, help="folder that pictures and the table go to")
    return parser.parse_args(arguments)


def share(text: str) -> tuple[int, int]:
    """``"1/2"`` as (1, 2)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 0 to N - 1, such as 0/2")
    return int(number), int(count)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask for.

    Raises:
        UserError: for an unknown arm, a rate outside the grid, or as the pieces.
    """
    size = SIZES[options.size]
    for arm in options.arms:
        find_arm(arm)
    for name, value, grid in (("rate", options.rate, size.lr_factors), ("length", options.length, size.lengths)):
        if value not in grid:
            raise UserError(f"--{name} {value:g} is not of the grid {', '.join(map(str, grid))}")
    if unknown := [count for count in options.labels or () if count not in size.labels]:
        raise UserError(
            f"--labels {unknown[0]} is not of size {size.name}, which has {', '.join(map(str, size.labels))}"
        )
    variant = Variant(options.rate, options.length)
    if any(seed < 0 for seed in options.seeds):
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))} must be 0 or more")
    arms, seeds = (list(dict.fromkeys(given)) for given in (options.arms, options.seeds))
    pieces = share_of(pieces_of(size, arms, seeds, variant), *options.share)
    pieces = [piece for piece in pieces if wanted(piece, size, options.stages, options.labels)]
    if options.list:
        list_pieces(size, pieces, options.output)
    elif options.report:
        from benchmarks.replicating.reporting import write_report

        images = partial(images_file, options.work, size) if options.bootstrap else None
        for path in write_report(read_rows(options.output), size, variant, options.images, images):
            say(str(path))
    elif options.figures:
        from benchmarks.replicating.figures import write_figures

        runner = Runner(size, options.work, options.output, options.workers, say)
        for path in write_figures(runner, arms, seeds[0], variant, options.images):
            say(str(path))
    else:
        runner = Runner(size, options.work, options.output, options.workers, say)
        left = runner.run(pieces, options.minutes)
        say(f"{left} pieces left; the same command goes on" if left else "nothing is left to do")


def wanted(piece: Piece, size: Size, stages: Sequence[str], labels: Sequence[int] | None) -> bool:
    """Whether a piece is asked for. Unless ``labels`` says more, ablations are judged with the fewest alone."""
    if piece.stage == "pretrain":
        return True
    if piece.stage not in stages:
        return False
    if labels is not None:
        return piece.labels in labels
    return piece.arm in (*COMPARED, ROW_COLOUR) or piece.labels == size.labels[0]


def list_pieces(size: Size, pieces: Sequence[Piece], output: Path) -> None:
    """Say what has a row, and what has none."""
    rows = read_rows(output)
    known = done(rows)
    seconds, unknown, left = 0.0, 0, 0
    for piece in pieces:
        row = known.get(fingerprint(size, piece))
        if row is not None:
            say(f"done   {piece.name}: {row['cost']['seconds']:.1f} s")
            continue
        guess = estimated_seconds(piece, rows, size)
        left += 1
        seconds, unknown = seconds + (guess or 0), unknown + (guess is None)
        say(f"left   {piece.name}: {'nothing like it has been done yet' if guess is None else f'about {guess:.1f} s'}")
    more = f", and {unknown} nobody knows of" if unknown else ""
    say(f"{len(pieces) - left} done, {left} left: about {seconds / 60:.1f} minutes{more}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
