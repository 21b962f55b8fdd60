"""The numbers of the original authors' code on the kernels, to float32 accuracy."""

import pytest
import torch

from tests.kernel_cases import DEVICE
from tests.test_golden import NAMES, assert_golden


@pytest.mark.parametrize("name", NAMES)
def test_losses_tokens_and_gradients(name: str) -> None:
    assert_golden(name, "triton", torch.float32, torch.device(DEVICE), rel=2e-6, gradient_rel=1e-4)
