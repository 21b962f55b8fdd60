"""Layers by name against the numbers of MIM-Depth-Estimation and BEiT; rates of fine-tuning against theirs."""

import itertools

import pytest
import torch
from dense_cases import SWIN_DEPTHS, Maps, tiny_backbone
from torch import nn

from sgmim_fast import UserError
from sgmim_fast.config import DepthConfig, Encoder
from sgmim_fast.tasks.depth import DepthTask
from sgmim_fast.train.finetune_schedule import poly_rate, triangle_rate
from sgmim_fast.train.layer_decay import LayerNumbers, layer_decay_groups

SWIN_B = (2, 2, 18, 2)


class Task(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))


def swin(encoder: Encoder = "swin") -> Task:
    return Task(tiny_backbone(encoder, norm="all"))


def mim_depth_layer(name: str, depths: tuple[int, ...]) -> tuple[int, int]:
    """The number by MIM-Depth-Estimation's rule, and how many there are; every stage but the last has a merging."""
    per_stage = [depth + 1 for depth in depths[:-1]] + [depths[-1]]
    count = sum(per_stage) + 2
    parts = name.split(".")
    if name.startswith("backbone.encoder.patch_embed"):
        return 0, count
    if name.startswith("backbone.encoder.layers"):
        stage = int(parts[3])
        if parts[4] == "blocks":
            return int(parts[5]) + sum(per_stage[:stage]) + 1, count
        return sum(per_stage[: stage + 1]), count
    return count - 1, count


def scales(groups: list[dict[str, object]], task: nn.Module) -> dict[str, tuple[float, float]]:
    """Rate factor and weight decay by parameter name."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_swin_has_the_layers_of_mim_depth(encoder: Encoder) -> None:
    task = swin(encoder)
    found = scales(layer_decay_groups(task, 0.05, 0.9), task)
    for name, parameter in task.named_parameters():
        layer, count = mim_depth_layer(name, SWIN_DEPTHS)
        tables = ("relative_position_bias_table", "cpb_mlp", "logit_scale", "mask_token")
        plain = parameter.dim() == 1 or any(word in name for word in tables)
        assert found[name] == (pytest.approx(0.9 ** (count - layer - 1)), 0.0 if plain else 0.05), name


def test_swin_base_by_hand() -> None:
    names = ["backbone.patch_embed.proj.weight", "backbone.norm.weight"]
    for stage, depth in enumerate(SWIN_B):
        names += [f"backbone.layers.{stage}.blocks.{block}.mlp.fc1.weight" for block in range(depth)]
        names += [f"backbone.layers.{stage}.downsample.reduction.weight"] if stage < 3 else []
    layer_of = LayerNumbers(names)
    assert layer_of.head == 28
    assert layer_of("backbone.patch_embed.norm.bias") == 0
    assert layer_of("backbone.layers.0.blocks.0.attn.qkv.weight") == 1
    assert layer_of("backbone.layers.0.downsample.norm.weight") == 3
    assert layer_of("backbone.layers.1.blocks.0.norm1.weight") == 4
    assert layer_of("backbone.layers.2.blocks.17.norm1.weight") == 24
    assert layer_of("backbone.layers.2.downsample.norm.weight") == 25
    assert layer_of("backbone.layers.3.blocks.1.norm1.weight") == 27
    assert layer_of("backbone.norm.weight") == 28


def test_order_of_names_does_not_matter() -> None:
    names = [
        f"layers.{stage}.{part}.weight" for stage in (0, 1) for part in ("blocks.0.x", "blocks.1.x", "downsample.x")
    ]
    for order in itertools.islice(itertools.permutations(names), 0, 720, 37):
        assert [LayerNumbers(order)(name) for name in names] == [1, 2, 3, 4, 5, 6]


def test_vit_has_the_layers_of_beit() -> None:
    task = Task(tiny_backbone("vit"))
    found = scales(layer_decay_groups(task, 0.05, 0.5), task)
    for name, (scale, _) in found.items():
        part = name.removeprefix("backbone.encoder.")
        if part.startswith(("patch_embed", "cls_token")):
            layer = 0
        elif part.startswith("blocks."):
            layer = int(part.split(".")[1]) + 1
        else:  # the shared table, the pyramid and the head
            layer = 5
        assert scale == 0.5 ** (5 - layer), name
    assert found["backbone.pyramid.0.0.weight"] == (1.0, 0.05)
    assert found["backbone.encoder.rel_pos_bias.relative_position_bias_table"] == (1.0, 0.0)
    assert found["head.0.weight"] == (1.0, 0.05)
    assert found["head.1.weight"] == (1.0, 0.0)


def test_groups_hold_every_trained_parameter_once() -> None:
    task = swin()
    task.backbone.encoder.patch_embed.requires_grad_(False)
    groups = layer_decay_groups(task, 0.05, 0.9)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    assert all(group["params"] for group in groups)
    assert [group["lr_scale"] for group in groups] == sorted(group["lr_scale"] for group in groups)
    torch.optim.AdamW(groups, lr=1e-3)


def test_partitioned_parameters_keep_their_true_shape() -> None:
    """Under ZeRO-3 every parameter is flat, and its shape is in ds_shape."""
    task = swin()
    before = scales(layer_decay_groups(task, 0.05, 0.9), task)
    for parameter in task.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = parameter.data.flatten()
    assert scales(layer_decay_groups(task, 0.05, 0.9), task) == before


def test_backbone_without_blocks_is_an_error() -> None:
    with pytest.raises(UserError, match="layer_decay needs a Swin or ViT backbone"):
        layer_decay_groups(Task(nn.Conv2d(3, 3, 1)), 0.05, 0.9)
    assert layer_decay_groups(DepthTask(Maps(), DepthConfig()), 0.05, 0.9)  # its convolutions are called blocks


def source_triangle(step: int, iterations: int, epochs: int) -> float:
    """MIM-Depth-Estimation's rule; its steps count from 1."""
    high, low, half = 5e-4, 3e-5, epochs // 2
    if step < iterations * half:
        return (high - low) * (step / iterations / half) ** 0.9 + low
    return max(low, (low - high) * (step / iterations / half - 1) ** 0.9 + high)


@pytest.mark.parametrize(("iterations", "epochs"), [(7, 4), (10, 25), (3, 2), (1, 2)])
def test_triangle_is_that_of_mim_depth(iterations: int, epochs: int) -> None:
    found = [triangle_rate(step, iterations, epochs) for step in range(iterations * epochs)]
    expected = [source_triangle(step + 1, iterations, epochs) for step in range(iterations * epochs)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert max(found) == pytest.approx(5e-4)
    assert found[-1] == pytest.approx(3e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_triangle_of_one_epoch_turns_at_its_half(steps: int) -> None:
    found = [triangle_rate(step, steps, 1) for step in range(steps)]
    assert max(found) == found[max(steps // 2, 1) - 1] == pytest.approx(5e-4)
    assert min(found) >= 3e-5


def test_poly_by_hand() -> None:
    assert poly_rate(0, 160_000, 6e-5) == pytest.approx(6e-11)
    # halfway through the warm-up: half of what the polynomial gives there
    assert poly_rate(750, 160_000, 6e-5) == pytest.approx(6e-5 * (1 - 750 / 160_000) * 0.5, rel=1e-5)
    assert poly_rate(1500, 160_000, 6e-5) == pytest.approx(6e-5 * (1 - 1500 / 160_000))
    assert poly_rate(80_000, 160_000, 6e-5) == pytest.approx(3e-5)
    assert poly_rate(160_000, 160_000, 6e-5) == 0.0
    assert poly_rate(170_000, 160_000, 6e-5) == 0.0
    assert poly_rate(50, 100, 1.0, warmup_steps=0, power=2.0, floor=0.2) == pytest.approx(0.2 + 0.8 * 0.25)
