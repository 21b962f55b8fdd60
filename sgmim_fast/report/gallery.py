"""Pictures of what the model fills in, for a few fixed pairs of the training set.

Shapes: B samples, c structure channels, H x W pixels, Gh x Gw mask cells.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sgmim_fast import reference
from sgmim_fast.colors import colorize
from sgmim_fast.config import ModelConfig, PretrainConfig
from sgmim_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD
from sgmim_fast.data.sources import open_pairs
from sgmim_fast.data.torch_loader import evaluation_batch
from sgmim_fast.masking import CELL
from sgmim_fast.models.registry import create_model
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.ops import standardize_structure
from sgmim_fast.weights import load_weights

IMAGE_ERROR = 0.4
"""Upper end of the image error scale, as a share of the brightness range."""
STRUCTURE_ERROR = 1.5
"""Upper end of the map error scale, in standard deviations of the map."""
_HIDDEN = 96  # grey of what the model is not given; the page draws its own hatching above it
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Strip:
    """One modality of one sample, as data URIs of pictures of the same size."""

    kind: str
    """``"image"`` or ``"map"``."""
    original: str
    given: str
    completed: str
    """Given where given, predicted elsewhere."""
    error: str
    loss: float
    """Mean absolute error of the predicted cells, in the units of the training loss."""
    predicted: tuple[tuple[bool, ...], ...]
    """(Gh, Gw): cells that the model was not given and fills in."""


@dataclass(frozen=True)
class Sample:
    """One pair."""

    name: str
    strips: tuple[Strip, ...]
    """The image and, unless the model has no guidance, the map."""


@dataclass(frozen=True)
class Gallery:
    """Everything the page shows of the model's work."""

    samples: tuple[Sample, ...]
    size: tuple[int, int]
    """(H, W)."""
    grid: tuple[int, int]
    hidden: int
    """Masked cells a sample."""
    checkpoint: str
    structure_channels: int
    window: int | None
    """The image target was normalised in windows of this many pixels."""


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(config, backend="torch").parameters())


def build_gallery(config: PretrainConfig, weights: Path, count: int) -> Gallery:
    """Run the model on ``count`` pairs at even distances in the data set, with the masks of epoch 0.

    Raises:
        UserError: if the data or the weights cannot be read.
    """
    guided = config.model.guidance != "none"
    pairs = open_pairs(config.data.path, structure=guided)
    indices = np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(int)).tolist()
    batch = evaluation_batch(pairs, config, indices)
    with torch.random.fork_rng(devices=[]):  # a caller's random numbers do not depend on its report
        model = create_model(config.model, backend="torch")
    load_weights(model, weights)
    image, mask = batch["image"], batch["mask"]
    structure = standardize_structure(batch["structure"]) if guided else None
    strips = _strips(model.eval(), image, structure, mask)
    names = [Path(pairs.members(index)[0].name).name for index in indices]
    return Gallery(
        samples=tuple(Sample(name, pair) for name, pair in zip(names, strips, strict=True)),
        size=config.model.hw,
        grid=config.model.grid,
        hidden=int(mask[0].sum()),
        checkpoint=weights.parent.name,
        structure_channels=config.model.structure_channels,
        window=config.model.normalize_target_window,
    )


def _strips(model: SGMIM, image: Tensor, structure: Tensor | None, mask: Tensor) -> list[tuple[Strip, ...]]:
    window = model.config.normalize_target_window
    pictures = model.reconstruct(image, structure, mask)
    target = image if window is None else reference.local_normalize(image, window)
    prediction = pictures.image if window is None else local_denormalize(pictures.image, image, window)
    rows = []
    for i in range(image.shape[0]):
        one = slice(i, i + 1)
        loss = float(reference.pixel_l1(pictures.image[one], target[one], mask[one]))
        strips = [_image_strip(_display(image[i]), _display(prediction[i]), mask[i], loss)]
        if structure is not None and pictures.structure is not None:
            loss = float(reference.pixel_l1(pictures.structure[one], structure[one], ~mask[one]))
            strips.append(_map_strip(structure[i], pictures.structure[i], ~mask[i], loss))
        rows.append(tuple(strips))
    return rows


def local_denormalize(prediction: Tensor, image: Tensor, window: int) -> Tensor:
    """Undo ``reference.local_normalize`` with the true image's own local mean and deviation, all (B, 3, H, W)."""
    mean, deviation = reference.local_statistics(image, window)
    return prediction * deviation + mean


def _display(image: Tensor) -> Tensor:
    """Normalised (3, H, W) to brightness in [0, 1]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image * std[:, None, None] + mean[:, None, None]).clamp(0, 1)


def _image_strip(truth: Tensor, prediction: Tensor, predicted: Tensor, loss: float) -> Strip:
    error = (prediction - truth).abs().mean(0).numpy()
    return _strip("image", _rgb(truth), _rgb(prediction), colorize(error, 0, IMAGE_ERROR, "error"), predicted, loss)


def _map_strip(truth: Tensor, prediction: Tensor, predicted: Tensor, loss: float) -> Strip:
    error = (prediction - truth).abs().mean(0).numpy()
    if truth.shape[0] == 3:
        bottom, top = truth.amin((1, 2), keepdim=True), truth.amax((1, 2), keepdim=True)
        shown, guess = (_rgb(((x - bottom) / (top - bottom).clamp(min=1e-6)).clamp(0, 1)) for x in (truth, prediction))
    else:
        low, high = (float(torch.quantile(truth[0].flatten(), q)) for q in (0.01, 0.99))
        shown, guess = (colorize(x[0].numpy(), low, high, "structure") for x in (truth, prediction))
    return _strip("map", shown, guess, colorize(error, 0, STRUCTURE_ERROR, "error"), predicted, loss)


def _strip(kind: str, truth: Bytes, prediction: Bytes, error: Bytes, predicted: Tensor, loss: float) -> Strip:
    """Compose the four pictures (H, W, 3); ``predicted`` is (Gh, Gw) bool."""
    cells = predicted.numpy()
    hole = cells.repeat(CELL, 0).repeat(CELL, 1)[:, :, None]
    blank = np.full_like(truth, _HIDDEN)
    return Strip(
        kind=kind,
        original=_data_uri(truth),
        given=_data_uri(np.where(hole, blank, truth)),
        completed=_data_uri(np.where(hole, prediction, truth)),
        error=_data_uri(np.where(hole, error, blank)),
        loss=loss,
        predicted=tuple(tuple(bool(cell) for cell in row) for row in cells),
    )


def _rgb(picture: Tensor) -> Bytes:
    """(3, H, W) in [0, 1] to (H, W, 3) bytes."""
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _data_uri(picture: Bytes) -> str:
    """JPEG without chroma subsampling: its blocks divide the mask cells, so edges of cells stay sharp."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
