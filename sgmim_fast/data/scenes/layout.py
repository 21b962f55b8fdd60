"""What is in a synthetic scene: rooms and open places, cameras, lights and weather, all at random."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sgmim_fast.data.scenes.geometry import CEILING, GROUND, Camera, Solid
from sgmim_fast.data.scenes.objects import arrange, wall_with_opening, yaw_axes
from sgmim_fast.data.scenes.splits import TRAIN, Variety
from sgmim_fast.data.scenes.textures import F32, UNSEEN_PATTERNS, Material, draw_colors, draw_material

F64 = NDArray[np.float64]
_FLOOR = 0.02  # metres by which a room's floor lies above the ground outside
_CLEARANCE = 0.6  # metres that stay free around the camera


@dataclass(frozen=True, eq=False)
class Lamp:
    """The sun (distant, ``vector`` points towards it) or a point light at ``vector``."""

    vector: F64
    distant: bool
    color: F32
    """Linear RGB; of a point light, the irradiance at one metre."""


@dataclass(frozen=True, eq=False)
class Sky:
    """Light from everywhere and what is seen where nothing stands, linear RGB (3,)."""

    zenith: F32
    horizon: F32
    clouds: float
    cloud_shift: tuple[float, float]
    ambient_above: F32
    ambient_below: F32
    ambient_inside: F32
    """Inside a room, where the sky does not reach."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A scene before it is rendered."""

    kind: str
    """``room`` (with a ceiling), ``yard`` (walls all round, open above) or ``open``."""
    camera: Camera
    fov: float
    """Degrees, along the longer image side."""
    solids: list[Solid]
    ground: Material
    lamps: list[Lamp]
    sky: Sky
    fog_color: F32
    fog_density: float
    """Per metre; 0 for clear air."""
    inside: tuple[F64, F64] | None
    """Corners of a room with a ceiling, 5 cm inside its walls so that their surfaces count as indoors."""


def draw_layout(rng: np.random.Generator, height: int, width: int, variety: Variety = TRAIN) -> Layout:
    """A random scene for an image of ``height`` x ``width`` pixels; it may still turn out a poor view."""
    kind = str(rng.choice(["room", "yard", "open"], p=[0.5, 0.12, 0.38]))
    fov = float(variety.field_of_view(rng))
    focal = max(height, width) / 2 / math.tan(math.radians(fov) / 2)
    if kind == "open":
        size, top = np.array([80.0, 80.0]), 40.0
        solids: list[Solid] = []
        eye, target = _open_view(rng)
    else:
        size = rng.uniform(3.0, 8.0, 2) if kind == "room" else rng.uniform(6.0, 18.0, 2)
        top = float(rng.uniform(2.3, 3.8))
        solids = _shell(rng, size, top, ceiling=kind == "room")
        eye, target = _room_view(rng, size, top)
    axes = _look(rng, eye, target, variety)
    camera = Camera(eye, axes, focal, height, width)
    _furnish(rng, solids, camera, kind, size, top, variety)
    inside = None
    if kind == "room":
        inside = np.array([*(-size / 2 - 0.05), -0.05]), np.array([*(size / 2 + 0.05), top + 0.05])
    sky, lamps = _light(rng, kind, size, top, eye, target)
    foggy = rng.uniform() < (0.12 if kind == "room" else 0.45)
    reach = float(np.exp(rng.uniform(np.log(8), np.log(80)))) if foggy else math.inf
    fog_color = sky.horizon if rng.uniform() < 0.5 else draw_colors(rng, 1)[0] * np.float32(sky.horizon.mean() / 0.4)
    ground = draw_material(rng, float(np.exp(rng.uniform(np.log(0.8), np.log(4)))))
    layout = Layout(kind, camera, fov, solids, ground, lamps, sky, fog_color, 1 / reach, inside)
    return _repainted(rng, layout) if variety.unseen_patterns else layout


def _repainted(rng: np.random.Generator, layout: Layout) -> Layout:
    """The layout in patterns of the test split; pieces that share a material still do."""
    new: dict[int, Material] = {}
    for material in (layout.ground, *(solid.material for solid in layout.solids)):
        if id(material) not in new:
            new[id(material)] = replace(material, pattern=UNSEEN_PATTERNS[rng.integers(len(UNSEEN_PATTERNS))])
    solids = [replace(solid, material=new[id(solid.material)]) for solid in layout.solids]
    return replace(layout, ground=new[id(layout.ground)], solids=solids)


def _open_view(rng: np.random.Generator) -> tuple[F64, F64]:
    """Eye and target (3,) outdoors: mostly at the height of a person or a car, sometimes from above."""
    height = rng.uniform(0.5, 2.2) if rng.uniform() < 0.65 else rng.uniform(2.2, 9.0)
    distance = rng.uniform(3.0, 12.0)
    bearing = rng.uniform(0, 2 * np.pi)
    target = distance * np.array([math.cos(bearing), math.sin(bearing), 0.0])
    target[2] = rng.uniform(0.0, 1.8)
    return np.array([0.0, 0.0, height]), target


def _room_view(rng: np.random.Generator, size: F64, top: float) -> tuple[F64, F64]:
    """Eye and target (3,) in a room, looking along enough of it to see something."""
    edge = size / 2 - 0.7
    low = np.array([*-edge, 0.1])
    high = np.array([*edge, 0.7 * top])
    for _ in range(20):
        eye = np.array([*rng.uniform(-edge, edge), rng.uniform(0.4, min(2.4, top - 0.35))])
        target = rng.uniform(low, high)
        if np.linalg.norm((target - eye)[:2]) > 0.4 * size.max():
            break
    return eye, target


def _look(rng: np.random.Generator, eye: F64, target: F64, variety: Variety) -> F64:
    """Camera axes (right, down, forward) towards about the target, a little rolled."""
    forward = target - eye
    forward /= np.linalg.norm(forward)
    pitch = math.asin(forward[2]) + rng.normal(0, math.radians(7))
    pitch = min(max(pitch, math.radians(-70)), math.radians(40))
    yaw = math.atan2(forward[1], forward[0])
    roll = variety.roll(rng)
    ahead = np.array([math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    down = np.cross(ahead, right)
    return np.stack(
        [math.cos(roll) * right + math.sin(roll) * down, math.cos(roll) * down - math.sin(roll) * right, ahead]
    )


def _shell(rng: np.random.Generator, size: F64, top: float, ceiling: bool) -> list[Solid]:
    """Floor, four walls with windows and doors, and perhaps a ceiling, around the origin."""
    half = size / 2
    thickness = float(rng.uniform(0.12, 0.35))
    broad = np.array([*(half + thickness), 0.06])
    flat = yaw_axes(0.0)
    shift = rng.uniform(-1, 1, 3)
    floor = draw_material(rng, float(rng.uniform(0.5, 2.5)))
    solids = [Solid("box", GROUND, np.array([0.0, 0.0, _FLOOR - 0.06]), flat, broad, floor, shift, True)]
    if ceiling:
        material = draw_material(rng, float(rng.uniform(0.5, 2.5)))
        solids.append(Solid("box", CEILING, np.array([0.0, 0.0, top + 0.06]), flat, broad, material, shift, True))
    shared = draw_material(rng, float(rng.uniform(0.4, 2.0)))
    x, y = half + thickness / 2
    for corner, other in (((-x, -y), (x, -y)), ((x, -y), (x, y)), ((x, y), (-x, y)), ((-x, y), (-x, -y))):
        start, end = np.array(corner), np.array(other)
        material = shared if rng.uniform() < 0.6 else draw_material(rng, float(rng.uniform(0.4, 2.0)))
        opening = _opening(rng, float(np.linalg.norm(end - start)), top) if rng.uniform() < 0.35 else None
        solids += wall_with_opening(start, end, (-0.1, top), thickness, material, opening, shell=True)
    return solids


def _opening(rng: np.random.Generator, length: float, top: float) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of a window or a door in a wall, metres."""
    wide = rng.uniform(0.8, 0.45 * length)
    left = rng.uniform(0.4, length - wide - 0.4)
    if rng.uniform() < 0.4:
        return left, left + wide, -0.1, rng.uniform(0.75, 0.92) * top
    return left, left + wide, rng.uniform(0.25, 0.45) * top, rng.uniform(0.7, 0.92) * top


def _furnish(
    rng: np.random.Generator,
    solids: list[Solid],
    camera: Camera,
    kind: str,
    size: F64,
    top: float,
    variety: Variety,
) -> None:
    """Put walls and furniture around, most of it in view, clear of the camera and of each other."""
    taken: list[tuple[F64, float]] = [(camera.position[:2], _CLEARANCE)]
    outdoors = kind == "open"
    wanted = rng.integers(6, 17) if outdoors else rng.integers(4, 13)
    walls = rng.integers(0, 4) if outdoors else 0
    floor = 0.0 if outdoors else _FLOOR
    for number in range(walls + wanted):
        grown = float(
            np.exp(rng.uniform(np.log(0.25), np.log(1.5)) if outdoors else rng.uniform(np.log(0.12), np.log(0.6)))
        )
        if outdoors and rng.uniform() < 0.15:
            grown *= 3
        for _ in range(8):
            spot = _spot(rng, camera, None if outdoors else size / 2)
            if any(np.linalg.norm(spot - other) < 0.6 * grown + margin for other, margin in taken):
                continue  # cheaper than to build the pieces first
            away = float(np.linalg.norm(spot - camera.position[:2]))
            if number < walls:
                pieces = _free_wall(rng, spot)
            else:
                # Sizes are drawn without regard to distance, but nothing may fill the view from close by.
                headroom = 30.0 if outdoors else top - floor
                pieces = arrange(rng, spot, floor, min(grown, 0.3 * away), headroom, variety.unseen_furniture)
            reach = max(float(np.linalg.norm(p.center[:2] - spot)) + float(np.hypot(*p.half[:2])) for p in pieces)
            apart = all(np.linalg.norm(spot - other) > (0.8 * reach + margin) for other, margin in taken)
            walled = not outdoors and bool((np.abs(spot) + 0.75 * reach > size / 2).any())
            if apart and not walled and min(_gap(piece, camera.position) for piece in pieces) > _CLEARANCE:
                solids += pieces
                taken.append((spot, 0.8 * reach if number >= walls else 0.3 * reach))
                break


def _spot(rng: np.random.Generator, camera: Camera, half: F64 | None) -> F64:
    """Ground position (2,) for an object: in a room anywhere, outdoors mostly within the view."""
    if half is not None:
        return rng.uniform(-half, half)
    yaw = math.atan2(camera.axes[2, 1], camera.axes[2, 0])
    spread = math.atan(camera.width / 2 / camera.focal) + 0.1
    bearing = yaw + (rng.uniform(-spread, spread) if rng.uniform() < 0.85 else rng.uniform(-np.pi, np.pi))
    distance = math.exp(rng.uniform(math.log(1.8), math.log(32.0)))
    return camera.position[:2] + distance * np.array([math.cos(bearing), math.sin(bearing)])


def _free_wall(rng: np.random.Generator, spot: F64) -> list[Solid]:
    """A free-standing wall centred at ``spot``, sometimes with a gate or window."""
    length, top = float(rng.uniform(2.5, 10.0)), float(rng.uniform(0.7, 3.8))
    angle = rng.uniform(0, np.pi)
    along = length / 2 * np.array([math.cos(angle), math.sin(angle)])
    opening = _opening(rng, length, top) if rng.uniform() < 0.3 and top > 1.5 else None
    material = draw_material(rng, float(rng.uniform(0.4, 3.0)))
    return wall_with_opening(spot - along, spot + along, (-0.1, top), float(rng.uniform(0.12, 0.5)), material, opening)


def _gap(solid: Solid, point: F64) -> float:
    """Metres between a point and the solid's box."""
    return float(np.linalg.norm(np.maximum(np.abs(solid.axes @ (point - solid.center)) - solid.half, 0)))


def _tint(rng: np.random.Generator, strength: float) -> F32:
    """A light colour (3,) around white, warm or cold, of unit mean."""
    warmth = rng.normal(0, strength)
    color = np.exp(np.array([warmth, 0.0, -warmth]) + rng.normal(0, strength / 4, 3))
    return (color / color.mean()).astype(np.float32)


def _light(rng: np.random.Generator, kind: str, size: F64, top: float, eye: F64, target: F64) -> tuple[Sky, list[Lamp]]:
    """Sky, ambient light, perhaps the sun, and point lights."""
    lamps = []
    dusk = kind != "room" and rng.uniform() < 0.15
    sunny = not dusk and rng.uniform() < 0.75
    bright = np.float32(rng.uniform(0.08, 0.2) if dusk else rng.uniform(0.45, 1.1))
    if sunny:
        elevation, azimuth = rng.uniform(0.2, 1.3), rng.uniform(0, 2 * np.pi)
        flat = math.cos(elevation)
        towards = np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)])
        lamps.append(Lamp(towards, True, np.float32(rng.uniform(1.2, 3.0)) * _tint(rng, 0.15)))
    if kind == "room" or dusk:
        for _ in range(rng.integers(1, 4)):
            if kind == "room":
                edge = size / 2 - 0.3
                place = np.array([*rng.uniform(-edge, edge), rng.uniform(0.65, 0.95) * top])
                power = rng.uniform(0.8, 3.0) * (size.prod() / 16) ** 0.5
            else:
                near = rng.uniform(0.2, 1.2) * (target - eye)[:2] + rng.uniform(-4, 4, 2)
                place = np.array([*(eye[:2] + near), rng.uniform(1.5, 6.0)])
                power = rng.uniform(5.0, 30.0)
            lamps.append(Lamp(place, False, np.float32(power) * _tint(rng, 0.25)))
    blue = np.array([0.45, 0.8, 1.5]) if rng.uniform() < 0.5 else draw_colors(rng, 1)[0] / 0.5
    grey = np.full(3, 1.0)
    cast = rng.uniform(0, 1)
    zenith = bright * (cast * blue + (1 - cast) * grey).astype(np.float32)
    haze = rng.uniform(0.2, 0.9)
    horizon = (1 - haze) * zenith + np.float32(haze * bright * rng.uniform(0.7, 1.3)) * _tint(rng, 0.25)
    above = bright * np.float32(rng.uniform(0.4, 0.8) if sunny else 1.0) * _tint(rng, 0.1)
    sky = Sky(
        zenith=zenith,
        horizon=horizon.astype(np.float32),
        clouds=float(rng.uniform(0.2, 1.0) if rng.uniform() < 0.6 else 0.0),
        cloud_shift=(float(rng.uniform(0, 60)), float(rng.uniform(0, 60))),
        ambient_above=above,
        ambient_below=above * np.float32(rng.uniform(0.3, 0.65)),
        ambient_inside=np.float32(rng.uniform(0.12, 0.4)) * _tint(rng, 0.1),
    )
    return sky, lamps
