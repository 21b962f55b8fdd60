"""From a layout to pictures: visibility, light, fog, tone, and smoothed edges."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgmim_fast.data.scenes.geometry import NOTHING, Solid, cast, local_normal, screen_bounds, shadow
from sgmim_fast.data.scenes.layout import Layout
from sgmim_fast.data.scenes.textures import F32, albedo, fractal_noise

_SUBPIXELS = ((-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375))
_LUMINANCE = np.array([[0.2126], [0.7152], [0.0722]], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class View:
    """What the rays through the pixel centres meet, row-major over N = H * W pixels."""

    px: F32
    py: F32
    depth: F32
    """(N,) along the optical axis, metres; infinite in the sky."""
    surface: NDArray[np.int16]
    """(N,) index of the solid, one past the last for the ground plane, ``NOTHING`` for the sky."""
    bounds: F32


@dataclass(frozen=True, eq=False)
class Shading:
    """Light and geometry at N samples."""

    light: F32
    """(3, N) linear RGB before exposure."""
    normal: F32
    """(3, N) unit world normals; zero in the sky."""
    shadows: NDArray[np.uint8]
    """(N,) one bit a lamp: in shadow of it."""


def look(layout: Layout) -> View:
    """Cast one ray through every pixel centre."""
    camera = layout.camera
    rows, columns = np.mgrid[: camera.height, : camera.width].astype(np.float32) + np.float32(0.5)
    px, py = columns.ravel(), rows.ravel()
    bounds = screen_bounds(camera, layout.solids)
    depth, surface = cast(camera, layout.solids, bounds, px, py)
    return View(px, py, depth, surface, bounds)


def paint(layout: Layout, view: View) -> tuple[F32, F32]:
    """The exposed picture, linear RGB (3, N) in [0, 1] with smoothed edges, and world normals (3, N)."""
    shading = shade(layout, view.px, view.py, view.depth, view.surface)
    exposure = _exposure(shading.light)
    picture = _tone(shading.light * exposure)
    rough = np.flatnonzero(_edges(layout, view, shading))
    if rough.size:
        px = np.concatenate([view.px[rough] + np.float32(dx) for dx, _ in _SUBPIXELS])
        py = np.concatenate([view.py[rough] + np.float32(dy) for _, dy in _SUBPIXELS])
        extra = shade(layout, px, py, *cast(layout.camera, layout.solids, view.bounds, px, py))
        smooth = _tone(extra.light * exposure).reshape(3, len(_SUBPIXELS), rough.size).mean(1)
        picture[:, rough] = smooth
    return picture, shading.normal


def shade(layout: Layout, px: F32, py: F32, depth: F32, surface: NDArray[np.int16]) -> Shading:
    """Light that samples at pixel coordinates (N,) send to the camera, given what they see."""
    order = np.argsort(surface, kind="stable")
    ids, starts = np.unique(surface[order], return_index=True)
    rays, depth = layout.camera.rays(px, py).take(order, axis=1), depth[order]
    length = np.sqrt((rays * rays).sum(0))
    light = np.empty_like(rays)
    normal = np.zeros_like(rays)
    shadows = np.zeros(depth.size, dtype=np.uint8)
    first = 0
    if ids[0] == NOTHING:
        first = int(starts[1]) if ids.size > 1 else depth.size
        light[:, :first] = _sky(layout, rays[:, :first] / length[:first])
        ids, starts = ids[1:], starts[1:]
    if ids.size:
        rays, depth, length = rays[:, first:], depth[first:], length[first:]
        eye = layout.camera.position.astype(np.float32)[:, None]
        points, color = eye + depth * rays, np.empty_like(rays)
        facing, gloss = normal[:, first:], np.zeros((2, depth.size), dtype=np.float32)
        pixel = depth / np.float32(layout.camera.focal)
        for index, start, stop in zip(ids, starts - first, [*(starts[1:] - first), depth.size], strict=True):
            part = slice(start, stop)
            solid = layout.solids[index] if index < len(layout.solids) else None
            material = solid.material if solid else layout.ground
            facing[:, part], color[:, part] = _surface(layout, solid, points[:, part], rays[:, part], pixel[part])
            gloss[:, part] = np.array([[material.gloss], [material.shininess]])
        lit, shadows[first:] = _lighting(layout, points, facing, -rays / length, color, gloss)
        clear = np.exp(-np.float32(layout.fog_density) * depth * length)
        light[:, first:] = lit * clear + layout.fog_color[:, None] * (1 - clear)
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    return Shading(light.take(back, axis=1), normal.take(back, axis=1), shadows.take(back))


def _surface(layout: Layout, solid: Solid | None, points: F32, rays: F32, pixel: F32) -> tuple[F32, F32]:
    """World normals (3, N) and albedo (3, N) of points on one solid, or on the ground plane."""
    if solid is None:
        normal = np.zeros_like(points)
        normal[2] = 1
        u, v = points[0], points[1]
    else:
        metric = np.einsum(
            "ij,jn->in", solid.axes.astype(np.float32), points - solid.center.astype(np.float32)[:, None]
        )
        local = local_normal(solid.shape, metric / solid.half.astype(np.float32)[:, None])
        normal = np.einsum("ji,jn->in", solid.to_local.astype(np.float32), local)
        normal /= np.sqrt((normal * normal).sum(0))
        u, v = _surface_coordinates(solid, metric, local)
    towards = np.abs((normal * rays).sum(0)) / np.sqrt((rays * rays).sum(0))
    footprint = pixel / np.sqrt(np.maximum(towards, np.float32(0.02)))
    return normal, albedo(solid.material if solid else layout.ground, u, v, footprint)


def _surface_coordinates(solid: Solid, metric: F32, local: F32) -> tuple[F32, F32]:
    """Metric pattern coordinates: per face on boxes and lids, around the axis or through the body elsewhere."""
    x, y, z = metric + solid.pattern_shift.astype(np.float32)[:, None]
    magnitude = np.abs(local)
    if solid.shape == "box":
        on_x, on_y = magnitude[0] > 0, magnitude[1] > 0
        return np.where(on_x, y, x), np.where(on_x | on_y, z, y)
    if not solid.material.wrapped:
        tilt = solid.material.knobs[2] * np.pi
        u = np.float32(np.cos(tilt)) * x + np.float32(np.sin(tilt)) * y
        return u, z + np.float32(0.3) * y
    around = np.arctan2(metric[1], metric[0]) * np.float32(solid.half[0])
    if solid.shape == "sphere":
        return around, np.arcsin(np.clip(local[2], -1, 1)) * np.float32(solid.half[2])
    lid = (magnitude[0] == 0) & (magnitude[1] == 0)
    return np.where(lid, x, around), np.where(lid, y, z)


def _lighting(
    layout: Layout, points: F32, normal: F32, towards_eye: F32, color: F32, gloss: F32
) -> tuple[F32, NDArray[np.uint8]]:
    """Reflected light (3, N) and shadow bits (N,) of surface points."""
    sky = layout.sky
    upward = (normal[2] + 1) / 2
    ambient = sky.ambient_below[:, None] + (sky.ambient_above - sky.ambient_below)[:, None] * upward
    indoors = np.zeros(upward.size, dtype=bool)
    if layout.inside is not None:
        low, high = (corner.astype(np.float32)[:, None] for corner in layout.inside)
        indoors[:] = ((points >= low) & (points <= high)).all(0)
        corners = np.minimum(points - low, high - points)
        corners = 1 - np.float32(0.3) * np.exp(-np.maximum(corners, 0) * 3)
        within = sky.ambient_inside[:, None] * (np.float32(0.7) + np.float32(0.6) * upward) * corners.prod(0)
        ambient = np.where(indoors, within, ambient)
    diffuse = ambient * _openness(layout, points, normal)
    specular = np.zeros_like(diffuse)
    shadows = np.zeros(upward.size, dtype=np.uint8)
    lifted = points + normal * (np.float32(1e-3) + np.float32(1e-5) * np.abs(points).max(0))
    for bit, lamp in enumerate(layout.lamps):
        vector = lamp.vector.astype(np.float32)[:, None]
        towards = np.broadcast_to(vector, points.shape) if lamp.distant else vector - points
        squared = (towards * towards).sum(0)
        towards = towards / np.sqrt(squared)
        incidence = (normal * towards).sum(0)
        away = incidence <= 0
        if layout.inside is not None and not lamp.distant:
            away |= ~indoors
        dark = shadow(layout.solids, lifted, away, lamp.vector, lamp.distant)
        shadows |= (dark & ~away).astype(np.uint8) << bit
        falloff = np.float32(1) if lamp.distant else 1 / (squared + np.float32(0.05))
        strength = np.where(dark, 0, incidence * falloff)
        diffuse += lamp.color[:, None] * strength
        glossy = np.flatnonzero(~dark & (gloss[0] > 0))
        half = towards.take(glossy, axis=1) + towards_eye.take(glossy, axis=1)
        cosine = (half * normal.take(glossy, axis=1)).sum(0) / np.sqrt((half * half).sum(0))
        amount, sharp = gloss.take(glossy, axis=1)
        shine = amount * np.maximum(cosine, np.float32(1e-6)) ** sharp * (sharp + 8) / 25
        specular[:, glossy] += lamp.color[:, None] * (strength.take(glossy) * shine)
    return color * diffuse + specular, shadows


def _openness(layout: Layout, points: F32, normal: F32) -> F32:
    """Share (N,) of ambient light that nearby furniture leaves, taking each solid as a ball."""
    openness = np.ones(points.shape[1], dtype=np.float32)
    for solid in layout.solids:
        radius = np.float32(np.cbrt(solid.half.prod()))
        if solid.shell or radius < 0.03:
            continue
        gap = solid.center.astype(np.float32)[:, None] - points
        squared = (gap * gap).sum(0)
        near = np.flatnonzero(squared < (4 * radius) ** 2)
        gap, squared = gap.take(near, axis=1), squared.take(near)
        cosine = (gap * normal.take(near, axis=1)).sum(0) / np.sqrt(squared)
        hidden = np.maximum(cosine, 0) * radius**2 / squared
        openness[near] *= 1 - np.float32(0.8) * np.minimum(hidden, 1)
    return openness


def _sky(layout: Layout, direction: F32) -> F32:
    """Linear RGB (3, N) of the sky in unit directions (3, N)."""
    sky = layout.sky
    height = np.maximum(direction[2], 0)
    color = sky.horizon[:, None] + (sky.zenith - sky.horizon)[:, None] * np.sqrt(height)
    if sky.clouds > 0:
        reach = 1.5 / (height + np.float32(0.12))
        shift_x, shift_y = (np.float32(value) for value in sky.cloud_shift)
        density = fractal_noise(direction[0] * reach + shift_x, direction[1] * reach + shift_y, 0.02 * reach, 5)
        cover = np.float32(sky.clouds) * np.clip((density - np.float32(0.42)) * 4, 0, 1)
        white = np.float32(1.2 * sky.zenith.mean() + 0.1)
        color = color + (white - color) * cover
    if layout.lamps and layout.lamps[0].distant:
        sun = layout.lamps[0]
        glow = np.maximum((direction * sun.vector.astype(np.float32)[:, None]).sum(0), np.float32(1e-6)) ** 200
        color = color + sun.color[:, None] * glow
    clear = np.float32(0.35 if layout.fog_density > 0.02 else 1.0)
    return color * clear + layout.fog_color[:, None] * (1 - clear)


def _edges(layout: Layout, view: View, shading: Shading) -> NDArray[np.bool_]:
    """Pixels (N,) beside which the surface, its orientation or the shadow changes."""
    shape = layout.camera.height, layout.camera.width
    code = (view.surface.astype(np.int32) << 8 | shading.shadows).reshape(shape)
    normal = shading.normal.reshape(3, *shape)
    edge = np.zeros(shape, dtype=bool)
    for axis in (0, 1):
        ahead = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
        behind = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
        bend = (normal[:, *ahead] * normal[:, *behind]).sum(0) < np.float32(0.8)
        differs = (code[ahead] != code[behind]) | (bend & (code[ahead] >= 0))
        edge[ahead] |= differs
        edge[behind] |= differs
    return edge.ravel()


def _exposure(light: F32) -> np.float32:
    """Factor that brings the picture's middle brightness to the same value, whatever the lamps."""
    brightness = (_LUMINANCE * light).sum(0)
    return np.float32(0.2 / np.exp(np.log(brightness + np.float32(1e-3)).mean()))


def _tone(light: F32) -> F32:
    """Compress highlights: linear in the shadows, 1 at three times middle white."""
    return np.clip(light * (1 + light / 9) / (1 + light), 0, 1)
