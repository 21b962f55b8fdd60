"""Weights in and out: every layout, what official files carry beside them, and timm's own models."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from weight_cases import ENCODERS, randomised, refuses_to_load, same, snapshot, tiny, write_official

from sgmim_fast import ModelConfig, create_model
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.weight_layouts import Layout
from sgmim_fast.weights import LoadReport, load_weights, read_config, save_weights

GOLDEN = Path(__file__).parent / "golden"
SWIN_ALONE = ("swin", "mim-depth")
CASES = [(e, a) for e in ENCODERS for a in get_args(Layout) if e != "vit" or a not in SWIN_ALONE]


# -- round trips


@pytest.mark.parametrize("encoder,layout", CASES)
def test_round_trip_is_exact(tmp_path: Path, encoder: str, layout: Layout) -> None:
    model = randomised(tiny(encoder))
    path = save_weights(model, tmp_path / "weights.safetensors", layout)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # as readable as any new file

    config = read_config(path)
    assert config is not None
    other = create_model(config)  # from the file alone
    whole = layout in ("sgmim", "simmim") or (layout == "hf" and encoder != "vit")
    target: nn.Module = other if whole else other.encoder
    report = load_weights(target, path)

    optional = () if layout in ("sgmim", "simmim", "hf") else ("mask_token",)
    assert (report.layout, report.encoder, report.missing, report.unused) == (layout, encoder, optional, ())
    assert {*report.loaded, *report.missing} == set(target.state_dict())
    renamed = {"decoder.0.weight": "img_decoder.0.weight", "decoder.0.bias": "img_decoder.0.bias"}
    source = model.state_dict() if target is other else model.encoder.state_dict()
    for key in report.loaded:
        assert torch.equal(target.state_dict()[key], source[key if key in source else renamed[key]]), key
    if target is other:
        image = torch.randn(1, 3, *config.hw)
        other.set_backend("torch")
        assert torch.equal(model.encode(image), other.eval().encode(image))


@pytest.mark.parametrize("encoder,layout", [(e, a) for e, a in CASES if a not in ("sgmim", "simmim")])
def test_encoder_alone_is_saved(tmp_path: Path, encoder: str, layout: Layout) -> None:
    model = randomised(tiny(encoder))
    whole = load_file(save_weights(model, tmp_path / "whole.safetensors", layout))
    alone = save_weights(model.encoder, tmp_path / "alone.safetensors", layout)
    tensors = load_file(alone)
    assert whole.keys() - tensors.keys() == {
        name for name in whole if "mask_token" in name or name.startswith("decoder.")
    }
    assert same(tensors, whole)
    assert not any("mask_token" in name for name in tensors)
    with safe_open(alone, framework="pt") as file:
        assert file.metadata() | {"config": ""} == {
            "format": "pt",
            "layout": layout,
            "encoder": encoder,
            "config": "",
        }


@pytest.mark.parametrize("name", ["sgmim_swin", "simmim_swin", "simmim_swinv2", "simmim_vit"])
def test_names_are_those_of_the_original_code(tmp_path: Path, name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())["parameter_shapes"]
    layout, encoder = name.split("_")
    path = save_weights(create_model(tiny(encoder)), tmp_path / "weights.safetensors", layout)  # type: ignore[arg-type]
    official = {key for key in golden if not key.startswith("encoder.depth_patch_embed.")}
    assert set(load_file(path)) == official


def test_relational_visible_keeps_its_position_table(tmp_path: Path) -> None:
    config = tiny("swin", guidance="relational-visible", image_size=(64, 96))
    model = randomised(config)
    path = save_weights(model, tmp_path / "weights.safetensors", "sgmim")
    assert read_config(path) == config
    other = create_model(config)
    load_weights(other, path)
    assert same(model.state_dict(), other.state_dict())


def test_saving_views_of_one_buffer(tmp_path: Path) -> None:
    """Training engines keep all parameters in one flat buffer."""
    model = randomised(tiny("swin"))
    want = snapshot(model)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    offset = 0
    for parameter in model.parameters():
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    assert same(want, load_file(save_weights(model, tmp_path / "weights.safetensors")))


def test_values_take_the_dtype_of_the_model() -> None:
    model, source = randomised(tiny("vit"), dtype=torch.bfloat16), randomised(tiny("vit"), seed=2)
    load_weights(model, source.state_dict())
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, source.state_dict()[key].bfloat16())


# -- official files


def official_state(model: SGMIM) -> dict[str, Tensor]:
    """The authors' parameters and buffers, among them an embedding that their code never calls."""
    state = snapshot(model)
    for part in ("proj.weight", "proj.bias", "norm.weight", "norm.bias"):
        state[f"encoder.depth_patch_embed.{part}"] = torch.ones(3)
    state["encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    state["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    state["encoder.layers.0.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
    return state


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_official_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, zipped: bool) -> None:
    model = randomised(tiny("swin"))
    state = official_state(model)
    options = {"_use_new_zipfile_serialization": zipped}
    path = write_official(tmp_path / f"ckpt_epoch_99{suffix}", state, monkeypatch, **options)
    other = create_model(tiny("swin"))
    allowed = torch.serialization.get_safe_globals()
    report = load_weights(other, str(path))
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    assert same(model.state_dict(), other.state_dict())
    assert report.source == str(path)
    assert report.layout == "sgmim"
    assert report.missing == ()
    assert set(report.unused) == state.keys() - model.state_dict().keys()
    assert len(report.unused) == 7
    assert read_config(path) is None


@pytest.mark.parametrize("wrap", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_containers(tmp_path: Path, wrap: str | None, prefix: str) -> None:
    model = randomised(tiny("vit"))
    state: dict[str, Any] = {prefix + key: value for key, value in model.state_dict().items()}
    content = state if wrap is None else {wrap: state, "epoch": 3}
    torch.save(content, tmp_path / "weights.pt")
    for source in (content, tmp_path / "weights.pt"):
        other = create_model(tiny("vit"))
        report = load_weights(other, source)
        assert same(model.state_dict(), other.state_dict())
        assert set(report.loaded) == model.state_dict().keys()


def test_safetensors_of_others(tmp_path: Path) -> None:
    model = randomised(tiny("swinv2", guidance="none"))
    path = tmp_path / "weights.safetensors"
    save_file(snapshot(model), path)
    other = create_model(tiny("swinv2", guidance="none"))
    assert load_weights(other, path).layout == "simmim"
    assert same(model.state_dict(), other.state_dict())
    assert read_config(path) is None


# -- between models with and without guidance


def test_simmim_file_into_guided_model(tmp_path: Path) -> None:
    source = randomised(tiny("swin", guidance="none"))
    path = save_weights(source, tmp_path / "weights.safetensors", "simmim")
    guided = create_model(tiny("swin"))
    message = refuses_to_load(guided, path, "missing", "depth_encoder.patch_merging_1", "more", "strict=False")
    assert message.count("depth_encoder.") <= 8

    before = snapshot(guided)
    report = load_weights(guided, path, strict=False)
    assert report.layout == "simmim"
    assert report.unused == ()
    assert {key.split(".")[0] for key in report.missing} == {"depth_encoder", "fusion_blk_img", "dep_decoder"}
    after = guided.state_dict()
    assert same(before, after, report.missing)
    assert torch.equal(after["img_decoder.0.weight"], source.state_dict()["decoder.0.weight"])
    assert same(source.encoder.state_dict(), guided.encoder.state_dict())


def test_sgmim_file_into_model_without_guidance() -> None:
    source = randomised(tiny("vit"))
    plain = create_model(tiny("vit", guidance="none"))
    report = load_weights(plain, source.state_dict())
    assert report.layout == "sgmim"
    assert {key.split(".")[0] for key in report.unused} == {"depth_encoder", "fusion_blk_img", "dep_decoder"}
    assert torch.equal(plain.state_dict()["decoder.0.bias"], source.state_dict()["img_decoder.0.bias"])
    assert same(source.encoder.state_dict(), plain.encoder.state_dict())


@pytest.mark.parametrize("guidance", ["relational", "none"])
def test_pretraining_file_into_encoder_alone(guidance: str) -> None:
    source = randomised(tiny("swinv2", guidance=guidance))
    encoder = create_model(tiny("swinv2")).encoder
    report = load_weights(encoder, source.state_dict())
    assert report.missing == ()
    assert set(report.unused) == {key for key in source.state_dict() if not key.startswith("encoder.")}
    assert same(source.encoder.state_dict(), encoder.state_dict())


def test_classifier_into_pretraining_model(tmp_path: Path) -> None:
    source = randomised(tiny("swin"))
    state = load_file(save_weights(source, tmp_path / "weights.safetensors", "swin"))
    state |= {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    model = create_model(tiny("swin"))
    refuses_to_load(model, state, "encoder.mask_token")
    before = snapshot(model)
    report = load_weights(model, state, strict=False)
    assert report.layout == "swin"
    assert set(report.unused) == {"head.weight", "head.bias"}
    heads = {"encoder", "depth_encoder", "fusion_blk_img", "img_decoder", "dep_decoder"}
    assert {key.split(".")[0] for key in report.missing} == heads
    assert [key for key in report.missing if key.startswith("encoder.")] == ["encoder.mask_token"]
    assert same(before, model.state_dict(), report.missing)
    for key in report.loaded:
        assert torch.equal(model.state_dict()[key], source.state_dict()[key])


# -- timm


def timm_model(config: ModelConfig, **options: Any) -> Any:
    shape = {"img_size": config.hw, "patch_size": config.patch_size, "embed_dim": config.embed_dim, **options}
    if config.encoder == "vit":
        beit: dict[str, Any] = {
            "use_abs_pos_emb": False,
            "use_shared_rel_pos_bias": True,
            "init_values": config.layer_scale_init,
        }
        return Beit(depth=config.depths[0], num_heads=config.num_heads[0], **beit, **shape)
    maker = SwinTransformer if config.encoder == "swin" else SwinTransformerV2
    return maker(depths=config.depths, num_heads=config.num_heads, window_size=config.window_size, **shape)


SAME_AS_TIMM: dict[str, dict[str, Any]] = {
    "square": {},
    "window_covers_map": {"window_size": 16},
    "oblong": {"image_size": (64, 96), "depths": (2, 2, 2), "num_heads": (2, 4, 4), "window_size": 2},
    # Maps of 24, 12, 6 and 3 tokens. timm completes windows after the shift and not before it, so the two agree
    # where nothing is shifted, or where the shift equals what is missing (6 tokens, window 4).
    "padded": {"image_size": 96, "depths": (1, 1, 1, 1), "window_size": 7},
    "padded_oblong": {"image_size": (64, 96), "depths": (1, 1, 1, 1), "window_size": 2},
    "padded_and_shifted": {"image_size": 96},
}
PARITY = [(e, case) for e in ("swin", "swinv2") for case in SAME_AS_TIMM] + [("vit", "square")]


@pytest.mark.parametrize("encoder,case", PARITY)
def test_tokens_equal_those_of_timm(tmp_path: Path, encoder: str, case: str) -> None:
    config = tiny(encoder, **SAME_AS_TIMM[case])
    model = randomised(config, dtype=torch.float64)
    pooling = {"global_pool": "token"} if encoder == "vit" else {}
    theirs = timm_model(config, num_classes=0, **pooling).double().eval()
    path = save_weights(model, tmp_path / "weights.safetensors", "timm")
    theirs.load_state_dict(load_file(path), strict=True)

    image = torch.randn(2, 3, *config.hw, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = theirs.forward_features(image)
        tokens = tokens[:, 1:] if encoder == "vit" else tokens.flatten(1, 2)
        torch.testing.assert_close(model.encode(image), tokens, rtol=0, atol=1e-9)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("old_names", [False, True])
def test_timm_classifier_is_read(encoder: str, old_names: bool) -> None:
    """timm's own model with its classifier; older versions saved buffers too."""
    config = tiny(encoder)
    theirs = timm_model(config, num_classes=5)
    state = theirs.state_dict()
    if old_names:
        block = "blocks.0" if encoder == "vit" else "layers.0.blocks.0"
        state[f"{block}.attn.k_bias"] = torch.zeros(config.embed_dim)
        state[f"{block}.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    model = create_model(config)
    report = load_weights(model.encoder, state)
    assert (report.layout, report.encoder, report.missing) == ("timm", encoder, ("mask_token",))
    assert set(report.unused) == {key for key in state if key.startswith("head.") or "k_bias" in key or "_index" in key}
    assert len(report.loaded) == len(state) - len(report.unused)
    norm = state["fc_norm.weight" if encoder == "vit" else "norm.weight"]
    assert torch.equal(model.encoder.norm.weight, norm)
    if encoder != "vit":
        merging = model.encoder.state_dict()["layers.1.downsample.reduction.weight"]
        assert torch.equal(merging, state["layers.2.downsample.reduction.weight"])


def test_timm_loads_the_file_itself(tmp_path: Path) -> None:
    config = tiny("swin")
    model = randomised(config)
    path = save_weights(model.encoder, tmp_path / "weights.safetensors", "timm")
    theirs: Any = timm.create_model(
        "swin_tiny_patch4_window7_224",
        checkpoint_path=str(path),
        num_classes=0,
        img_size=64,
        embed_dim=24,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=4,
    )
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = theirs.eval().forward_features(image).flatten(1, 2)
        torch.testing.assert_close(model.encode(image), tokens, rtol=1e-4, atol=1e-4)


def test_report_is_plain_data() -> None:
    model = create_model(tiny("vit"))
    report = load_weights(model, model.state_dict())
    assert report == LoadReport("state dict", "sgmim", "vit", tuple(model.state_dict()), (), ())
