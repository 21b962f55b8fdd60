"""The numbers of the original authors' code on the kernels, to float32 accuracy."""

import pytest
import torch

from tests.kernel_cases import DEVICE
from tests.test_golden import assert_golden


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small block as for a large one, and these models have many."""
    if DEVICE == "cuda":
        return
    from sgmim_fast.kernels import window_backward, window_bias, window_forward

    choice = {"BM": 256, "BN": 256, "num_warps": 4, "num_stages": 1}
    for module in (window_forward, window_backward):
        monkeypatch.setattr(module, "tiles", lambda *_: choice)
    monkeypatch.setattr(window_bias, "diagonal_tile", lambda *_: 16)


# What SimMIM's Swin does is part of what SG-MIM's does.
@pytest.mark.parametrize("name", ["sgmim_swin", "simmim_swinv2", "simmim_vit"])
def test_losses_tokens_and_gradients(name: str) -> None:
    assert_golden(name, "triton", torch.float32, torch.device(DEVICE), rel=2e-6, gradient_rel=1e-4)
