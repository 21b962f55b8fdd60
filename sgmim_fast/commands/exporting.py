"""``sgmim export``: a run's newest weights for other codes, or its model as a program that needs none of this one."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgmim_fast.errors import UserError

if TYPE_CHECKING:
    from torch import nn

DESCRIPTION = "Save a run's newest weights for timm, Hugging Face and others, or its model for torch.export or ONNX."
WEIGHTS_LAYOUTS = ("sgmim", "simmim", "swin", "timm", "mim-depth")
FOLDERS = ("hf",)
PROGRAMS = {"torch-export": ".pt2", "onnx": ".onnx"}
_SIZED = ("timm", *FOLDERS, *PROGRAMS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a pre-training or fine-tuning run")
    parser.add_argument(
        "--layout",
        choices=(*WEIGHTS_LAYOUTS, *FOLDERS, *PROGRAMS),
        default="timm",
        help="safetensors by the names of another code; hf: a folder for transformers; torch-export, onnx: a program "
        "of a pre-training run's backbone, or of the whole of a fine-tuned model",
    )
    parser.add_argument("--output", type=Path, help="file or folder to write (default: in RUN, named by the layout)")
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="SIDE", help="side, or height and width; programs take no other"
    )
    parser.add_argument("--batch-size", type=int, help="the only one that a program takes (default: any)")


def run(arguments: argparse.Namespace) -> None:
    """Export and say what was written.

    Raises:
        UserError: for a run without weights, or what cannot be written in the layout.
    """
    size = _image_size(arguments.image_size)
    if arguments.batch_size is not None and arguments.layout not in PROGRAMS:
        raise UserError(f"--batch-size is for {' and '.join(PROGRAMS)}; leave it out for {arguments.layout}")
    if size is not None and _kind(arguments.layout) == "weights":
        raise UserError(f"--image-size is for {', '.join(_SIZED)}; leave it out for {arguments.layout}")
    finetuned, weights = _weights(arguments.run)
    program = arguments.layout in PROGRAMS
    model = _finetuned(weights, whole=program) if finetuned else _pretrained(weights, arguments.run, program)
    output = arguments.output or arguments.run / _default_name(arguments.layout, finetuned)
    _WRITERS[_kind(arguments.layout)](model, output, arguments, size)


def _image_size(sides: list[int] | None) -> tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) > 2 or min(sides) < 1:
        raise UserError(f"--image-size {' '.join(map(str, sides))} must be a side, or a height and a width, in pixels")
    return sides[0], sides[-1]


def _kind(layout: str) -> str:
    return "weights" if layout in WEIGHTS_LAYOUTS and layout != "timm" else layout


def _default_name(layout: str, finetuned: bool) -> str:
    if layout in PROGRAMS:
        return ("model" if finetuned else "backbone") + PROGRAMS[layout]
    return "backbone_hf" if layout in FOLDERS else f"backbone_{layout}.safetensors"


def _weights(folder: Path) -> tuple[bool, Path]:
    """Whether the run is one of fine-tuning, and the file of its newest weights."""
    from sgmim_fast.train.arguments import kind_of_run
    from sgmim_fast.train.run_folder import WEIGHTS, latest_checkpoint

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json; name the folder of a run, which pretrain or finetune wrote")
    kind = kind_of_run(folder / "config.json")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet; train it first")
    return kind != "pretrain", checkpoint / WEIGHTS


def _finetuned(weights: Path, *, whole: bool) -> "nn.Module":
    from sgmim_fast.tasks.finetuned import load_finetuned

    task, _ = load_finetuned(weights)
    return task if whole else task.backbone


def _pretrained(weights: Path, folder: Path, as_backbone: bool) -> "nn.Module":
    from sgmim_fast.backbones import create_backbone
    from sgmim_fast.models.registry import create_model
    from sgmim_fast.train.arguments import load_config
    from sgmim_fast.train.programs import PRETRAIN
    from sgmim_fast.weights import load_weights

    if as_backbone:
        return create_backbone(weights=weights)
    model = create_model(load_config(folder / "config.json", PRETRAIN).model)
    load_weights(model, weights)
    return model


def _write_weights(model: "nn.Module", output: Path, arguments: argparse.Namespace, size: Any) -> None:
    from sgmim_fast.exporting.weights import export_weights

    print(f"wrote {export_weights(model, output, arguments.layout)}")


def _write_timm(model: "nn.Module", output: Path, arguments: argparse.Namespace, size: Any) -> None:
    from sgmim_fast.exporting.weights import export_timm

    found = export_timm(model, output, size)
    print(f"wrote {found.path}; its features differ by {found.difference:.1e} at most from those of\n  {found.call}")


def _write_hf(model: "nn.Module", output: Path, arguments: argparse.Namespace, size: Any) -> None:
    from sgmim_fast.exporting.huggingface import export_huggingface

    found = export_huggingface(model, output, size)
    print(f"wrote {found.folder}; transformers' {', '.join(found.classes)} .from_pretrained(...) loads it")
    for note in found.notes:
        print(f"  note: {note}")


def _write_program(model: "nn.Module", output: Path, arguments: argparse.Namespace, size: Any) -> None:
    from sgmim_fast.exporting import programs

    if size is None:
        raise UserError(f"--image-size is needed for {arguments.layout}: a program takes images of one size")
    export = programs.export_onnx if arguments.layout == "onnx" else programs.export_program
    found = export(model, output, size, batch_size=arguments.batch_size)
    print(
        f"wrote {found.path}: image {_shape(found.input_shape)} to "
        f"{', '.join(_shape(shape) for shape in found.output_shapes)}; it differs by {found.difference:.1e} at most"
    )


def _shape(shape: tuple[int | None, ...]) -> str:
    return "x".join("B" if side is None else str(side) for side in shape)


_WRITERS: dict[str, Callable[..., None]] = {
    "weights": _write_weights,
    "timm": _write_timm,
    "hf": _write_hf,
    "torch-export": _write_program,
    "onnx": _write_program,
}
