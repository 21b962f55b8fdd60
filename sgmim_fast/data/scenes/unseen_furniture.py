"""Furniture that only scenes of the test split hold: shapes put together as nowhere else."""

import math

import numpy as np

from sgmim_fast.data.scenes.geometry import Shape, Solid
from sgmim_fast.data.scenes.solids import F64, make_solid, yaw_axes
from sgmim_fast.data.scenes.textures import draw_material

KINDS = ("steps", "snowman", "fence", "arch", "pagoda", "wheel")


def arrange_unseen(rng: np.random.Generator, spot: F64, floor: float, size: float, headroom: float) -> list[Solid]:
    """One piece of furniture of ``KINDS`` standing at ``spot``; arguments as in ``arrange``."""
    kind = KINDS[rng.integers(len(KINDS))]
    solids = _BUILDERS[kind](rng, spot, floor, size)
    top = max(float(solid.center[2] + solid.extent(np.array([0.0, 0.0, 1.0]))) for solid in solids) - floor
    if top <= 0.95 * headroom:
        return solids
    return _BUILDERS[kind](rng, spot, floor, size * 0.6 * headroom / top)


def _steps(rng: np.random.Generator, spot: F64, floor: float, size: float) -> list[Solid]:
    """Three to five boxes side by side, each higher than the one before."""
    axes, count = yaw_axes(rng.uniform(0, 2 * np.pi)), int(rng.integers(3, 6))
    material, rise, tread = draw_material(rng, size), size * rng.uniform(0.25, 0.5), size * rng.uniform(0.25, 0.45)
    wide = size * rng.uniform(0.5, 1.2)
    solids = []
    for number in range(count):
        half = np.array([tread / 2, wide, rise * (number + 1) / 2])
        along = (number - (count - 1) / 2) * tread
        center = np.array([*spot, floor + half[2]]) + along * axes[0]
        solids.append(make_solid(rng, "box", center, half, axes, material))
    return solids


def _snowman(rng: np.random.Generator, spot: F64, floor: float, size: float) -> list[Solid]:
    """Two or three balls on top of each other."""
    base, solids = floor, []
    for _ in range(rng.integers(2, 4)):
        half = np.full(3, size * rng.uniform(0.6, 0.9))
        solids.append(make_solid(rng, "sphere", np.array([*spot, base + half[2]]), half, yaw_axes(0.0)))
        base, size = base + 1.85 * half[2], size * 0.75
    return solids


def _fence(rng: np.random.Generator, spot: F64, floor: float, size: float) -> list[Solid]:
    """A row of equal pales, round or pointed."""
    axes, count = yaw_axes(rng.uniform(0, 2 * np.pi)), int(rng.integers(4, 8))
    shape: Shape = "cylinder" if rng.uniform() < 0.6 else "cone"
    material, thin = draw_material(rng, size), size * rng.uniform(0.1, 0.2) + 0.01
    half = np.array([thin, thin, size * rng.uniform(0.5, 1.2)])
    gap = thin * rng.uniform(2.6, 4.0)
    middles = [(number - (count - 1) / 2) * gap for number in range(count)]
    foot = np.array([*spot, floor + half[2]])
    return [make_solid(rng, shape, foot + along * axes[0], half, axes, material) for along in middles]


def _arch(rng: np.random.Generator, spot: F64, floor: float, size: float) -> list[Solid]:
    """A beam across two columns."""
    axes = yaw_axes(rng.uniform(0, 2 * np.pi))
    shape: Shape = "cylinder" if rng.uniform() < 0.5 else "box"
    thick, tall, reach = size * rng.uniform(0.15, 0.3), size * rng.uniform(0.7, 1.3), size * rng.uniform(0.7, 1.2)
    half = np.array([thick, thick, tall])
    foot = np.array([*spot, floor + tall])
    solids = [make_solid(rng, shape, foot + side * reach * axes[0], half, axes) for side in (-1, 1)]
    beam = np.array([reach + 1.5 * thick, 1.2 * thick, 0.8 * thick])
    center = np.array([*spot, floor + 2 * tall + beam[2]])
    return [*solids, make_solid(rng, "box", center, beam, axes)]


def _pagoda(rng: np.random.Generator, spot: F64, floor: float, size: float) -> list[Solid]:
    """Two to four cones that sit on each other's points."""
    base, solids = floor, []
    for _ in range(rng.integers(2, 5)):
        half = np.array([1.0, 1.0, rng.uniform(0.5, 0.9)]) * size * rng.uniform(0.7, 1.0)
        solids.append(make_solid(rng, "cone", np.array([*spot, base + half[2]]), half, yaw_axes(0.0)))
        base, size = base + 1.1 * half[2], size * 0.8
    return solids


def _wheel(rng: np.random.Generator, spot: F64, floor: float, size: float) -> list[Solid]:
    """A drum that stands on its rim, with an axle."""
    turn = yaw_axes(rng.uniform(0, 2 * np.pi))
    axes = turn[[2, 0, 1]]  # its own axis is horizontal
    radius, wide = size * rng.uniform(0.6, 1.1), size * rng.uniform(0.08, 0.25)
    middle = np.array([*spot, floor + radius])
    axle = np.array([0.25 * radius, 0.25 * radius, wide * math.exp(rng.uniform(0.4, 1.0))])
    return [
        make_solid(rng, "cylinder", middle, np.array([radius, radius, wide]), axes),
        make_solid(rng, "cylinder", middle, axle, axes),
    ]


_BUILDERS = {
    "steps": _steps,
    "snowman": _snowman,
    "fence": _fence,
    "arch": _arch,
    "pagoda": _pagoda,
    "wheel": _wheel,
}
