"""Model FLOPs are those that PyTorch counts around a real step, whatever the batch, and no others."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sgmim_fast import ModelConfig, UserError
from sgmim_fast.masking import mask_indices
from sgmim_fast.recipes import MODELS
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.flops import training_flops_per_image
from tests.test_models import batch as random_batch
from tests.test_models import tiny


def counted(config: ModelConfig, size: int, masked: int, backend: Any = "torch", checkpointed: bool = False) -> int:
    """FLOPs of a real forward and backward pass."""
    task = PretrainTask(config, backend)
    image, structure, mask = random_batch(config, size, masked)
    cells = dict(zip(("masked", "visible"), mask_indices(mask), strict=True))
    with FlopCounterMode(display=False) as counter:
        task({"image": image.float(), "structure": structure.float(), "mask": mask, **cells}).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("guidance", ["relational", "relational-visible", "none"])
@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_one_image_more_adds_what_is_promised(encoder: str, guidance: Any, backend: Any) -> None:
    config = tiny(encoder, guidance=guidance)
    flops = training_flops_per_image(config, backend, mask_ratio=0.5)
    two, five = (counted(config, size, masked=3, backend=backend) for size in (2, 5))
    assert five - two == 3 * flops
    assert 0 <= two - 2 * flops < 0.6 * flops  # what a step computes once, which is much for so small a model


@pytest.mark.parametrize("name", ["sgmim_swin_base", "sgmim_swinv2_base", "sgmim_vit_base"])
def test_of_a_real_model_less_than_a_hundredth_is_left_out(name: str) -> None:
    config = MODELS[name]
    cells = config.grid[0] * config.grid[1]
    flops = training_flops_per_image(config)
    assert flops <= counted(config, 1, -(-6 * cells // 10)) < 1.01 * flops


def test_swin_base_costs_what_is_known_of_it() -> None:
    """About 72 GFLOP an image in the plain path, by hand."""
    assert training_flops_per_image(MODELS["sgmim_swin_base"], "reference") == pytest.approx(72e9, rel=0.02)
    assert training_flops_per_image(MODELS["sgmim_swin_base"]) == pytest.approx(70.1e9, rel=0.001)


def test_the_mask_ratio_counts_and_counting_draws_no_random_numbers() -> None:
    config = tiny("swin", embed_dim=24)
    state = torch.get_rng_state()
    few, many = (training_flops_per_image(config, mask_ratio=ratio) for ratio in (0.3, 0.6))
    assert few != many
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="masks all"):
        training_flops_per_image(config, mask_ratio=0.99)
