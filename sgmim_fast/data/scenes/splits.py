"""What scenes of a split may show. Those of "test" have textures, furniture and cameras that "train" never shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from sgmim_fast.data.scenes.textures import UNSEEN_PATTERNS
from sgmim_fast.errors import UserError

if TYPE_CHECKING:
    from sgmim_fast.data.scenes.layout import Layout

SceneSplit = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Variety:
    """Ranges that differ between splits; those of cameras do not meet."""

    fov: tuple[float, float]
    """Degrees, along the longer image side."""
    low_eye: tuple[float, float]
    """Metres above the ground, outdoors: two thirds of the cameras."""
    high_eye: tuple[float, float]
    """Of the others."""
    low_room_eye: bool
    """Whether cameras in rooms lie near the floor."""
    steady: float
    """Share of the cameras that are hardly rolled."""
    rolls: tuple[float, float]
    """Radians, of the others, to either side."""
    unseen_furniture: bool
    unseen_patterns: bool

    def room_eye(self, top: float) -> tuple[float, float]:
        """Bounds of a camera's height in a room ``top`` metres high."""
        return (0.12, 0.38) if self.low_room_eye else (0.4, min(2.4, top - 0.35))

    def roll(self, rng: np.random.Generator) -> float:
        """A camera's roll in radians."""
        if rng.uniform() < self.steady:
            return rng.normal(0, math.radians(2.5))
        low, high = self.rolls
        return rng.uniform(low, high) if low < 0 or rng.uniform() < 0.5 else rng.uniform(-high, -low)

    def repainted(self, rng: np.random.Generator, layout: Layout) -> Layout:
        """The layout with patterns of this split; pieces that share a material still do."""
        if not self.unseen_patterns:
            return layout
        new = {}
        for material in (layout.ground, *(solid.material for solid in layout.solids)):
            if id(material) not in new:
                new[id(material)] = replace(material, pattern=UNSEEN_PATTERNS[rng.integers(len(UNSEEN_PATTERNS))])
        solids = [replace(solid, material=new[id(solid.material)]) for solid in layout.solids]
        return replace(layout, ground=new[id(layout.ground)], solids=solids)


TRAIN = Variety(
    fov=(40, 80),
    low_eye=(0.5, 2.2),
    high_eye=(2.2, 9.0),
    low_room_eye=False,
    steady=0.85,
    rolls=(-0.4, 0.4),
    unseen_furniture=False,
    unseen_patterns=False,
)
TEST = Variety(
    fov=(82, 92),
    low_eye=(0.25, 0.48),
    high_eye=(9.1, 12.0),
    low_room_eye=True,
    steady=0.4,
    rolls=(0.41, 0.6),
    unseen_furniture=True,
    unseen_patterns=True,
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
