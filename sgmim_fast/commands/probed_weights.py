"""The encoder that is probed: of a run, of a file, or of initial weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgmim_fast.errors import UserError

if TYPE_CHECKING:
    from sgmim_fast.models.backbone import Backbone

RANDOM = "random"


def open_backbone(
    weights: str, *, name: str | None = None, like: Path | None = None, seed: int = 0
) -> "tuple[Backbone, str]":
    """The backbone on the CPU, and what its weights are.

    Args:
        weights: a run's folder, a checkpoint's, a file, or ``RANDOM`` for initial weights: those that pre-training with
            this seed began with.
        name: architecture, where the weights do not say it.
        like: with ``RANDOM``, run or file to take the shape from.
        seed: with ``RANDOM``, of the weights.

    Raises:
        UserError: for weights that are not there or do not fit, and for ``RANDOM`` without a shape.
    """
    import torch

    from sgmim_fast.backbones import create_backbone

    options: dict[str, Any] = {"norm": "last", "pyramid": False}
    if weights != RANDOM:
        file = weights_file(Path(weights))
        return create_backbone(name, weights=file, **options), str(file)
    if (name is None) == (like is None):
        raise UserError(f'"{RANDOM}" needs a shape: give either --name swin_base or --like RUN')
    if like is not None:
        with torch.device("meta"):
            shape = create_backbone(weights=weights_file(like), **options).config
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        made = create_backbone(shape) if like is not None else create_backbone(name, **options)
    return made, RANDOM


def weights_file(path: Path) -> Path:
    """The file that a run's folder, a checkpoint's or a file's path means.

    Raises:
        UserError: if there is none, or it holds a fine-tuned model.
    """
    from sgmim_fast.train.run_folder import WEIGHTS, latest_checkpoint
    from sgmim_fast.weight_files import read_metadata

    file = path
    if (path / WEIGHTS).is_file():
        file = path / WEIGHTS
    elif path.is_dir():
        checkpoint = latest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"{path}: the folder holds no checkpoint; name a pre-training run that has one")
        file = checkpoint / WEIGHTS
    if "task" in read_metadata(file):
        raise UserError(f"{file}: holds a fine-tuned model, which `sgmim evaluate` tests; name pre-trained weights")
    return file
