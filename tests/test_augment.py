"""Crop, flip, resize and normalise against torchvision's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from sgmim_fast.config import DataConfig
from sgmim_fast.data import augment


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    scale, ratio, draws = (0.67, 1.0), (3 / 4, 4 / 3), 3000
    rng = np.random.default_rng(0)
    ours = np.array([augment.random_resized_crop(rng, height, width, scale, ratio) for _ in range(draws)], float)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = torch.empty(1, height, width)
        theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(draws)], float)
    for boxes in (ours, theirs):
        top, left, h, w = boxes.T
        assert min(top.min(), left.min(), (height - top - h).min(), (width - left - w).min()) >= 0
        share, rounding = h * w / (height * width), 0.5 / height + 0.5 / width
        assert scale[0] - 1.1 * rounding < share.min() <= share.max() <= 1
        assert ratio[0] - 2 * rounding < (w / h).min() < (w / h).max() < ratio[1] + 2 * rounding
    for a, b in zip(ours.T, theirs.T, strict=True):
        error = np.sqrt((a.var() + b.var()) / draws)
        assert abs(a.mean() - b.mean()) < 4 * error
        assert 0.9 < a.std() / b.std() < 1.1


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 7), (7, 1), (1, 1)])
def test_crop_falls_back_to_torchvisions_central_box(height: int, width: int) -> None:
    scale, ratio = (0.9, 1.0), (3 / 4, 4 / 3)
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), list(scale), list(ratio))
    assert augment.random_resized_crop(np.random.default_rng(0), height, width, scale, ratio) == expected


@pytest.mark.parametrize("flip", [False, True])
def test_image_is_torchvisions_crop_resize_flip_normalise(flip: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    box = augment.crop(pixels, augment.Augmentation(7, 11, 70, 90, flip))
    ours = augment.finish_image(torch.from_numpy(box.copy()), flip, (32, 64))
    theirs = TF.resized_crop(Image.fromarray(pixels), 7, 11, 70, 90, [32, 64], InterpolationMode.BILINEAR)
    theirs = TF.to_tensor(TF.hflip(theirs) if flip else theirs)
    theirs = TF.normalize(theirs, list(augment.IMAGENET_MEAN), list(augment.IMAGENET_STD))
    assert ours.is_contiguous()
    # Both round to 8 bits, Pillow twice: a level of 1 / 255, times 1 / std, apart at most.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1 / 255 / min(augment.IMAGENET_STD) + 1e-6)
    assert (ours - theirs).abs().mean() < 4e-3


def test_map_resize_invents_no_depths_at_edges() -> None:
    step = torch.zeros(1, 96, 96)
    step[:, :, 50:] = 1000
    # A third of the size: each half-pixel centre falls on a centre of the source, so plain bilinear copies.
    third = augment.finish_structure(step, False, (32, 32))
    assert set(third.unique().tolist()) == {0.0, 1000.0}
    mirrored = augment.finish_structure(step, True, (32, 32))
    assert mirrored.is_contiguous()
    assert torch.equal(mirrored, third.flip(-1))


def test_flip_can_be_switched_off_and_is_even() -> None:
    rng = np.random.default_rng(0)
    flips = [augment.draw_augmentation(rng, 50, 60, DataConfig()).flip for _ in range(1000)]
    assert 430 < sum(flips) < 570
    assert not any(augment.draw_augmentation(rng, 50, 60, DataConfig(flip=False)).flip for _ in range(50))
