"""The pre-training task: what happens to a loader's batch until its losses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.config import Attention, Backend, Float8, ModelConfig, Norm
from sgmim_fast.models.float8 import use_float8
from sgmim_fast.models.norms import use_norm
from sgmim_fast.models.registry import create_model
from sgmim_fast.models.sgmim import PretrainOutput


class PretrainTask(nn.Module):
    """Standardises the structure maps of a batch and runs the model on it.

    Args:
        config: the model.
        backend: see ``SGMIM.set_backend``.
        attention: see ``SGMIM.set_attention``.
        norm: see ``use_norm``.
        device: where the model runs, and where the choices are checked; None leaves it where it was made.
        activation_checkpointing: see ``SGMIM.set_activation_checkpointing``.
        float8: see ``use_float8``.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend = "auto",
        attention: Attention = "auto",
        norm: Norm = "torch",
        device: torch.device | None = None,
        activation_checkpointing: Sequence[int] = (),
        float8: Float8 = "off",
    ) -> None:
        super().__init__()
        self.model = create_model(config).to(device)
        self.model.set_backend(backend)
        self.model.set_attention(attention)
        use_norm(self.model, norm)
        use_float8(self.model, float8)
        self.model.set_activation_checkpointing(activation_checkpointing)

    def forward(self, batch: Mapping[str, Tensor]) -> PretrainOutput:
        """Losses of a loader's batch: ``image``, raw ``structure``, ``mask``, ``masked``, ``visible``."""
        structure = batch.get("structure")
        if structure is not None:
            structure = ops.standardize_structure(structure, backend=self.model.backend)
        return self.model(batch["image"], structure, batch["mask"], batch["masked"], batch["visible"])
