"""A pre-trained encoder put to use: maps of several resolutions from images of any size.

Sources: Swin's detection and segmentation code for sizes that windows do not divide, BEiT (arXiv 2106.08254) for the
pyramid of a plain ViT, ViTDet (2203.16527) for its norm.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import Tensor, nn

from sgmim_fast.config import Attention, BackboneConfig, Backend
from sgmim_fast.config.checks import known_fields
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.models.choices import Choices, make_encoder
from sgmim_fast.weight_files import read_tensors


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pyramid(nn.ModuleList):
    """Four maps of one resolution to a quarter, a half, once and twice their stride: (B, C, h, w) each.

    Args:
        width: channels of the maps.
        norm_eps: epsilon of the norm between two transposed convolutions.
        strides: pixels that a place covers a side, of what each map becomes.
    """

    def __init__(self, width: int, norm_eps: float, strides: tuple[int, ...]) -> None:
        first = nn.ConvTranspose2d(width, width, 2, stride=2)
        second = nn.ConvTranspose2d(width, width, 2, stride=2)
        super().__init__(
            [
                nn.Sequential(first, MapNorm(width, eps=norm_eps), nn.GELU(), second),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.strides = strides

    def forward(self, maps: list[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Maps of an image of ``size`` (H, W), ceil(H / stride) x ceil(W / stride).

        Where patches do not divide the image, finer maps end with it and not with the zeros that complete its patches.
        """
        found = []
        for level, x, stride in zip(self, maps, self.strides, strict=True):
            rows, columns = (-(-side // stride) for side in size)
            found.append(level(x)[:, :, :rows, :columns])
        return found


class Backbone(Choices, PyTorchModelHubMixin, library_name="sgmim_fast", tags=["image-feature-extraction"]):
    """Maps of several resolutions, for a head to build on. Build it with ``create_backbone``.

    It goes to a folder or the Hugging Face Hub with ``save_pretrained`` or ``push_to_hub`` and comes back with
    ``from_pretrained``.

    Args:
        config: its shape.
        backend: see ``set_backend``.
        attention: see ``set_attention``.
    """

    def __init__(self, config: BackboneConfig, backend: Backend = "auto", attention: Attention = "auto") -> None:
        super().__init__()
        self.config = config
        self.encoder = make_encoder(config)
        new = 0
        if config.norm == "all":
            new = len(config.out_indices) - config.has_own_norm
        self.out_norms = nn.ModuleList(MapNorm(width, eps=config.norm_eps) for width in config.channels[:new])
        self.pyramid = Pyramid(config.num_features, config.norm_eps, config.strides) if config.has_pyramid else None
        self.set_backend(backend)
        self.set_attention(attention)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map."""
        return self.config.channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels that a place in each map covers a side."""
        return self.config.strides

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps (B, C_i, H_i, W_i) with H_i = ceil(H / stride_i), finest first.

        Zeros complete what patches, windows and mergings of two do not divide. A ViT's position table is resized
        (bicubic) if it was made for another size. The maps lie in memory channels last.

        Args:
            image: (B, 3, H, W), any H and W, ImageNet-normalised RGB; cast to the dtype of the weights.

        Raises:
            UserError: for another shape, an empty batch, or integers, which are not normalised.
        """
        maps = [x.permute(0, 3, 1, 2) for x in self.encoder.maps_of(image)]
        for number, norm in enumerate(self.out_norms):
            maps[number] = norm(maps[number])
        return maps if self.pyramid is None else self.pyramid(maps, image.shape[2:])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "Backbone":
        """A backbone from a folder that ``save_pretrained`` wrote, or from the Hugging Face Hub, in evaluation mode.

        In the dtype that its weights have.

        Args:
            pretrained_model_name_or_path: the folder, or ``"user/name"``.
            **options: ``backend``, ``attention``, and ``map_location`` for the device; for the Hub those of
                ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and
                ``force_download``.

        Raises:
            UserError: if it is not there, or its configuration or weights are missing, damaged, of another shape or not
                of this version; or for another option.
        """
        if unknown := sorted(options.keys() - {*_CHOICES, *_HUB_OPTIONS, "map_location"}):
            raise UserError(
                f"from_pretrained has no option {', '.join(unknown)}; it has {', '.join(_CHOICES)}, map_location, "
                f"{', '.join(_HUB_OPTIONS)}, and the shape is the folder's"
            )
        choices, where = (
            {name: options[name] for name in names if name in options} for names in (_CHOICES, _HUB_OPTIONS)
        )
        folder = _folder_of(pretrained_model_name_or_path, where)
        shape, path = folder / CONFIG_NAME, folder / SAFETENSORS_SINGLE_FILE
        backbone = cls(_read_shape(shape), **choices)
        _, state = read_tensors(path)
        own = backbone.state_dict()
        wrong = [
            name
            for name in sorted(own.keys() | state.keys())
            if name not in own or name not in state or own[name].shape != state[name].shape
        ]
        if wrong:
            raise UserError(
                f"{path}: does not fit {CONFIG_NAME} beside it ({len(wrong)} names are missing, unknown or of another "
                f"shape, {wrong[0]} first); save the backbone again"
            )
        backbone.to(next(iter(state.values())).dtype).load_state_dict(state)
        return backbone.to(options.get("map_location", "cpu")).eval()


_CHOICES = ("backend", "attention")
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def _folder_of(name: str | Path, options: dict[str, Any]) -> Path:
    """A folder of that name, or a copy of what the Hub has by it."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG_NAME, SAFETENSORS_SINGLE_FILE], **options))
    # No connection, no such name, no access: each is told by an exception of its own.
    except Exception as error:
        raise UserError(
            f"{name}: is no folder, and the Hugging Face Hub did not give it ({first_line(error)}); name a folder of "
            "save_pretrained, or user/name"
        ) from error


def _read_shape(path: Path) -> BackboneConfig:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        known_fields(BackboneConfig, fields)
        return BackboneConfig(**fields)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a folder of save_pretrained") from error
    except (TypeError, ValueError) as error:  # UserError and json's error are ValueErrors
        raise UserError(f"{path}: is no configuration of a backbone of this version ({first_line(error)})") from error
