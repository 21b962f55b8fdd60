"""The gathered path computes what the plain path computes, for every encoder, guidance mode and odd shape."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgmim_fast import ModelConfig, UserError, create_model
from sgmim_fast.kernels import launch
from sgmim_fast.masking import draw_cell_mask, mask_indices, masked_cell_count, sample_rng
from sgmim_fast.models.layers import merge_neighbours
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.recipes import MODELS

ENCODERS: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4},
    "swinv2": {"embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4},
    "vit": {"embed_dim": 32, "depths": (2,), "num_heads": (2,), "layer_scale_init": 0.1},
}


def tiny(encoder: str, **fields: Any) -> ModelConfig:
    return ModelConfig(encoder=encoder, **{"image_size": (64, 96), **ENCODERS[encoder], **fields})  # type: ignore[arg-type]


def batch(
    config: ModelConfig, size: int, masked: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random image, standardised map and mask with exactly ``masked`` cells a sample."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, *config.hw, dtype=torch.float64, generator=generator)
    structure = torch.randn(size, config.structure_channels, *config.hw, dtype=torch.float64, generator=generator)
    cells = config.grid[0] * config.grid[1]
    rank = torch.rand(size, cells, generator=generator).argsort(1).argsort(1)
    return image, structure, (rank < masked).view(size, *config.grid)


def losses_and_gradients(
    model: SGMIM, backend: Any, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
    model.set_backend(backend)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # drop path
    out = model(*inputs)
    out.loss.backward()
    losses = [value.detach() for value in out if value is not None]
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_paths_agree(config: ModelConfig, size: int, masked: int) -> None:
    torch.manual_seed(0)
    model = create_model(config).double()
    with torch.no_grad():  # away from the symmetric start: zero norms would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = batch(config, size, masked)
    plain, plain_gradients = losses_and_gradients(model, "reference", inputs)
    gathered, gradients = losses_and_gradients(model, "torch", inputs)
    for a, b in zip(plain, gathered, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=0)
    seen = 0
    for name, gradient in plain_gradients.items():
        assert gradient is not None, name
        assert gradients[name] is not None, name
        scale = gradient.abs().max().item()
        seen += scale > 0  # not always: a softmax over one key has no gradient
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-9 * scale, msg=name)
    assert seen > 0.8 * len(plain_gradients)


@pytest.mark.parametrize("guidance", ["relational", "relational-visible", "none"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("size", "masked"), [(1, 4), (3, 1), (2, 5)], ids=["batch1", "one-masked", "one-visible"])
def test_gathered_equals_plain(encoder: str, guidance: Any, size: int, masked: int) -> None:
    assert_paths_agree(tiny(encoder, guidance=guidance), size, masked)


@pytest.mark.parametrize(
    ("encoder", "fields"),
    [
        ("swin", {"structure_channels": 3, "structure_loss_weight": 0.3}),
        ("swin", {"depths": (1, 1, 1), "num_heads": (1, 2, 2), "embed_dim": 16}),  # stride 16
        ("swin", {"window_size": 3}),  # does not divide the maps: padded windows
        ("swinv2", {"normalize_target_window": 7}),
        ("swinv2", {"drop_path_rate": 0.4}),
        ("vit", {"patch_size": 8}),
        ("vit", {"patch_size": 32, "layer_scale_init": None, "drop_path_rate": 0.4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_gathered_equals_plain_with_options(encoder: str, fields: dict[str, Any]) -> None:
    assert_paths_agree(tiny(encoder, **fields), 2, 4)


@settings(max_examples=12, deadline=None)
@given(
    encoder=st.sampled_from(sorted(ENCODERS)),
    rows=st.integers(1, 3),
    columns=st.integers(2, 3),
    size=st.integers(1, 3),
    data=st.data(),
)
def test_gathered_equals_plain_on_drawn_shapes(encoder: str, rows: int, columns: int, size: int, data: Any) -> None:
    masked = data.draw(st.integers(1, rows * columns - 1))
    assert_paths_agree(tiny(encoder, image_size=(32 * rows, 32 * columns)), size, masked)


def test_index_lists_from_the_loader_change_nothing() -> None:
    config = tiny("vit")
    model = create_model(config, backend="torch").double()
    image, structure, mask = batch(config, 2, 3)
    masked, visible = mask_indices(mask)
    assert model(image, structure, mask).loss == model(image, structure, mask, masked, visible).loss


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoded_tokens_agree_and_hide_masked_pixels(encoder: str) -> None:
    config = tiny(encoder)
    model = create_model(config).double().eval()
    image, _, mask = batch(config, 2, 4)
    tokens = model.encode(image, mask)
    other = image.clone()
    other[mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1).expand_as(image)] = 7.0
    torch.testing.assert_close(model.encode(other, mask), tokens, rtol=0, atol=0)
    model.set_backend("reference")
    torch.testing.assert_close(model.encode(image, mask), tokens, rtol=1e-9, atol=1e-12)
    assert tokens.shape == (2, 6 * (32 // config.stride) ** 2, config.num_features)


def test_structure_of_visible_cells_never_reaches_the_prediction() -> None:
    """The complementary mask: what must be predicted is not given."""
    config = tiny("swin")
    model = create_model(config).double().eval()
    image, structure, mask = batch(config, 2, 4)
    shown = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    pictures = model.reconstruct(image, structure, mask)
    changed = model.reconstruct(image, torch.where(shown, structure, 5.0), mask)
    assert pictures.structure is not None
    torch.testing.assert_close(changed.structure, pictures.structure, rtol=0, atol=0)
    moved = model.reconstruct(image, torch.where(shown, 5.0, structure), mask)
    assert not torch.equal(moved.structure, pictures.structure)


def test_pictures_are_what_the_loss_compares() -> None:
    config = tiny("vit")
    model = create_model(config, backend="torch").double().eval()
    image, structure, mask = batch(config, 2, 4)
    pictures = model.reconstruct(image, structure, mask)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    error = (pictures.image - image).abs()[hidden.expand_as(image)].mean()
    torch.testing.assert_close(model(image, structure, mask).image_loss, error, rtol=1e-8, atol=0)


def test_neighbours_are_merged_in_the_official_order() -> None:
    x = torch.arange(16.0).view(1, 4, 4, 1)
    merged = merge_neighbours(x)
    assert merged.shape == (1, 2, 2, 4)
    assert merged[0, 0, 0].tolist() == [0, 4, 1, 5]
    assert merged[0, 1, 0].tolist() == [8, 12, 9, 13]


@pytest.mark.parametrize("name", MODELS)
def test_named_models_have_their_published_size(name: str) -> None:
    """Encoder parameters in millions, without classifier: Swin-B 86.7, Swin-L 195.0, SwinV2-B 86.9, ViT-B 85.7."""
    with torch.device("meta"):
        model = create_model(name)
    size = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    expected = {"swin_base": 86.74, "swin_large": 195.0, "swinv2_base": 86.9, "vit_base": 85.7}
    assert size == pytest.approx(expected[name.split("_", 1)[1]], rel=2e-3)
    assert hasattr(model, "depth_encoder") == name.startswith("sgmim")


def test_initialisation() -> None:
    torch.manual_seed(0)
    swin = create_model(tiny("swin", embed_dim=32, num_heads=(1, 2, 4, 8)))
    weight = swin.encoder.layers[2].blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert swin.encoder.mask_token.std().item() > 0
    vit = create_model(tiny("vit"))
    assert vit.encoder.blocks[1].mlp.fc2.weight.abs().max().item() <= 0.02 / 2  # rescaled by 1 / sqrt(2 * 2)
    assert vit.encoder.blocks[0].gamma_1.unique().tolist() == [pytest.approx(0.1)]
    v2 = create_model(tiny("swinv2"))
    assert not v2.encoder.layers[0].blocks[0].norm1.weight.any()  # residual branches start at zero


def test_bf16_weights_take_fp32_inputs() -> None:
    config = tiny("swin")
    model = create_model(config)
    inputs = [x.float() if x.is_floating_point() else x for x in batch(config, 2, 4)]
    exact = model(*inputs).loss.item()
    out = model.bfloat16()(*inputs)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact, rel=2e-2)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"encoder": "resnet"}, "encoder 'resnet'"),
    ({"guidance": "pixel"}, "guidance 'pixel'"),
    ({"image_size": 200}, "image_size 200 must be a multiple of 32"),
    ({"image_size": 32}, "one 32-pixel cell"),
    ({"num_heads": (4, 8)}, "one entry a stage"),
    ({"num_heads": (5, 8, 16, 32)}, "does not divide its 128 channels"),
    ({"encoder": "vit"}, "one entry for ViT"),
    ({"patch_size": 8}, "encoder stride of 64"),
    ({"embed_dim": 3, "num_heads": 3}, "one entry a stage"),
    ({"embed_dim": 4, "depths": (1,), "num_heads": (1,), "patch_size": 32}, "multiple of 8"),
    ({"drop_path_rate": 1.0}, "drop_path_rate"),
    ({"normalize_target_window": 4}, "must be odd"),
    ({"layer_scale_init": 0.1}, "layer_scale_init is for the ViT"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS, ids=[message for _, message in BAD_CONFIGS])
def test_impossible_configurations_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig(**fields)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="sgmim_swin_base"):
        create_model("sgmim_swin_huge")
    with pytest.raises(UserError, match="no field windows"):
        create_model("sgmim_swin_base", windows=7)
    with pytest.raises(UserError, match="'cuda' is unknown"):
        create_model(tiny("swin"), backend="cuda")  # type: ignore[arg-type]


def test_what_is_asked_for_by_name_fails_rather_than_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)  # as outside of tests, where kernels need a GPU
    model = create_model(tiny("swin"))
    with pytest.raises(UserError, match="triton"):
        model.set_backend("triton")
    assert model.backend == "auto"


def test_wrong_inputs_are_named() -> None:
    config = tiny("swin")
    model = create_model(config, backend="torch").double()
    image, structure, mask = batch(config, 2, 4)
    with pytest.raises(UserError, match="image must be"):
        model(image[..., :64], structure, mask)
    with pytest.raises(UserError, match="mask must be bool"):
        model(image, structure, mask.float())
    with pytest.raises(UserError, match="structure must be"):
        model(image, None, mask)
    uneven = mask.clone()
    uneven[0] = False
    with pytest.raises(UserError, match="different numbers"):
        model(image, structure, uneven)
    model.set_backend("reference")
    assert model(image, structure, uneven).loss.isfinite()  # the plain path takes any mask


def test_masks_depend_on_seed_epoch_and_sample_alone() -> None:
    draws = {
        key: draw_cell_mask(sample_rng(*key, 1), (6, 6), 0.6).tobytes()
        for key in itertools.product((0, 1), (0, 1), range(8))
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[1, 0, 3] == draw_cell_mask(sample_rng(1, 0, 3, 1), (6, 6), 0.6).tobytes()


@pytest.mark.parametrize(("cells", "ratio", "count"), [(36, 0.6, 22), (49, 0.6, 30), (2, 0.5, 1), (16, 0.01, 1)])
def test_masked_cells_are_rounded_up(cells: int, ratio: float, count: int) -> None:
    assert masked_cell_count(cells, ratio) == count


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 0.95])
def test_masks_that_leave_nothing_to_learn_are_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="mask_ratio"):
        masked_cell_count(6, ratio)
