"""The numbers of the original authors' code, float64, for both plain and gathered path."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sgmim_fast import ModelConfig, create_model
from sgmim_fast.config import Backend

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import formula  # noqa: E402  (the generator that the figures were made with lies beside them)

RENAMED = {"depth": "depths"}
ALWAYS = ("shared_relative_position_bias", "class_token")  # properties of the encoder, not options


NAMES = ("sgmim_swin", "simmim_swin", "simmim_swinv2", "simmim_vit")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_tokens_and_gradients(name: str, backend: Backend) -> None:
    assert_golden(name, backend, torch.float64, torch.device("cpu"), rel=1e-7, gradient_rel=1e-6)


def assert_golden(
    name: str, backend: Backend, dtype: torch.dtype, device: torch.device, *, rel: float, gradient_rel: float
) -> None:
    """Losses, tokens and the norm of every gradient of case ``name`` are the authors', as closely as that."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    fields = {RENAMED.get(k, k): v for k, v in golden["architecture"].items() if k not in ALWAYS}
    model = create_model(ModelConfig(**fields)).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            assert list(parameter.shape) == golden["parameter_shapes"][key]
            parameter.copy_(torch.from_numpy(formula.weight(key, tuple(parameter.shape))))
    model = model.to(device, dtype)
    model.set_backend(backend)
    image, structure, mask = (torch.from_numpy(array).to(device) for array in formula.inputs(golden["case"]))
    image, structure = image.to(dtype), structure.to(dtype)

    seen: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda module, inputs, tokens: seen.append(tokens.detach()))
    out = model(image, structure, mask)
    out.loss.backward()
    tokens = seen[0].double().cpu()

    assert out.loss.item() == pytest.approx(golden["loss"], rel=rel)
    assert out.image_loss.item() == pytest.approx(golden["image_loss"], rel=rel)
    if golden["structure_loss"] is None:
        assert out.structure_loss is None
    else:
        assert out.structure_loss is not None
        assert out.structure_loss.item() == pytest.approx(golden["structure_loss"], rel=rel)

    expected = golden["encoder_tokens"]
    assert list(tokens.shape) == expected["shape"]
    # Single numbers are held to the scale of all of them.
    slack = 10 * rel * expected["std"] if dtype != torch.float64 else 0
    assert tokens.mean().item() == pytest.approx(expected["mean"], rel=rel, abs=slack)
    assert tokens.std().item() == pytest.approx(expected["std"], rel=rel)
    flat = tokens.flatten().numpy()
    np.testing.assert_allclose(flat[:8], expected["first"], rtol=rel, atol=slack)
    np.testing.assert_allclose(flat[-8:], expected["last"], rtol=rel, atol=slack)

    norms = {key: p.grad.double().norm().item() for key, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == golden["grad_norms"].keys()
    for key, norm in golden["grad_norms"].items():
        assert norms[key] == pytest.approx(norm, rel=gradient_rel), key
    total = torch.tensor(list(norms.values()), dtype=torch.float64).norm().item()
    assert total == pytest.approx(golden["grad_norm"], rel=gradient_rel)
