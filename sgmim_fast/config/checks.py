"""Checks that every configuration shares."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from sgmim_fast.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless ``value`` is among ``choices``."""
    require(value in choices, f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")


def known_fields(config: type, names: Iterable[str]) -> None:
    """Raise UserError unless each of ``names`` is a field of the dataclass ``config``."""
    known = [field.name for field in fields(config)]
    unknown = sorted(set(names) - set(known))
    require(not unknown, f"{config.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}")


def check_widths(embed_dim: Any, depths: tuple[Any, ...], num_heads: tuple[Any, ...]) -> None:
    """Raise UserError unless an encoder can have such stages, each of twice the channels of the one before."""
    require(len(depths) == len(num_heads) > 0, f"depths {depths} and num_heads {num_heads} must have one entry a stage")
    require(all(depth >= 1 for depth in depths), f"depths {depths} must be 1 or more each")
    for stage, heads in enumerate(num_heads):
        width = embed_dim * 2**stage
        require(
            heads >= 1 and width % heads == 0,
            f"num_heads {heads} of stage {stage} does not divide its {width} channels",
        )
