"""A model as one file that runs without this package: a program of ``torch.export``, or ONNX.

Height and width are fixed; the batch may be any. What is written has been run from its file and compared.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast.errors import UserError, first_line
from sgmim_fast.exporting.source import (
    TOLERANCE,
    beside,
    check_path,
    check_same,
    example,
    needed,
    plain_copy,
    sides_of,
)
from sgmim_fast.models.sgmim import SGMIM

_LARGEST_ONNX = 1_900_000_000  # bytes of weights in one file; the format ends at 2 GiB


@dataclass(frozen=True)
class Program:
    """A file that was written, and how near it is to its model."""

    path: Path
    input_shape: tuple[int | None, ...]
    """(batch, 3, height, width) of the float32 input ``image``; None for any batch."""
    output_shapes: tuple[tuple[int | None, ...], ...]
    """Of ``output_0``, ``output_1`` and so on."""
    difference: float
    """Largest absolute difference from the model, of a batch of noise in float32 on the CPU."""


def export_program(
    model: nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int],
    *,
    batch_size: int | None = None,
    tolerance: float = TOLERANCE,
) -> Program:
    """Writes a model as a program of ``torch.export``; ``torch.export.load(path).module()(image)`` runs it.

    Args:
        model: a backbone, or any module from images (B, 3, H, W) to a tensor or a list of them. One that has a method
            ``predict``, as the tasks of fine-tuning do, is exported by that. It is left as it is: exported is a copy in
            float32 on the CPU, in evaluation mode, that runs PyTorch's own operations.
        path: ends in ``.pt2``; its folder exists.
        image_size: side or (height, width) in pixels; the program takes no other.
        batch_size: the only one that the program takes; None for any.
        tolerance: see ``exporting.source.check_same``.

    Raises:
        UserError: if the model cannot be exported, the file cannot be written, or it gives something else.
    """
    path = check_path(path, ".pt2")
    copied, images = _prepared(model), _images(image_size, batch_size)
    exported = _exported(copied, images[0], batch_size)
    with beside(path) as temporary:
        torch.export.save(exported, temporary)
        program = torch.export.load(temporary).module()
        shapes, difference = _compared(copied, program, images, "the exported program", tolerance)
    return Program(path, _any_batch(tuple(images[0].shape), batch_size), _batches(shapes, batch_size), difference)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int],
    *,
    batch_size: int | None = None,
    tolerance: float = TOLERANCE,
) -> Program:
    """Writes a model as ONNX, and compares it as onnxruntime runs it on the CPU.

    Args:
        model: see ``export_program``.
        path: ends in ``.onnx``; its folder exists. Weights beyond 1.9 GB lie beside it in a file ``.onnx.data``.
        image_size: side or (height, width) in pixels; the program takes no other.
        batch_size: the only one that the program takes; None for any.
        tolerance: see ``exporting.source.check_same``.

    Raises:
        UserError: as ``export_program``, and if onnx, onnxscript or onnxruntime is missing.
    """
    path = check_path(path, ".onnx")
    for package in ("onnx", "onnxscript"):
        needed(package, "ONNX")
    runtime = needed("onnxruntime", "comparing what ONNX gives")
    copied, images = _prepared(model), _images(image_size, batch_size)
    exported = _exported(copied, images[0], batch_size)
    with torch.no_grad():
        outputs = [f"output_{number}" for number in range(len(_listed(copied(images[0]))))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own makers' making; what matters is compared below
        onnx: Any = torch.onnx.export(exported, input_names=["image"], output_names=outputs, dynamo=True, verbose=False)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in copied.state_dict().values())
    with beside(path) as temporary:
        onnx.save(temporary, external_data=weights > _LARGEST_ONNX)
        session = runtime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def run(image: Tensor) -> list[Tensor]:
            return [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]

        shapes, difference = _compared(copied, run, images, "the ONNX file", tolerance)
    return Program(path, _any_batch(tuple(images[0].shape), batch_size), _batches(shapes, batch_size), difference)


# -- what both do


class _Predicting(nn.Module):
    """A task of fine-tuning as a module from images to predictions."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, image: Tensor) -> Any:
        return self.task.predict(image)  # type: ignore[operator]


def _prepared(model: nn.Module) -> nn.Module:
    if isinstance(model, SGMIM):
        raise UserError("a pre-training model asks for masks and structure maps; export its encoder or a backbone")
    copied = plain_copy(model)
    return _Predicting(copied) if hasattr(copied, "predict") else copied


def _images(image_size: int | tuple[int, int], batch_size: int | None) -> list[Tensor]:
    """What the program is made with and, where it takes any batch, another one."""
    sides = sides_of(image_size)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be 1 or more, or None for any")
    return [example(sides, batch_size)] if batch_size is not None else [example(sides, 2), example(sides, 1)]


def _exported(model: nn.Module, image: Tensor, batch_size: int | None) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if batch_size is None else None
    try:
        with torch.no_grad():
            return torch.export.export(model, (image,), dynamic_shapes=shapes)
    except UserError:
        raise
    # Whatever a model holds that cannot be traced, it is told by an exception of its own.
    except Exception as error:
        raise UserError(f"{type(model).__name__} cannot be exported ({first_line(error)})") from error


def _compared(
    model: nn.Module, program: Callable[[Tensor], Any], images: list[Tensor], what: str, tolerance: float
) -> tuple[list[tuple[int, ...]], float]:
    """The shapes of the first image's outputs, and the largest difference over all images."""
    shapes: list[tuple[int, ...]] = []
    difference = 0.0
    with torch.no_grad():
        for image in images:
            ours = _listed(model(image))
            shapes = shapes or [tuple(output.shape) for output in ours]
            difference = max(difference, check_same(ours, _listed(program(image)), what, tolerance))
    return shapes, difference


def _listed(outputs: Any) -> list[Tensor]:
    found = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if not all(isinstance(output, Tensor) for output in found):
        raise UserError(f"a model to export gives a tensor or a list of them, not {type(outputs).__name__}")
    return found


def _any_batch(shape: tuple[int, ...], batch_size: int | None) -> tuple[int | None, ...]:
    return (batch_size, *shape[1:])


def _batches(shapes: list[tuple[int, ...]], batch_size: int | None) -> tuple[tuple[int | None, ...], ...]:
    return tuple(_any_batch(shape, batch_size) for shape in shapes)
