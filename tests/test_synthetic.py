"""Synthetic scenes: varied, no shortcuts through colour, the same bytes however they are made."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sgmim_fast.data.scenes import synthetic
from sgmim_fast.data.scenes.geometry import CLASS_NAMES
from sgmim_fast.data.scenes.scene import encode_depth
from sgmim_fast.data.scenes.synthetic import NEAR, Scene, render_dataset, render_scene
from sgmim_fast.errors import UserError

F64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(11, index, 64) for index in range(50)]


def test_only_the_sky_has_no_depth() -> None:
    depth = np.array([np.inf, 1e6, 2 * NEAR, NEAR, NEAR / 2], dtype=np.float32)
    assert encode_depth(depth).tolist() == [0, 1, 32768, 65535, 65535]


def test_sky_has_no_depth_and_everything_else_has(scenes: list[Scene]) -> None:
    for scene in scenes:
        np.testing.assert_array_equal(scene.inverse_depth == 0, scene.labels == 0)
        assert scene.labels.max() < len(CLASS_NAMES)
        assert scene.metadata["depth_range"][0] >= NEAR
        length = np.linalg.norm(scene.normals / 127.5 - 1, axis=-1)
        assert np.abs(length[scene.labels > 0] - 1).max() < 0.03
        assert length[scene.labels == 0].max(initial=0) < 0.03


def test_scenes_are_varied_and_well_exposed(scenes: list[Scene]) -> None:
    shares = np.array([np.bincount(scene.labels.ravel(), minlength=8) / scene.labels.size for scene in scenes])
    assert ((shares > 0.01).sum(0) >= 6).all(), "every class is seen in several scenes"
    assert ((shares > 0.005).sum(1) >= 3).all(), "every scene shows several classes"
    assert shares.max() <= 0.85
    assert {scene.metadata["kind"] for scene in scenes} == {"room", "yard", "open"}
    assert len({thing["pattern"] for scene in scenes for thing in scene.metadata["objects"]}) == 11
    for scene in scenes:
        brightness = scene.rgb.mean()
        assert 50 < brightness < 200
        assert scene.rgb.std() > 20
        assert (scene.rgb == 255).mean() < 0.4
        assert (scene.rgb < 5).mean() < 0.4
        surface = scene.inverse_depth[scene.inverse_depth > 0].astype(float)
        assert np.percentile(surface, 95) > 1.5 * np.percentile(surface, 5)


Key = Callable[[Scene], NDArray[Any]]


def color_bins(scene: Scene) -> NDArray[np.int64]:
    red, green, blue = np.moveaxis(scene.rgb.astype(np.int64) >> 5, -1, 0)
    return red * 64 + green * 8 + blue


def image_rows(scene: Scene) -> NDArray[np.int64]:
    return np.indices(scene.labels.shape)[0]


def painted_labels(scene: Scene) -> NDArray[np.int64]:
    return scene.labels.astype(np.int64) * 40


def guesses(train: list[Scene], test: list[Scene], key: Key, value: Key, summary: Callable[[Any], float]) -> F64:
    """For the test pixels: the summary of the values that training pixels with the same key have."""

    def surfaces(scenes: list[Scene], read: Key) -> NDArray[Any]:
        return np.concatenate([read(scene)[scene.labels > 0] for scene in scenes])

    keys, values, asked = surfaces(train, key), surfaces(train, value), surfaces(test, key)
    table = np.full(max(keys.max(), asked.max()) + 1, summary(values), dtype=np.float64)
    for name in np.unique(keys):
        table[name] = summary(values[keys == name])
    return np.stack([table[asked], surfaces(test, value)])


def test_class_and_depth_cannot_be_read_from_colour(scenes: list[Scene]) -> None:
    train, test = scenes[:40], scenes[40:]

    def accuracy(key: Key) -> float:
        guess, truth = guesses(
            train, test, key, lambda scene: scene.labels, lambda part: float(np.bincount(part).argmax())
        )
        return float((guess == truth).mean())

    def explained(key: Key) -> float:
        guess, truth = guesses(train, test, key, lambda scene: np.log(np.maximum(scene.inverse_depth, 1)), np.mean)
        return float(1 - np.mean((truth - guess) ** 2) / np.var(truth))

    assert accuracy(painted_labels) == 1, "the predictor reads what colour gives away"
    assert accuracy(color_bins) < 0.45
    assert explained(color_bins) < 0.1
    assert explained(image_rows) < 0.5


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK", 4)


@pytest.mark.usefixtures("short_chunks")
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    one = render_dataset(tmp_path / "one", count=18, size=32, seed=5, workers=1, normals=True)
    two = render_dataset(
        tmp_path / "two", count=18, size=32, seed=5, workers=2, normals=True, progress=lambda *step: seen.append(step)
    )
    assert content(one) == content(two)
    assert seen == [(done, 18) for done in range(19)]
    assert len(content(one)) == 18 * 4 + 2


def test_files_hold_what_render_scene_returns(tmp_path: Path) -> None:
    out = render_dataset(tmp_path / "scenes", count=2, size=48, seed=9, workers=1)
    scene = render_scene(9, 1, 48)
    with Image.open(out / "structure" / "000001.png") as image:
        assert image.mode == "I;16"
        np.testing.assert_array_equal(np.array(image), scene.inverse_depth)
    with Image.open(out / "labels" / "000001.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), scene.labels)
    with Image.open(out / "images" / "000001.jpg") as image:
        assert image.mode == "RGB"
        assert np.abs(np.array(image).astype(int) - scene.rgb).mean() < 8
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert lines == [render_scene(9, index, 48).metadata for index in range(2)]
    about = json.loads((out / "dataset.json").read_text())
    assert about["labels"] == list(CLASS_NAMES)
    assert about["near"] == NEAR
    assert not (out / "normals").exists()


def test_scene_depends_on_seed_and_index() -> None:
    first, again = render_scene(1, 2, 32), render_scene(1, 2, 32)
    np.testing.assert_array_equal(first.rgb, again.rgb)
    assert (first.rgb != render_scene(1, 3, 32).rgb).any()
    assert (first.rgb != render_scene(2, 2, 32).rgb).any()


@pytest.mark.parametrize("size", [(40, 96), (96, 33)])
def test_scene_need_not_be_square(size: tuple[int, int]) -> None:
    scene = render_scene(0, 0, size)
    assert scene.rgb.shape == scene.normals.shape == (*size, 3)
    assert scene.labels.shape == scene.inverse_depth.shape == size


class Interruption(Exception):
    pass


@pytest.mark.usefixtures("short_chunks")
def test_an_interrupted_run_is_completed(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 6:
            raise Interruption

    arguments: dict[str, Any] = {"count": 9, "size": 32, "seed": 3, "workers": 1}
    out = tmp_path / "scenes"
    with pytest.raises(Interruption):
        render_dataset(out, **arguments, progress=stop)
    assert not (out / "metadata.jsonl").exists()
    first, early = out / "images" / "000000.jpg", []
    written = first.stat().st_mtime_ns
    render_dataset(out, **arguments, progress=lambda done, total: early.append(done))
    assert early[0] == 4, "finished chunks are kept"
    assert first.stat().st_mtime_ns == written
    whole = render_dataset(tmp_path / "whole", **arguments)
    assert content(out) == content(whole)
    (out / "structure" / "000005.png").unlink()
    first.write_bytes(b"")
    assert content(render_dataset(out, **arguments)) == content(whole), "lost and empty files are rendered again"


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="other already holds other data; choose an empty"):
        render_dataset(other, count=1, size=32)
    assert content(other) == {"thesis.txt": b"years of work"}
    (other / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="holds other data"):
        render_dataset(other, count=1, size=32)
    with pytest.raises(UserError, match=r"thesis\.txt is a file"):
        render_dataset(other / "thesis.txt", count=1, size=32)
    scenes = render_dataset(tmp_path / "scenes", count=1, size=32, seed=4, workers=1)
    before = content(scenes)
    with pytest.raises(UserError, match=r"seed 4.*repeat those"):
        render_dataset(scenes, count=1, size=32, seed=5, workers=1)
    assert content(scenes) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count 0"),
        ({"count": 1, "size": 31}, "size 31"),
        ({"count": 1, "seed": -1}, "seed -1"),
        ({"count": 1, "workers": 0}, "workers 0"),
    ],
)
def test_senseless_arguments_are_refused(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_dataset(tmp_path / "scenes", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "scenes").exists()


def test_senseless_scenes_are_refused() -> None:
    with pytest.raises(UserError, match="size 32x16"):
        render_scene(0, 0, (32, 16))
    with pytest.raises(UserError, match="index -1"):
        render_scene(0, -1, 32)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent.name != "labels":
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"labels/000000\.png: no space left") as caught:
        render_dataset(tmp_path / "scenes", count=2, size=32, workers=1)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "scenes" / "labels").iterdir())


def test_failures_in_other_processes_arrive_here(tmp_path: Path) -> None:
    out = tmp_path / "scenes"

    def kill_one(done: int, total: int) -> None:
        if done == 1:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(UserError, match=r"ended from outside.*fewer workers"):
        render_dataset(out, count=400, size=32, workers=2, progress=kill_one)
    assert not multiprocessing.active_children()

    def block(done: int, total: int) -> None:
        if done == 0:
            (tmp_path / "blocked" / "images" / "000000.jpg").mkdir(parents=True)

    with pytest.raises(UserError, match=r"images/000000\.jpg: Is a directory"):
        render_dataset(tmp_path / "blocked", count=64, size=32, workers=2, progress=block)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_an_interruption(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "scenes"
    code = "import sys, pathlib; from sgmim_fast.data.scenes.synthetic import render_dataset as render; "
    code += "render(pathlib.Path(sys.argv[1]), count=100000, size=32, workers=2)"
    main = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    try:
        while len(list(out.glob("images/*.jpg"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
        assert len(children) >= 2
        for child in children:
            masks = re.findall(r"Sig(?:Blk|Ign):\s*(\w+)", Path(f"/proc/{child}/status").read_text())
            deaf = any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)
            assert deaf, "Ctrl-C is the business of the process that started the others"
        # Ctrl-C goes to the whole group; a kill only to the one that started the others.
        (os.killpg if how == signal.SIGINT else os.kill)(main.pid, how)
        _, errors = main.communicate(timeout=120)  # its end closes the pipe that all of them share
        while True:
            os.killpg(main.pid, 0)
            assert time.monotonic() < deadline, "processes were left behind"
            time.sleep(0.05)
    except ProcessLookupError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(main.pid, signal.SIGKILL)
    assert errors.count("KeyboardInterrupt") == (how == signal.SIGINT)


def test_rendering_does_not_import_torch() -> None:
    """Every process would load it; the package's own public names are left out of the question."""
    code = """
import importlib.machinery, importlib.util, sys
spec = importlib.util.find_spec("sgmim_fast")
bare = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("sgmim_fast", None, is_package=True))
bare.__path__ = list(spec.submodule_search_locations)
sys.modules["sgmim_fast"] = bare
import sgmim_fast.data.scenes.synthetic
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
