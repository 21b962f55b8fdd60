"""The sizes of a model's parameters, which is all that a plan needs of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]
WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Of a weight, and of its gradient on the wire: DeepSpeed communicates in the type of the weights."""
PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole on every rank (stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class ParameterSizes:
    """Elements of each parameter, in the optimizer's groups."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Elements of all."""
        return sum(map(sum, self.groups))

    @property
    def sizes(self) -> tuple[int, ...]:
        """All groups in one."""
        return tuple(size for group in self.groups for size in group)

    @property
    def persistent(self) -> tuple[int, ...]:
        """Those that ZeRO-3 keeps whole on every rank."""
        return tuple(size for size in self.sizes if size <= PERSISTENT)

    @property
    def partitioned(self) -> tuple[int, ...]:
        """Those that ZeRO-3 spreads over the ranks."""
        return tuple(size for size in self.sizes if size > PERSISTENT)


def padded(sizes: Iterable[int], multiple: int) -> int:
    """Elements of all, each filled up to a multiple."""
    return sum(-(-size // multiple) * multiple for size in sizes)
