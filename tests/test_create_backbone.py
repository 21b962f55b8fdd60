"""Backbones by name and from files: shapes, refusals, the Hugging Face Hub's mixin, compilers, partitioned weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from sgmim_fast import Backbone, BackboneConfig, create_backbone, load_weights, save_weights
from sgmim_fast.recipes import MODELS
from tests.test_backbone import assert_same_maps, picture, small
from tests.weight_cases import ENCODERS, randomised, refuses, tiny


@pytest.mark.parametrize("name", MODELS)
def test_named_backbones_are_the_pre_trained_encoders(name: str) -> None:
    with torch.device("meta"):
        short = create_backbone(name.partition("_")[2])
        backbone = create_backbone(name)
    assert backbone.config == short.config
    expected = {
        "swin_base": ((128, 256, 512, 1024), (6, 6, 6, 6)),
        "swin_large": ((192, 384, 768, 1536), (12, 12, 12, 6)),
        "swinv2_base": ((128, 256, 512, 1024), (12, 12, 12, 6)),
        "vit_base": ((768,) * 4, (6,)),
    }[name.partition("_")[2]]
    assert (backbone.channels, backbone.config.window_size) == expected
    assert backbone.strides == (4, 8, 16, 32)
    assert backbone.config.num_features == backbone.channels[-1]


def test_windows_are_reduced_to_the_maps_of_an_image_size() -> None:
    with torch.device("meta"):
        assert create_backbone("swin_base", image_size=(480, 352), window_size=15).config.window_size == (
            15,
            15,
            15,
            11,
        )
        assert create_backbone("swin_base", window_size=30).config.window_size == (30, 30, 30, 30)
        deep = create_backbone(
            "swinv2_base", image_size=352, window_size=(22, 22, 22, 11), use_shift=(True, True, False, False)
        )
    assert deep.config.window_size == (22, 22, 22, 11)
    assert deep.config.pretrained_window_size == (12, 12, 12, 6)
    shifts = [[block.attn.shift for block in layer.blocks[:4]] for layer in deep.encoder.layers]
    assert shifts == [[0, 11], [0, 11], [0] * 4, [0, 0]]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_architecture_comes_from_a_file_of_ours(encoder: str, tmp_path: Path) -> None:
    model = randomised(tiny(encoder, image_size=(64, 96)))
    path = save_weights(model, tmp_path / "pretrained.safetensors")
    backbone = create_backbone(weights=path, norm="last", pyramid=False).eval()
    image = picture(64, 96, dtype=torch.float32)
    tokens = backbone(image)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, model.encode(image), rtol=1e-4, atol=1e-4)
    # And once more, from the file of a backbone.
    again = create_backbone(weights=save_weights(backbone, tmp_path / "backbone.safetensors")).eval()
    assert again.config == backbone.config
    assert_same_maps(again(image), backbone(image), 0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_in_use_has_no_mask_token(encoder: str, tmp_path: Path) -> None:
    model = randomised(tiny(encoder))
    path = save_weights(model, tmp_path / "pretrained.safetensors")
    shape = BackboneConfig.from_pretraining(model.config, norm="last")
    report = load_weights(Backbone(shape).encoder, path)
    assert "encoder.mask_token" in report.unused
    assert report.missing == ()


def test_swinv2_keeps_the_windows_of_the_file(tmp_path: Path) -> None:
    """Also where the architecture is named: a name stands for windows of 12, the file's were of 4."""
    shape = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4)}
    path = save_weights(randomised(tiny("swinv2")), tmp_path / "pretrained.safetensors")
    backbone = create_backbone("swinv2_base", weights=path, window_size=8, **shape)
    assert backbone.config.pretrained_window_size == (4, 4, 4, 2)
    chosen = create_backbone("swinv2_base", weights=path, pretrained_window_size=3, **shape)
    assert chosen.config.pretrained_window_size == (3, 3, 3, 3)


def test_windows_are_those_of_the_weights_unless_named(tmp_path: Path) -> None:
    """Not those that a name stands for: tables of other codes tell them, and official Swin V2's coordinates."""
    shape = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4)}
    theirs = timm.models.SwinTransformer(img_size=112, window_size=7, num_classes=0, **shape).double().eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "theirs.pth")
    image = picture(112, 112)
    backbone = create_backbone("swin_base", weights=tmp_path / "theirs.pth", **shape).double()
    assert backbone.config.window_size == (7, 7, 7, 4)  # timm reduced the last for 112 pixels
    load_weights(backbone, theirs.state_dict())
    assert_same_maps(backbone.eval()(image), theirs.forward_intermediates(image, intermediates_only=True))
    assert (
        create_backbone("swin_base", weights=tmp_path / "theirs.pth", window_size=5, **shape).config.window_size
        == (5,) * 4
    )

    v2 = SwinTransformerV2(img_size=128, window_size=8, pretrained_window_sizes=(6, 6, 6, 3), **shape)
    state = dict(v2.state_dict())
    for number, layer in enumerate(v2.layers):  # as official files have them
        state[f"layers.{number}.blocks.0.attn.relative_coords_table"] = layer.blocks[0].attn.relative_coords_table
    found = create_backbone("swinv2_base", weights=state, **shape).config
    assert (found.window_size, found.pretrained_window_size) == ((8, 8, 8, 4), (6, 6, 6, 3))

    ours = save_weights(randomised(tiny("swin")), tmp_path / "ours.safetensors")
    assert create_backbone("swin_base", weights=ours, **shape).config.window_size == (4, 4, 4, 2)
    vit = save_weights(randomised(tiny("vit", image_size=(64, 96))), tmp_path / "vit.safetensors")
    shape = {"embed_dim": 32, "depths": (3,), "num_heads": (4,)}
    assert create_backbone("vit_base", weights=vit, **shape).config.image_size == (64, 96)
    with torch.device("meta"):  # of another architecture nothing is taken
        refuses(lambda: create_backbone("swin_base", weights=vit), "holds a vit encoder", "build the model like")


def test_a_configuration_of_pre_training_is_one_too() -> None:
    config = tiny("swinv2")
    made = create_backbone(config, window_size=8).config
    assert made == BackboneConfig.from_pretraining(config, window_size=8)


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    model = randomised(tiny("swin"))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    refuses(lambda: create_backbone("swin_huge"), "backbone 'swin_huge' is unknown", "swin_base, swin_large")
    refuses(lambda: create_backbone(), "backbone is needed where no weights are given")
    refuses(lambda: create_backbone("swin_base", weights=5), "path of a file or a state dict; got int")  # type: ignore[arg-type]
    refuses(lambda: create_backbone(weights=tmp_path / "weights.pth"), "do not say which they are of", "vit_base")
    refuses(lambda: create_backbone("swin_base", windows=7), "BackboneConfig has no field windows")
    with torch.device("meta"):
        refuses(
            lambda: create_backbone("swin_base", weights=tmp_path / "weights.pth"), "build the model like the file's"
        )
    refuses(lambda: create_backbone(tmp_path / "none", weights=tmp_path / "none.safetensors"), "cannot be read")  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"encoder": "resnet"}, "encoder 'resnet'"),
    ({"norm": "first"}, "norm 'first'"),
    ({"patch_size": 0}, "patch_size 0"),
    ({"embed_dim": 1.5}, "embed_dim 1.5"),
    ({"depths": "22"}, "depths '22' must be"),
    ({"num_heads": (3, 8, 16, 32)}, "does not divide its 128 channels"),
    ({"image_size": 0}, "image_size 0"),
    ({"image_size": (1, 2, 3)}, "image_size (1, 2, 3)"),
    ({"window_size": (7, 7)}, "window_size (7, 7) must be one for all stages or have one entry a stage, 4 in all"),
    (
        {"encoder": "vit", "depths": 4, "num_heads": 4, "image_size": 64, "window_size": (7, 7)},
        "1 in all; a ViT has no windows: set window_size and use_shift to None",
    ),
    ({"window_size": (7, 7, 7, 0)}, "window_size (7, 7, 7, 0) must be 1 or more"),
    ({"window_size": True}, "window_size True"),
    ({"use_shift": (True, False)}, "use_shift (True, False) must be one for all"),
    ({"use_shift": (1, 1, 1, 1)}, "use_shift (1, 1, 1, 1) must be true or false"),
    ({"use_shift": 1}, "use_shift 1 must be true or false"),
    ({"use_shift": "yes"}, "use_shift 'yes' must be true or false"),
    ({"pretrained_window_size": (6,)}, "pretrained_window_size (6,)"),
    ({"out_indices": (3, 1)}, "out_indices (3, 1) must be ascending"),
    ({"out_indices": (1, 1)}, "out_indices (1, 1) must be ascending"),
    ({"out_indices": (1, 4)}, "must name stages from 0 to 3"),
    ({"out_indices": ()}, "out_indices ()"),
    ({"out_indices": (0, 1), "norm": "last"}, "let out_indices (0, 1) end with 3"),
    ({"encoder": "vit", "depths": 12, "num_heads": 4}, "image_size is needed for ViT"),
    ({"encoder": "vit", "image_size": 224}, "one entry for ViT"),
    (
        {"encoder": "vit", "depths": 12, "num_heads": 4, "image_size": 224, "out_indices": (3, 11)},
        "out_indices (3, 11) must be 4 for a pyramid",
    ),
    ({"encoder": "vit", "depths": 4, "num_heads": 4, "image_size": 224, "patch_size": 14}, "patch_size 14"),
    ({"layer_scale_init": 0.1}, "layer_scale_init is for the ViT"),
    ({"drop_path_rate": 1.0}, "drop_path_rate 1.0"),
    ({"drop_path_rate": "much"}, "drop_path_rate 'much' must be a number"),
    ({"norm_eps": "1e-6"}, "norm_eps '1e-6' must be a number"),
    ({"layer_scale_init": "small"}, "layer_scale_init 'small' must be a number"),
    ({"pyramid": "no"}, "pyramid 'no' must be true or false"),
    ({"shift_covered": 1}, "shift_covered 1 must be true or false"),
]


@pytest.mark.parametrize(("fields", "said"), BAD, ids=[said for _, said in BAD])
def test_impossible_shapes_name_the_field(fields: dict[str, Any], said: str) -> None:
    refuses(lambda: BackboneConfig(**fields), said)


def test_default_outputs_of_a_vit_are_spread_evenly() -> None:
    def outputs(depth: int) -> tuple[int, ...]:
        return BackboneConfig(encoder="vit", depths=depth, num_heads=4, image_size=64).out_indices  # type: ignore[arg-type]

    assert [outputs(depth) for depth in (12, 24, 6, 2, 1)] == [
        (2, 5, 8, 11), (5, 11, 17, 23), (1, 2, 4, 5), (0, 0, 1, 1), (0, 0, 0, 0)
    ]  # fmt: skip


def test_wrong_images_are_refused() -> None:
    for shape in ((3, 64, 64), (1, 1, 64, 64)):
        refuses(lambda shape=shape: small("swin")(torch.zeros(shape)), f"image must be (B, 3, H, W); got {shape}")
    for encoder in ENCODERS:
        backbone = small(encoder)
        refuses(lambda: backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), "image is uint8", "normalised")  # noqa: B023
        refuses(lambda: backbone(torch.zeros(0, 3, 64, 64)), "image (0, 3, 64, 64) is empty")  # noqa: B023
        refuses(lambda: backbone(torch.zeros(1, 3, 0, 64)), "image (1, 3, 0, 64) is empty")  # noqa: B023
        refuses(lambda: backbone([1, 2]), "image must be a tensor (B, 3, H, W); got list")  # noqa: B023


# -- the Hub's mixin


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_folder_keeps_every_bit(encoder: str, dtype: torch.dtype, tmp_path: Path) -> None:
    backbone = small(encoder, dtype=dtype, norm="all").eval()
    backbone.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path, backend="torch")
    assert again.config == backbone.config
    image = picture(60, 75, dtype=dtype)
    assert_same_maps(again(image), backbone(image), 0)
    assert "sgmim_fast" in (tmp_path / "README.md").read_text()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    small("swin").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    for text, said in (
        (path.read_text()[:40], "is no configuration of a backbone"),
        ("[1]", "is no configuration of a backbone"),
        (json.dumps(whole | {"window_size": "big"}), "window_size 'big'"),
        (json.dumps(whole | {"drop_path_rate": "much"}), "is no configuration of a backbone"),
        (json.dumps(whole | {"windows": 7}), "no field windows"),
    ):
        path.write_text(text)
        refuses(lambda: Backbone.from_pretrained(tmp_path), str(path), said)
    path.write_text(json.dumps(whole | {"embed_dim": 16}))
    weights = tmp_path / "model.safetensors"
    refuses(lambda: Backbone.from_pretrained(tmp_path), f"{weights}: does not fit config.json", "another shape")
    path.write_text(json.dumps(whole | {"out_indices": [0, 1]}))
    refuses(lambda: Backbone.from_pretrained(tmp_path), f"{weights}: does not fit config.json", "encoder.layers.1.down")
    path.write_text(json.dumps(whole))
    weights.write_bytes(weights.read_bytes()[:500])
    refuses(lambda: Backbone.from_pretrained(tmp_path), f"{weights}: is damaged")
    weights.unlink()
    refuses(lambda: Backbone.from_pretrained(tmp_path), f"{weights}: cannot be read")
    refuses(lambda: Backbone.from_pretrained(tmp_path, window_size=5), "no option window_size", "the folder's")
    path.unlink()
    refuses(lambda: Backbone.from_pretrained(tmp_path), f"{path}: cannot be read")
    refuses(lambda: Backbone.from_pretrained(tmp_path / "none"), f"{tmp_path / 'none'}: is no folder")


def test_a_copy_of_the_hub_is_read_as_a_folder_is(tmp_path: Path) -> None:
    """From the Hub's own cache, without a connection."""
    backbone = small("swin", dtype=torch.float64).eval()
    commit = "0" * 40
    cached = tmp_path / "models--me--backbone"
    backbone.save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    where: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    again = Backbone.from_pretrained("me/backbone", **where)
    assert_same_maps(again(picture(40, 52)), backbone(picture(40, 52)), 0)
    path = cached / "snapshots" / commit / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": 7}))
    refuses(lambda: Backbone.from_pretrained("me/backbone", **where), str(path), "no field windows")
    refuses(lambda: Backbone.from_pretrained("me/other", **where), "me/other: is no folder")


# -- compilers, and weights in parts


FEW: dict[str, dict[str, Any]] = {
    "swin": {"depths": (2, 1), "num_heads": (1, 2), "window_size": (4, 3)},
    "swinv2": {"depths": (2, 1), "num_heads": (1, 2), "window_size": (4, 3)},
    "vit": {"depths": (2,), "num_heads": (2,)},
}


class Sums(torch.nn.Module):
    """A backbone with one number at its end."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([x.square().mean() for x in self.backbone(image)]).sum()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_compiled_in_one_graph(encoder: str) -> None:
    torch._dynamo.reset()
    model = Sums(small(encoder, norm="all", **FEW[encoder]))
    image = picture(60, 75, 1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-9, atol=0)
    compiled(image).backward()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_exported_program_gives_the_same_maps(encoder: str) -> None:
    backbone = small(encoder, **FEW[encoder]).eval()
    image = picture(60, 75, 1)
    exported = torch.export.export(backbone, (image,))
    assert_same_maps(exported.module()(image), backbone(image))


PARTITIONED = """
import json, os, sys
import deepspeed, torch
from deepspeed.ops import __compatible_ops__
__compatible_ops__["deepspeed_shm_comm"] = False  # is built when it is first asked for, and not needed
from tests.test_backbone import picture, small
from tests.test_create_backbone import Sums

losses = {}
for encoder in ("swin", "swinv2", "vit"):
    for stage in (1, 3):
        torch.manual_seed(0)
        backbone = small(encoder, norm="all", dtype=torch.float32)
        backbone.set_activation_checkpointing((0,))
        model = Sums(backbone)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True,
        })[0]
        for size in ((60, 75), (41, 64)):
            loss = engine(picture(*size, dtype=torch.float32))
            engine.backward(loss)
            engine.step()
            losses.setdefault(f"{encoder}-{stage}", []).append(loss.item())
print(json.dumps(losses))
"""


def test_partitioned_parameters_give_the_same_losses() -> None:
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PARTITIONED], capture_output=True, text=True, timeout=300, env=environment,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    for encoder in ENCODERS:
        assert losses[f"{encoder}-3"] == pytest.approx(losses[f"{encoder}-1"], rel=1e-5)
        assert losses[f"{encoder}-1"][0] != losses[f"{encoder}-1"][1]
