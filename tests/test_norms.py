"""Apex's LayerNorm in the place of PyTorch's: same parameters, same names, same numbers; and why it may not run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_apex
import pytest
import torch
from torch import nn

from sgmim_fast import ModelConfig, UserError, create_model, nvidia_apex
from sgmim_fast.models import norms
from sgmim_fast.models.norms import check_norm, use_norm
from sgmim_fast.models.sgmim import SGMIM

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for NVIDIA's package, importable for the length of a test."""
    fake_apex.forget()
    monkeypatch.syspath_prepend(fake_apex.write(tmp_path, fake_apex.NVIDIA))
    yield tmp_path
    fake_apex.forget()


def tiny(encoder: Any = "swinv2") -> SGMIM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"embed_dim": 8, "depths": (1,) * 4, "num_heads": (1,) * 4, "window_size": 2}
    if encoder == "vit":
        shape = {"embed_dim": 32, "depths": (1,), "num_heads": (2,)}
    return create_model(ModelConfig(encoder=encoder, image_size=64, **shape), backend="torch")


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_every_norm_is_replaced_and_nothing_else_changes(
    encoder: str, apex: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "check_norm", lambda norm, device: None)  # the stand-in runs on a CPU, Apex does not
    model = tiny(encoder).eval()
    parameters = dict(model.named_parameters())
    eps = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    inputs = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64), torch.tensor([[[True, False], [True, True]]] * 2)
    expected = model(*inputs).loss

    use_norm(model, "apex")

    assert not [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    fused = [module for module in model.modules() if type(module).__name__ == "FusedLayerNorm"]
    assert [module.eps for module in fused] == eps
    assert not any(module.training for module in fused)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    torch.testing.assert_close(model(*inputs).loss, expected, rtol=0, atol=0)
    assert sum(module.calls > 0 for module in fused) >= len(fused) - 1  # patch embedding may go its own way

    use_norm(model, "torch")

    assert [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)] == eps
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}


def test_a_cpu_is_refused_and_the_model_left_alone(apex: Path) -> None:
    model = tiny()
    with pytest.raises(
        UserError, match=r'norm "apex" cannot run here: on the CPU .* PyTorch\'s own norm; it needs a GPU'
    ):
        use_norm(model, "apex")
    assert any(isinstance(module, nn.LayerNorm) for module in model.modules())
    check_norm("apex", GPU)


def test_refusals(apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="norm 'rms' is unknown; choose one of torch, apex"):
        check_norm("rms", CPU)  # type: ignore[arg-type]
    source = fake_apex.NVIDIA["normalization/__init__.py"].replace("extensions = True", "extensions = False")
    fake_apex.write(apex, {"normalization/__init__.py": source})
    with pytest.raises(UserError, match="No module named 'fused_layer_norm_cuda'") as caught:
        check_norm("apex", GPU)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(nvidia_apex, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="NVIDIA Apex is not installed; build NVIDIA's"):
        check_norm("apex", GPU)


def apex_runs() -> bool:
    try:
        check_norm("apex", GPU)
    except UserError:
        return False
    return torch.cuda.is_available()


@pytest.mark.skipif(not apex_runs(), reason="needs NVIDIA Apex and a GPU")
def test_apex_itself() -> None:
    model = tiny().cuda()
    inputs = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64), torch.tensor([[[True, False], [True, True]]] * 2)
    inputs = tuple(x.cuda() for x in inputs)
    expected = model(*inputs).loss
    use_norm(model, "apex")
    torch.testing.assert_close(model(*inputs).loss, expected)
