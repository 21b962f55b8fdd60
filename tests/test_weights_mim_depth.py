"""Weights of MIM-Depth-Estimation, and of detection and segmentation codes that name their parts alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from weight_cases import randomised, refuses_to_load, same, snapshot, tiny

from sgmim_fast import BackboneConfig, create_model
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.weights import load_weights, save_weights

# Of a block of its Swin V2, as its model's state dict has them; the last two are buffers.
BLOCK = {
    "norm1.weight",
    "norm1.bias",
    "attn.logit_scale",
    "attn.rpe_mlp.0.weight",
    "attn.rpe_mlp.0.bias",
    "attn.rpe_mlp.2.weight",
    "attn.q_bias",
    "attn.v_bias",
    "attn.qkv.weight",
    "attn.proj.weight",
    "attn.proj.bias",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
    "attn.relative_coords_table",
    "attn.relative_position_index",
}
BUFFERS = {name for name in BLOCK if "relative" in name}
EMBEDDING = {f"encoder.patch_embed.{part}" for part in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")}
MERGING = ("reduction.weight", "norm.weight", "norm.bias")


def names(buffers: bool = True) -> set[str]:
    """Of the encoder of its depth model, with two blocks a stage."""
    block = BLOCK if buffers else BLOCK - BUFFERS
    blocks = {f"encoder.layers.{s}.blocks.{b}.{name}" for s in range(4) for b in range(2) for name in block}
    mergings = {f"encoder.layers.{stage}.downsample.{name}" for stage in range(3) for name in MERGING}
    return EMBEDDING | blocks | mergings | {"encoder.norm3.weight", "encoder.norm3.bias"}


def depth_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its state dict: encoder, buffers, decoder and head."""
    found = dict(state)
    for name in names() - state.keys():
        found[name] = torch.zeros(1, 7, 7, 2) if "coords" in name else torch.zeros(16, 16, dtype=torch.long)
    for name in ("deconv_layers.0.weight", "deconv_layers.1.running_var", "conv_layers.0.weight", "conv_layers.1.bias"):
        found[f"decoder.{name}"] = torch.ones(4)
    for layer in (0, 2):
        found[f"last_layer_depth.{layer}.weight"] = torch.ones(4)
    return found


def test_names_are_those_of_its_model(tmp_path: Path) -> None:
    for guidance in ("relational", "none"):
        model = create_model(tiny("swinv2", guidance=guidance))
        assert set(load_file(save_weights(model, tmp_path / "w.safetensors", "mim-depth"))) == names(buffers=False)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_checkpoint_of_a_depth_model_is_read(tmp_path: Path, suffix: str, parallel: bool, wrapped: bool) -> None:
    source = randomised(tiny("swinv2"))
    state = depth_model(load_file(save_weights(source, tmp_path / "w.safetensors", "mim-depth")))
    content: Any = {f"module.{name}": value for name, value in state.items()} if parallel else state
    path = tmp_path / f"epoch_25_model{suffix}"
    torch.save({"model": content, "optimizer": {"state": {}}} if wrapped else content, path)
    model = create_model(tiny("swinv2"))
    report = load_weights(model.encoder, path)
    assert (report.layout, report.encoder, report.missing) == ("mim-depth", "swinv2", ("mask_token",))
    assert set(report.unused) == {name for name in state if name not in names(buffers=False)}
    own = snapshot(model.encoder)
    assert same(own, source.encoder.state_dict(), report.loaded)
    # Its decoder is no image head, whatever it is called.
    plain = create_model(tiny("swinv2", guidance="none"))
    before = snapshot(plain)
    report = load_weights(plain, path, strict=False)
    assert set(report.missing) == {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert same(before, plain.state_dict(), report.missing)


def test_pretrained_encoder_before_the_depth_model() -> None:
    """Its own pre-trained files have the old name of the position MLP and no prefix."""
    source = randomised(tiny("swinv2")).encoder.state_dict()
    state = {name.replace(".cpb_mlp.", ".rpe_mlp."): value for name, value in source.items()}
    for prefix in ("", "encoder."):
        encoder = create_model(tiny("swinv2")).encoder
        report = load_weights(encoder, {prefix + name: value for name, value in state.items()})
        assert (report.layout, report.missing, report.unused) == ("mim-depth", (), ())
        assert same(source, encoder.state_dict())


def stage_norms(state: dict[str, Tensor], width: int = 24) -> dict[str, Tensor]:
    """A norm for each stage, as backbones of Swin's detection and segmentation code have them."""
    found = {name: value for name, value in state.items() if not name.startswith(("norm.", "mask_token"))}
    for stage in range(4):
        found[f"norm{stage}.weight"] = torch.full((width * 2**stage,), 1.0 + stage)
        found[f"norm{stage}.bias"] = torch.full((width * 2**stage,), float(stage))
    return found


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_norms_of_stages_go_where_maps_are_given(encoder: str) -> None:
    state = stage_norms(randomised(tiny(encoder)).encoder.state_dict())
    whole = {f"backbone.{name}": value for name, value in state.items()} | {"decode_head.conv_seg.bias": torch.ones(3)}
    backbone = Backbone(BackboneConfig.from_pretraining(tiny(encoder), norm="all", out_indices=(0, 2, 3)))
    report = load_weights(backbone, whole)
    assert report.layout == "mim-depth"
    assert set(report.unused) == {"backbone.norm1.weight", "backbone.norm1.bias", "decode_head.conv_seg.bias"}
    assert report.missing == ()
    assert [float(backbone.state_dict()[f"out_norms.{number}.bias"][0]) for number in (0, 1)] == [0.0, 2.0]
    assert float(backbone.state_dict()["encoder.norm.bias"][0]) == 3.0
    alone = create_model(tiny(encoder)).encoder
    report = load_weights(alone, state)
    assert {name.split(".")[0] for name in report.unused} == {"norm0", "norm1", "norm2"}
    assert torch.equal(alone.norm.weight, torch.full((192,), 4.0))  # type: ignore[union-attr]


def test_another_depth_is_named() -> None:
    deeper = stage_norms(randomised(tiny("swin", depths=(2, 2, 4, 2))).encoder.state_dict())
    refuses_to_load(create_model(tiny("swin")).encoder, deeper, "depths (2, 2, 4, 2)", "depths (2, 2, 2, 2)")
    wide = stage_norms(randomised(tiny("swin", window_size=2)).encoder.state_dict())
    refuses_to_load(create_model(tiny("swin")).encoder, wide, "file's window_size", "resize=True")
