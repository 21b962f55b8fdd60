"""The operations at the shapes of the recipes: inputs, what a call must at least move and multiply, the plain truth.

Shape letters as in ``sgmim_fast.reference``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgmim_fast import reference
from sgmim_fast.config import GUIDANCE_HEADS, ModelConfig
from sgmim_fast.masking import CELL, masked_cell_count
from sgmim_fast.recipes import MODELS

RATIO = 0.6
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """The least that one pass must do: bytes read and written once each, floating-point operations of products."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    op: str
    """Its name in ``sgmim_fast.ops``."""
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    """Of floating inputs by keyword, in the dtype under test unless ``single`` names them."""
    forward: Callable[[int], Work]
    """By bytes of a number in the dtype under test."""
    backward: Callable[[int], Work] | None = None
    """None where there is no gradient."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords, the same for every set of inputs."""
    index: tuple[str, int, int] | None = None
    """Keyword of an index list, its length and how many places there are."""
    single: tuple[str, ...] = ()
    """Inputs that are float32 whatever the rest is."""
    fixed: tuple[str, ...] = ()
    """Floating inputs that get no gradient."""
    whole: bool = False
    """Whether the result mixes samples, so that all of them are needed to check any."""

    @property
    def batch(self) -> int:
        return next(iter(self.shapes.values()))[0]

    def wanted(self) -> list[str]:
        """Inputs that get a gradient."""
        return [] if self.backward is None else [name for name in self.shapes if name not in self.fixed]

    def is_batched(self, name: str) -> bool:
        """Whether an input holds something of each sample."""
        return name not in SHARED

    def make(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Fresh random inputs."""
        generator = torch.Generator(device).manual_seed(seed)
        inputs = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            value = SCALES.get(name, lambda x: x)(value)
            value = value if name in self.single else value.to(dtype)
            inputs[name] = value.requires_grad_(name in self.wanted())
        if self.index is not None:
            name, count, places = self.index
            order = torch.rand(self.batch, places, generator=generator, device=device).argsort(1)
            inputs[name] = order[:, :count].sort(1).values.to(torch.int32)
        return inputs

    def truth(self, **inputs: Tensor) -> Tensor:
        """The plain function, in the dtype of the inputs."""
        return PLAIN[self.op](**inputs, **self.constants)


PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias", "mask_token")
SHARED = ("table", "logit_scale", "null_k", "null_v", "fill", *PARAMETERS)
"""Inputs that all samples have in common."""
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "logit_scale": lambda x: x.abs() * 5 + 5,  # learned ones lie around 10
    "weight": lambda x: x * 0.1,
    "norm_weight": lambda x: 1 + 0.1 * x,
}
PLAIN: dict[str, Callable[..., Tensor]] = {
    "window_attention": reference.window_attention,
    "class_token_attention": reference.class_token_attention,
    "guidance_attention": reference.guidance_attention,
    "gather_rows": reference.gather_rows,
    "scatter_rows": reference.scatter_rows,
    "gather_cells": reference.gather_cells,
    "embed_visible": reference.embed_visible,
    "masked_l1": reference.masked_l1,
    "standardize_structure": lambda maps: reference.standardize(
        maps, *reference.trimmed_stats_by_selection(maps.flatten(2).flatten(0, 1))
    ),
}


def all_cases(batch: int = 128) -> Iterator[Case]:
    """Most important first; large windows at a smaller batch."""
    swin, large, vit = MODELS["sgmim_swin_base"], MODELS["sgmim_swin_large"], MODELS["sgmim_vit_base"]
    few, fewer = max(2, batch // 4), max(2, batch // 16)
    yield from windows_of("Swin-B", swin, batch)
    yield from windows_of("SwinV2-B", MODELS["sgmim_swinv2_base"], batch)
    yield guidance_of("Swin-B", swin, batch)
    yield class_token_of("ViT-B", vit, batch)
    yield from masking_of("Swin-B", swin, batch)
    yield window_case("fine-tuning", few, side=44, heads=8, window=22, shift=11)
    yield window_case("fine-tuning", few, side=60, heads=8, window=30, shift=15)
    yield guidance_of("ViT-B", vit, batch)
    yield guidance_of("Swin-L", large, batch)
    yield from windows_of("Swin-L", large, batch)
    yield from masking_of("ViT-B", vit, batch)
    yield window_case("fine-tuning", few, side=56, heads=8, window=7, shift=3)
    yield window_case("fine-tuning", fewer, side=88, heads=4, window=22, shift=11)
    yield window_case("fine-tuning", fewer, side=120, heads=4, window=30, shift=15)
    yield window_case("fine-tuning V2", few, side=48, heads=8, window=24, shift=12, cosine=True)
    yield standardize_case(fewer, side=768)


# -- attention


def windows_of(name: str, config: ModelConfig, batch: int) -> Iterator[Case]:
    """Every stage of a Swin, the deepest first; shifted where its blocks are."""
    order = sorted(range(len(config.depths)), key=lambda stage: -config.depths[stage])
    for stage in order:
        side = min(config.hw) // (config.patch_size * 2**stage)
        window, heads = min(config.window_size, side), config.num_heads[stage]
        for shift in (window // 2, 0) if side > config.window_size else (0,):
            size = config.embed_dim * 2**stage // heads
            cosine = config.encoder == "swinv2"
            yield window_case(f"{name} stage {stage + 1}", batch, side, heads, window, shift, size, cosine)


def window_case(
    name: str, batch: int, side: int, heads: int, window: int, shift: int, size: int = 32, cosine: bool = False
) -> Case:
    numbers = batch * side**2 * heads * size  # of the output; qkv holds three times as many
    products = 4 * batch * side**2 * window**2 * heads * size
    shapes = {"qkv": (batch, side, side, 3, heads, size), "table": ((2 * window - 1) ** 2, heads)}
    return Case(
        op="window_attention",
        name=f"{name}, window {window}{' shifted' if shift else ''}, {side}x{side}, {heads} heads",
        shapes=shapes | ({"logit_scale": (heads,)} if cosine else {}),
        constants={"window": window, "shift": shift},
        forward=lambda width: Work(4 * numbers * width, products),
        backward=lambda width: Work(8 * numbers * width, 5 * products // 2),
    )


def class_token_of(name: str, config: ModelConfig, batch: int) -> Case:
    grid = (config.hw[0] // config.stride, config.hw[1] // config.stride)
    heads, tokens = config.num_heads[0], 1 + grid[0] * grid[1]
    size = config.embed_dim // heads
    numbers = batch * tokens * heads * size
    products = 4 * batch * tokens**2 * heads * size
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    return Case(
        op="class_token_attention",
        name=f"{name}, {tokens} tokens, {heads} heads of {size}",
        shapes={"qkv": (batch, tokens, 3, heads, size), "table": (rows, heads)},
        constants={"grid": grid},
        forward=lambda width: Work(4 * numbers * width, products),
        backward=lambda width: Work(8 * numbers * width, 5 * products // 2),
    )


def counts_of(config: ModelConfig) -> tuple[int, int, int]:
    """Cells, masked cells, tokens of a cell."""
    cells = config.grid[0] * config.grid[1]
    return cells, masked_cell_count(cells, RATIO), (CELL // config.stride) ** 2


def guidance_of(name: str, config: ModelConfig, batch: int) -> Case:
    cells, masked, tokens = counts_of(config)
    keys, queries = masked * tokens, (cells - masked) * tokens
    size = config.num_features // GUIDANCE_HEADS
    width_all = GUIDANCE_HEADS * size
    reads, products = batch * width_all * (queries + 2 * keys), 4 * batch * queries * (keys + 1) * width_all
    out = batch * width_all * queries
    head = (GUIDANCE_HEADS, size)
    return Case(
        op="guidance_attention",
        name=f"{name}, {queries} queries, {keys} keys, heads of {size}",
        shapes={
            "q": (batch, queries, *head),
            "k": (batch, keys, *head),
            "v": (batch, keys, *head),
            "null_k": head,
            "null_v": head,
        },
        constants={"count": queries},
        forward=lambda width: Work((reads + out) * width, products),
        backward=lambda width: Work((2 * reads + 2 * out) * width, 5 * products // 2),
    )


# -- masks, losses, statistics


def masking_of(name: str, config: ModelConfig, batch: int) -> Iterator[Case]:
    """What the gathered path does around the encoder."""
    cells, masked, tokens = counts_of(config)
    visible, rows, channels, stride = cells - masked, cells * tokens, config.num_features, config.stride
    side, patch, width = CELL // stride, config.patch_size, config.embed_dim
    pixels = batch * CELL**2
    embedded = batch * cells * (CELL // patch) ** 2 * width
    norm: dict[str, tuple[int, ...]] = (
        {} if config.encoder == "vit" else {"norm_weight": (width,), "norm_bias": (width,)}
    )
    yield Case(
        op="embed_visible",
        name=f"{name}, {visible} of {cells} cells, patches of {patch}",
        shapes={
            "image": (batch, 3, *config.hw),
            "weight": (width, 3, patch, patch),
            "bias": (width,),
            **norm,
            "mask_token": (width,),
        },
        constants={"norm_eps": config.norm_eps, **({} if norm else {"norm_weight": None, "norm_bias": None})},
        index=("visible", visible, cells),
        single=("image",),
        fixed=("image",),
        forward=lambda size: Work(3 * visible * pixels * 4 + embedded * size),
        backward=lambda size: Work(3 * visible * pixels * 4 + embedded * size),
    )
    chosen, all_rows = batch * masked * tokens * channels, batch * rows * channels
    yield Case(
        op="gather_rows",
        name=f"{name}, {masked * tokens} of {rows} rows of {channels}",
        shapes={"x": (batch, rows, channels)},
        index=("index", masked * tokens, rows),
        forward=lambda size: Work(2 * chosen * size),
        backward=lambda size: Work((chosen + all_rows) * size),
    )
    yield Case(
        op="scatter_rows",
        name=f"{name}, {masked * tokens} of {rows} rows of {channels}",
        shapes={"values": (batch, masked * tokens, channels), "fill": (channels,)},
        constants={"rows": rows},
        index=("index", masked * tokens, rows),
        forward=lambda size: Work((chosen + all_rows) * size),
        backward=lambda size: Work((chosen + all_rows) * size),
    )
    yield Case(
        op="gather_cells",
        name=f"{name}, {masked} of {cells} cells of a map",
        shapes={"x": (batch, 1, *config.hw)},
        index=("index", masked, cells),
        forward=lambda size: Work(2 * masked * pixels * size),
    )
    yield Case(
        op="masked_l1",
        name=f"{name}, {masked} of {cells} cells of an image",
        shapes={"prediction": (batch, masked, side, side, 3 * stride**2), "picture": (batch, 3, *config.hw)},
        index=("index", masked, cells),
        single=("picture",),
        fixed=("picture",),
        whole=True,
        forward=lambda size: Work(3 * masked * pixels * (size + 4)),
        backward=lambda size: Work(3 * masked * pixels * (2 * size + 4)),
    )
    yield standardize_case(batch, min(config.hw))


def standardize_case(batch: int, side: int) -> Case:
    return Case(
        op="standardize_structure",
        name=f"{batch} maps of {side}x{side}",
        shapes={"maps": (batch, 1, side, side)},
        single=("maps",),
        forward=lambda size: Work(2 * batch * side**2 * 4),
    )
