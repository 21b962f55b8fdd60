"""What a model's user can choose after it is made: implementations, and which activations are kept."""

from collections.abc import Sequence

from torch import nn

from sgmim_fast import ops
from sgmim_fast.attention import check_attention
from sgmim_fast.config import Attention, BackboneConfig, Backend, ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.models.layers import Dispatched
from sgmim_fast.models.swin import SwinEncoder
from sgmim_fast.models.vit import ViTEncoder


class Choices(nn.Module):
    """A model around an encoder, with the choices that hold for all of its parts."""

    backend: Backend = "auto"
    attention: Attention = "auto"
    encoder: SwinEncoder | ViTEncoder

    def set_backend(self, backend: Backend) -> None:
        """Choose the implementation: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

        Raises:
            UserError: if it is unknown or cannot run, where the model is now and beside the attention chosen.
        """
        self._choose(backend, self.attention)

    def set_attention(self, attention: Attention) -> None:
        """Choose the attention: ``"auto"`` for the backend's own, ``"sdpa"`` or ``"xformers"`` in its place.

        Raises:
            UserError: if it is unknown or cannot run, where the model is now and beside the backend chosen.
        """
        self._choose(self.backend, attention)

    def _choose(self, backend: Backend, attention: Attention) -> None:
        weight = self.encoder.patch_embed.proj.weight
        check_attention(attention, ops.resolve_backend(backend, weight), weight.device)
        for module in self.modules():
            if module is self or isinstance(module, Dispatched):
                module.backend, module.attention = backend, attention

    def set_activation_checkpointing(self, stages: Sequence[int]) -> None:
        """Let the blocks of these encoder stages (from 0; ViT has stage 0 alone) keep no activations.

        They run again in the backward pass: the same losses and gradients for less memory and more time.

        Raises:
            UserError: for a stage that the encoder lacks.
        """
        found = self.encoder.block_stages()
        for stage in stages:
            if not 0 <= stage < len(found):
                raise UserError(
                    f"activation checkpointing of stage {stage} cannot be: the {self.encoder.config.encoder} encoder's "
                    f"stages are 0 to {len(found) - 1}"
                )
        for number, module in enumerate(found):
            module.checkpointed = number in stages


def make_encoder(config: ModelConfig | BackboneConfig) -> SwinEncoder | ViTEncoder:
    """The encoder of a configuration; see ``ImageEncoder``."""
    return ViTEncoder(config) if config.encoder == "vit" else SwinEncoder(config)
