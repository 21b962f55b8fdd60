"""One synthetic scene with known depth: photograph, structure map, classes, normals, description.

A scene is a function of (seed, index, size, split) alone. Colours, patterns, light and fog are drawn
without regard to class and distance, so that neither can be read from colour.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgmim_fast.data.scenes.geometry import CLASS_NAMES, GROUND, NOTHING, SKY
from sgmim_fast.data.scenes.layout import Layout, draw_layout
from sgmim_fast.data.scenes.render import View, look, paint
from sgmim_fast.data.scenes.splits import SceneSplit, variety_of
from sgmim_fast.errors import UserError

NEAR = 0.25
"""Metres; nothing visible is nearer. Depth in metres = 65535 * NEAR / value of the structure map."""
MIN_SIDE = 32
_ATTEMPTS = 200


@dataclass(frozen=True, eq=False)
class Scene:
    """One rendered scene."""

    rgb: NDArray[np.uint8]
    """(H, W, 3)."""
    inverse_depth: NDArray[np.uint16]
    """(H, W), round(65535 * NEAR / depth); 0 in the sky, at least 1 elsewhere."""
    labels: NDArray[np.uint8]
    """(H, W), indices of ``CLASS_NAMES``; 0 in the sky."""
    normals: NDArray[np.uint8]
    """(H, W, 3), 127.5 * (1 + n) rounded, n the surface normal along the camera's right, down, forward axes;
    128 in the sky."""
    metadata: dict[str, Any]


def render_scene(seed: int, index: int, size: int | tuple[int, int], split: SceneSplit = "train") -> Scene:
    """Scene ``index`` of the endless series that belongs to ``seed``.

    Args:
        size: side, or (height, width), in pixels; 32 or more.
        split: "test" is a series of its own, with textures, furniture and cameras that "train" never shows.

    Raises:
        UserError: if a side is too short, a number negative or the split unknown.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < MIN_SIDE:
        raise UserError(f"size {height}x{width} is too small for a scene; use {MIN_SIDE} pixels or more a side")
    if seed < 0 or index < 0:
        raise UserError(f"seed {seed} and index {index} must be 0 or more")
    variety = variety_of(split)
    rng = np.random.default_rng((seed, index) if split == "train" else (seed, index, 1))
    for _ in range(_ATTEMPTS):
        layout = draw_layout(rng, height, width, variety)
        view = look(layout)
        labels = _labels(layout, view)
        if not _worth_seeing(layout, view, labels):
            continue
        picture, normal = paint(layout, view)
        rgb = _develop(rng, picture.reshape(3, height, width))
        if rgb.std() > 20:
            break
    else:
        raise RuntimeError(f"no good view in {_ATTEMPTS} attempts for seed {seed}, index {index}, {height}x{width}")
    shape = (height, width)
    inverse_depth = encode_depth(view.depth).reshape(shape)
    seen = np.einsum("ij,jn->in", layout.camera.axes.astype(np.float32), normal)
    normals = np.rint(127.5 * (1 + seen)).astype(np.uint8).T.reshape(*shape, 3)
    metadata = _describe(seed, index, layout, view, labels)
    if split != "train":
        metadata["split"] = split
    return Scene(rgb, inverse_depth, labels.reshape(shape), np.ascontiguousarray(normals), metadata)


def encode_depth(depth: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Structure map values of depths in metres; only infinity, the sky, becomes 0."""
    value = np.clip(np.rint(65535 * NEAR / depth.astype(np.float64)), 1, 65535)
    return np.where(np.isinf(depth), 0, value).astype(np.uint16)


def _labels(layout: Layout, view: View) -> NDArray[np.uint8]:
    """Class (N,) of every pixel."""
    table = np.array([solid.label for solid in layout.solids] + [GROUND, SKY], dtype=np.uint8)
    return table[view.surface]  # NOTHING is -1, the last entry


def _worth_seeing(layout: Layout, view: View, labels: NDArray[np.uint8]) -> bool:
    """No view that is nearly empty, nearly one class, nearly one distance, or blocked by something close."""
    solid = view.surface != NOTHING
    shares = np.bincount(labels, minlength=len(CLASS_NAMES)) / labels.size
    if shares.max() > 0.85 or shares[SKY] > 0.6 or view.depth.min() < NEAR:
        return False
    pieces = np.bincount(view.surface[solid], minlength=len(layout.solids) + 1)[:-1] / labels.size
    furniture = pieces[[not solid.shell for solid in layout.solids]]
    if furniture.size == 0 or furniture.max() > 0.5 or furniture.sum() < 0.08 or (furniture > 0.004).sum() < 3:
        return False
    near, far = np.percentile(view.depth[solid], (5, 95))
    return bool(far > 1.6 * near)


def _develop(rng: np.random.Generator, picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A photograph (H, W, 3) of the linear picture (3, H, W): exposure, white balance, gamma, vignette, noise."""
    _, height, width = picture.shape
    balance = np.exp(rng.normal(0, 0.06, (3, 1, 1))) * rng.uniform(0.8, 1.25)
    display = np.minimum(picture * balance.astype(np.float32), 1) ** np.float32(1 / rng.uniform(1.9, 2.5))
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    display *= 1 - np.float32(rng.uniform(0, 0.2)) * (y[:, None] ** 2 + x**2) / 2
    grain = np.float32(rng.uniform(0, 0.02) if rng.uniform() < 0.7 else 0.0)
    display += grain * rng.standard_normal(display.shape, dtype=np.float32)
    return np.ascontiguousarray(np.rint(np.clip(display, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def _rounded(values: NDArray[Any]) -> list[Any]:
    return np.round(values.astype(np.float64), 5).tolist()


def _describe(seed: int, index: int, layout: Layout, view: View, labels: NDArray[np.uint8]) -> dict[str, Any]:
    """The scene in numbers, ready for JSON."""
    camera = layout.camera
    seen = view.surface[view.surface != NOTHING]
    pixels = np.bincount(seen, minlength=len(layout.solids) + 1)
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    return {
        "name": f"{index:06d}",
        "seed": seed,
        "index": index,
        "height": camera.height,
        "width": camera.width,
        "near": NEAR,
        "kind": layout.kind,
        "camera": {
            "fov_degrees": round(layout.fov, 4),
            "focal_pixels": round(camera.focal, 4),
            "position": _rounded(camera.position),
            "right_down_forward": _rounded(camera.axes),
        },
        "depth_range": [round(float(bound(view.depth[view.surface != NOTHING])), 4) for bound in (np.min, np.max)],
        "lights": [
            {
                "kind": "sun" if lamp.distant else "point",
                "direction" if lamp.distant else "position": _rounded(lamp.vector),
                "color": _rounded(lamp.color),
            }
            for lamp in layout.lamps
        ],
        "fog_density": round(layout.fog_density, 5),
        "class_pixels": {name: int(count) for name, count in zip(CLASS_NAMES, counts, strict=True)},
        "objects": [
            {
                "class": CLASS_NAMES[solid.label],
                "shape": solid.shape,
                "center": _rounded(solid.center),
                "half_size": _rounded(solid.half),
                "axes": _rounded(solid.axes),
                "pattern": solid.material.pattern,
                "pixels": int(count),
            }
            for solid, count in zip(layout.solids, pixels, strict=False)
        ],
    }
