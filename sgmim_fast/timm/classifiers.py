"""The encoders with what timm's callers expect of a model."""

from dataclasses import replace
from typing import Any

from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sgmim_fast.config import BackboneConfig
from sgmim_fast.config.checks import one_of
from sgmim_fast.models.choices import Choices
from sgmim_fast.models.encoder import ImageEncoder
from sgmim_fast.models.swin import SwinEncoder
from sgmim_fast.models.vit import ViTEncoder
from sgmim_fast.timm.loading import translate_names
from sgmim_fast.timm.resizing import resize_map, resize_windows
from sgmim_fast.train.optim import NOT_DECAYED

Indices = int | list[int] | None


class TimmModel(ImageEncoder, Choices):
    """An encoder with a classifier; its methods and attributes are those that timm's callers expect."""

    config: BackboneConfig
    norm: nn.LayerNorm | None
    container: str
    """The list of modules whose outputs are the features."""

    def finish(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        backend: Any,
        attention: Any,
        place: dict[str, Any],
    ) -> None:
        """What making one ends with."""
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.embed_dim = self.config.embed_dim
        self.num_features = self.head_hidden_size = self.config.num_features
        if in_chans != 3:
            patch = self.config.patch_size
            self.patch_embed.proj = nn.Conv2d(in_chans, self.embed_dim, patch, stride=patch)
        whole = replace(self.config, out_indices=tuple(range(self.config.levels)))
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": stride, "module": f"{self.container}.{number}"}
            for number, (width, stride) in enumerate(zip(whole.channels, whole.strides, strict=True))
        ]
        self.make_head(drop_rate)
        self.to(**{name: value for name, value in place.items() if value is not None})
        self.set_backend(backend)
        self.set_attention(attention)
        self.register_load_state_dict_pre_hook(translate_names)

    @property
    def encoder(self) -> Any:  # type: ignore[override]
        """Itself; ``Choices`` asks for it."""
        return self

    def make_head(self, drop_rate: float) -> None:
        """Set up pooling and classifier."""
        raise NotImplementedError

    def parts(self) -> nn.ModuleList:
        """The modules whose outputs are the features."""
        return getattr(self, self.container)

    def normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """What the last stage or block gives, normed."""
        return self.normed(self.levels(self._embed(x, None), (len(self.parts()) - 1,))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features; with ``pre_logits`` what the classifier is given."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def taken(self, x: Tensor, indices: Indices, stop_early: bool) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """The features, normed if the norm is for them, and without norm those of ``indices``, with their level."""
        count = len(self.parts())
        wanted = sorted(set(feature_take_indices(count, indices)[0]))
        ran = wanted if stop_early else sorted({*wanted, count - 1})
        found = self.levels(self._embed(x, None), ran)
        # Swin's norm is as wide as its last stage, ViT's as every block.
        final = self.normed(found[-1]) if ran[-1] == count - 1 or self.container == "blocks" else found[-1]
        return final, [(level, feature) for level, feature in zip(ran, found, strict=True) if level in wanted]

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what comes after the last of ``indices``. The levels that they name."""
        levels, last = feature_take_indices(len(self.parts()), indices)
        setattr(self, self.container, self.parts()[: last + 1])
        if prune_norm:
            self.norm = None
        if prune_head:
            self.reset_classifier(0, "")
        return levels

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if it is named."""
        raise NotImplementedError

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, ...] | None = None,
    ) -> None:
        """Another nominal image size, other windows, or both; images of any size are taken as before.

        Position tables are resized, so an optimizer that holds them must be made anew.

        Args:
            img_size: side or (height, width) in pixels. A ViT's position table is made for it. For Swin it reduces a
                ``window_size`` that is one number where a stage's map is smaller; alone it changes nothing.
            window_size: tokens a window side, one number or one a stage (Swin); None keeps the windows.

        Raises:
            UserError: for a size that cannot be.
        """
        given: dict[str, Any] = {"image_size": img_size, "window_size": window_size}
        config = replace(self.config, **{name: size for name, size in given.items() if size is not None})
        self.resize(config)
        self.config = self.shape = config

    def resize(self, config: BackboneConfig) -> None:
        """Bring position tables to another configuration's size."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.set_activation_checkpointing(range(len(self.block_stages())) if enable else ())

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if any(word in name for word in NOT_DECAYED)}


class ClassifyingSwin(SwinEncoder, TimmModel):
    """Swin or Swin V2, their features (B, H, W, C)."""

    container = "layers"
    output_fmt = "NHWC"

    def __init__(
        self,
        shape: BackboneConfig,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        backend: str = "auto",
        attention: str = "auto",
        **place: Any,
    ) -> None:
        super().__init__(shape)
        self.finish(in_chans, num_classes, global_pool, drop_rate, backend, attention, place)

    def resize(self, config: BackboneConfig) -> None:
        resize_windows(self, config)

    def make_head(self, drop_rate: float) -> None:
        self.head = ClassifierHead(self.num_features, self.num_classes, self.global_pool, drop_rate, input_fmt="NHWC")
        self.head_hidden_size = self.head.num_features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        weight = self.patch_embed.proj.weight
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, False, self.num_features, device=weight.device, dtype=weight.dtype)
        self.head_hidden_size = self.head.num_features
        self.global_pool = self.global_pool if global_pool is None else global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features (B, C, H, W) of stages, and unless they are asked for alone, the last one's as ever before them.

        Args:
            x: (B, in_chans, H, W).
            indices: stages, -1 the last; a number for so many at the end; None for all.
            norm: whether the last stage's are normed.
            stop_early: run no further than the last that is asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: give the list alone.
        """
        one_of("output_fmt", output_fmt, ("NCHW",))
        final, taken = self.taken(x, indices, stop_early)
        normed = self.config.levels - 1 if norm else None
        features = [(self.normed(feature) if level == normed else feature) for level, feature in taken]
        maps = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what comes after the last of ``indices``, norm and classifier too if that is the last stage's."""
        last = feature_take_indices(len(self.layers), indices)[1]
        shortened = last < len(self.layers) - 1
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        levels = super().prune_intermediate_layers(indices, prune_norm or shortened, prune_head or shortened)
        self.layers[-1].downsample = None  # type: ignore[assignment]
        return levels

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for decay of learning rates by depth; a merging is of its stage's last block, as SimMIM has it."""
        stages = enumerate(self.config.depths)
        mergings = [(rf"^layers\.({stage})\.downsample", (depth - 1,)) for stage, depth in stages]
        fine = [*mergings, (r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}


class ClassifyingViT(ViTEncoder, TimmModel):
    """ViT, its features (B, 1 + L, C). The norm comes before the pooling, whichever that is."""

    container = "blocks"
    num_prefix_tokens = 1

    def __init__(
        self,
        shape: BackboneConfig,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        backend: str = "auto",
        attention: str = "auto",
        **place: Any,
    ) -> None:
        super().__init__(shape)
        self.finish(in_chans, num_classes, global_pool, drop_rate, backend, attention, place)

    def resize(self, config: BackboneConfig) -> None:
        resize_map(self, config)

    def make_head(self, drop_rate: float) -> None:
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(self.num_classes, self.global_pool)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x[:, 1:].mean(1) if self.global_pool == "avg" else x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            one_of("global_pool", global_pool, ("avg", "token", ""))
            self.global_pool = global_pool
        weight = self.patch_embed.proj.weight
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Features of blocks, and unless they are asked for alone, the last one's tokens before them.

        Args:
            x: (B, in_chans, H, W).
            indices: blocks, -1 the last; a number for so many at the end; None for all.
            return_prefix_tokens: give pairs, of the features and the class token (B, 1, C).
            norm: whether all are normed.
            stop_early: run no further than the last that is asked for.
            output_fmt: ``"NCHW"`` for maps (B, C, H, W), ``"NLC"`` for tokens (B, L, C).
            intermediates_only: give the list alone.
        """
        one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        final, taken = self.taken(x, indices, stop_early)
        tokens = [self.normed(feature) if norm else feature for _, feature in taken]
        features: list[Any] = [feature[:, 1:] for feature in tokens]
        if output_fmt == "NCHW":
            grid = [-(-side // self.config.patch_size) for side in x.shape[2:]]
            features = [feature.transpose(1, 2).unflatten(2, grid).contiguous() for feature in features]
        if return_prefix_tokens:
            features = [(feature, whole[:, :1]) for feature, whole in zip(features, tokens, strict=True)]
        return features if intermediates_only else (final, features)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for decay of learning rates by depth."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|patch_embed|rel_pos_bias", "blocks": blocks}
