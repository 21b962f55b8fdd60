"""Activation checkpointing: the same numbers to the last bit, fewer bytes kept, the same names."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sgmim_fast import UserError
from sgmim_fast.config import ModelConfig
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train.compiling import compile_step
from tests.test_compile import batch
from tests.test_models import tiny

STAGES = {"swin": (0, 2), "swinv2": (0, 1, 2, 3), "vit": (0,)}


@pytest.fixture
def quick_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are run by PyTorch's own operations."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def two_tasks(config: ModelConfig, backend: Any, dtype: torch.dtype = torch.float32) -> list[PretrainTask]:
    """One that keeps activations and one that does not, with the same weights."""
    tasks = []
    for stages in ((), STAGES[config.encoder][: len(config.depths)]):
        torch.manual_seed(0)
        tasks.append(PretrainTask(config, backend, activation_checkpointing=stages).to(dtype))
        with torch.no_grad():  # away from the symmetric start
            for parameter in tasks[-1].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tasks


def step(task: PretrainTask) -> tuple[dict[str, Tensor | None], Tensor, int]:
    """Gradients by name, the next random number, and the bytes that forward kept for backward."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = task(batch(0))
    kept = sum(sizes.values())
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
    return gradients | {"loss": out.loss.detach()}, torch.rand(1), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("encoder", STAGES)
def test_every_bit_of_the_gradients_is_the_same_for_fewer_bytes(encoder: str, backend: Any, dtype: torch.dtype) -> None:
    kept, again = two_tasks(tiny(encoder, drop_path_rate=0.5), backend, dtype)
    assert list(kept.state_dict()) == list(again.state_dict())
    (expected, draw, much), (got, other_draw, little) = step(kept), step(again)
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert torch.equal(got[name], gradient), name  # type: ignore[arg-type]
    assert torch.equal(draw, other_draw)
    assert little < 0.85 * much


def test_so_are_the_kernels_gradients() -> None:
    """In Triton's interpreter, or on a GPU."""
    config = tiny("vit", depths=(1,), num_heads=(1,), embed_dim=16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept, again = (task.to(device) for task in two_tasks(config, "triton"))
    inputs = {name: value.to(device) for name, value in batch(0).items()}
    for task in (kept, again):
        task(inputs).loss.backward()
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        if device == "cpu":
            assert torch.equal(a.grad, b.grad), name
        else:  # sums of atomics come in any order
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4 * a.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("encoder", STAGES)
def test_a_compiled_step_is_one_graph_with_the_same_numbers(encoder: str, quick_graphs: None) -> None:
    kept, again = two_tasks(tiny(encoder, drop_path_rate=0.5), "torch")
    expected, _, _ = step(kept)
    compile_step(again)
    got, _, _ = step(again)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_a_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="stage 1 cannot be: the vit encoder's stages are 0 to 0"):
        PretrainTask(tiny("vit"), activation_checkpointing=(1,))


def test_without_gradients_nothing_runs_twice() -> None:
    calls = []
    task = PretrainTask(tiny("swin"), "torch", activation_checkpointing=(0,))
    stage = task.model.encoder.block_stages()[0]
    for block in stage.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        task(batch(0))
    assert len(calls) == 2
    task(batch(0)).loss.backward()
    assert len(calls) == 6
