"""What scenes of a split may show. Those of "test" have textures, furniture and cameras that "train" never shows."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sgmim_fast.errors import UserError

SceneSplit = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Variety:
    """What differs between splits. No camera of one has the field of view of one of the other."""

    fields_of_view: tuple[tuple[float, float], ...]
    """Ranges in degrees, along the longer image side; each is as likely."""
    steady: float
    """Share of the cameras that are hardly rolled."""
    rolls: tuple[float, float]
    """Radians, of the others, to either side."""
    unseen_furniture: bool
    unseen_patterns: bool

    def field_of_view(self, rng: np.random.Generator) -> float:
        """Degrees."""
        ranges = self.fields_of_view
        return rng.uniform(*ranges[0 if len(ranges) == 1 else rng.integers(len(ranges))])

    def roll(self, rng: np.random.Generator) -> float:
        """A camera's roll in radians."""
        if rng.uniform() < self.steady:
            return rng.normal(0, math.radians(2.5))
        low, high = self.rolls
        return rng.uniform(low, high) if low < 0 or rng.uniform() < 0.5 else rng.uniform(-high, -low)


TRAIN = Variety(
    fields_of_view=((40, 80),), steady=0.85, rolls=(-0.4, 0.4), unseen_furniture=False, unseen_patterns=False
)
# Narrower and wider by about as much: depths are then neither smaller nor larger than in training on the whole.
TEST = Variety(
    fields_of_view=((32, 39), (81, 92)), steady=0.4, rolls=(0.41, 0.6), unseen_furniture=True, unseen_patterns=True
)
_VARIETIES = {"train": TRAIN, "test": TEST}


def variety_of(split: SceneSplit) -> Variety:
    """What the scenes of a split may show.

    Raises:
        UserError: if there is no such split.
    """
    if split not in _VARIETIES:
        raise UserError(f"split {split!r} is unknown; choose {' or '.join(get_args(SceneSplit))}")
    return _VARIETIES[split]
