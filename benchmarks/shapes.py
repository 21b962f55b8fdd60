"""The cases to measure: every operation at the shapes of the recipes, of fine-tuning, and in a size for a first try."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.cases import Case, Work
from sgmim_fast.config import GUIDANCE_HEADS, ModelConfig
from sgmim_fast.masking import CELL, masked_cell_count
from sgmim_fast.recipes import MODELS

RATIO = 0.6


def all_cases(batch: int = 128) -> Iterator[Case]:
    """Most important first, each once; large windows at a smaller batch."""
    seen = set()
    for case in _cases(batch):
        if (case.op, case.name) not in seen:
            seen.add((case.op, case.name))
            yield case


def _cases(batch: int) -> Iterator[Case]:
    swin, large, vit = MODELS["sgmim_swin_base"], MODELS["sgmim_swin_large"], MODELS["sgmim_vit_base"]
    few, fewer = max(1, batch // 4), max(1, batch // 16)
    yield from windows_of("Swin-B", swin, batch)
    yield from windows_of("SwinV2-B", MODELS["sgmim_swinv2_base"], batch)
    yield guidance_of("Swin-B", swin, batch)
    yield class_token_of("ViT-B", vit, batch)
    yield from masking_of("Swin-B", swin, batch)
    yield from windows_of("Swin-B", replace(swin, window_size=12), batch)
    yield window_case("fine-tuning", few, side=56, heads=8, window=7, shift=3)
    yield window_case("fine-tuning", few, side=44, heads=8, window=22, shift=11)
    yield window_case("fine-tuning", few, side=60, heads=8, window=30, shift=15)
    yield from layers_of("Swin-B", swin, batch)
    yield guidance_of("ViT-B", vit, batch)
    yield guidance_of("Swin-L", large, batch)
    yield from windows_of("Swin-L", large, batch)
    yield from layers_of("Swin-L", large, batch)
    yield from masking_of("ViT-B", vit, batch)
    yield from norms_of("ViT-B", batch, 1 + (vit.hw[0] // vit.stride) ** 2, vit.embed_dim)
    yield window_case("fine-tuning", fewer, side=88, heads=4, window=22, shift=11)
    yield window_case("fine-tuning", fewer, side=120, heads=4, window=30, shift=15)
    yield window_case("fine-tuning V2", few, side=48, heads=8, window=24, shift=12, cosine=True)
    yield standardize_case(fewer, side=768)


def smoke_cases() -> Iterator[Case]:
    """Every operation at a size for Triton's interpreter."""
    swin = ModelConfig(image_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4)
    vit = ModelConfig(encoder="vit", image_size=64, embed_dim=32, depths=(1,), num_heads=(1,))
    yield window_case("smoke", 2, side=8, heads=1, window=4, shift=2, size=16)
    yield window_case("smoke V2", 2, side=8, heads=1, window=4, shift=0, size=16, cosine=True)
    yield replace(guidance_of("smoke", swin, 2), name="smoke")
    yield class_token_of("smoke", vit, 2)
    yield from masking_of("smoke", swin, 2)
    yield layer_case("smoke", 2, side=8, heads=1, window=4, shift=2, size=16)
    yield from norms_of("smoke", 2, tokens=16, channels=16)


# -- attention


def windows_of(name: str, config: ModelConfig, batch: int) -> Iterator[Case]:
    """Every stage of a Swin, the deepest first; shifted where its blocks are."""
    order = sorted(range(len(config.depths)), key=lambda stage: -config.depths[stage])
    for stage in order:
        side, heads, size = stage_of(config, stage)
        window = min(config.window_size, side)
        for shift in (window // 2, 0) if side > config.window_size else (0,):
            cosine = config.encoder == "swinv2"
            yield window_case(f"{name} stage {stage + 1}", batch, side, heads, window, shift, size, cosine)


def stage_of(config: ModelConfig, stage: int) -> tuple[int, int, int]:
    """Tokens a side, heads, channels of a head."""
    heads = config.num_heads[stage]
    return min(config.hw) // (config.patch_size * 2**stage), heads, config.embed_dim * 2**stage // heads


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


def layers_of(name: str, config: ModelConfig, batch: int) -> Iterator[Case]:
    """Attention with its projections, and the norms, of a Swin's deepest stage and of its first."""
    for stage in sorted({config.depths.index(max(config.depths)), 0}, reverse=True):
        side, heads, size = stage_of(config, stage)
        window = min(config.window_size, side)
        for shift in (window // 2, 0) if side > window else (0,):
            yield layer_case(f"{name} stage {stage + 1}", batch, side, heads, window, shift, size)
        yield from norms_of(f"{name} stage {stage + 1}", batch, side**2, heads * size)


def layer_case(name: str, batch: int, side: int, heads: int, window: int, shift: int, size: int) -> Case:
    channels = heads * size
    tokens = batch * side**2
    projections, attention = 8 * tokens * channels**2, 4 * tokens * window**2 * channels
    return Case(
        op="attention_layer",
        name=f"{name}, window {window}{' shifted' if shift else ''}, {side}x{side}, {heads} heads",
        shapes={
            "x": (batch, side, side, channels),
            "qkv_weight": (3 * channels, channels),
            "qkv_bias": (3 * channels,),
            "table": ((2 * window - 1) ** 2, heads),
            "proj_weight": (channels, channels),
            "proj_bias": (channels,),
        },
        constants={"window": window, "shift": shift},
        forward=lambda width: Work(2 * tokens * channels * width, projections + attention),
        backward=lambda width: Work(3 * tokens * channels * width, 2 * projections + 5 * attention // 2),
    )


def norms_of(name: str, batch: int, tokens: int, channels: int) -> Iterator[Case]:
    """LayerNorm alone, and with the sum of the residual path before it."""
    numbers = batch * tokens * channels
    shape, parameters = (batch, tokens, channels), {"weight": (channels,), "bias": (channels,)}
    yield Case(
        op="layer_norm",
        name=f"{name}, {tokens} rows of {channels}",
        shapes={"x": shape, **parameters},
        forward=lambda width: Work(2 * numbers * width),
        backward=lambda width: Work(3 * numbers * width),
    )
    yield Case(
        op="residual_norm",
        name=f"{name}, {tokens} rows of {channels}",
        shapes={"x": shape, "branch": shape, **parameters},
        forward=lambda width: Work(4 * numbers * width),
        backward=lambda width: Work(4 * numbers * width),
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
