"""Exports of weights: folders that transformers loads, files and calls of timm, both compared with the model."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    BeitModel,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Model,
)
from weight_cases import ENCODERS, randomised, refuses, same, tiny

from sgmim_fast import BackboneConfig, create_model
from sgmim_fast.data.augment import finish_image
from sgmim_fast.exporting.huggingface import export_huggingface
from sgmim_fast.exporting.weights import export_timm, export_weights
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.weight_layouts import Layout
from sgmim_fast.weights import load_weights

THEIRS: dict[str, Any] = {"swin": SwinModel, "swinv2": Swinv2Model, "vit": BeitModel}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def shape(encoder: str, **changes: Any) -> Any:
    """One window in all stages, and maps larger than it."""
    size = {} if encoder == "vit" else {"image_size": 128, "window_size": 2}
    return tiny(encoder, **{**size, **changes})


def backbone_of(encoder: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Backbone:
    config = BackboneConfig.from_pretraining(shape(encoder), **changes)
    backbone = Backbone(config, backend="torch").to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.dim() == 1))
    return backbone


def image_of(*sides: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, *sides, dtype=dtype, generator=torch.Generator().manual_seed(0))


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 1e-9 if ours.dtype == torch.float64 else 1e-5 * max(1.0, float(ours.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def loaded(kind: Any, folder: Path, **options: Any) -> Any:
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert report["missing_keys"] == set()
    return model.eval()


# -- Hugging Face


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_folder_of_a_pretrained_model(tmp_path: Path, encoder: str, dtype: torch.dtype) -> None:
    model = randomised(shape(encoder), dtype=dtype)
    export = export_huggingface(model, tmp_path / "new" / "folder")
    assert {path.name for path in export.folder.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    assert THEIRS[encoder].__name__ in export.classes
    theirs = loaded(THEIRS[encoder], export.folder, add_pooling_layer=False)
    assert theirs.dtype == dtype  # as the folder says
    image = image_of(*model.config.hw, dtype=dtype)
    with torch.no_grad():
        tokens = theirs(image).last_hidden_state
        close(model.encode(image), tokens[:, 1:] if encoder == "vit" else tokens)
    other = create_model(shape(encoder)).to(dtype)
    load_weights(other.encoder, export.folder / "model.safetensors")
    assert same(other.encoder.state_dict(), model.encoder.state_dict())


def test_folder_for_masked_image_modelling(tmp_path: Path) -> None:
    model = randomised(shape("swin", guidance="none"), dtype=torch.float64)
    export = export_huggingface(model, tmp_path)
    assert export.classes == ("SwinForMaskedImageModeling", "SwinModel")
    assert "norm='all'" in export.notes[0]
    theirs = loaded(SwinForMaskedImageModeling, tmp_path)
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        patches = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)
        picture = theirs(image_of(128, 128), bool_masked_pos=patches).reconstruction
        close(model.reconstruct(image_of(128, 128), None, mask).image, picture)


BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin", {"norm": "all"}),
    "swin_all_shifted": ("swin", {"norm": "all", "window_size": 4, "shift_covered": True}),
    "swin_two_maps": ("swin", {"norm": "all", "out_indices": (1, 3)}),
    "swinv2": ("swinv2", {"image_size": 128}),
    "swinv2_other_windows": (
        "swinv2",
        {"image_size": 128, "window_size": (8, 8, 8, 4), "use_shift": (True,) * 2 + (False,) * 2},
    ),
    "swinv2_any_size": ("swinv2", {}),
    "swinv2_all_shifted": ("swinv2", {"shift_covered": True}),
    "vit": ("vit", {"pyramid": False, "out_indices": (0, 1, 2)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", BACKBONES)
def test_folder_of_a_backbone(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    encoder, changes = BACKBONES[case]
    backbone = backbone_of(encoder, dtype, **changes)
    export = export_huggingface(backbone, tmp_path)
    assert export.classes[0].endswith("Backbone")
    # AutoBackbone looks for folders on the Hub alone; the class that it takes for the configuration loads them here.
    kind = type(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path)))
    assert kind.__name__ == export.classes[0]
    theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in report["missing_keys"] if "layernorm" not in name} == set()
    image = image_of(64, 64, dtype=dtype) if encoder == "vit" else image_of(128, 160, dtype=dtype)
    with torch.no_grad():
        maps = theirs.eval()(image).feature_maps
        for ours, wanted in zip(backbone(image), maps, strict=True):
            close(ours, wanted)
    again = Backbone(backbone.config).to(dtype)
    assert load_weights(again, tmp_path / "model.safetensors", resize=False).missing == ()
    assert same(again.state_dict(), backbone.state_dict())


def test_images_are_prepared_as_in_training(tmp_path: Path) -> None:
    export_huggingface(backbone_of("swin", norm="all"), tmp_path, image_size=(64, 96))
    prepare = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 160, 3), dtype=np.uint8)
    found = prepare(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    wanted = finish_image(torch.from_numpy(pixels), False, (64, 96))
    assert found.shape == (1, 3, 64, 96)
    assert (found[0] - wanted).abs().max() < 0.02  # a level of 255, in units of the deviation


def test_notes_on_other_maps(tmp_path: Path) -> None:
    export = export_huggingface(backbone_of("swin", norm="none"), tmp_path)
    assert export.classes == ()
    assert len(export.notes) == 2
    assert "norm='all'" in export.notes[0]
    assert "ends with a norm" in export.notes[1]
    export = export_huggingface(backbone_of("vit", norm="last"), tmp_path)
    assert export.classes == ("BeitModel",)
    assert "pyramid=False" in export.notes[0]
    always = backbone_of("swin", norm="all", shift_covered=True)
    assert export_huggingface(always, tmp_path).notes[-1].startswith("SwinModel shifts no windows")
    assert "shifts windows also" in export_huggingface(backbone_of("swin", norm="all"), tmp_path).notes[-1]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["SwinBackbone"]


def test_what_transformers_cannot_hold(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def refused(model: nn.Module, *said: str, **options: Any) -> None:
        refuses(lambda: export_huggingface(model, folder, **options), *said)
        assert not folder.exists()

    refused(create_model(tiny("swin")), "one window for all stages", "(4, 4, 4, 2)")
    refused(backbone_of("swin", norm_eps=1e-6), "epsilon", "1e-06")
    refused(backbone_of("swin", use_shift=(True, False, True, True)), "stage 1 here does not")
    refused(backbone_of("swin", out_indices=(0, 1)), "whole encoder", "(0, 1)")
    refused(backbone_of("swinv2", image_size=128, window_size=(8, 4, 4, 2)), "stage 1", "name an image_size")
    refused(backbone_of("swinv2", window_size=(4, 4, 4, 2)), "image_size is needed")
    always = backbone_of("swinv2", image_size=128, window_size=(8, 8, 8, 4), shift_covered=True)
    refused(always, "stage 2", "name an image_size that reduces and shifts")
    refused(backbone_of("swinv2", pretrained_window_size=1), "windows of one token")
    refused(backbone_of("vit", norm="last"), "(64, 64)", "(96, 96)", image_size=96)
    refused(nn.Linear(2, 2), "Linear")
    (tmp_path / "file").touch()
    refuses(lambda: export_huggingface(backbone_of("swin"), tmp_path / "file"), "file: cannot be written")


# -- timm


@pytest.mark.parametrize("kind", ["model", "encoder", "last", "none"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_call_of_timm(tmp_path: Path, encoder: str, kind: str) -> None:
    path = tmp_path / "weights.safetensors"
    model: Any = randomised(tiny(encoder))
    if kind == "encoder":
        model = model.encoder
    elif kind in ("last", "none"):
        changes = {} if encoder == "vit" else {"window_size": (8, 8, 4, 2), "image_size": (128, 192)}
        model = backbone_of(encoder, norm=kind, **changes)
    export = export_timm(model, path)
    assert export.difference < 1e-4
    theirs = eval(export.call, {"timm": timm}).eval()
    image = image_of(*((128, 192) if kind in ("last", "none") and encoder != "vit" else (64, 64)), dtype=torch.float32)
    with torch.no_grad():
        if kind == "none":
            maps = theirs(image) if encoder == "vit" else [x.permute(0, 3, 1, 2) for x in theirs(image)]
            model.pyramid = None
            ours = dict(zip(model.config.out_indices, model(image), strict=True))
            for one, other in zip(ours.values(), maps, strict=True):
                close(one, other)
        else:
            tokens = theirs.forward_features(image)
            tokens = tokens[:, 1:] if encoder == "vit" else tokens.flatten(1, 2)
            close(model(image) if kind == "encoder" else model.encoder(image), tokens)


def test_call_of_timm_tells_the_epsilon(tmp_path: Path) -> None:
    backbone = backbone_of("swin", norm="last", norm_eps=1e-3)
    export = export_timm(backbone, tmp_path / "weights.safetensors", image_size=64)
    theirs = eval(export.call, {"timm": timm, "partial": partial, "torch": torch})
    assert theirs.norm.eps == 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's indexing
def test_what_timm_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    refuses(lambda: export_timm(backbone_of("swin"), path), "image_size (--image-size) is needed")
    refuses(lambda: export_timm(backbone_of("vit"), path, 96), "position table here is for (64, 64), not (96, 96)")
    refuses(lambda: export_timm(backbone_of("swin", use_shift=False), path, 64), "use_shift (False,")
    refuses(lambda: export_timm(backbone_of("swin", out_indices=(0, 1)), path, 64), "whole encoder")
    refuses(lambda: export_timm(backbone_of("swin"), tmp_path / "weights.pth", 64), ".safetensors")
    refuses(lambda: export_timm(backbone_of("swin"), path, (64, 64, 3)), "(64, 64, 3)")  # type: ignore[arg-type]
    # timm reduces windows that a map does not fill, and resizes tables on the way.
    wide = backbone_of("swin", window_size=(8, 8, 8, 8))
    refuses(
        lambda: export_timm(wide, path, 64), "timm's model differs", "8 on 4x4 tokens in stage 2", "image_size whose"
    )
    covered = backbone_of("swin", window_size=(4, 4, 4, 2), shift_covered=True)
    refuses(lambda: export_timm(covered, path, 64), "timm's model differs", "4 on 4x4 tokens in stage 2")
    # timm shifts windows differently on maps that they do not divide.
    refuses(
        lambda: export_timm(randomised(tiny("swin", window_size=5)), path), "differs from the model by", "5 on 16x16"
    )
    assert list(tmp_path.iterdir()) == []


# -- weights


@pytest.mark.parametrize("layout", ["sgmim", "simmim", "swin", "timm", "hf", "mim-depth"])
def test_weights_in_a_layout(tmp_path: Path, layout: Layout) -> None:
    model = randomised(tiny("swinv2"))
    path = export_weights(model, tmp_path / "weights.safetensors", layout)
    other = create_model(tiny("swinv2"))
    report = load_weights(other, load_file(path), strict=False)
    assert report.layout == layout
    assert same(model.state_dict(), other.state_dict(), report.loaded)
    refuses(lambda: export_weights(backbone_of("swin", out_indices=(0, 1)), path, "timm"), "whole encoder")
