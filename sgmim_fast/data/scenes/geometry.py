"""Ray casting of boxes, ellipsoids, cylinders and cones with numpy.

Every solid is a unit shape under an affine map, and convex: a ray meets it in one interval
(enter, leave), so primary rays and shadow rays share one function a shape. World axes: x and y on
the ground, z up, metres. Vectors of N rays or points are (3, N) float32, one row a component.
No BLAS is called, so results do not depend on a thread count.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sgmim_fast.data.scenes.textures import Material

F32 = NDArray[np.float32]
Shape = Literal["box", "sphere", "cylinder", "cone"]

SKY, GROUND, CEILING, WALL, BOX, SPHERE, CYLINDER, CONE = range(8)
CLASS_NAMES = ("sky", "ground", "ceiling", "wall", "box", "sphere", "cylinder", "cone")
"""Names of the label values; 0, the sky, has no depth."""
CLASS_OF_SHAPE: dict[Shape, int] = {"box": BOX, "sphere": SPHERE, "cylinder": CYLINDER, "cone": CONE}

NOTHING = -1
"""Surface index of a ray that leaves the scene; the index after the last solid is the ground plane."""

_NEAREST = 0.02  # metres of depth where frustum clipping and primary rays begin
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
_EDGES = np.array([(a, b) for a in range(8) for b in range(a) if (a ^ b) in (1, 2, 4)])


@dataclass(frozen=True, eq=False)
class Solid:
    """One convex solid: a unit shape scaled by ``half`` along ``axes`` and moved to ``center``."""

    shape: Shape
    label: int
    center: NDArray[np.float64]
    axes: NDArray[np.float64]
    """(3, 3), the local axes as rows; orthonormal."""
    half: NDArray[np.float64]
    material: Material
    pattern_shift: NDArray[np.float64]
    """(3,) metres added to local coordinates, so that the pieces of one wall share one pattern."""
    shell: bool = False
    """Part of a room: does not shade the lamps inside."""

    @property
    def to_local(self) -> NDArray[np.float64]:
        """(3, 3) map of world vectors into the unit shape's space."""
        return self.axes / self.half[:, None]

    @property
    def radius(self) -> float:
        """Of the sphere around ``center`` that holds the solid, metres."""
        return float(self.half.max() if self.shape == "sphere" else np.linalg.norm(self.half))

    def extent(self, direction: NDArray[np.float64]) -> float:
        """Largest distance of the solid from ``center`` along the unit vector ``direction``, metres."""
        along = self.half * np.abs(self.axes @ direction)
        if self.shape == "sphere":
            return float(np.linalg.norm(along))
        if self.shape == "cylinder":
            return float(np.hypot(along[0], along[1]) + along[2])
        return float(along.sum())


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera with square pixels, looking from ``position`` along ``axes[2]``."""

    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    """(3, 3), rows right, down, forward; orthonormal."""
    focal: float
    """Pixels."""
    height: int
    width: int

    def rays(self, px: F32, py: F32) -> F32:
        """Directions (3, N) through pixel coordinates, scaled so that the ray parameter is the depth."""
        right, down, forward = self.axes.astype(np.float32)
        u = (px - np.float32(self.width / 2)) / np.float32(self.focal)
        v = (py - np.float32(self.height / 2)) / np.float32(self.focal)
        return right[:, None] * u + down[:, None] * v + forward[:, None]


def screen_bounds(camera: Camera, solids: list[Solid]) -> NDArray[np.float32]:
    """Pixel rectangles (S, 4) x0 y0 x1 y1 that hold the solids; empty (x0 > x1) where one is out of sight."""
    if not solids:
        return np.zeros((0, 4), dtype=np.float32)
    spans = np.stack([solid.half[:, None] * solid.axes for solid in solids])
    world = np.stack([solid.center for solid in solids])[:, None] + np.einsum("ck,skx->scx", _CORNERS, spans)
    view = np.einsum("ax,scx->sca", camera.axes, world - camera.position)
    # Where an edge passes behind the camera, its crossing with the near plane bounds it instead.
    start, end = view[:, _EDGES[:, 0]], view[:, _EDGES[:, 1]]
    with np.errstate(divide="ignore", invalid="ignore"):  # an edge parallel to the image has no crossing
        share = (_NEAREST - start[..., 2]) / (end[..., 2] - start[..., 2])
        crossing = start + share[..., None] * (end - start)
    points = np.concatenate([view, crossing], axis=1)
    seen = np.concatenate([view[..., 2] > _NEAREST, (share > 0) & (share < 1)], axis=1)
    depth = np.where(seen, points[..., 2], 1.0)
    x = points[..., 0] / depth * camera.focal + camera.width / 2
    y = points[..., 1] / depth * camera.focal + camera.height / 2
    bounds = [np.where(seen, value, np.inf).min(1) - 1 for value in (x, y)]
    bounds += [np.where(seen, value, -np.inf).max(1) + 1 for value in (x, y)]
    return np.stack(bounds, axis=1).astype(np.float32)


def interval(shape: Shape, origin: F32, direction: F32) -> tuple[F32, F32]:
    """Ray parameters (enter, leave) in the unit shape's space; a miss has enter > leave (or NaN).

    Args:
        origin: (3, N) or (3, 1) float32.
        direction: (3, N) or (3, 1) float32, not normalised.
    """
    if shape == "sphere":
        # Distance from the point of closest approach: far smaller rounding than the textbook discriminant.
        squared = (direction * direction).sum(0)
        closest = -(origin * direction).sum(0) / squared
        offset = origin + closest * direction
        reach = np.sqrt((1 - (offset * offset).sum(0)) / squared)
        return closest - reach, closest + reach
    safe = direction + np.float32(1e-12)  # no division of zero by zero in rays along a face
    if shape == "box":
        first, second = (-1 - origin) / safe, (1 - origin) / safe
        return np.minimum(first, second).max(0), np.maximum(first, second).min(0)
    first, second = (-1 - origin[2]) / safe[2], (1 - origin[2]) / safe[2]
    enter, leave = np.minimum(first, second), np.maximum(first, second)
    side_enter, side_leave = _cylinder_side(origin, direction) if shape == "cylinder" else _cone_side(origin, direction)
    return np.maximum(enter, side_enter), np.minimum(leave, side_leave)


def _cylinder_side(origin: F32, direction: F32) -> tuple[F32, F32]:
    flat = direction[:2] + np.float32(1e-12)
    squared = (flat * flat).sum(0)
    closest = -(origin[:2] * flat).sum(0) / squared
    offset = origin[:2] + closest * flat
    reach = np.sqrt((1 - (offset * offset).sum(0)) / squared)
    return closest - reach, closest + reach


def _cone_side(origin: F32, direction: F32) -> tuple[F32, F32]:
    """The nappe below the apex (0, 0, 1), radius 1 at z = -1: x^2 + y^2 <= ((1 - z) / 2)^2."""
    rise = (origin[2] - 1) / 2
    slope = direction[2] / 2
    a = direction[0] ** 2 + direction[1] ** 2 - slope**2
    b = origin[0] * direction[0] + origin[1] * direction[1] - rise * slope
    c = origin[0] ** 2 + origin[1] ** 2 - rise**2
    a = np.where(np.abs(a) < 1e-9, np.float32(1e-9), a)
    root = np.sqrt(b * b - a * c)
    low = np.minimum((-b - root) / a, (-b + root) / a)
    high = np.maximum((-b - root) / a, (-b + root) / a)
    # A ray steeper than the side is inside the lower nappe on one end of the line, not between the roots.
    steep = a < 0
    falling = direction[2] < 0
    enter = np.where(steep, np.where(falling, high, np.float32(-np.inf)), low)
    leave = np.where(steep, np.where(falling, np.float32(np.inf), low), high)
    return enter, leave


def local_normal(shape: Shape, point: F32) -> F32:
    """Outward normals (3, N), not normalised, of the unit shape at surface points (3, N)."""
    if shape == "sphere":
        return point
    if shape == "box":
        magnitude = np.abs(point)
        return np.where(magnitude >= magnitude.max(0), np.sign(point), np.float32(0))
    around = np.sqrt(point[0] ** 2 + point[1] ** 2)
    if shape == "cylinder":
        cap = np.abs(point[2]) > around
        side = np.stack([point[0], point[1], np.zeros_like(around)])
        up = np.sign(point[2])
    else:
        cap = -1 - point[2] > around - (1 - point[2]) / 2 - np.float32(1e-4)
        side = np.stack([point[0], point[1], around / 2])
        up = np.full_like(around, -1)
    lid = np.stack([np.zeros_like(up), np.zeros_like(up), up])
    return np.where(cap, lid, side)


def cast(camera: Camera, solids: list[Solid], bounds: F32, px: F32, py: F32) -> tuple[F32, NDArray[np.int16]]:
    """Depth (N,) and surface index (N,) of what pixel coordinates see; infinite and ``NOTHING`` for the sky.

    Args:
        bounds: the solids' ``screen_bounds``; a solid is tried only on the rays inside its rectangle.
    """
    rays = camera.rays(px, py)
    with np.errstate(divide="ignore"):
        depth = np.where(rays[2] < 0, -np.float32(camera.position[2]) / rays[2], np.float32(np.inf))
    surface = np.where(rays[2] < 0, np.int16(len(solids)), np.int16(NOTHING))
    for index, (solid, (x0, y0, x1, y1)) in enumerate(zip(solids, bounds, strict=True)):
        if x0 > x1 or x1 < 0 or y1 < 0 or x0 > camera.width or y0 > camera.height:
            continue
        chosen = np.flatnonzero((px > x0) & (px < x1) & (py > y0) & (py < y1))
        origin = (solid.to_local @ (camera.position - solid.center)).astype(np.float32)[:, None]
        direction = np.einsum("ij,jn->in", solid.to_local.astype(np.float32), rays.take(chosen, axis=1))
        with np.errstate(invalid="ignore"):
            enter, leave = interval(solid.shape, origin, direction)
        nearer = np.flatnonzero((enter <= leave) & (enter > _NEAREST) & (enter < depth.take(chosen)))
        depth[chosen[nearer]] = enter[nearer]
        surface[chosen[nearer]] = index
    return depth, surface


def shadow(
    solids: list[Solid], points: F32, ignored: NDArray[np.bool_], light: NDArray[np.float64], distant: bool
) -> NDArray[np.bool_]:
    """Which of the ``points`` (3, N) a solid hides from a light; True is in shadow.

    Args:
        ignored: (N,) bool, points that need no ray; they come back True.
        light: (3,) unit vector towards a distant light, or the position of a lamp.
        distant: which of the two; a lamp is not shaded by the shell of its room.
    """
    dark = ignored.copy()
    origin = points
    if distant:
        aside = np.cross(light, [0.0, 0.0, 1.0] if abs(light[2]) < 0.9 else [1.0, 0.0, 0.0])
        frame = np.stack([aside / np.linalg.norm(aside), light, light])
        frame[1] = np.cross(frame[0], light)
        seen_from_light = np.einsum("ij,jn->in", frame.astype(np.float32), points)
        towards = light.astype(np.float32)[:, None]
    else:
        towards = light.astype(np.float32)[:, None] - points
        reach = np.sqrt((towards * towards).sum(0))
    for solid in solids:
        if distant:
            middle = frame @ solid.center
            width, height, ahead = (solid.extent(axis) for axis in frame)
            possible = (np.abs(seen_from_light[0] - np.float32(middle[0])) < width) & (
                np.abs(seen_from_light[1] - np.float32(middle[1])) < height
            )
            possible &= (seen_from_light[2] < middle[2] + ahead) & ~dark
        elif solid.shell:
            continue
        else:
            gap = solid.center - light
            distance, radius = float(np.linalg.norm(gap)), solid.radius
            if distance > radius:
                along = np.einsum("j,jn->n", (-gap / distance).astype(np.float32), towards)
                cosine = np.float32(np.sqrt(1 - (radius / distance) ** 2))
                possible = (along > cosine * reach) & (along > distance - radius) & ~dark
            else:
                possible = ~dark
        chosen = np.flatnonzero(possible)
        if chosen.size == 0:
            continue
        matrix = solid.to_local.astype(np.float32)
        start = np.einsum("ij,jn->in", matrix, origin.take(chosen, axis=1) - solid.center.astype(np.float32)[:, None])
        ray = np.einsum("ij,jn->in", matrix, towards if distant else towards.take(chosen, axis=1))
        with np.errstate(invalid="ignore"):
            enter, leave = interval(solid.shape, start, ray)
        hit = (enter <= leave) & (leave > 1e-4)
        if not distant:
            hit &= enter < 1
        dark[chosen[hit]] = True
    return dark
