"""Shape of a backbone: an encoder put to use on whole images of any size, that gives maps of several resolutions."""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from sgmim_fast.config.checks import check_widths, known_fields, one_of, require
from sgmim_fast.config.model import Encoder, ModelConfig

OutputNorm = Literal["none", "last", "all"]
PYRAMID = 4  # maps of a ViT's pyramid


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape of a backbone without a head.

    Raises:
        UserError: for any combination that cannot be built; the message names the field.
    """

    encoder: Encoder = "swin"
    """Swin, Swin V2 (cosine attention) or ViT (shared relative position bias)."""
    image_size: int | tuple[int, int] | None = None
    """Side or (height, width) in pixels that the position tables are made for; other sizes are taken as well. For Swin,
    windows larger than a stage's map at this size are reduced to it; None reduces none. A ViT needs it."""
    patch_size: int = None  # type: ignore[assignment]
    """Pixels a patch side; unless given, 4 for Swin and 16 for ViT."""
    embed_dim: int = 128
    """Channels of the first stage (Swin) or of every block (ViT)."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks a stage; one entry for ViT."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads a stage; one entry for ViT."""
    window_size: int | tuple[int, ...] = 6
    """Tokens a window side (Swin), the same for all stages or one entry a stage. ViT ignores it."""
    use_shift: bool | tuple[bool, ...] = True
    """Whether every second block of a stage is shifted (Swin), for all stages or one entry a stage."""
    shift_covered: bool = False
    """Whether windows are shifted also on a map no larger than one on a side (Swin), as Swin's detection and
    segmentation code and transformers' SwinBackbone do; pre-training, classifiers and timm do not."""
    pretrained_window_size: int | tuple[int, ...] | None = None
    """Windows of pre-training, which Swin V2 measures its offsets by, for all stages or one entry a stage; None for
    those of ``window_size``."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; earlier ones less, linearly."""
    layer_scale_init: float | None = None
    """Initial layer scale of ViT blocks; None for none. Swin has none."""
    norm_eps: float = None  # type: ignore[assignment]
    """Epsilon of the LayerNorms; unless given, 1e-5 for Swin and 1e-6 for ViT."""
    out_indices: tuple[int, ...] = None  # type: ignore[assignment]
    """Stages (Swin) or blocks (ViT) whose maps are given, ascending; unless given, all stages, or four blocks evenly. A
    ViT's may repeat. What comes after the last of them is not built."""
    norm: OutputNorm = "none"
    """LayerNorm on maps: "none" as timm gives them, "last" the encoder's own on its last map alone, "all" one each, of
    which that map's is the encoder's own and the others are new."""
    pyramid: bool = True
    """Bring a ViT's four maps to strides 4, 8, 16 and 32 (a simple pyramid): a quarter, a half, once and twice its
    patch size. False leaves all at the patch size. Swin ignores it."""

    def __post_init__(self) -> None:
        one_of("encoder", self.encoder, ("swin", "swinv2", "vit"))
        one_of("norm", self.norm, ("none", "last", "all"))
        vit = self.encoder == "vit"
        if self.patch_size is None:
            self._set("patch_size", 16 if vit else 4)
        if self.norm_eps is None:
            self._set("norm_eps", 1e-6 if vit else 1e-5)
        for name in ("depths", "num_heads"):
            self._set(name, _integers(name, getattr(self, name)))
        for name in ("patch_size", "embed_dim"):
            require(_natural(getattr(self, name)), f"{name} {getattr(self, name)!r} must be a number, 1 or more")
        check_widths(self.embed_dim, self.depths, self.num_heads)
        require(not vit or len(self.depths) == 1, f"depths {self.depths} must have one entry for ViT")
        self._check_image_size()
        self._set_windows()
        self._set_outputs()
        for name in ("pyramid", "shift_covered"):
            require(isinstance(getattr(self, name), bool), f"{name} {getattr(self, name)!r} must be true or false")
        for name in ("drop_path_rate", "norm_eps", "layer_scale_init"):
            value = getattr(self, name)
            left_out = value is None and name == "layer_scale_init"
            require(left_out or _is_number(value), f"{name} {value!r} must be a number")
        require(0.0 <= self.drop_path_rate < 1.0, f"drop_path_rate {self.drop_path_rate} must be in [0, 1)")
        require(self.layer_scale_init is None or vit, "layer_scale_init is for the ViT encoder; leave it out for Swin")
        require(self.norm_eps > 0, f"norm_eps {self.norm_eps} must be positive")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_image_size(self) -> None:
        if self.image_size is None:
            require(self.encoder != "vit", "image_size is needed for ViT: its position table is made for it")
            return
        sides = _integers("image_size", self.image_size)
        require(
            len(sides) in (1, 2) and min(sides) >= 1,
            f"image_size {self.image_size} must be a side or (height, width) in pixels, 1 or more",
        )
        self._set("image_size", sides[0] if isinstance(self.image_size, int) or len(sides) == 1 else sides)

    def _set_windows(self) -> None:
        stages = len(self.depths)
        windows = _integers("window_size", self.window_size)
        if isinstance(self.window_size, int):
            windows = tuple(min((self.window_size, *self.stage_map(stage))) for stage in range(stages))
        shifts = (self.use_shift,) * stages if isinstance(self.use_shift, bool) else self.use_shift
        require(
            isinstance(shifts, tuple | list) and all(isinstance(shift, bool) for shift in shifts),
            f"use_shift {shifts!r} must be true or false, for all stages or once a stage",
        )
        shifts = tuple(shifts)
        pretrained = windows
        if self.pretrained_window_size is not None:
            pretrained = _integers("pretrained_window_size", self.pretrained_window_size)
            if isinstance(self.pretrained_window_size, int):
                pretrained *= stages
        found = {"window_size": windows, "use_shift": shifts, "pretrained_window_size": pretrained}
        remedy = "; a ViT has no windows: set window_size and use_shift to None" if self.encoder == "vit" else ""
        for name, values in found.items():
            require(
                len(values) == stages,
                f"{name} {values} must be one for all stages or have one entry a stage, {stages} in all{remedy}",
            )
            require(min(values) >= 1 or name == "use_shift", f"{name} {values} must be 1 or more each")
            self._set(name, values)

    def _set_outputs(self) -> None:
        count, vit = self.levels, self.encoder == "vit"
        if self.out_indices is None:
            # Of the four blocks each ends a quarter; with fewer than four blocks some come twice.
            self._set(
                "out_indices", tuple(-(-count * (i + 1) // 4) - 1 for i in range(4)) if vit else tuple(range(count))
            )
        found = _integers("out_indices", self.out_indices)
        self._set("out_indices", found)
        what = "blocks" if vit else "stages"
        require(
            len(found) > 0 and all(0 <= index < count for index in found),
            f"out_indices {found} must name {what} from 0 to {count - 1}",
        )
        require(
            all(one < other or (vit and one == other) for one, other in pairwise(found)),
            f"out_indices {found} must be ascending",
        )
        require(
            self.norm != "last" or found[-1] == count - 1,
            f"norm 'last' is for the last of the {what}; let out_indices {found} end with {count - 1}",
        )
        if self.has_pyramid:
            require(
                len(found) == PYRAMID, f"out_indices {found} must be {PYRAMID} for a pyramid; or choose pyramid=False"
            )
            require(
                self.patch_size % 4 == 0,
                f"patch_size {self.patch_size} must be a multiple of 4 for a pyramid; or choose pyramid=False",
            )

    @classmethod
    def from_pretraining(cls, model: ModelConfig, **overrides: Any) -> "BackboneConfig":
        """The encoder of a pre-training model: windows as it had them, reduced where they covered a map.

        They stay also where ``overrides`` names another image size, and Swin V2 goes on to measure offsets by them
        where it names other windows. A ViT's position table is made for the image size of pre-training unless named.

        Raises:
            UserError: for a field that does not exist, or a combination that cannot be built.
        """
        known_fields(cls, overrides)
        shared = {field.name for field in fields(cls)} & {field.name for field in fields(model)}
        found = {name: getattr(model, name) for name in shared - {"image_size"}}
        windows = tuple(
            min(model.window_size, min(model.hw) // (model.patch_size * 2**stage)) for stage in range(len(model.depths))
        )
        found |= {"window_size": windows, "pretrained_window_size": windows}
        if model.encoder == "vit":
            found["image_size"] = model.image_size
        return cls(**found | overrides)

    def stage_map(self, stage: int) -> tuple[int, ...]:
        """(rows, columns) of a stage's map for ``image_size``, completed to whole patches; () without one."""
        if self.image_size is None:
            return ()
        sides = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return tuple(-(-side // (self.patch_size * 2**stage)) for side in sides)

    def window_of(self, stage: int) -> tuple[int, bool, int]:
        """Window of a stage, whether every second block is shifted, and the window of pre-training."""
        return self.window_size[stage], self.use_shift[stage], self.pretrained_window_size[stage]  # type: ignore[index]

    @property
    def levels(self) -> int:
        """Maps to choose from: stages of Swin, blocks of ViT."""
        return self.depths[0] if self.encoder == "vit" else len(self.depths)

    @property
    def has_pyramid(self) -> bool:
        return self.encoder == "vit" and self.pyramid

    @property
    def has_own_norm(self) -> bool:
        """Whether the encoder's own LayerNorm takes part: on the last of the maps, if that is the encoder's last."""
        return self.norm != "none" and self.out_indices[-1] == self.levels - 1

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map given."""
        return tuple(self.embed_dim if self.encoder == "vit" else self.embed_dim * 2**i for i in self.out_indices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels that a place in each map covers a side."""
        patch = self.patch_size
        if self.has_pyramid:
            return patch // 4, patch // 2, patch, patch * 2
        return tuple(patch if self.encoder == "vit" else patch * 2**i for i in self.out_indices)

    @property
    def num_features(self) -> int:
        """Channels of the last map given."""
        return self.channels[-1]


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integers(name: str, value: Any) -> tuple[int, ...]:
    """One integer, or several, as a tuple."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    require(
        all(isinstance(entry, int) and not isinstance(entry, bool) for entry in values),
        f"{name} {value!r} must be an integer, or several",
    )
    return values
