"""The registered models keep timm's contracts: the numbers of its own classes, and what its callers ask for."""

from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import Format
from timm.models import group_parameters
from timm.models._hub import save_for_hf
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import sgmim_fast.timm  # noqa: F401  # it registers the models
from sgmim_fast import UserError, load_weights, save_weights
from sgmim_fast.weight_files import read_tensors
from tests.test_backbone import assert_same_gradients, picture
from tests.weight_cases import randomised, refuses, tiny

NAMES = {"swin": "sgmim_swin_base", "swinv2": "sgmim_swinv2_base", "vit": "sgmim_vit_base"}
SHAPES: dict[str, dict[str, Any]] = {  # those of ``tiny``
    "swin": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4), "window_size": (4, 4, 4, 2)},
    "swinv2": {
        "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4), "window_size": (4, 4, 4, 2),
        "pretrained_window_size": (4, 4, 4, 2),
    },
    "vit": {"embed_dim": 32, "depths": (3,), "num_heads": (4,), "img_size": 64},
}  # fmt: skip
ENCODERS = tuple(SHAPES)


def make(encoder: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(NAMES[encoder], **{**SHAPES[encoder], "drop_path_rate": 0.0, **options})


def scattered(encoder: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model with no two parameters alike."""
    model = make(encoder, **options).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.dim() == 1))
    return model


def of_timm(encoder: str, ours: nn.Module, path: Path) -> Any:
    """timm's own class for 64 pixels with the weights of ours, classifier included."""
    shape = {
        key: value for key, value in SHAPES[encoder].items() if key not in ("window_size", "pretrained_window_size")
    }
    shape |= {"img_size": 64, "num_classes": 10}
    if encoder == "vit":
        (depth,) = shape.pop("depths")
        (heads,) = shape.pop("num_heads")
        theirs = Beit(
            **shape, depth=depth, num_heads=heads, init_values=0.1, use_abs_pos_emb=False, use_fc_norm=False,
            use_shared_rel_pos_bias=True,
        )  # fmt: skip
    elif encoder == "swinv2":
        theirs = SwinTransformerV2(**shape, window_size=4, pretrained_window_sizes=(4, 4, 4, 2))
    else:
        theirs = SwinTransformer(**shape, window_size=4)
    tensors = read_tensors(save_weights(ours, path / "timm.safetensors", layout="timm"))[1]
    theirs.load_state_dict(tensors)
    return theirs.double().eval()


def close(got: Any, expected: Any) -> None:
    if isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            close(a, b)
        return
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


# -- the numbers of timm's own classes


@pytest.mark.parametrize("encoder", ENCODERS)
def test_classifier_is_timms(encoder: str, tmp_path: Path) -> None:
    ours = scattered(encoder, num_classes=10)
    theirs = of_timm(encoder, ours, tmp_path)
    image = picture(64, 64)
    features = ours.forward_features(image)
    close(features, theirs.forward_features(image))
    close(ours(image), theirs(image))
    close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    for pool in ("avg", "token", "") if encoder == "vit" else ("max", "avgmax", "catavgmax", ""):
        for model in (ours, theirs):
            model.reset_classifier(0, pool)
        assert ours.global_pool == pool
        close(ours(image), theirs(image))
        assert (ours.num_features, ours.head_hidden_size) == (theirs.num_features, theirs.head_hidden_size)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_intermediates_are_timms(encoder: str, tmp_path: Path) -> None:
    ours = scattered(encoder, num_classes=10)
    theirs = of_timm(encoder, ours, tmp_path)
    image = picture(64, 64)
    for options in (
        {},
        {"norm": True},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [1], "stop_early": True},
        {"indices": (2, 0), "intermediates_only": True},
        *([{"output_fmt": "NLC"}, {"return_prefix_tokens": True, "norm": True}] if encoder == "vit" else []),
    ):
        close(ours.forward_intermediates(image, **options), theirs.forward_intermediates(image, **options))
    with pytest.raises(UserError, match="output_fmt 'NHWC' is unknown"):
        ours.forward_intermediates(image, output_fmt="NHWC")
    for keep in ({"indices": [0, 1]}, {"indices": [-1], "prune_norm": True}):
        assert ours.prune_intermediate_layers(**keep) == theirs.prune_intermediate_layers(**keep)
        close(ours(image), theirs(image))
        close(ours.forward_intermediates(image), theirs.forward_intermediates(image))
        assert ours.num_features == theirs.num_features
        assert len(list(ours.parameters())) == len(list(theirs.parameters()))


# -- maps


@pytest.mark.parametrize("encoder", ENCODERS)
def test_features_only(encoder: str) -> None:
    whole = scattered(encoder)
    net = make(encoder, features_only=True, out_indices=(0, 2)).double().eval()
    left = {name.partition(".")[2] for name in net.state_dict()}
    net.model.load_state_dict({name: value for name, value in whole.state_dict().items() if name in left})
    assert net.output_fmt == Format.NCHW
    channels, strides = net.feature_info.channels(), net.feature_info.reduction()
    assert (channels, strides) == (([32, 32], [16, 16]) if encoder == "vit" else ([24, 96], [4, 16]))
    for hw in ((64, 64), (75, 130)):
        image = picture(*hw)
        maps = net(image)
        close(maps, whole.forward_intermediates(image, [0, 2], intermediates_only=True))
        sizes = [
            (2, width, -(-hw[0] // stride), -(-hw[1] // stride))
            for width, stride in zip(channels, strides, strict=True)
        ]
        assert [tuple(x.shape) for x in maps] == sizes
    sum(x.sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert make(encoder, features_only=True).feature_info.channels() == (
        [32] * 3 if encoder == "vit" else [24, 48, 96, 192]
    )


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_segmentation_models_train_on_them(encoder: str) -> None:
    model = smp.Unet(f"tu-{NAMES[encoder]}", encoder_weights=None, in_channels=4, classes=3, **SHAPES[encoder])
    assert model.encoder.out_channels == [4, 0, 24, 48, 96, 192]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 4, 64, 96, generator=generator)
    labels = (image.sum(1) > 0).long() + (image[:, 0] > 1).long()
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(image), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# -- what training scripts ask for


@pytest.mark.parametrize("encoder", ENCODERS)
def test_checkpointing_changes_no_gradient(encoder: str) -> None:
    model, image = scattered(encoder, num_classes=3).train(), picture(48, 64)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(image).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.set_grad_checkpointing()
    assert all(stage.checkpointed for stage in model.block_stages())
    assert_same_gradients(gradients(), expected, 0)
    model.set_grad_checkpointing(False)
    assert not any(stage.checkpointed for stage in model.block_stages())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_layer_decay_and_weight_decay(encoder: str) -> None:
    model = make(encoder, num_classes=3)
    groups = [set(names) for names in group_parameters(model, model.group_matcher()).values()]
    assert sum(len(names) for names in groups) == len(list(model.parameters()))
    assert len(groups) == (5 if encoder == "vit" else 10)  # stem, blocks, norm with classifier

    def together(*names: str) -> bool:
        return any(all(any(entry.startswith(name) for entry in group) for name in names) for group in groups)

    if encoder != "vit":
        assert together("layers.1.downsample", "layers.1.blocks.1.")
        assert not together("layers.1.downsample", "layers.1.blocks.0.")
        coarse = group_parameters(model, model.group_matcher(coarse=True))
        assert len(coarse) == 6
    tables = {"vit": "rel_pos_bias.relative", "swin": "layers.0.blocks.0.attn.relative", "swinv2": "cpb_mlp.0.weight"}
    assert any(tables[encoder] in name for name in model.no_weight_decay())
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == len(groups)
    of_table = [
        group["weight_decay"]
        for group in optimizer.param_groups
        if any(
            parameter is dict(model.named_parameters())[name]
            for name in model.no_weight_decay()
            for parameter in group["params"]
        )
    ]
    assert set(of_table) == {0.0}


def test_described_as_timm_describes_its_own() -> None:
    assert timm.list_models("sgmim_*") == sorted([*NAMES.values(), "sgmim_swin_large"])
    model = make("swin")
    assert model.default_cfg is model.pretrained_cfg
    config = resolve_model_data_config(model)
    assert (config["input_size"], config["interpolation"]) == ((3, 192, 192), "bicubic")
    assert config["mean"] == (0.485, 0.456, 0.406)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for sgmim_swin_base"):
        make("swin", pretrained=True)
    with pytest.raises(UserError, match="BackboneConfig has no field attn_drop_rate"):
        make("swin", attn_drop_rate=0.1)
    with pytest.raises(UserError, match="strict_img_size must be False"):
        make("swin", strict_img_size=True)
    assert make("swin", img_size=32, window_size=4).config.window_size == (4, 4, 2, 1)
    assert make("vit", dtype=torch.bfloat16).head_drop is not None
    assert next(make("swin", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    with torch.device("meta"):
        large = timm.create_model("sgmim_swin_large", num_classes=10)
    assert large.get_classifier().in_features == large.num_features == 1536


# -- weights


@pytest.mark.parametrize("encoder", ENCODERS)
def test_own_checkpoints_come_back(encoder: str, tmp_path: Path) -> None:
    model = scattered(encoder, torch.float32, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = make(encoder, num_classes=10, checkpoint_path=tmp_path / "own.pth")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="head"):
        make(encoder, num_classes=11, checkpoint_path=tmp_path / "own.pth")
    net = make(encoder, features_only=True, checkpoint_path=tmp_path / "own.pth")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    again = make(encoder, features_only=True, checkpoint_path=tmp_path / "net.pth")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in net.state_dict().items())
    lacking = dict(list(net.state_dict().items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict(lacking)


def test_timms_own_folder_comes_back(tmp_path: Path) -> None:
    model = scattered("swin", torch.float32, num_classes=10)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = picture(64, 64, dtype=torch.float32)
    assert torch.equal(again(image), model(image))


@pytest.mark.parametrize("layout", ["sgmim", "swin", "timm"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_pre_trained_weights_are_read_by_timms_loading(encoder: str, layout: Any, tmp_path: Path) -> None:
    if encoder == "vit" and layout == "swin":
        return  # there is no such layout of it
    model = randomised(tiny(encoder, layer_scale_init=0.1) if encoder == "vit" else tiny(encoder))
    path = tmp_path / "pretrained.safetensors"
    save_weights(model if layout == "sgmim" else model.encoder, path, layout)
    image = picture(64, 64, dtype=torch.float32)
    expected = model.encode(image)
    for options in (
        {"checkpoint_path": str(path)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, "num_classes": 10},
    ):
        found = make(encoder, **options).eval().forward_features(image)
        tokens = found[:, 1:] if encoder == "vit" else found.flatten(1, 2)
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    for options in (
        {"checkpoint_path": str(path)},
        {"checkpoint_path": str(path), "out_indices": (0, 1)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
    ):
        net = make(encoder, features_only=True, **options)
        assert all(
            torch.equal(value, model.encoder.state_dict()[name.partition(".")[2]])
            for name, value in net.state_dict().items()
        )


def test_other_windows_channels_and_classifiers(tmp_path: Path) -> None:
    model = randomised(tiny("swin"))
    path = save_weights(model, tmp_path / "pretrained.safetensors")
    wide = make("swin", checkpoint_path=str(path), window_size=7, num_classes=5)
    assert wide.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == 13**2
    assert wide.layers[0].blocks[0].attn.relative_position_bias_table.std() > 0.1  # resized, not made anew
    grey = make("swin", in_chans=1, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    weight = model.encoder.state_dict()["patch_embed.proj.weight"]
    torch.testing.assert_close(grey.patch_embed.proj.weight, weight.sum(1, keepdim=True))
    assert grey(torch.randn(1, 1, 40, 50)).shape == (1, 192)

    official = {name: value for name, value in model.encoder.state_dict().items() if name != "mask_token"}
    official |= {"head.weight": torch.randn(10, 192), "head.bias": torch.randn(10)}
    torch.save({"model": official}, tmp_path / "official.pth")
    same = make("swin", num_classes=10, checkpoint_path=str(tmp_path / "official.pth"))
    assert torch.equal(same.head.fc.weight, official["head.weight"])
    overlay = {"file": str(tmp_path / "official.pth"), "num_classes": 10}
    other = make("swin", num_classes=4, pretrained=True, pretrained_cfg_overlay=overlay)
    assert other.head.fc.weight.shape == (4, 192)
    assert torch.equal(other.norm.weight, official["norm.weight"])


@pytest.mark.parametrize(
    ("encoder", "sizes", "tables"),
    [
        ("swin", {"window_size": 6}, 8),
        ("swin", {"img_size": (40, 56), "window_size": 7}, 6),
        ("swin", {"window_size": (4, 4, 3, 2)}, 2),
        ("swin", {"img_size": 96}, 0),
        ("swinv2", {"img_size": 96, "window_size": 6}, 0),
        ("vit", {"img_size": (48, 96)}, 1),
    ],
)
def test_input_size_set_later_is_as_from_the_start(
    encoder: str, sizes: dict[str, Any], tables: int, tmp_path: Path
) -> None:
    before = scattered(encoder, torch.float32)
    path = save_weights(before, tmp_path / "weights.safetensors", layout="timm")
    before.patch_embed.requires_grad_(False)
    old = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    before.set_input_size(**sizes)
    made = make(encoder, checkpoint_path=str(path), **sizes).eval()
    assert before.config == made.config == before.shape
    state = made.state_dict()
    assert state.keys() == old.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_dict().items())
    assert sum(state[name].shape != tensor.shape for name, tensor in old.items()) == tables
    assert [parameter.requires_grad for parameter in before.parameters()].count(False) == len(
        list(before.patch_embed.parameters())
    )
    assert torch.equal(before(picture(80, 112).float()), made(picture(80, 112).float()))


def test_input_size_of_swin_v2_is_timms(tmp_path: Path) -> None:
    ours = scattered("swinv2", num_classes=10)
    theirs = of_timm("swinv2", ours, tmp_path)
    ours.set_input_size(img_size=96, window_size=6)
    theirs.set_input_size(img_size=(96, 96), window_size=6)
    assert ours.config.window_size == (6, 6, 6, 3)
    close(ours(picture(96, 96)), theirs(picture(96, 96)))


def test_input_sizes_that_cannot_be_are_refused() -> None:
    model = make("swin")
    refuses(lambda: model.set_input_size(window_size=0), "window_size (0, 0, 0, 0) must be 1 or more each")
    refuses(lambda: model.set_input_size(img_size="large"), "image_size 'large' must be an integer")
    assert model.config.window_size == (4, 4, 4, 2)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = randomised(tiny("swin"))
    state = model.state_dict()
    del state["encoder.layers.1.blocks.0.mlp.fc1.weight"]
    torch.save(state, tmp_path / "part.pth")
    part = str(tmp_path / "part.pth")
    for options in (
        {"checkpoint_path": part},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": part}, "num_classes": 3},  # timm is lenient here
    ):
        refuses(
            lambda options=options: make("swin", **options),
            "1 missing: layers.1.blocks.0.mlp.fc1.weight",
        )
    whole = str(save_weights(model, tmp_path / "whole.safetensors"))
    refuses(lambda: make("swin", depths=(2, 2, 4, 2), checkpoint_path=whole), "missing", "build the model like")
    refuses(lambda: make("swin", depths=(2, 2, 1, 2), checkpoint_path=whole), "build the model like the file's")
    refuses(lambda: make("vit", checkpoint_path=whole), "build the model like the file's")
    report = load_weights(make("swin", num_classes=2), tmp_path / "whole.safetensors", strict=False)
    assert report.missing == ("head.fc.weight", "head.fc.bias")
