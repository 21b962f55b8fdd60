"""Scenes to test on have other textures, furniture and cameras; scenes to train on stay what they have always been."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sgmim_fast.cli import main
from sgmim_fast.data.scenes.geometry import CLASS_NAMES
from sgmim_fast.data.scenes.objects import arrange
from sgmim_fast.data.scenes.scene import Scene, render_scene
from sgmim_fast.data.scenes.synthetic import render_dataset
from sgmim_fast.data.scenes.textures import _PATTERNS, PATTERNS, UNSEEN_PATTERNS
from sgmim_fast.data.scenes.unseen_furniture import KINDS, arrange_unseen
from sgmim_fast.errors import UserError

PINNED = "494e63950619f0fff1612045313a07f0d9c6a382b892d6c19f2efd001d07d383"
"""Of a few scenes' descriptions (cameras, objects, pixels a class), as they were before there was another split."""
MEANS = (132.495, 119.349, 104.682, 120.55)
"""Of their pixels; a last bit may differ between processors."""


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(7, index, 48, "test") for index in range(40)]


def roll(scene: Scene) -> float:
    """Radians between the camera's right and the horizontal."""
    right = scene.metadata["camera"]["right_down_forward"][0]
    return abs(math.asin(right[2]))


def test_scenes_to_train_on_are_the_same_as_ever() -> None:
    found = [render_scene(seed, index, 48) for seed, index in ((0, 0), (0, 7), (3, 1), (11, 20))]
    digest = hashlib.sha256()
    for scene in found:
        assert "split" not in scene.metadata
        digest.update(json.dumps(scene.metadata, sort_keys=True).encode())
    assert digest.hexdigest() == PINNED
    np.testing.assert_allclose([scene.rgb.mean() for scene in found], MEANS, atol=0.02)


def test_descriptions_of_folders_to_train_on_are_the_same_as_ever(tmp_path: Path) -> None:
    render_dataset(tmp_path / "train", count=1, size=32, workers=1)
    render_dataset(tmp_path / "test", count=1, size=32, workers=1, split="test")
    train, test = (json.loads((tmp_path / name / "dataset.json").read_text())["request"] for name in ("train", "test"))
    assert train == {"generator": 1, "count": 1, "size": 32, "seed": 0, "normals": False}
    assert test == train | {"split": "test"}
    assert (tmp_path / "train/images/000000.jpg").read_bytes() != (tmp_path / "test/images/000000.jpg").read_bytes()
    with pytest.raises(UserError, match="already holds scenes made with other options"):
        render_dataset(tmp_path / "train", count=1, size=32, workers=1, split="test")


def test_textures_are_unseen(scenes: list[Scene]) -> None:
    assert not set(UNSEEN_PATTERNS) & set(PATTERNS)
    shown = {thing["pattern"] for scene in scenes for thing in scene.metadata["objects"]}
    assert shown == set(UNSEEN_PATTERNS)


def test_cameras_are_unseen(scenes: list[Scene]) -> None:
    train = [render_scene(7, index, 48) for index in range(40)]
    fields = [scene.metadata["camera"]["fov_degrees"] for scene in scenes]
    assert all(32 <= fov <= 39 or 81 <= fov <= 92 for fov in fields)
    assert min(fields) < 39
    assert max(fields) > 81
    assert all(40 <= scene.metadata["camera"]["fov_degrees"] <= 80 for scene in train)
    assert sum(roll(scene) > 0.3 for scene in scenes) > 10
    assert all(scene.metadata["split"] == "test" for scene in scenes)


def test_depths_are_like_those_of_training(scenes: list[Scene]) -> None:
    """Else a test would measure how well a scale was guessed."""
    means = []
    for found in (scenes, [render_scene(7, index, 48) for index in range(40)]):
        values = np.concatenate([scene.inverse_depth[scene.inverse_depth > 0].astype(np.float64) for scene in found])
        means.append(np.log(values).mean())
    assert abs(means[0] - means[1]) < 0.35


def test_all_classes_are_shown(scenes: list[Scene]) -> None:
    shares = np.array([np.bincount(scene.labels.ravel(), minlength=len(CLASS_NAMES)) for scene in scenes]) / 48**2
    assert ((shares > 0.005).sum(0) >= 3).all()


def test_unseen_furniture_stands_on_the_floor_below_the_ceiling() -> None:
    up = np.array([0.0, 0.0, 1.0])
    for number in range(200):
        rng = np.random.default_rng(number)
        solids = arrange_unseen(rng, np.zeros(2), 0.02, float(rng.uniform(0.1, 1.5)), 2.3)
        assert len(solids) >= 2
        tops = [solid.center[2] + solid.extent(up) for solid in solids]
        feet = [solid.center[2] - solid.extent(up) for solid in solids]
        assert max(tops) < 2.32
        assert min(feet) == pytest.approx(0.02, abs=1e-9)
    assert len(KINDS) == 6


def test_only_scenes_to_test_on_hold_unseen_furniture() -> None:
    usual, unseen = (
        arrange(np.random.default_rng(5), np.zeros(2), 0.0, 0.5, 3.0, unseen=unseen) for unseen in (False, True)
    )
    again = arrange_unseen(np.random.default_rng(5), np.zeros(2), 0.0, 0.5, 3.0)
    assert [solid.shape for solid in unseen] == [solid.shape for solid in again]
    assert [solid.shape for solid in usual] != [solid.shape for solid in unseen]


@pytest.mark.parametrize("pattern", UNSEEN_PATTERNS)
def test_patterns_are_filtered_by_the_size_of_a_pixel(pattern: str) -> None:
    """From afar a pattern is nearly flat, and near its own mean: no noise that nobody could predict."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-20, 20, (2, 20_000)).astype(np.float32)

    def first(width: float) -> np.ndarray:
        blend, _, _ = _PATTERNS[pattern]((0.5, 0.5, 0.5), x, y, np.full_like(x, width))
        return blend

    near, far = first(0.02), first(4.0)
    assert 0 <= near.min() <= near.max() <= 1.0001
    assert near.std() > 0.05
    assert far.std() < 0.5 * near.std()


def test_the_command_takes_a_split(tmp_path: Path) -> None:
    main(["synth", str(tmp_path / "scenes"), "--count", "1", "--size", "32", "--workers", "1", "--split", "test"])
    line = json.loads((tmp_path / "scenes" / "metadata.jsonl").read_text())
    assert line["split"] == "test"


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split 'val' is unknown; choose train or test"):
        render_dataset(tmp_path, count=1, split="val")  # type: ignore[arg-type]
