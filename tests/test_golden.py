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


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["sgmim_swin", "simmim_swin", "simmim_swinv2", "simmim_vit"])
def test_losses_tokens_and_gradients(name: str, backend: Backend) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    fields = {RENAMED.get(k, k): v for k, v in golden["architecture"].items() if k not in ALWAYS}
    model = create_model(ModelConfig(**fields), backend=backend).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            assert list(parameter.shape) == golden["parameter_shapes"][key]
            parameter.copy_(torch.from_numpy(formula.weight(key, tuple(parameter.shape))))
    image, structure, mask = (torch.from_numpy(array) for array in formula.inputs(golden["case"]))

    tokens = model.encode(image, mask)
    out = model(image, structure, mask)
    out.loss.backward()

    assert out.loss.item() == pytest.approx(golden["loss"], rel=1e-7)
    assert out.image_loss.item() == pytest.approx(golden["image_loss"], rel=1e-7)
    if golden["structure_loss"] is None:
        assert out.structure_loss is None
    else:
        assert out.structure_loss is not None
        assert out.structure_loss.item() == pytest.approx(golden["structure_loss"], rel=1e-7)

    expected = golden["encoder_tokens"]
    assert list(tokens.shape) == expected["shape"]
    assert tokens.mean().item() == pytest.approx(expected["mean"], rel=1e-7)
    assert tokens.std().item() == pytest.approx(expected["std"], rel=1e-7)
    flat = tokens.detach().flatten().numpy()
    np.testing.assert_allclose(flat[:8], expected["first"], rtol=1e-7)
    np.testing.assert_allclose(flat[-8:], expected["last"], rtol=1e-7)

    norms = {key: p.grad.norm().item() for key, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == golden["grad_norms"].keys()
    for key, norm in golden["grad_norms"].items():
        assert norms[key] == pytest.approx(norm, rel=1e-6), key
    total = torch.tensor(list(norms.values()), dtype=torch.float64).norm().item()
    assert total == pytest.approx(golden["grad_norm"], rel=1e-6)
