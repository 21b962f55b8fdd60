"""Weights of another window or image size, and weights for backbones."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_cases import ENCODERS, randomised, refuses, refuses_to_load, same, snapshot, tiny

from sgmim_fast import BackboneConfig, create_backbone, create_model
from sgmim_fast.config import DepthConfig
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.position_tables import Resampling, resize_table
from sgmim_fast.tasks.depth import DepthTask
from sgmim_fast.tasks.finetuned import save_finetuned
from sgmim_fast.weight_layouts import Layout
from sgmim_fast.weights import load_weights, read_backbone_config, read_config, save_weights

TABLE = "relative_position_bias_table"
OTHER: dict[str, dict[str, Any]] = {"swin": {"window_size": 2}, "swinv2": {"window_size": 2}, "vit": {"image_size": 96}}


def randomise(backbone: Backbone, seed: int = 3) -> Backbone:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.dim() == 1))
    return backbone.eval()


def backbone_of(encoder: str, **overrides: Any) -> Backbone:
    if isinstance(window := overrides.get("window_size"), int):
        overrides["window_size"] = (window,) * 4
    return Backbone(BackboneConfig.from_pretraining(tiny(encoder), **overrides), backend="torch")


# -- position tables of another size


@pytest.mark.parametrize("resize", [True, "bicubic", "geometric"])
@pytest.mark.parametrize("encoder", ["swin", "vit"])
def test_tables_are_resized_when_asked(encoder: str, resize: bool | Resampling) -> None:
    source = randomised(tiny(encoder))
    model = randomised(tiny(encoder, **OTHER[encoder]), seed=2)
    report = load_weights(model.encoder, source.encoder.state_dict(), resize=resize)
    how = resize if isinstance(resize, str) else {"swin": "bicubic", "vit": "geometric"}[encoder]
    assert set(report.resized) == {
        key for key in report.loaded if key.endswith(TABLE) and not key.startswith("layers.3")
    }
    assert len(report.resized) == (1 if encoder == "vit" else 6)  # the last stage's map has two tokens a side in both
    old, new = ((4, 4), (6, 6)) if encoder == "vit" else ((4, 4), (2, 2))
    theirs = source.encoder.state_dict()
    for key, tensor in model.encoder.state_dict().items():
        wanted = resize_table(theirs[key], old, new, how) if key in report.resized else theirs[key]
        assert torch.equal(tensor, wanted), key


def test_swin_v2_needs_no_resizing() -> None:
    source = randomised(tiny("swinv2"))
    model = randomised(tiny("swinv2", **OTHER["swinv2"]), seed=2)
    state = source.encoder.state_dict()
    state["layers.0.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
    report = load_weights(model.encoder, state)
    assert report.resized == ()
    assert report.unused == ("layers.0.blocks.0.attn.relative_coords_table",)
    assert same(source.encoder.state_dict(), model.encoder.state_dict())


@pytest.mark.parametrize("encoder,option", [("swin", "window_size"), ("vit", "image_size")])
def test_pretraining_models_resize_nothing_unasked(encoder: str, option: str) -> None:
    state = randomised(tiny(encoder)).state_dict()
    model = create_model(tiny(encoder, **OTHER[encoder]))
    for target, source in ((model, state), (model.encoder, create_model(tiny(encoder)).encoder.state_dict())):
        refuses_to_load(target, source, f"file's {option}", "resize=True")
    refuses(lambda: load_weights(model, state, resize="nearest"), "'nearest'", "bicubic, geometric")  # type: ignore[arg-type]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_same_size_is_exact(tmp_path: Path, encoder: str) -> None:
    """Also after another window was in use: a file of the first size is not touched."""
    path = save_weights(randomised(tiny(encoder)), tmp_path / "weights.safetensors")
    first, second = backbone_of(encoder), backbone_of(encoder)
    load_weights(first, path)
    load_weights(backbone_of(encoder, **OTHER[encoder]), path)
    for report in (load_weights(second, path), load_weights(second, path)):
        assert report.resized == ()
    assert same(first.encoder.state_dict(), second.encoder.state_dict())


def test_map_of_a_vit_that_is_not_square(tmp_path: Path) -> None:
    """Its table's rows do not tell the sides; a file of ours does."""
    source = randomised(tiny("vit", image_size=(64, 96)))
    path = save_weights(source, tmp_path / "weights.safetensors", "timm")
    backbone = backbone_of("vit", image_size=96)
    load_weights(backbone, path)
    table = source.encoder.rel_pos_bias.relative_position_bias_table
    assert torch.equal(
        backbone.encoder.rel_pos_bias.relative_position_bias_table, resize_table(table, (4, 6), (6, 6), "geometric")
    )
    turned = backbone_of("vit", image_size=(96, 64))  # as many rows, another table
    assert load_weights(turned, path).resized == ("encoder.rel_pos_bias.relative_position_bias_table",)
    message = refuses_to_load(create_model(tiny("vit", image_size=(96, 64))).encoder, path, "resize=True")
    assert "(4, 6) tokens" in message
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(path), bare)
    refuses(lambda: load_weights(backbone, bare), "does not tell", "image_size")


def test_backbones_resize_unless_told_not_to() -> None:
    for encoder, option in (("swin", "window_size"), ("vit", "image_size")):
        state = randomised(tiny(encoder)).encoder.state_dict()
        backbone = backbone_of(encoder, **OTHER[encoder])
        before = snapshot(backbone)
        refuses(partial(load_weights, backbone, state, resize=False), f"file's {option}", "resize=True")
        assert same(before, backbone.state_dict())
        assert all(name.endswith(TABLE) for name in load_weights(backbone, state).resized)


def test_heads_are_not_resized() -> None:
    state = randomised(tiny("swin", num_heads=(2, 2, 2, 2))).encoder.state_dict()
    refuses(lambda: load_weights(backbone_of("swin"), state), "layers.2.blocks.0.attn.relative_position_bias_table is")


# -- backbones


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "swin": ("sgmim", "simmim", "swin", "timm", "hf", "mim-depth"),
    "swinv2": ("sgmim", "simmim", "swin", "timm", "hf", "mim-depth"),
    "vit": ("sgmim", "simmim", "timm", "hf"),
}


@pytest.mark.parametrize("norm", ["none", "last", "all"])
@pytest.mark.parametrize("encoder,layout", [(e, a) for e in ENCODERS for a in LAYOUTS[e]])
def test_pretrained_weights_into_backbone(tmp_path: Path, encoder: str, layout: Layout, norm: str) -> None:
    model = randomised(tiny(encoder))
    path = save_weights(model, tmp_path / "weights.safetensors", layout)
    backbone = randomise(backbone_of(encoder, norm=norm))
    before = snapshot(backbone)
    report = load_weights(backbone, path)
    assert (report.layout, report.encoder, report.resized) == (layout, encoder, ())
    own = {name for name in before if name.startswith("encoder.")}
    assert set(report.loaded) == own
    assert set(report.missing) == before.keys() - own
    after = backbone.state_dict()
    assert same(before, after, report.missing)
    for name in report.loaded:
        assert torch.equal(after[name], model.state_dict()[name]), name
    if norm == "last" and encoder != "vit":
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(backbone(image)[-1].flatten(2).transpose(1, 2), model.encode(image))


@pytest.mark.parametrize("norm", ["none", "all"])
@pytest.mark.parametrize("outputs", [None, (0, 1)])
@pytest.mark.parametrize("encoder,layout", [(e, a) for e in ENCODERS for a in LAYOUTS[e] if a != "simmim"])
def test_backbone_round_trip(
    tmp_path: Path, encoder: str, layout: Layout, outputs: tuple[int, ...] | None, norm: str
) -> None:
    changes = {} if outputs is None else {"out_indices": outputs, "pyramid": False}
    backbone = randomise(backbone_of(encoder, norm=norm, **changes))
    path = save_weights(backbone, tmp_path / "weights.safetensors", layout)
    config = read_backbone_config(path)
    assert config == backbone.config
    assert read_config(path) is None
    other = Backbone(config)
    report = load_weights(other, path, resize=False)
    assert report.unused == ()
    kept = layout == "sgmim" or layout == "mim-depth" or (layout == "hf" and encoder == "swin")
    lost = {name for name in backbone.state_dict() if not name.startswith("encoder.")}
    assert set(report.missing) == (set() if kept else lost)
    assert same(backbone.state_dict(), other.state_dict(), report.loaded)
    if layout == "sgmim":
        other = Backbone(config)
        other.load_state_dict(load_file(path))  # whole, under its own names


def test_what_a_backbone_ends_before_is_not_asked_for() -> None:
    model = randomised(tiny("swin"))
    backbone = backbone_of("swin", out_indices=(0, 2))
    state = model.encoder.state_dict()
    report = load_weights(backbone, state)
    unused = {name for name in state if name.startswith(("layers.3.", "layers.2.downsample.", "norm."))}
    assert set(report.unused) == unused | {"mask_token"}
    assert report.missing == ()
    deeper = randomised(tiny("swin", depths=(2, 2, 4, 2))).encoder.state_dict()
    refuses(lambda: load_weights(backbone, deeper), "depths (2, 2, 4, 2)", "depths (2, 2, 2)")
    shallower = {name: tensor for name, tensor in state.items() if not name.startswith(("layers.2.", "layers.3."))}
    refuses(lambda: load_weights(backbone, shallower), "depths (2, 2))", "depths (2, 2, 2))")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_deeper_encoder_is_another_one(encoder: str) -> None:
    """Unless its end was left out: a file's first blocks alone would be another encoder, too."""
    few: dict[str, Any] = {"depths": (2, 2), "num_heads": (2, 2)}
    if encoder == "vit":
        few = {"depths": (2,)}
    state = randomised(tiny(encoder)).encoder.state_dict()
    shape = BackboneConfig.from_pretraining(tiny(encoder, **few), pyramid=False, norm="last")
    for model in (Backbone(shape), Backbone(shape).encoder):
        refuses_to_load(model, state, "build the model like the file's; out_indices leave out its end")
    shape = BackboneConfig.from_pretraining(tiny(encoder), pyramid=False, out_indices=(0, 1))
    short = Backbone(shape)
    load_weights(short, state)
    assert same(short.encoder.state_dict(), state, short.encoder.state_dict())
    load_weights(Backbone(shape).encoder, state)


def test_model_around_a_backbone() -> None:
    """As fine-tuning saves it: the backbone beside its head, and that in a trainer's module."""
    backbone = randomise(backbone_of("vit", norm="all"))
    for prefix in ("backbone.", "model.", "model.backbone."):
        state: dict[str, Tensor] = {prefix + name: tensor for name, tensor in backbone.state_dict().items()}
        other = backbone_of("vit", norm="all")
        report = load_weights(other, state | {"head.weight": torch.zeros(3)})
        assert report.unused == ("head.weight",)
        assert report.missing == ()
        assert same(backbone.state_dict(), other.state_dict())


def test_file_of_a_fine_tuned_model(tmp_path: Path) -> None:
    """It tells the backbone's shape, and so the sides of a ViT's map that is not square."""
    task = DepthTask(randomise(backbone_of("vit", norm="all", image_size=(64, 96))), DepthConfig(head_channels=8))
    path = tmp_path / "model.safetensors"
    save_finetuned(task.state_dict(), path, task.backbone.config, task.config, {})  # type: ignore[arg-type]
    assert read_backbone_config(path) == task.backbone.config
    made = create_backbone(weights=path)
    assert same(task.backbone.state_dict(), made.state_dict())
    larger = backbone_of("vit", norm="all", image_size=96)
    assert load_weights(larger, path).resized == ("encoder.rel_pos_bias.relative_position_bias_table",)


def test_layouts_that_a_backbone_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    refuses(lambda: save_weights(backbone_of("swin"), path, "simmim"), "'simmim'", "image head")
    for layout in ("swin", "mim-depth"):
        refuses(lambda name=layout: save_weights(backbone_of("vit"), path, name), f"'{layout}'", "'timm' or 'hf'")
    assert list(tmp_path.iterdir()) == []
