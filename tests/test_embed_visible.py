"""Patch embedding of the visible cells on the kernels, fused and not, against plain PyTorch."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import ModelConfig, ops, reference
from sgmim_fast.models.swin import SwinEncoder
from sgmim_fast.models.vit import ViTEncoder
from tests.kernel_cases import DEVICE, DTYPES, assert_as_exact_as_plain, same_bits, uncontiguous

pytestmark = pytest.mark.usefixtures("poisoned")

HALF = [torch.float16, torch.bfloat16]
DRAWN = settings(
    max_examples=7, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def case(
    *, batch: int = 2, grid: tuple[int, int] = (2, 2), visible: int = 2, channels: int = 3, width: int = 24,
    patch: int = 4, norm: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """Random tensors by keyword, and the other keywords."""
    cells = grid[0] * grid[1]
    tensors = {
        "image": torch.randn(batch, channels, 32 * grid[0], 32 * grid[1]),
        "weight": (0.2 * torch.randn(width, channels, patch, patch)).requires_grad_(),
        "bias": torch.randn(width, requires_grad=True),
        "mask_token": torch.randn(width, requires_grad=True),
    }
    others: dict[str, Any] = {"norm_eps": 1e-5, "visible": torch.rand(batch, cells).argsort(1)[:, :visible]}
    others["visible"] = others["visible"].to(DEVICE, torch.int32)
    if norm:
        tensors["norm_weight"] = (1 + 0.3 * torch.randn(width)).requires_grad_()
        tensors["norm_bias"] = torch.randn(width, requires_grad=True)
    else:
        others |= {"norm_weight": None, "norm_bias": None}
    return tensors, others


def on_kernels(**arguments: Any) -> Tensor:
    return ops.embed_visible(**arguments, backend="triton")


def is_fused(tensors: dict[str, Tensor], dtype: torch.dtype) -> bool:
    from sgmim_fast.kernels.embed_visible import fits_one_tile

    weight = tensors["weight"]
    return fits_one_tile(weight[0].numel(), len(weight), weight.shape[-1], dtype)


def placed(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Leaves on the device under test."""
    return {
        name: value.detach().to(DEVICE, dtype).requires_grad_(value.requires_grad) for name, value in tensors.items()
    }


def outcome(function: Any, tensors: dict[str, Tensor], others: dict[str, Any]) -> tuple[Tensor, ...]:
    """The output, and the gradients of what requires one."""
    out = function(**tensors, **others)
    wanted = [value for value in tensors.values() if value.requires_grad]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, wanted, cotangent)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("patch", "width", "norm"), [(4, 128, True), (4, 40, False), (8, 24, True), (2, 9, True)])
def test_in_one_kernel(patch: int, width: int, norm: bool, dtype: torch.dtype) -> None:
    channels = 1 if patch == 8 else 3
    tensors, others = case(batch=1, grid=(1, 2), visible=1, channels=channels, patch=patch, width=width, norm=norm)
    assert is_fused(tensors, dtype)
    assert_as_exact_as_plain(on_kernels, reference.embed_visible, tensors, others, dtype=dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_many_tiles_for_each_program(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, where the programs of the backward pass are far fewer than tiles."""
    from sgmim_fast.kernels import embed_visible, masked_tokens

    monkeypatch.setattr(embed_visible, "backward_programs", lambda tiles, channels: 3)
    monkeypatch.setattr(masked_tokens, "fill_programs", lambda tiles: 5)
    tensors, others = case(grid=(2, 3), visible=4)
    assert_as_exact_as_plain(on_kernels, reference.embed_visible, tensors, others, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("patch", "norm"), [(16, False), (16, True), (32, True), (4, True)])
def test_with_the_product_left_to_the_library(patch: int, norm: bool, dtype: torch.dtype) -> None:
    tensors, others = case(patch=patch, norm=norm, width=300 if patch == 4 else 24, batch=1 if patch == 4 else 2)
    assert not is_fused(tensors, dtype)
    assert_as_exact_as_plain(on_kernels, reference.embed_visible, tensors, others, dtype=dtype)


@DRAWN
@given(
    dtype=st.sampled_from([torch.float32, *HALF]),
    batch=st.sampled_from([1, 3]),
    grid=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]),
    channels=st.sampled_from([1, 3]),
    width=st.integers(2, 20),
    patch=st.sampled_from([2, 4, 16, 32]),
    norm=st.booleans(),
    strided=st.booleans(),
    data=st.data(),
)
def test_drawn_shapes(dtype: torch.dtype, grid: tuple[int, int], strided: bool, data: Any, **shape: Any) -> None:
    """One visible cell, all but one, or all; maps that are not square; widths of any kind."""
    cells = grid[0] * grid[1]
    visible = data.draw(st.sampled_from([1, max(1, cells - 1), cells]))
    tensors, others = case(grid=grid, visible=visible, **shape)
    if strided:
        others["visible"] = uncontiguous(others["visible"])
    assert_as_exact_as_plain(on_kernels, reference.embed_visible, tensors, others, dtype=dtype, strided=strided)


def test_no_more_than_its_cells_is_read() -> None:
    tensors, others = case(grid=(1, 2), visible=1)
    inputs = placed(tensors, torch.float16)
    usual = outcome(on_kernels, inputs, others)
    hidden = torch.ones(2, 2, dtype=torch.bool, device=DEVICE).scatter(1, others["visible"].long(), False)
    pixels = reference.upsample_mask(hidden.view(2, 1, 2), 32).unsqueeze(1)
    inputs["image"] = torch.where(pixels, torch.nan, inputs["image"])
    for mine, before in zip(outcome(on_kernels, inputs, others), usual, strict=True):
        assert torch.equal(mine, before)


def test_float32_images_beside_half_precision_weights() -> None:
    """As in training: the image is rounded where it is read."""
    tensors, others = case(batch=1, grid=(1, 2), visible=1)
    half = placed(tensors, torch.float16)
    for image in (half["image"].float(), placed(tensors)["image"]):
        mine = outcome(on_kernels, {**half, "image": image}, others)
        rounded = outcome(on_kernels, {**half, "image": image.half()}, others)
        assert all(torch.equal(a, b) for a, b in zip(mine, rounded, strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_with_a_large_common_part(dtype: torch.dtype) -> None:
    """What a norm takes out of a gradient, the part along ones and along its output, must not drown the rest."""
    tensors, others = case(grid=(1, 2), visible=1, width=48)

    def loss_near(function: Any) -> Any:
        def run(**arguments: Any) -> Tensor:
            out = function(**arguments)
            return 8 * out + 0.5 * out * out.detach()

        return run

    assert_as_exact_as_plain(
        loss_near(on_kernels), loss_near(reference.embed_visible), tensors, others, dtype=dtype, slack=2
    )


@pytest.mark.parametrize("patch", [4, 16])
@pytest.mark.parametrize("norm", [True, False])
def test_autocast_gives_the_dtypes_of_the_plain_path(norm: bool, patch: int) -> None:
    tensors, others = case(norm=norm, patch=patch)
    inputs = placed(tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        mine = outcome(on_kernels, inputs, others)
        plain = outcome(reference.embed_visible, inputs, others)
    for a, b in zip(mine, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * b.abs().max().item())


@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_an_index_out_of_range_shows_as_nan(bad: int) -> None:
    from sgmim_fast.kernels import embed_visible as kernels

    tensors, others = case()
    others["visible"][0, 1] = bad
    for dtype in (torch.float16, torch.float32):
        inputs = {name: value.detach() for name, value in placed(tensors, dtype).items()}
        out = kernels.embed_visible(**inputs, **others, dtype=dtype)
        assert out[0].isnan().any()
        assert not out[1].isnan().any()


@pytest.mark.parametrize(("norm", "strided"), [(False, False), (True, False), (True, True)])
def test_opcheck(norm: bool, strided: bool) -> None:
    from sgmim_fast.kernels import embed_visible as kernels

    tensors, others = case(batch=1, grid=(1, 2), visible=1, channels=1, width=5, norm=norm)
    inputs = placed(tensors, torch.float16)
    names = ["image", "weight", "bias", "norm_weight", "norm_bias", "mask_token"]
    image, *parameters = (uncontiguous(inputs[x]) if strided and x in inputs else inputs.get(x) for x in names)
    parameters = [None if x is None else x.detach().requires_grad_() for x in parameters]
    arguments = (image, others["visible"], *parameters, 1e-5, torch.float16)
    torch.library.opcheck(kernels.embed_visible_forward, arguments)
    parameters = [None if x is None else x.detach() for x in parameters]
    out, rstd = kernels.embed_visible_forward(image, others["visible"], *parameters, 1e-5, torch.float16)
    grad = uncontiguous(torch.randn_like(out)) if strided else torch.randn_like(out)
    torch.library.opcheck(kernels.embed_visible_backward, (grad, image, others["visible"], *parameters, rstd))


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels take float64 in the interpreter only")
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(norm: bool) -> None:
    from sgmim_fast.kernels import embed_visible as kernels

    tensors, others = case(batch=1, grid=(1, 3), visible=2, channels=1, width=5, norm=norm)
    image, visible = tensors["image"].double(), others["visible"]
    names = ["weight", "bias", *(["norm_weight", "norm_bias"] if norm else []), "mask_token"]

    def embed(weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        scale, shift, token = rest if norm else (None, None, *rest)
        arguments = (image, visible, weight, bias, scale, shift, token, 1e-5, torch.float64)
        return kernels.embed_visible_forward(*arguments)[0]

    inputs = [tensors[name].detach().double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(embed, inputs, fast_mode=True)


@pytest.mark.parametrize("patch", [4, 16])
def test_full_graph_compilation(patch: int) -> None:
    tensors, others = case(batch=1, grid=(1, 2), visible=1, width=12, patch=patch)
    inputs = placed(tensors, torch.float16)

    def embed(image: Tensor, weight: Tensor, **arguments: Any) -> Tensor:
        return on_kernels(image=image + 1, weight=2 * weight, **arguments).float().exp()

    compiled = torch.compile(embed, fullgraph=True, dynamic=False)
    eager, graph = (outcome(function, inputs, others) for function in (embed, compiled))
    for a, b in zip(eager, graph, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-2 * a.abs().max().item())


def test_same_bits_in_two_runs() -> None:
    tensors, others = case(grid=(1, 2), visible=1)
    inputs = placed(tensors, torch.float16)
    assert same_bits(lambda: outcome(on_kernels, inputs, others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoder", ["swin", "vit"])
def test_encoders_begin_as_in_the_plain_path(encoder: str, dtype: torch.dtype) -> None:
    if encoder == "vit":
        config = ModelConfig(encoder="vit", image_size=(64, 96), embed_dim=32, depths=(1,), num_heads=(2,))
    else:
        config = ModelConfig(image_size=(64, 96), embed_dim=16, depths=(1,) * 4, num_heads=(1, 2, 2, 4), window_size=2)
    model = (ViTEncoder if encoder == "vit" else SwinEncoder)(config).to(DEVICE, dtype)
    torch.nn.init.normal_(model.patch_embed.proj.bias)
    image = torch.randn(2, 3, 64, 96, device=DEVICE)
    visible = torch.tensor([[0, 4, 5], [1, 2, 3]], dtype=torch.int32, device=DEVICE)
    mask = torch.ones(2, 6, dtype=torch.bool, device=DEVICE).scatter(1, visible.long(), False).view(2, 2, 3)
    plain = model._embed(image, mask)
    for backend in ("torch", "triton"):
        out = model._embed_visible(image, visible, backend)
        assert out.dtype == plain.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)


def test_wrong_arguments_are_named() -> None:
    tensors, others = case()
    arguments = {**{name: value.detach() for name, value in placed(tensors).items()}, **others}

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            on_kernels(**{**arguments, **changes})

    refused(r"pictures must be \(B, C, H, W\)", image=arguments["image"][..., :40])
    refused(r"weight must be \(E, C=3, p, p\)", weight=arguments["weight"][:, :2])
    refused(r"with p dividing 32", weight=arguments["weight"][..., :3, :3])
    refused(r"mask_token must be \(E=24,\)", mask_token=arguments["mask_token"][:4])
    refused(r"norm_bias must be \(E=24,\)", norm_bias=arguments["norm_bias"][:4])
    refused(r"given together", norm_bias=None)
    refused(r"index must be integers", visible=others["visible"].float())
    refused(r"on meta", bias=arguments["bias"].to("meta"))
    refused(r"floating-point numbers, not torch.uint8", image=arguments["image"].to(torch.uint8))
    refused(r"no gradient to a picture", image=arguments["image"].requires_grad_())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_cells_are_named_where_reading_them_costs_nothing(backend: str) -> None:
    if DEVICE == "cuda" and backend == "triton":
        pytest.skip("reading an index list on the GPU would wait for it")
    tensors, others = case()
    for visible, message in (([[0, 4]], r"\[0, 4\); it has 0 to 4"), ([[1, 1]], "names a place twice")):
        others["visible"] = torch.tensor(visible).expand(2, -1)
        with pytest.raises(ValueError, match=message):
            ops.embed_visible(**tensors, **others, backend=backend)


def test_which_shapes_one_kernel_takes() -> None:
    from sgmim_fast.kernels.embed_visible import fits_one_tile

    for channels in (96, 128, 192, 256):  # Swin-T to Swin-L
        assert fits_one_tile(48, channels, 4, torch.bfloat16)
    assert not fits_one_tile(48, 512, 4, torch.bfloat16)
    assert not fits_one_tile(768, 768, 16, torch.bfloat16)
    assert not fits_one_tile(768, 8, 16, torch.bfloat16)  # a cell of four tokens
    assert not fits_one_tile(48, 128, 4, torch.float32)
