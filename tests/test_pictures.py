"""Pictures of predictions: colours that mean what they should, and sizes."""

import numpy as np
import pytest
import torch

from sgmim_fast.colors import class_colors
from sgmim_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD
from sgmim_fast.tasks.pictures import (
    UNKNOWN,
    class_legend,
    class_picture,
    depth_limits,
    depth_picture,
    image_picture,
    overlay,
    side_by_side,
)


def test_image_looks_as_it_did() -> None:
    pixels = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    found = image_picture((pixels / 255 - mean) / std)
    assert np.array_equal(found, pixels.permute(1, 2, 0).numpy())


def test_near_is_bright_and_unknown_is_grey() -> None:
    depth = torch.linspace(1, 9, 50).repeat(4, 1)
    depth[0, :3] = torch.tensor([0.0, torch.nan, torch.inf])
    picture = depth_picture(depth, (1, 9))
    assert (picture.shape, picture.dtype) == ((4, 50, 3), np.uint8)
    assert (picture[0, :3] == UNKNOWN).all()
    brightness = picture[1].astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness) <= 1.5).all()  # bytes: a step may round up
    assert brightness[0] > 200 > 30 > brightness[-1]


def test_limits_are_shared_and_leave_outliers_out() -> None:
    one, other = torch.full((10, 10), 2.0), torch.full((10, 10), 4.0)
    other[0, 0], other[0, 1] = 1000.0, 0.0
    assert depth_limits(one, other) == (2.0, 4.0)
    assert depth_limits(torch.zeros(3, 3)) == (0.0, 1.0)
    assert (depth_picture(torch.zeros(3, 3)) == UNKNOWN).all()
    assert depth_picture(one).shape == (10, 10, 3)


def test_classes_keep_their_colour() -> None:
    labels = torch.tensor([[0, 1, 149, 255, 150]])
    picture = class_picture(labels, 150)
    assert np.array_equal(picture[0, :3], class_colors(150)[[0, 1, 149]])
    assert (picture[0, 3:] == UNKNOWN).all()


@pytest.mark.parametrize("count", [2, 19, 150])
def test_colours_of_classes_differ(count: int) -> None:
    colors = class_colors(count).astype(float)
    distance = np.abs(colors[:, None] - colors[None]).max(-1) + 255 * np.eye(count)
    assert distance.min() >= 5
    assert np.abs(np.diff(colors, axis=0)).max(-1).min() > 20  # neighbours
    assert np.array_equal(class_colors(count), class_colors(150)[:count])


def test_legend_has_the_classes_in_sight() -> None:
    labels = torch.tensor([[2, 2, 2, 0, 255, 255]])
    first, second = class_legend(labels, ["wall", "sky", "tree"])
    assert (first.label, first.name, first.share) == (2, "tree", 0.75)
    assert (second.label, second.name, second.share) == (0, "wall", 0.25)
    assert bytes.fromhex(first.color[1:]) == bytes(class_picture(labels, 3)[0, 0])
    assert class_legend(torch.full((2, 2), 255), ["wall"]) == []


def test_pictures_side_by_side() -> None:
    black, white = np.zeros((4, 5, 3), dtype=np.uint8), np.full((4, 6, 3), 255, dtype=np.uint8)
    row = side_by_side(black, white, black, gap=2)
    assert row.shape == (4, 5 + 2 + 6 + 2 + 5, 3)
    assert not row[:, :5].any()
    assert (row[:, 5:15] == 255).all()
    assert side_by_side(black).shape == black.shape


def test_overlay_mixes() -> None:
    image, picture = np.full((1, 1, 3), 100, dtype=np.uint8), np.full((1, 1, 3), 200, dtype=np.uint8)
    assert overlay(image, picture, 0.6).tolist() == [[[160, 160, 160]]]
    assert overlay(image, picture, 0.0).tolist() == image.tolist()
