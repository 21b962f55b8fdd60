"""Programs of torch.export and ONNX: run from their files, for other batches, other models, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from weight_cases import refuses, same, snapshot, tiny

from sgmim_fast import BackboneConfig, create_model
from sgmim_fast.config import DepthConfig
from sgmim_fast.exporting import programs
from sgmim_fast.exporting.programs import export_onnx, export_program
from sgmim_fast.models.backbone import Backbone
from sgmim_fast.tasks.depth import DepthTask

SIDES = (64, 80)  # windows of 4 do not divide the maps of 20 and 10 tokens, nor mergings that of 5


def backbone_of(encoder: str, **changes: Any) -> Backbone:
    few: dict[str, Any] = {"depths": (2, 1), "num_heads": (2, 2)}
    if encoder == "vit":
        few = {"depths": (2,)}
    torch.manual_seed(0)
    return Backbone(BackboneConfig.from_pretraining(tiny(encoder, **few), norm="all", **changes)).eval()


def image_of(batch: int, sides: tuple[int, int] = SIDES) -> Tensor:
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(batch))


def run_program(path: Path, image: Tensor) -> list[Tensor]:
    outputs = torch.export.load(path).module()(image)
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def run_onnx(path: Path, image: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]


FORMATS: dict[str, tuple[Any, Any]] = {".pt2": (export_program, run_program), ".onnx": (export_onnx, run_onnx)}


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_backbone_for_any_batch(tmp_path: Path, suffix: str, encoder: str) -> None:
    export, run = FORMATS[suffix]
    backbone = backbone_of(encoder)
    before, mode = snapshot(backbone), backbone.backend
    backbone.train()
    report = export(backbone, tmp_path / f"backbone{suffix}", SIDES)
    assert backbone.training
    assert (backbone.backend, same(before, backbone.state_dict())) == (mode, True)
    assert [path.name for path in tmp_path.iterdir()] == [f"backbone{suffix}"]
    assert report.input_shape == (None, 3, 64, 80)
    assert report.difference < 1e-4
    backbone.eval()
    for batch in (1, 3):
        with torch.no_grad():
            ours, theirs = backbone(image_of(batch)), run(report.path, image_of(batch))
        assert report.output_shapes == tuple((None, *x.shape[1:]) for x in theirs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", FORMATS)
def test_fine_tuned_model_for_one_batch(tmp_path: Path, suffix: str) -> None:
    """By its predictions, and in float32 whatever it was trained in."""
    export, run = FORMATS[suffix]
    backbone = backbone_of("swin")
    task = DepthTask(backbone, DepthConfig(head="glp", head_channels=8)).eval()
    report = export(task.bfloat16(), tmp_path / f"depth{suffix}", 32, batch_size=1)
    assert (report.input_shape, report.output_shapes) == ((1, 3, 32, 32), ((1, 1, 32, 32),))
    assert next(task.parameters()).dtype == torch.bfloat16
    task.float()
    with torch.no_grad():
        wanted = task.predict(image_of(1, (32, 32)))
    torch.testing.assert_close(run(report.path, image_of(1, (32, 32)))[0], wanted, rtol=1e-5, atol=1e-4)
    with pytest.raises(Exception, match=r"2|batch|shape|size"):
        run(report.path, image_of(2, (32, 32)))


class Small(nn.Module):
    """Any module from images to a tensor, made to misbehave."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.scale, self.how = nn.Parameter(torch.tensor(2.0)), how

    def forward(self, image: Tensor) -> Any:
        if self.how == "traced apart":
            return image * (3 if torch.compiler.is_exporting() else self.scale)
        if self.how == "shaped apart":
            return image[:, :1] if torch.compiler.is_exporting() else image * self.scale
        if self.how == "infinite":
            return (image - image) / (image - image) * self.scale
        if self.how == "untraceable":
            return image * float(image.sum())
        return {"image": image * self.scale} if self.how == "names" else image * self.scale


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "how,said",
    [
        ("traced apart", "differs from the model by"),
        ("shaped apart", "the model [(2, 3, 8, 8)]"),
        ("infinite", "differs from the model by nan"),
        ("untraceable", "Small cannot be exported"),
        ("names", "not dict"),
    ],
)
def test_what_differs_is_not_written(tmp_path: Path, suffix: str, how: str, said: str) -> None:
    export, _ = FORMATS[suffix]
    path = tmp_path / f"small{suffix}"
    path.write_text("before")
    refuses(lambda: export(Small(how), path, 8), said)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_beside_an_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As models beyond 2 GiB have them."""
    monkeypatch.setattr(programs, "_LARGEST_ONNX", 0)
    layers = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)).eval()
    report = export_onnx(layers, tmp_path / "large.onnx", 8)
    assert {path.name for path in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(report.path, image_of(2, (8, 8)))[0], layers(image_of(2, (8, 8))))


def test_bad_arguments(tmp_path: Path) -> None:
    small = Small()
    refuses(lambda: export_program(small, tmp_path / "small.onnx", 8), ".pt2")
    refuses(lambda: export_onnx(small, tmp_path / "small.pt2", 8), ".onnx")
    refuses(lambda: export_program(small, tmp_path / "gone" / "small.pt2", 8), "is not a folder")
    refuses(lambda: export_program(small, tmp_path / "small.pt2", 0), "image_size 0")
    refuses(lambda: export_program(small, tmp_path / "small.pt2", 8, batch_size=0), "batch_size 0")
    model = create_model(tiny("vit"))
    refuses(lambda: export_program(model, tmp_path / "small.pt2", 64), "its encoder or a backbone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refuses(lambda: export_onnx(Small(), tmp_path / "small.onnx", 8), package, "pip install sgmim-fast[export]")
    assert list(tmp_path.iterdir()) == []
