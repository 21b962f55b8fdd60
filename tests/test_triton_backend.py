"""A whole training step on the kernels computes what the plain path computes, however it is run."""

import copy
from typing import Any

import pytest
import torch
import triton
from torch.utils.checkpoint import checkpoint

from sgmim_fast import ModelConfig, create_model
from sgmim_fast.kernels import launch
from sgmim_fast.masking import mask_indices
from sgmim_fast.models.sgmim import SGMIM
from tests.kernel_cases import DEVICE
from tests.test_models import batch, losses_and_gradients, tiny

pytestmark = pytest.mark.usefixtures("poisoned")

# In the interpreter kernels take float64 too, and a wrong formula cannot hide behind rounding: what is left is that
# constants in kernels have float32's digits.
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32
CLOSE = {"rtol": 1e-6, "floor": 1e-7} if DEVICE == "cpu" else {"rtol": 1e-3, "floor": 1e-4}


def small(encoder: str, **fields: Any) -> ModelConfig:
    heads = {} if encoder == "vit" else {"num_heads": (1, 1, 2, 2)}
    return tiny(encoder, **{"image_size": (32, 64), **heads, **fields})


def disturbed(config: ModelConfig) -> SGMIM:
    """A model away from its symmetric start, where zero norms would hide mistakes."""
    torch.manual_seed(0)
    model = create_model(config).to(DEVICE, EXACT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs_of(config: ModelConfig, size: int = 2, masked: int = 1) -> tuple[torch.Tensor, ...]:
    image, structure, mask = batch(config, size, masked)
    return image.to(DEVICE, EXACT), structure.to(DEVICE, EXACT), mask.to(DEVICE)


def assert_same(plain: Any, fast: Any, rtol: float, floor: float) -> None:
    for a, b in zip(plain[0], fast[0], strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=0)
    assert plain[1].keys() == fast[1].keys()
    largest = max(gradient.abs().max().item() for gradient in plain[1].values())
    for name, gradient in plain[1].items():
        assert fast[1][name] is not None, name
        scale = max(gradient.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(fast[1][name], gradient, rtol=rtol, atol=floor * scale, msg=f"{name} differs")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("swin", {}),
    ("swin", {"guidance": "relational-visible"}),
    ("swin", {"guidance": "none", "window_size": 3}),  # windows do not divide the maps
    ("swinv2", {}),
    ("swinv2", {"drop_path_rate": 0.4, "normalize_target_window": 7, "window_size": 9, "image_size": (64, 64)}),
    ("vit", {"drop_path_rate": 0.4}),
    ("vit", {"patch_size": 8, "structure_channels": 3}),
    ("vit", {"guidance": "none"}),
]


@pytest.mark.parametrize(
    ("encoder", "fields"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_step_equals_plain(encoder: str, fields: dict[str, Any]) -> None:
    config = small(encoder, **fields)
    model, inputs = disturbed(config), inputs_of(config)
    plain = losses_and_gradients(model, "reference", inputs)
    assert_same(plain, losses_and_gradients(model, "triton", inputs), **CLOSE)


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_compiled_step_is_one_graph_and_equals_eager(encoder: str) -> None:
    config = small(encoder)
    model = disturbed(config)
    image, structure, mask = inputs_of(config)
    inputs = (image, structure, mask, *mask_indices(mask))
    eager = losses_and_gradients(model, "triton", inputs)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, dynamic=False)
    assert_same(eager, losses_and_gradients(compiled, "triton", inputs), **CLOSE)


@pytest.mark.parametrize("encoder", ["swin", "vit"])
def test_recomputed_activations_change_nothing(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(encoder)
    model, inputs = disturbed(config), inputs_of(config)
    plain = losses_and_gradients(model, "triton", inputs)
    blocks = [block for name, block in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
    assert blocks
    for block in blocks:
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, forward=forward: checkpoint(forward, *a, use_reentrant=False))
    again = losses_and_gradients(model, "triton", inputs)
    assert_same(plain, again, rtol=0, floor=0)


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_autocast(encoder: str) -> None:
    """16-bit products beside float32 weights: as close to the exact losses as the plain path comes."""
    config = small(encoder)
    model, (image, structure, mask) = disturbed(config), inputs_of(config)
    exact = losses_and_gradients(model, "reference", (image, structure, mask))
    model = model.float()
    inputs = (image.float(), structure.float(), mask)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        plain = losses_and_gradients(model, "reference", inputs)
        fast = losses_and_gradients(model, "triton", inputs)
    for true, usual, mine in zip(exact[0], plain[0], fast[0], strict=True):
        error, usual_error = (abs(value.double().item() - true.item()) for value in (mine, usual))
        assert error <= 2 * usual_error + 4e-3 * true.item()
    norms = [
        sum(float((run[1][name].double() - gradient).square().sum()) for name, gradient in exact[1].items()) ** 0.5
        for run in (plain, fast)
    ]
    # Interpreters cut numbers off to bfloat16 where GPUs round, twice the error of each; with Triton 3.6 it shows here.
    old = launch.INTERPRETED and triton.__version__.startswith("3.6.")
    assert norms[1] <= (4 if old else 2) * norms[0]
    assert all(gradient.dtype == torch.float32 for gradient in fast[1].values())


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere() -> None:
    from sgmim_fast import ops

    assert ops.resolve_backend("auto", torch.zeros(1, device=DEVICE)) == ("triton" if DEVICE == "cuda" else "torch")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((8, 0), None), ((9, 0), None), ((10, 3), None), ((7, 5), "compute capability 8.0 or newer; this GPU has 7.5")],
)
def test_gpus_that_cannot_run_kernels_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    found = launch.objection(torch.zeros(1).as_subclass(OnGpu))
    assert found is None if reason is None else reason in str(found)
