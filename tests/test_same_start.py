"""What pre-training with and without maps shares under one seed: the encoder's first weights, and every batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_sets import write_scenes
from torch import Tensor

from sgmim_fast.commands.probed_weights import RANDOM, open_backbone
from sgmim_fast.config import Guidance, ModelConfig, PretrainConfig
from sgmim_fast.data.order import BEGIN
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.recipes import demo
from sgmim_fast.train.pretrain_job import PretrainJob
from sgmim_fast.train.trainer import seed_all
from sgmim_fast.weights import save_weights

SMALL = {"image_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
ENCODERS = {
    "demo": demo().model,
    "swinv2": ModelConfig(encoder="swinv2", drop_path_rate=0.1, **SMALL),  # type: ignore[arg-type]
    "vit": ModelConfig(encoder="vit", image_size=64, embed_dim=32, depths=(4,), num_heads=(2,), layer_scale_init=0.1),
}


def job(config: PretrainConfig, guidance: Guidance) -> PretrainJob:
    return PretrainJob(replace(config, model=replace(config.model, guidance=guidance)))


def first_model(config: PretrainConfig, guidance: Guidance) -> SGMIM:
    """As the trainer makes it."""
    seed_all(config.train.seed)
    return job(config, guidance).make_task(None, "torch").model


def encoder_of(model: SGMIM) -> dict[str, Tensor]:
    return model.encoder.state_dict()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_begin_alike_and_heads_do_not(name: str, tmp_path: Path) -> None:
    config = replace(demo(), model=ENCODERS[name])
    guided, plain = (first_model(config, guidance) for guidance in ("relational", "none"))
    assert encoder_of(guided).keys() == encoder_of(plain).keys()
    for key, value in encoder_of(guided).items():
        assert torch.equal(value, encoder_of(plain)[key]), key
    heads = (guided.image_head[0].weight, plain.image_head[0].weight)
    assert heads[0].shape == heads[1].shape
    assert not torch.equal(*heads)
    other = first_model(replace(config, train=replace(config.train, seed=1)), "none")
    assert not torch.equal(other.encoder.patch_embed.proj.weight, plain.encoder.patch_embed.proj.weight)
    # What `sgmim probe random` probes are these weights, too.
    file = save_weights(guided, tmp_path / "model.safetensors")
    backbone, _ = open_backbone(RANDOM, like=file, seed=config.train.seed)
    found = backbone.encoder.state_dict()
    assert len(found) > 20
    for key, value in found.items():
        assert torch.equal(value, encoder_of(guided)[key]), key


def test_batches_are_the_same_with_and_without_maps(tmp_path: Path) -> None:
    """Of both ranks, into the second epoch."""
    scenes = write_scenes(tmp_path / "scenes", count=12)
    config = demo()
    config = replace(
        config,
        data=replace(config.data, path=str(scenes), workers=0, loader="torch"),
        train=replace(config.train, batch_size=3),
    )
    for rank in (0, 1):
        guided, plain = (
            iter(
                job(config, guidance).loader(
                    rank=rank, world_size=2, place=BEGIN, device=torch.device("cpu"), tell=lambda bad: None
                )
            )
            for guidance in ("relational", "none")
        )
        for _ in range(3):
            ours, theirs = next(guided), next(plain)
            assert ours.keys() - theirs.keys() == {"structure"}
            for key, value in theirs.items():
                assert torch.equal(value, ours[key]), key
