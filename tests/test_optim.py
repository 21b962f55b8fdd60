"""Schedules against timm's, which SimMIM's recipes are written for; parameter groups by name."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

from sgmim_fast import ModelConfig, create_model
from sgmim_fast.config import RECIPES, OptimizerConfig, ScheduleConfig
from sgmim_fast.train.optim import learning_rate, parameter_groups

STEPS = 10  # an epoch


def rates(optimizer: OptimizerConfig, schedule: ScheduleConfig, batch: int) -> list[float]:
    return [learning_rate(step, STEPS, batch, optimizer, schedule) for step in range(schedule.epochs * STEPS)]


def timm_rates(scheduler: CosineLRScheduler | MultiStepLRScheduler, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        scheduler.step_update(step)
        found.append(scheduler.optimizer.param_groups[0]["lr"])
    return found


def test_cosine_is_the_one_of_the_recipes() -> None:
    config = RECIPES["swin_base_100ep"]()
    own = rates(config.optimizer, config.schedule, batch=1024)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2 * config.optimizer.lr)
    peer = CosineLRScheduler(
        optimizer, t_initial=1000, lr_min=2e-5, warmup_lr_init=2e-6, warmup_t=100, cycle_limit=1, t_in_epochs=False
    )
    assert own == pytest.approx(timm_rates(peer, 1000), rel=1e-9)
    assert own[0] == pytest.approx(2e-6)
    assert max(own) < 4e-4


def test_multistep_is_the_one_of_the_recipes() -> None:
    config = RECIPES["swin_base_800ep"]()
    own = rates(config.optimizer, config.schedule, batch=512)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.optimizer.lr)
    peer = MultiStepLRScheduler(
        optimizer,
        decay_t=[7001],  # timm looks one step ahead, SimMIM's own class does not
        decay_rate=0.1,
        warmup_t=100,
        warmup_lr_init=5e-7,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    assert own == pytest.approx(timm_rates(peer, 8000), rel=1e-9)
    assert own[-1] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["sgmim_swin_base", "sgmim_swinv2_base", "sgmim_vit_base"])
def test_only_matrices_decay(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    names = {id(p): key for key, p in model.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.05))
    assert len(decayed) + len(plain) == len(names)
    words = ("bias", "norm", "token", "gamma", "logit_scale", "cpb_mlp", "absolute_pos")
    assert not [key for key in decayed if any(word in key for word in words)]
    assert not [key for key in plain if not any(word in key for word in words)]
    assert "encoder.patch_embed.proj.weight" in decayed
    assert "depth_encoder.patch_merging_1.reduction.weight" in decayed


def test_position_table_of_the_guidance_does_not_decay() -> None:
    config = ModelConfig(image_size=64, embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, guidance="relational-visible")
    groups = parameter_groups(create_model(config), 0.05)
    assert (1, 4, 64) in [tuple(p.shape) for p in groups[1]["params"]]
