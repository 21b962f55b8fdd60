"""Fine-tuning jobs of every encoder and head: what they build from a pre-training model's file, and one step of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sgmim_fast import create_model
from sgmim_fast.config import ModelConfig
from sgmim_fast.data.order import BEGIN, SampleOrder
from sgmim_fast.finetune import make_job
from sgmim_fast.tasks.finetuned import load_finetuned
from sgmim_fast.weights import save_weights
from tests import dense_sets
from tests.finetune_runs import arguments

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "swin": {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4},
    "swinv2": {"encoder": "swinv2", "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4},
    "vit": {"encoder": "vit", "depths": (4,), "num_heads": (2,), "layer_scale_init": 0.1},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_sets.write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", count=11, size=64)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize(
    ("task", "options"),
    [("depth", {}), ("depth", {"depth__head": "dpt", "depth__head_channels": 8}), ("segmentation", {})],
    ids=["glp", "dpt", "upernet"],
)
def test_a_step(encoder: str, task: str, options: dict[str, Any], scenes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(image_size=64, embed_dim=16, **SHAPES[encoder]))
    weights = save_weights(model, tmp_path / "pretrained.safetensors", layout="sgmim")
    job, _ = make_job(arguments(task, scenes, weights, tmp_path / "run", **options))
    job.check(CPU)
    job.open()
    made = job.make_task(CPU, "torch")
    own = dict(made.backbone.encoder.named_parameters())
    before = {name: value for name, value in model.encoder.named_parameters() if name in own}
    assert len(before) >= len(own) - 2, "all but a norm that the pre-training model names alike"
    assert all(torch.equal(own[name], value) for name, value in before.items())

    groups = job.parameter_groups(made)
    assert sum(len(group["params"]) for group in groups) == len(list(made.parameters()))
    scales = {group["lr_scale"] for group in groups}
    assert max(scales) == 1.0
    assert min(scales) < 0.9**4

    with job.loader(rank=0, world_size=1, place=BEGIN, device=CPU, tell=print) as loader:
        batch = next(loader)
    out = made.train()(batch)
    assert len(out) == len(job.losses)
    out[0].backward()
    assert torch.isfinite(out[0])
    without = [name for name, value in made.named_parameters() if value.grad is None]
    assert not without, "ranks wait for every gradient"
    assert {name: (x.shape, x.dtype) for name, x in job.meta_batch().items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }
    assert job.flops_per_image() > 0

    path = tmp_path / "model.safetensors"
    job.save({name: value.detach() for name, value in made.state_dict().items()}, path)
    again, _ = load_finetuned(path)
    with torch.no_grad():
        torch.testing.assert_close(again.predict(batch["image"]), made.eval().predict(batch["image"]))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())


def test_windows_and_shifts_are_those_asked_for(scenes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(image_size=64, embed_dim=16, **SHAPES["swin"]))
    weights = save_weights(model, tmp_path / "pretrained.safetensors", layout="sgmim")
    words = {"backbone__window_size": "5 5 5 3", "backbone__use_shift": "True True False False"}
    job, _ = make_job(arguments("depth", scenes, weights, tmp_path / "run", **words))
    config = job.make_task(CPU, "torch").backbone.config
    assert config.window_size == (5, 5, 5, 3)
    assert config.use_shift == (True, True, False, False)
    same, _ = make_job(arguments("depth", scenes, weights, tmp_path / "run"))
    assert same.make_task(CPU, "torch").backbone.config.window_size == (4, 4, 4, 2)


def test_rates_of_the_published_recipes(scenes: Path, tmp_path: Path) -> None:
    """A triangle that turns after half of the epochs; a polynomial after a warm-up, which does not depend on epochs."""
    depth, _ = make_job(["depth", "--recipe", "nyu", "--train.batch-size", "1"])
    order = epochs_of(depth, 10)
    rates = [depth.learning_rate(step, order) for step in range(250)]
    assert max(rates) == pytest.approx(5e-4)
    assert rates.index(max(rates)) == 119
    assert rates[-1] == pytest.approx(3e-5)
    segmentation, _ = make_job(["segmentation", "--recipe", "ade20k"])
    order = epochs_of(segmentation, 20210 // 16)
    assert segmentation.learning_rate(0, order) < 1e-10
    assert segmentation.learning_rate(1500, order) == pytest.approx(3e-5 * (1 - 1500 / (127 * 1263)))


def epochs_of(job: Any, steps_per_epoch: int) -> SampleOrder:
    size = job.config.train.batch_size
    return SampleOrder(steps_per_epoch * size, batch_size=size, world_size=1, accumulation_steps=1, seed=0)
