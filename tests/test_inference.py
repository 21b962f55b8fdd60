"""Windows and mirror images: pixelwise predictors are not changed, and others are averaged as the sources do it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgmim_fast import UserError
from sgmim_fast.config import DepthEvalConfig, SegmentationEvalConfig
from sgmim_fast.tasks.inference import (
    flip_average,
    predict_classes,
    predict_depth,
    shifted_places,
    shifted_windows,
    sliding_places,
    sliding_window,
)

Predict = Callable[[Tensor], Tensor]


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pixelwise(x: Tensor) -> Tensor:
    return torch.cat((x.square().sum(1, keepdim=True), x[:, :1] * x[:, 1:2]), 1)


def by_place(x: Tensor) -> Tensor:
    """Depends on the place in the window and on all of it, so it tells windows apart."""
    ramp = torch.arange(x.shape[-1], dtype=x.dtype) + 100 * torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
    return ramp * x[:, :1] + x.mean((1, 2, 3), keepdim=True)


class Counted:
    """A predictor that notes the shapes it is given."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.predict(x)


def source_depth(predict: Predict, x: Tensor, count: int, flip: bool) -> Tensor:
    """MIM-Depth-Estimation's test of one image: all windows and their mirror images in one batch."""
    height, width = x.shape[-2:]
    interval = (width - height) // (count - 1)
    parts = torch.cat([x[..., number * interval : number * interval + height] for number in range(count)])
    if flip:
        both = predict(torch.cat((parts, torch.flip(parts, [3]))))
        found = (both[:count] + torch.flip(both[count:], [3])) / 2
    else:
        found = predict(parts)
    total, times = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
    for number in range(count):
        total[..., number * interval : number * interval + height] += found[number]
        times[..., number * interval : number * interval + height] += 1
    return total / times


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("size", "count"), [((12, 16), 2), ((11, 41), 16), ((8, 29), 4)])
def test_shifted_windows_are_those_of_mim_depth(size: tuple[int, int], count: int, flip: bool) -> None:
    x = image(*size)
    found = predict_depth(by_place, x, DepthEvalConfig(flip=flip, windows=count), at_once=3)
    torch.testing.assert_close(found, source_depth(by_place, x, count, flip), rtol=1e-12, atol=1e-12)


def test_windows_of_the_data_sets() -> None:
    nyu, kitti = shifted_places((480, 640), 2), shifted_places((352, 1216), 16)
    assert nyu == [(0, 0), (0, 160)]
    # 57 pixels apart as in the source, whose last window, at 855, leaves out the last 9 columns
    assert kitti == [*((0, 57 * number) for number in range(15)), (0, 864)]


@pytest.mark.parametrize(
    ("size", "count"), [((12, 31), 4), ((9, 100), 14), ((12, 13), 16), ((12, 12), 4), ((20, 9), 4)]
)
def test_every_column_is_predicted(size: tuple[int, int], count: int) -> None:
    x = image(*size, batch=2)
    torch.testing.assert_close(shifted_windows(pixelwise, x, count), pixelwise(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [2, 12])
def test_windows_that_leave_columns_out_are_an_error(count: int) -> None:
    """Twelve would cover 9 x 100 if they were not whole steps of 8 pixels apart: the last step is of 11."""
    with pytest.raises(
        UserError, match=rf"evaluation\.windows {count} leaves columns of .* 9 x 100 pixels out; choose 14"
    ):
        shifted_windows(pixelwise, image(9, 100), count)


def test_one_window_is_the_whole_image() -> None:
    counted = Counted(pixelwise)
    assert torch.equal(shifted_windows(counted, image(8, 30), 1), pixelwise(image(8, 30)))
    assert counted.shapes == [(1, 3, 8, 30)]


@pytest.mark.parametrize(("at_once", "batches"), [(1, [1] * 5), (2, [2, 2, 1]), (8, [5])])
def test_windows_are_predicted_together(at_once: int, batches: list[int]) -> None:
    counted = Counted(by_place)
    found = shifted_windows(counted, image(8, 29, batch=2), 5, at_once)
    assert counted.shapes == [(2 * batch, 3, 8, 8) for batch in batches]
    torch.testing.assert_close(found, torch.cat([shifted_windows(by_place, x, 5) for x in image(8, 29, 2).split(1)]))


def test_flip_average() -> None:
    x = image(4, 6)
    torch.testing.assert_close(flip_average(pixelwise)(x), pixelwise(x))
    expected = (by_place(x) + by_place(x.flip(-1)).flip(-1)) / 2
    assert torch.equal(flip_average(by_place)(x), expected)
    assert not torch.allclose(expected, by_place(x))


def source_slide(predict: Predict, x: Tensor, crop: int, stride: int) -> Tensor:
    """mmsegmentation's slide_inference for images of at least the crop's size."""
    height, width = x.shape[-2:]
    rows = max(height - crop + stride - 1, 0) // stride + 1
    columns = max(width - crop + stride - 1, 0) // stride + 1
    total, times = torch.zeros_like(predict(x)), torch.zeros_like(x[:, :1])
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            part = predict(x[..., top:bottom, left:right])
            total += F.pad(part, (left, width - right, top, height - bottom))
            times[..., top:bottom, left:right] += 1
    return total / times


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (33, 16), (31, 53)])
@pytest.mark.parametrize("stride", [16, 11, 1])
def test_sliding_window_is_that_of_mmsegmentation(size: tuple[int, int], stride: int) -> None:
    x = image(*size)
    found = sliding_window(by_place, x, 16, stride, at_once=4)
    torch.testing.assert_close(found, source_slide(by_place, x, 16, stride), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("size", [(5, 7), (16, 3), (3, 40), (31, 53)])
def test_pixelwise_predictor_is_not_changed_by_crops(size: tuple[int, int]) -> None:
    x = image(*size, batch=2)
    counted = Counted(pixelwise)
    torch.testing.assert_close(sliding_window(counted, x, 16, 11), pixelwise(x), rtol=1e-12, atol=1e-12)
    assert all(shape[-2:] == (16, 16) for shape in counted.shapes)


def test_grid_by_hand() -> None:
    """ADE20K's 512 x 683 takes two crops beside each other, and Cityscapes-like 1024 x 2048 takes 3 x 6."""
    assert sliding_places((512, 683), 512, 341) == [(0, 0), (0, 171)]
    assert len(sliding_places((1024, 2048), 512, 341)) == 3 * 6
    assert sliding_places((512, 512), 512, 341) == [(0, 0)]


def logits(x: Tensor) -> Tensor:
    return torch.cat((by_place(x), -by_place(x), pixelwise(x)), 1)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_segmentation_averages_logits_of_crops_and_probabilities_of_mirror_images(mode: str) -> None:
    x = image(20, 27)
    settings = SegmentationEvalConfig(mode=mode, crop=16, stride=11, flip=True)  # type: ignore[arg-type]
    found = predict_classes(logits, x, settings)
    predict = logits if mode == "whole" else lambda x: source_slide(logits, x, 16, 11)
    expected = (predict(x).softmax(1) + predict(x.flip(-1)).flip(-1).softmax(1)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


def test_logits_are_brought_to_the_size_of_the_labels() -> None:
    x = image(20, 27)
    found = predict_classes(logits, x, SegmentationEvalConfig(), size=(33, 50))
    expected = F.interpolate(logits(x), (33, 50), mode="bilinear", align_corners=False).softmax(1)
    torch.testing.assert_close(found, expected)
