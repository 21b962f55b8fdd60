"""Checks that every configuration shares."""

from sgmim_fast.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless ``value`` is among ``choices``."""
    require(value in choices, f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
