"""What is exported: a model's encoder, and the checks that all exports share."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sgmim_fast.config import BackboneConfig, ModelConfig
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.models.choices import Choices
from sgmim_fast.models.layers import Dispatched
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.models.swin import SwinEncoder
from sgmim_fast.models.vit import ViTEncoder

M = TypeVar("M", bound=nn.Module)
TOLERANCE = 1e-4
"""Largest difference between a model and its export, in float32, where values are about 1; more where they are more."""


@dataclass(frozen=True)
class Source:
    """The encoder of a model."""

    encoder: SwinEncoder | ViTEncoder
    shape: BackboneConfig
    image_size: tuple[int, int] | None
    """(height, width) that it was configured for; None if for none."""

    def check_whole(self, what: str) -> None:
        """Refuses a backbone that ends before its last stage or block.

        Raises:
            UserError: which names what it is needed for.
        """
        last = self.shape.levels - 1
        if self.shape.out_indices[-1] != last:
            raise UserError(
                f"{what} needs the whole encoder, but out_indices {self.shape.out_indices} end before {last}; "
                "export the pre-training model, or a backbone that gives its last map"
            )


def source_of(model: nn.Module) -> Source:
    """The encoder of a pre-training model or a backbone, or the encoder itself.

    Raises:
        UserError: for other modules.
    """
    encoder = model.encoder if isinstance(model, SGMIM | Backbone) else model
    if not isinstance(encoder, SwinEncoder | ViTEncoder):
        raise UserError(
            f"only models of create_model or create_backbone, and their encoders, can be exported so; got "
            f"{type(model).__name__} (of a fine-tuned model, export its backbone)"
        )
    config = encoder.config
    size = config.hw if isinstance(config, ModelConfig) else config.image_size
    return Source(encoder, encoder.shape, (size, size) if isinstance(size, int) else size)


def sides_of(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a side, or of both.

    Raises:
        UserError: unless they are numbers, 1 or more.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise UserError(f"image_size {image_size} must be a side or (height, width) in pixels, 1 or more")
    return sides[0], sides[1]


def plain_copy(module: M) -> M:
    """A copy in float32 on the CPU, in evaluation mode, that runs PyTorch's own operations."""
    copied = copy.deepcopy(module).cpu().float().eval()
    for part in copied.modules():
        if isinstance(part, Dispatched | Choices):
            part.backend, part.attention = "torch", "auto"
    return copied


def needed(package: str, purpose: str) -> Any:
    """A package that not everybody has.

    Raises:
        UserError: if it is missing; it names the extra to install.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(f"{purpose} needs {package} ({error}); pip install sgmim-fast[export]") from error


def example(sides: tuple[int, int], batch: int = 2) -> Tensor:
    """A batch of noise, (batch, 3, height, width), always the same."""
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(0))


def check_same(ours: list[Tensor], theirs: list[Tensor], what: str, tolerance: float, why: str = "") -> float:
    """The largest absolute difference between a model's outputs and its export's.

    Args:
        ours: of the model.
        theirs: of the export.
        what: the export's name in messages.
        tolerance: what is allowed, for values up to 1; larger ones are allowed it times the largest.
        why: what may be the cause of a difference, and the remedy.

    Raises:
        UserError: if they differ by more, or in number or shape.
    """
    shapes, others = ([tuple(x.shape) for x in outputs] for outputs in (ours, theirs))
    if shapes != others:
        raise UserError(f"{what} gives {others}, the model {shapes}; it was not written")
    difference = 0.0
    for one, other in zip(ours, theirs, strict=True):
        one, other = one.double(), other.double()
        worst = float((one - other).abs().max())
        limit = tolerance * max(1.0, float(one.abs().max()))
        if not worst <= limit:  # NaN as well
            reason = f" ({why})" if why else ""
            raise UserError(
                f"{what} differs from the model by {worst:.2g}, more than {limit:.2g}{reason}; it was not written"
            )
        difference = max(difference, worst)
    return difference


def check_path(path: str | Path, suffix: str) -> Path:
    """The path of a file to write.

    Raises:
        UserError: if nothing can be written there, or it has another suffix.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"{path}: let the name end in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written, {path.parent} is not a folder; create it first")
    if path.is_dir():
        raise UserError(f"{path}: cannot be written, it is a folder; name a file")
    return path


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own; what is there at the end takes the place of ``path``.

    The name stays, because an ONNX file knows the one of its weights.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        yield folder / path.name
        for file in sorted(folder.iterdir(), reverse=True):  # weights before what names them
            file.replace(path.with_name(file.name))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}); check that its folder is writable and has room"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
