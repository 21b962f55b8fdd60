"""Structure maps of tiny, randomly started estimators that the tests save themselves; nothing is downloaded."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sgmim_fast.data.estimation import depth_estimator
from sgmim_fast.data.estimation.depth_estimator import DepthEstimator, open_estimator, scale_to_16_bits
from sgmim_fast.data.estimation.launched_ranks import launched_rank
from sgmim_fast.data.estimation.structure_maps import Summary, make_structure_maps
from sgmim_fast.data.manifest import read_manifest
from sgmim_fast.data.reading import image_size, read_structure
from sgmim_fast.errors import UserError

transformers = pytest.importorskip("transformers", reason="the extra maps is not installed")

ROOT = Path(__file__).parents[1]
SIZES = {
    "n01/a.jpg": (40, 60),
    "n01/b.png": (60, 40),
    "n02/deep/c.JPEG": (33, 33),
    "d.jpg": (40, 60),
    "e.webp": (21, 50),
}


def enliven(model: Any, seed: int) -> Any:
    """Weights of a size that makes predictions vary; the libraries' own start is nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embedding" not in name:
                weight.normal_(0, (2 / weight[0].numel()) ** 0.5, generator=generator)
        if getattr(model.config, "depth_estimation_type", "relative") == "relative":
            list(model.head.parameters())[-1].fill_(20.0)  # keeps the last rectifier open
    return model


def dpt_config() -> Any:
    return transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        use_auxiliary_head=False,
    )


def save_dpt(folder: Path, seed: int = 0) -> Path:
    model = transformers.DPTForDepthEstimation(dpt_config())
    enliven(model, seed).save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_depth_anything(folder: Path, kind: str = "metric") -> Path:
    """Keeps the aspect ratio, so that images of different shape cannot share a batch."""
    backbone = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=1,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type=kind,
        max_depth=20,
    )
    enliven(transformers.DepthAnythingForDepthEstimation(config), 0).save_pretrained(folder)
    processor = transformers.DPTImageProcessor(
        size={"height": 42, "width": 42}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_dpt(tmp_path_factory.mktemp("dpt")))


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_depth_anything(tmp_path_factory.mktemp("depth_anything")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with images/ in which every size, format and depth of folders occurs."""
    random = np.random.default_rng(0)
    for name, size in SIZES.items():
        path = tmp_path / "data/images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return tmp_path / "data"


def make(data: Path, model: str, **options: Any) -> Summary:
    return make_structure_maps(data, data / "structure", model=model, **{"batch_size": 3, "workers": 2, **options})


def map_of(data: Path, name: str) -> Path:
    return data / "structure" / f"{os.path.splitext(name)[0]}.png"


def sidecar(data: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((data / "structure/structure_maps.json").read_text())
    return facts


def stamps(data: Path) -> dict[str, int]:
    return {name: map_of(data, name).stat().st_mtime_ns for name in SIZES if map_of(data, name).exists()}


@pytest.mark.parametrize("kind", ["dpt", "depth_anything"])
def test_values_are_the_models_own(
    kind: str, data: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    """Batched and threaded, against one image at a time with nothing but the library."""
    folder = request.getfixturevalue(kind)
    steps: list[tuple[int, int]] = []
    capfd.readouterr()
    summary = make(data, folder, progress=lambda done, total: steps.append((done, total)))
    assert capfd.readouterr() == ("", "")  # neither library says a word
    assert (summary.made, summary.kept, summary.failed, summary.failures_file) == (5, 0, 0, None)
    assert steps == [(done, 5) for done in range(6)]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForDepthEstimation.from_pretrained(folder).eval()
    for name, (height, width) in SIZES.items():
        image = Image.open(data / "images" / name).convert("RGB")
        with torch.no_grad():
            predicted = model(**processor(images=image, return_tensors="pt")).predicted_depth[:, None]
        full = torch.nn.functional.interpolate(predicted, (height, width), mode="bilinear")[0, 0].double().numpy()
        span = full.max() - full.min()
        assert span > 1e-2 * abs(full).max()
        expected = 65535 * (full - full.min()) / span
        with Image.open(map_of(data, name)) as picture:
            assert picture.mode == "I;16"
            values, notes = np.asarray(picture).astype(np.float64), picture.info
        assert values.shape == (height, width)
        assert (values.min(), values.max()) == (0, 65535)
        assert abs(values - expected).max() < 3
        low, high = float(notes["sgmim:minimum"]), float(notes["sgmim:maximum"])
        assert np.allclose(low + values / 65535 * (high - low), full, atol=1e-4 * span)


def test_maps_pair_with_their_images_as_stored(data: Path, dpt: str) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter when shown
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 70, 3), np.uint8)).save(
        data / "images/turned.jpg", exif=exif
    )
    make_structure_maps(data / "images", data / "structure", model=dpt)
    manifest = read_manifest(data)
    assert len(manifest) == 6
    for image, structure in manifest.pairs:
        assert structure is not None
        assert image_size(data / image) == image_size(data / structure)
        assert read_structure(data / structure, 1).max() == 65535
    assert image_size(data / "structure/turned.png") == (20, 70)
    assert not [path for path in (data / "structure").rglob("*") if path.name.startswith(".")]


def test_any_folder_of_images(data: Path, dpt: str) -> None:
    (data / "images").rename(data / "photos")
    make_structure_maps(data / "photos", data / "maps", model=dpt)
    assert (data / "maps/n02/deep/c.png").exists()


def test_a_second_call_makes_what_is_missing_or_cut_short(
    data: Path, dpt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(data, dpt)
    before, facts = stamps(data), sidecar(data)
    broken = ["n01/a.jpg", "d.jpg", "e.webp"]
    wanted = {name: map_of(data, name).read_bytes() for name in broken}
    map_of(data, "n01/a.jpg").unlink()
    map_of(data, "d.jpg").write_bytes(wanted["d.jpg"][:-5])
    map_of(data, "e.webp").write_bytes(b"")
    summary = make(data, dpt, batch_size=1)
    assert (summary.made, summary.kept) == (3, 2)
    after = stamps(data)
    assert all((after[name] == before[name]) == (name not in broken) for name in SIZES)
    assert all(image_size(map_of(data, name)) == SIZES[name] for name in broken)
    assert sidecar(data) == facts
    monkeypatch.setattr(DepthEstimator, "load", lambda self: pytest.fail("nothing is left to do"))
    assert make(data, dpt).kept == 5
    assert stamps(data) == after
    monkeypatch.undo()
    assert make(data, dpt, overwrite=True).made == 5
    assert all(stamp > after[name] for name, stamp in stamps(data).items())


def test_another_estimator_does_not_mix_in(data: Path, dpt: str, depth_anything: str, tmp_path: Path) -> None:
    make(data, dpt)
    before = stamps(data)
    other = str(save_dpt(tmp_path / "other", seed=1))
    for model, options in ((depth_anything, {}), (other, {}), (dpt, {"dtype": "bf16"})):
        with pytest.raises(UserError, match=r"holds maps of .*--overwrite"):
            make(data, model, **options)
    assert stamps(data) == before
    moved = tmp_path / "moved"
    Path(dpt).rename(moved)
    try:
        assert make(data, str(moved)).kept == 5  # the same weights elsewhere
    finally:
        moved.rename(dpt)
    make(data, depth_anything, overwrite=True)
    # As an interrupted --overwrite leaves it: the sidecar names the new estimator, one map is still the old one's.
    made = stamps(data)
    (tmp_path / "old/images").mkdir(parents=True)
    (data / "images/d.jpg").rename(tmp_path / "old/images/d.jpg")
    make(tmp_path / "old", dpt)
    (tmp_path / "old/images/d.jpg").rename(data / "images/d.jpg")
    map_of(tmp_path / "old", "d.jpg").rename(map_of(data, "d.jpg"))
    assert make(data, depth_anything).made == 1
    assert {name for name, stamp in stamps(data).items() if stamp != made[name]} == {"d.jpg"}


def test_maps_from_elsewhere_are_left_alone(data: Path, dpt: str) -> None:
    map_of(data, "d.jpg").parent.mkdir()
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(map_of(data, "d.jpg"))
    held = map_of(data, "d.jpg").read_bytes()
    with pytest.raises(UserError, match=r"d\.png was not made by this command"):
        make(data, dpt)
    assert map_of(data, "d.jpg").read_bytes() == held
    assert [path.name for path in (data / "structure").iterdir()] == ["d.png"]


def test_bad_images_are_listed_and_left_out(data: Path, dpt: str) -> None:
    whole = (data / "images/d.jpg").read_bytes()
    (data / "images/d.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "images/n01/f.png").write_text("no picture")
    summary = make(data, dpt)
    assert (summary.made, summary.failed) == (5 - 1, 2)
    assert summary.failures_file == data / "structure/failures.jsonl"
    listed = [json.loads(line) for line in summary.failures_file.read_text().splitlines()]
    assert [(entry["image"], entry["reason"]) for entry in listed] == list(summary.failures)
    assert [entry["image"] for entry in listed] == ["d.jpg", "n01/f.png"]
    assert all(entry["reason"].startswith("cannot be read") for entry in listed)
    assert not map_of(data, "d.jpg").exists()
    text = summary.text(data / "structure")
    assert "2 image(s) got no map" in text
    assert "failures.jsonl" in text
    assert "n01/f.png: cannot be read" in text
    assert (sidecar(data)["maps"], sidecar(data)["failures"], sidecar(data)["finished"]) == (4, 2, True)
    (data / "images/d.jpg").write_bytes(whole)
    (data / "images/n01/f.png").unlink()
    assert make(data, dpt).failed == 0
    assert not (data / "structure/failures.jsonl").exists()


def test_a_prediction_without_relief_is_a_failure(data: Path, dpt: str, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    change_weights(Path(dpt), flat, lambda weights: weights["head.head.4.weight"].zero_())
    summary = make(data, str(flat))
    assert summary.made == 0
    assert dict(summary.failures) == dict.fromkeys(SIZES, "the prediction is the same everywhere")
    assert not list((data / "structure").rglob("*.png"))
    with pytest.raises(UserError, match="not finite"):
        scale_to_16_bits(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UserError, match="not finite"):
        scale_to_16_bits(torch.tensor([[1.0, float("inf")]]))


def change_weights(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    target.mkdir()
    for path in source.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})


def test_missing_weights_matter_where_the_prediction_reads_them(data: Path, dpt: str, tmp_path: Path) -> None:
    """Published DPT models lack the first fusion layer's unused residual; a lost head would be random noise."""
    unread = "neck.fusion_stage.layers.0.residual_layer1.convolution1.weight"
    change_weights(Path(dpt), tmp_path / "unread", lambda weights: weights.pop(unread))
    change_weights(Path(dpt), tmp_path / "headless", lambda weights: weights.pop("head.head.0.weight"))
    assert "not trained for depth" in refusal(data, str(tmp_path / "headless"))
    make(data, dpt)
    expected = read_structure(map_of(data, "d.jpg"), 1)
    make(data, str(tmp_path / "unread"), overwrite=True)
    assert (read_structure(map_of(data, "d.jpg"), 1) == expected).all()


def test_direction_comes_from_the_model_or_the_caller(data: Path, dpt: str, tmp_path: Path) -> None:
    relative = str(save_depth_anything(tmp_path / "relative", "relative"))
    metric = str(save_depth_anything(tmp_path / "metric", "metric"))
    transformers.PromptDepthAnythingConfig().save_pretrained(tmp_path / "unknown")
    transformers.DPTImageProcessor().save_pretrained(tmp_path / "unknown")
    for model, direction in (
        (dpt, "larger is nearer"),
        (relative, "larger is nearer"),
        (metric, "larger is farther"),
        (str(tmp_path / "unknown"), "unknown"),
    ):
        assert open_estimator(model, device="cpu").direction == direction
    assert make(data, relative, direction="farther").direction == "larger is farther"
    facts = sidecar(data)
    assert facts["direction"] == "larger is farther"
    assert facts["processor_size"] == {"height": 42, "width": 42}
    assert (facts["model"], facts["commit"], facts["dtype"]) == (relative, None, "fp32")
    assert facts["transformers"] == transformers.__version__
    assert facts["torch"] == torch.__version__


def test_low_precision_stays_near(data: Path, dpt: str) -> None:
    make(data, dpt)
    exact = read_structure(map_of(data, "d.jpg"), 1)
    make(data, dpt, dtype="bf16", overwrite=True)
    rough = read_structure(map_of(data, "d.jpg"), 1)
    assert sidecar(data)["dtype"] == "bf16"
    assert (rough != exact).any()
    assert np.corrcoef(rough.ravel(), exact.ravel())[0, 1] > 0.9


def test_refusals_about_folders(data: Path, dpt: str) -> None:
    for images, out, message in (
        (data / "nowhere", data / "structure", "nowhere is no folder"),
        (data, data / "images/maps", "lie in one another"),
        (data, data, "lie in one another"),
        (data / "images/n01", data / "images/n01", "lie in one another"),
        (data, data / "images/d.jpg", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            make_structure_maps(images, out, model=dpt)
    (data / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        make_structure_maps(data / "empty", data / "structure", model=dpt)
    with pytest.raises(UserError, match="--batch-size 0"):
        make(data, dpt, batch_size=0)
    with pytest.raises(UserError, match="rank 2"):
        make(data, dpt, rank=2, world_size=2)
    (data / "images/d.webp").write_bytes(b"")
    with pytest.raises(UserError, match=r"d\.jpg and d\.webp share one stem"):
        make(data, dpt)
    assert not (data / "structure").exists()


def refusal(data: Path, model: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(data, model, **options)
    assert "\n" not in str(caught.value)
    assert not (data / "structure").exists()
    return str(caught.value)


def test_refusals_about_models(data: Path, dpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "./nowhere is no folder" in refusal(data, "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(data, str(tmp_path / "empty"))
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    assert "no depth estimation model but of the kind 'vit'" in refusal(data, str(tmp_path / "vit"))

    segmenter, padder = tmp_path / "segmenter", tmp_path / "padder"
    change_weights(Path(dpt), segmenter, lambda weights: None)
    config = json.loads((segmenter / "config.json").read_text())
    (segmenter / "config.json").write_text(json.dumps({**config, "architectures": ["DPTForSemanticSegmentation"]}))
    assert "but a DPTForSemanticSegmentation" in refusal(data, str(segmenter))
    change_weights(Path(dpt), padder, lambda weights: None)
    transformers.DPTImageProcessor(do_pad=True, size_divisor=32).save_pretrained(padder)
    assert "pads or crops" in refusal(data, str(padder))

    for option in ({"dtype": "int8"}, {"direction": "up"}, {"device": "abacus"}, {"device": "cuda:99"}):
        assert next(iter(option.values())) in refusal(data, dpt, **option)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("nobody/nothing is no model\nand more lines")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    assert "Hugging Face hub (nobody/nothing is no model);" in refusal(data, "nobody/nothing")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'sgmim-fast[maps]'" in refusal(data, dpt)


def test_pickled_weights_are_not_read(data: Path, dpt: str, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    change_weights(Path(dpt), pickled, lambda weights: None)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "safetensors" in refusal(data, str(pickled))


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(
    data: Path, dpt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "c.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"c\.png cannot be written: No space left on device;"):
        make(data, dpt, batch_size=1)
    assert not list((data / "structure").rglob("*.tmp"))
    assert sidecar(data)["finished"] is False
    kept = stamps(data)
    monkeypatch.undo()
    summary = make(data, dpt)
    assert (summary.kept, summary.made) == (len(kept), 5 - len(kept))
    assert all(stamps(data)[name] == stamp for name, stamp in kept.items())
    assert sidecar(data)["finished"] is True


def test_too_large_a_batch_is_one_line(data: Path, dpt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(depth_estimator.functional, "interpolate", full)
    with pytest.raises(UserError, match="--batch-size 3 does not fit"):
        make(data, dpt)


# What the command line does, in small.
COMMAND = """
import sys
from sgmim_fast.data.estimation.launched_ranks import joined_ranks, launched_rank
from sgmim_fast.data.estimation.structure_maps import make_structure_maps
from sgmim_fast.errors import one_line_errors
images, out, model = sys.argv[1:]
with one_line_errors():
    rank, world_size, device = launched_rank()
    with joined_ranks(world_size) as add_up:
        summary = make_structure_maps(
            images, out, model=model, device=device, rank=rank, world_size=world_size, add_up=add_up
        )
        print(summary.text(out), flush=True)
    sys.exit(1 if summary.failed else 0)
"""


def test_two_processes_share_the_images(data: Path, dpt: str) -> None:
    """Rank 1 of 2 meets a bad image; both end with its status, and only after both are done."""
    (data / "images/n01/b.png").write_bytes(b"")
    stale = data / "structure/failures-3-of-4.jsonl"
    stale.parent.mkdir()
    stale.touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, data, data / "structure", dpt],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], said
    assert [err for _, err in said] == ["", ""]
    assert "4 maps made, 0 kept" in said[0][0]
    names = sorted(SIZES)
    assert sorted(stamps(data)) == [name for name in names if name != "n01/b.png"]
    rank = names.index("n01/b.png") % 2
    lists = list((data / "structure").glob("failures*.jsonl"))
    assert [path.name for path in lists] == [f"failures-{rank}-of-2.jsonl"]
    assert json.loads(lists[0].read_text())["image"] == "n01/b.png"
    assert "n01/b.png: cannot be read" in said[rank][0]
    facts = sidecar(data)
    assert (facts["ranks"], facts["images"], facts["maps"], facts["failures"]) == (2, 5, 4, 1)
    assert facts["counted"] == "all ranks"


def test_ranks_take_every_nth_image_once(data: Path, dpt: str) -> None:
    shares = []
    for rank in (1, 0):
        before = set(stamps(data))
        assert make(data, dpt, rank=rank, world_size=2).failed == 0
        shares.append(set(stamps(data)) - before)
    assert shares == [set(sorted(SIZES)[1::2]), set(sorted(SIZES)[0::2])]
    assert sidecar(data)["counted"] == "rank 0"


def test_the_launchers_environment_names_rank_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank("cpu") == (0, 1, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launched_rank() == (0, 1, None)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched_rank() == (5, 8, "cuda:1")
    assert launched_rank("cpu") == (5, 8, "cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="at most 2"):
        launched_rank()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK='first' is no number"):
        launched_rank()


def test_many_shapes_never_pile_up(depth_anything: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of which hardly two share an input shape go through in part-filled batches, each to its own map."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    sizes = {f"{index:02d}": (50 + index % 7 * 15, 140 - index * 2) for index in range(40)}
    sizes["40"] = (10, 300)  # would be shrunk to no height at all
    for name, size in sizes.items():
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"images/{name}.png")
    batches: list[int] = []
    predict = DepthEstimator.predict

    def counted(self: DepthEstimator, model: Any, pixels: Any, shapes: Any) -> list[torch.Tensor]:
        batches.append(len(pixels))
        return predict(self, model, pixels, shapes)

    monkeypatch.setattr(DepthEstimator, "predict", counted)
    summary = make(tmp_path, depth_anything, batch_size=2)
    assert summary.made == 40
    assert [(name, why.split(" (")[0]) for name, why in summary.failures] == [
        ("40.png", "the image processor refuses it")
    ]
    del sizes["40"]
    assert sum(batches) == 40
    assert set(batches) == {1, 2}
    assert {name: image_size(map_of(tmp_path, f"{name}.png")) for name in sizes} == sizes
