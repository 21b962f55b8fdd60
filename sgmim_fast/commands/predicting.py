"""``sgmim predict``: a fine-tuned model's depth or classes of one's own images, as numbers and as pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgmim_fast.commands import finetuned_runs
from sgmim_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from sgmim_fast.commands.finetuned_runs import FinetunedRun
    from sgmim_fast.data.dense.evaluation import Picture

DESCRIPTION = "Predict depth or classes of images: OUT/NAME.png to look at, OUT/NAME.npy (metres) or NAME_labels.png."
_CHANGEABLE = ("--evaluation.", "--data.resize")
_EXAMPLES = """examples:
  sgmim predict runs/depth photos --out predicted
  sgmim predict runs/depth a.jpg b.png --evaluation.no-flip       settings of the run stand last
"""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff", ".jp2")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog = _EXAMPLES
    finetuned_runs.add_options(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    """Predict and write.

    Raises:
        UserError: for a run, images or an output that do not fit.
    """
    import numpy as np
    from PIL import Image
    from rich.progress import track

    from sgmim_fast.data.dense.evaluation import read_picture

    files = list_images(arguments.images)
    opened = finetuned_runs.open_run(arguments, settings, _CHANGEABLE)
    depth = opened.job.kind == "depth"
    numbers = "{}.npy" if depth else "{}_labels.png"
    out: Path = arguments.out
    for file in files:
        for name in (numbers.format(file.stem), f"{file.stem}.png"):
            if (out / name).exists() and not arguments.overwrite:
                raise UserError(f"{out / name} exists; choose another --out, or replace it with --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    for file in track(files, description="predicting"):
        picture = read_picture(file, fit=None if depth else opened.job.config.data.resize)
        try:
            values = _predict(opened, picture)
        except UserError as error:  # of an image's size, which does not know its name
            raise UserError(f"{file}: {error}") from error
        if depth:
            np.save(out / numbers.format(file.stem), values.numpy())
        else:
            Image.fromarray(values.numpy().astype(np.uint8)).save(out / numbers.format(file.stem))
        _draw(opened, picture, values).save(out / f"{file.stem}.png")
    print(f"{len(files)} predictions in {out}")


def list_images(paths: Sequence[Path]) -> list[Path]:
    """The files that are meant: folders stand for the images in them, by name.

    Raises:
        UserError: if one is missing or no image by its suffix, a folder holds none, or two would be written as one.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: the folder holds no images ({', '.join(SUFFIXES)})")
            found += inside
        elif not path.is_file():
            raise UserError(f"{path}: the file does not exist; name an image or a folder of images")
        else:
            found.append(path)
    by_stem: dict[str, Path] = {}
    for file in found:
        if file.stem in by_stem:
            raise UserError(
                f"{by_stem[file.stem]} and {file} would both be written as {file.stem}.png; predict them apart"
            )
        by_stem[file.stem] = file
    return found


def _predict(opened: "FinetunedRun", picture: "Picture") -> "torch.Tensor":
    """(H, W) float32 metres or int64 classes, on the CPU."""
    import torch

    counts = opened.job.counts(opened.device)
    with torch.no_grad():
        found = counts.predict(opened.task, picture.image[None].to(opened.device), picture.original_size)[0].cpu()
    return found[0] if opened.job.kind == "depth" else found.argmax(0)


def _draw(opened: "FinetunedRun", picture: "Picture", values: "torch.Tensor") -> Any:
    """The image beside the prediction, with a legend below."""
    from PIL import Image

    from sgmim_fast.commands.legends import below, class_legend_strip, depth_legend_strip
    from sgmim_fast.tasks import pictures

    image = picture.pixels
    if opened.job.kind == "depth":
        limits = pictures.depth_limits(values)
        both = pictures.side_by_side(image, pictures.depth_picture(values, limits))
        return below(Image.fromarray(both), depth_legend_strip(both.shape[1], limits))
    classes = opened.job.config.segmentation.classes
    names = opened.notes.get("class_names") or [f"class {number}" for number in range(classes)]
    drawn = pictures.overlay(image, pictures.class_picture(values, classes))
    both = pictures.side_by_side(image, drawn)
    return below(Image.fromarray(both), class_legend_strip(both.shape[1], pictures.class_legend(values, names)))
