"""Weights of Hugging Face's Swin, Swin V2 and BEiT: transformers' own models, in memory and in files, both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Backbone,
    Swinv2Config,
    Swinv2ForMaskedImageModeling,
    Swinv2Model,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from weight_cases import ENCODERS, randomised, refuses, refuses_to_load, same, tiny

from sgmim_fast import BackboneConfig, ModelConfig, create_model
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.weights import load_weights, save_weights

MODELS: dict[str, Any] = {"swin": SwinModel, "swinv2": Swinv2Model, "vit": BeitModel}
MASKED: dict[str, Any] = {
    "swin": SwinForMaskedImageModeling,
    "swinv2": Swinv2ForMaskedImageModeling,
    "vit": BeitForMaskedImageModeling,
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def shape(encoder: str, **changes: Any) -> ModelConfig:
    """Maps of 32, 16, 8 and 4 tokens and windows of 2 or 4: transformers refuses maps smaller than a window."""
    size = {} if encoder == "vit" else {"image_size": 128, "window_size": 4 if encoder == "swinv2" else 2}
    return tiny(encoder, **{**size, **changes})


def their_config(config: ModelConfig, **options: Any) -> Any:
    if config.encoder == "vit":
        return BeitConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depths[0],
            num_attention_heads=config.num_heads[0],
            intermediate_size=4 * config.embed_dim,
            layer_norm_eps=config.norm_eps,
            layer_scale_init_value=config.layer_scale_init or 0.0,
            **{"use_shared_relative_position_bias": True, "use_mean_pooling": False, "vocab_size": 7, **options},
        )
    kind = SwinConfig if config.encoder == "swin" else Swinv2Config
    return kind(
        image_size=config.image_size,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        **options,
    )


def randomise(model: Any) -> Any:
    """Eager attention of transformers rounds to float32; PyTorch's does not."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise + float(parameter.dim() == 1))
    return model.eval()


def image_of(side: int = 128) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


# -- out


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_transformers_loads_what_is_written(tmp_path: Path, encoder: str, whole: bool) -> None:
    config = shape(encoder)
    model = randomised(config, dtype=torch.float64)
    save_weights(model if whole else model.encoder, tmp_path / "model.safetensors", "hf")
    their_config(config).save_pretrained(tmp_path)
    theirs, report = MODELS[encoder].from_pretrained(
        tmp_path, add_pooling_layer=False, dtype=torch.float64, output_loading_info=True
    )
    assert report["missing_keys"] == set()
    name = "beit" if encoder == "vit" else encoder
    extra = {f"{name}.embeddings.mask_token"} | (set() if encoder == "vit" else {"decoder.0.weight", "decoder.0.bias"})
    assert report["unexpected_keys"] == (extra if whole else set())
    with torch.no_grad():
        tokens = theirs.eval()(image_of(config.hw[0])).last_hidden_state
        close(model.encode(image_of(config.hw[0])), tokens[:, 1:] if encoder == "vit" else tokens)


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_masked_image_modelling_is_that_of_transformers(tmp_path: Path, encoder: str) -> None:
    """Image head and mask token included: SwinForMaskedImageModeling is SimMIM."""
    config = shape(encoder, guidance="none")
    model = randomised(config, dtype=torch.float64)
    save_weights(model, tmp_path / "model.safetensors", "hf")
    their_config(config).save_pretrained(tmp_path)
    theirs, report = MASKED[encoder].from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    mask = torch.rand(2, *config.grid, generator=torch.Generator().manual_seed(1)) < 0.5
    patches = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    with torch.no_grad():
        out = theirs.eval()(image_of(), bool_masked_pos=patches.flatten(1))
        close(model.reconstruct(image_of(), None, mask).image, out.reconstruction)


# -- in


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_model_of_transformers_is_read(tmp_path: Path, encoder: str, where: str) -> None:
    config = shape(encoder)
    theirs = randomise(MODELS[encoder](their_config(config), add_pooling_layer=False))
    source: Any = theirs.state_dict()
    if where == "file":
        theirs.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    model = randomised(config, dtype=torch.float64)
    report = load_weights(model.encoder, source)
    assert (report.layout, report.encoder, report.missing, report.unused) == ("hf", encoder, ("mask_token",), ())
    with torch.no_grad():
        tokens = theirs(image_of(config.hw[0])).last_hidden_state
        close(model.encode(image_of(config.hw[0])), tokens[:, 1:] if encoder == "vit" else tokens)


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_masked_model_of_transformers_is_read(tmp_path: Path, encoder: str, where: str) -> None:
    config = shape(encoder, guidance="none")
    masked = {"use_mask_token": True, "use_mean_pooling": True} if encoder == "vit" else {}
    theirs = randomise(MASKED[encoder](their_config(config, **masked)))
    source: Any = theirs.state_dict()
    if where == "file":
        theirs.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    model = create_model(config).double()
    target: nn.Module = model.encoder if encoder == "vit" else model
    report = load_weights(target, source)
    assert report.missing == ()
    if encoder == "vit":
        assert set(report.unused) == {"lm_head.weight", "lm_head.bias"}
        with torch.no_grad():
            final = theirs.layernorm(theirs.beit(image_of(64)).last_hidden_state)
            close(model.eval().encode(image_of(64)), final[:, 1:])
    else:
        assert report.unused == ()
    # And back, under the names that transformers has in files.
    written = load_file(save_weights(model, tmp_path / "ours.safetensors", "hf"))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    if encoder == "vit":
        wanted = {name: value for name, value in wanted.items() if not name.startswith("lm_head.")}
        wanted = {f"beit.{name}" if name.startswith("layernorm.") else name: value for name, value in wanted.items()}
    assert written.keys() == wanted.keys()
    assert same(written, wanted)


@pytest.mark.parametrize("mean_pooling", [True, False])
def test_classifiers_are_read(mean_pooling: bool) -> None:
    theirs = randomise(
        BeitForImageClassification(their_config(shape("vit"), use_mean_pooling=mean_pooling, num_labels=5))
    )
    report = load_weights(create_model(shape("vit")).encoder, theirs.state_dict())
    assert (report.missing, set(report.unused)) == (("mask_token",), {"classifier.weight", "classifier.bias"})
    swin = randomise(SwinForImageClassification(their_config(shape("swin"), num_labels=5)))
    state = swin.state_dict() | {
        "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index": torch.zeros(16, 16, dtype=torch.long)
    }
    report = load_weights(create_model(shape("swin")).encoder, state)
    assert report.missing == ("mask_token",)
    assert {name.rpartition(".")[2] for name in report.unused} == {"weight", "bias", "relative_position_index"}


# -- backbones


def backbone_of(encoder: str, **changes: Any) -> Backbone:
    return Backbone(BackboneConfig.from_pretraining(shape(encoder), **changes), backend="torch").double().eval()


@pytest.mark.parametrize("where", ["memory", "file"])
def test_swin_backbone_and_its_norms(tmp_path: Path, where: str) -> None:
    theirs = randomise(SwinBackbone(their_config(shape("swin"), out_features=["stage1", "stage3", "stage4"])))
    source: Any = theirs.state_dict()
    if where == "file":
        theirs.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    backbone = backbone_of("swin", norm="all", out_indices=(0, 2, 3))
    report = load_weights(backbone, source)
    assert report.missing == ()
    assert {name.split(".")[-2] for name in report.unused} == {"layernorm"}  # dead there too
    with torch.no_grad():
        for ours, wanted in zip(backbone(image_of()), theirs(image_of()).feature_maps, strict=True):
            close(ours, wanted)
    plain = backbone_of("swin", norm="none")
    assert all("norm" in name for name in load_weights(plain, source).unused)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_swin_v2_backbone(tmp_path: Path, where: str) -> None:
    names = ["stage1", "stage2", "stage3", "stage4"]
    theirs = randomise(Swinv2Backbone(their_config(shape("swinv2"), out_features=names)))
    source: Any = theirs.state_dict()
    if where == "file":
        theirs.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    backbone = backbone_of("swinv2")
    report = load_weights(backbone, source)
    assert (report.missing, report.unused) == ((), ())
    with torch.no_grad():
        for ours, wanted in zip(backbone(image_of()), theirs(image_of()).feature_maps, strict=True):
            close(ours, wanted)


@pytest.mark.parametrize("hw", [(128, 128), (100, 64), (131, 173), (30, 21)])
@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_windows_shifted_on_every_map(encoder: str, hw: tuple[int, int]) -> None:
    """As SwinBackbone does, and Swinv2Backbone of larger images: windows of 4, maps of 4 and less."""
    kind = SwinBackbone if encoder == "swin" else Swinv2Backbone
    names = ["stage1", "stage2", "stage3", "stage4"]
    theirs = randomise(kind(their_config(shape(encoder, image_size=512, window_size=4), out_features=names)))
    backbone = backbone_of(encoder, norm="all" if encoder == "swin" else "none", window_size=4, shift_covered=True)
    load_weights(backbone, theirs.state_dict())
    image = torch.randn(2, 3, *hw, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, wanted in zip(backbone(image), theirs(image).feature_maps, strict=True):
            close(ours, wanted)


def test_backbone_of_a_segmentation_model() -> None:
    """UperNet keeps it beside its heads, under a prefix."""
    swin = their_config(shape("swin"), out_features=["stage1", "stage2", "stage3", "stage4"])
    theirs = randomise(
        UperNetForSemanticSegmentation(UperNetConfig(backbone_config=swin, hidden_size=16, num_labels=3))
    )
    backbone = backbone_of("swin", norm="all")
    report = load_weights(backbone, theirs.state_dict())
    assert report.missing == ()
    assert {name.split(".")[0] for name in report.unused} == {"decode_head", "auxiliary_head", "backbone"}
    with torch.no_grad():
        for ours, wanted in zip(backbone(image_of()), theirs.backbone(image_of()).feature_maps, strict=True):
            close(ours, wanted)


# -- what is refused


def test_half_of_queries_keys_and_values(tmp_path: Path) -> None:
    model = create_model(shape("swin"))
    state = load_file(save_weights(randomised(shape("swin")).encoder, tmp_path / "w.safetensors", "hf"))
    attention = "swin.encoder.layers.1.blocks.0.attention.self"
    for part in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            less = {name: value for name, value in state.items() if name != f"{attention}.{part}.{kind}"}
            for strict in (True, False):
                message = refuses_to_load(model.encoder, less, "2 without their companions", strict=strict)
                rest = [f"{attention}.{other}.{kind}" for other in ("query", "key", "value") if other != part]
                assert all(name in message for name in rest)
    unlike = {"key": torch.zeros(50, 48), "value": torch.zeros(46, 48)}  # as many rows in all
    for change in (unlike, {"key": torch.zeros(48, 40)}, {"key": torch.zeros(48, 48, dtype=torch.float16)}):
        changed = state | {f"{attention}.{part}.weight": value for part, value in change.items()}
        refuses_to_load(model.encoder, changed, f"{attention}.query.weight, {attention}.key.weight", "should be alike")


def test_positions_that_the_encoders_here_lack() -> None:
    model = create_model(shape("vit"))
    own = {"use_shared_relative_position_bias": False, "use_relative_position_bias": True}
    theirs = BeitModel(their_config(shape("vit"), **own))
    for state in (theirs.state_dict(), {f"beit.{name}": value for name, value in theirs.state_dict().items()}):
        refuses_to_load(model.encoder, state, "each block has a position table of its own", "3 unknown")
    theirs = BeitModel(their_config(shape("vit"), use_absolute_position_embeddings=True))
    refuses_to_load(model.encoder, theirs.state_dict(), "position_embeddings", "relative tables alone")
    swin = SwinModel(their_config(shape("swin"), use_absolute_embeddings=True))
    refuses_to_load(create_model(shape("swin")).encoder, swin.state_dict(), "embeddings.position_embeddings")


def test_other_architectures_are_named(tmp_path: Path) -> None:
    swin = create_model(shape("swin")).encoder
    deeper = SwinModel(their_config(shape("swin", depths=(2, 2, 4, 2))))
    refuses_to_load(swin, deeper.state_dict(), "depths (2, 2, 4, 2)", "depths (2, 2, 2, 2)")
    refuses_to_load(
        swin, Swinv2Model(their_config(shape("swinv2"))).state_dict(), "holds a swinv2", "has a swin encoder"
    )
    wider = SwinModel(their_config(shape("swin", embed_dim=48)))
    refuses_to_load(swin, wider.state_dict(), "embed_dim 48", "embed_dim 24")
    refuses_to_load(swin, SwinModel(their_config(shape("swin", window_size=4))).state_dict(), "resize=True")
    refuses(lambda: load_weights(swin, {"vit.embeddings.cls_token": torch.zeros(1, 1, 8)}), "first names are vit.")
    path = tmp_path / "model.safetensors"
    save_file(deeper.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    refuses(lambda: load_weights(swin, path), str(path), "is damaged")
