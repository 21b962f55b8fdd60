"""What is compared: ways to pre-train one and the same encoder.

Ablations that the package does not offer are built here on its plain path, so their images a second say nothing about
what a fast implementation of them would need.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast import ops, reference
from sgmim_fast.config import Backend, ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.models.layers import PixelHead
from sgmim_fast.models.sgmim import SGMIM, PretrainOutput


class OtherCells(SGMIM):
    """The method with the map given, or asked for, at other cells than the complement of the image's."""

    def given(self, mask: Tensor) -> Tensor:
        """Cells (B, Gh, Gw) at which the map is given, by those at which the image is masked."""
        return mask

    def asked(self, mask: Tensor) -> Tensor:
        """Cells at which its prediction counts."""
        return ~mask

    def _plain(self, image: Tensor, structure: Tensor | None, mask: Tensor, masked: Tensor | None) -> PretrainOutput:
        assert structure is not None
        z = self.encoder(image, mask)
        image_loss = reference.pixel_l1(self._pixels(z, self.image_head), self._image_target(image), mask)
        prediction = self._pixels(self._guided(z, structure, self.given(mask)), self.dep_decoder)
        return self._total(image_loss, reference.pixel_l1(prediction, structure, self.asked(mask)))


class SameCells(OtherCells):
    """The map is given where the image is visible, and both are predicted where the image is masked."""

    def given(self, mask: Tensor) -> Tensor:
        return ~mask

    def asked(self, mask: Tensor) -> Tensor:
        return mask


class LossEverywhere(OtherCells):
    """The map is given where the image is masked, and must be said everywhere, there too."""

    def asked(self, mask: Tensor) -> Tensor:
        return torch.ones_like(mask)


class FourthChannel(SGMIM):
    """Mixing in pixels: the standardised map is a fourth channel of the image.

    Patch embedding takes four channels, so a token holds both; both are masked together, and one head predicts four
    channels. The loss is SimMIM's, the mean absolute error over masked pixels and all four channels. In the tasks that
    follow there is no map: the encoder goes on with what patch embedding has learnt for the three others.
    """

    def __init__(self, config: ModelConfig, backend: Backend = "reference") -> None:
        super().__init__(config, "reference")
        proj = self.encoder.patch_embed.proj
        wider = nn.Conv2d(4, proj.out_channels, proj.kernel_size, proj.stride)  # type: ignore[arg-type]
        nn.init.trunc_normal_(wider.weight, std=0.02)
        self.encoder.patch_embed.proj = wider
        self.decoder = nn.Sequential(PixelHead(config.num_features, 4 * config.stride**2))

    def forward(
        self,
        image: Tensor,
        structure: Tensor | None,
        mask: Tensor,
        masked: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> PretrainOutput:
        assert structure is not None
        both = torch.cat((image, structure.to(image.dtype)), 1)
        prediction = self._pixels(self.encoder(both, mask), self.image_head)
        parts = [reference.pixel_l1(prediction[:, some], both[:, some], mask) for some in (slice(3), slice(3, 4))]
        return PretrainOutput(reference.pixel_l1(prediction, both, mask), *parts)


@dataclass(frozen=True)
class Arm:
    """One way to pre-train."""

    name: str
    says: str
    kind: type[SGMIM] | None = SGMIM
    """The model; None pre-trains nothing."""
    changes: tuple[tuple[str, Any], ...] = (("guidance", "relational"),)
    """Fields of ``ModelConfig``."""
    backend: Backend = "auto"
    maps: str = "structure"
    """The folder of scenes that its maps are in."""

    def config(self, model: ModelConfig) -> ModelConfig:
        """The arm's own shape."""
        return replace(model, **dict(self.changes))


_RELATIONAL = ("guidance", "relational")
ARMS = {
    arm.name: arm
    for arm in (
        Arm("scratch", "no pre-training: the initial weights", None, ()),
        Arm("simmim", "masked images alone", SGMIM, (("guidance", "none"),)),
        Arm("sgmim", "the method: relational guidance, weight 1"),
        Arm(
            "sgmim-visible", "relational guidance without hidden context", SGMIM, (("guidance", "relational-visible"),)
        ),
        Arm("structure-same-cells", "map given where the image is", SameCells, backend="reference"),
        Arm("structure-loss-everywhere", "map predicted at all cells", LossEverywhere, backend="reference"),
        Arm("structure-weight-0.1", "map's loss x 0.1", SGMIM, (_RELATIONAL, ("structure_loss_weight", 0.1))),
        Arm("structure-weight-10", "map's loss x 10", SGMIM, (_RELATIONAL, ("structure_loss_weight", 10.0))),
        Arm("fourth-channel", "map as a fourth channel", FourthChannel, (("guidance", "none"),), "reference"),
        Arm(
            "sgmim-normals",
            "the method with surface normals as the map",
            SGMIM,
            (_RELATIONAL, ("structure_channels", 3)),
            maps="normals",
        ),
    )
}
"""By name. The first nine are what is compared unless other arms are named."""
DEFAULT_ARMS = tuple(ARMS)[:9]
BASELINE = "simmim"
"""What every arm is held against."""
METHOD = "sgmim"
COMPARED = ("scratch", BASELINE, METHOD)
"""The others are its ablations."""
ROW_COLOUR = "row-colour"
"""No arm: row, column and mean colour of a token, probed like an encoder's features."""


def find_arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in ARMS:
        raise UserError(f"arm {name!r} is unknown; choose among {', '.join(ARMS)}")
    return ARMS[name]


class ArmTask(nn.Module):
    """Standardises the maps of a batch and runs an arm's model on it, as ``PretrainTask`` does.

    Normals are in -1 to 1 as they are; a component's spread within one image says nothing, and is 0 on a lone plane.
    """

    def __init__(self, model: SGMIM, maps: str) -> None:
        super().__init__()
        self.model, self.maps = model, maps

    def forward(self, batch: Mapping[str, Tensor]) -> PretrainOutput:
        if self.maps == "normals":
            structure = batch["structure"] / 127.5 - 1
        else:
            structure = ops.standardize_structure(batch["structure"], backend=self.model.backend)
        return self.model(batch["image"], structure, batch["mask"], batch["masked"], batch["visible"])


def initial_encoder(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The encoder's weights that all arms of a seed begin with."""
    torch.manual_seed(seed)
    return SGMIM(replace(model, guidance="none"), "reference").encoder.state_dict()


def make_task(arm: Arm, model: ModelConfig, seed: int) -> ArmTask:
    """An arm before its first step: the seed's encoder, and new parts that are those of every arm that has them.

    Raises:
        UserError: for an arm that pre-trains nothing.
    """
    if arm.kind is None:
        raise UserError(f"arm {arm.name} has no pre-training")
    initial = initial_encoder(model, seed)
    torch.manual_seed(seed)
    made = arm.kind(arm.config(model), arm.backend)
    own = made.encoder.state_dict()
    key = "patch_embed.proj.weight"
    if own[key].shape != initial[key].shape:
        initial[key] = torch.cat((initial[key], own[key][:, 3:]), 1)
    made.encoder.load_state_dict(initial)
    return ArmTask(made, arm.maps)


def encoder_of(task: ArmTask) -> dict[str, Tensor]:
    """Weights of the encoder for images of three channels, fp32 on the CPU, without the mask token."""
    state = {name: value.detach().float().cpu() for name, value in task.model.encoder.state_dict().items()}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :3].contiguous()
    state.pop("mask_token")
    return {name: value.clone() for name, value in state.items()}
