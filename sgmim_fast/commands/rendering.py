"""``sgmim synth``: procedural 3-D scenes, as many as wanted."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgmim_fast.data.scenes.splits import SceneSplit

DESCRIPTION = "Render procedural 3-D scenes: images, depth maps, class labels."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--count", type=int, default=1000, help="scenes")
    parser.add_argument("--size", type=int, default=192, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="train",
        help="test: a series of its own, with textures, furniture and cameras that train never shows",
    )


def run(arguments: argparse.Namespace) -> None:
    """Render and say so.

    Raises:
        UserError: for options that make no sense, or a folder that holds something else.
    """
    render(
        arguments.out,
        count=arguments.count,
        size=arguments.size,
        seed=arguments.seed,
        workers=arguments.workers,
        split=arguments.split,
    )


def render(
    out: Path, *, count: int, size: int, seed: int = 0, workers: int | None = None, split: "SceneSplit" = "train"
) -> None:
    """``render_dataset`` behind a bar."""
    from rich.progress import Progress

    from sgmim_fast.data.scenes.synthetic import render_dataset

    with Progress() as progress:
        task = progress.add_task("rendering scenes", total=count)
        render_dataset(
            out,
            count=count,
            size=size,
            seed=seed,
            workers=workers,
            split=split,
            progress=lambda done, _total: progress.update(task, completed=done),
        )
    print(f"{count} scenes in {out}")
