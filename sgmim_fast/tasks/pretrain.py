"""The pre-training task: what happens to a loader's batch until its losses."""

from collections.abc import Mapping

from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.config import Backend, ModelConfig
from sgmim_fast.models.registry import create_model
from sgmim_fast.models.sgmim import PretrainOutput


class PretrainTask(nn.Module):
    """Standardises the structure maps of a batch and runs the model on it."""

    def __init__(self, config: ModelConfig, backend: Backend = "auto") -> None:
        super().__init__()
        self.model = create_model(config, backend)

    def forward(self, batch: Mapping[str, Tensor]) -> PretrainOutput:
        """Losses of a loader's batch: ``image``, raw ``structure``, ``mask``, ``masked``, ``visible``."""
        structure = batch.get("structure")
        if structure is not None:
            structure = ops.standardize_structure(structure, backend=self.model.backend)
        return self.model(batch["image"], structure, batch["mask"], batch["masked"], batch["visible"])
