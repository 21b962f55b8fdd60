"""``sgmim``: the project's command line. Each command imports what it needs when it runs, so help is instant."""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sgmim_fast.commands.help_pages import HelpFormatter
from sgmim_fast.errors import UserError, one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``sgmim`` script."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with one_line_errors():
        if argv[:1] in (["pretrain"], ["finetune"]):  # their options belong to the training modules
            from sgmim_fast.commands.training import train

            raise SystemExit(train(argv[0], argv[1:]))
        parser = _parser()
        arguments, settings = parser.parse_known_args(argv)
        if "takes_settings" in arguments:
            _require_settings_last(parser, argv, settings)
            arguments.run_command(arguments, settings)
            return
        if settings:
            parser.error(f"unrecognized arguments: {' '.join(settings)}")
        arguments.run_command(arguments)


def _require_settings_last(parser: argparse.ArgumentParser, argv: Sequence[str], settings: Sequence[str]) -> None:
    """argparse knows no settings of runs, so it would take the value of an early one for RUN."""
    if not settings:
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parser.parse_known_args(argv[: argv.index(settings[0])])
    except SystemExit:
        raise UserError(
            f"{settings[0]} comes too early; settings of the run stand after RUN and all else that the command is given"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgmim",
        description="Pre-train vision backbones for dense prediction by structure-guided masked image modelling.",
        epilog="First time here? `sgmim demo` renders scenes, pre-trains on them and writes a page to look at.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        sub.set_defaults(run_command=run)
        return sub

    from sgmim_fast.commands import demonstrating, evaluating, exporting, predicting, probing, rendering

    rendering.add_options(command("synth", rendering.run, rendering.DESCRIPTION))

    maps = command("structure-maps", _structure_maps, "Make 16-bit relative depth maps with a pretrained estimator.")
    maps.add_argument("images", type=Path, metavar="IMAGES", help="folder with images/, or any folder of images")
    maps.add_argument("out", type=Path, metavar="OUT", help="folder to write: DATA/structure for DATA/images")
    maps.add_argument("--model", required=True, metavar="NAME_OR_FOLDER", help="on the Hugging Face hub, or here")
    maps.add_argument("--batch-size", type=int, default=16, help="images in a forward pass")
    maps.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA, else fp32"
    )
    maps.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU for each rank, else the CPU)")
    maps.add_argument(
        "--direction", choices=("nearer", "farther"), help="what larger means (default: the model's word)"
    )
    maps.add_argument("--workers", type=int, default=8, help="threads that decode, resize and write")
    maps.add_argument("--overwrite", action="store_true", help="make all maps anew")

    verify = command("verify", _verify, "Decode every pair once; list the good ones, put the bad ones into quarantine.")
    verify.add_argument("data", type=Path, metavar="DATA", help="folder or list file of pairs")
    verify.add_argument("--images-only", action="store_true", help="look at no maps (for --model.guidance none)")
    verify.add_argument("--channels", type=int, default=1, help="channels of the maps")
    verify.add_argument(
        "--loader", choices=("auto", "torch", "dali"), default="auto", help="whose decoder; auto: dali if installed"
    )
    verify.add_argument("--workers", type=int, help="processes (default: one a core)")
    verify.add_argument("--min-side", type=int, default=32, help="pixels that each side of an image must have")
    verify.add_argument("--keep-duplicates", action="store_true", help="keep images with the same bytes as another")

    shard = command(
        "shard", _shard, "Pack a data set into a few large tar files, which load faster than many small ones."
    )
    shard.add_argument("source", type=Path, metavar="DIR", help="folder, list of pairs, or shards to be packed anew")
    shard.add_argument("out", type=Path, metavar="OUT", help="folder to write; the same command again completes it")
    size = shard.add_mutually_exclusive_group()
    size.add_argument("--shard-size", type=int, default=256, help="about how many megabytes a shard has")
    size.add_argument("--pairs-per-shard", type=int, help="so many pairs instead")
    shard.add_argument("--no-shuffle", action="store_true", help="keep the order of the names; else it is random")
    shard.add_argument("--seed", type=int, default=0, help="another seed, another order")
    shard.add_argument("--short-side", type=int, help="make pairs smaller until their short side has so many pixels")
    shard.add_argument(
        "--jpeg-quality", type=int, help="re-encode all images as JPEG (4:2:0) of this quality, 1 to 100"
    )
    shard.add_argument(
        "--maps",
        choices=("keep", "png", "npy", "none"),
        default="keep",
        help="re-encode the maps, no value changed: png is small, npy decodes fastest; none leaves them out",
    )
    shard.add_argument("--structure-channels", type=int, default=1, help="of the maps, where they are re-encoded")
    shard.add_argument("--skip-bad", action="store_true", help="leave bad pairs out; OUT/skipped.jsonl names them")
    shard.add_argument("--workers", type=int, help="processes (default: one a core)")

    command("pretrain", lambda _: None, "Pre-train on pairs of images and structure maps (--help for its options).")

    command(
        "finetune",
        lambda _: None,
        "Fine-tune a backbone: sgmim finetune depth|segmentation (each with --help for its options).",
    )

    evaluating.add_options(command("evaluate", evaluating.run, evaluating.DESCRIPTION))
    predicting.add_options(command("predict", predicting.run, predicting.DESCRIPTION))
    probing.add_options(command("probe", probing.run, probing.DESCRIPTION))

    report = command("report", _report, "Write one self-contained HTML page about a run.")
    report.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    report.add_argument("--output", type=Path, help="file to write (default: RUN/report.html)")
    report.add_argument("--samples", type=int, default=6, help="pairs in the gallery")
    report.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="folder of another run with the same images and masks, to show beside RUN: losses, pictures, and figures "
        "of frozen features, where `sgmim probe` has written them to probe.json in both",
    )

    exporting.add_options(command("export", exporting.run, exporting.DESCRIPTION))

    doctor = command("doctor", _doctor, "Say what this machine has, which choices run on it, and why others do not.")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    plan = command("plan", _plan, "Calculate a run on many GPUs from one measured: time, memory, data, hours, cost.")
    from sgmim_fast.planning.options import add_options

    add_options(plan)

    demonstrating.add_options(command("demo", demonstrating.run, demonstrating.DESCRIPTION))
    return parser


def _structure_maps(arguments: argparse.Namespace) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sgmim_fast.data.estimation.launched_ranks import joined_ranks, launched_rank
    from sgmim_fast.data.estimation.structure_maps import make_structure_maps

    rank, world_size, device = launched_rank(arguments.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with joined_ranks(world_size) as add_up:
        with Progress(*columns, disable=rank > 0) as progress:
            task = progress.add_task("maps" if world_size == 1 else f"maps of rank 0 of {world_size}", visible=False)
            summary = make_structure_maps(
                arguments.images,
                arguments.out,
                model=arguments.model,
                batch_size=arguments.batch_size,
                dtype=arguments.dtype,
                device=device,
                direction=arguments.direction,
                overwrite=arguments.overwrite,
                workers=arguments.workers,
                rank=rank,
                world_size=world_size,
                progress=lambda done, total: progress.update(task, completed=done, total=total, visible=True),
                add_up=add_up,
            )
        # Within the block: launchers end every rank as soon as one ends with a failure.
        if rank == 0 or summary.failures:
            print(summary.text(arguments.out), flush=True)
    raise SystemExit(1 if summary.failed else 0)


def _verify(arguments: argparse.Namespace) -> None:
    from rich.progress import Progress

    from sgmim_fast.data.loading import dali_installed
    from sgmim_fast.data.verification.verify import verify

    loader = arguments.loader
    if loader == "auto":
        loader = "dali" if dali_installed() else "torch"
    with Progress() as progress:
        task = progress.add_task("verifying pairs", total=None)
        summary = verify(
            arguments.data,
            structure=not arguments.images_only,
            channels=arguments.channels,
            loader=loader,
            workers=arguments.workers,
            min_side=arguments.min_side,
            keep_duplicates=arguments.keep_duplicates,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for line in summary.lines():
        print(line)
    raise SystemExit(summary.exit_code)


def _shard(arguments: argparse.Namespace) -> None:
    from rich.progress import Progress

    from sgmim_fast.data.sharding.packing import Packing
    from sgmim_fast.data.sharding.shard_pairs import SKIPPED, shard_pairs

    packing = Packing(
        shard_size=arguments.shard_size,
        pairs_per_shard=arguments.pairs_per_shard,
        shuffle=not arguments.no_shuffle,
        seed=arguments.seed,
        short_side=arguments.short_side,
        jpeg_quality=arguments.jpeg_quality,
        maps=arguments.maps,
        structure_channels=arguments.structure_channels,
    )
    with Progress() as progress:
        task = progress.add_task("packing pairs", total=None)
        pairs = shard_pairs(
            arguments.source,
            arguments.out,
            packing,
            skip_bad=arguments.skip_bad,
            workers=arguments.workers,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(f"{len(pairs)} pairs in {len(pairs.shards)} shards in {arguments.out}")
    if pairs.skipped:
        print(f"{pairs.skipped} bad pairs were left out; {arguments.out / SKIPPED} names them and says why")


def _report(arguments: argparse.Namespace) -> None:
    from sgmim_fast.report import write_report

    page = write_report(arguments.run, arguments.output, samples=arguments.samples, against=arguments.against)
    print(f"wrote {page}")


def _doctor(arguments: argparse.Namespace) -> None:
    from sgmim_fast.doctor import examine, show, to_json

    found = examine()
    if arguments.json:
        print(to_json(found))
    else:
        show(found)
    raise SystemExit(1 if found.problems else 0)


def _plan(arguments: argparse.Namespace) -> None:
    from sgmim_fast.planning.options import inputs_from
    from sgmim_fast.planning.output import show, to_json
    from sgmim_fast.planning.plan import make_plan

    plan = make_plan(inputs_from(arguments))
    if "json" in arguments:
        print(to_json(plan))
    else:
        show(plan)


if __name__ == "__main__":
    main()
