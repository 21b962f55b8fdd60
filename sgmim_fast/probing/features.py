"""Features on a grid of tokens: a frozen backbone's, and a simple baseline's."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sgmim_fast.errors import UserError
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.probing.grid import cell_means, onto_grid

GRID = 8
"""Pixels a token side unless another grid is asked for, or the finest map is coarser."""
_GIB = 2**30


class Extractor(Protocol):
    """Says what is at every place of an image."""

    stride: int
    """Pixels a token side."""
    channels: int
    """Numbers a token."""

    def __call__(self, image: Tensor) -> Tensor:
        """(channels, ceil(H / stride), ceil(W / stride)) float32 on the CPU, of a normalised image (3, H, W)."""

    def describe(self) -> str:
        """One line for people."""


class BackboneFeatures:
    """Maps of a frozen backbone, side by side on one grid.

    Images go through one at a time, so features depend on nothing but the image and the weights.

    Args:
        backbone: without a pyramid, whose layers are new and know nothing; put into evaluation mode.
        maps: positions among its maps, ascending; None for all.
        stride: pixels a token side: coarser maps are upsampled bilinearly, finer ones averaged. None for ``GRID``, or
            the finest of the maps if that is coarser.
        place: add row and column of the token's centre as shares of the image's height and width, for encoders that
            know no place of their own, as Swin.

    Raises:
        UserError: for maps that are not there, a stride that does not fit, or a pyramid.
    """

    def __init__(
        self,
        backbone: Backbone,
        maps: Sequence[int] | None = None,
        stride: int | None = None,
        *,
        place: bool = False,
    ) -> None:
        if backbone.config.has_pyramid:
            raise UserError(
                "the backbone has a pyramid, whose layers are not pre-trained; create it with pyramid=False to probe it"
            )
        count = len(backbone.strides)
        self.maps = tuple(range(count)) if maps is None else tuple(maps)
        if not self.maps or any(not 0 <= number < count for number in self.maps):
            raise UserError(f"maps {' '.join(map(str, self.maps))} must be among 0 to {count - 1}, which there are")
        if list(self.maps) != sorted(set(self.maps)):
            raise UserError(f"maps {' '.join(map(str, self.maps))} must be ascending")
        strides = [backbone.strides[number] for number in self.maps]
        self.stride = max(GRID, min(strides)) if stride is None else stride
        if self.stride < 1 or any(self.stride % other and other % self.stride for other in strides):
            raise UserError(
                f"stride {self.stride} must divide, or be a multiple of, each of the maps' own, "
                f"{' '.join(map(str, strides))}"
            )
        self.backbone, self.place = backbone.eval(), place
        self.channels = sum(backbone.channels[number] for number in self.maps) + 2 * place

    def __call__(self, image: Tensor) -> Tensor:
        weight = next(self.backbone.parameters())
        with torch.no_grad():
            found = self.backbone(image[None].to(weight.device))
            rows, columns = (-(-side // self.stride) for side in image.shape[-2:])
            brought = [
                onto_grid(found[number][0].float(), self.backbone.strides[number], self.stride)[:, :rows, :columns]
                for number in self.maps
            ]
            joined = torch.cat(brought).cpu()
        return torch.cat([joined, places(image, self.stride)]) if self.place else joined

    def describe(self) -> str:
        strides = " ".join(str(self.backbone.strides[number]) for number in self.maps)
        place = " and place" if self.place else ""
        return (
            f"{self.backbone.config.encoder}, maps of stride {strides}{place}: {self.channels} channels a token of "
            f"{self.stride} pixels"
        )


class RowColour:
    """What can be said without any learning: where a token is and its mean colour.

    Five numbers: row and column of its centre as shares of the image's height and width, and red, green, blue.
    """

    channels = 5

    def __init__(self, stride: int | None = None) -> None:
        self.stride = GRID if stride is None else stride
        if self.stride < 1:
            raise UserError(f"stride {self.stride} must be 1 or more")

    def __call__(self, image: Tensor) -> Tensor:
        return torch.cat([places(image, self.stride), cell_means(image, self.stride)])

    def describe(self) -> str:
        return f"row, column and mean colour of a token of {self.stride} pixels"


def places(image: Tensor, stride: int) -> Tensor:
    """(2, ceil(H / stride), ceil(W / stride)) float32: row and column of each cell's centre, shares of the sides."""
    shares = []
    for side in image.shape[-2:]:
        first = torch.arange(-(-side // stride)) * stride
        last = (first + stride).clamp(max=side)
        shares.append((first + last) / (2 * side))
    return torch.stack(torch.meshgrid(*shares, indexing="ij"))


class Features:
    """The features of images, computed once as far as the memory allowed for them goes.

    Past that they are computed again whenever asked for; the values are the same.

    Args:
        extractor: what computes them.
        budget: bytes that may be kept.
        dtype: float32, or float16 to keep twice as many, rounded; what is not kept is rounded as well.
    """

    def __init__(self, extractor: Extractor, *, budget: int = 2 * _GIB, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise UserError(f"features are kept as float32 or float16, not as {dtype}")
        self.extractor, self.budget, self.dtype = extractor, budget, dtype
        self.kept = 0
        """Bytes."""
        self.computed = 0
        """Images whose features were computed, each time."""
        self._known: dict[tuple[str, torch.Size], Tensor] = {}

    @property
    def stride(self) -> int:
        return self.extractor.stride

    @property
    def channels(self) -> int:
        return self.extractor.channels

    def of(self, name: str, image: Tensor) -> Tensor:
        """(channels, h, w) float32 of a normalised image (3, H, W).

        Args:
            name: of the image's file; the same name and size mean the same image.

        Raises:
            UserError: if a feature is not finite.
        """
        key = (name, image.shape)
        found = self._known.get(key)
        if found is None:
            found = self.extractor(image).to(self.dtype)
            self.computed += 1
            if not found.isfinite().all():
                reason = "float16 may be too narrow for them: keep float32" if self.dtype == torch.float16 else ""
                raise UserError(f"{name}: its features are not finite; {reason or 'the weights may be damaged'}")
            if self.kept + found.nbytes <= self.budget:
                self._known[key] = found
                self.kept += found.nbytes
        return found.float()
