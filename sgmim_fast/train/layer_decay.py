"""Learning rates that fall from the head to the patch embedding (BEiT, MIM-Depth-Estimation)."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from sgmim_fast.errors import UserError
from sgmim_fast.train.optim import NOT_DECAYED

_STAGED = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_FIRST = re.compile(r"(?:^|\.)(?:patch_embed\.|(?:cls_token|mask_token|pos_embed|absolute_pos_embed)$)")


class LayerNumbers:
    """Numbers the layers of a backbone by the names of its parameters.

    Patch embedding and tokens are layer 0, then come the blocks from 1 on. As in MIM-Depth-Estimation a Swin's patch
    merging is a layer of its own after the blocks of its stage, so Swin-B has 24 blocks, 3 mergings and its head is
    layer 28. Whatever is neither (norms, a ViT's shared table, a pyramid) has the head's number.

    Args:
        names: of all parameters of the backbone.

    Raises:
        UserError: if no name is that of a block.
    """

    def __init__(self, names: Iterable[str]) -> None:
        stages: dict[int, int] = {}  # blocks of each
        blocks = 0
        merging = set()
        for name in names:
            if found := _STAGED.search(name):
                stage = int(found[1])
                if found[2] is None:
                    merging.add(stage)
                else:
                    stages[stage] = max(stages.get(stage, 0), int(found[2]) + 1)
            elif found := _BLOCK.search(name):
                blocks = max(blocks, int(found[1]) + 1)
        if not stages and not blocks:
            raise UserError("layer_decay needs a Swin or ViT backbone, and no parameter here belongs to a block")
        self._depths = stages
        self._before = {
            stage: sum(depth + (earlier in merging) for earlier, depth in stages.items() if earlier < stage)
            for stage in stages
        }
        self.head = 1 + blocks + sum(stages.values()) + len(merging)

    def __call__(self, name: str) -> int:
        """The layer of a parameter of the backbone."""
        if _FIRST.search(name):
            return 0
        if found := _STAGED.search(name):
            stage = int(found[1])
            inside = self._depths[stage] if found[2] is None else int(found[2])
            return 1 + self._before[stage] + inside
        found = _BLOCK.search(name)
        return self.head if found is None else 1 + int(found[1])


def layer_decay_groups(task: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a task with ``.backbone``: for each layer the matrices, and the rest without weight decay.

    Args:
        task: everything outside its ``backbone`` is the head.
        weight_decay: of matrices; 1-d parameters, tables, tokens and scales have none.
        layer_decay: what the learning rate is multiplied by from each layer to the one before it; the head's is whole.

    Returns:
        Groups that are not empty, from the patch embedding to the head, with "params", "weight_decay" and "lr_scale",
        the factor of their learning rate. Frozen parameters are in none.

    Raises:
        UserError: if the backbone has no blocks.
    """
    backbone = {name for name, _ in task.named_parameters() if name.startswith("backbone.")}
    layer_of = LayerNumbers(backbone)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name) if name in backbone else layer_of.head
        # ZeRO-3 keeps partitioned parameters flat; their true shape is ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        plain = len(shape) <= 1 or any(word in name for word in NOT_DECAYED)
        groups.setdefault((layer, plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": layer_decay ** (layer_of.head - layer),
        }
        for (layer, plain), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
