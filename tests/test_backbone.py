"""Backbones: the maps of timm's own models and of a plain computation, at any size, on every backend."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from sgmim_fast import Backbone, BackboneConfig, create_backbone, load_weights, save_weights
from sgmim_fast.weight_files import read_tensors
from tests.test_triton_backend import CLOSE, DEVICE, EXACT
from tests.weight_cases import ENCODERS, randomised, tiny

SMALL: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 8, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": (4, 3, 2, 2)},
    "swinv2": {"embed_dim": 8, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": (4, 3, 2, 2)},
    "vit": {"embed_dim": 16, "depths": (4,), "num_heads": (2,), "image_size": 64, "layer_scale_init": 0.1},
}


def small(encoder: str, backend: Any = "torch", dtype: torch.dtype = torch.float64, **fields: Any) -> Backbone:
    """A backbone with no two parameters alike."""
    backbone = Backbone(BackboneConfig(encoder=encoder, **{**SMALL[encoder], **fields}), backend)  # type: ignore[arg-type]
    return scattered(backbone.to(dtype))


def scattered(backbone: Backbone) -> Backbone:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.dim() == 1))
    return backbone


def picture(height: int, width: int, size: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(2), dtype=dtype)


def assert_same_maps(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


# -- timm's own models


def timm_model(encoder: str) -> nn.Module:
    """timm's class of the shape of ``tiny``, for 112 pixels and windows of 7."""
    if encoder == "vit":
        return Beit(
            img_size=112, patch_size=16, embed_dim=32, depth=3, num_heads=4, init_values=0.1, num_classes=0,
            use_abs_pos_emb=False, use_shared_rel_pos_bias=True, global_pool="token",
        )  # fmt: skip
    shape: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4), "num_classes": 0}
    if encoder == "swinv2":
        shape["pretrained_window_sizes"] = (4, 4, 4, 2)
        return SwinTransformerV2(img_size=112, patch_size=4, window_size=7, **shape)
    return SwinTransformer(img_size=112, patch_size=4, window_size=7, **shape)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_maps_are_timms_with_other_windows_and_images(encoder: str, tmp_path: Path) -> None:
    """From a pre-trained model at 64 pixels and windows of 4. The third merging is of an odd map."""
    model = randomised(tiny(encoder), dtype=torch.float64)
    path = save_weights(model, tmp_path / "pretrained.safetensors")
    change: dict[str, Any] = {"window_size": 7} if encoder != "vit" else {"pyramid": False, "out_indices": (0, 1, 2)}
    backbone = create_backbone(None, image_size=112, weights=path, backend="torch", **change).double()
    load_weights(backbone, path)  # once more, now that it is float64
    theirs = timm_model(encoder).double().eval()
    tensors = read_tensors(save_weights(backbone, tmp_path / "timm.safetensors", layout="timm"))[1]
    result = theirs.load_state_dict(tensors, strict=False)
    assert {name.partition(".")[0] for name in result.missing_keys} <= {"norm"}
    assert not result.unexpected_keys
    image = picture(112, 112)
    assert_same_maps(backbone.eval()(image), theirs.forward_intermediates(image, intermediates_only=True))


# -- a plain computation


def plain_attention(x: Tensor, weights: dict[str, Tensor], heads: int, window: int, shift: int) -> Tensor:
    """Every token with every other, and nothing where a window or the seam of the shift lies between them."""
    _, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1], x.shape[2]
    y, z = (part.flatten() for part in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    v, u = (y - shift) % rows, (z - shift) % columns  # where the shift takes them
    inside = torch.ones(len(y), len(y), dtype=torch.bool)
    for place, moved in ((y, v), (z, u)):
        inside &= (moved[:, None] // window == moved // window) & ((place < shift)[:, None] == (place < shift))
    down, right = (moved[:, None] - moved + window - 1 for moved in (v, u))
    index = (down * (2 * window - 1) + right).clamp(0, (2 * window - 1) ** 2 - 1)  # those outside are not used
    bias = weights["relative_position_bias_table"][index].permute(2, 0, 1)
    q, k, values = (
        part.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in F.linear(x, weights["qkv.weight"], weights["qkv.bias"]).chunk(3, -1)
    )
    logits = q @ k.transpose(-2, -1) * (channels // heads) ** -0.5 + bias
    out = logits.masked_fill(~inside, -torch.inf).softmax(-1) @ values
    out = out.transpose(1, 2).flatten(2).unflatten(1, (rows, columns))[:, :height, :width]
    return F.linear(out, weights["proj.weight"], weights["proj.bias"])


def plain_maps(backbone: Backbone, image: Tensor) -> list[Tensor]:
    """Swin's stages from the weights alone."""
    config, state = backbone.config, backbone.encoder.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    image = F.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))
    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    maps = []
    for stage, depth in enumerate(config.depths):
        window, use_shift, _ = config.window_of(stage)
        for number in range(depth):
            name = f"layers.{stage}.blocks.{number}"
            free = config.shift_covered or min(x.shape[1:3]) > window
            shift = window // 2 if use_shift and number % 2 and free else 0
            own = {key.removeprefix(f"{name}.attn."): state[key] for key in state if key.startswith(f"{name}.attn.")}
            x = x + plain_attention(norm(x, f"{name}.norm1"), own, config.num_heads[stage], window, shift)
            x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        maps.append(x.permute(0, 3, 1, 2))
        if stage < len(config.depths) - 1:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            parts = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = linear(
                norm(torch.cat(parts, -1), f"layers.{stage}.downsample.norm"), f"layers.{stage}.downsample.reduction"
            )
    return maps


@pytest.mark.parametrize(
    ("hw", "fields"),
    [
        ((65, 101), {}),
        ((65, 101), {"use_shift": (True, False, True, False)}),
        ((65, 101), {"window_size": (5, 9, 3, 1)}),  # 9 covers the second map's 9 rows
        ((30, 75), {"window_size": 6}),  # larger than the late maps
        ((3, 5), {"window_size": 2}),  # less than a patch
        ((65, 101), {"window_size": (5, 9, 3, 3), "shift_covered": True}),
        ((30, 75), {"window_size": 6, "shift_covered": True}),
    ],
    ids=["odd", "some-unshifted", "covered", "smaller-than-windows", "tiny", "covered-shifted", "smaller-shifted"],
)
def test_sizes_that_nothing_divides(hw: tuple[int, int], fields: dict[str, Any]) -> None:
    backbone = small("swin", **fields).eval()
    image = picture(*hw)
    maps = backbone(image)
    assert [tuple(x.shape[2:]) for x in maps] == [tuple(-(-side // s) for side in hw) for s in backbone.strides]
    assert_same_maps(maps, plain_maps(backbone, image))


def test_a_shift_matters_only_where_it_is_used() -> None:
    """That the plain computation would notice: shifted maps are others."""
    image = picture(64, 64)
    one = small("swin", window_size=4)(image)
    other = small("swin", window_size=4, use_shift=False)(image)
    assert not torch.allclose(one[0], other[0])
    covered = small("swin", window_size=16)(image)
    assert torch.equal(covered[0], small("swin", window_size=16, use_shift=False)(image)[0])
    always = small("swin", window_size=16, shift_covered=True)(image)
    assert not torch.allclose(always[0], covered[0])


@pytest.mark.parametrize("hw", [(64, 64), (65, 101), (5, 97), (1, 1)])
def test_pyramid_of_a_vit_ends_with_the_image(hw: tuple[int, int]) -> None:
    """And each level is what its convolutions give of the whole patches, the norm between two of them over channels."""
    backbone = small("vit").eval()
    image = picture(*hw)
    maps = backbone(image)
    sizes = [tuple(-(-side // stride) for side in hw) for stride in (4, 8, 16, 32)]
    assert (backbone.strides, [tuple(x.shape[2:]) for x in maps]) == ((4, 8, 16, 32), sizes)
    blocks = [x.permute(0, 3, 1, 2) for x in backbone.encoder.maps_of(image)]
    state = backbone.state_dict()

    def enlarged(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, state[f"pyramid.{name}.weight"], state[f"pyramid.{name}.bias"], stride=2)

    first = enlarged(blocks[0], "0.0").movedim(1, -1)
    first = F.layer_norm(first, first.shape[-1:], state["pyramid.0.1.weight"], state["pyramid.0.1.bias"], 1e-6)
    expected = [
        enlarged(F.gelu(first.movedim(-1, 1)), "0.3"),
        enlarged(blocks[1], "1"),
        blocks[2],
        F.max_pool2d(blocks[3], 2, ceil_mode=True),
    ]
    assert_same_maps(maps, [x[:, :, :h, :w] for x, (h, w) in zip(expected, sizes, strict=True)])


# -- the same as in pre-training


@pytest.mark.parametrize("encoder", ENCODERS)
def test_last_map_is_what_pre_training_encodes(encoder: str) -> None:
    model = randomised(tiny(encoder), dtype=torch.float64)
    shape = BackboneConfig.from_pretraining(model.config, norm="last", pyramid=False)
    backbone = Backbone(shape, "torch").double().eval()
    state = model.encoder.state_dict()
    del state["mask_token"]
    backbone.encoder.load_state_dict(state)
    image = picture(64, 64)
    assert torch.equal(backbone(image)[-1].flatten(2).transpose(1, 2), model.encode(image))


def test_swinv2_measures_new_windows_by_those_of_pre_training() -> None:
    attention = small("swinv2", window_size=7, pretrained_window_size=4).encoder.layers[0].blocks[0].attn
    narrow = small("swinv2", window_size=4).encoder.layers[0].blocks[0].attn
    wide = attention.bias_table().unflatten(0, (13, 13))
    torch.testing.assert_close(wide[3:10, 3:10].flatten(0, 1), narrow.bias_table(), rtol=1e-12, atol=0)


# -- every backend, and with fewer activations


def gradients(backbone: Backbone, image: Tensor) -> dict[str, Tensor]:
    backbone.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    sum(
        (x.square().mean() * (number + 1) for number, x in enumerate(backbone(image))), start=torch.zeros(())
    ).backward()
    found = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), [name for name, g in found.items() if g is None]
    return found  # type: ignore[return-value]


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-7) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=tolerance * scale + 1e-14, msg=name)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("norm", ["none", "last", "all"])
def test_no_parameter_is_without_use(encoder: str, norm: Any) -> None:
    gradients(small(encoder, norm=norm), picture(60, 68, 1))
    fewer = {"out_indices": (0, 1, 1, 2)} if encoder == "vit" else {"out_indices": (0, 2)}
    if norm != "last":
        gradients(small(encoder, norm=norm, **fewer), picture(60, 68, 1))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("choice", ["reference", "sdpa"])
def test_backends_give_the_same_maps_and_gradients(encoder: str, choice: Any) -> None:
    backbone, image = small(encoder), picture(60, 75)
    maps, expected = backbone(image), gradients(backbone, image)
    backbone.set_attention("sdpa") if choice == "sdpa" else backbone.set_backend(choice)
    assert_same_maps(backbone(image), maps)
    assert_same_gradients(gradients(backbone, image), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_kernels_give_the_same_maps_and_gradients(encoder: str) -> None:
    """In Triton's interpreter, or on a GPU."""
    fields: dict[str, Any] = {"depths": (2,), "num_heads": (1,), "embed_dim": 16, "window_size": 3}
    if encoder == "vit":
        fields |= {"image_size": 32, "pyramid": False, "out_indices": (0, 1)}
    backbone = small(encoder, **fields).to(DEVICE, EXACT)
    image = picture(20, 28, 1).to(DEVICE, EXACT)
    maps, expected = backbone(image), gradients(backbone, image)
    backbone.set_backend("triton")
    assert_same_maps(backbone(image), maps, CLOSE["rtol"])
    assert_same_gradients(gradients(backbone, image), expected, CLOSE["rtol"])
    if encoder != "vit":
        covered = small(encoder, **fields | {"window_size": 8, "shift_covered": True}).to(DEVICE, EXACT)
        maps = covered(image)
        covered.set_backend("triton")
        assert_same_maps(covered(image), maps, CLOSE["rtol"])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_changes_no_bit(encoder: str) -> None:
    backbone, image = small(encoder, drop_path_rate=0.4), picture(60, 75)
    expected = gradients(backbone, image)
    backbone.set_activation_checkpointing((0,) if encoder == "vit" else (0, 2))
    got = gradients(backbone, image)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_bf16_weights_take_fp32_images() -> None:
    backbone = small("swin", dtype=torch.bfloat16)
    exact = small("swin", dtype=torch.float32)(picture(40, 40, dtype=torch.float32))
    maps = backbone(picture(40, 40, dtype=torch.float32))
    assert {x.dtype for x in maps} == {torch.bfloat16}
    assert_same_maps([x.float() for x in maps], exact, 0.1)
