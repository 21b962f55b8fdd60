"""The furniture of synthetic scenes: single solids, stacks, tables, posts with crowns, and walls."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sgmim_fast.data.scenes.geometry import WALL, Shape, Solid
from sgmim_fast.data.scenes.solids import make_solid, yaw_axes
from sgmim_fast.data.scenes.textures import Material, draw_material
from sgmim_fast.data.scenes.unseen_furniture import arrange_unseen

F64 = NDArray[np.float64]
_SHAPES: tuple[Shape, ...] = ("box", "sphere", "cylinder", "cone")


def random_axes(rng: np.random.Generator) -> F64:
    """Uniformly random orthonormal axes (3, 3)."""
    w, x, y, z = (lambda q: q / np.linalg.norm(q))(rng.normal(size=4))
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def arrange(
    rng: np.random.Generator, spot: F64, floor: float, size: float, headroom: float, unseen: bool = False
) -> list[Solid]:
    """One piece of furniture standing at ``spot``.

    Args:
        spot: (2,) metres on the ground.
        floor: height it stands on, metres.
        size: typical half size, metres.
        headroom: height that nothing may exceed, metres above the floor.
        unseen: of the kinds that are kept for the test split, in the place of all others.
    """
    if unseen:
        return arrange_unseen(rng, spot, floor, size, headroom)
    kind = rng.choice(["single", "stack", "table", "post"], p=[0.58, 0.2, 0.1, 0.12])
    if kind == "table":
        return _table(rng, spot, floor, size, headroom)
    if kind == "post":
        return _post(rng, spot, floor, size, headroom)
    if kind == "stack":
        return _stack(rng, spot, floor, size, headroom)
    lift = rng.uniform(0.2, 1.5) if rng.uniform() < 0.1 else 0.0
    return [_single(rng, spot, floor, size, headroom, lift)]


def _single(
    rng: np.random.Generator, spot: F64, floor: float, size: float, headroom: float, lift: float = 0.0
) -> Solid:
    shape = _SHAPES[rng.choice(4, p=[0.36, 0.22, 0.26, 0.16])]
    half = size * rng.uniform(0.5, 1.6, 3)
    axes = yaw_axes(rng.uniform(0, 2 * np.pi))
    if shape == "sphere" and rng.uniform() < 0.65:
        half[:] = half[0]
    if shape in ("cylinder", "cone"):
        half[1] = half[0]
    if shape == "cylinder" and rng.uniform() < 0.3:
        axes = axes[[2, 0, 1]]  # lying: its own axis is horizontal
    elif shape == "box" and rng.uniform() < 0.15:
        axes = random_axes(rng)
    solid = make_solid(rng, shape, np.zeros(3), half, axes)
    tall = 2 * solid.extent(np.array([0.0, 0.0, 1.0]))
    shrink = min(1.0, 0.95 * headroom / tall)
    lift = min(lift, max(0.0, headroom - shrink * tall - 0.02))
    center = np.array([*spot, floor + lift + shrink * tall / 2])
    return replace(solid, center=center, half=half * shrink)


def _stack(rng: np.random.Generator, spot: F64, floor: float, size: float, headroom: float) -> list[Solid]:
    """Boxes or drums on top of each other, something smaller on the last one."""
    solids: list[Solid] = []
    base = floor
    for _ in range(rng.integers(1, 3)):
        half = size * rng.uniform([0.6, 0.6, 0.3], [1.3, 1.3, 0.9])
        half[2] = min(half[2], 0.35 * (floor + headroom - base))
        shape: Shape = "box" if rng.uniform() < 0.7 else "cylinder"
        if shape == "cylinder":
            half[1] = half[0]
        axes = yaw_axes(rng.uniform(0, 2 * np.pi))
        solids.append(make_solid(rng, shape, np.array([*spot, base + half[2]]), half, axes))
        base += 2 * half[2]
        size *= 0.75
    solids.append(_single(rng, spot, base, 0.7 * size, floor + headroom - base))
    return solids


def _table(rng: np.random.Generator, spot: F64, floor: float, size: float, headroom: float) -> list[Solid]:
    """A board on four legs with something on it; a low one passes for a bench."""
    axes = yaw_axes(rng.uniform(0, 2 * np.pi))
    tall = min(size * rng.uniform(0.9, 2.2), 0.6 * headroom)
    length, depth = size * rng.uniform(1.1, 2.0), size * rng.uniform(0.6, 1.2)
    board, leg = 0.06 * size + 0.02, size * rng.uniform(0.05, 0.12) + 0.01
    wood = draw_material(rng, size)
    middle = np.array([*spot, floor + tall - board])
    solids = [make_solid(rng, "box", middle, np.array([length, depth, board]), axes, wood)]
    shape: Shape = "cylinder" if rng.uniform() < 0.5 else "box"
    half = np.array([leg, leg, tall / 2 - board])
    for x in (leg - length, length - leg):
        for y in (leg - depth, depth - leg):
            foot = np.array([*spot, floor + half[2]]) + x * axes[0] + y * axes[1]
            solids.append(make_solid(rng, shape, foot, half, axes, wood))
    if rng.uniform() < 0.7:
        solids.append(_single(rng, spot, floor + tall, 0.35 * size, headroom - tall))
    return solids


def _post(rng: np.random.Generator, spot: F64, floor: float, size: float, headroom: float) -> list[Solid]:
    """A thin post with a ball or cone on it: a tree, a floor lamp, a road sign."""
    tall = min(size * rng.uniform(1.5, 4.5), 0.6 * headroom)
    thin = size * rng.uniform(0.06, 0.2) + 0.01
    axes = yaw_axes(0.0)
    crown: Shape = "sphere" if rng.uniform() < 0.6 else "cone"
    half = np.array([1.0, 1.0, rng.uniform(0.7, 1.8)]) * size * rng.uniform(0.5, 1.1)
    half *= min(1.0, 0.48 * (headroom - 0.9 * tall) / half[2])
    trunk = make_solid(rng, "cylinder", np.array([*spot, floor + tall / 2]), np.array([thin, thin, tall / 2]), axes)
    return [trunk, make_solid(rng, crown, np.array([*spot, floor + 0.9 * tall + half[2]]), half, axes)]


def wall_with_opening(
    start: F64,
    end: F64,
    span: tuple[float, float],
    thickness: float,
    material: Material,
    opening: tuple[float, float, float, float] | None = None,
    shell: bool = False,
) -> list[Solid]:
    """A wall from ``start`` to ``end`` (2,), as one box, or as the boxes around a window or door.

    Args:
        span: heights of its foot and top, metres.
        thickness: metres, to both sides of the line by half.
        opening: left, right (metres from ``start``), bottom, top (height).
    """
    length = float(np.linalg.norm(end - start))
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    axes = yaw_axes(angle)
    low, high = span
    pieces = [(0.0, length, low, high)]
    if opening is not None:
        left, right, bottom, top = opening
        pieces = [
            (0.0, left, low, high),
            (right, length, low, high),
            (left, right, low, bottom),
            (left, right, top, high),
        ]
    solids = []
    for a, b, c, d in pieces:
        if b - a < 0.01 or d - c < 0.01:
            continue
        half = np.array([(b - a) / 2, thickness / 2, (d - c) / 2])
        center = np.array([*start, 0.0]) + axes[0] * (a + b) / 2 + np.array([0.0, 0.0, (c + d) / 2])
        solids.append(
            Solid("box", WALL, center, axes, half, material, np.array([(a + b) / 2, 0.0, (c + d) / 2]), shell)
        )
    return solids
