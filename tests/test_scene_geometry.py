"""Rays against solids: depth, shadows and normals as their definitions say."""

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sgmim_fast.data.scenes import geometry as scene_geometry
from sgmim_fast.data.scenes.geometry import NOTHING, SPHERE, Camera, Shape, Solid
from sgmim_fast.data.scenes.objects import make_solid, random_axes
from sgmim_fast.data.scenes.scene import Scene, render_scene

SHAPES: tuple[Shape, ...] = ("box", "sphere", "cylinder", "cone")
F64 = NDArray[np.float64]


def camera_at(position: list[float], pitch: float, height: int = 40, width: int = 56) -> Camera:
    cosine, sine = math.cos(pitch), math.sin(pitch)
    axes = np.array([[1.0, 0.0, 0.0], [0.0, sine, -cosine], [0.0, cosine, sine]])  # looks along +y
    return Camera(np.array(position), axes, 50.0, height, width)


def pixel_centres(camera: Camera) -> tuple[scene_geometry.F32, scene_geometry.F32]:
    y, x = np.mgrid[: camera.height, : camera.width].reshape(2, -1).astype(np.float32) + np.float32(0.5)
    return x, y


def exact_rays(camera: Camera) -> F64:
    """(N, 3) float64 directions, one unit of depth long, written out independently of the module."""
    rays = []
    for row in range(camera.height):
        for column in range(camera.width):
            right = (column + 0.5 - camera.width / 2) / camera.focal
            down = (row + 0.5 - camera.height / 2) / camera.focal
            rays.append(right * camera.axes[0] + down * camera.axes[1] + camera.axes[2])
    return np.array(rays)


def holds(solid: Solid, points: F64) -> NDArray[np.bool_]:
    """Whether a solid holds points (..., 3), from the definition of its shape."""
    x, y, z = np.moveaxis((points - solid.center) @ solid.axes.T / solid.half, -1, 0)
    if solid.shape == "box":
        return (abs(x) <= 1) & (abs(y) <= 1) & (abs(z) <= 1)
    if solid.shape == "sphere":
        return x**2 + y**2 + z**2 <= 1
    if solid.shape == "cylinder":
        return (x**2 + y**2 <= 1) & (abs(z) <= 1)
    return (abs(z) <= 1) & (np.hypot(x, y) <= (1 - z) / 2)


def one_solid(shape: Shape, seed: int) -> Solid:
    rng = np.random.default_rng(seed)
    center = np.array([0.0, 4.0, 1.5]) + rng.uniform(-0.4, 0.4, 3)
    half = rng.uniform(0.4, 1.1, 3)
    if seed < 2:  # its axis along the view, to and fro: rays steeper than a cone's side
        turned = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]) * (1 if seed else -1)
        return make_solid(rng, shape, center, half, turned)
    return make_solid(rng, shape, center, half, random_axes(rng))


def see(camera: Camera, solids: list[Solid]) -> tuple[scene_geometry.F32, NDArray[np.int16]]:
    return scene_geometry.cast(camera, solids, scene_geometry.screen_bounds(camera, solids), *pixel_centres(camera))


def test_ground_plane_has_the_closed_form_depth() -> None:
    camera = camera_at([0.3, -2.0, 1.7], pitch=-0.2)
    depth, surface = see(camera, [])
    falling = exact_rays(camera)[:, 2]
    below = falling < 0
    assert 0 < below.sum() < below.size
    np.testing.assert_array_equal(surface == NOTHING, ~below)
    np.testing.assert_allclose(depth[below], -1.7 / falling[below], rtol=3e-5)
    assert np.isinf(depth[~below]).all()


def test_sphere_has_the_closed_form_depth() -> None:
    camera = camera_at([0.0, 0.0, 1.0], pitch=0.1)
    solid = make_solid(np.random.default_rng(0), "sphere", np.array([0.2, 9.0, 1.9]), np.full(3, 0.8), np.eye(3))
    depth, surface = see(camera, [solid])
    rays, gap = exact_rays(camera), camera.position - solid.center
    a, b, c = (rays**2).sum(1), rays @ gap, gap @ gap - 0.8**2
    inside = b * b - a * c
    hit = surface == 0
    assert hit.sum() > 40
    np.testing.assert_array_equal(hit, inside > 0)
    np.testing.assert_allclose(depth[hit], (-b[hit] - np.sqrt(inside[hit])) / a[hit], rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_first_hit_agrees_with_walking_along_the_ray(shape: Shape, seed: int) -> None:
    camera, solid = camera_at([0.0, 0.0, 1.5], pitch=0.0, height=24, width=32), one_solid(shape, seed)
    depth, surface = see(camera, [solid])
    steps = np.arange(1.0, 8.0, 0.004)
    inside = holds(solid, camera.position + steps[:, None, None] * exact_rays(camera))
    walked = np.where(inside.any(0), steps[inside.argmax(0)], np.inf)
    found = np.where(surface == 0, depth, np.inf)
    # A ray may graze the solid between two steps; it may not miss what a step found.
    assert not (np.isfinite(walked) & np.isinf(found)).any()
    grazed = np.isfinite(found) & np.isinf(walked)
    both = np.isfinite(walked) & np.isfinite(found)
    assert both.sum() > 20
    assert grazed.sum() < 0.1 * both.sum()
    assert (np.abs(walked[both] - found[both]) < 0.0041).mean() > 0.97


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distant", [True, False])
def test_shadow_agrees_with_walking_towards_the_light(shape: Shape, distant: bool) -> None:
    rng = np.random.default_rng(3)
    solid = one_solid(shape, 5)
    points = solid.center + rng.uniform(-1.5, 1.5, (900, 3))  # on all sides of it
    points = points[~holds(solid, points)][:400]
    light = np.array([0.2, -0.1, 0.9]) if distant else np.array([0.5, 3.2, 4.0])
    light = light / np.linalg.norm(light) if distant else light
    dark = scene_geometry.shadow([solid], points.T.astype(np.float32), np.zeros(400, dtype=bool), light, distant)
    steps = np.linspace(0, 8 if distant else 1, 3000)
    towards = np.broadcast_to(light, (400, 3)) if distant else light - points
    walked = holds(solid, points + steps[:, None, None] * towards).any(0)
    assert 10 < walked.sum() < 390
    assert (walked == dark).mean() > 0.985


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_point_out_of_the_surface(shape: Shape) -> None:
    camera, solid = camera_at([0.0, 0.0, 1.5], pitch=0.0), one_solid(shape, 2)
    depth, surface = see(camera, [solid])
    hit = surface == 0
    points = camera.position + depth[hit, None] * exact_rays(camera)[hit]
    local = (points - solid.center) @ solid.to_local.T
    normal = scene_geometry.local_normal(shape, local.T.astype(np.float32)).T @ solid.to_local
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    assert (holds(solid, points - 0.01 * normal)).mean() > 0.97
    assert not holds(solid, points + 0.001 * normal).any()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(12, index, 64) for index in range(24)]


def test_structure_maps_follow_from_the_metadata_alone(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        numbers = json.loads(json.dumps(scene.metadata))
        view = numbers["camera"]
        axes, eye = np.array(view["right_down_forward"]), np.array(view["position"])
        rays = exact_rays(Camera(eye, axes, view["focal_pixels"], numbers["height"], numbers["width"]))
        balls = [thing for thing in numbers["objects"] if thing["class"] == "sphere"]
        nearest = np.full(len(rays), np.inf)
        for ball in balls:
            local = np.array(ball["axes"]) / np.array(ball["half_size"])[:, None]
            gap, ray = local @ (eye - np.array(ball["center"])), rays @ local.T
            a, b, c = (ray**2).sum(1), ray @ gap, gap @ gap - 1
            root = np.sqrt(np.where(b * b > a * c, b * b - a * c, np.nan))
            depth = (-b - root) / a
            nearest = np.fmin(nearest, np.where(depth > 0, depth, np.inf))
        seen = (scene.labels.ravel() == SPHERE) & np.isfinite(nearest)
        assert seen.sum() >= 0.95 * (scene.labels == SPHERE).sum()
        expected = 65535 * numbers["near"] / nearest[seen]
        wrong = np.abs(scene.inverse_depth.ravel()[seen] - expected) > 1 + 1e-3 * expected
        assert wrong.sum() <= 0.02 * seen.sum()
        checked += int(seen.sum())
    assert checked > 3000
