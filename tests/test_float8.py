"""Products of the encoder in FP8: which layers, how exact, what is left alone, and what is refused."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sgmim_fast import ModelConfig, UserError, create_backbone, create_model
from sgmim_fast.config import PretrainConfig, TrainConfig
from sgmim_fast.masking import mask_indices
from sgmim_fast.models.float8 import check_float8, use_float8
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.train.pretrain_job import PretrainJob
from tests.weight_cases import randomised

CPU = torch.device("cpu")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
STEP = 2.0**-4  # e4m3 has three bits behind the first: half a unit of the last
KEPT = ("cpb_mlp", "decoder", "fusion_blk_img", "depth_encoder", "patch_embed")


def tiny(encoder: Any, width: int = 16) -> SGMIM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"embed_dim": width, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
    if encoder == "vit":
        shape = {"embed_dim": width, "depths": (2,), "num_heads": (1,)}
    model = create_model(ModelConfig(encoder=encoder, image_size=64, **shape), backend="torch")
    return model.bfloat16()


def inputs() -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    mask = torch.tensor([[[True, False], [True, True]]] * 3)
    image, structure = (torch.randn(3, n, 64, 64, generator=rng).bfloat16() for n in (3, 1))
    return image, structure, mask, *mask_indices(mask)


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the left operands of the products of FP8, as they come."""
    types: list[torch.dtype] = []
    multiply = torch._scaled_mm

    def noted(a: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        types.append(a.dtype)
        return multiply(a, *others, **options)

    monkeypatch.setattr(torch, "_scaled_mm", noted)
    return types


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_the_encoders_products_are_fp8_and_nothing_else_changes(encoder: str, products: list[torch.dtype]) -> None:
    model = tiny(encoder).eval()
    plain = copy.deepcopy(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    use_float8(model, "tensorwise")

    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(layer.training for layer in model.modules())
    changed = {name for name, layer in model.named_modules() if type(layer).__name__.startswith("Float8")}
    assert changed == {name for name in linear if not any(word in name for word in KEPT)}
    assert len(changed) >= 8

    loss = model(*inputs()).loss
    assert products == [torch.float8_e4m3fn] * len(changed)
    loss.backward()
    assert len(products) == 3 * len(changed)
    assert set(products) == {torch.float8_e4m3fn, torch.float8_e5m2}
    torch.testing.assert_close(loss, plain(*inputs()).loss, rtol=2e-2, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_and_gradients_are_within_the_rounding_of_fp8(recipe: Any) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(64, 48), nn.Linear(48, 32, bias=False)]).bfloat16()

    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        y: torch.Tensor = model.blocks[1](model.blocks[0](x))
        (y * torch.linspace(-1, 2, 32, dtype=y.dtype)).sum().backward()
        assert x.grad is not None
        return torch.cat([y.flatten(), x.grad.flatten()]).detach()

    x = torch.randn(3, 7, 64).bfloat16()  # 21 rows: no multiple of 16, which weights' gradients sum over
    exact, fast = copy.deepcopy(model).double(), copy.deepcopy(model)
    use_float8(fast, recipe)
    found, truth = run(fast, x), run(exact, x.double())
    assert 0.2 * STEP < relative(found, truth) < 2 * STEP
    errors = [
        relative(p.grad, q.grad)  # type: ignore[arg-type]
        for p, q in zip(fast.parameters(), exact.parameters(), strict=True)
    ]
    assert max(errors) < 2 * STEP
    again = copy.deepcopy(model)
    use_float8(again, recipe)
    assert torch.equal(run(again, x), found)


def test_exact_gradients_of_weights_are_a_recipe() -> None:
    """With the rows of one product alone in FP8, only the recipe that leaves weights' gradients in bf16 hits them."""
    torch.manual_seed(0)
    x, weight = torch.randn(32, 64).bfloat16(), torch.randn(32, 16).bfloat16()
    errors = {}
    for recipe in RECIPES:
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(64, 16)]).bfloat16()
        use_float8(model, recipe)  # type: ignore[arg-type]
        (model.blocks[0](x) * weight).sum().backward()
        truth = weight.double().T @ x.double()
        errors[recipe] = relative(model.blocks[0].weight.grad, truth)  # type: ignore[union-attr, arg-type]
    assert errors["rowwise_with_gw_hp"] < 0.005
    assert min(errors["tensorwise"], errors["rowwise"]) > 0.01


def test_one_compiled_graph_and_a_copy_compute_the_same() -> None:
    model = tiny("swinv2")
    use_float8(model, "rowwise")
    loss = model(*inputs()).loss
    assert torch.equal(copy.deepcopy(model)(*inputs()).loss, loss)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    again = compiled(*inputs()).loss
    again.backward()
    torch._dynamo.reset()
    torch.testing.assert_close(again, loss, rtol=1e-2, atol=0)


def test_weights_without_memory_run_too() -> None:
    config = PretrainConfig(
        model=tiny("vit").config, train=TrainConfig(batch_size=2, float8="tensorwise", precision="bf16")
    )
    job = PretrainJob(config)
    with torch.device("meta"):
        task = job.make_task(None, "torch").bfloat16()
    batch = {name: x.bfloat16() if x.is_floating_point() else x for name, x in job.meta_batch().items()}
    task(batch).loss.backward()
    assert any(type(layer).__name__ == "Float8QkvLinear" for layer in task.modules())


@pytest.mark.parametrize("encoder", ["swinv2", "vit"])
def test_backbones_take_images_of_any_size(encoder: str) -> None:
    """As fine-tuning trains them: any number of tokens, and a whole backward pass."""
    torch.manual_seed(0)
    pretrained = randomised(tiny(encoder).config)  # V2's norms begin with zeros
    backbone = create_backbone(pretrained.config, weights=pretrained.state_dict(), backend="torch").bfloat16()
    image = torch.randn(1, 3, 50, 70).bfloat16()
    plain = backbone(image)
    use_float8(backbone, "rowwise")
    maps = backbone(image)
    torch.stack([x.float().square().mean() for x in maps]).sum().backward()
    for found, exact in zip(maps, plain, strict=True):
        assert 0 < relative(found.detach(), exact.detach().double()) < 0.2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters() if p.requires_grad)


# -- refusals


def test_unknown_recipes_and_models_without_a_layer_are_refused() -> None:
    with pytest.raises(UserError, match="float8 'e4m3' is unknown; choose one of off, tensorwise, rowwise"):
        check_float8("e4m3", CPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no linear layer whose widths are multiples of 16"):
        use_float8(tiny("vit", width=24), "tensorwise")


def test_gpus_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(8, 6)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    with pytest.raises(UserError, match=r'"rowwise" cannot run here: this GPU has compute capability 8\.6, .* 8\.9'):
        check_float8("rowwise", torch.device("cuda"))
    check_float8("off", torch.device("cuda"))
    capability[0] = (8, 9)
    check_float8("rowwise", torch.device("cuda"))


def test_a_missing_or_broken_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Nowhere:
        def find_spec(self, name: str, *place: Any) -> None:
            if name == "torchao":
                raise ModuleNotFoundError("No module named 'torchao'", name="torchao")

    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    finders = sys.meta_path
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *finders])
    with pytest.raises(UserError, match=r"torchao is not installed; pip install 'sgmim-fast\[float8\]'; or choose"):
        check_float8("tensorwise", CPU)
    monkeypatch.setattr(sys, "meta_path", finders)
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("raise RuntimeError('built for another PyTorch')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be imported \(built for another PyTorch\); install it again"):
        check_float8("tensorwise", CPU)
    check_float8("off", CPU)
