"""``--dry-run``: its figures are those of real tensors, and it touches nothing."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sgmim_fast import UserError
from sgmim_fast.cli import main
from sgmim_fast.config import PretrainConfig, TrainConfig
from sgmim_fast.masking import mask_indices
from sgmim_fast.recipes import RECIPES
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.activation_memory import meta_batch, step_memory
from sgmim_fast.train.dry_run import dry_run, estimate
from sgmim_fast.train.pretrain_job import PretrainJob
from sgmim_fast.train.zero_layout import zero_layout
from tests.test_models import tiny
from tests.tiny_run import make_pairs


def real_step(config: PretrainConfig) -> tuple[int, int]:
    """What a step on the CPU keeps, and needs at most."""
    train = config.train
    task = PretrainTask(config.model, train.backend, activation_checkpointing=train.activation_checkpointing)
    batch = {name: torch.rand(x.shape) if x.is_floating_point() else x for name, x in meta_batch(config).items()}
    cells, masked = config.model.grid[0] * config.model.grid[1], batch["masked"].shape[1]
    order = torch.rand(train.batch_size, cells).argsort(1).argsort(1)
    batch["mask"] = (order < masked).view(-1, *config.model.grid)
    batch["masked"], batch["visible"] = mask_indices(batch["mask"])
    batch["index"] = torch.arange(train.batch_size)
    if train.precision == "bf16":
        task.bfloat16()
    step_memory(task, batch)  # constants that are kept from here on
    return step_memory(task, batch)


@pytest.mark.parametrize(("precision", "deviation"), [("fp32", 0.001), ("bf16", 0.02)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_activations_are_those_of_a_real_step(encoder: str, backend: Any, precision: Any, deviation: float) -> None:
    for stages in ((), (0,)):
        train = TrainConfig(batch_size=3, backend=backend, precision=precision, activation_checkpointing=stages)
        config = PretrainConfig(model=tiny(encoder, embed_dim=32), train=train)
        found = estimate(PretrainJob(config), 1)
        kept, peak = real_step(config)
        assert found.activations == pytest.approx(kept, rel=deviation)
        assert found.activations + found.temporaries == pytest.approx(peak, rel=deviation)


def test_peak_sees_what_is_computed_again() -> None:
    """Checkpointed, a block's activations are no longer kept but are there while it runs again."""
    config = PretrainConfig(model=tiny("vit", depths=(6,)), train=TrainConfig(batch_size=8))
    kept = estimate(PretrainJob(config), 1)
    again = estimate(PretrainJob(replace(config, train=replace(config.train, activation_checkpointing=(0,)))), 1)
    assert again.activations < 0.5 * kept.activations
    assert again.temporaries > kept.temporaries
    assert again.peak < kept.peak
    assert again.flops_per_step == kept.flops_per_step


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_share_and_offloading_moves(stage: Any) -> None:
    train = TrainConfig(zero_stage=stage, batch_size=2, bucket_size=1000)
    config = PretrainConfig(model=tiny("vit", embed_dim=512, depths=(4,), num_heads=(8,)), train=train)
    one, four = estimate(PretrainJob(config), 1), estimate(PretrainJob(config), 4)
    for name in ("master", "optimizer"):
        assert getattr(four.layout, name) == pytest.approx(getattr(one.layout, name) / 4, rel=1e-3)
    assert (four.layout.weights < one.layout.weights / 2) == (stage == 3)
    assert four.images_per_step == 4 * one.images_per_step == 8
    assert four.flops_per_step == 4 * one.flops_per_step == 8 * one.flops_per_image
    assert (one.host, one.checkpoint) == (0, four.checkpoint)
    offloaded = estimate(PretrainJob(replace(config, train=replace(train, offload_optimizer=True))), 4)
    assert offloaded.host >= four.layout.master + four.layout.optimizer
    assert offloaded.peak <= four.peak - four.layout.master - four.layout.optimizer
    assert sum(one.parameters.values()) == sum(p.numel() for p in PretrainTask(config.model).parameters())


def test_buckets_and_overlap() -> None:
    plain = zero_layout(TrainConfig(bucket_size=1000), [[10, 20], [3]], 2)
    assert plain.buckets == 2000
    assert zero_layout(TrainConfig(bucket_size=1000, overlap_comm="on"), [[10, 20], [3]], 2).buckets == 4000
    assert zero_layout(TrainConfig(zero_stage=0, precision="fp32"), [[10, 20], [3]], 2).buckets == 4 * 33
    # Partitions of 16 (32 with padding) and 2: the first rank's reach into both matrices, the second's into one.
    assert plain.master == 4 * (16 + 2)
    assert plain.gradients == 2 * (30 + 3)


def test_command_line_needs_no_data_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--recipe", "demo", "--dry-run", "--num-gpus", "4", "--train.zero-stage", "2"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "memory of a rank, fp32, ZeRO 2, 4 rank(s)" in out
    assert re.search(r"pairs a step +64  16 a rank", out)
    assert re.search(r"steps an epoch +unknown  --data names the pairs", out)
    assert re.search(r"expected peak +[0-9.]+ [MG]iB", out)
    assert not list(tmp_path.iterdir())


def test_data_tell_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES["demo"]()
    train = replace(recipe.train, batch_size=2)
    config = replace(recipe, train=train, data=replace(recipe.data, path=str(make_pairs(tmp_path, count=9))))
    before = sorted(tmp_path.rglob("*"))
    dry_run(PretrainJob(config), 2)
    out = capsys.readouterr().out
    assert re.search(r"steps an epoch +2  9 pairs", out)
    assert re.search(r"steps of the run +16", out)
    dry_run(PretrainJob(config), 8)
    assert re.search(r"steps an epoch +unknown  .*9 pairs", capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_rank_is_refused() -> None:
    with pytest.raises(UserError, match="1 rank or more"):
        estimate(PretrainJob(PretrainConfig()), 0)
