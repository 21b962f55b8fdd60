"""How the pieces of a scene are made."""

import math

import numpy as np
from numpy.typing import NDArray

from sgmim_fast.data.scenes.geometry import CLASS_OF_SHAPE, Shape, Solid
from sgmim_fast.data.scenes.textures import Material, draw_material

F64 = NDArray[np.float64]


def yaw_axes(angle: float) -> F64:
    """Local axes (3, 3) turned by ``angle`` radians around the vertical."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def make_solid(
    rng: np.random.Generator, shape: Shape, center: F64, half: F64, axes: F64, material: Material | None = None
) -> Solid:
    """A solid of the class of its shape, with a random material unless one is given."""
    material = material or draw_material(rng, float(half.max() * 2))
    return Solid(shape, CLASS_OF_SHAPE[shape], center, axes, half, material, rng.uniform(-1, 1, 3))
